"""Which Trainers the methods run on: others would round the stored chains, or train copies apart."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor

from lit_align.errors import ConfigError


def check_trainer(trainer: Trainer) -> None:
    """Refuse a precision, a strategy or checkpoints that the methods do not know.

    Raises:
        ConfigError: With what to change.
    """
    if trainer.precision not in ("32-true", "16-mixed", "bf16-mixed"):
        raise ConfigError(
            f"trainer.precision: {trainer.precision} would round the stored chains; "
            "use 32-true, bf16-mixed or 16-mixed"
        )
    _check_world(trainer.world_size)
    _check_strategy(trainer.strategy, trainer.world_size)
    _check_checkpoints(trainer.checkpoint_callbacks)


def check_scaled(trainer: Trainer, weights: Iterable[Tensor], place: str) -> None:
    """Refuse weights in float16 through which gradients would go as they are: nearly all would be 0.

    Args:
        trainer: Scales losses, or does not.
        weights: That gradients go through.
        place: Where their precision is set, for the message.

    Raises:
        ConfigError: They are in float16, and nothing is scaled.
    """
    if getattr(trainer.precision_plugin, "scaler", None) is None and any(
        weight.dtype == torch.float16 for weight in weights
    ):
        raise ConfigError(
            f"{place}: float16 would round gradients to 0, as precision {trainer.precision} does not scale "
            "them; set it to bfloat16, or trainer.precision to 16-mixed"
        )


def _check_world(world: int) -> None:
    """Refuse processes that a launcher started together and that would each train alone."""
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect() and (started := environment().world_size()) != world:
            raise ConfigError(
                f"trainer.devices: {started} processes were started together, and the Trainer knows of "
                f"{world}; set trainer.num_nodes to the number of nodes, and trainer.devices to that of "
                "processes on each"
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
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for one in callbacks:
        wanted = str(getattr(one, "monitor", None) or "")
        if wanted.startswith("val/") and wanted not in (*there, "val/unscored"):  # which is there if not 0
            near = difflib.get_close_matches(wanted, there, n=2)
            meant = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(there)}"
            raise ConfigError(f"{type(one).__name__}: monitor {wanted} is not in the validation; {meant}")


def read_safely(trainer: Trainer) -> None:
    """Let the Trainer read checkpoints that are one file, with nothing in it executed.

    Lightning reads a folder, which strategies that shard may write, with pickle, whatever ``weights_only``
    says, and a URL too. All that it loads comes through the strategy.
    """
    strategy: Any = trainer.strategy
    load = type(strategy).load_checkpoint

    def load_checkpoint(checkpoint_path: str | Path, weights_only: bool | None = None) -> Any:
        place = f"ckpt_path: {checkpoint_path}"
        if not Path(checkpoint_path).is_file():
            kind = "a folder" if Path(checkpoint_path).is_dir() else "no file of this machine"
            raise ConfigError(f"{place} is {kind}; give a checkpoint that is one file, such as last.ckpt")
        try:
            content = load(strategy, checkpoint_path, weights_only=True)
            progress = content["progress"]
            written = all(isinstance(progress[n], int) for n in ("images", "reward_queries", "skipped"))
            written &= all(isinstance(progress[n], dict) for n in ("baseline", "trained"))
            measured_at = progress.get("measured_at") or {"images": 0, "reward_queries": 0}
            written &= all(isinstance(measured_at[n], int) for n in ("images", "reward_queries"))
        except ConfigError:
            raise
        except Exception:  # torch raises whatever the bytes lead to
            written = False
        if not written:
            raise ConfigError(
                f"{place} cannot be read: it is not a checkpoint of lit_align for this model, or not whole; "
                "give another, such as best.ckpt beside it"
            ) from None
        return content

    strategy.load_checkpoint = load_checkpoint


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
            "trainer.strategy: a checkpoint in shards would ask for the frozen weights, which none holds; "
            "set save_distributed_checkpoint to false"
        )
