"""Rows of the pretrained model, the summary of a plan, its frontier: closed forms on made-up images."""

import json
import math
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_align.files import write
from tests.benchmarks.harness.baselines import PLAIN, Baselines, best_of, measured
from tests.benchmarks.harness.plan import ROOT, Cell, Plan, load_plan
from tests.benchmarks.harness.plots import by_distance, frontier, plot_curves, plot_frontier
from tests.benchmarks.harness.pretrained import (
    FOLDER,
    Pretrained,
    best_guidance,
    configuration,
    pretrained_of,
)
from tests.benchmarks.harness.report import markdown
from tests.benchmarks.harness.run import CellFailed, Subprocesses, alone, run_cell
from tests.benchmarks.harness.summary import HEADER, change, summary
from tests.benchmarks.test_results import in_process, plan, run, write_plan  # noqa: F401

PROMPTS = [0.0, 0.0, 1.0, 1.0]


def made_up(truth: list[float], reward: list[float]) -> dict[str, list[float]]:
    """Two images of each of two prompts."""
    found = {"prompt": PROMPTS, "reward": reward, "truth": truth, "diversity": [0.2] * 4}
    return found | {"base/reward": [0.0] * 4, "base/truth": [0.5] * 4}


def baselines(**changes: Any) -> Baselines:
    plain = made_up([0.2, 0.4, 0.6, 0.8], [1.0, 2.0, 4.0, 3.0])
    guided = made_up([0.4, 0.6, 0.6, 1.0], [2.0, 2.0, 5.0, 5.0])
    metrics = {1.0: {"truth": 0.5, "reward": 2.5}, 2.0: {"truth": 0.7, "reward": 3.5}}
    tests = {1.0: {1: plain, 2: plain}, 2.0: {1: guided, 2: guided}}
    given = Baselines(("ddpo",), {1.5: 0.6, 2.0: 0.7}, "truth", 2.0, metrics, {"reward": 0.5}, tests)
    return replace(given, **changes)


def test_the_best_image_is_that_with_the_highest_trained_reward():
    columns = made_up([0.2, 0.4, 0.6, 0.8], [1.0, 2.0, 4.0, 3.0])
    count, means, chosen = best_of(columns)
    assert count == 2
    assert chosen["truth"] == pytest.approx([0.4, 0.6])  # the second image by the reward, not by the truth
    assert means["truth"] == pytest.approx([0.3, 0.7])
    columns["reward"][0] = math.nan
    assert best_of(columns)[2]["prompt"] == [1.0]


def test_rows_of_the_pretrained_model():
    rows = baselines().rows()
    plain, guided, best = rows.values()
    assert list(rows) == [
        PLAIN,
        "pretrained, best guidance (2): twice the cost a step",
        "pretrained, best of 2 by the trained reward: 2 images for one",
    ]
    assert plain["truth"].after == pytest.approx(0.5)
    # Two prompts in two seeds: the sums of a prompt stray by 4 x 0.2 from the mean.
    assert plain["truth"].standard_error == pytest.approx(math.sqrt(2 * 2 * 0.8**2) / 8)
    assert guided["truth"].difference == pytest.approx(0.15)
    assert guided["truth"].num_pairs == 8
    assert guided["truth"].standard_error == pytest.approx(math.sqrt(2 * 2 * 0.2**2) / 8)
    assert (best["truth"].before, best["truth"].after) == pytest.approx((0.5, 0.5))
    assert "diversity" not in best

    one_image = {"prompt": [0.0, 1.0], "reward": [1.0, 2.0], "truth": [0.5, 1.0]}
    alone = baselines(guidance=None, tests={1.0: {1: one_image}}).rows()
    assert list(alone) == [PLAIN]
    assert baselines(tests={}).rows() == {}
    assert len(baselines(of_sets=True).rows()) == 2  # none for the best of N: a set has no best image


