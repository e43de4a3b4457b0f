"""The module that trains on the forward process: sample, score, noise anew, learn.

A rollout batch gives clean latents and advantages; its chains are not used. Each latent is noised anew, and
the denoiser is trained on it as in pretraining: towards good images and away from bad ones. So any sampler
can draw the images, with noise in its steps or without, and no likelihood is needed. Shapes: ``B`` images,
``N`` (image, timestep) pairs.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_align.advantages import Advantages
from lit_align.backbones import POLICY, REFERENCE, DiffusionBackbone
from lit_align.backbones.base import SamplerFactory
from lit_align.data import Batch
from lit_align.errors import ConfigError, check_not_negative, check_positive
from lit_align.methods.joint import JointModule, Rollouts, TaskOrder
from lit_align.methods.metrics import Metrics, chosen
from lit_align.methods.nft.objectives import NFT, OLD, ForwardObjective, Matched, OldPolicy
from lit_align.methods.objectives import denoising_error
from lit_align.methods.optimisation import Optimisation
from lit_align.methods.pretraining import Pretraining
from lit_align.methods.sampling import Sampling
from lit_align.methods.tasks import Task, make_tasks
from lit_align.randomness import generator, normal
from lit_align.replay import Pairs, draw_pairs
from lit_align.rewards import RewardBank


class NFTModule(JointModule):
    """Policy optimisation on the forward process, for any reward and any sampler."""

    also_kept: ClassVar[tuple[str, ...]] = (OLD,)

    def __init__(
        self,
        backbone: DiffusionBackbone,
        sampler: SamplerFactory,
        rewards: RewardBank | None = None,
        advantages: Advantages | None = None,
        objective: ForwardObjective | None = None,
        old_policy: OldPolicy = OldPolicy(),
        reference_weight: float = 1e-4,
        timesteps: int | None = None,
        updates: int = 1,
        inner_epochs: int = 1,
        tasks: dict[str, Task] | None = None,
        task_order: TaskOrder = "sequence",
        pretraining: Pretraining | None = None,
        optimisation: Optimisation = Optimisation(),
        sampling: Sampling = Sampling(guidance=1.0),
    ) -> None:
        """Set up the method. Published values are those of DiffusionNFT's released configurations for SD 3.5.

        Args:
            backbone: The diffusion model.
            sampler: How it is sampled; any. Released: 10 steps of an ODE, 25 with several rewards, by a
                solver of second order.
            rewards: What is maximised and what is monitored; null with ``tasks``.
            advantages: How rewards become advantages. The paper: differences from the mean of the prompt's
                images, over the std of all, clipped at 5 (``GroupAdvantages`` with ``divide_by: batch``).
                An advantage of ``clip`` or more counts as certainly good.
            objective: ``NFT`` (if not given) or ``AWM``.
            old_policy: How the old policy follows the policy.
            reference_weight: Weight of the squared distance of predictions to the reference's, in the
                network's own space: 1e-4; AWM: 1e-4 to 3e-3. The paper's is one of velocities.
            timesteps: How many of the sampler's timesteps each image is noised to, at random and with noise
                of its own; all of them if not given, as in the paper (AWM: 6).
            updates: Optimizer steps per pass over a rollout batch; each takes whole prompts. Released: 1;
                2 for OCR.
            inner_epochs: Passes over a rollout batch; each draws timesteps and noise anew. Released: 1.
            tasks: As of DDPOModule: several tasks by name, instead of ``rewards`` and ``advantages``.
            task_order: As of DDPOModule. ``interleaved`` is refused with AWM, whose ratio needs the
                weights that sampled.
            pretraining: Captioned images whose denoising loss is mixed in; off if not given.
            optimisation: How the weights are updated. The paper: AdamW, lr 3e-4, LoRA of rank 32 and alpha
                64, clip 1. ``micro_batch`` counts (image, timestep) pairs.
            sampling: How images are sampled. The trained predictions have no guidance, so with a
                ``guidance`` other than 1 the images are those of another policy. The paper: none. It
                evaluates a moving average of the weights (decay .9), which is not done here: what is measured
                is what is exported.

        Raises:
            ConfigError: A value is not positive, or the options exclude each other.
        """
        super().__init__(
            backbone=backbone,
            sampler=sampler,
            tasks=make_tasks(rewards, advantages, tasks),
            task_order=task_order,
            pretraining=pretraining,
            optimisation=optimisation,
            sampling=sampling,
        )
        check_positive({"updates": updates, "inner_epochs": inner_epochs, "timesteps": timesteps})
        check_not_negative({"reference_weight": reference_weight})
        steps = self.sampler.num_steps
        if timesteps is not None and timesteps > steps:
            raise ConfigError(
                f"timesteps: {timesteps} are more than the {steps} of the sampler; give at most {steps}, or "
                "null for all"
            )
        self.objective = NFT() if objective is None else objective
        trained = sum(task.weight > 0 for task in self.tasks.values())
        if self.objective.asks_behaviour and task_order == "interleaved" and trained > 1:
            raise ConfigError(
                "task_order: AWM needs the weights that sampled, but with interleaved another task has moved "
                "them; set it to sequence"
            )
        self.old_policy = old_policy
        self.reference_weight = reference_weight
        self.timesteps = timesteps or steps
        self.updates = updates
        self.inner_epochs = inner_epochs
        self.sampled_with = self.objective.sampled_with
        self.batches, self._began_at = 0, 0
        self.backbone.weight_sets.add(OLD)

    def setup(self, stage: str) -> None:
        """Check what depends on the data.

        Raises:
            ConfigError: The advantages need several images per prompt, or the prompts of a rollout batch do
                not divide into the updates.
        """
        super().setup(stage)
        self.check_tasks(stage, self.updates)
        if stage == "fit" and (told := self.guidance_is_learnt):
            rank_zero_warn(f"sampling.guidance: {told}; set it to 1")

    @property
    def guidance_is_learnt(self) -> str | None:
        """What is wrong with the guidance of the images, if anything is."""
        if self.sampling.guidance == self.training_guidance:
            return None
        return (
            f"images are drawn with guidance {self.sampling.guidance:g}, and the trained predictions have "
            "none, so the run begins by learning what guidance does, and is guided on top"
        )

    def training_step(self, batch: Batch | list[Batch], batch_idx: int) -> None:
        """One rollout batch; then the old policy follows."""
        self._began_at = self.trainer.global_step
        super().training_step(batch, batch_idx)
        self.backbone.weight_sets.follow(POLICY, OLD, self.old_policy.decay(self.batches))
        self.batches += 1

    # ---- one rollout batch

    def learn(self, rollouts: Rollouts) -> Iterator[Metrics]:
        """All updates on a rollout batch."""
        parts = [
            (epoch, part)
            for epoch in range(self.inner_epochs)
            for part in self._draw_updates(rollouts, epoch)
        ]
        # Errors of the policy that sampled; in the first update its predictions are the policy's own.
        asked = self.objective.asks_behaviour
        behaviour = [self._errors(rollouts, *part) if asked else None for part in parts[1:]]
        size = self.optimisation.micro_batch
        for (epoch, part), errors in zip(parts, [None, *behaviour], strict=True):
            micro = part.split(size)
            pieces = [None] * len(micro) if errors is None else errors.split(size)
            losses = [
                partial(self._loss, rollouts, epoch, pairs, piece, len(part.rows))
                for pairs, piece in zip(micro, pieces, strict=True)
            ]
            yield self.optimise(losses, rollouts.batch.task)

    def look_back(self, rollouts: Rollouts) -> Metrics:
        """Nothing: the losses measure the distance to the old policy."""
        return {}

    def _draw_updates(self, rollouts: Rollouts, epoch: int) -> list[Pairs]:
        steps = torch.arange(self.sampler.num_steps)
        pairs = draw_pairs(rollouts.batch.index, steps, self.timesteps, self.seed, epoch)
        return pairs.split(len(pairs.rows) // self.updates)

    def _noised(self, rollouts: Rollouts, epoch: int, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clean latents of some pairs, noise, the noised latents and their timesteps."""
        clean = rollouts.trajectory.states[-1, pairs.rows].to(self.device).float()
        numbers = zip(rollouts.batch.index[pairs.rows].tolist(), pairs.steps.tolist(), strict=True)
        draws = [generator(self.seed, "noising", image, step, epoch) for image, step in numbers]
        noise = normal(self.backbone.latent_shape, draws).to(clean)
        t = self.sampler.timesteps[pairs.steps]
        return clean, noise, self.sampler.schedule.add_noise(clean, noise, t), t

    def _predict(self, rollouts: Rollouts, pairs: Pairs, x: Tensor, t: Tensor, weights: str) -> Tensor:
        cond = rollouts.policy.cond[pairs.rows]
        return self.backbone.predict(x, t.to(x.device), cond, self.training_guidance, weights)

    @torch.no_grad()
    def _errors(self, rollouts: Rollouts, epoch: int, part: Pairs) -> Tensor:
        """Squared errors of the policy as it is, ``(N,)``."""
        errors = []
        for pairs in part.split(self.sampling.batch):
            clean, noise, x, t = self._noised(rollouts, epoch, pairs)
            prediction = self._predict(rollouts, pairs, x, t, POLICY)
            errors.append(denoising_error(prediction, self.sampler.schedule.target(clean, noise, t)))
        return torch.cat(errors)

    def _loss(
        self, rollouts: Rollouts, epoch: int, pairs: Pairs, behaviour: Tensor | None, size: int
    ) -> tuple[Tensor, Metrics]:
        """What some pairs add to the mean loss of an update of ``size`` pairs."""
        clean, noise, x, t = self._noised(rollouts, epoch, pairs)
        schedule = self.sampler.schedule
        prediction = self._predict(rollouts, pairs, x, t, POLICY)
        old = x0_old = None
        if self.objective.asks_old:
            old = self._old(rollouts, pairs, x, t, prediction)
            x0_old = schedule.predict_x0(x, old, t)
        at = Matched(
            prediction=prediction,
            old=old,
            target=schedule.target(clean, noise, t),
            x0=schedule.predict_x0(x, prediction, t),
            x0_old=x0_old,
            clean=clean,
            sigma=schedule.sigma(t).to(x),
            behaviour=behaviour,
        )
        clip = self.tasks[rollouts.batch.task].advantages.clip
        loss, metrics = self.objective(at, rollouts.advantages[pairs.rows.to(self.device)], clip)
        metrics["loss"] = loss.detach()
        if self.reference_weight:
            with torch.no_grad():
                reference = self._predict(rollouts, pairs, x, t, REFERENCE)
            distance = denoising_error(prediction, reference)
            metrics["reference_distance"] = distance.detach()
            loss = loss + self.reference_weight * distance
        loss = torch.where(rollouts.scored[pairs.rows.to(self.device)], loss, 0.0)
        return loss.sum() / size, chosen(metrics, rollouts.trajectory.finite[pairs.rows])

    @torch.no_grad()
    def _old(self, rollouts: Rollouts, pairs: Pairs, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """Predictions of the old policy; the policy's own while the two have the same weights."""
        first = self.trainer.global_step == self._began_at  # no task has moved the policy yet
        if first and (not self.batches or not self.old_policy.decay(self.batches - 1)):
            return prediction.detach()
        return self._predict(rollouts, pairs, x, t, OLD)

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["nft"] = {"batches": self.batches}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.batches = checkpoint["nft"]["batches"]
