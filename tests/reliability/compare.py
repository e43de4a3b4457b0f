"""Two runs of the same command, compared bit for bit in all that they leave."""

import csv
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every run that goes on

PATHS = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path", "best_k_models")
"""Of Lightning's callbacks: where files lie; their names count, and not their folders."""

OF_COMMANDS = ("config*.yaml", "validation_*.json", "validation_*.csv", "events.out.tfevents.*")
"""What each command that goes on adds: how it was asked, and what the earlier one had measured."""


def differences(whole: Path, run: Path) -> list[str]:
    """What is not the same in the folders of two runs; times do not count.

    Args:
        whole: Of a run that nothing interrupted.
        run: Of the one that was killed and went on.
    """
    return [
        *_files(whole, run),
        *(f"TensorBoard {found}" for found in _unlike(_curves(whole), _curves(run))),
        *(f"metrics.csv {found}" for found in _unlike(_rows(whole), _rows(run))),
        *(f"pool {found}" for found in _unlike(_pool(whole), _pool(run))),
    ]


def leftovers(folder: Path) -> list[str]:
    """Hidden files below a folder: drafts that a killed process left behind."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


def _files(whole: Path, run: Path) -> Iterator[str]:
    """Files of one run alone, and those with another content."""
    names = [
        {
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.is_file()
            and not any(path.match(pattern) for pattern in OF_COMMANDS)
            and "pool" not in path.relative_to(folder).parts
        }
        for folder in (whole, run)
    ]
    yield from (f"{name} is missing" for name in sorted(names[0] - names[1]))
    yield from (f"{name} is left over" for name in sorted(names[1] - names[0]))
    for name in sorted(names[0] & names[1]):
        one, other = whole / name, run / name
        if name.endswith(".ckpt"):
            yield from (f"{name} {found}" for found in _unlike(_checkpoint(one), _checkpoint(other)))
        elif name != "metrics.csv" and one.read_bytes() != other.read_bytes():
            yield f"{name} has other bytes"
    if (whole / "config.yaml").read_bytes() != (run / "config.yaml").read_bytes():
        yield "config.yaml has other bytes"


def _checkpoint(path: Path) -> dict[str, Any]:
    """All of a checkpoint but the folders that it names."""
    content: dict[str, Any] = torch.load(path, weights_only=True)
    for state in content["callbacks"].values():
        for name in set(PATHS) & set(state):
            value = state[name]
            state[name] = (
                {Path(p).name: score for p, score in value.items()}
                if isinstance(value, Mapping)
                else value and Path(value).name
            )
    return content


def _curves(run: Path) -> dict[str, Any]:
    """Everything that TensorBoard shows over the steps, by its name."""
    events = EventAccumulator(str(run), {"scalars": 0, "images": 0, "histograms": 0})
    events.Reload()
    tags, found = events.Tags(), dict[str, Any]()
    for tag in tags["scalars"]:
        if not tag.startswith("perf/"):
            found[tag] = [(point.step, point.value) for point in events.Scalars(tag)]
    for tag in tags["images"]:
        found[tag] = [(image.step, image.encoded_image_string) for image in events.Images(tag)]
    for tag in tags["histograms"]:
        found[tag] = [(one.step, tuple(one.histogram_value.bucket)) for one in events.Histograms(tag)]
    return found


def _rows(run: Path) -> list[dict[str, str]]:
    """The rows of a CSV logger, without what has no value and without speeds."""
    if not (path := run / "metrics.csv").exists():
        return []
    with path.open(newline="") as file:
        return [
            {name: value for name, value in row.items() if value and not name.startswith("perf/")}
            for row in csv.DictReader(file)
        ]


def _pool(run: Path) -> dict[str, Tensor]:
    """The samples of a pool by folder and row, in whichever shards they lie."""
    found: dict[str, Tensor] = {}
    for path in run.glob("pool/*/*.safetensors"):
        with safe_open(path, "pt") as shard:
            rows, samples = shard.get_tensor("index").tolist(), shard.get_tensor("samples")
        found |= {f"{path.parent.name}/{row}": one for row, one in zip(rows, samples, strict=True)}
    return found


def _unlike(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """The places where nested lists and mappings are not equal to the bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        if not (same and torch.equal(one.nan_to_num(), other.nan_to_num())):
            yield f"{place}: other numbers"
    elif isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in [*one, *(key for key in other if key not in one)]:
            if key not in one or key not in other:
                yield f"{place}/{key}: only {'before' if key in one else 'after'}"
            else:
                yield from _unlike(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield f"{place}: {len(other)} entries, not {len(one)}"
        else:
            for i, (first, second) in enumerate(zip(one, other, strict=True)):
                yield from _unlike(first, second, f"{place}[{i}]")
    elif type(one) is not type(other) or not (one == other or (one != one and other != other)):
        yield f"{place}: {str(other)[:60]}, not {str(one)[:60]}"
