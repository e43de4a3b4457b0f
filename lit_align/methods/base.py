"""What all methods share: sampling, the one optimisation step, validation, and what a checkpoint holds.

Shapes: ``B`` images, ``T`` steps. Sampling is the same function for training, validation and prediction: only
the purpose of the random draws differs.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, ParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from rich.progress import Progress
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.lr_scheduler import LRScheduler

from lit_align.backbones import POLICY, REFERENCE, DiffusionBackbone, whole
from lit_align.backbones.base import SamplerFactory
from lit_align.data import Batch, MultiTaskDataModule
from lit_align.errors import ConfigError, check_positive
from lit_align.evaluation import diversity
from lit_align.gaussian import GaussianStep, Policy
from lit_align.randomness import generator, run_seed
from lit_align.rewards import RewardBank, RewardOutput
from lit_align.rollout import Trajectory, rollout

Item = TypeVar("Item")

SECONDS_A_FRAME = 0.1
"""From one drawing of a bar to the next."""

MAX_SKIPPED = 10
"""Updates with a non-finite gradient that may follow each other before a run is given up."""


@dataclass(frozen=True)
class Samples:
    """Images that were sampled for a batch, and how.

    Attributes:
        trajectory: The chain of each image.
        images: ``(B, 3, H, W)`` in [0, 1].
    """

    trajectory: Trajectory
    images: Tensor


class AlignmentModule(LightningModule):
    """Base of all methods: they implement ``training_step`` on :meth:`sample`, :meth:`score`, :meth:`update`.

    One batch of the training loader is one *rollout batch*: its prompts, their images and all updates that are
    made on them. Optimisation is manual in every method, so ``Trainer``'s ``gradient_clip_val`` and
    ``accumulate_grad_batches`` are replaced by ``clip_norm`` and each method's micro-batch.
    """

    several_tasks: ClassVar[bool] = False
    """Whether a training batch may be a list with a rollout batch of each task."""

    def __init__(
        self,
        backbone: DiffusionBackbone,
        sampler: SamplerFactory,
        rewards: RewardBank,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        guidance: float,
        clip_norm: float,
        micro_batch: int,
        rollout_batch: int,
        seed: int | None,
    ) -> None:
        """Wire the parts; the arguments are documented where a method gives them defaults."""
        super().__init__()
        check_positive({"clip_norm": clip_norm, "micro_batch": micro_batch, "rollout_batch": rollout_batch})
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint holds what is trained, not the frozen models
        self.backbone = backbone
        self.sampler = backbone.make_sampler(sampler)
        self.rewards = rewards
        self.guidance = guidance
        self.clip_norm = clip_norm
        self.micro_batch = micro_batch
        self.rollout_batch = rollout_batch
        self.seed = run_seed(seed)
        self.images = 0
        self.reward_queries = 0
        self.baseline: dict[str, Tensor] = {}
        self.latest: dict[str, Tensor] = {}
        self.collected: dict[str, Tensor] = {}
        self.prompt_groups = torch.zeros(0)
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self.gradient_norm = torch.zeros(())
        self._skipped = 0
        self._evaluated: list[dict[str, Tensor]] = []

    # ---- sampling

    def sample(self, batch: Batch, purpose: str, weights: str = POLICY) -> Samples:
        """Sample one image for each row of ``batch``, in chunks of ``rollout_batch``.

        Image ``i`` is a pure function of the weights, its prompt, (seed, purpose) and its global number
        ``batch.index[i]``: it depends neither on its batch nor on its rank or device.
        """
        return self.sample_from(partial(self.policy, weights=weights), batch, purpose)

    def policy(self, batch: Batch, weights: str = POLICY) -> Policy:
        """The policy that samples, for the images of ``batch``."""
        cond = self.backbone.encode(batch.prompts)
        return self.backbone.policy(self.sampler, cond, self.guidance, weights)

    def sample_from(self, policy: Callable[[Batch], Policy], batch: Batch, purpose: str) -> Samples:
        """As :meth:`sample`, from any policy; ``policy`` makes it for the images of a chunk."""
        chunks: list[Samples] = []
        for rows in torch.arange(len(batch)).split(self.rollout_batch):
            part = batch[rows]
            noise, draws = self.draw_noise(part.index, purpose)
            trajectory = rollout(policy(part), noise, self.sampler.num_steps, draws)
            chunks.append(Samples(trajectory, self.backbone.decode(trajectory.states[-1])))
        parts = [(c.trajectory.states, c.trajectory.means, c.trajectory.log_probs) for c in chunks]
        states, means, log_probs = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return Samples(Trajectory(states, means, log_probs), torch.cat([c.images for c in chunks]))

    def draw_noise(self, index: Tensor, purpose: str) -> tuple[Tensor, list[torch.Generator]]:
        """First states ``(B, C, H, W)`` of the images with these numbers, and where the rest comes from."""
        draws = [generator(self.seed, purpose, i) for i in index.tolist()]
        noise = torch.stack([torch.randn(self.backbone.latent_shape, generator=draw) for draw in draws])
        return noise.to(self.device), draws

    def score(self, images: Tensor, batch: Batch) -> RewardOutput:
        """What the rewards say of images."""
        return self.rewards(images, batch.prompts, batch.groups, batch.columns)

    def trajectory_kl(
        self, batch: Batch, trajectory: Trajectory, stds: Sequence[Tensor] | None = None
    ) -> Tensor:
        """KL to the reference along chains, summed over steps: nats per image, ``(B,)``.

        Args:
            batch: The images.
            trajectory: Their chains.
            stds: Of the ``T`` steps that made the chains, where they are not the sampler's.
        """
        reference = self.backbone.policy(
            self.sampler, self.backbone.encode(batch.prompts), self.guidance, REFERENCE
        )
        totals = []
        for rows in torch.arange(len(batch)).split(self.rollout_batch):
            total = torch.zeros(len(rows), device=self.device)
            for k in range(self.sampler.num_steps):
                step = reference[rows](trajectory.states[k, rows], k)
                std = step.std if stds is None else stds[k]
                total += GaussianStep(trajectory.means[k, rows], std).kl(step)
            totals.append(total)
        return torch.cat(totals)

    # ---- optimisation

    def setup(self, stage: str) -> None:
        """Check what depends on the Trainer.

        Raises:
            ConfigError: The precision would round the states of the chains, the strategy shards in a way that
                the methods do not know, or the data has several tasks and the method learns one.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and isinstance(data, MultiTaskDataModule) and not self.several_tasks:
            raise ConfigError(
                f"data: MultiTaskDataModule has several tasks, and {type(self).__name__} learns one; use "
                "PromptDataModule"
            )
        if self.trainer.precision not in ("32-true", "16-mixed", "bf16-mixed"):
            raise ConfigError(
                f"trainer.precision: {self.trainer.precision} would round the stored chains; "
                "use 32-true, bf16-mixed or 16-mixed"
            )

        _check_strategy(self.trainer.strategy, self.trainer.world_size)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            self.backbone.shard(self.device_mesh["data_parallel"])

    def parameter_groups(self) -> list[list[torch.nn.Parameter]]:
        """What is trained; each group's gradient is clipped for itself."""
        return [[p for p in self.parameters() if p.requires_grad]]

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer([{"params": group} for group in self.parameter_groups()])
        if self.device_mesh is not None:
            # When a sharded optimiser is saved, torch finds out what its state looks like by a step without
            # gradients, if it has made none. Adam would count it, so it is done here and set back.
            get_optimizer_state_dict(self, optimizer)
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"].zero_()
        if self._lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._lr_scheduler(optimizer)}

    def update(self, losses: Sequence[Callable[[], Tensor]], scale: float = 1.0) -> None:
        """One optimiser step on the sum of the losses.

        Each is computed and differentiated in turn, so that memory is that of one. Over several ranks
        gradients are averaged, once, at the last loss; every rank must bring the same number of losses.

        Args:
            losses: Each returns a scalar with a gradient.
            scale: Factor on the learning rate of this step alone.
        """
        for i, loss in enumerate(losses):
            strategy = self.trainer.strategy
            more = i < len(losses) - 1
            with (
                strategy.block_backward_sync()
                if more and isinstance(strategy, ParallelStrategy)
                else nullcontext()
            ):
                self.manual_backward(loss())
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer), "one optimiser a method"
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= scale
        optimizer.step()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if isinstance(scheduler, LRScheduler):
            scheduler.step()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip, and drop an update that is not finite; here fp16 gradients are unscaled and ranks agree."""
        groups = [group["params"] for group in optimizer.param_groups]
        norms = [torch.nn.utils.clip_grad_norm_(group, self.clip_norm) for group in groups]
        self.gradient_norm = torch.stack([whole(norm) for norm in norms]).max()
        if self.gradient_norm.isfinite():
            self._skipped = 0
            return
        optimizer.zero_grad()  # sets gradients to None, which the optimiser passes over
        self._skipped += 1
        rank_zero_warn(f"an update was skipped: its gradient norm is {self.gradient_norm.item()}")
        if self._skipped == MAX_SKIPPED:
            raise ConfigError(
                f"the last {MAX_SKIPPED} updates had non-finite gradients and were skipped; lower the "
                "learning rate, or use precision bf16-mixed or 32-true"
            )

    def log_rollout_batch(
        self, scores: dict[str, Tensor], metrics: dict[str, list[Tensor]], sampling: float, total: float
    ) -> None:
        """Count and log one rollout batch.

        Args:
            scores: What :meth:`score` reports on this rank.
            metrics: What the updates measured, in pieces; the mean over all pieces is ``train/<name>``.
            sampling: Seconds for sampling and scoring.
            total: Seconds for everything.
        """
        own = {name: torch.cat(pieces).cpu().double() for name, pieces in metrics.items()}
        ranks = self.gather((scores, own))
        scores, measured = ({n: torch.cat([r[i][n] for r in ranks]) for n in ranks[0][i]} for i in range(2))
        self.collected, count = scores, len(scores["reward"])
        self.images += count
        self.reward_queries += count
        logged: dict[str, Tensor | float] = {f"train/{n}": values.nanmean() for n, values in scores.items()}
        logged |= {f"train/{n}": values.mean() for n, values in measured.items()}
        logged |= {
            "train/reward_std": scores["reward"][scores["reward"].isfinite()].std(),
            "train/lr": self.trainer.optimizers[0].param_groups[0]["lr"],
            "progress/images": float(self.images),
            "progress/reward_queries": float(self.reward_queries),
            "perf/sampling_fraction": sampling / total,
            "perf/images_per_second": count / total,
        }
        self.log_dict(logged, batch_size=count)
        bar = {"reward": logged["train/reward"], "images/s": logged["perf/images_per_second"]}
        self.log_dict(bar, prog_bar=True, logger=False, batch_size=count)

    # ---- validation and test

    def on_train_start(self) -> None:
        """Validate before the first update, so that every curve has a point at 0 images."""
        if not self.baseline and self.images == 0 and self.trainer.enable_validation:
            self.trainer.validating = True
            self.trainer.fit_loop.epoch_loop.val_loop.run()
            self.trainer.training = True

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """A rollout on held-out prompts with the same noise every time; returns the images."""
        samples = self.sample(batch, "validation")
        self._evaluated.append(self._measure(batch, samples))
        return samples.images

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Policy and reference on the same prompts and noise; returns the policy's images."""
        samples, before = self.sample(batch, "test"), self.sample(batch, "test", REFERENCE)
        base = self._measure(batch, before, with_kl=False) | {"kl": torch.zeros(len(batch))}
        earlier = {f"base/{n}": value for n, value in base.items() if n not in ("index", "group")}
        self._evaluated.append(earlier | self._measure(batch, samples))
        return samples.images

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Images ``(B, 3, H, W)`` and their rewards."""
        images = self.sample(batch, "predict").images
        return images, self.score(images, batch).report

    def _measure(self, batch: Batch, samples: Samples, with_kl: bool = True) -> dict[str, Tensor]:
        """Everything that is reported of an image, each ``(B,)`` on the CPU."""
        scores = self.score(samples.images, batch)
        measured = scores.report | {"unscored": scores.total.isnan().float().cpu()}
        measured["diversity"] = diversity(samples.images, batch.groups).cpu()
        if with_kl:
            measured["kl"] = self.trajectory_kl(batch, samples.trajectory).cpu()
        if "reward/truth" in measured:
            measured["truth"] = measured["reward/truth"]
        return measured | {"index": batch.index, "group": batch.groups}

    def on_validation_epoch_end(self) -> None:
        self.latest = self._report("val")
        if not self.images:
            self.baseline = self.latest

    def on_test_epoch_end(self) -> None:
        self.latest = self._report("test")
        self.baseline = {n[5:]: v for n, v in self.latest.items() if n.startswith("base/")}

    def _report(self, stage: str) -> dict[str, Tensor]:
        """Gather the images of all ranks in their global order, and log the mean of each figure."""
        parts = [part for rank in self.gather(self._evaluated) for part in rank]
        self._evaluated = []
        merged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        order = merged.pop("index").argsort()
        merged = {name: values[order] for name, values in merged.items()}
        self.prompt_groups = merged.pop("group")
        self.log_dict(
            {f"{stage}/{name}": values.nanmean() for name, values in merged.items()}, sync_dist=True
        )
        return merged

    # ---- ranks, files and checkpoints

    def track(self, items: Iterable[Item], total: int, description: str) -> Iterator[Item]:
        """The items, with a bar where a person may be looking: the Trainer's own counts whole batches."""
        looking = self.trainer.is_global_zero and self.trainer.progress_bar_callback
        with Progress(transient=True, disable=not looking) as bar:
            task, drawn = bar.add_task(description, total=total), 0.0
            for item in items:
                yield item
                # Inside the Trainer's bar nothing else draws it.
                refresh = time.monotonic() - drawn > SECONDS_A_FRAME
                bar.update(task, advance=1, refresh=refresh)
                drawn = time.monotonic() if refresh else drawn

    def export(self, folder: Path | None) -> None:
        """Write what was trained, for diffusers; every rank must call it, and only one gives a folder."""
        self.backbone.save_weights(folder)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order; every rank must call it."""
        if self.trainer.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def kept(self) -> dict[str, Tensor]:
        """The parameters that a checkpoint holds: what is trained."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained and every counter; the frozen models come from their own files."""
        kept = self.kept()
        checkpoint["state_dict"] = {n: v for n, v in checkpoint["state_dict"].items() if n in kept}
        checkpoint["progress"] = {
            "images": self.images,
            "reward_queries": self.reward_queries,
            "skipped": self._skipped,
            "baseline": self.baseline,
            "trained": {name: list(p.shape) for name, p in kept.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the counters.

        Raises:
            ConfigError: The checkpoint holds other trained weights than this configuration has.
        """
        own = {name: list(p.shape) for name, p in self.kept().items()}
        # Not those of state_dict, which a strategy that shards has taken out by now.
        saved = checkpoint.get("progress", {}).get("trained", {})
        if own != saved:
            raise ConfigError(
                f"ckpt_path: the checkpoint holds other trained weights ({len(saved)} tensors) than this "
                f"configuration ({len(own)}); give the config.yaml of its run, or the same lora settings"
            )
        progress = checkpoint["progress"]
        self.images, self.reward_queries = progress["images"], progress["reward_queries"]
        self._skipped, self.baseline = progress["skipped"], progress["baseline"]


def _check_strategy(strategy: Strategy, world: int) -> None:
    """Refuse a strategy that would train copies apart, or write what cannot be resumed."""
    if isinstance(strategy, FSDPStrategy):
        raise ConfigError(
            "trainer.strategy: fsdp wraps the whole module, of which a method calls parts; to shard the "
            "denoiser add --config configs/backbone/fsdp.yaml"
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if strategy.device_mesh["data_parallel"].size() != world:
        raise ConfigError(
            f"trainer.strategy: the denoiser is sharded over data_parallel_size, which is "
            f"{strategy.device_mesh['data_parallel'].size()} with {world} processes; set it to {world}, and "
            "tensor_parallel_size to 1"
        )
    if strategy._save_distributed_checkpoint:  # there is no public name
        raise ConfigError(
            "trainer.strategy: a checkpoint in shards would ask for the frozen weights, which none holds; "
            "set save_distributed_checkpoint to false"
        )
