"""TRL's side. Runs in an environment that has TRL 0.23.1, the last release with these trainers.

    python -m tests.benchmarks.peers.trl_side turns DESCRIPTOR WORK FOLDER
    python -m tests.benchmarks.peers.trl_side race SETTINGS FOLDER

Only TRL's public trainers are called. What is not named here is TRL's default.
"""

import json
import random
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft import LoraConfig
from torch import Tensor
from trl import (
    AlignPropConfig,
    AlignPropTrainer,
    DDPOConfig,
    DDPOTrainer,
    DefaultDDPOStableDiffusionPipeline,
)

from tests.benchmarks.peers.turns import Turns, Work, redness, versions

TRL_RANK = 4
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
"""The rank and the layers of TRL's own LoRA; the rank is no option of its pipeline."""

Reward = Callable[[Tensor, Sequence[str]], Tensor]
"""``(images (B, 3, H, W), prompts) -> (B,)``."""


class Pipeline(DefaultDDPOStableDiffusionPipeline):
    """TRL's pipeline with a LoRA of another rank.

    Args:
        folder: A diffusers pipeline.
        rank: Of the LoRA.
    """

    def __init__(self, folder: str, rank: int) -> None:
        PartialState()  # its constructor logs, for which accelerate asks for this
        super().__init__(folder, use_lora=True)
        self.rank = rank

    def get_trainable_layers(self) -> Any:
        if self.rank == TRL_RANK:
            return super().get_trainable_layers()
        lora = LoraConfig(
            r=self.rank, lora_alpha=self.rank, init_lora_weights="gaussian", target_modules=TARGETS
        )
        self.sd_pipeline.unet.add_adapter(lora)
        return self.sd_pipeline.unet


def trainer(
    method: str,
    settings: dict[str, Any],
    pipeline: Pipeline,
    reward: Reward,
    prompts: Iterator[str],
    out: Path,
) -> Any:
    """TRL's trainer of a method.

    Args:
        method: ``ddpo`` or ``alignprop``.
        settings: For its config. Precision is float32: TRL's default, fp16, is for GPUs.
        pipeline: What is trained.
        reward: The reward.
        prompts: The next image's prompt.
        out: Folder for its checkpoints, as its example scripts set it.
    """
    project = {"project_dir": str(out), "logging_dir": str(out / "logs")}
    project |= {"automatic_checkpoint_naming": True, "total_limit": 5}
    shared = {"mixed_precision": "no", "project_kwargs": project} | settings
    warnings.filterwarnings("ignore", category=DeprecationWarning)

    def prompt_fn() -> tuple[str, dict[str, Any]]:
        return next(prompts), {}

    if method == "ddpo":
        config = DDPOConfig(**shared)
        return DDPOTrainer(config, lambda images, given, _: (reward(images, given), {}), prompt_fn, pipeline)
    aligned = AlignPropConfig(**shared)
    return AlignPropTrainer(
        aligned, lambda images, given, _: (reward(images, given), {}), prompt_fn, pipeline
    )