def test_a_reward_of_sets_is_known_by_its_configuration():
    rewards = {
        "colours": {"class_path": "lit_align.rewards.PairwiseDiversity"},
        "red": {"class_path": "lit_align.rewards.Redness"},
        "mine": {"class_path": "lit_align.rewards.FunctionReward", "init_args": {"scope": "group"}},
    }
    found = {}
    for name in rewards:
        bank = {"init_args": {"rewards": rewards, "weights": {name: 1.0, "red": 0.5}}}
        text = yaml.safe_dump({"model": {"init_args": {"rewards": bank}}})
        found[name] = Pretrained("key", text, Path()).of_sets()
    assert found == {"colours": True, "red": False, "mine": True}


def test_the_best_guidance_is_chosen_by_the_truth_where_that_is_known():
    found = {g: {"truth": {"mean": t}, "reward": {"mean": r}} for g, t, r in ((1.5, 0.7, 1), (3.0, 0.6, 2))}
    assert best_guidance(found) == 1.5
    assert best_guidance({g: {"reward": metrics["reward"]} for g, metrics in found.items()}) == 3.0
    assert best_guidance({}) is None
    found[1.5]["truth"]["mean"] = None  # JSON's null: no image had one
    assert best_guidance(found) == 3.0
    assert best_guidance({1.5: found[1.5]}) is None
    assert "Guidance 2 has the highest truth on the validation split, seed 11 (1.5: 0.6" in baselines().told()
    assert baselines(tuned={1.0: 0.4}, guidance=1.0).told() == "Guidance 1 alone was measured."


def result(config: str, seed: int, truth: float, cpu: float | None) -> dict[str, Any]:
    """A fit of so many CPU-minutes that raised the truth from 0.5 by so much, ± 0.1."""
    metric = {"difference": truth, "standard_error": 0.1, "before": 0.5, "after": 0.5 + truth, "num_pairs": 4}
    spread = metric | {"before": 0.2, "after": 0.1}
    test = {"reward": metric, "truth": metric, "diversity": spread, "kl": metric | {"after": 3.0}}
    counted = {} if cpu is None else {"cpu_seconds": {"fit": 60 * cpu, "test": 1e6}}
    curves = {
        "val/reward": [[0, 2.0], [8, 2.0 + 10 * truth]],
        "val/truth": [[0, 0.5], [8, 0.5 + truth]],
        "val/kl": [[0, 0.0], [8, 3.0]],
    }
    return counted | {
        "config": config,
        "seed": seed,
        "test": test,
        "also": {},
        "images": 1000,
        "reward_queries": 2000,
        "seconds": {"fit": 120.0, "test": 60.0},
        "curves": curves,
    }


def three_configs(plan: Plan) -> tuple[Plan, list[dict[str, Any]]]:  # noqa: F811
    plan = replace(plan, configs={name: ["configs/ddpo.yaml"] for name in ("old", "slow", "quick")})
    results = [result("old", seed, 0.9, None) for seed in (1, 2)]
    results += [result("slow", seed, 0.2, 10 * seed) for seed in (1, 2)]
    return plan, results + [result("quick", seed, 0.1, 1.0) for seed in (1, 2)]


def test_the_summary_is_sorted_by_truth_for_cpu_time(plan):  # noqa: F811
    plan, results = three_configs(plan)
    lines = summary(plan, results, {}, {"slow": baselines()})
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    assert rows[0] == HEADER
    assert [row[0].partition(":")[0] for row in rows[2:]] == [
        PLAIN,
        "pretrained, best guidance (2)",
        "pretrained, best of 2 by the trained reward",
        "quick",
        "slow",
        "old",
    ]
    error = 0.1 / math.sqrt(2)
    truth = ["0.500 -> 0.700", f"+0.200 ± {error:.3f}", "0.50", "3.00", "1,000", "2,000"]
    assert rows[6] == ["slow", "2.0, 2.0", *truth, "15.0", f"+0.0133 ± {error / 15:.4f}"]
    assert rows[7][-1] == "2.0 (wall time)"  # and no truth for CPU time
    assert rows[3][2:4] == ["0.500 -> 0.650", "+0.150 ± 0.050"]


