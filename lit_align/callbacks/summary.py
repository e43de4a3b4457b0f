"""The summary of a run: where it trains and writes, and at its end how the held-out metrics changed."""

import csv
import io
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities import rank_zero_warn
from rich.table import Table
from torch import Tensor

from lit_align.callbacks.console import show
from lit_align.callbacks.files import finite, writes
from lit_align.callbacks.run_config import RunConfig
from lit_align.comparison import DISTANCES, Comparison, compare
from lit_align.errors import tell
from lit_align.files import unused, write, write_new, writing
from lit_align.folder import run_folder
from lit_align.methods import AlignmentModule
from lit_align.shapes import WEIGHTS_HASH


class RunSummary(Callback):
    """Says at the start what is trained and where, and at the end how the held-out metrics changed.

    ``fit`` leaves ``validation.json`` and ``.csv``, the newest, with the number of images after which it was
    measured; when a run goes on, the older ones are kept with that number in the name. Every ``test`` and
    ``validate`` leaves files of its own.
    """

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if writes(trainer):
            _put_aside(run_folder(trainer) / "validation.json")
        trained = [p.numel() for p in pl_module.parameters() if p.requires_grad]
        total = sum(p.numel() for p in pl_module.backbone.parameters())
        self._start(trainer, pl_module, f"trains {sum(trained):,} of {total:,} weights")

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "validate":
            self._start(trainer, pl_module, "is validated")

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._start(trainer, pl_module, "is tested")

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._start(trainer, pl_module, "draws")

    def _start(self, trainer: Trainer, module: AlignmentModule, what: str) -> None:
        if not trainer.is_global_zero:
            return
        device = (
            module.device.type if trainer.world_size == 1 else f"{trainer.world_size} x {module.device.type}"
        )
        place = "" if trainer.fast_dev_run else f", writes to {run_folder(trainer)}"  # type: ignore[attr-defined]
        show(f"{type(module).__name__} {what} on {device}, {trainer.precision}{place}")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not writes(trainer) or trainer.sanity_checking:
            return
        if trainer.state.fn == "validate":
            _report(run_folder(trainer) / "validate.json", pl_module, "validate")
        elif pl_module.images:  # of an interrupted run, too, the newest comparison is there
            _write(run_folder(trainer) / "validation.json", pl_module, "validation", complete=False)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Say why a fit ends before its epochs, which Lightning does not."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer) and (callback.time_remaining() or 1) < 0:
                tell(f"ends after {pl_module.images} images, since its time limit is reached (max_time)")
            if isinstance(callback, EarlyStopping) and callback.wait_count >= callback.patience:
                tell(
                    f"ends after {pl_module.images} images, since {callback.monitor} has not improved in "
                    f"{callback.wait_count} validations or epochs (EarlyStopping)"
                )

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not writes(trainer):
            return
        folder = run_folder(trainer)
        if pl_module.latest:
            _report(folder / "validation.json", pl_module, "validation", complete=True)
        _warn_if_not_measured(pl_module, trainer.enable_validation, folder)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        if writes(trainer) and pl_module.tested:
            split = tested_split(trainer)
            _report(run_folder(trainer) / f"{split}.json", pl_module, split)


def _warn_if_not_measured(module: AlignmentModule, validates: bool, folder: Path) -> None:
    """Say that a fit ended between two validations, so that no metrics are of its last weights."""
    measured = module.measured_at["images"] if module.latest else None
    if measured == module.images or (measured is None and not validates):
        return
    newest = "there was no validation" if measured is None else f"the newest validation was after {measured}"
    rank_zero_warn(
        f"the weights at the end, after {module.images} images, were not measured: {newest}; to measure them "
        f"run validate or test with the same configuration and --ckpt_path {folder}"
    )


def tested_split(trainer: Trainer) -> str:
    """Name of the files of a test: ``test``, or ``test_train`` for prompts that were used in training."""
    seen = getattr(trainer.datamodule, "test_split", "test") == "train"  # type: ignore[attr-defined]
    return "test_train" if seen else "test"


def _report(path: Path, module: AlignmentModule, split: str, **more: bool) -> None:
    """Write what was measured, and show it."""
    path = _write(path, module, split, **more)
    if found := _compared(module, split):
        _show_change(found, split)
    else:
        _show_means(_means(module, split), split)
    _show_places(path)


