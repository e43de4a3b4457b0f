"""Which checkpoint ``--ckpt_path`` means, and what it says of its run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lit_align.callbacks.checkpoints import check_whole
from lit_align.callbacks.guard import KEPT
from lit_align.cli.settings import changes, decides_nothing, told
from lit_align.errors import ConfigError, tell, user_path

AUTO = "auto"
"""The value of ``--ckpt_path`` by which the same command begins a run and goes on with it."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint's counters, read without its weights.

    Attributes:
        path: The file.
        images: Of the run when it was written.
        steps: Optimizer steps.
        epochs: Epochs that are complete.
        settings: What the run was asked to do, by dotted name; None of a run from Python.
        measured: Images of the run at its newest validation; None if nobody knows of one.
        seconds: Of training, where the Trainer counts them (``max_time``).
    """

    path: Path
    images: int
    steps: int
    epochs: int
    settings: dict[str, Any] | None
    measured: int | None = None
    seconds: float = 0.0

    @property
    def run(self) -> Path | None:
        """The folder of its run, if the checkpoint lies where runs write."""
        folder, here = self.path.absolute().parent, Path.cwd()
        if folder.name != "checkpoints":
            return None
        return folder.parent.relative_to(here) if here in folder.parent.parents else folder.parent


def find(ckpt_path: str, runs: Path, named: str | None = None) -> Saved:
    """The checkpoint that the user means.

    Args:
        ckpt_path: ``last``, the folder of a run, or a file.
        runs: Where the runs of this configuration are.
        named: The folder of its run in there; if not given, that with the highest number.

    Raises:
        ConfigError: There is none, or it cannot be read, or it is damaged.
    """
    saved = _last(runs, named) if ckpt_path == "last" else _find(ckpt_path)
    check_whole(saved.path)
    return saved


def _find(ckpt_path: str) -> Saved:
    if not ckpt_path:
        raise ConfigError(
            "ckpt_path: it is empty, as by a variable that is not set; give a checkpoint, the folder of a "
            "run, or 'last', or leave it out"
        )
    path = user_path(ckpt_path)
    if not path.exists():
        raise ConfigError(
            f"ckpt_path: there is no {ckpt_path}; give a checkpoint, the folder of a run, or 'last'"
        )
    if path.is_file():
        return read(path)
    if not path.is_dir():
        raise ConfigError(f"ckpt_path: {ckpt_path} is a pipe or a device; give a checkpoint, which is a file")
    if not (path / "checkpoints").is_dir():
        raise ConfigError(
            f"ckpt_path: {ckpt_path} is a folder, and not that of a run; give a checkpoint, which is one "
            "file, or a folder that has checkpoints/"
        )
    if (saved := newest(path)) is None:
        raise ConfigError(f"ckpt_path: {path / 'checkpoints'} has no checkpoint that is whole")
    return saved


def read(path: Path) -> Saved:
    """The counters of a checkpoint; nothing in it is executed, and its tensors stay on disk.

    Raises:
        ConfigError: It is not whole, or not one of lit_align.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        epoch = content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        ended = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]
        images, steps = content["progress"]["images"], content["global_step"]
        if not all(isinstance(number, int) for number in (images, steps, epoch)):
            raise TypeError("counters that are not numbers")
        callbacks = content.get("callbacks", {})
        settings = callbacks.get("RunConfig", {}).get("settings")
        seconds = float(callbacks.get("Timer", {}).get("time_elapsed", {}).get("train", 0.0))
        measured_at = content["progress"].get("measured_at") if content["progress"].get("latest") else None
        measured = measured_at["images"] if measured_at else None
    except Exception:  # torch raises whatever the bytes lead to
        raise ConfigError(
            f"ckpt_path: {path} cannot be read: it is not a checkpoint of lit_align, or not whole"
        ) from None
    return Saved(path, images, steps, epoch + bool(ended), settings, measured, seconds)


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run.

    Those of a guard are left out: they are written in the middle of what follows a validation.
    """
    files = (run / "checkpoints").glob("*.ckpt")
    return [path for path in files if path.is_file() and not path.name.startswith(KEPT)]


def newest(run: Path) -> Saved | None:
    """The whole checkpoint of a run with the most images; of several, ``last.ckpt``."""
    found, broken = [], []
    for path in checkpoints_of(run):
        try:
            found.append(read(path))
        except ConfigError:
            broken.append(path)  # cut by a kill, or another program's
    taken = max(
        found, key=lambda saved: (saved.images, saved.steps, saved.path.name == "last.ckpt"), default=None
    )
    if taken is not None and broken:
        rank_zero_warn(
            f"{broken[0]} cannot be read and is ignored; the newest that can be read is {taken.path}, at "
            f"{taken.images} images"
        )
    return taken


def find_equal(runs: Path, settings: Mapping[str, Any], named: str | None = None) -> Saved | None:
    """The newest checkpoint of the newest run with some settings; None if there is none, and so a run begins.

    Runs with other settings are others' or another experiment's: a job that is started again without anybody
    looking on must not go on with them.

    Args:
        runs: Where the runs of this configuration are.
        settings: Those of this command, by dotted name.
        named: The folder of its run in there; all others are left alone then.

    Raises:
        ConfigError: It is damaged.
    """
    others = []
    for folder in _runs(runs, named):
        saved = newest(folder)
        if saved is not None and saved.settings is not None:
            if not (names := _different(saved.settings, settings)):
                check_whole(saved.path)
                return saved
            others.append(f"{folder} has other settings ({told(names, saved.settings, settings)})")
    tell(f"{others[0] if others else f'no run in {runs} has a checkpoint'}, so a new run begins")
    return None


def _different(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ and decide more than time and memory."""
    found = changes(saved, now)
    names = [*found.weights, *found.optimizer, *found.measurement, *found.other]
    return [name for name in names if not decides_nothing(name)]


def _runs(runs: Path, named: str | None) -> list[Path]:
    """The folders of runs that have begun, the newest first."""
    numbers = {
        folder: int(number)
        for folder in runs.glob("version_*")
        if (number := folder.name.removeprefix("version_")).isdecimal()
    }
    folders = sorted(numbers, key=numbers.__getitem__, reverse=True) if named is None else [runs / named]
    return [one for one in folders if (one / "config.yaml").exists() or (one / "checkpoints").is_dir()]


def _last(runs: Path, named: str | None) -> Saved:
    """The newest checkpoint of the newest run."""
    if not (folders := _runs(runs, named)):
        raise ConfigError(
            f"ckpt_path: 'last' finds no run under {runs / (named or '')}; start without --ckpt_path"
        )
    if (saved := newest(folders[0])) is not None:
        return saved
    older = next((folder for folder in folders[1:] if newest(folder)), None)
    meant = f", or go on with an older one: --ckpt_path {older}" if older else ""
    raise ConfigError(
        f"ckpt_path: the newest run, {folders[0]}, has no whole checkpoint yet; start it again without "
        f"--ckpt_path{meant}"
    )
