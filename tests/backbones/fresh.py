"""Backbones of the tiny pipelines, which many tests begin with."""

import io
import pickle
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_align.backbones import DiffusersBackbone

Kind = TypeVar("Kind", bound=DiffusersBackbone)

_made: dict[tuple[Any, ...], tuple["Master", Tensor]] = {}


def fresh(kind: type[Kind], folder: Path, **options: Any) -> Kind:
    """What ``kind(folder, **options)`` makes after seed 0: a copy of one that is made once.

    To read the files and to inject the adapter takes more than ten times as long as the copy. The generator
    is left as the constructor leaves it.

    Args:
        kind: The class.
        folder: Of a fixture, in which no test changes anything.
        options: Of the constructor.
    """
    torch.manual_seed(0)
    if options.get("adapters") or options.get("compile") or options.get("checkpointing") == "blocks":
        # Of files that may change, or with functions in the network that belong to one backbone.
        return kind(str(folder), **options)
    key = (kind, folder, repr(sorted(options.items())), torch.get_default_dtype())
    if key not in _made:
        _made[key] = Master(kind(str(folder), **options)), torch.get_rng_state()
    master, state = _made[key]
    torch.set_rng_state(state)
    copied: Any = master.copy()
    return copied


class Master:
    """An object as a pickle, which is copied in a fifth of the time that ``deepcopy`` takes.

    Tensors are beside the pickle and cloned; tokenizers are shared.
    """

    def __init__(self, made: Any) -> None:
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(made)
        self.pickled, self.kept = file.getvalue(), pickler.kept

    def copy(self) -> Any:
        return _Unpickler(self.pickled, self.kept).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.kept: list[Any] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor | PreTrainedTokenizerBase):
            return None
        if id(obj) not in self._places:  # weights may be tied
            self._places[id(obj)] = len(self.kept)
            self.kept.append(obj)
        return self._places[id(obj)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, kept: list[Any]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._kept, self._copies = kept, dict[int, Any]()

    def persistent_load(self, pid: int) -> Any:
        if pid not in self._copies:
            self._copies[pid] = _copied(self._kept[pid])
        return self._copies[pid]


def _copied(one: Any) -> Any:
    if isinstance(one, nn.Parameter):
        return nn.Parameter(one.detach().clone(), one.requires_grad)
    return one.clone() if isinstance(one, Tensor) else one