def _measured(module: AlignmentModule, split: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What was measured of the pretrained model and of the policy, and the prompt of each image."""
    if split.startswith("test"):
        base = {name[5:]: values for name, values in module.tested.items() if name.startswith("base/")}
        return base, module.tested, module.tested_groups
    return module.baseline, module.standing, module.prompt_groups


def _compared(module: AlignmentModule, split: str) -> dict[str, Comparison]:
    return compared(*_measured(module, split))


def compared(
    baseline: Mapping[str, Tensor], latest: Mapping[str, Tensor], groups: Tensor
) -> dict[str, Comparison]:
    """Every metric of the pretrained model and the policy; empty where only one of them was measured.

    Args:
        baseline: Of the pretrained model, ``(N,)`` each.
        latest: Of the policy.
        groups: ``(N,)``, the prompt of each image.
    """
    if baseline is latest:  # a validation of an untrained model is its own baseline
        return {}
    before = {name: values for name, values in baseline.items() if len(values) == len(groups)}
    if before and "unscored" in {*baseline, *latest}:  # which is not there where it is 0
        before, latest = ({**one, "unscored": one.get("unscored", 0 * groups)} for one in (before, latest))
    return {name: compare(old, latest[name], groups) for name, old in before.items() if name in latest}


def _write(path: Path, module: AlignmentModule, split: str, **more: bool) -> Path:
    """The comparison as JSON, and beside it the metrics of each image as CSV; where the JSON is.

    That of a fit replaces the one before; all others get a name of their own.
    """
    if found := _compared(module, split):
        metrics = {name: finite(asdict(comparison)) for name, comparison in found.items()}
    else:
        metrics = {name: _mean(comparison) for name, comparison in _means(module, split).items()}
    tested = split.startswith("test")
    result = {
        "split": split,
        "run": module.identity(),
        "measured": module.measurement(split),
        "shapes_weights": WEIGHTS_HASH,
        **(module.position if tested else module.measured_at),
        "metrics": metrics | (module.set_metrics if tested else {}),
    }
    # A fit that was interrupted has several files, and must leave what one leaves that was not.
    if split != "validation":
        result["config"] = _config(module.trainer)
    _, policy, groups = _measured(module, split)
    rows = _rows({"prompt": groups} | policy)
    if split == "validation":
        write(path.with_suffix(".csv"), rows)
    else:  # the table takes the name, and the JSON says that all is there
        path = write_new(path.with_suffix(".csv"), rows, ".json").with_suffix(".json")
    write(path, json.dumps(result | more, indent=2))
    return path


def _config(trainer: Trainer) -> str | None:
    """The file beside a result with the configuration of its command; None of a command in Python."""
    found = (one.file for one in trainer.callbacks if isinstance(one, RunConfig))  # type: ignore[attr-defined]
    return next(found, None)


def _means(module: AlignmentModule, split: str) -> dict[str, Comparison]:
    """The mean of each metric and its error, as the comparison with 0 has them."""
    _, now, groups = _measured(module, split)
    return {name: compare(torch.zeros_like(values), values, groups) for name, values in now.items()}


def _mean(found: Comparison) -> dict[str, float | None]:
    mean = finite({"mean": found.after, "standard_error": found.standard_error})
    return mean | {"num_images": found.num_pairs}


def _put_aside(path: Path) -> None:
    """Keep the files of an earlier end of this run under names with its number of images."""
    if not (earlier := read_report(path)).get("complete"):
        return
    with writing(path):
        for file in (path.with_suffix(".csv"), path):  # the JSON last: it says what is to be done
            if file.exists():
                file.replace(unused(file.with_stem(f"{file.stem}_{earlier['images']:08d}")))


def read_report(path: Path) -> dict[str, Any]:
    """A ``validation.json``; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _rows(columns: dict[str, Tensor]) -> str:
    """A line for each image, not rounded, in an order that two runs with the same data and seed share."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows(zip(*(c.tolist() for c in columns.values()), strict=True))
    return text.getvalue()


def _show_change(found: dict[str, Comparison], split: str) -> None:
    table = Table(title=f"{split}: {_count(found)} images, before and after on the same prompts and noise")
    for header in ("", "before", "after", "change ± standard error", "win rate"):
        table.add_column(header, justify="right" if header else "left", no_wrap=True)
    for name, c in found.items():
        if not _is_shown(name, found):
            continue
        if name in DISTANCES:  # 0 before
            table.add_row(name, "", _number(c.after), "", "")
            continue
        known = c.win_rate_error and math.isfinite(c.win_rate_error)  # 0 where all images agree
        error = f" ± {c.win_rate_error:.0%}" if known else ""
        wins = f"{c.win_rate:.0%}{error}" if name == "truth" or name.startswith("reward") else ""
        change = _number(c.difference, c.standard_error, "+")
        table.add_row(name, _number(c.before), _number(c.after), change, wins)
    show(table)
    show("win rate: share of the images that score higher after than before; a tie counts half")


def _show_means(found: dict[str, Comparison], split: str) -> None:
    table = Table("", "mean ± standard error", title=f"{split}: {_count(found)} images")
    for name, c in found.items():
        if _is_shown(name, found):
            table.add_row(name, _number(c.after, c.standard_error))
    show(table)


def _count(found: dict[str, Comparison]) -> int:
    return max(c.num_pairs for c in found.values())


def _is_shown(name: str, found: dict[str, Comparison]) -> bool:
    """Whether a metric gets a row: it has a value, and no other row has the same."""
    nothing = not found[name].num_pairs or (
        name == "unscored" and found[name].before == found[name].after == 0
    )
    return not nothing and not (name == "reward/truth" and "truth" in found)


def _number(value: float, error: float = math.nan, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")


def _show_places(result: Path) -> None:
    folder = result.parent
    for name in ("adapter", "checkpoints", "images", result.name):
        if (folder / name).exists():
            show(f"{name.partition('.')[0]:<12} {folder / name}")
    if any(folder.glob("events.out.tfevents.*")):
        show(f"{'curves':<12} tensorboard --logdir {shlex.quote(str(folder.parent))}")
    elif (table := folder / "metrics.csv").exists():
        show(f"{'curves':<12} {table}")
