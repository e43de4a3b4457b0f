"""Advantages: invariants that any normaliser has, and DDPO's tracker against a plain re-implementation."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_align.advantages import Advantages, BatchAdvantages, GroupAdvantages, PerPromptAdvantages
from lit_align.errors import ConfigError

FACTORIES: dict[str, Callable[[], Advantages]] = {
    "batch": BatchAdvantages,
    "group": GroupAdvantages,
    "group/batch": lambda: GroupAdvantages(divide_by="batch"),
    "group/none": lambda: GroupAdvantages(divide_by="none"),
    "prompt": lambda: PerPromptAdvantages(buffer_size=4, min_count=2),
}
every_class = pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES.keys())

PROMPTS = ["cat", "cat", "dog", "dog", "cat", "dog", "cat", "dog"]
GROUPS = torch.tensor([7, 7, 3, 3, 7, 3, 7, 3])


def draw(num: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(seed))


@every_class
@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
def test_constant_rewards_give_zero(make: Callable[[], Advantages], value: float) -> None:
    advantages = make()
    for _ in range(3):
        assert torch.equal(advantages(torch.full((8,), value), GROUPS, PROMPTS), torch.zeros(8))


@every_class
def test_a_positive_affine_change_of_rewards_changes_nothing_but_the_scale(
    make: Callable[[], Advantages],
) -> None:
    rewards = draw()
    plain, changed = make(), make()
    scale = 3.0 if make is FACTORIES["group/none"] else 1.0
    first = plain(rewards, GROUPS, PROMPTS)
    torch.testing.assert_close(changed(3 * rewards + 5, GROUPS, PROMPTS), scale * first, rtol=1e-3, atol=1e-3)


@every_class
def test_an_image_without_a_score_has_no_advantage_and_no_influence(make: Callable[[], Advantages]) -> None:
    rewards = draw()
    rewards[torch.tensor([1, 5])] = torch.tensor([torch.nan, torch.inf])
    scored = rewards.isfinite()
    with_gaps, without = make(), make()
    advantages = with_gaps(rewards, GROUPS, PROMPTS)
    kept = [prompt for prompt, keep in zip(PROMPTS, scored.tolist(), strict=True) if keep]
    assert advantages[~scored].tolist() == [0, 0]
    assert torch.equal(advantages[scored], without(rewards[scored], GROUPS[scored], kept))
    assert with_gaps.state_dict() == without.state_dict()
    assert make()(torch.full((8,), torch.nan), GROUPS, PROMPTS).tolist() == [0] * 8


@every_class
def test_advantages_sum_to_zero_and_keep_the_order(make: Callable[[], Advantages]) -> None:
    rewards = draw()
    advantages = make()(rewards, GROUPS, PROMPTS)
    assert advantages.sum().item() == pytest.approx(0, abs=1e-5)
    cats = GROUPS == 7
    assert torch.equal(advantages[cats].argsort(), rewards[cats].argsort())


@every_class
def test_advantages_do_not_depend_on_the_order_of_images_and_carry_no_gradient(
    make: Callable[[], Advantages],
) -> None:
    rewards, order = draw().requires_grad_(), torch.randperm(8, generator=torch.Generator().manual_seed(1))
    advantages = make()(rewards, GROUPS, PROMPTS)
    shuffled = make()(rewards[order], GROUPS[order], [PROMPTS[i] for i in order.tolist()])
    torch.testing.assert_close(shuffled, advantages[order])
    assert not advantages.requires_grad
    assert advantages.dtype == torch.float32


@every_class
def test_state_survives_a_checkpoint(make: Callable[[], Advantages], tmp_path: Path) -> None:
    before, after = make(), make()
    for seed in range(3):
        before(draw(seed=seed), GROUPS, PROMPTS)
    torch.save(before.state_dict(), tmp_path / "state.pt")
    after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in (3, 4):
        assert torch.equal(before(draw(seed=seed), GROUPS, PROMPTS), after(draw(seed=seed), GROUPS, PROMPTS))


def test_batch_advantages_are_standard_scores() -> None:
    rewards = draw()
    expected = (rewards - rewards.mean()) / rewards.std(correction=0)
    torch.testing.assert_close(BatchAdvantages()(rewards, GROUPS, PROMPTS), expected)
    assert BatchAdvantages()(torch.tensor([1.0, 3.0]), GROUPS[:2], PROMPTS[:2]).tolist() == pytest.approx(
        [-1, 1]
    )


def test_group_advantages_by_hand() -> None:
    rewards, groups, prompts = (
        torch.tensor([1.0, 3.0, 10.0, 10.0, 4.0]),
        torch.tensor([0, 0, 5, 5, 9]),
        list("aabbc"),
    )
    by_group = GroupAdvantages()(rewards, groups, prompts)
    torch.testing.assert_close(by_group, torch.tensor([-1.0, 1, 0, 0, 0]) / (1 + 1e-4))
    raw = torch.tensor([-1.0, 1, 0, 0, 0])
    assert torch.equal(GroupAdvantages("none")(rewards, groups, prompts), raw)
    spread = rewards.std(correction=0) + 1e-4
    torch.testing.assert_close(GroupAdvantages("batch")(rewards, groups, prompts), raw / spread)


def test_clip_bounds_the_advantages() -> None:
    rewards = torch.zeros(64)
    rewards[0] = 1.0
    groups, prompts = torch.zeros(64, dtype=torch.long), ["cat"] * 64
    assert BatchAdvantages(clip=100.0)(rewards, groups, prompts)[0].item() == pytest.approx(63**0.5)
    assert BatchAdvantages()(rewards, groups, prompts)[0].item() == 5
    assert (-BatchAdvantages(clip=2.0)(-rewards, groups, prompts))[0].item() == 2
    for make in (GroupAdvantages, PerPromptAdvantages):
        assert make(clip=2.0)(rewards, groups, prompts)[0].item() == 2


def test_a_normaliser_says_whose_mean_it_takes_away() -> None:
    """What the checks of tasks and rewards go by (see test_joint.py)."""
    classes = (BatchAdvantages, GroupAdvantages, PerPromptAdvantages)
    assert [one.baseline for one in classes] == ["batch", "group", "history"]
    assert [one().memory for one in classes] == [0, 0, 32]
    assert PerPromptAdvantages(buffer_size=8, min_count=2).memory == 8
    rewards = draw()
    cats = GROUPS == 7
    shift = torch.where(cats, 3.0, 0.0)  # of all images of one prompt
    for make, known in ((GroupAdvantages, False), (BatchAdvantages, True)):
        found = [make()(r, GROUPS, PROMPTS) for r in (rewards, rewards + shift)]
        assert torch.allclose(*found, atol=1e-5) != known


def brute_force(
    batches: list[tuple[np.ndarray, list[str]]], buffer_size: int, min_count: int
) -> list[np.ndarray]:
    buffers: dict[str, deque[float]] = {}
    results = []
    for rewards, prompts in batches:
        advantages = np.empty(len(prompts))
        for prompt in set(prompts):
            rows = [i for i, other in enumerate(prompts) if other == prompt]
            buffer = buffers.setdefault(prompt, deque(maxlen=buffer_size))
            buffer.extend(rewards[rows])
            source = rewards if len(buffer) < min_count else np.array(buffer)
            advantages[rows] = (rewards[rows] - source.mean()) / (source.std() + 1e-6)
        results.append(advantages.clip(-5, 5))
    return results


@pytest.mark.parametrize(("buffer_size", "min_count"), [(32, 16), (16, 16), (5, 2), (1, 1)])
def test_tracker_agrees_with_a_plain_one(buffer_size: int, min_count: int) -> None:
    rng = np.random.default_rng(0)
    names = ["ant", "bee", "cat", "dog"]
    batches = [
        (
            rng.normal(i, 1, 24).astype(np.float32).astype(float),
            list(rng.choice(names, 24, p=[0.6, 0.2, 0.15, 0.05])),
        )
        for i in range(12)
    ]
    tracker = PerPromptAdvantages(buffer_size, min_count)
    for (rewards, prompts), expected in zip(
        batches, brute_force(batches, buffer_size, min_count), strict=True
    ):
        ours = tracker(torch.tensor(rewards), torch.zeros(24, dtype=torch.long), prompts)
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_tracker_keeps_the_newest_rewards_when_its_buffer_shrinks() -> None:
    big, small = PerPromptAdvantages(8, 1), PerPromptAdvantages(2, 1)
    big(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, dtype=torch.long), ["cat"] * 3)
    small.load_state_dict(big.state_dict())
    assert small.state_dict() == {"history": {"cat": [2.0, 3.0]}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchAdvantages(clip=0.0), "clip is 0.0"),
        (lambda: GroupAdvantages(divide_by=cast(Any, "prompt")), "divide_by is 'prompt'"),
        (lambda: PerPromptAdvantages(8, 16), "min_count is 16; choose 1 to buffer_size \\(8\\)"),
        (lambda: PerPromptAdvantages(8, 0), "min_count is 0"),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], Advantages], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "returned", [torch.zeros(4, 1), torch.zeros(()), torch.full((4,), float("nan")), None]
)
def test_advantages_of_ones_own_that_give_no_number_for_each_reward_are_told(returned):
    class Own(Advantages):
        def __init__(self):
            """Without that of the base, which sets the clip."""

        def _normalise(self, rewards, groups, prompts):
            return returned

        def state_dict(self):
            return {"mean": 1.0}

    with pytest.raises(ConfigError, match=r"Own\._normalise gave .* for 4 rewards, \d NaN"):
        Own()(torch.rand(4), torch.arange(4), list("abcd"))
    with pytest.raises(ConfigError, match=r"Own: the checkpoint has mean of it, .* define it beside"):
        Own().load_state_dict({"mean": 1.0})
    returned = 9 * torch.ones(4)
    assert Own()(torch.rand(4), torch.arange(4), list("abcd")).tolist() == [5.0] * 4