def test_errors_over_seeds_are_of_the_images_where_these_are_kept():
    results = [result("a", seed, 0.0, 1.0) for seed in (1, 2)]
    kept = {("a", seed): made_up([0.6, 0.8, 0.4, 0.6], [0.0] * 4) for seed in (1, 2)}
    found = change(results, kept, "truth")
    assert found is not None
    assert (found.before, found.after, found.difference) == pytest.approx((0.5, 0.6, 0.1))
    assert found.error == pytest.approx(math.sqrt(2 * 2 * 0.4**2) / 8)  # not 0.1 / sqrt(2)
    assert change(results, kept, "nothing") is None


def test_the_frontier_is_in_standard_deviations_of_the_pretrained_model(plan, tmp_path):  # noqa: F811
    plan, results = three_configs(plan)
    own = [one for one in results if one["config"] == "slow"]
    for curve, x in ((frontier(own, baselines()), [0.0, 4.0]), (by_distance(own, "kl"), [0.0, 3.0])):
        assert [point[0] for point in curve] == pytest.approx(x)
        assert [point[1] for point in curve] == pytest.approx([0.5, 0.7])
    assert frontier(own, None) == []
    own[0]["curves"]["val/drift"] = own[0]["curves"].pop("val/kl")
    assert by_distance(own, "kl") == []  # one seed of two
    assert plot_frontier(plan, results, tmp_path / "frontier.png", {"slow": baselines()})
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    drifts = [
        one | {"curves": {name.replace("kl", "drift"): curve for name, curve in one["curves"].items()}}
        for one in results
    ]
    assert by_distance(drifts, "kl") == []
    assert [x for x, _ in by_distance(drifts, "drift")] == pytest.approx([0.0, 3.0])
    without = [one | {"curves": {"val/reward": one["curves"]["val/reward"]}} for one in results]
    assert not plot_frontier(plan, without, tmp_path / "none.png", {})
    assert not (tmp_path / "none.png").exists()


def test_what_starts_from_the_same_model_shares_its_cells(tmp_path):
    configs = {
        "ddpo": ["configs/ddpo.yaml"],
        "quick": [
            "configs/ddpo.yaml",
            "--model.init_args.clip_range=1",
            "--data.init_args.images_per_prompt=2",
        ],
        "steps": ["configs/ddpo.yaml", "--model.init_args.sampler.init_args.num_steps=4"],
        "joint": ["configs/ddpo.yaml", "configs/variant/pinterest_joint.yaml"],
    }
    shared = load_plan(write_plan(tmp_path, configs=configs, budget={}, guidances=[1.5, 3]))
    models = pretrained_of(shared, tmp_path)
    assert list(models) == ["ddpo", "quick", "steps"]
    assert models["ddpo"] == models["quick"] != models["steps"]
    tuning = models["ddpo"].tuning(shared)
    assert [(cell.seed, list(cell.stages())) for cell in tuning] == [(11, ["validate"])] * 2
    (unguided, other) = models["ddpo"].cells(shared, tmp_path)  # nothing was chosen yet
    assert list(unguided.stages()) == ["validate", "test"]
    assert len({cell.fingerprint() for cell in (*tuning, unguided, other)}) == 4
    elsewhere = tmp_path / "elsewhere" / models["ddpo"].path.name
    write(elsewhere, models["ddpo"].configuration)
    moved = replace(models["ddpo"], path=elsewhere).cell(1.0, 1)  # results that are copied stay valid
    assert moved.fingerprint() == unguided.fingerprint()
    assert moved.stages() == unguided.stages()
    assert pretrained_of(replace(shared, guidances=[]), tmp_path) == {}


