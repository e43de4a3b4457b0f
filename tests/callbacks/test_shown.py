"""What a person sees: grids with whole captions, lines of progress, tables without riddles."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import ImageFont
from torch import Tensor

from lit_align.callbacks import ImageGrids, RewardHistograms, image_grid
from lit_align.callbacks.grid import FONT_SIZE, GAP, MARGIN, shrink, uint8, wrap
from lit_align.callbacks.images import Shown
from lit_align.callbacks.progress import ProgressLines
from lit_align.callbacks.summary import RunSummary, compared

LONG = "two small yellow stars above a large cyan triangle, left of three medium pink squares on a black star"


@pytest.mark.parametrize("text", [LONG, "x" * 200, "one\ntwo lines", "", "ein " + "Wort" * 60 + " danach"])
def test_a_caption_is_wrapped_and_never_cut(text):
    lines, font = wrap(text, 160), ImageFont.load_default(FONT_SIZE)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(font.getlength(line) <= 160 for line in lines)


def test_a_grid_has_the_images_beside_each_other_and_room_for_the_longest_caption():
    red, blue = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    red[0], blue[2] = 255, 255
    grid = image_grid([[red, blue]] * 3, ["short", LONG, "short"], columns=2, side=80)
    assert grid.width == 2 * (2 * 80 + GAP + 2 * MARGIN)
    assert grid.getpixel((MARGIN + 40, MARGIN + 40)) == (255, 0, 0)
    assert grid.getpixel((MARGIN + GAP + 120, MARGIN + 40)) == (0, 0, 255)
    lines = len(wrap(LONG, 160 + GAP))
    bottom = MARGIN + 80 + 15 * lines
    below = grid.crop((160 + 2 * MARGIN + GAP, bottom - 15, grid.width, bottom))
    assert below.convert("L").getextrema()[0] < 128  # the last line is there


def test_the_image_before_stands_left_of_the_one_after_with_the_scores_of_both(monkeypatch):
    captions: list[str] = []

    def told(cells: Any, texts: list[str], **options: Any) -> Any:
        captions.extend(texts)
        return image_grid(cells, texts, **options)

    monkeypatch.setattr("lit_align.callbacks.images.image_grid", told)
    red, blue = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    red[0], blue[2] = 255, 255
    before, now = (
        Shown([0], [""], ["a star"], [image], {"reward": [score]})
        for image, score in ((red, 1.0), (blue, 2.0))
    )
    grid = ImageGrids(side=80)._grid(now, before)
    assert grid.getpixel((MARGIN + 40, MARGIN + 40)) == (255, 0, 0)
    assert grid.getpixel((MARGIN + GAP + 120, MARGIN + 40)) == (0, 0, 255)
    assert captions == ["a star\nreward 1.00 -> 2.00"]


def test_images_of_another_shape_keep_it():
    grid = image_grid([[torch.zeros(3, 16, 32, dtype=torch.uint8)]], ["wide"], columns=8, side=64)
    assert grid.width == 64 + 2 * MARGIN
    assert shrink(torch.zeros(3, 256, 128, dtype=torch.uint8), 64).shape == (3, 64, 32)


def test_images_that_are_not_finite_can_be_shown():
    images = torch.tensor([math.nan, math.inf, 2.0, -1.0]).reshape(4, 1, 1, 1).expand(4, 3, 2, 2)
    assert uint8(images)[:, 0, 0, 0].tolist() == [0, 255, 255, 0]


class Stage(SimpleNamespace):
    """As much of a Trainer as the lines and the table ask for."""


def trainer(**values: Any) -> Any:
    given = {
        "is_global_zero": True,
        "progress_bar_callback": None,
        "fast_dev_run": False,
        "sanity_checking": False,
        "max_epochs": 3,
        "current_epoch": 1,
        "num_training_batches": 4,
        "check_val_every_n_epoch": 1,
        "val_check_batch": 4,
        "callback_metrics": {"train/reward": torch.tensor(1.5), "perf/images_per_second": 2.0},
        "state": SimpleNamespace(fn="fit"),
        "callbacks": [],
        "loggers": [],
        "enable_validation": True,
    }
    return Stage(**(given | values))


def test_a_line_says_where_the_run_is_and_how_long_it_takes(capsys, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("lit_align.callbacks.progress.time.monotonic", lambda: next(clock))
    lines, now, module = ProgressLines(), trainer(), SimpleNamespace(images=0, latest={})
    lines.on_validation_start(now, module)
    lines.on_validation_end(now, module)
    lines.on_train_batch_start(now, module, None, 1)
    lines.on_train_batch_end(now, module, None, None, 1)  # type: ignore[arg-type]
    # two batches of this epoch, four of the last one, and two validations, of 10 seconds each
    assert capsys.readouterr().out.splitlines()[1] == (
        "epoch 2/3  batch 2/4  reward 1.5000  2.0 images/s  0:01:20 left"
    )
    often = trainer(val_check_batch=2)  # four validations to come: one after this batch, and each second one
    lines.on_train_batch_start(often, module, None, 1)
    lines.on_train_batch_end(often, module, None, None, 1)  # type: ignore[arg-type]
    assert capsys.readouterr().out.endswith("0:01:40 left\n")
    pairs = trainer(callback_metrics={"train/loss": torch.tensor(0.25)}, max_epochs=-1)
    lines.on_train_batch_end(pairs, module, None, None, 0)  # type: ignore[arg-type]
    assert capsys.readouterr().out == "epoch 2/?  batch 1/4  loss 0.2500\n"
    with_bar = trainer(progress_bar_callback=object())
    lines.on_train_batch_end(with_bar, module, None, None, 0)  # type: ignore[arg-type]
    assert not capsys.readouterr().out


def measured(**changes: Tensor) -> dict[str, Tensor]:
    values = {"reward": [0.0, 1.0, 2.0, 3.0], "reward/truth": [0.5] * 4, "reward/clip": [0.1] * 4}
    values |= {
        "reward/other": [math.nan] * 4,
        "unscored": [0.0] * 4,
        "diversity": [0.2] * 4,
        "truth": [0.5] * 4,
    }
    return {name: torch.tensor(one) for name, one in values.items()} | {"kl": torch.zeros(4)} | changes


def test_the_table_has_a_row_for_each_thing_that_was_measured(tmp_path, capsys):
    from lit_align.callbacks import RunFolder

    now = trainer(callbacks=[RunFolder(tmp_path)], state=SimpleNamespace(fn="fit"))
    latest = measured(reward=torch.tensor([2.0, 3.0, 2.0, 3.0]), kl=torch.ones(4))
    module = SimpleNamespace(
        images=8,
        position={"images": 8, "reward_queries": 8},
        measured_at={"images": 8, "reward_queries": 8},
        identity=dict,
        measurement=lambda split: {},
        trainer=now,
        prompt_groups=torch.tensor([0, 0, 1, 1]),
        baseline=measured(),
        latest=latest,
        standing=latest,
    )
    RunSummary().on_fit_end(now, module)
    rows = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert list(rows) == ["reward", "reward/clip", "diversity", "truth", "kl"]
    # The images of a prompt are one witness.
    cells = [cell.strip() for cell in rows["reward"].split("│")[2:6]]
    assert cells == ["1.5000", "2.5000", "+1.0000 ± 1.0000", "75% ± 25%"]
    assert "%" not in rows["kl"]
    assert "%" not in rows["diversity"]
    assert "nan" not in "".join(rows.values())
    # Nothing that was measured is overwritten, not even where its table was deleted.
    now.state.fn, now.datamodule, module.tested = "test", None, latest
    module.tested_groups, module.set_metrics = module.prompt_groups, {}
    (tmp_path / "test.json").write_text("of an earlier test")
    RunSummary().on_test_end(now, module)
    assert (tmp_path / "test.json").read_text() == "of an earlier test"
    assert (tmp_path / "test-2.json").exists()
    assert (tmp_path / "test-2.csv").exists()


@pytest.mark.parametrize("side", ["before", "after"])
def test_images_that_have_no_score_on_one_side_only_have_a_row(side):
    some, none = measured(unscored=torch.tensor([0.0, 1.0, 0.0, 0.0])), measured()
    del none["unscored"]  # it is measured where it is not 0
    before, after = (some, none) if side == "before" else (none, some)
    found = compared(before, after, torch.tensor([0, 0, 1, 1]))["unscored"]
    assert (found.before, found.after) == ((0.25, 0.0) if side == "before" else (0.0, 0.25))
    assert compared({}, some, torch.tensor([0, 0, 1, 1])) == {}


def test_scores_beyond_the_bins_of_tensorboard_are_left_out(tmp_path):
    """A reward that marks a failure by the least number ended the run: an empty histogram."""
    run = Trainer(accelerator="cpu", logger=TensorBoardLogger(tmp_path), callbacks=[])
    scores = torch.tensor([torch.finfo(torch.float32).min, 1.0, torch.nan])
    for values in (scores, scores[:1]):
        RewardHistograms()._show(run, "val", {"reward": values}, 0)
