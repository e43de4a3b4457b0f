"""Which Trainers the methods run on: others would round the stored chains, or train copies apart."""

import difflib
from collections.abc import Collection, Iterable, Sequence

import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_align.errors import ConfigError

UNFIT: dict[type[Callback], str] = {
    BaseFinetuning: "changes what is trained; take it out, and set lora.target_modules",
    BatchSizeFinder: "tries loaders; take it out, and set sampling.batch and optimisation.micro_batch",
    GradientAccumulationScheduler: "delays updates; take it out, and set data.prompts_per_batch",
    LearningRateFinder: "trains on the run's prompts before it begins; take it out, and try short runs",
    ModelPruning: "changes frozen weights, which no checkpoint holds; take it out",
    StochasticWeightAveraging: "averages weights that nothing measures or saves; take it out",
    WeightAveraging: "keeps a copy of all models, from which no run can resume; take it out",
}
"""Callbacks of Lightning that take over what a method does, and why they cannot."""


def check_callbacks(kinds: Iterable[type]) -> None:
    """Refuse callbacks that would change a run silently, or break it in the middle.

    Raises:
        ConfigError: With why, and what to do instead.
    """
    for kind in kinds:
        for unfit, why in UNFIT.items():
            if issubclass(kind, unfit):
                raise ConfigError(f"trainer.callbacks: {kind.__name__} {why}")


def check_trainer(trainer: Trainer, stage: str = "") -> None:
    """Refuse a precision, a strategy, or callbacks and checkpoints of a fit, that the methods do not know.

    Raises:
        ConfigError: With what to change.
    """
    if trainer.precision not in ("32-true", "16-mixed", "bf16-mixed"):
        raise ConfigError(
            f"trainer.precision: {trainer.precision} would round the stored chains; "
            "use 32-true, bf16-mixed or 16-mixed"
        )
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise ConfigError(
            f"trainer.overfit_batches: {trainer.overfit_batches} would use other prompts in each epoch, "  # type: ignore[attr-defined]
            "which continues where the last one ended; give data.source a file of a few prompts, and set "
            "trainer.limit_train_batches"
        )
    _check_world(trainer.world_size)
    _check_strategy(trainer.strategy, trainer.world_size)
    _check_checkpoints(trainer.checkpoint_callbacks)
    if getattr(trainer.lightning_module, "_compiler_ctx", None) is not None:
        raise ConfigError(
            "torch.compile: the loops of a method cannot be compiled; give the module itself, and set "
            "backbone.compile, which compiles the denoiser"
        )
    if stage == "fit":
        check_callbacks(map(type, trainer.callbacks))  # type: ignore[attr-defined]


def check_scaled(trainer: Trainer, weights: Iterable[Tensor], place: str) -> None:
    """Refuse weights whose precision would lose gradients or updates.

    Gradients through float16 that nothing scales are nearly all 0, and trained weights below float32 round
    small updates away.

    Args:
        trainer: Scales losses, or does not.
        weights: That gradients go through.
        place: Where their precision is set, for the message.

    Raises:
        ConfigError: They are in float16, and nothing is scaled, or trained in less than float32.
    """
    weights = [*weights]
    if getattr(trainer.precision_plugin, "scaler", None) is None and any(
        weight.dtype == torch.float16 for weight in weights
    ):
        raise ConfigError(
            f"{place}: float16 would round gradients to 0, as precision {trainer.precision} does not scale "
            "them; set it to bfloat16, or trainer.precision to 16-mixed"
        )
    if narrow := {weight.dtype for weight in weights if weight.requires_grad and weight.itemsize < 4}:
        raise ConfigError(
            f"{place}: trained weights are in {narrow.pop()}, as by module.bfloat16(), which would round "
            "small updates away; call module.float(), and give this setting for the frozen weights"
        )


