"""What a run can resume from: ``checkpoints/last.ckpt`` and ``checkpoints/best.ckpt``."""

import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from lit_align.callbacks.files import writes
from lit_align.callbacks.histograms import tensorboards
from lit_align.data import Batch
from lit_align.errors import ConfigError, check_positive, tell
from lit_align.files import replace_file, unused, writing
from lit_align.folder import run_folder


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside the old one and replaces that when the new one is on disk.

    Lightning writes it in the system's temporary folder first; where that is on another file system, a
    killed run is left with half a file.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        if "://" in str(path):  # not a file of this machine
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            replace_file(Path(path), lambda draft: _save(checkpoint, draft))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, place: storage, weights_only: Any = None
    ) -> dict[str, Any]:
        """As Lightning, but a file that is not whole is refused, and nothing in it is executed.

        Raises:
            ConfigError: It is not whole, or holds more than tensors, numbers, texts, lists and mappings.
        """
        if "://" not in str(path):
            check_whole(Path(path))
        try:
            return super().load_checkpoint(path, map_location, weights_only=True)
        except OSError:
            raise
        except Exception as error:  # torch raises whatever the bytes lead to, and advises to execute them
            raise ConfigError(f"ckpt_path: {path} is not a checkpoint of lit_align; give another") from error


def _save(checkpoint: dict[str, Any], draft: Path) -> None:
    with draft.open("wb") as file:  # of a path torch says "iostream error", and not why
        torch.save(checkpoint, file)


def check_whole(path: Path) -> None:
    """Compare a checkpoint with its check sums; torch reads over a fault of the disk.

    Raises:
        ConfigError: They differ, or the file is none of torch's.
    """
    state = path.stat() if path.exists() else None
    fault = _fault(path, state and (state.st_ino, state.st_size, state.st_mtime_ns))
    if fault is not None:
        others = [other.name for other in sorted(path.parent.glob("*.ckpt")) if other.name != path.name]
        remedy = f"take another one ({', '.join(others)})" if others else "restore it from a copy"
        raise ConfigError(f"ckpt_path: {path} is damaged ({fault}); {remedy}")


@cache
def _fault(path: Path, state: tuple[int, ...] | None) -> str | None:
    """What is wrong with a file of torch's; it may be large, and is read once while its ``state`` stays."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (OSError, zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError) as error:
        return str(error)


def write_whole(trainer: Trainer) -> None:
    """Let the Trainer write and read its checkpoints whole, unless it was given another plugin."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()


def flush(trainer: Trainer) -> None:
    """Flush the curves to disk: they must not lack what is in a checkpoint."""
    for logger in trainer.loggers:
        logger.save()


def take_back(trainer: Trainer, path: Path) -> None:
    """Restore weights and the optimizer's state; learning rates and counters stay as they are."""
    settings = [
        [{name: value for name, value in group.items() if name != "params"} for group in one.param_groups]
        for one in trainer.optimizers
    ]
    # Tensors that are made in a validation could not be trained.
    with torch.inference_mode(False), torch.no_grad():
        content = trainer.strategy.load_checkpoint(path, weights_only=True)
        trainer.strategy.load_model_state_dict(content, strict=False)
        trainer.strategy.load_optimizer_state_dict(content)
    for optimizer, groups in zip(trainer.optimizers, settings, strict=True):
        for group, kept in zip(optimizer.param_groups, groups, strict=True):
            group.update(kept)


