"""AlignProp: the gradient of the reward, through the sampler (Prabhudesai et al. 2023, arXiv 2310.03739).

DRaFT-K (Clark et al. 2023, arXiv 2309.17400) is the same with a fixed window of ``K`` last steps, DRaFT-LV
with the last step taken several times, and ReFL (Xu et al. 2023, arXiv 2304.05977) the same with a chain that
ends early with a one-shot prediction: all are choices of ``truncation``. Shapes: ``B`` images, ``T`` steps.
"""

import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lit_align.backbones import POLICY, REFERENCE, Conditioning, DiffusionBackbone
from lit_align.backbones.base import SamplerFactory
from lit_align.data import Batch
from lit_align.errors import ConfigError, check_not_negative, check_positive
from lit_align.methods.alignprop.chain import differentiable_rollout, last_step_again
from lit_align.methods.alignprop.truncation import Truncation
from lit_align.methods.base import AlignmentModule
from lit_align.methods.metrics import Metrics
from lit_align.methods.optimisation import Optimisation
from lit_align.methods.sampling import Sampling
from lit_align.methods.strategies import check_scaled
from lit_align.randomness import generator
from lit_align.rewards import RewardBank


def reward_loss(rewards: Tensor, target: float | None = None, ceiling: float | None = None) -> Tensor:
    """``-R`` (the paper's objective), ``|R - target|`` (its released code), or ``-min(R, ceiling)`` (ReFL's).

    The gradient of ``|R - target|`` has the same size at any distance and changes sign at the target; that of
    ``-min(R, ceiling)`` is 0 above the ceiling.

    Args:
        rewards: ``(B,)``.
        target: In units of the reward; 10 for the aesthetic score in the released code.
        ceiling: The same; 2 in ReFL's released code, whose ``relu(2 - R)`` is this up to a constant.

    Returns:
        ``(B,)``.
    """
    if target is not None:
        return (rewards - target).abs()
    return -rewards if ceiling is None else -rewards.clamp(max=ceiling)


@dataclass
class RolloutBatch:
    """One rollout batch, while its micro-batches are processed.

    Attributes:
        batch: This rank's images.
        cond: Their encoded prompts.
        attached: ``(T, B)`` bool, in the order of ``batch``.
        sampling: Seconds for sampling and scoring, so far.
    """

    batch: Batch
    cond: Conditioning
    attached: Tensor
    sampling: float = 0.0


