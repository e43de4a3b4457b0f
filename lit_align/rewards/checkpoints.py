"""Checkpoints of scorers that were published as single files: found, read as tensors only, renamed."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_align.errors import ConfigError, first_line
from lit_align.pretrained import Dtype, unsound, why_not_read

ENDINGS = (".safetensors", ".pt", ".pth")


def find(pretrained: str, published: str, name: str, whole: str = "") -> Path:
    """The file of a checkpoint.

    Args:
        pretrained: A file, a folder that holds it, or the id of a repository on the Hugging Face hub.
        published: The name of the file; in a folder also the same with another of :data:`ENDINGS`, or the
            only file that ends so.
        name: The reward's, for messages.
        whole: What else a folder may be, for messages.

    Raises:
        ConfigError: It is not there, or the hub cannot be reached.
    """
    place = Path(pretrained).expanduser()
    if place.is_file() and place.suffix in ENDINGS:
        return place
    if place.is_dir():
        stem = published.rpartition(".")[0]
        same = [place / f"{stem}{ending}" for ending in ENDINGS]
        held = sorted(file for file in place.iterdir() if file.suffix in ENDINGS)
        for file in [file for file in same if file.is_file()] or (held if len(held) == 1 else []):
            return file
        raise ConfigError(
            f"{name}: pretrained: the folder {pretrained!r} has no {published}; give the file, or the folder "
            f"with it{whole}."
        )
    if place.suffix in ENDINGS or pretrained.startswith((".", "~", "/")) or pretrained.count("/") != 1:
        raise ConfigError(
            f"{name}: pretrained: {pretrained!r} is neither a file nor a folder; give {published} or its "
            f"folder (the working directory is {Path.cwd()}), or a hub id (owner/name)."
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(pretrained, published))
    except Exception as error:  # the hub's client raises errors of several libraries
        raise ConfigError(
            f"{name}: pretrained: cannot load {published} of {pretrained!r} ({first_line(error)}); check the "
            "id and the network; without a network, download it elsewhere and give its folder (hf download "
            f"{pretrained} {published} --local-dir FOLDER)."
        ) from error


def read(file: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a file by name; nothing is unpickled but tensors.

    A state dict may lie under ``state_dict`` or ``model``, as training scripts save it.

    Raises:
        ConfigError: It cannot be read, or holds something else.
    """
    try:
        held: Any = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # what the unpickler raises has no common base
        reason = why_not_read(error)
        raise ConfigError(
            f"{name}: cannot read {str(file)!r} ({reason}); download it again; it must be a state dict, not "
            "a pickled module."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not all(isinstance(value, Tensor) for value in held.values()):
        raise ConfigError(f"{name}: {str(file)!r} does not hold a state dict; give the published checkpoint.")
    if fault := unsound(held):
        raise ConfigError(f"{name}: {str(file)!r} cannot be used: {fault}; download it again.")
    return {str(key).removeprefix("module."): value for key, value in held.items()}


def linear(state: dict[str, Tensor], prefix: str) -> nn.Linear:
    """A layer in float32, as it is small, whose weight and bias are taken out of a state dict."""
    weight, bias = (state.pop(f"{prefix}{part}").float() for part in ("weight", "bias"))
    layer = nn.Linear(weight.shape[1], len(weight))
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def renamed(state: Mapping[str, Tensor], names: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """A state dict with every pattern of its keys replaced, in the order that is given."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        found[key] = value
    return found


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Number of layers: of different first groups of a pattern that begins keys."""
    return len({found[1] for key in state if (found := re.match(pattern, key))})


def made(
    kind: Any, config: Any, state: Mapping[str, Tensor], file: Path, dtype: Dtype, **options: Any
) -> Any:
    """A transformers model of a class, with all its weights from a state dict.

    Args:
        kind: The class.
        config: Its configuration.
        state: The weights, by the model's own names.
        file: Where they come from, for messages.
        dtype: Precision of the weights.
        options: Further arguments of the class.

    Raises:
        ConfigError: Weights are missing, left over, or of another shape.
    """
    try:
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            **options,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip().rstrip(".")
        raise ConfigError(f"{str(file)!r} does not fit ({reason}); give the published checkpoint.") from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := info[fault]:
            raise ConfigError(
                f"{str(file)!r} is not a checkpoint of this model: {fault.replace('_', ' ')}, {len(found)} "
                f"of them, such as {sorted(map(str, found))[0]}; give the published checkpoint."
            )
    return model
