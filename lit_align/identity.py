"""What tells one run from another: facts that checkpoints and adapters carry, and how they are compared."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ADAPTER = "pytorch_lora_weights.safetensors"
"""The file of an adapter's folder, by diffusers' convention."""

STAMP = "lit_align.json"
"""Beside the files of a whole pipeline; an adapter's file has the same in its metadata, as ``lit_align``."""

KEY = "lit_align"

SAMPLED = 1024
"""Values of each tensor that :func:`weights_hash` reads, evenly spaced: 12 billion would take a minute."""

PACKAGES = ("lit_align", "torch", "diffusers", "lightning")


def weights_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of weights by name: 16 digits of the SHA-256 of names, shapes and evenly spaced values.

    The values are rounded to bfloat16: a model that is loaded in float32 or in bfloat16 is the same.

    Args:
        tensors: The names and the weights; their order is of no account.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        flat = tensor.detach().flatten()
        values = flat[:: max(1, len(flat) // SAMPLED)].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {list(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def text_hash(texts: Iterable[str]) -> str:
    """16 digits of the SHA-256 of some texts."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """The versions of this package and of those that decide what it computes."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from its source folder
            found[name] = "not installed"
    return found


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What two runs do not share, by name, as "old -> new"; what one of them does not say is left out."""
    return {
        name: _changed(saved[name], now[name])
        for name in saved
        if name in now and None not in (saved[name], now[name]) and saved[name] != now[name]
    }


def _changed(old: Any, new: Any) -> str:
    """The old and the new value; of mappings the entries that are not the same."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        same = {name for name in old if name in new and old[name] == new[name]}
        old, new = ({n: one[n] for n in one if n not in same} for one in (old, new))
    return f"{_short(old) or 'nothing'} -> {_short(new) or 'nothing'}"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(one)}" for name, one in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def stamp(path: Path, facts: Mapping[str, Any]) -> None:
    """Write facts into the metadata of a safetensors file; equal weights and facts give equal bytes.

    safetensors itself writes metadata in a random order.
    """
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__", {}) | {KEY: json.dumps(facts, sort_keys=True)}
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":"))
    text += " " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[8 + size :])


def read_stamp(place: Path) -> dict[str, Any] | None:
    """The facts of an adapter's file or folder, or of a pipeline's folder; None where there are none.

    What cannot be read has none: those who load it say why.
    """
    file = place / ADAPTER if place.is_dir() else place
    try:
        if (place / STAMP).is_file():
            facts = json.loads((place / STAMP).read_text("utf-8"))
        else:
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(min(size, 1 << 26)))
            facts = json.loads(header["__metadata__"][KEY])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if isinstance(facts, dict) else None
