"""DDPO: policy gradient on the denoising chain (Black et al. 2023, arXiv 2305.13301).

With the penalty of DPOK (Fan et al. 2023, arXiv 2305.16381) as an option. The chain is a Markov decision
process: the state is ``(prompt, t, x_t)``, the action is the next latent, the reward comes once, for the
picture. Shapes: ``B`` images, ``N`` (image, step) pairs, ``D`` latent elements.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lit_align.advantages import Advantages
from lit_align.backbones import REFERENCE, DenoisingPolicy, DiffusionBackbone
from lit_align.backbones.base import SamplerFactory
from lit_align.data import Batch, PromptDataModule
from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep
from lit_align.methods.base import AlignmentModule
from lit_align.randomness import generator
from lit_align.rewards import RewardBank
from lit_align.rollout import Trajectory


def score_function_loss(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """DDPO-SF, equation 3 of the paper: the loss whose gradient is ``-A grad log p``.

    Args:
        log_ratio: Log-probability now minus log-probability at sampling, ``(N,)``; only its gradient matters.
        advantages: ``(N,)``.

    Returns:
        ``(N,)``.
    """
    return -advantages * log_ratio


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """DDPO-IS, equation 4, in PPO's clipped form: ``max(-A w, -A clip(w, 1 - e, 1 + e))``.

    The gradient is 0 where the ratio has left the range in the direction that the advantage asks for, and
    alive where it has left it in the other.

    Args:
        log_ratio: Log of the importance ratio ``w``, ``(N,)``.
        advantages: ``(N,)``.
        clip_range: ``e``.

    Returns:
        ``(N,)``.
    """
    ratio = log_ratio.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


@dataclass(frozen=True)
class Pairs:
    """Some (image, step) pairs of a collection: what is replayed in one backward pass.

    Attributes:
        rows: Which image of the rank's batch, ``(N,)``.
        steps: Which step ``k``, ``(N,)``.
    """

    rows: Tensor
    steps: Tensor

    def split(self, size: int) -> list["Pairs"]:
        """Micro-batches of at most ``size`` pairs."""
        return [Pairs(*part) for part in zip(self.rows.split(size), self.steps.split(size), strict=True)]


@dataclass(frozen=True)
class Replay:
    """A collection, ready to be replayed.

    Attributes:
        policy: The policy that is trained, for the rank's images.
        reference: The pretrained policy for them.
        trajectory: The stored chains.
        advantages: ``(B,)``, on the device.
    """

    policy: DenoisingPolicy
    reference: DenoisingPolicy
    trajectory: Trajectory
    advantages: Tensor

    def step(self, pairs: Pairs) -> tuple[GaussianStep, GaussianStep, Tensor]:
        """The policy's step now, its step when the chain was sampled, and the state that was drawn then."""
        now = self.policy[pairs.rows](self.trajectory.states[pairs.steps, pairs.rows], pairs.steps)
        then = GaussianStep(self.trajectory.means[pairs.steps, pairs.rows], now.std)
        return now, then, self.trajectory.states[pairs.steps + 1, pairs.rows]


