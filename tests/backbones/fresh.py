"""Backbones of the tiny pipelines, which many tests begin with."""

from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lit_align.backbones import DiffusersBackbone

Kind = TypeVar("Kind", bound=DiffusersBackbone)

_made: dict[tuple[Any, ...], tuple[DiffusersBackbone, Tensor]] = {}


def fresh(kind: type[Kind], folder: Path, **options: Any) -> Kind:
    """What ``kind(folder, **options)`` makes after seed 0: a copy of one that is made once.

    To read the files and to inject the adapter takes more than twice as long as the copy. The generator is
    left as the constructor leaves it.

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
        _made[key] = kind(str(folder), **options), torch.get_rng_state()
    made, state = _made[key]
    torch.set_rng_state(state)
    tokenizers = [part for name, part in made.pipeline.components.items() if name.startswith("tokenizer")]
    copied: Any = deepcopy(made, {id(tokenizer): tokenizer for tokenizer in tokenizers})
    return copied
