"""What a run would meet after minutes is refused before its first validation, or before its first update."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from lit_align.advantages import GroupAdvantages
from lit_align.errors import ConfigError
from lit_align.methods import AlignPropModule, DDPOModule, DPOModule, SPINModule
from lit_align.methods.strategies import check_scaled
from lit_align.methods.tasks import check_parts
from lit_align.rewards import Brightness, PickScore, RewardBank
from lit_align.samplers import DDIM
from tests.methods.build import fit, make, pairs, prompts, trainer

VALIDATED = {"limit_val_batches": 1.0}


class Own(LightningDataModule):
    """A data module as people write them."""

    def train_dataloader(self) -> Any:
        return DataLoader(["a red star", "a blue circle"])


@pytest.mark.parametrize(
    ("waits", "told"),
    [
        (lambda: EarlyStopping("val/rewards"), r"EarlyStopping: monitor val/rewards is not in .* val/reward"),
        (lambda: EarlyStopping("val/0123456789"), r"monitor val/0\d+ is not in .*; there are val/"),
    ],
)
def test_a_metric_that_no_validation_has(
    waits: Callable[[], Callback], told: str, tiny: Path, tmp_path: Path
) -> None:
    module = make(DDPOModule, tiny, num_steps=2)
    with pytest.raises(ConfigError, match=told):
        fit(module, tmp_path, 1, waits(), data=prompts(2, 2), **VALIDATED)
    assert module.images == 0
    fit(module, tmp_path, 1, EarlyStopping("val/reward"), data=prompts(2, 2), **VALIDATED)
    assert module.images


@pytest.mark.parametrize(
    ("method", "data", "told"),
    [
        (DDPOModule, pairs, "DDPOModule learns from images that it draws, .*; use PromptDataModule"),
        (DPOModule, lambda: prompts(2, 2), "DPOModule learns from images .*; use PickaPicDataModule"),
        (DPOModule, lambda: pairs(resolution=32), r"images are 32 x 32 pixels .*set data\.resolution to it"),
        (DDPOModule, Own, "data: Own is not a data module .*; use PromptDataModule, with a PromptSource"),
        (DPOModule, lambda: pairs("winners"), r"data\.view: .* set it to pairs"),
    ],
)
def test_data_from_which_a_method_does_not_learn(
    method: Any, data: Callable[[], Any], told: str, tiny: Path, tmp_path: Path
) -> None:
    module = make(method, tiny)
    with pytest.raises(ConfigError, match=told):
        fit(module, tmp_path, 1, data=data(), **VALIDATED)
    assert not module.baseline


class OwnSampler(DDIM):
    """With two entries of which one is wrong."""

    def __init__(self, config: Any, num_steps: int) -> None:
        super().__init__(config, num_steps, noisy_steps=1)
        self.stochastic = torch.tensor([True, True])


MADE = DDIM({"_class_name": "DDIMScheduler", "steps_offset": 1}, num_steps=2)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (
            {"rewards": Brightness()},
            r"rewards: Brightness\(\) is not of the class RewardBank; give one that is",
        ),
        ({"rewards": {"bright": Brightness()}}, "rewards: .* is not of the class RewardBank"),
        ({"advantages": GroupAdvantages}, "advantages: <class .* is not of the class Advantages"),
        ({"optimisation": {"micro_batch": 4}}, "optimisation: .* is not of the class Optimisation"),
        ({"sampler": MADE}, r"sampler: this DDIM is made already, .*; give partial\(DDIM, num_steps=2\)"),
        ({"sampler": "DDIM"}, r"sampler: 'DDIM' makes none, .*; give partial\(DDIM, num_steps=10\)"),
        ({"sampler": partial(DDIM, 10)}, r"name the others, as in partial\(DDIM, num_steps=10\)"),
        ({"sampler": dict}, r"sampler: <class 'dict'> makes a dict; give what makes a Sampler"),
        ({"sampler": partial(OwnSampler, num_steps=2)}, r"OwnSampler\.step\(x, prediction, 1\) must retu"),
        ({"sampler": partial(OwnSampler, num_steps=3)}, r"OwnSampler\.stochastic must be .* num_steps \(3\)"),
    ],
)
def test_a_part_of_another_class_in_python(option: dict[str, Any], told: str, tiny: Path) -> None:
    """Some were met after the first validation, by what libraries say."""
    module = make(DDPOModule, tiny)
    parts = {"backbone": module.backbone, "rewards": module.rewards, "advantages": GroupAdvantages()}
    with pytest.raises(ConfigError, match=told):
        DDPOModule(**parts | {"sampler": partial(DDIM, num_steps=2), "clip_range": 1e-3} | option)


def test_an_evaluation_sampler_that_is_set_later(tiny: Path) -> None:
    """It was passed over: images were drawn with the one of the training."""
    module = make(DDPOModule, tiny, num_steps=2)
    module.sampling.eval_sampler = partial(DDIM, num_steps=5)
    assert (module.eval_sampler.num_steps, module.eval_sampler) == (5, module.eval_sampler)
    module.sampling.eval_sampler = None
    module.sampler = MADE  # to draw with
    assert module.eval_sampler is MADE


def test_parts_that_are_set_when_the_module_is_built(tiny: Path, tmp_path: Path) -> None:
    """They were passed over: the fit went on with those that it was built with."""
    for name, part in (
        ("rewards", RewardBank({"b": Brightness()}, {"b": 1.0})),
        ("advantages", GroupAdvantages()),
        ("sampler", MADE),
    ):
        module = make(DDPOModule, tiny, num_steps=2)
        setattr(module, name, part)
        with pytest.raises(ConfigError, match=rf"{name}.*: a module takes this when it is built"):
            fit(module, tmp_path)
    module = make(DDPOModule, tiny, num_steps=2)
    check_parts(module.rewards, module.tasks[""].advantages, module.tasks)  # a class may keep them
    with pytest.raises(TypeError, match="does not support item assignment"):
        module.rewards.rewards["trained"] = Brightness()  # type: ignore[index]


def test_weights_that_were_frozen_or_not_after_the_module_was_built(tiny: Path, tmp_path: Path) -> None:
    """All weights were trained, rewards among them, and the adapter was all that was written of them."""
    module = make(DDPOModule, tiny, num_steps=2)
    module.freeze()
    with pytest.raises(
        ConfigError, match=r"requires_grad: 0 weights would be trained, and not the 1,0.. of policy, as by"
    ):
        fit(module, tmp_path)
    module.unfreeze()
    with pytest.raises(
        ConfigError, match=r"requires_grad: \d\d,\d+ weights would be .*train_only\(\['policy'\]\)"
    ):
        fit(module, tmp_path)
    module.freeze()
    module.backbone.weight_sets.train_only(["policy"])
    fit(module, tmp_path)
    assert module.images


def test_a_module_that_is_compiled_as_a_whole(tiny: Path, tmp_path: Path) -> None:
    module = make(DDPOModule, tiny, num_steps=2)
    module._compiler_ctx = {"compiler": "dynamo"}  # as Lightning finds it by itself, which takes seconds
    with pytest.raises(ConfigError, match=r"give the module itself, and set backbone\.compile"):
        fit(module, tmp_path, 1, data=prompts(2, 2))


def test_float16_through_which_gradients_go_unscaled(tiny: Path, tmp_path: Path) -> None:
    module = make(DDPOModule, tiny, num_steps=2, dtype="float16")
    with pytest.raises(
        ConfigError, match=r"backbone\.dtype: float16 .* set it to bfloat16, or trainer\.prec"
    ):
        fit(module, tmp_path, data=prompts(2, 2))
    scaled = trainer(tmp_path, 1, plugins=MixedPrecision("16-mixed", "cpu"))
    check_scaled(scaled, module.parameters(), "backbone.dtype")
    with pytest.raises(ConfigError, match=r"backbone\.dtype: trained weights are in torch\.bfloat16"):
        fit(make(DDPOModule, tiny, num_steps=2).bfloat16(), tmp_path, data=prompts(2, 2))
    reward = PickScore("shapes", dtype="float16")
    with pytest.raises(ConfigError, match=r"rewards\.trained\.init_args\.dtype: float16"):
        fit(make(AlignPropModule, tiny, reward, num_steps=2), tmp_path)


def of_metadata(images: Any, prompts: list[str], metadata: list[Any]) -> Any:
    return images.mean((1, 2, 3))


class Needy(Brightness):
    def check_columns(self, columns: Any) -> None:
        self.need("include", columns, "Give it.")


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (of_metadata, "of_metadata takes 'metadata', and the data has no such column .its columns: none"),
        (Needy(), r"Needy: the data has no column 'include'; its columns: none\. Give it"),
    ],
)
def test_a_column_that_the_data_does_not_have(reward: Any, told: str, tiny: Path, tmp_path: Path) -> None:
    module = make(DDPOModule, tiny, num_steps=2, rewards=RewardBank({"mine": reward}, {"mine": 1.0}))
    with pytest.raises(ConfigError, match=told):
        fit(module, tmp_path, 1, data=prompts(2, 2), **VALIDATED)
    assert not module.baseline
    assert not module._evaluated


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        (DDPOModule, {"guidance": 0.0}, r"sampling\.guidance is 0: .*; set it to 1, which is no guidance"),
        (DDPOModule, {"guidance": 0.99}, r"sampling\.guidance is 0\.99: below 1 the prompt has less effect"),
        (SPINModule, {"opponent_guidance": 0.0}, r"opponent_guidance is 0: .*at 0 none"),
    ],
)
def test_a_scale_of_guidance_that_pipelines_take_for_none(
    method: Any, options: dict[str, Any], told: str, tiny: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        make(method, tiny, **options)


def test_what_is_no_list_of_prompts_and_what_is_no_data_module(tiny: Path, tmp_path: Path) -> None:
    """Each letter of a text would be a prompt."""
    module, data = make(DDPOModule, tiny, num_steps=2), prompts(2, 2)
    assert len(module.generate(np.array(["a star", "a circle"]))) == 2  # type: ignore[arg-type]
    for given in ("a red star", [], [3]):
        with pytest.raises(ConfigError, match="is not a list of prompts; give one, as in "):
            module.generate(given)
    data.setup("fit")
    for loader in (data.train_dataloader(), DataLoader(["a star", "a circle"])):
        with pytest.raises(ConfigError, match=r"as in trainer.fit\(module, PromptDataModule"):
            trainer(tmp_path, 1).fit(module, loader)
