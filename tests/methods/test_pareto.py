import math
from itertools import combinations
from math import comb

import pytest
import torch

from lit_align.comparison import compare
from lit_align.methods.msdda.pareto import hypervolume, pareto_front, simplex_grid
from lit_align.methods.msdda.sweep import Front, Measured, Point


def test_the_grid_holds_every_weight_once_from_the_first_objective_to_the_last():
    assert simplex_grid("ab", 2) == [{"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5}, {"a": 0.0, "b": 1.0}]
    assert simplex_grid("a", 3) == [{"a": 1.0}]
    for names in ("abc", "abcd"):
        grid = simplex_grid(names, 4)
        assert len({tuple(point.values()) for point in grid}) == len(grid) == comb(4 + len(names) - 1, 4)
        assert all(sum(point.values()) == pytest.approx(1) and min(point.values()) >= 0 for point in grid)


def test_the_front_is_what_nothing_dominates():
    points = torch.tensor([[0.0, 3.0], [1.0, 2.0], [1.0, 1.0], [2.0, 0.0], [0.5, 2.5], [1.0, 2.0]])
    assert pareto_front(points).tolist() == [True, True, False, True, True, True]
    draw = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    by_hand = [not any(bool((q >= p).all() and (q > p).any()) for q in draw) for p in draw]
    assert pareto_front(draw).tolist() == by_hand


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_the_volume_is_that_of_a_union_of_boxes(objectives):
    """By inclusion and exclusion over all subsets of the boxes."""
    points = torch.rand(6, objectives, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.1
    reference = torch.zeros(objectives, dtype=torch.float64)
    boxes = points[(points > 0).all(1)]
    wanted = sum(
        (-1) ** (size + 1)
        * sum(float(boxes[list(some)].min(0).values.prod()) for some in combinations(range(len(boxes)), size))
        for size in range(1, len(boxes) + 1)
    )
    assert hypervolume(points, reference) == pytest.approx(wanted, abs=1e-12)
    shift = torch.arange(objectives).double()
    assert hypervolume(points + shift, reference + shift) == pytest.approx(wanted, abs=1e-12)
    assert hypervolume(points[pareto_front(points)], reference) == pytest.approx(wanted, abs=1e-12)


def test_points_below_the_reference_add_nothing():
    assert hypervolume(torch.tensor([[2.0, -1.0], [-1.0, 2.0]]), torch.zeros(2)) == 0.0
    assert hypervolume(torch.zeros(0, 2), torch.zeros(2)) == 0.0


def test_the_error_of_a_hypervolume_is_that_of_the_mean_where_there_is_one_objective():
    draw = torch.Generator().manual_seed(3)
    groups = torch.arange(200).repeat_interleave(4)
    of_prompt = torch.randn(200, generator=draw).repeat_interleave(4)
    values = 5 + of_prompt + 0.5 * torch.randn(800, generator=draw)
    values[::7] = torch.nan

    def measured(method: str, rewards: torch.Tensor) -> Measured:
        return Measured(Point(method), {"reward/good": rewards}, groups, 0.0, torch.zeros(0))

    methods = [measured("base", values), measured("better", values + 1), measured("MSDDA", values + 3)]
    front = Front(("good",), methods, {"good": 1.0})
    volumes, again = front.hypervolumes(), front.resampled_hypervolumes()
    _, (unit,) = front.reference()
    assert unit == values[values.isfinite()].double().std()
    wanted = compare(torch.zeros(800), values, groups).standard_error / unit
    assert again["base"].std().item() == pytest.approx(wanted.item(), rel=0.15)
    assert again["base"].mean().item() == pytest.approx(volumes["base"], abs=3 * wanted.item() / 200**0.5)
    # The same draws for all: a shift by a constant has no error.
    assert (again["better"] - again["base"]).std().item() < 1e-6
    assert volumes["better"] - volumes["base"] == pytest.approx(1 / unit.item())
    found = front.volumes()["better"]
    assert (found.value, found.error) == (volumes["better"], again["better"].std().item())
    assert found.lead == pytest.approx(2 / unit.item())
    assert found.lead_error < 1e-6
    alone = Front(("good",), methods[:2], {"good": 1.0}).volumes()["better"]
    assert math.isnan(alone.lead)  # nothing was fused


def test_what_resampling_cannot_say_is_said_to_have_no_value():
    rewards = torch.tensor([1.0, 2.0, torch.nan, torch.inf])  # the last two have no score

    def front(groups: list[int]) -> Front:
        base = Measured(Point("base"), {"reward/good": rewards}, torch.tensor(groups), 0.0, torch.zeros(0))
        return Front(("good",), [base], {"good": 1.0})

    again = front([0, 0, 1, 1]).resampled_hypervolumes()["base"]
    assert 0 < again.isnan().sum() < len(again)
    assert front([0, 0, 1, 1]).volumes()["base"].error == 0  # only the first prompt has something to say
    assert math.isnan(front([0, 0, 0, 0]).volumes()["base"].error)


def test_less_of_a_penalty_is_better_on_the_front_and_in_volumes():
    def point(method: str, gain: float, cost: float) -> Measured:
        base = torch.linspace(-1, 1, 8)
        metrics = {"reward/gain": base + gain, "reward/cost": base + cost}
        return Measured(Point(method), metrics, torch.arange(8), 0.0, torch.zeros(0))

    measured = [point("base", 0, 0), point("good", 1, -1), point("bad", 1, 1)]
    front = Front(("gain", "cost"), measured, {"gain": 2.0, "cost": -3.0})
    assert [row["front"] for row in front.rows()] == [False, True, False]
    volumes = front.hypervolumes()
    assert volumes["good"] > volumes["base"] > volumes["bad"]
    again = front.resampled_hypervolumes()
    assert all(abs(again[name].mean() - volumes[name]) < 0.3 for name in volumes)


def test_what_does_not_vary_or_has_no_score_has_no_volume_and_no_place_on_the_front():
    metrics = [
        {"reward/a": torch.full((4,), value), "reward/b": torch.arange(4.0)} for value in (1.0, math.nan)
    ]
    measured = [
        Measured(Point(name), own, torch.arange(4), 0.0, torch.zeros(0))
        for name, own in zip(("base", "unscored"), metrics, strict=True)
    ]
    front = Front(("a", "b"), measured, {"a": 1.0, "b": 1.0})
    assert all(math.isnan(volume) for volume in front.hypervolumes().values())
    assert [row["front"] for row in front.rows()] == [True, False]


def test_where_the_fused_policy_is_an_expert_it_leads_as_that():
    base = torch.linspace(-1, 1, 8)
    corner, even = (("a", 1.0), ("b", 0.0)), (("a", 0.5), ("b", 0.5))
    gains = {
        Point("base"): 0.0,
        Point("expert", corner): 2.0,
        Point("MSDDA", even): 1.0,
        Point("CoDe", corner): 3.0,
    }
    measured = [
        Measured(
            point, {f"reward/{name}": base + gain for name in "ab"}, torch.arange(8), 0.0, torch.zeros(0)
        )
        for point, gain in gains.items()
    ]
    rows = Front(("a", "b"), measured, {"a": 3.0, "b": 5.0}, {"MSDDA": [corner]}).rows()
    assert [row.get("lead") for row in rows[:3]] == [None, None, None]
    assert rows[3]["lead"] == pytest.approx(3.0 * (2.0 - 3.0))
    assert rows[2]["gain"] == pytest.approx(0.5 * 3.0 + 0.5 * 5.0)
