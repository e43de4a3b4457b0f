"""Reports of several runs: what is set side by side, how runs are told apart, and what is never replaced."""

import html
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from lit_align.advantages import GroupAdvantages
from lit_align.callbacks import RunFolder, RunSummary, TestReport
from lit_align.callbacks.run_config import RunConfig
from lit_align.cli.run import main
from lit_align.data import ShapesPrompts
from lit_align.files import numbered, read_rows
from lit_align.methods import DDPOModule, DPOModule
from lit_align.methods.tasks import Task
from lit_align.report import differences, names_of, read_run, render
from lit_align.report.chart import COLOURS
from lit_align.rewards import FunctionReward, RewardBank
from lit_align.samplers import DDIM
from tests.methods.build import bank, make, pairs, prompts, task_prompts, trainer
from tests.test_report import metric, run_folder

FACTS: dict[str, Any] = {
    "model": "model",
    "base": "b0",
    "sampler": {"class": "DDIM", "steps": 4, "chain": "c0"},
    "guidance": 5.0,
    "size": [64, 64],
    "rewards": {"clip": "CLIPScore x 1", "truth": "ShapesTruth"},
}


def compared(folder: Path, name: str, of_test: dict[str, Any] | None = None, **facts: Any) -> Path:
    """A run that says how it was measured; ``of_test`` is said of its test alone."""
    run = run_folder(folder / name, [1.0, 2.0, 3.0], [0.0, 1.0, 4.0])
    measured = {name: facts.pop(name) for name in ("prompts",) if name in facts}
    said: dict[str, Any] = {"run": FACTS | facts, "measured": {"prompts": "2 prompts p0"} | measured}
    result = json.loads((run / "test.json").read_text()) | said
    (run / "validation.json").write_text(json.dumps(result | {"split": "validation"}))
    result["measured"] |= {"prompts": "9 prompts p9"} | (of_test or {})
    (run / "test.json").write_text(json.dumps(result))
    return run


# ---- what can be compared


