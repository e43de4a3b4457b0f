"""Runs that are killed at random moments leave what a run leaves that nobody killed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from safetensors.torch import load_file, save_file

from lit_align.folder import RunFolder
from tests import chaos
from tests.reliability.commands import METHODS, ROOT
from tests.reliability.compare import differences, leftovers


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> chaos.Cell:
    """Its seed, and that of two processes below, meets one run with all kinds of kills."""
    return chaos.Cell("spin", 1, tmp_path_factory.mktemp("chaos"), seed=31)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one rollout batch."""
    cell = chaos.Cell("ddpo", 1, tmp_path_factory.mktemp("ended"))
    cell.arguments = [*cell.arguments, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    return cell.whole().folder


def faults(results: list[chaos.Result]) -> list[str]:
    return [fault for result in results for fault in result.faults]


@pytest.mark.slow
def test_kills_change_nothing(cell, tmp_path, capsys):
    """Five in all: three of a run in one process, two of one in two."""
    two = chaos.Cell("ddpo", 2, tmp_path, seed=54)
    for one, kills in ((cell, 3), (two, 2)):
        results = chaos.run(one, kills, tmp_path)
        assert faults(results) == []
        assert sum(len(result.kills) for result in results) == kills
        assert chaos.run(one, kills, tmp_path) == results  # stored
    assert "| all |" in chaos.report([results])


@pytest.mark.slow
def test_a_hundred_kills_of_all_methods_change_nothing(tmp_path):
    assert chaos.main(["--kills", "100", "--out", str(tmp_path)]) == 0


def add_to_weights(run: Path) -> None:
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    next(iter(content["state_dict"].values())).view(-1)[0] += 1e-7
    torch.save(content, path)


def forget_a_moment(run: Path) -> None:
    path = run / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    content["optimizer_states"][0]["state"][0]["step"] += 1
    torch.save(content, path)


def negate_an_adapter(run: Path) -> None:
    path = run / "adapter" / "pytorch_lora_weights.safetensors"
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path)


def cut_the_curves(run: Path) -> None:
    (path,) = run.glob("events.out.tfevents.*")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def repeat_a_row(run: Path) -> None:
    path = run / "metrics.csv"
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (add_to_weights, "last.ckpt /state_dict"),
        (forget_a_moment, "best.ckpt /optimizer_states"),
        (negate_an_adapter, "safetensors has other bytes"),
        (cut_the_curves, "TensorBoard"),
        (repeat_a_row, "metrics.csv"),
        (lambda run: (run / "validation.csv").unlink(), "validation.csv is missing"),
        (lambda run: (run / "images" / ".x.png.draft").touch(), ""),
    ],
)
def test_what_is_not_the_same_is_found(change: Callable[[Path], None], found: str, ended, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(ended, run)
    assert not differences(ended, run)
    change(run)
    if found:
        assert found in "; ".join(differences(ended, run))
    else:
        assert leftovers(run) == ["images/.x.png.draft"]


def test_what_a_killed_process_was_writing_is_deleted(tmp_path):
    drafts = [
        ".metrics.csv.12.draft",
        ".validation.json.12.draft",
        "checkpoints/.last.ckpt.12.draft",
        "pool/.tmpAb",
    ]
    others = [".test.json.12.draft", "checkpoints/last.ckpt", "metrics.csv"]
    for name in drafts + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder = RunFolder(tmp_path)
    folder.setup(Trainer(accelerator="cpu", logger=False), None, "fit")
    folder.release()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(others)


def test_every_method_can_be_killed():
    assert set(METHODS) == {path.stem for path in (ROOT / "configs").glob("*.yaml")}


def test_a_run_that_fails_is_not_taken_for_one_that_was_killed(tmp_path):
    wrong = chaos.Cell("ddpo", 1, tmp_path)
    wrong.arguments = [*wrong.arguments, "--model.sampling.guidance=no"]
    with pytest.raises(RuntimeError, match="does not run"):
        wrong.whole()
