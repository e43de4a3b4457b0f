"""What counts as trouble: rarely chance, surely a decline, and by how much things may move."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from scipy.stats import norm, t
from torch import Tensor

from lit_align.callbacks import Guard
from lit_align.callbacks.trouble import FEWEST, TRAINED, Bound, bounds, changed, normal_of, since

PROMPTS, EACH = 64, 4
GROUPS = torch.arange(PROMPTS).repeat_interleave(EACH)
REWARDS = ["reward/truth", "reward/clip"]


def images(draw: torch.Generator, prompts: int = PROMPTS) -> dict[str, Tensor]:
    """Noise of one validation for each metric: half of its variance is that of the prompt."""

    def noise() -> Tensor:
        of_prompt = torch.randn(prompts, 1, generator=draw).expand(-1, EACH)
        return ((of_prompt + torch.randn(prompts, EACH, generator=draw)) / math.sqrt(2)).flatten()

    scales = {"diversity": 0.03, "saturation": 0.02, "high_frequency": 0.001, "kl": 3.0}
    return {name: noise() for name in REWARDS} | {name: scale * noise() for name, scale in scales.items()}


def added(one: Mapping[str, Tensor], other: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    return {name: one[name] + share * other[name] for name in one}


def alarms(
    walk: float, noise: float, runs: int, validations: int, slope: float = 0.0, level: float = 0.01
) -> int:
    """In how many runs the guard would act, by the rule of :class:`~lit_align.callbacks.Guard`.

    Args:
        walk: Size of the steps of a walk of every image's metrics, which is what a policy that moves does.
        noise: Size of what is new in each validation.
        runs: How many.
        validations: Of a run, after the first.
        slope: What every validation adds to the mean of the rewards.
        level: ``false_alarms``.
    """
    draw, found = torch.Generator().manual_seed(0), 0
    means = {"diversity": 0.22, "saturation": 0.5, "high_frequency": 0.034, "kl": 10.0}
    for _ in range(runs):
        start = images(draw)  # images differ among each other as much as noise makes them differ
        start = {name: values * 10 + means.get(name, 0.6) for name, values in start.items()}
        best, place = added(start, images(draw), noise), start
        for number in range(1, validations + 1):
            place = added(place, images(draw), walk)
            now = added(place, images(draw), noise)
            for name in REWARDS:
                now[name] = now[name] + slope * number
            watched = bounds(best, REWARDS, validations, level, None)
            changes = [changed(one, since(best, one.name), now[one.name], GROUPS) for one in watched]
            if changes[0].difference > 0:
                best = now
            elif any(change.certain for change in changes):
                found += 1
                break
    return found


def in_vain(walk: float, noise: float, runs: int, validations: int, level: float) -> int:
    """In how many runs without a change of any mean the guard finds that a reward has risen in vain."""
    draw, found = torch.Generator().manual_seed(0), 0
    for _ in range(runs):
        guard = Guard(false_alarms=level)
        place = {name: 0 * values for name, values in images(draw, 16).items()}
        best = added(place, images(draw, 16), noise)
        for _ in range(validations):
            place = added(place, images(draw, 16), walk)
            now = added(place, images(draw, 16), noise)
            better = bool(now["reward/truth"].mean() > best["reward/truth"].mean())
            bound = Bound(TRAINED, 1, 0.0, level)
            risen = changed(bound, best["reward/clip"], now["reward/clip"], GROUPS[: 16 * EACH])
            (change,) = guard._counted([risen], better)
            if change.certain:
                found += 1
                break
            best = now if better else best
    return found


KINDS = {"noise": (0.0, 1.0), "a walk": (1.0, 0.0), "both": (0.5, 1.0)}


@pytest.mark.parametrize("kind", KINDS)
def test_chance_seldom_lets_a_reward_rise_in_vain(kind):
    assert in_vain(*KINDS[kind], runs=100, validations=8, level=0.05) <= 5


@pytest.mark.parametrize("kind", KINDS)
def test_chance_raises_no_more_alarms_than_were_allowed(kind):
    assert alarms(*KINDS[kind], runs=40, validations=3, level=0.2) <= 8


@pytest.mark.slow
@pytest.mark.parametrize("validations", [3, 12, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_chance_raises_an_alarm_in_at_most_one_run_of_a_hundred(kind, validations):
    runs = 24000 // validations
    assert alarms(*KINDS[kind], runs=runs, validations=validations) <= 0.01 * runs


def test_a_decline_is_seen_when_it_is_twice_what_chance_needs():
    """The error of a difference of two validations is 0.14; 8 of them, and two rewards, need 3.8 errors."""
    assert alarms(0.0, 1.0, runs=10, validations=8, slope=-0.15) == 10


def test_a_rise_is_no_trouble():
    assert alarms(0.5, 0.5, runs=5, validations=8, slope=0.1) == 0


def test_the_deviate_has_students_tail():
    for freedom in (7, 15, 63, 255):
        for value in (0.5, 2.0, 3.5, 5.0):
            exact = norm.isf(t.sf(value, freedom))
            assert normal_of(value, freedom) == pytest.approx(exact, abs=0.02)
    assert normal_of(-2.0, 9) == -normal_of(2.0, 9)


def bound(**options: Any) -> Bound:
    return Bound(**{"name": "reward", "side": -1, "slack": 0.0, "level": 1e-3} | options)


def test_images_of_a_prompt_are_one_witness():
    """With an image counted four times the evidence is that of one."""
    draw = torch.Generator().manual_seed(0)
    before = torch.randn(20, generator=draw)
    after = before - 0.3 + 0.3 * torch.randn(20, generator=draw)
    once = changed(bound(), before, after, torch.arange(20))
    copies = (values.repeat_interleave(4) for values in (before, after, torch.arange(20)))
    assert changed(bound(), *copies).evidence == pytest.approx(once.evidence, rel=1e-9)
    assert once.certain


def test_only_the_bad_side_and_only_beyond_the_slack():
    groups = torch.arange(40)
    before = torch.linspace(0, 1, 40)
    wiggle = 0.01 * torch.cos(torch.arange(40.0))
    fallen, risen = before - 0.2 + wiggle, before + 0.2 + wiggle
    assert changed(bound(), before, fallen, groups).certain
    assert not changed(bound(), before, risen, groups).evidence
    assert changed(bound(side=1), before, risen, groups).certain
    assert all(changed(bound(side=0), before, moved, groups).certain for moved in (fallen, risen))
    assert not changed(bound(slack=0.21), before, fallen, groups).evidence
    assert changed(bound(slack=0.15), before, fallen, groups).certain
    assert 0 < changed(bound(slack=0.199), before, fallen, groups).evidence < 1  # by less than its error
    either, one = (changed(bound(side=side), before, fallen, groups).evidence for side in (0, -1))
    assert either < one  # of two sides chance has two


def test_what_was_not_measured_is_no_evidence():
    before, groups = torch.rand(40), torch.arange(40)
    nothing = torch.full((40,), math.nan)
    assert not changed(bound(), before, nothing, groups).evidence
    assert not changed(bound(slack=math.nan), before, before - 1, groups).evidence
    few = groups % (FEWEST - 1)
    assert not changed(bound(), before, before - 1, few).evidence
    assert changed(bound(), before, before - 1, groups % FEWEST).certain
    assert not changed(bound(), before, before, groups).evidence


def test_bounds_are_in_the_units_of_the_best_validation():
    best = images(torch.Generator().manual_seed(0))
    best = {name: values + 1 for name, values in best.items()}
    found = {one.name: one for one in bounds(best, REWARDS, 4, 0.01, 12.0)}
    assert [found[name].level for name in REWARDS] == [0.01 / 10 / 2] * 2
    sides = dict.fromkeys([*REWARDS, "diversity"], -1) | {"saturation": 0, "high_frequency": 0, "kl": 1}
    assert {name: one.side for name, one in found.items()} == sides
    assert found["diversity"].slack == pytest.approx(0.1 * float(best["diversity"].mean()))
    assert found["saturation"].slack == pytest.approx(0.5 * float(best["saturation"].std()))
    assert found["kl"].slack == 12.0
    assert "drift" not in found
    assert bounds(best, REWARDS, 4, 0.01, None)[-1].slack == math.inf
    assert not since(best, "kl").any()