@pytest.mark.parametrize(
    ("facts", "told", "rows", "charts"),
    [
        ({}, [], {"64": ["val/reward"], "kl": ["val/reward"]}, 3),
        (
            {"rewards": {"clip": "CLIPScore x 2", "truth": "ShapesTruth"}},
            ["trained rewards: clip CLIPScore x 1 (a/one); clip CLIPScore x 2 (a/two)"],
            {},
            5,  # the reward, and the reward against the KL, of each run
        ),
        ({"rewards": {"clip": "CLIPScore x 1"}}, [], {"64": ["val/reward"], "kl": ["val/reward"]}, 3),
        (
            {"sampler": {"class": "DDIM", "steps": 9, "chain": "c9"}},
            ["sampler: DDIM, 4 steps, c0 (a/one); DDIM, 9 steps, c9 (a/two)"],
            {"64": ["val/reward"]},
            5,
        ),
        ({"guidance": 1.0}, ["guidance: 5 (a/one); 1 (a/two)"], {"64": [], "kl": []}, 3),
        ({"size": [8, 16]}, ["size: 64 x 64 (a/one); 8 x 16 (a/two)"], {"64": [], "kl": []}, 3),
        ({"base": "b1"}, ["pretrained model: model b0 (a/one); model b1 (a/two)"], {"64": [], "kl": []}, 3),
        (
            {"prompts": "2 prompts p1"},
            ["prompts of the curves: 2 prompts p0 (a/one); 2 prompts p1 (a/two)"],
            {"64": [], "kl": []},
            3,
        ),
        (
            {"of_test": {"prompts": "7 prompts p7"}},
            ["prompts: 9 prompts p9 (a/one); 7 prompts p7 (a/two)"],
            {"64": [], "kl": []},
            3,
        ),
    ],
    ids=["alike", "reward", "monitored", "sampler", "guidance", "size", "model", "validation", "test"],
)
def test_what_differs_is_told_and_wrong_rows_are_left_out(
    facts, told, rows, charts, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    runs = [compared(tmp_path / "a", "one"), compared(tmp_path / "a", "two", **facts)]
    main(["report", *map(str, runs)])
    found = json.loads((tmp_path / "report.json").read_text())
    page = html.unescape((tmp_path / "report.html").read_text())
    assert found["differences"] == told
    assert [line for line in told if f"<li>{line}</li>" not in page] == []
    assert [m.partition("differs")[2].strip() for m in caplog.messages if "differs" in m] == told
    assert [row["at"].partition(" ")[0] for row in found["at_equal"]] == (
        ["128" if at == "64" else at for at in rows]
    )
    assert page.count("<svg") == charts


def test_a_single_reward_of_another_class_has_a_chart_for_each_run(tmp_path):
    runs = [compared(tmp_path, "one"), compared(tmp_path, "two")]
    other = {"clip": "CLIPScore x 1", "truth": "Redness"}
    runs.append(compared(tmp_path, "three", rewards=other))
    read = [read_run(run) for run in runs]
    for run in read:
        run.curves["val/truth"] = run.curves["val/reward/clip"] = [(0, 0.1), (64, 0.2)]
    page = render(read)
    assert page.count('aria-label="val/truth"') == 3
    assert page.count('aria-label="val/reward/clip"') == page.count('aria-label="val/reward"') == 1
    assert "<td>val/truth</td>" not in page
    assert any(line.startswith("reward/truth: ShapesTruth (") for line in differences(read))


def test_curves_of_a_run_that_went_on_with_another_measurement_begin_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [compared(tmp_path, "one"), compared(tmp_path, "two")]
    said = json.loads((runs[1] / "validation.json").read_text()) | {"compared_since": 64}
    (runs[1] / "validation.json").write_text(json.dumps(said))
    main(["report", *map(str, runs)])
    found = json.loads((tmp_path / "report.json").read_text())
    (told,) = found["differences"]
    assert told.endswith(
        "two: its curves begin after 64 images; held-out images were measured otherwise before"
    )
    assert [x for x, _ in read_run(runs[1]).curves["val/reward"]] == [128]
    main(["report", str(runs[1])])
    assert told in html.unescape((runs[1] / "report.html").read_text())


def test_a_run_whose_images_never_had_a_score_is_compared_by_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [compared(tmp_path, "one"), run_folder(tmp_path / "two", [math.nan] * 3, [0.0, 1.0, 4.0])]
    main(["report", *map(str, runs)])
    assert json.loads((tmp_path / "report.json").read_text())["at_equal"] == []


def test_other_splits_and_numbers_of_images_are_told_and_what_is_not_known(tmp_path):
    runs = [
        compared(tmp_path, "one"),
        compared(tmp_path, "two"),
        run_folder(tmp_path / "old", [1, 2], [0, 1]),
    ]
    (runs[0] / "test.json").unlink()
    result = json.loads((runs[1] / "test.json").read_text())
    result["metrics"] = {"reward": metric(0, 1) | {"num_pairs": 24}}
    (runs[1] / "test.json").write_text(json.dumps(result))
    told = differences([read_run(run) for run in runs])
    one, two, old = names_of([read_run(run) for run in runs])
    assert f"split: validation ({one}); test ({two}, {old})" in told
    assert f"measured images: 8 ({one}, {old}); 24 ({two})" in told
    assert f"{old} does not say how it was measured" in told


def by_function(images, prompts):
    return images.mean((1, 2, 3))


def measured_again(
    tiny: Path, folder: Path, data: Any, method: Any = DDPOModule, text: str = "", **options: Any
) -> dict[str, Any]:
    """The newest result in a folder, in which a model with a configuration is tested."""
    callbacks = [RunFolder(folder), RunConfig(text, {}), RunSummary(), TestReport()]
    logger = CSVLogger(folder, name=None, version="")
    module = make(method, tiny, num_steps=2, **options)
    trainer(folder, 1, *callbacks, logger=logger).test(module, data, verbose=False)
    found: dict[str, Any] = json.loads(numbered(folder / "test.json")[-1].read_text())
    return found


def test_a_result_says_on_which_prompts_and_by_which_sampler_and_rewards_it_was_measured(tiny, tmp_path):
    mine = RewardBank({"mine": FunctionReward(by_function)}, {"mine": 2.0})
    few = {"test_prompts": 2, "test_images_per_prompt": 1}
    first, same, other = (
        measured_again(tiny, tmp_path, prompts(**few, **options), rewards=mine)
        for options in ({}, {"images_per_prompt": 2}, {"test_source": ShapesPrompts(["single"])})
    )
    assert first["measured"] == same["measured"]
    assert first["measured"]["rewards"] == {"mine": f"{__name__}.by_function x 2"}
    assert first["measured"]["prompts"].startswith("2 prompts ")
    assert other["measured"].keys() == first["measured"].keys()
    assert other["measured"]["prompts"] != first["measured"]["prompts"]
    steps = measured_again(
        tiny, tmp_path, prompts(**few), rewards=mine, eval_sampler=partial(DDIM, num_steps=3)
    )
    assert steps["run"]["sampler"] == first["run"]["sampler"]
    assert steps["measured"]["sampler"]["steps"] == 3


def test_prompts_of_several_tasks_and_beside_pairs_are_known_too(tiny, tmp_path):
    tasks = {name: Task(bank(), GroupAdvantages()) for name in ("a", "b")}
    joint = measured_again(
        tiny, tmp_path, task_prompts("a", "b", test_prompts=1, test_images_per_prompt=1), tasks=tasks
    )
    assert joint["measured"]["prompts"].startswith("2 prompts ")
    assert set(joint["measured"]["rewards"]) == {"1/trained", "1/monitored", "2/trained", "2/monitored"}
    of_pairs = measured_again(tiny, tmp_path, pairs(test_prompts=3), DPOModule)
    assert of_pairs["measured"]["prompts"].startswith("3 prompts ")


# ---- how runs are told apart


def test_runs_of_equal_last_names_have_lines_headings_and_rows_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [f"{owner}/logs/ddpo/version_0" for owner in ("a", "b")]
    for run in runs:
        run_folder(tmp_path / run, [1.0, 2.0], [0.0, 1.0])
    main(["report", *runs])
    page = Path("report.html").read_text()
    for run in runs:
        assert f"<h2>{run}</h2>" in page
        assert f"<th>{run}</th>" in page
        assert page.count(f">{run}</text>") == 3  # of the reward, of the KL, and of one against the other
    assert {row["run"] for row in read_rows(Path("report.csv"))} == set(runs)
    monkeypatch.chdir(tmp_path / runs[0])
    assert names_of([read_run(Path())]) == ["ddpo/version_0"]


def test_a_run_has_one_colour_on_the_page_and_a_name_in_each_chart(tmp_path):
    runs = [read_run(run_folder(tmp_path / "logs" / name, [1.0, 2.0], [0.0, 1.0])) for name in ("a", "b")]
    runs[1].curves["val/truth"] = [(0, 0.1), (64, 0.2)]
    charts = [one for one in re.findall("<svg.*?</svg>", render(runs)) if "val/truth" in one]
    assert len(charts) == 3  # it, the reward and the KL against it
    for one in charts:
        assert set(re.findall('stroke="([^"]+)"', one)) == {COLOURS[1]}
        assert f'fill:{COLOURS[1]}">logs/b</text>' in one
        assert "logs/a" not in one
    assert "<text" in (alone := render(runs[1:]))
    assert ">logs/b</text>" not in alone  # nothing to tell apart


def test_a_run_is_given_once(tmp_path, capsys):
    run = run_folder(tmp_path / "a", [1.0, 2.0], [0.0, 1.0])
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(run), f"{run}/../a"])
    assert "is given twice" in capsys.readouterr().err
