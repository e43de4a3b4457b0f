"""``python -m lit_align pairs``: images of ``predict``, ranked by rewards, as preference data."""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_align.callbacks.console import show
from lit_align.cli.bank import read_bank
from lit_align.cli.device import device_of
from lit_align.errors import ConfigError, tell
from lit_align.files import write
from lit_align.rewards import RewardBank

METADATA = "metadata.jsonl"

Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = argparse.ArgumentParser(
        prog="python -m lit_align pairs",
        description="Make preference data from the images that predict wrote: for each prompt, a better "
        "and a worse image by a bank of rewards. FolderPairs reads it, for DPO, SPIN and finetuning.",
        allow_abbrev=False,
    )
    made.add_argument("images", type=Path, help=f"folder with images and {METADATA}, as predict writes it")
    made.add_argument("--rewards", help="YAML file with a bank; the rewards that predict wrote if not given")
    made.add_argument(
        "--all", action="store_true", help="all pairs of a prompt, not only the best and the worst"
    )
    made.add_argument("--margin", type=float, default=0.0, help="least difference of the scores of a pair")
    made.add_argument("--out", type=Path, help="the table; pairs.jsonl in the folder if not given")
    made.add_argument(
        "--batch", type=int, default=16, help="images that are scored at once, in whole prompts"
    )
    made.add_argument("--device", help="where the rewards run: cpu, cuda; a GPU if there is one")
    return made


def pairs_command(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: Something that was given cannot work, or there are no pairs.
    """
    options = parser().parse_args(arguments)
    if not options.margin >= 0:
        raise ConfigError(f"--margin {options.margin:g}: equal scores would make pairs; give 0 or more")
    out: Path = options.out or options.images / "pairs.jsonl"
    if not options.images.resolve().is_relative_to(out.parent.resolve()):
        raise ConfigError(
            f"--out {out}: the table names images relative to its folder; give a file in {options.images} or "
            "in a folder above it"
        )
    if out.exists():
        raise ConfigError(f"--out {out} is there already; give another name, or remove it")
    prompts = _by_prompt(options.images)
    if options.rewards:
        device = device_of(options.device, "pairs")
        bank = read_bank(options.rewards).to(device)
        scores = _scored(bank, prompts, options.images, options.batch, device)
    else:
        scores = [[_written(row) for row in rows] for rows in prompts]
    place = options.images.resolve().relative_to(out.parent.resolve())
    made = [
        pair
        for rows, worths in zip(prompts, scores, strict=True)
        for pair in _pairs(rows, worths, options.margin, options.all, place)
    ]
    unscored = sum(math.isnan(worth) for worths in scores for worth in worths)
    if unscored:
        tell(f"{unscored} of {sum(map(len, prompts))} images have no score")
    if not made:
        raise ConfigError(
            f"{options.images}: no prompt has two images whose scores differ by more than "
            f"{options.margin:g}; draw several of each (data.test_images_per_prompt), or lower --margin"
        )
    write(out, "".join(json.dumps(pair) + "\n" for pair in made))
    show(f"pairs        {out} ({len(made)} of {len(prompts)} prompts)")


def _by_prompt(folder: Path) -> list[list[Row]]:
    """The rows of each prompt."""
    try:
        lines = (folder / METADATA).read_text("utf-8").splitlines()
        rows: list[Row] = [json.loads(line) for line in lines if line.strip()]
        found: dict[str, list[Row]] = {}
        for row in rows:
            found.setdefault(row["prompt"], []).append(row | {"file_name": str(row["file_name"])})
    except OSError as error:
        raise ConfigError(
            f"{folder} has no {METADATA} that can be read ({error.strerror}); give the predictions/ folder "
            "of a run: python -m lit_align predict --config CONFIG --ckpt_path last"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / METADATA}: a line has no file_name and prompt ({error})") from error
    return list(found.values())


def _written(row: Row) -> float:
    """The reward that predict wrote."""
    if "reward" not in row:
        raise ConfigError(f"{METADATA} has no reward; give a bank under --rewards")
    return math.nan if row["reward"] is None else float(row["reward"])


@torch.inference_mode()
def _scored(
    bank: RewardBank, prompts: Sequence[list[Row]], folder: Path, batch: int, device: torch.device
) -> list[list[float]]:
    """The scores of the images of each prompt."""
    scores: list[list[float]] = []
    for part in _batches(prompts, batch):
        rows = [row for one in part for row in one]
        images = _alike(folder, [row["file_name"] for row in rows])
        groups = torch.tensor([number for number, one in enumerate(part) for _ in one])
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names if name != "prompt"}
        total: Tensor = bank(
            images.to(device), [row["prompt"] for row in rows], groups.to(device), columns
        ).total
        found = iter(total.tolist())
        scores += [[next(found) for _ in one] for one in part]
    return scores


def _batches(prompts: Sequence[list[Row]], batch: int) -> Iterator[list[list[Row]]]:
    """Whole prompts, together of about so many images."""
    part: list[list[Row]] = []
    for rows in prompts:
        if part and sum(map(len, part)) + len(rows) > batch:
            yield part
            part = []
        part.append(rows)
    yield part


def _alike(folder: Path, names: Sequence[str]) -> Tensor:
    """The images of these names as one tensor.

    Raises:
        ConfigError: They are of several sizes.
    """
    images = [_image(folder / name) for name in names]
    sizes = {f"{i.shape[2]} x {i.shape[1]}": name for name, i in zip(names, images, strict=True)}
    if len(sizes) > 1:
        told = ", ".join(f"{name} has {size} pixels" for size, name in sizes.items())
        raise ConfigError(f"images of several sizes are not scored together ({told}); make them of one size")
    return torch.stack(images)


def _image(path: Path) -> Tensor:
    """``(3, H, W)`` in [0, 1]."""
    try:
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}); draw the images again") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _pairs(
    rows: Sequence[Row], worths: Sequence[float], margin: float, every: bool, place: Path
) -> Iterator[Row]:
    """The pairs of a prompt, the better image first."""
    ranked = sorted(
        (i for i in range(len(rows)) if not math.isnan(worths[i])), key=lambda i: worths[i], reverse=True
    )
    chosen = combinations(ranked, 2) if every else [(ranked[0], ranked[-1])] if len(ranked) > 1 else []
    for better, worse in chosen:
        if worths[better] - worths[worse] > margin:
            yield {
                "prompt": rows[better]["prompt"],
                "image_0": str(place / rows[better]["file_name"]),
                "image_1": str(place / rows[worse]["file_name"]),
                "label_0": 1,
                "score_0": worths[better],
                "score_1": worths[worse],
            }