class AlignPropModule(AlignmentModule):
    """Backpropagation of a differentiable reward through the sampler; one update per rollout batch."""

    def __init__(
        self,
        backbone: DiffusionBackbone,
        sampler: SamplerFactory,
        rewards: RewardBank,
        truncation: Truncation,
        target: float | None = None,
        ceiling: float | None = None,
        coefficient: float = 0.01,
        kl_weight: float = 0.0,
        optimisation: Optimisation = Optimisation(clip_norm=5.0, micro_batch=4),
        sampling: Sampling = Sampling(guidance=7.5),
    ) -> None:
        """Set up the method. "Released" is the authors' code, branch main.

        Args:
            backbone: The diffusion model. With real models set its ``checkpointing``: a chain of predictions
                does not fit in memory without it.
            sampler: How it is sampled. Any eta: 0 in the released code, 1 in TRL; 50 steps in both.
            rewards: What is maximised, by gradient, and what is monitored.
            truncation: Which predictions the gradient goes through. ``UniformWindow`` in the paper.
            target: Minimise the distance of the total reward to this, instead of maximising it. Released: 10
                for the aesthetic score.
            ceiling: Images above this total reward give no gradient. ReFL: 2 standard deviations above the
                mean of ImageReward. Not with a target.
            coefficient: Factor on the loss, 0.01 in the released code. Adam hides it; the clip does not.
            kl_weight: Weight of the KL to the reference, a sum over the attached steps and a mean over
                latent elements; the coefficient does not scale it. Own addition (the paper stops early).
            optimisation: How the weights are updated. Released: AdamW, lr 1e-3, weight decay 0.1, LoRA of
                rank 4, clip 5. ``micro_batch`` counts images, each with its copies if the truncation makes
                any. Released: 4, with 128 images per update on all devices; the authors advise a lower lr
                with fewer.
            sampling: How images are sampled; gradient flows through both halves of guidance. Released: 7.5.
                ``batch`` is that of validation, test and predict.

        Raises:
            ConfigError: A trained reward has no gradient, or the options exclude each other.
        """
        super().__init__(
            backbone=backbone,
            sampler=sampler,
            rewards=rewards,
            optimisation=optimisation,
            sampling=sampling,
        )
        _check_rewards(rewards)
        check_positive({"coefficient": coefficient})
        if target is not None and ceiling is not None:
            raise ConfigError(
                f"target {target} and ceiling {ceiling} are two losses; set one of them to null"
            )
        check_not_negative({"kl_weight": kl_weight})
        if kl_weight and not self.sampler.stochastic.any():
            raise ConfigError(
                f"kl_weight: steps without noise have no KL, and {self.sampler.no_noise}, or kl_weight to 0"
            )
        truncation.attached(self.sampler.num_steps, generator(self.seed, "truncation"))  # refuses bad sizes
        self.truncation = truncation
        self.target = target
        self.ceiling = ceiling
        self.coefficient = coefficient
        self.kl_weight = kl_weight
        self._scored = 0  # images of the update that have a score

    def setup(self, stage: str) -> None:
        """Check what depends on the Trainer and the data.

        Raises:
            ConfigError: A reward looks at several images, or a trained one is in float16, and the Trainer
                does not scale gradients.
        """
        super().setup(stage)
        if stage == "fit":
            _check_scopes(self.rewards)
        for name in self.rewards.trained if stage == "fit" else ():
            weights = self.rewards.rewards[name].parameters()
            check_scaled(self.trainer, weights, f"rewards.init_args.rewards.{name}.init_args.dtype")

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Sample, score and differentiate in micro-batches, then update once."""
        started = time.perf_counter()
        steps = self.sampler.num_steps
        drawn = [
            self.truncation.attached(steps, generator(self.seed, "truncation", i))
            for i in batch.index.tolist()
        ]
        work = RolloutBatch(batch, self.backbone.encode(batch.prompts), torch.stack(drawn, dim=1))
        # Sorted by window length, because a micro-batch holds the graph of its longest window.
        order = work.attached.int().argmax(0).argsort(stable=True)
        parts = order.split(self.optimisation.micro_batch)
        graphs = [work.attached[:, rows].any(1) for rows in parts]
        if self.device_mesh is not None:  # ranks that share weights must differentiate the same steps
            graphs = [torch.stack(those).any(0) for those in zip(*self.gather(graphs), strict=True)]
        self._scored = 0
        measured = self.update([partial(self._loss, work, *part) for part in zip(parts, graphs, strict=True)])
        places = order.argsort()
        names = [name for name in measured if name == "reward" or name.startswith("reward/")]
        scores = {name: measured.pop(name)[places] for name in names}
        measured["attached_steps"] = work.attached.sum(0)
        self.reward_queries += self.truncation.copies * len(batch) * self.trainer.world_size
        self.log_rollout_batch(scores, measured, work.sampling, time.perf_counter() - started)

    def _loss(self, work: RolloutBatch, rows: Tensor, graphs: Tensor) -> tuple[Tensor, Metrics]:
        """What some images add to the mean loss of the batch, with graphs of some steps.

        Its metrics include what the rewards report of these images.
        """
        started = time.perf_counter()
        batch = work.batch[rows]
        latents, kl = self.differentiable_sample(batch, work.cond[rows], work.attached[:, rows], graphs)
        images, ends = self.backbone.decode(latents), 1 + self.truncation.copies
        shown = batch[torch.arange(len(batch)).repeat(ends)]  # one row for each end of a chain
        output = self.rewards(images, shown.prompts, shown.groups, shown.columns)
        metrics = {name: score[: len(batch)] for name, score in output.report.items()}
        work.sampling += time.perf_counter() - started
        self.remember(batch.index, batch.prompts, {name: metrics[name].cpu() for name in output.report})
        # An image without a score has no gradient; unlike a mask, the choice of rows keeps its NaN out.
        scored = output.total.isfinite()
        rewards = output.total[scored]
        self._scored += len(rewards)
        loss = self.coefficient * reward_loss(rewards, self.target, self.ceiling)
        metrics["loss"] = loss.detach()
        if self.ceiling is not None:
            metrics["above_ceiling"] = (rewards > self.ceiling).float()
        total = loss.sum() / ends
        if self.kl_weight:
            penalty = kl / latents[0].numel()
            metrics["kl_penalty"] = penalty.detach()
            total = total + self.kl_weight * penalty[scored[: len(batch)]].sum()
        return total / len(work.batch), metrics

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """As in every method; if no image of any rank has a score, nothing moves, not even by momentum."""
        if not any(self.gather(self._scored)):
            optimizer.zero_grad()
        super().on_before_optimizer_step(optimizer)

    def differentiable_sample(
        self, batch: Batch, cond: Conditioning, attached: Tensor, graphs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The latents that :meth:`sample` draws for training, with a gradient, and their KL.

        Args:
            batch: ``B`` images.
            cond: Their encoded prompts.
            attached: ``(T, B)`` bool.
            graphs: As in :func:`differentiable_rollout`.

        Returns:
            As :func:`differentiable_rollout`, and after the latents their ``m`` copies.
        """
        noise, draws = self.draw_noise(batch.index, "rollout")
        guidance = self.sampling.guidance
        policy, reference = (
            self.backbone.policy(self.sampler, cond, guidance, weights).predict
            for weights in (POLICY, REFERENCE)
        )
        latents, kl = differentiable_rollout(
            policy,
            self.sampler,
            noise,
            attached,
            draws,
            reference if self.kl_weight else None,
            self.truncation.one_shot,
            graphs,
        )
        return last_step_again(policy, self.sampler, latents, self.truncation.copies, draws), kl


def _check_rewards(rewards: RewardBank) -> None:
    if names := ", ".join(rewards.black_box):
        raise ConfigError(
            f"rewards: AlignProp differentiates the reward, and {names} has no gradient; take it out of "
            "rewards.init_args.weights, so that it is only monitored, or train on it with DDPOModule"
        )


def _check_scopes(rewards: RewardBank) -> None:
    if names := ", ".join(name for name, reward in rewards.rewards.items() if reward.scope != "sample"):
        raise ConfigError(
            f"rewards: AlignProp scores images in micro-batches, and {names} looks at several images at "
            "once; take it out of the bank, and give it to the test"
        )