def same_work(work: Work) -> dict[str, Any]:
    """TRL's options for the round of work that both sides do."""
    shared = {
        "sample_num_steps": work.steps,
        "sample_guidance_scale": work.guidance,
        "sample_eta": 1.0,
        "train_batch_size": work.batch,
    }
    if work.method == "ddpo":
        batches = {"sample_batch_size": work.batch, "sample_num_batches_per_epoch": work.images // work.batch}
        return shared | batches | {"train_gradient_accumulation_steps": 1, "train_timestep_fraction": 1.0}
    window = {
        "truncated_backprop_rand": False,
        "truncated_backprop_timestep": work.steps - work.attached,
    }
    return shared | window | {"train_gradient_accumulation_steps": work.images // work.batch}


def take_turns(descriptor: int, work: Work, folder: Path) -> None:
    """Do a round in each turn."""
    rewards: list[Tensor] = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = redness(images)
        rewards.append(scores.detach())
        return scores

    turns, pipeline = Turns(descriptor), Pipeline(work.pipeline, work.rank)
    learner = trainer(work.method, same_work(work), pipeline, reward, cycle(work.given), folder)
    turns.watch(pipeline.unet, pipeline.vae.decoder)
    turns.introduce(sum(p.numel() for p in pipeline.unet.parameters() if p.requires_grad))
    step = 0
    for number in range(work.rounds + 1):
        turns.begin()
        step = learner.step(number, step)
        turns.end(float(torch.cat(rewards).mean()))
        rewards.clear()


class Racer:
    """Trains until a budget is spent or a reward is reached, measuring the held-out reward now and then.

    Its state is saved at every measurement: TRL's own resumption does not keep the statistics of prompts or
    the order of draws. Seconds are CPU time of training alone.

    Args:
        settings: ``method``, ``pipeline``, ``seed``, ``config`` (options of TRL), ``rewards`` (class, options
            and weight by name), ``train`` and ``held_out`` (prompts), ``images_per_prompt``, ``every``
            (epochs between measurements), ``sample_batch``; and where it ends: ``seconds``, ``epochs``,
            ``target``.
        folder: Where its state and its curve are.
    """

    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        from lit_align import rewards  # only here: its imports must not count in the turns' memory

        self.settings, self.folder = settings, folder
        parts = {
            name: getattr(rewards, kind)(**options)
            for name, (kind, options, _) in settings["rewards"].items()
        }
        weights = {name: weight for name, (_, _, weight) in settings["rewards"].items()}
        self.bank = rewards.RewardBank(parts, weights)
        self.pipeline = Pipeline(settings["pipeline"], TRL_RANK)
        self.draw = np.random.default_rng(settings["seed"])
        own = settings["config"] | {"seed": settings["seed"], "save_freq": sys.maxsize}
        self.trainer = trainer(settings["method"], own, self.pipeline, self.score, self.prompts(), folder)
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.curve: list[tuple[float, int, float]] = []  # seconds, images, held-out reward

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The bank's total; both sides train on it and are measured by it."""
        return self.bank(images.float(), list(prompts)).total

    def prompts(self) -> Iterator[str]:
        """A random training prompt for each image, as in TRL's example scripts."""
        while True:
            yield self.settings["train"][self.draw.integers(len(self.settings["train"]))]

    def run(self) -> None:
        """Go on from wherever the state is, until the end."""
        self.load()
        if not self.curve:
            self.measure()
        while not self.ended():
            started = time.process_time()
            self.step = self.trainer.step(self.epoch, self.step)
            self.seconds += time.process_time() - started
            self.epoch += 1
            if self.epoch % self.settings["every"] == 0 or self.ended():
                self.measure()

    def ended(self) -> bool:
        """Whether it has the reward, or has spent its seconds or its epochs."""
        spent = self.seconds >= self.settings["seconds"] or self.epoch >= self.settings["epochs"]
        return spent or self.curve[-1][2] >= self.settings["target"]

    @torch.no_grad()
    def measure(self) -> None:
        """Add a point to the curve, sampled as in training with noise that is always the same; save all."""
        before, unet = torch.get_rng_state(), self.pipeline.unet
        torch.manual_seed(self.settings["seed"])
        unet.eval()
        prompts = [p for p in self.settings["held_out"] for _ in range(self.settings["images_per_prompt"])]
        size, total = self.settings["sample_batch"], 0.0
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            images = self.pipeline(
                prompt=some,
                num_inference_steps=self.trainer.config.sample_num_steps,
                guidance_scale=self.trainer.config.sample_guidance_scale,
                eta=self.trainer.config.sample_eta,
                output_type="pt",
            ).images
            total += float(self.score(images, some).sum())
        torch.set_rng_state(before)
        config = self.trainer.config
        batches = getattr(config, "sample_num_batches_per_epoch", config.train_gradient_accumulation_steps)
        size = getattr(config, "sample_batch_size", config.train_batch_size)
        self.curve.append((self.seconds, self.epoch * batches * size, total / len(prompts)))
        self.save()

    def save(self) -> None:
        """Write the state, then the curve, each whole or not at all."""
        trained = {n: p.detach() for n, p in self.pipeline.unet.named_parameters() if p.requires_grad}
        tracker = getattr(self.trainer, "stat_tracker", None)
        stats = (
            {str(prompt): [float(r) for r in kept] for prompt, kept in tracker.stats.items()}
            if tracker
            else {}
        )
        state = {
            "trained": trained,
            "optimizer": self.trainer.optimizer.state_dict(),
            "draws": [torch.get_rng_state(), json.dumps(self.draw.bit_generator.state), random.getstate()],
            "stats": stats,
            "counters": [self.epoch, self.step, self.seconds],
            "curve": self.curve,
        }
        part = self.folder / "state.part"
        torch.save(state, part)
        part.replace(self.folder / "state.pt")

    def load(self) -> None:
        """Take up the state, if there is one."""
        if not (path := self.folder / "state.pt").exists():
            return
        state = torch.load(path, weights_only=True)
        parameters = dict(self.pipeline.unet.named_parameters())
        with torch.no_grad():
            for name, value in state["trained"].items():
                parameters[name].copy_(value)
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        noise, order, window = state["draws"]
        torch.set_rng_state(noise)
        self.draw.bit_generator.state = json.loads(order)
        random.setstate(window)
        for prompt, kept in state["stats"].items():
            size, again = self.trainer.stat_tracker.buffer_size, map(np.float32, kept)  # as rewards come
            self.trainer.stat_tracker.stats[prompt] = deque(again, maxlen=size)
        self.epoch, self.step, self.seconds = state["counters"]
        self.curve = [tuple(point) for point in state["curve"]]


def main() -> None:
    """Run the command line."""
    torch.set_num_threads(1)
    kind, *given = sys.argv[1:]
    if kind == "turns":
        descriptor, work, folder = given
        take_turns(int(descriptor), Work(**json.loads(work)), Path(folder))
        return
    settings, folder = json.loads(Path(given[0]).read_text()), Path(given[1])
    racer = Racer(settings, folder)
    racer.run()
    (folder / "curve.json").write_text(json.dumps(racer.curve))
    (folder / "versions.json").write_text(json.dumps(versions()))


if __name__ == "__main__":
    main()
