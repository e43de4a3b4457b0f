"""The benchmark of the guard: what it runs is there, and its verdict is that of the curves."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.guard import EXPLOITED, HEALTHY, SEEDS, cells, judged, report, right, run_cell
from tests.benchmarks.harness.plan import ROOT
from tests.benchmarks.harness.record import result_path
from tests.benchmarks.harness.run import CellFailed, Ended
from tests.benchmarks.test_results import in_process

TRUTH = [(0, 0.60), (8, 0.62), (16, 0.61), (24, 0.57)]


def curves(acts: list[float], truth: list[tuple[int, float]] = TRUTH) -> dict[str, list[tuple[int, float]]]:
    at = [images for images, _ in truth]
    found = {"val/truth": truth, "guard/acts": list(zip(at, acts, strict=True))}
    evidence = [(images, 0.5 + act) for images, act in found["guard/acts"]]
    return found | {"guard/evidence/reward/truth": evidence}


def test_every_configuration_of_a_cell_is_there():
    wanted = cells()
    assert len(wanted) == len(SEEDS) * (len(EXPLOITED) + len(HEALTHY))
    for cell in wanted:
        cell.fingerprint()  # reads the files
    assert [one.name for one in cells(["clip"])] == [f"clip_seed{seed}" for seed in SEEDS]
    assert "--trainer.max_epochs=1" in cells(["clip"], ["--trainer.max_epochs=1"])[0].arguments


def test_the_verdict_is_that_of_the_curves():
    early, late, never = (judged(curves(acts)) for acts in ([0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]))
    assert (early["acted"], early["late"], early["because"]) == (16, None, ["reward/truth"])
    assert early["fall"] == pytest.approx(0.01 / 0.62)
    assert (late["acted"], late["late"]) == (24, 24)
    assert (never["acted"], never["late"]) == (None, 24)
    exploited, healthy = ({"config": name, "seed": 1} for name in ("clip", "ddpo"))
    assert [right(exploited | one) for one in (early, late, never)] == [True, False, False]
    assert right(exploited | never | {"late": None})  # the truth did not fall
    assert [right(healthy | one) for one in (early, late, never)] == [False, False, True]
    told = report([exploited | early, healthy | never])
    assert "16 images, reward/truth | 0.620 -> 0.610 (1.6% below) | yes" in told
    assert told.endswith("2 of 2 runs as they must be.\n")
    assert "Not run: nft_seed1." in report([exploited | early], ["nft_seed1"])


def test_a_cell_that_fails_says_why_and_is_begun_anew(tmp_path: Path):
    def launch(arguments: list[str], log: Path, keep: int) -> Ended:
        log.write_text("no such device\n")
        assert arguments[0] == "fit"
        return Ended(2, 0.0)

    cell = cells(["redness"])[0]
    with pytest.raises(CellFailed, match=r"status 2(.|\n)*no such device"):
        run_cell(cell, tmp_path / "out", tmp_path / "work", launch)
    assert not result_path(cell, tmp_path / "out").exists()


@pytest.mark.slow
def test_a_small_cell_is_run_once(tmp_path: Path):
    """With the real model, overlay and guard."""
    calls = []

    def launch(arguments: list[str], log: Path, keep: int) -> Ended:
        calls.append(arguments)
        log.write_text("a line\nguard: another\n")  # what a process of its own would have printed
        here = [a.replace("--config=configs", f"--config={ROOT}/configs") for a in arguments]
        return in_process(here, log, keep)

    small = ["max_epochs=1", "limit_train_batches=2", "accelerator=cpu", "val_check_interval=1"]
    options = [f"--trainer.{one}" for one in small]
    sizes = {"images_per_prompt": 2, "prompts_per_batch": 2, "validation_prompts": 8}
    options += [f"--data.{name}={size}" for name, size in sizes.items()]
    cell = cells(["redness"], options)[0]
    for _ in range(2):
        run_cell(cell, tmp_path / "out", tmp_path / "work", launch)
    assert len(calls) == 1
    result = json.loads(result_path(cell, tmp_path / "out").read_text())
    assert [images for images, _ in result["curves"]["val/truth"]] == [0, 4, 8]
    assert result["acted"] is None
    assert result["told"] == ["guard: another"]
    assert "guard/evidence/saturation" in result["curves"]