class DDPOModule(AlignmentModule):
    """Policy gradient on the denoising chain, for any reward, differentiable or not."""

    def __init__(
        self,
        backbone: DiffusionBackbone,
        sampler: SamplerFactory,
        rewards: RewardBank,
        advantages: Advantages,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        clip_range: float | None = 1e-4,
        updates: int = 1,
        inner_epochs: int = 1,
        timestep_fraction: float = 1.0,
        kl_weight: float = 0.0,
        kl_target: float | None = None,
        guidance: float = 5.0,
        clip_norm: float = 1.0,
        micro_batch: int = 8,
        rollout_batch: int = 8,
        seed: int | None = None,
    ) -> None:
        """Wire the parts.

        Args:
            backbone: The diffusion model.
            sampler: How it is sampled; at least one step must be stochastic (eta above 0).
            rewards: What is maximised and what is watched.
            advantages: How rewards become advantages. The paper normalises with running statistics of each
                prompt.
            optimizer: Of the trained weights. The paper: AdamW, lr 1e-5 for all weights (table D.5);
                ddpo-pytorch: 3e-4 for LoRA.
            lr_scheduler: Stepped once per update, for a warm-up or a decay.
            clip_range: PPO's clip of the ratio, null for the score-function form. As in all published code
                the ratio is that of the *mean* over latent elements, so ``e`` is about ``e * D`` nats of a
                step: 1e-4 (table D.5) belongs to D = 16384, 1.6 nats.
            updates: Optimiser steps per pass over a collection; each takes whole prompts. 4 in table D.5, 1
                for the score function.
            inner_epochs: Passes over a collection; each draws its own timesteps. 1 in ddpo-pytorch.
            timestep_fraction: Share of the stochastic steps, at random for each image, that is replayed. 1 in
                ddpo-pytorch.
            kl_weight: Weight of the KL of each step to the reference, DPOK's penalty, as a mean over latent
                elements. Exact, where DPOK's code drops the factor of the schedule.
            kl_target: KL by which one collection should move the policy, in nats per step; the learning rate
                is scaled towards it. Own addition, after the adaptive penalty of PPO (Schulman et al. 2017,
                section 4): the useful range of learning rates is narrow and moves during a run.
            guidance: Scale of classifier-free guidance, in sampling and in training. 5 in table D.5.
            clip_norm: Largest norm of the gradient. 1 in table D.5.
            micro_batch: (image, step) pairs in one backward pass. Bounds memory and changes no result.
            rollout_batch: Images sampled at once. Bounds memory and changes no result.
            seed: Seed of all noise and of the choice of timesteps; that of ``seed_everything`` if not given.

        Raises:
            ConfigError: The sampler is deterministic, or the options exclude each other.
        """
        super().__init__(
            backbone, sampler, rewards, optimizer, lr_scheduler, guidance, clip_norm, rollout_batch, seed
        )
        self.stochastic_steps = self.sampler.stochastic.nonzero().flatten()
        if not len(self.stochastic_steps):
            raise ConfigError(
                "sampler: DDPO needs noise in the steps, and eta is 0, which has no density; "
                "set sampler.init_args.eta to 1"
            )
        if clip_range is None and updates * inner_epochs > 1:
            raise ConfigError(
                "clip_range: the score-function form (null) allows one update per collection, but updates is "
                f"{updates} and inner_epochs {inner_epochs}; set both to 1, or set clip_range"
            )
        counts = {"updates": updates, "inner_epochs": inner_epochs, "micro_batch": micro_batch}
        sizes = {"timestep_fraction": timestep_fraction, "clip_range": clip_range, "kl_target": kl_target}
        for name, value in (counts | sizes).items():
            if value is not None and not value > 0:
                raise ConfigError(f"{name}: {value} must be positive")
        if timestep_fraction > 1:
            raise ConfigError(f"timestep_fraction: {timestep_fraction} is more than 1, all of the steps")
        self.advantages = advantages
        self.clip_range = clip_range
        self.updates = updates
        self.inner_epochs = inner_epochs
        self.steps_per_image = max(1, round(timestep_fraction * len(self.stochastic_steps)))
        self.kl_weight = kl_weight
        self.kl_target = kl_target
        self.micro_batch = micro_batch
        self.step_scale = 1.0

    def setup(self, stage: str) -> None:
        """Check what depends on the data.

        Raises:
            ConfigError: The advantages need several images per prompt, or the prompts of a collection do not
                divide into the updates.
        """
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage != "fit" or not isinstance(data, PromptDataModule):
            return
        if self.advantages.needs_groups and data.images_per_prompt < 2:
            raise ConfigError(
                f"images_per_prompt: {type(self.advantages).__name__} compares the images of a prompt, and "
                f"there is {data.images_per_prompt} of each; set data.images_per_prompt to 2 or more, or use "
                "BatchAdvantages"
            )
        if data.prompts_per_collection % (self.updates * self.trainer.world_size):
            raise ConfigError(
                f"updates: the {data.prompts_per_collection} prompts of a collection do not divide into "
                f"{self.updates} updates on {self.trainer.world_size} processes; change model.updates or "
                "data.prompts_per_collection"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect pictures and scores, then update on the stored chains."""
        started = time.perf_counter()
        with torch.no_grad():
            samples = self.sample(batch, "rollout")
            scores = self.score(samples.images, batch)
        sampled = time.perf_counter()
        advantages = self._advantages(batch, scores)
        policy = self.backbone.policy(self.sampler, self.backbone.encode(batch.prompts), self.guidance)
        replay = Replay(
            policy, replace(policy, weights=REFERENCE), samples.trajectory, advantages.to(self.device)
        )
        figures = self._learn(replay, batch)
        self._adapt(replay, batch, figures)
        self.log_collection(scores, figures, sampled - started, time.perf_counter() - started)

    def _advantages(self, batch: Batch, scores: dict[str, Tensor]) -> Tensor:
        """Advantages of this rank's images, normalised with the images of all ranks."""
        ranks = self.gather((batch.index, scores["reward"], batch.groups, batch.prompts))
        index, rewards, groups = (torch.cat([rank[part] for rank in ranks]) for part in range(3))
        prompts = [prompt for rank in ranks for prompt in rank[3]]
        # The global order: statistics must not depend on how images were dealt to ranks.
        order = index.argsort()
        ordered = self.advantages(rewards[order], groups[order], [prompts[i] for i in order.tolist()])
        return ordered[torch.searchsorted(index[order], batch.index)]

    def _learn(self, replay: Replay, batch: Batch) -> dict[str, list[Tensor]]:
        """All updates of a collection; returns what was measured in each micro-batch."""
        figures: dict[str, list[Tensor]] = {}
        for epoch in range(self.inner_epochs):
            pairs = self._draw_pairs(batch, epoch)
            size = len(pairs.rows) // self.updates
            for part in pairs.split(size):
                losses = [
                    partial(self._loss, replay, micro, size, figures)
                    for micro in part.split(self.micro_batch)
                ]
                self.update(losses, self.step_scale)
                figures.setdefault("grad_norm", []).append(self.gradient_norm.detach()[None])
        return figures

    def _draw_pairs(self, batch: Batch, epoch: int) -> Pairs:
        """For each image its share of the stochastic steps, at random; images in order."""
        steps = [
            self.stochastic_steps[
                torch.randperm(len(self.stochastic_steps), generator=generator(self.seed, "steps", i, epoch))
            ][: self.steps_per_image]
            for i in batch.index.tolist()
        ]
        rows = torch.arange(len(batch)).repeat_interleave(self.steps_per_image)
        return Pairs(rows, torch.cat(steps))

    def _loss(self, replay: Replay, pairs: Pairs, size: int, figures: dict[str, list[Tensor]]) -> Tensor:
        """The part of some pairs in the mean loss of an update of ``size`` pairs."""
        now, then, drawn = replay.step(pairs)
        # The mean over D: the convention of published clip ranges.
        log_ratio = now.log_ratio(then, drawn) / drawn[0].numel()
        advantages = replay.advantages[pairs.rows.to(self.device)]
        if self.clip_range is None:
            loss = score_function_loss(log_ratio, advantages)
        else:
            loss = clipped_surrogate(log_ratio, advantages, self.clip_range)
            outside = (log_ratio.detach().exp() - 1).abs() > self.clip_range
            figures.setdefault("clip_fraction", []).append(outside.float())
        figures.setdefault("loss", []).append(loss.detach())
        # In the first update the weights are those that sampled, so this is rounding alone.
        if "grad_norm" not in figures:
            figures.setdefault("ratio_deviation", []).append(log_ratio.detach().expm1().abs())
        if self.kl_weight:
            with torch.no_grad():
                reference = replay.reference[pairs.rows](
                    replay.trajectory.states[pairs.steps, pairs.rows], pairs.steps
                )
            penalty = now.kl(reference) / drawn[0].numel()
            figures.setdefault("kl_penalty", []).append(penalty.detach())
            loss = loss + self.kl_weight * penalty
        return loss.sum() / size

    def _adapt(self, replay: Replay, batch: Batch, figures: dict[str, list[Tensor]]) -> None:
        """Measure how far the collection moved the policy; scale the next one's steps to ``kl_target``."""
        # On each prompt's first image: little work, and the same pairs whatever micro-batch and ranks.
        first = torch.cat([torch.tensor([True]), batch.groups[1:] != batch.groups[:-1]])
        drawn = self._draw_pairs(batch, self.inner_epochs)
        chosen = first[drawn.rows]
        kls: list[Tensor] = []
        with torch.no_grad():
            for pairs in Pairs(drawn.rows[chosen], drawn.steps[chosen]).split(self.micro_batch):
                now, then, _ = replay.step(pairs)
                kls.append(then.kl(now).cpu())
        kl = torch.cat(self.gather(torch.cat(kls))).mean()
        figures["kl"] = [kl[None]]
        if self.kl_target is not None:
            # KL grows with the square of the step; bounded, since it is measured on few pairs.
            wanted = (self.kl_target / kl.clamp(min=1e-12)).sqrt().clamp(0.5, 1.5).item()
            self.step_scale = min(max(self.step_scale * wanted, 1e-3), 1e3)
            figures["step_scale"] = [torch.tensor([self.step_scale])]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["ddpo"] = {
            "advantages": self.advantages.state_dict(),
            "normaliser": type(self.advantages).__name__,
            "step_scale": self.step_scale,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("ddpo")
        if self.trainer.state.fn != "fit":
            return  # the weights are all that test and predict need
        own = type(self.advantages).__name__
        if state is None or state["normaliser"] != own:
            raise ConfigError(
                f"ckpt_path: the checkpoint is not of DDPO with {own}; resume with the config.yaml of its run"
            )
        self.advantages.load_state_dict(state["advantages"])
        self.step_scale = state["step_scale"]
