"""What people write who build on the package from Python: it is right, or refused where they look."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.advantages import PerPromptAdvantages
from lit_align.callbacks import BatchCheckpoint
from lit_align.errors import ConfigError
from lit_align.methods import DDPOModule, MSDDAModule, NFTModule, SPINModule
from lit_align.methods.checkpoints import readable
from lit_align.methods.tasks import Task, make_tasks
from tests.methods.build import assert_same, bank, fit, make, prompts, randomise, trained


def test_a_checkpoint_with_numbers_of_numpy_is_read_again(tiny: Path, tmp_path: Path) -> None:
    """Such as a rate of a list of rates: no run could go on from what was written."""

    def module() -> DDPOModule:
        return make(DDPOModule, tiny, lr=np.logspace(-4, -2, 3)[1], num_steps=np.int64(2))

    every = ModelCheckpoint(tmp_path, save_last=True)
    fit(module(), tmp_path, 1, BatchCheckpoint(), every, data=prompts(2, 2, seed=np.int64(3)))
    again = module()
    fit(again, tmp_path, data=prompts(2, 2, seed=3), ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    assert again.images == 8


class Keeps(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"best": [np.ones(2)]}


def test_a_checkpoint_that_could_not_be_read_again_is_not_written(tiny: Path, tmp_path: Path) -> None:
    module = make(DDPOModule, tiny, num_steps=2)
    told = r"checkpoint\.callbacks\.Keeps\.best is a numpy\.ndarray, .*; keep tensors"
    with pytest.raises(ConfigError, match=told):
        fit(module, tmp_path, 1, BatchCheckpoint(), Keeps(), data=prompts(2, 2))
    kept = [None, torch.Size([2]), torch.ones(1, requires_grad=True)]
    state = readable({"a": (np.float32(0.5), np.str_("b")), np.int64(1): kept}, "")
    assert state == {"a": (0.5, "b"), 1: kept}
    assert [type(one) for one in (*state["a"], *state)] == [float, str, str, int]


def test_a_hook_that_leaves_out_that_of_its_base_is_refused() -> None:
    """Gradients were not clipped, nothing was measured, or a checkpoint could not be read, without a word."""
    told = r"Own\.on_before_optimizer_step replaces .* begin it with super\(\)\.on_before_optimizer_s"
    with pytest.raises(ConfigError, match=told):

        class Own(DDPOModule):
            def on_before_optimizer_step(self, optimizer: Any) -> None:
                self.steps = 1

    class Mixed:
        def setup(self, stage: str) -> None:
            self.stage = stage

    with pytest.raises(ConfigError, match=r"Mixed\.setup replaces .* super\(\)\.setup\(stage\)"):
        type("Both", (Mixed, NFTModule), {})

    class Right(DDPOModule):
        def setup(self, stage: str) -> None:
            DDPOModule.setup(self, stage)

        @torch.no_grad()
        def on_test_epoch_end(self) -> None:
            super().on_test_epoch_end()

        def on_fit_start(self) -> None:
            self.began = True


def test_one_history_is_not_that_of_two_tasks_or_modules(tiny: Path) -> None:
    shared = PerPromptAdvantages()
    tasks = {name: Task(bank(), shared) for name in "ab"}
    made = [*make_tasks(None, None, tasks).values(), *make_tasks(None, None, tasks).values()]
    own = make(DDPOModule, tiny, advantages=shared).tasks[""].advantages
    assert len({id(one) for one in (shared, own, *(task.advantages for task in made))}) == 6


@pytest.mark.parametrize("method", [NFTModule, SPINModule, MSDDAModule])
def test_a_module_that_is_built_on_the_backbone_of_another(method: Callable[..., Any], tiny: Path) -> None:
    """It keeps its weights, as the page on configurations says: the sets of the other were in the way."""
    before = make(method, tiny)
    weights = [value.clone() for value in randomise(before)]
    sets = before.backbone.weight_sets
    parts = {name: getattr(before, name) for name in ("backbone", "rewards")}
    own: dict[str, Any] = {"advantages": PerPromptAdvantages()} if method is NFTModule else {}
    if method is MSDDAModule:
        own = {name: getattr(before, name) for name in ("experts", "weights", "beta")}
    again = method(**parts, **own, sampler=lambda config: before.sampler)
    assert_same(weights, trained(again))
    for name in again.also_kept:
        assert_same(sets.parameters_of(name), sets.parameters_of("policy"))
