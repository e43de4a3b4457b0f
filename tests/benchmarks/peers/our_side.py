"""Our side: ``lit_align fit``, with callbacks that wait for a turn or count CPU time."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer

from tests.benchmarks.harness.plan import ROOT, text
from tests.benchmarks.peers.turns import Turns, Work

REDNESS = '{"rewards": {"redness": {"class_path": "Redness"}}, "weights": {"redness": 1.0}}'


def arguments(work: Work, descriptor: int, folder: Path) -> list[str]:
    """Arguments of ``python -m lit_align`` for the work that TRL does with ``trl_side.same_work``.

    Learning rates, weight decay, clips and advantages are TRL's defaults: both sides also learn alike.
    """
    prompts = len(set(work.given))
    callback = {
        "class_path": "tests.benchmarks.peers.our_side.TurnTaker",
        "init_args": {"descriptor": descriptor},
    }
    lr, decay = (3e-4, 1e-4) if work.method == "ddpo" else (1e-3, 1e-4)
    model = {
        "backbone.pretrained": work.pipeline,
        "backbone.lora": {
            "rank": work.rank,
            "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
        },  # TRL's layers
        "sampler.init_args.num_steps": work.steps,
        "sampler.init_args.eta": 1.0,
        "sampler.init_args.noisy_steps": work.steps,
        "sampling.guidance": work.guidance,
        "sampling.batch": work.batch,
        "optimisation.optimizer.init_args.lr": lr,
        "optimisation.optimizer.init_args.weight_decay": decay,
        "optimisation.micro_batch": work.batch,
        "optimisation.clip_norm": 1.0,
    }
    if work.method == "ddpo":
        model |= {
            "advantages": {"class_path": "BatchAdvantages"},
            "clip_range": 1e-4,
            "kl_target": None,
            "updates": work.images // work.batch,
            "timestep_fraction": 1.0,
        }
    else:
        model |= {
            "backbone.checkpointing": "prediction",
            "truncation": {"class_path": "FixedWindow", "init_args": {"steps": work.attached}},
        }
    data = {
        "source": {"class_path": "TextPrompts", "init_args": {"path": work.prompts}},
        "images_per_prompt": work.images // prompts,
        "prompts_per_batch": prompts,
        "batches_per_epoch": work.rounds + 1,
        "validation_source": {"class_path": "Animals"},  # it must have some, and validates never
        "validation_prompts": 1,
        "test_fraction": 0.0,
    }
    trainer = {
        "accelerator": "cpu",
        "logger.init_args.save_dir": str(folder),
        "max_epochs": 1,
        "limit_train_batches": work.rounds + 1,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    options = {f"model.{name}": value for name, value in model.items()}
    options |= {f"data.{name}": value for name, value in data.items()}
    options |= {f"trainer.{name}": value for name, value in trainer.items()}
    return [
        "fit",
        f"--config={ROOT / 'configs' / f'{work.method}.yaml'}",
        f"--model.rewards.init_args={REDNESS}",
        *(f"--{name}={text(value)}" for name, value in options.items()),
        f"--trainer.callbacks+={json.dumps(callback)}",
    ]


class TurnTaker(Callback):
    """Makes each rollout batch a turn: from its start to that of the next, checkpoint and logs included.

    Args:
        descriptor: Of our end of the pipe.
    """

    def __init__(self, descriptor: int) -> None:
        torch.set_num_threads(1)
        self.turns = Turns(descriptor)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx:
            self._end(trainer)
        else:
            backbone = pl_module.backbone
            self.turns.watch(backbone.unet, backbone.vae.decoder)
            self.turns.introduce(sum(p.numel() for p in pl_module.parameters() if p.requires_grad))
        self.turns.begin()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        self.turns.end(float(trainer.logged_metrics["train/reward"]))


class CpuClock(Callback):
    """Logs the CPU seconds of training so far, without validations, at each one; resumes with a run."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.since: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._count()
        self.since = time.process_time()

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._count()
        for logger in trainer.loggers:
            logger.log_metrics({"perf/cpu_seconds": self.seconds}, pl_module.images)

    def state_dict(self) -> dict[str, Any]:
        self._count(goes_on=True)
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]

    def _count(self, goes_on: bool = False) -> None:
        now = time.process_time()
        if self.since is not None:
            self.seconds += now - self.since
        self.since = now if goes_on and self.since is not None else None