def _check_world(world: int) -> None:
    """Refuse processes that a launcher started together and that would each train alone.

    A single process whose number is not 0, as by a variable of another program, would write no curves and
    say nothing.
    """
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect() and (started := environment().world_size()) != world:
            raise ConfigError(
                f"trainer.devices: {started} processes were started together, and the Trainer expects "
                f"{world}; set trainer.num_nodes to the number of nodes, and trainer.devices to that of "
                "processes on each"
            )
    if world == 1 and (rank := rank_zero_only.rank):  # type: ignore[attr-defined]
        raise ConfigError(
            f"trainer.devices: the environment says that this is process {rank} of several (RANK, LOCAL_RANK "
            "or SLURM_PROCID), and the Trainer has one; unset the variable, or set trainer.devices to the "
            "number of processes"
        )


def _check_checkpoints(callbacks: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints by the clock: Lightning writes none where a module steps its optimizer itself."""
    for one in callbacks:
        if isinstance(one, ModelCheckpoint) and one._train_time_interval is not None:
            raise ConfigError(
                f"ModelCheckpoint: train_time_interval {one._train_time_interval} would write nothing, since "
                "methods step their optimizer themselves; use every_n_train_steps, or leave it out: a run "
                "writes its last.ckpt anyway"
            )


def check_monitors(trainer: Trainer) -> None:
    """Refuse callbacks that wait for a metric which the first validation has not, before any training.

    Raises:
        ConfigError: With the names that may have been meant.
    """
    there = [name for name in trainer.callback_metrics if name.startswith("val/")]
    for one, wanted in _monitors(trainer, "val", there):
        if not trainer.enable_validation:
            raise ConfigError(
                f"{type(one).__name__}: monitor {wanted} is never measured, since trainer.limit_val_batches "
                "is 0; set that, or monitor train/reward"
            )
        if there:  # of a run that goes on from an older checkpoint nobody knows
            near = difflib.get_close_matches(wanted, there, n=2)
            meant = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(there)}"
            raise ConfigError(f"{type(one).__name__}: monitor {wanted} is not in the validation; {meant}")


def check_train_monitors(trainer: Trainer, logged: Collection[str]) -> None:
    """The same for metrics of training, after the first rollout batch, where the name is nearly one of them.

    Others may be what a user's callback logs later.

    Raises:
        ConfigError: With the names that may have been meant.
    """
    for one, wanted in _monitors(trainer, "train", logged):
        if near := difflib.get_close_matches(wanted, logged, n=2):
            raise ConfigError(
                f"{type(one).__name__}: monitor {wanted} is not logged; did you mean {' or '.join(near)}?"
            )


def forget_scores(trainer: Trainer) -> None:
    """Let callbacks that wait for a better validation begin anew: what they have seen cannot be compared."""
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if not str(getattr(one, "monitor", None) or "").startswith("val/"):
            continue
        if isinstance(one, EarlyStopping):
            worst = torch.tensor(torch.inf)
            one.wait_count, one.best_score = 0, worst if one.monitor_op == torch.lt else -worst
        if isinstance(one, ModelCheckpoint):
            one.best_k_models, one.best_model_path, one.kth_best_model_path = {}, "", ""
            one.best_model_score = one.current_score = None


def _monitors(trainer: Trainer, kind: str, there: Collection[str]) -> Iterable[tuple[Callback, str]]:
    """The callbacks that wait for a metric of a kind that is not there, and its name."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for one in callbacks:
        wanted = str(getattr(one, "monitor", None) or "")
        waits = isinstance(one, EarlyStopping) or getattr(one, "_save_on_train_epoch_end", None) is not False
        # unscored is there if it is not 0.
        if waits and wanted.startswith(kind) and wanted not in there and not wanted.endswith("/unscored"):
            yield one, wanted


def _check_strategy(strategy: Strategy, world: int) -> None:
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
            "trainer.strategy: a checkpoint in shards would need the frozen weights, which it does not hold; "
            "set save_distributed_checkpoint to false"
        )