class BatchCheckpoint(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` at the end of rollout batches: an interrupt loses at most one batch.

    The first is written before the first rollout batch, after its validation.

    A rollout batch that is followed by a validation counts as ended when that is done, so that a run that
    is killed in its validation repeats the batch. It stands after :class:`BestCheckpoint`, whose newest score
    is part of the checkpoint.

    Args:
        every: Rollout batches between two checkpoints; the end of an epoch always gets one.

    Raises:
        ConfigError: ``every`` is not positive.
    """

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        check_positive({"BatchCheckpoint.every": every})
        self.every = every

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        write_whole(trainer)
        if stage == "fit" and writes(trainer):  # so that "last" knows of a run that has no checkpoint yet
            folder = run_folder(trainer) / "checkpoints"
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        _make_again(trainer)  # before anything is logged of the batch: TensorBoard's writer would end

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            _make_again(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if _validates(trainer, batch_idx):
            return  # saved when the validation is done
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if last or (trainer.fit_loop.total_batch_idx + 1) % self.every == 0:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        _make_again(trainer)
        flush(trainer)
        trainer.save_checkpoint(run_folder(trainer) / "checkpoints" / "last.ckpt", False)  # not weights alone


def _make_again(trainer: Trainer) -> None:
    """Make a run's folder anew if it was deleted: the state in memory is all that is left of the run."""
    folder = run_folder(trainer)
    if not writes(trainer) or folder.is_dir():
        return
    rank_zero_warn(f"{folder} was deleted while the run writes there; it is made again, without what it had")
    with writing(folder):
        folder.mkdir(parents=True)
        for writer in tensorboards(trainer):
            writer.close()  # a new file is opened when it is used again


def _validates(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a validation follows this batch."""
    every = trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (every and (trainer.current_epoch + 1) % every):
        return False
    if trainer.val_check_batch == float("inf"):
        return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)
    done = batch_idx if every else trainer.fit_loop.total_batch_idx
    return trainer.val_check_batch is not None and (done + 1) % trainer.val_check_batch == 0


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``checkpoints/best.ckpt``, of the validation after an update with the highest ``val/reward``.

    The validation of the pretrained model gets no checkpoint, even if it is the highest: its adapter does
    nothing, and resuming from it would be a new start. The end of a fit then says so.
    """

    def __init__(self) -> None:
        super().__init__(
            monitor="val/reward",
            mode="max",
            filename="best",
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.dirpath = str(run_folder(trainer) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Pass over a validation without any score, which would count as the best if it is the first.

        One whose weights the guard has discarded is passed over too: there is nothing to save.
        """
        flush(trainer)
        reward = trainer.callback_metrics.get("val/reward")
        if not pl_module.taken_back and (reward is None or bool(reward.isfinite())):
            super().on_validation_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        start, best = pl_module.baseline.get("reward"), self.best_model_score
        if start is not None and best is not None and float(best) <= float(start.nanmean()):
            tell(
                "no validation after an update has a higher val/reward than the pretrained model "
                f"({float(start.nanmean()):.4f}); {self.best_model_path} is the best of them "
                f"({float(best):.4f})"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the best score if the run's folder was moved, or is given by another path."""

        def here(path: str) -> str:
            return str(Path(self.dirpath or "") / Path(path).name) if path else path

        self.current_score = state_dict["current_score"]  # Lightning saves it, and does not restore it
        paths = {name: here(state_dict[name]) for name in ("best_model_path", "kth_best_model_path")}
        scores = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath, "best_k_models": scores})

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Compare with the best checkpoint that is there: it may be newer than the one in use."""
        super().on_train_start(trainer, pl_module)
        if not pl_module.images:
            self._forget_score()  # that of another run, where this callback was used before
            return
        if trainer.enable_validation and not pl_module.baseline:  # it is measured anew
            self._forget(trainer, pl_module.images)
        best = Path(self.dirpath or "") / "best.ckpt"
        score = trainer.strategy.broadcast(_score(best) if trainer.is_global_zero else None)
        if score is None:  # none is there, or none of this run: it stayed in another folder
            self._forget_score()
        elif self.best_model_score is None or float(score) > float(self.best_model_score):
            self.best_model_score = self.kth_value = score
            self.best_model_path = self.kth_best_model_path = str(best)
            self.best_k_models = {str(best): score}

    def _forget(self, trainer: Trainer, images: int) -> None:
        """Drop the best score, which is of another measurement; its checkpoint is kept under another name."""
        self._forget_score()
        best = Path(self.dirpath or "") / "best.ckpt"
        if writes(trainer) and best.exists():
            with writing(best):
                best.rename(unused(best.with_name(f"best_{images:08d}.ckpt")))

    def _forget_score(self) -> None:
        self.best_k_models, self.best_model_path, self.kth_best_model_path = {}, "", ""
        self.best_model_score = self.current_score = None


def _score(best: Path) -> torch.Tensor | None:
    """The score of a best checkpoint, as it says itself; None where there is none that is whole."""
    try:
        content = torch.load(best, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch raises whatever the bytes lead to
        return None
    states = content.get("callbacks", {})
    found = [state for name, state in states.items() if name.startswith(BestCheckpoint.__name__)]
    return found[0]["best_model_score"] if found else None


def checkpoint_callbacks() -> list[Callback]:
    """The checkpoints of every run, in the order in which they must be written."""
    return [BestCheckpoint(), BatchCheckpoint()]
