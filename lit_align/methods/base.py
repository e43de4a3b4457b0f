"""The base of all methods: checks at the start, what is logged, and what a checkpoint holds."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from rich.progress import Progress
from torch import Tensor

from lit_align.backbones import DiffusionBackbone
from lit_align.backbones.base import SamplerFactory
from lit_align.errors import ConfigError, check_kinds, check_same
from lit_align.methods.checkpoints import keep_readable
from lit_align.methods.held_out import check_data, first_batches, held_out_prompts
from lit_align.methods.identity import IdentifiedModule, measurement_of
from lit_align.methods.metrics import Metrics, means, reported, waited_for
from lit_align.methods.optimisation import Optimisation, OptimisedModule
from lit_align.methods.sampling import Sampling, make_sampler
from lit_align.methods.skipped import LIMIT, check_weights
from lit_align.methods.strategies import (
    check_monitors,
    check_scaled,
    check_train_monitors,
    check_trainer,
)
from lit_align.randomness import run_seed
from lit_align.rewards import RewardBank
from lit_align.shapes.world import IMAGE_SIDE, untaught

Item = TypeVar("Item")

SECONDS_PER_FRAME = 0.1
"""Seconds between two drawings of a progress bar."""


class AlignmentModule(IdentifiedModule, OptimisedModule):
    """Base of all methods: a subclass writes ``training_step`` with ``sample``, ``score`` and ``update``.

    One batch of the training loader is one *rollout batch*: its prompts, their images and all updates that
    are made on them.
    """

    several_tasks: ClassVar[bool] = False
    """Whether a training batch may be a list with a rollout batch of each task."""

    learns_from_pairs: ClassVar[bool] = False
    """Whether a training batch is one of :class:`~lit_align.data.PickaPicDataModule`."""

    also_kept: ClassVar[tuple[str, ...]] = ()
    """Weight sets that move without being trained: a checkpoint holds them too."""

    goes_back: ClassVar[bool] = True
    """Whether the guard can restore earlier weights: not if the run keeps data that later weights made."""

    def __init__(
        self,
        backbone: DiffusionBackbone,
        sampler: SamplerFactory,
        rewards: RewardBank,
        optimisation: Optimisation = Optimisation(),
        sampling: Sampling = Sampling(),
    ) -> None:
        """Set up the method.

        Args:
            backbone: The diffusion model.
            sampler: How it is sampled.
            rewards: What is maximised and what is monitored.
            optimisation: How the trained weights are updated.
            sampling: How images are sampled.
        """
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint holds what is trained, not the frozen models
        check_kinds({"backbone": (backbone, DiffusionBackbone), "rewards": (rewards, RewardBank)})
        check_kinds({"optimisation": (optimisation, Optimisation), "sampling": (sampling, Sampling)})
        backbone.check_guidance(sampling.guidance)
        self.backbone = backbone
        self.sampler = self._own_sampler = make_sampler("sampler", sampler, backbone)
        self.rewards = rewards
        # Copies: where no settings are given, all modules are given the same.
        self.optimisation = replace(optimisation)
        self.sampling = replace(sampling, seed=run_seed(sampling.seed))
        _ = self.eval_sampler  # built here, so that a wrong one is refused at the start
        self.images = self.reward_queries = 0
        self.collected: dict[str, Tensor] = {}
        self.baseline, self.latest, self.taken_back, self.prompt_groups = {}, {}, {}, torch.zeros(0)
        self.gradient_norm, self.lr, self.rate_factor = torch.zeros(()), None, 1.0
        self.tested, self.tested_groups, self.set_metrics, self.measured_at = {}, torch.zeros(0), {}, {}
        self._evaluated, self._skipped, self._unscored = [], 0, 0
        self._losses, self._rows, self._recent = [], [], deque(maxlen=LIMIT)
        self._facts, self._validated_with = {}, {}
        self._logged: dict[str, Tensor] = {}

    # ---- training

    def setup(self, stage: str) -> None:
        """Check what depends on the Trainer and the data.

        Raises:
            ConfigError: The Trainer does not suit the method or the model, the data do not suit the method
                (pairs of images, several tasks, loaders alone), or a reward does not suit the model or the
                data.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        check_data(data, stage, type(self))
        check_trainer(self.trainer, stage)
        if stage == "fit":
            check_scaled(self.trainer, self.backbone.weight_sets.parameters(), "backbone.dtype")
            self.backbone.weight_sets.check_frozen(self.backbone, *self.reward_banks)
            check_same("sampler", self.sampler is self._own_sampler)
        keep_readable(self.trainer)
        self.identify(data, stage)
        self._check_domain(held_out_prompts(data, stage))
        if stage != "fit" or self.trainer.limit_val_batches:  # type: ignore[attr-defined]
            for batch in first_batches(data, stage):
                self.bank_of(batch).check_columns(batch.columns)

    def on_train_start(self) -> None:
        """Measure the pretrained model if that was not done, and check the metrics that callbacks monitor."""
        # A run may go on at the end of an epoch, where callbacks look at what was logged before.
        self.trainer.callback_metrics.update(self._logged)
        self.check_optimizers()
        super().on_train_start()
        check_monitors(self.trainer)
        self.backbone.weight_sets.trained = True

    def _check_domain(self, prompts: list[str]) -> None:
        """Refuse rewards that cannot score the model's images; warn about prompts that it was not taught."""
        judged = self.backbone.is_shapes and self.backbone.size == (IMAGE_SIDE, IMAGE_SIDE)
        for bank in self.reward_banks:
            bank.check_model(judged, prompts)
        if self.backbone.is_shapes and (warning := untaught(prompts)):
            rank_zero_warn(warning)

    def measurement(self, split: str) -> dict[str, Any]:
        """How the images of a held-out split are measured, for its result; known after :meth:`setup`."""
        return measurement_of(self, self.reward_banks, split)

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a checkpoint holds no constructor's arguments, and Lightning unpickles one from a URL.

        Raises:
            ConfigError: Always, with what to do instead.
        """
        raise ConfigError(
            f"{cls.__name__}.load_from_checkpoint: a checkpoint holds what is trained, and no models or "
            "settings; build the module, and give trainer.test or trainer.predict the checkpoint as ckpt_path"
        )

    @property
    def reward_banks(self) -> list[RewardBank]:
        """All banks; several tasks have one each."""
        return [self.rewards]

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            self.backbone.shard(self.device_mesh["data_parallel"])

    def log_rollout_batch(
        self, scores: dict[str, Tensor], metrics: Metrics, sampling: float, total: float
    ) -> None:
        """Count and log one rollout batch.

        Args:
            scores: What :meth:`score` reports on this rank.
            metrics: What the updates measured; the mean of each is ``train/<name>``. ``unscored`` is added:
                1 for an image without a score.
            sampling: Seconds for sampling and scoring.
            total: Seconds for everything.
        """
        ranks = self.gather(reported(scores, metrics))
        scores, measured = ({n: torch.cat([r[i][n] for r in ranks]) for n in ranks[0][i]} for i in range(2))
        self.collected, count = scores, len(scores["reward"])
        measured.setdefault("unscored", scores["reward"].isnan().double())
        self.images += count
        self.reward_queries += count
        logged = means(scores, measured)
        logged["train/reward_std"] = scores["reward"][scores["reward"].isfinite()].std()
        self.log_progress(logged, count / total, sampling / total)
        self.count_scores(measured["unscored"])

    def log_progress(
        self, logged: dict[str, Tensor | float], speed: float, sampling_fraction: float, bar: str = "reward"
    ) -> None:
        """Log what was measured of a batch, and how far and how fast the run is; the axis is images.

        Args:
            logged: Values by their full names.
            speed: Images a second.
            sampling_fraction: Share of the time that went into sampling and scoring.
            bar: What the progress bar shows beside the speed.
        """
        if self.lr is not None:
            logged["train/lr"] = self.lr
        logged |= {
            "progress/images": float(self.images),
            "progress/reward_queries": float(self.reward_queries),
            "perf/sampling_fraction": sampling_fraction,
            "perf/images_per_second": speed,
            "step": float(self.images),
        }
        check_train_monitors(self.trainer, logged)
        self.log_dict(logged, logger=False, batch_size=1)
        self._log_now(logged)
        shown = {bar: logged[f"train/{bar}"], "images/s": speed}
        self.log_dict(shown, prog_bar=True, logger=False, batch_size=1)

    def _log_now(self, logged: Mapping[str, Tensor | float]) -> None:
        """Give values to the loggers, before the batch's checkpoint; the Trainer does it after that."""
        trainer = self.trainer
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or ((trainer.fit_loop.total_batch_idx + 1) % every and not trainer.should_stop):
            return
        values = {name: torch.as_tensor(value) for name, value in logged.items()}
        trainer.logged_metrics.update(values)
        numbers = {name: value.item() for name, value in values.items() if name != "step"}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, self.images)

    # ---- ranks, files and checkpoints

    def track(self, items: Iterable[Item], total: int, description: str) -> Iterator[Item]:
        """Yield the items, with a progress bar if the Trainer shows one: its own bar counts whole batches."""
        looking = self.trainer.is_global_zero and self.trainer.progress_bar_callback
        with Progress(transient=True, disable=not looking) as bar:
            task, drawn = bar.add_task(description, total=total), 0.0
            for item in items:
                yield item
                # The Trainer's own bar stops rich from refreshing this one.
                refresh = time.monotonic() - drawn > SECONDS_PER_FRAME
                bar.update(task, advance=1, refresh=refresh)
                drawn = time.monotonic() if refresh else drawn

    def export(self, folder: Path | None) -> None:
        """Write what was trained, for diffusers; every rank must call it, and only one gives a folder."""
        self.backbone.weight_sets.save(folder)

    def kept(self) -> dict[str, Tensor]:
        """The parameters that a checkpoint holds: what is trained, and :attr:`also_kept`."""
        moved = {p for name in self.also_kept for p in self.backbone.weight_sets.parameters_of(name)}
        return {name: p for name, p in self.named_parameters() if p.requires_grad or p in moved}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained and every counter; the frozen models come from their own files."""
        kept = self.kept()
        checkpoint["state_dict"] = {n: v for n, v in checkpoint["state_dict"].items() if n in kept}
        checkpoint["progress"] = {
            "images": self.images,
            "reward_queries": self.reward_queries,
            "skipped": self._skipped,
            "unscored": self._unscored,
            "rate_factor": self.rate_factor,
            "baseline": self.baseline,
            "latest": self.standing,
            "measured_at": self.measured_at,
            "prompt_groups": self.prompt_groups,
            "trained": {name: list(p.shape) for name, p in kept.items()},
            "logged": waited_for(self.trainer.callback_metrics),
        }
        checkpoint["identity"] = self._facts

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters.

        Raises:
            ConfigError: The checkpoint is of another method, model or data set, or holds other trained
                weights than this configuration has.
        """
        identity, stage = checkpoint.get("identity", {}), self.trainer.state.fn if self._facts else None
        self.check_identity(identity, stage == "fit")
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
        self._unscored = progress.get("unscored", 0)
        check_weights(checkpoint.get("state_dict", {}), own)
        if stage == "fit":
            self.measured_at = progress.get("measured_at", {})
            # Of an older checkpoint nobody knows after how many images it was measured.
            self.latest = progress.get("latest", {}) if self.measured_at else {}
            self.rate_factor = progress.get("rate_factor", 1.0)
            self.prompt_groups = progress.get("prompt_groups", self.prompt_groups)
            self._logged = progress.get("logged", {})
        self._validated_with = identity
        if stage in ("fit", "validate"):
            self.compare_measurement()
