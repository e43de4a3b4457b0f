"""A reward that computes otherwise under the same name is another one."""

import importlib
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from lit_align.callbacks import BatchCheckpoint
from lit_align.identity import text_hash, weights_hash
from lit_align.methods import DDPOModule
from lit_align.rewards import Brightness, CLIPScore, FunctionReward, Reward, RewardBank
from lit_align.rewards.contents import contents
from tests.methods.build import fit, make, prompts

MINE = "def mine(images, prompts):\n    return {} * images.mean((1, 2, 3))\n"


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a reward of a user."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rewards_of_a_user", raising=False)
    file = tmp_path / "rewards_of_a_user.py"
    file.write_text(MINE.format(1))
    return file


def read() -> Reward:
    """The reward, as a process reads it that starts now."""
    sys.modules.pop("rewards_of_a_user", None)
    importlib.invalidate_caches()
    return FunctionReward(importlib.import_module("rewards_of_a_user").mine)


def test_weights_and_programs_are_told_apart(written):
    score, other = CLIPScore("shapes"), deepcopy(CLIPScore("shapes"))
    assert contents(score) == contents(other)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    assert contents(score) != contents(other)
    before = contents(read())
    assert before == text_hash([weights_hash([]), MINE.format(1).rstrip()])  # in every version of Python
    written.write_text("# a comment\n" + MINE.format(1))
    assert before == contents(read())
    written.write_text(MINE.format(100))
    assert contents(read()) != before
    assert contents(FunctionReward(len))  # no file has it


def test_a_run_that_goes_on_with_an_edited_reward_has_a_new_baseline(tiny, tmp_path, written):
    def go_on(ckpt_path: Path | None = None) -> DDPOModule:
        bank = RewardBank({"mine": read(), "brightness": Brightness()}, {"mine": 1.0})
        module = make(DDPOModule, tiny, num_steps=2, rewards=bank)
        sizes = {"limit_val_batches": None, "max_epochs": 2 if ckpt_path else 1}
        data = prompts(2, 2, validation_prompts=2)
        fit(module, tmp_path, 1, BatchCheckpoint(), data=data, ckpt_path=ckpt_path, **sizes)
        return module

    first = go_on()
    written.write_text(MINE.format(100))
    with pytest.warns(UserWarning, match="another reward_contents mine [0-9a-f]{16} -> mine [0-9a-f]{16}: "):
        second = go_on(tmp_path / "checkpoints" / "last.ckpt")
    assert torch.allclose(second.baseline["reward"], 100 * first.baseline["reward"])
    assert torch.equal(second.baseline["reward/brightness"], first.baseline["reward/brightness"])
