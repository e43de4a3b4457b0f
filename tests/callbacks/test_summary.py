"""What a run says of its weights at the end: of which moment its metrics are."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_align.callbacks import BatchCheckpoint, RunFolder
from lit_align.callbacks.summary import RunSummary
from lit_align.comparison import compare
from lit_align.methods import DDPOModule
from tests.methods.build import Recorder, fit, make, prompts, trainer

VALIDATED = {"limit_val_batches": 1.0}


def run(tiny: Path, folder: Path, **options: Any) -> tuple[DDPOModule, list[str]]:
    """Train for three rollout batches of four images; returns the module, and what was said at the end."""
    module, data = make(DDPOModule, tiny, num_steps=2, lr=1e-2, seed=0), prompts(2, 2)
    callbacks = [RunFolder(folder), RunSummary(), BatchCheckpoint()]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(module, folder, 3, *callbacks, data=data, **VALIDATED | options)
    return module, [str(one.message) for one in told if "were not measured" in str(one.message)]


def report(folder: Path, name: str = "validation") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def test_metrics_of_earlier_weights_say_so_after_a_resume_too(tiny, tmp_path):
    module, told = run(tiny, tmp_path, val_check_interval=2)
    found = report(tmp_path)
    assert (module.images, found["images"], found["reward_queries"], found["complete"]) == (12, 8, 8, True)
    (said,) = told
    assert "after 12 images, were not measured: the newest validation was after 8" in said
    assert f"run validate or test with the same configuration and --ckpt_path {tmp_path}" in said
    (tmp_path / "validation.json").unlink()  # killed before its last files
    last = tmp_path / "checkpoints" / "last.ckpt"
    _, again = run(tiny, tmp_path, val_check_interval=2, ckpt_path=last)
    assert (report(tmp_path), again) == (found, told)
    callbacks = [RunFolder(tmp_path), RunSummary(), Recorder()]  # the remedy
    measured = make(DDPOModule, tiny, num_steps=2, lr=1e-2, seed=0)
    trainer(tmp_path, 1, *callbacks, **VALIDATED).validate(measured, prompts(2, 2), last, weights_only=True)
    now = report(tmp_path, "validate")
    assert now["images"] == 12
    assert now["metrics"]["reward"]["before"] == found["metrics"]["reward"]["before"]
    assert now["metrics"]["reward"]["after"] != found["metrics"]["reward"]["after"]


def test_metrics_of_the_pretrained_model_are_not_those_of_the_end(tiny, tmp_path):
    module, told = run(tiny, tmp_path, check_val_every_n_epoch=2)
    found = report(tmp_path)
    assert (found["images"], found["reward_queries"]) == (0, 0)
    rewards = module.latest["reward"]
    own, by_prompt = found["metrics"]["reward"], compare(0 * rewards, rewards, module.prompt_groups)
    assert own["mean"] == pytest.approx(by_prompt.after)
    assert own["standard_error"] == pytest.approx(by_prompt.standard_error)
    assert "the newest validation was after 0;" in told[0]
    last = tmp_path / "checkpoints" / "last.ckpt"
    run(tiny, tmp_path, check_val_every_n_epoch=2, ckpt_path=last)
    assert report(tmp_path) == found
    content = torch.load(last, weights_only=True)
    del content["progress"]["measured_at"]  # of an older version: nobody knows what it was measured of
    torch.save(content, last)
    (tmp_path / "validation.json").unlink()
    _, told = run(tiny, tmp_path, check_val_every_n_epoch=2, ckpt_path=last)
    assert "were not measured: there was no validation;" in told[0]
    assert not (tmp_path / "validation.json").exists()


@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 0}])
def test_nothing_is_said_of_a_run_that_ends_with_a_validation_or_has_none(tiny, tmp_path, options):
    module, told = run(tiny, tmp_path, **options)
    assert not told
    if not options:
        assert report(tmp_path)["images"] == module.images == 12
