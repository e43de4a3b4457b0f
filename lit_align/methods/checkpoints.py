"""What a checkpoint may hold: only what can be read again without executing any code in it."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor

from lit_align.errors import ConfigError

PLAIN = (bool, int, float, str, bytes, type(None))
"""Types of values that are read again as they are, as tensors are."""


def keep_readable(trainer: Trainer) -> None:
    """Let the Trainer read only what can be read with nothing executed, and write nothing else."""
    _read_safely(trainer)
    strategy: Any = trainer.strategy
    save = type(strategy).save_checkpoint

    def save_checkpoint(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        save(strategy, readable(checkpoint, "checkpoint"), *args, **kwargs)

    strategy.save_checkpoint = save_checkpoint


def readable(value: Any, place: str, made: dict[int, Any] | None = None) -> Any:
    """A value as a checkpoint may hold it: numbers of numpy become Python's own, all else stays.

    They come in where a setting is one, such as a learning rate of ``numpy.logspace``, and from what users
    keep in states of their own. What is one object in two places (the newest measurement may be the first)
    stays one.

    Raises:
        ConfigError: It could not be read again.
    """
    made = {} if made is None else made
    if id(value) in made:
        return made[id(value)]
    match value:
        case np.generic():
            return readable(value.item(), place)
        case dict():
            copied: dict[Any, Any] = {}
            made[id(value)] = copied
            copied.update(
                (readable(key, place, made), readable(one, f"{place}.{key}", made))
                for key, one in value.items()
            )
            return copied
        case list():
            made[id(value)] = [readable(one, place, made) for one in value]
            return made[id(value)]
    if type(value) is tuple:
        return tuple(readable(one, place, made) for one in value)
    if type(value) not in PLAIN and not isinstance(value, Tensor):
        _check_readable(value, place)
    return value


def _check_readable(value: Any, place: str) -> None:
    """Refuse what torch would read only by executing what is written there."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # pickle raises whatever an object leads to
        kind = type(value)
        raise ConfigError(
            f"{place} is a {kind.__module__}.{kind.__qualname__}, which no run could read again, since "
            "nothing in a checkpoint is executed; keep tensors, numbers, texts, lists and dicts there"
        ) from error


def _read_safely(trainer: Trainer) -> None:
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
