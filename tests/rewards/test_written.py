"""Rewards as people write them: understood, or refused in one sentence when the bank is built."""

import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from numpy.typing import NDArray
from torch import Tensor, nn

from lit_align.errors import ConfigError, built
from lit_align.rewards import BlackBoxReward, Brightness, FunctionReward, Redness, Reward, RewardBank

PROMPTS = ["a cat", "a dog", "a fox"]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def levels(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def bank(reward: Any, **more: Any) -> RewardBank:
    return RewardBank({"mine": reward, **more}, {"mine": 1.0})


UNDERSTOOD: dict[str, Callable[[Tensor], Any]] = {
    "float64 array": lambda images: levels(images).numpy().astype(np.float64),
    "array backwards": lambda images: levels(images).numpy()[::-1][::-1],
    "half array": lambda images: levels(images).numpy().astype(np.float16),
    "half tensor": lambda images: levels(images).half(),
    "bfloat16 tensor": lambda images: levels(images).bfloat16(),
    "list of floats": lambda images: levels(images).tolist(),
    "list of tensors": lambda images: list(levels(images)),
    "list of tensors and numbers": lambda images: [levels(images)[0], *levels(images)[1:].tolist()],
    "list of rows": lambda images: levels(images)[:, None].tolist(),
    "list of numpy scalars": lambda images: list(levels(images).numpy()),
    "tuple": lambda images: tuple(levels(images).tolist()),
    "column": lambda images: levels(images)[:, None],
    "row": lambda images: levels(images)[None],
    "scores and metadata": lambda images: (levels(images), {}),
    "array and metadata": lambda images: (levels(images).numpy(), {"kept": [1, 2]}),
    "list and nothing": lambda images: (levels(images).tolist(), None),
    "integers": lambda images: (levels(images) * 1000).long(),
    "booleans": lambda images: levels(images) > 0.5,
}


@pytest.mark.parametrize("form", UNDERSTOOD)
def test_forms_of_scores_that_are_understood(form: str, images: Tensor) -> None:
    out = bank(lambda images, prompts: UNDERSTOOD[form](images))(images, PROMPTS)
    expected = torch.as_tensor(levels(images))
    if form == "integers":
        expected = (expected * 1000).floor()
    if form == "booleans":
        expected = (expected > 0.5).float()
    assert out.total.shape == (3,)
    assert out.total.dtype == torch.float32
    torch.testing.assert_close(out.total, expected, rtol=5e-3 if "float16" in form else 1e-3, atol=0)


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "one number": (lambda images: 0.5, r"returned one number for 2 images; return one number per image"),
    "a mean": (lambda images: images.mean(), "returned one number for 2 images"),
    "nothing": (lambda images: None, "returned None; does it lack a return statement"),
    "a dict": (
        lambda images: {"avg": levels(images)},
        r"a dict \(avg\); return one number per image",
    ),
    "text": (lambda images: ["good", "bad"], "type list, not numbers"),
    "complex": (lambda images: torch.complex(levels(images), levels(images)), "not numbers"),
    "a generator": (lambda images: (x for x in levels(images)), "type generator, not numbers"),
    "ragged": (lambda images: [[1.0], [1.0, 2.0]], "not numbers"),
    "one of two": (lambda images: levels(images)[:1], r"returned the shape \(1,\); .* shape \(2,\)"),
    "a matrix": (lambda images: torch.zeros(2, 2), r"returned the shape \(2, 2\)"),
    "a map": (lambda images: images.mean(1), r"returned the shape \(2, 64, 64\)"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_forms_of_scores_that_are_refused_when_the_bank_is_built(form: str) -> None:
    make, said = REFUSED[form]
    with pytest.raises(ConfigError, match=said) as caught:
        bank(lambda images, prompts: make(images))
    assert str(caught.value).startswith("The reward 'mine' (")
    assert "\n" not in str(caught.value)


def test_one_image_may_have_one_number(images: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = bank(lambda images, prompts: levels(images).squeeze())(images[:1], PROMPTS[:1])
    torch.testing.assert_close(out.total, levels(images[:1]))


def test_scores_with_a_gradient_may_be_missing(images: Tensor) -> None:
    def some(images: Tensor, prompts: list[str]) -> list[Tensor | None]:
        return [None, *levels(images)[1:]]

    images.requires_grad_()
    out = bank(FunctionReward(some, differentiable=True))(images, PROMPTS)
    assert out.total.isnan().tolist() == [True, False, False]
    out.total.nansum().backward()
    assert [bool(gradient.any()) for gradient in images.grad] == [False, True, True]


class Lazy(Reward):
    """Loads its model when it is first called."""

    def __init__(self) -> None:
        self.model: nn.Linear | None = None

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:  # type: ignore[override]
        self.model = self.model or nn.Linear(1, 1)
        return self.model(images.mean((1, 2, 3))[:, None])[:, 0]


def test_a_model_that_is_loaded_late_is_frozen_too() -> None:
    assert [weight.requires_grad for weight in bank(Lazy()).parameters()] == [False, False]


class Short(Reward):
    """Declares nothing, and takes images and prompts alone."""

    def forward(self, images, prompts):  # type: ignore[no-untyped-def, override]
        return levels(images) + torch.tensor([float(len(prompt)) for prompt in prompts])


class OnlyImages(Reward):
    def forward(self, images):  # type: ignore[no-untyped-def, override]
        return levels(images)


class NamesAColumn(Reward):
    def forward(self, images, prompts, worth, unknown=None):  # type: ignore[no-untyped-def, override]
        assert unknown is None
        return torch.tensor(worth) + levels(images)


class TakesAllColumns(Reward):
    def forward(self, images, prompts, groups, **columns):  # type: ignore[no-untyped-def, override]
        return torch.tensor(columns["worth"]) + groups


def test_a_class_declares_nothing_and_takes_what_it_needs(images: Tensor) -> None:
    groups, columns = torch.tensor([0, 0, 1]), {"worth": [1.0, 2.0, 3.0], "other": [0, 0, 0]}
    out = bank(Short(), only=OnlyImages(), column=NamesAColumn(), all=TakesAllColumns())(
        images, PROMPTS, groups, columns
    )
    assert (Short().differentiable, Short().scope, Short().domain) == (False, "sample", None)
    torch.testing.assert_close(out.total, levels(images) + 5)
    torch.testing.assert_close(out.parts["only"], levels(images))
    torch.testing.assert_close(out.parts["column"], levels(images) + torch.tensor([1.0, 2.0, 3.0]))
    assert out.parts["all"].tolist() == [1.0, 2.0, 4.0]
    assert Short().shared_out(images, PROMPTS)[0].shape == (3,)


class Unprepared(Reward):
    """Forgets super().__init__()."""

    def __init__(self) -> None:
        self.scale = 2.0
        self.layer = nn.Linear(1, 1)

    def forward(self, images, prompts, groups=None, columns=None):  # type: ignore[no-untyped-def]
        return self.scale * self.layer(levels(images)[:, None])


class PreparedLate(Unprepared):
    """Calls it, but last."""

    def __init__(self) -> None:
        self.layer = nn.Linear(1, 1)
        self.scale = 2.0
        Reward.__init__(self)


@pytest.mark.parametrize("kind", [Unprepared, PreparedLate])
def test_a_constructor_may_forget_its_super(kind: type[Unprepared], images: Tensor) -> None:
    reward = kind()
    made = bank(reward)
    assert sum(weight.numel() for weight in made.parameters()) == 2
    assert not any(weight.requires_grad for weight in made.parameters())
    torch.testing.assert_close(made(images, PROMPTS).total, reward(images, PROMPTS)[:, 0])


def my_reward(images, prompts, worth, metadata=None, **columns):  # type: ignore[no-untyped-def]
    """As the functions of DDPO's code: scores and metadata."""
    assert metadata is None
    assert list(columns) == ["other"]
    return levels(images).numpy() + np.array(worth), {"prompts": prompts}


def blueness(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 2].mean(dim=(1, 2))


def test_a_function_is_a_reward(images: Tensor) -> None:
    columns = {"worth": [1.0, 2.0, 3.0], "other": ["x", "y", "z"]}
    out = bank(my_reward)(images, PROMPTS, None, columns)
    torch.testing.assert_close(out.total, levels(images) + torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ConfigError, match=r"my_reward takes 'worth'.*its columns: other\); give"):
        bank(my_reward)(images, PROMPTS, None, {"other": ["x", "y", "z"]})
    with pytest.raises(ConfigError, match=r"takes 'worth'.*its columns: none"):
        FunctionReward(my_reward)(images, PROMPTS)


def test_a_function_with_a_gradient(images: Tensor) -> None:
    reward = FunctionReward(blueness, differentiable=True, scope="sample")
    assert bank(reward).differentiable
    assert not bank(blueness).differentiable
    bank(reward)(images.requires_grad_(), PROMPTS).total.sum().backward()
    assert images.grad is not None
    assert images.grad[:, 2].abs().min() > 0


def test_a_module_of_ones_own_is_frozen_and_moves_along() -> None:
    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
            return self.scale * levels(images)

    made = bank(Scorer())
    assert [weight.requires_grad for weight in made.parameters()] == [False]
    assert made.double()(torch.ones(3, 3, 8, 8), PROMPTS).total.tolist() == [2.0] * 3


def test_functions_and_classes_are_named_in_yaml_by_import_path() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--bank", type=RewardBank)
    written = f"""
rewards:
  mine: {{class_path: FunctionReward, init_args: {{function: {__name__}.blueness, differentiable: true}}}}
  short: {{class_path: {__name__}.Short}}
weights: {{mine: 1.0}}
"""
    config = parser.parse_object({"bank": {"class_path": "RewardBank", "init_args": yaml.safe_load(written)}})
    made = parser.instantiate_classes(config).bank
    assert made.rewards["mine"].function is blueness
    assert made.differentiable
    assert "function: test_written.blueness" in parser.dump(config)


class Unbuilt(Reward):
    def __init__(self, address: str = "nowhere") -> None:
        raise ConnectionError(f"no server at {address}")

    def forward(self, images, prompts):  # type: ignore[no-untyped-def, override]
        return levels(images)


def test_a_constructor_that_raises_is_one_sentence_with_its_name() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--bank", type=RewardBank)
    parser.add_instantiator(built, Reward, subclasses=True)
    init = {"rewards": {"mine": {"class_path": f"{__name__}.Unbuilt"}}, "weights": {"mine": 1.0}}
    config = parser.parse_object({"bank": {"class_path": "RewardBank", "init_args": init}})
    with pytest.raises(
        ConfigError,
        match=r"test_written.Unbuilt cannot be made: ConnectionError: no server at nowhere \(test_w",
    ):
        parser.instantiate_classes(config)
    init["rewards"]["mine"] = {"class_path": "ColourFraction", "init_args": {"colour": "rouge"}}
    config = parser.parse_object({"bank": {"class_path": "RewardBank", "init_args": init}})
    with pytest.raises(ConfigError, match=r"cannot read the colour 'rouge'"):
        parser.instantiate_classes(config)


class Detached(Reward):
    differentiable = True

    def forward(self, images, prompts, groups=None, columns=None):  # type: ignore[no-untyped-def]
        return levels(images).detach()


class Unconnected(Detached):
    def forward(self, images, prompts, groups=None, columns=None):  # type: ignore[no-untyped-def]
        return torch.tensor(levels(images).tolist(), requires_grad=True) * 2


class Rounds(Detached):
    def forward(self, images, prompts, groups=None, columns=None):  # type: ignore[no-untyped-def]
        return levels((images * 255).round())


class Fickle(Detached):
    """Has a gradient for bright images only."""

    def forward(self, images, prompts, groups=None, columns=None):  # type: ignore[no-untyped-def]
        scores = levels(images)
        return scores if images.max() > 0.5 else scores.detach()


def test_a_declared_gradient_must_be_there(images: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"Detached\) declares that it is differentiable, .* carry no grad"):
        bank(Detached())
    with pytest.raises(ConfigError, match="do not come from the pixels"):
        bank(Unconnected())
    with pytest.warns(UserWarning, match="gradient of 0"):
        bank(Rounds())
    fickle = bank(Fickle())
    assert fickle((images * 0.4).requires_grad_(False), PROMPTS).total.isfinite().all()
    with pytest.raises(ConfigError, match=r"'mine'.*carry no gradient"):
        fickle((images * 0.4).requires_grad_(), PROMPTS)


class WrongScope(Short):
    scope = "image"  # type: ignore[assignment]


def test_a_scope_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="scope 'image'; give sample, group, batch"):
        bank(WrongScope())


class Breaks(Reward):
    """A server that is gone at the second call."""

    def __init__(self, after: int) -> None:
        self.left = after

    def forward(self, images, prompts, groups=None, columns=None):  # type: ignore[no-untyped-def]
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("HTTP 503\nfrom the server")
        return levels(images)


def test_a_reward_that_raises_is_one_sentence_with_its_name(images: Tensor) -> None:
    said = r"The reward 'mine' \(test_written.Breaks\) failed: ConnectionError: HTTP 503 from the"
    with pytest.raises(ConfigError, match=said + r" server \(test_written.py, line \d+\).*two images"):
        bank(Breaks(0))
    made = bank(Breaks(1))
    for score in (made, lambda *given: made.weighted("mine", *given)):
        with pytest.raises(ConfigError, match=said) as caught:
            score(images, PROMPTS)
        assert isinstance(caught.value.__cause__, ConnectionError)


class NeedsAColumn(Reward):
    def forward(self, images, prompts, groups=None, columns=None):  # type: ignore[no-untyped-def]
        worth = columns.get("worth")
        return torch.tensor([float(value) for value in worth])


def test_the_first_batch_decides_where_a_column_is_needed(images: Tensor) -> None:
    made = bank(NeedsAColumn())
    assert made(images, PROMPTS, None, {"worth": [1, 2, 3]}).total.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ConfigError, match=r"'mine'.*TypeError"):
        made(images, PROMPTS, None, {})
    made = bank(lambda images, prompts, **columns: columns["worth"])
    assert made(images, PROMPTS, None, {"worth": [1, 2, 3]}).total.tolist() == [1.0, 2.0, 3.0]


def test_a_column_in_the_place_of_the_prompts_is_not_taken_for_them(images: Tensor) -> None:
    made = bank(lambda images, worth: [float(len(one)) for one in worth])
    made(images, PROMPTS, None, {"other": [1, 2, 3]})  # whatever the prompts are called
    with pytest.raises(ConfigError, match=r"takes 'worth' as its second arg.*\(images, prompts, worth\)"):
        made.check_columns({"worth": ["x", "y", "z"]})
    with pytest.raises(ConfigError, match="takes 'columns' as its second argument"):
        bank(lambda images, columns: levels(images))


def test_a_reward_for_large_images_is_tried_with_large_ones() -> None:
    sides: list[int] = []

    def large(images: Tensor, prompts: list[str]) -> Tensor:
        sides.append(images.shape[-1])
        assert images.shape[-1] >= 512
        return levels(images)

    bank(large)
    assert sides == [64, 512, 512]  # the last: an image alone


class Sometimes(BlackBoxReward):
    """None, a number of numpy, a tensor: by how bright the image is."""

    def score(self, image: NDArray[np.uint8], prompt: str) -> Any:
        return None if image.mean() < 100 else np.float32(1.5) if image.mean() < 200 else torch.tensor(2)


class Pair(BlackBoxReward):
    def score(self, image: NDArray[np.uint8], prompt: str) -> Any:
        return 1.0, "because"


class Never(BlackBoxReward):
    def score(self, image: NDArray[np.uint8], prompt: str) -> None:
        return None


def test_none_and_infinity_are_no_score() -> None:
    grey = torch.tensor([0.1, 0.5, 1.0])[:, None, None, None].expand(3, 3, 64, 64)
    assert bank(Sometimes())(grey, PROMPTS).total.nan_to_num(9).tolist() == [9.0, 1.5, 2.0]
    infinite = bank(lambda images, prompts: (1e5 * levels(images)).half())
    assert infinite(grey, PROMPTS).total.isnan().tolist() == [False, False, True]
    assert bank(lambda images, prompts: [None] * 1 + [1.0] * (len(images) - 1))(
        grey, PROMPTS
    ).total.isnan().tolist() == [True, False, False]
    with pytest.warns(UserWarning, match=r"'mine'.*neither of two trial images"):
        bank(Never())
    with pytest.raises(ConfigError, match=r"Pair.score returned a value of the type tuple; return"):
        bank(Pair())


class Vandal(Reward):
    """Changes all that it is given."""

    differentiable = True

    def forward(self, images, prompts, groups, columns):  # type: ignore[no-untyped-def, override]
        images *= 0
        images += 0.25
        images.detach().numpy()[:] = 0.5
        prompts[:] = ["changed"] * len(prompts)
        groups += 7
        for values in columns.values():
            values[0]["at"] = "changed"
            values.clear()
        return levels(images)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_reward_changes_nothing_that_others_see(gradient: bool, images: Tensor) -> None:
    vandal = Vandal()
    vandal.differentiable = gradient
    if gradient:  # what it does to the images is part of its gradient
        vandal.forward = lambda images, prompts, groups, columns: levels(images.mul_(2))  # type: ignore[method-assign, assignment]
    made = RewardBank({"mine": vandal, "red": Redness(), "light": Brightness()}, {"mine": 1.0, "red": 1.0})
    before, groups = images.clone(), torch.tensor([0, 1, 1])
    prompts, columns = list(PROMPTS), {"x": [{"at": 1}, {"at": 2}, {"at": 3}]}
    given = images.requires_grad_(gradient)
    out = made(given * 1 if gradient else given, prompts, groups, columns)
    assert torch.equal(images.detach(), before)
    assert prompts == PROMPTS
    assert groups.tolist() == [0, 1, 1]
    assert columns == {"x": [{"at": 1}, {"at": 2}, {"at": 3}]}
    assert torch.equal(out.parts["red"], Redness()(before, PROMPTS))
    if gradient:
        out.total.sum().backward()
        expected = 2 / (3 * 64**2) + torch.tensor([1.0, -0.5, -0.5])[None, :, None, None] / 64**2
        torch.testing.assert_close(images.grad, expected.expand_as(images))


def test_a_score_that_depends_on_other_images_is_told(images: Tensor) -> None:
    def ranked(images: Tensor, prompts: list[str]) -> Tensor:
        return (levels(images) - levels(images).mean()) / levels(images).std()

    with pytest.warns(
        UserWarning, match=r"'mine' .*ranked\) gives an image -?0\.7.* beside another and nan alone"
    ):
        bank(ranked)
    for order in (1, -1):  # the rank of one of two images is 0, as that of one alone
        with pytest.warns(UserWarning, match="beside another and 0 alone"):
            bank(lambda images, prompts, order=order: (order * levels(images)).argsort().argsort())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank(FunctionReward(ranked, scope="batch"))
        bank(lambda images, prompts: levels(images))


@pytest.mark.parametrize(
    "reward",
    [
        lambda prompts, images: levels(images) + len(prompts[0]),
        lambda prompts, *, images: levels(images) + len(prompts[0]),
        lambda pictures, prompts: levels(pictures) + len(prompts[0]),
    ],
)
def test_prompts_before_images(reward: Any, images: Tensor) -> None:
    """They were given by position: a reward that measures texts measured images."""
    assert torch.equal(bank(reward)(images, PROMPTS).total, levels(images) + 5)
    assert bank(lambda prompts: [len(text) for text in prompts])(images, PROMPTS).total.tolist() == [5.0] * 3


def test_the_working_directory_is_put_back(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run wrote its configuration here, and all else there."""

    class Elsewhere(Short):
        def __init__(self) -> None:
            super().__init__()
            os.chdir("/")

        def forward(self, images, prompts):  # type: ignore[no-untyped-def, override]
            os.chdir("/")
            return levels(images)

    monkeypatch.chdir(tmp_path)
    bank(built(Elsewhere))(images, PROMPTS)
    assert Path.cwd() == tmp_path
    (gone := tmp_path / "gone").mkdir()
    os.chdir(gone)
    gone.rmdir()  # as where the folder of the program is replaced below a run
    bank(built(Elsewhere))(images, PROMPTS)


def test_torch_s_defaults_are_put_back(images: Tensor) -> None:
    def careless(images: Tensor, prompts: list[str]) -> Tensor:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        return levels(images)

    try:
        bank(careless)(images, PROMPTS)
        assert torch.zeros(()).dtype == torch.float32
        assert torch.zeros(()).device.type == "cpu"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_the_trial_draws_from_no_random_state() -> None:
    def draws(images: Tensor, prompts: list[str]) -> Tensor:
        return torch.rand(len(images)) + random.random() + np.random.rand()

    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = (torch.rand(()), random.random(), np.random.rand())
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    bank(draws)
    assert (torch.rand(()), random.random(), np.random.rand()) == expected


def test_what_ships_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tests prove it, and a large model would take seconds."""
    monkeypatch.setattr(Redness, "forward", lambda *given: 1 / 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RewardBank({"red": Redness()}, {"red": 1.0})


def test_a_gradient_that_leaks_is_cut(images: Tensor) -> None:
    class Leaks(Short):
        @torch.enable_grad()  # type: ignore[untyped-decorator]
        def forward(self, images, prompts):  # type: ignore[no-untyped-def, override]
            return levels(images)

    assert not bank(Leaks())(images.requires_grad_(), PROMPTS).total.requires_grad


def test_an_error_in_a_library_names_the_line_that_called_it() -> None:
    def in_numpy(images: Tensor, prompts: list[str]) -> Any:
        return np.concatenate([])

    with pytest.raises(ConfigError, match=r"ValueError: need at least one array.* \(test_written.py, line"):
        bank(in_numpy)