def test_the_reward_of_a_mixture_is_that_of_its_run():
    """A row of the pretrained model stands beside those of the run: same rewards, same scale."""
    given = configuration(["--config=configs/msdda.yaml", "--model.init_args.weights={aesthetic: 0.25}"])
    assert given is not None
    bank = given["model"]["init_args"]["rewards"]["init_args"]
    assert bank["weights"] == {"preference": 0.0, "aesthetic": 0.75}
    assert list(bank["rewards"]) == ["preference", "aesthetic", "truth"]


@pytest.mark.slow
def test_a_pretrained_model_is_measured_beside_a_run(plan, tmp_path):  # noqa: F811
    """In the table of the run, in the summary, and as lines in its plots."""
    plan = replace(plan, seeds=[1], guidances=[2.0])
    commands: list[str] = []

    def launch(arguments: list[str], log: Path, keep: int) -> Any:
        commands.append(arguments[0])
        return in_process(arguments, log, keep)

    assert run(plan, tmp_path, launch) == {}
    assert commands == ["validate", "validate", "test", "validate", "test", "fit", "test"]
    results = tmp_path / "results"
    models = pretrained_of(plan, results)
    found = measured(plan, models, results)["ddpo"]
    assert found.guidance == 2.0
    fit = json.loads((results / "tiny" / "ddpo_seed1.json").read_text())
    # The same prompts and noise as the fit's.
    for name in ("truth", "reward"):
        assert found.validation[1.0][name] == pytest.approx(fit["curves"][f"val/{name}"][0][1], rel=1e-5)
        plain = found.rows()[PLAIN][name]
        assert plain.after == pytest.approx(fit["test"][name]["before"], rel=1e-4)
    assert found.validation[2.0]["reward"] != found.validation[1.0]["reward"]
    assert found.deviation["reward"] > 0
    text = (results / "tiny.md").read_text()
    assert text.count("| pretrained, best guidance (2): twice the cost a step |") == 2
    assert text.count("| pretrained, best of 2 by the trained reward: 2 images for one |") == 2
    assert "tiny_frontier.png" in text
    assert (results / "tiny_frontier.png").exists()
    assert run(plan, tmp_path, launch) == {}
    assert len(commands) == 7


def test_the_launcher_counts_the_cpu_seconds_of_a_process(tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        launch = Subprocesses(1)
        ended = launch(["--help"], tmp_path / "log", lock.fileno())
        assert ended.status == 0
        assert ended.cpu > 0
        assert not launch.running
        launch.stop()
        assert launch(["--help"], tmp_path / "log", lock.fileno()).status == 1


def test_who_waits_for_another_plan_can_be_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.benchmarks.harness.run.SECONDS_PER_LOOK", 0.3)
    cell, launch = Cell(FOLDER, "key_guidance1", 1, (), steps=("validate",)), Subprocesses(1)
    told = []
    with alone(tmp_path / "work" / FOLDER / cell.name), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(run_cell, cell, tmp_path, tmp_path / "work", launch, lambda *_: told.append(_))
        assert wait([waiting], timeout=0.2).not_done
        launch.stop()
        with pytest.raises(CellFailed, match="another process is at work"):
            waiting.result(timeout=6.0)
    assert not told


def test_tasks_side_by_side_are_rendered_from_what_is_stored(tmp_path):
    large = load_plan(ROOT / "tests/benchmarks/plans/pinterest.yaml")
    stored = sorted((ROOT / "tests/benchmarks/results/pinterest").glob("*_seed*.json"))
    results = [json.loads(path.read_text()) for path in stored]
    text = markdown(large, results, {}, "plan.yaml")
    assert all(f"| {result['config']} |" in text for result in results)
    assert "## All tasks side by side" in text
    plot_curves(large, results, tmp_path / "curves.png")
    plot_frontier(large, results, tmp_path / "frontier.png", {})
    assert (tmp_path / "curves.png").exists()
