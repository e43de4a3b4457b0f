import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_align.cli import main as lit_align
from lit_align.errors import ConfigError
from lit_align.methods import DDPOModule
from lit_align.shapes import WEIGHTS_HASH
from tests.benchmarks.harness import plan as harness_plan
from tests.benchmarks.harness.gains import shares, side_by_side
from tests.benchmarks.harness.plan import ROOT, Cell, Plan, SideBySide, load_plan
from tests.benchmarks.harness.report import verdict
from tests.benchmarks.harness.run import Ended
from tests.benchmarks.harness.sweeps import sweeps
from tests.benchmarks.results import make

DDPO = ROOT / "configs" / "ddpo.yaml"
TINY = {
    "trainer.max_epochs": 2,
    "trainer.limit_train_batches": 1,
    "trainer.accelerator": "cpu",
    "model.init_args.sampler.init_args": {"num_steps": 2, "noisy_steps": 1},
    "data.init_args.images_per_prompt": 2,
    "data.init_args.prompts_per_batch": 2,
    "data.init_args.validation_prompts": 2,
    "data.init_args.validation_images_per_prompt": 2,
    "data.init_args.test_prompts": 2,
    "data.init_args.test_images_per_prompt": 2,
}


def write_plan(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    content = {"name": "tiny", "configs": {"ddpo": ["configs/ddpo.yaml"]}, "seeds": [1, 2], "budget": TINY}
    content |= {"guidances": [], "because": "other tests measure it"}
    path.write_text(yaml.safe_dump(content | changes))
    return path


def in_process(arguments: list[str], log: Path, keep: int) -> Ended:
    """The real entry point, without the seconds that a process needs to start."""
    before = time.process_time()
    config = f"--config={DDPO}"
    try:
        lit_align(
            [config if argument == "--config=configs/ddpo.yaml" else argument for argument in arguments]
        )
    except BaseException as error:
        log.write_text(f"died of {error!r}")
        return Ended(1, time.process_time() - before)
    return Ended(0, time.process_time() - before)


@pytest.fixture
def plan(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Two seeds of DDPO on a tiny model, with simple rewards under the names of the shipped ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit_align"])
    rewards = {"truth": {"class_path": "Brightness"}, "clip": {"class_path": "Redness"}}
    model = {
        "model.init_args.backbone.init_args.pretrained": str(tiny),
        "model.init_args.rewards.init_args.rewards": rewards,
    }
    return load_plan(write_plan(tmp_path, budget=TINY | model))


def run(plan: Plan, folder: Path, launch: Any = in_process) -> dict[str, str]:
    return make(plan, folder / "results", folder / "runs", launch, 1, "tiny.yaml")


def read(folder: Path, seed: int) -> dict[str, Any]:
    return json.loads((folder / "results" / "tiny" / f"ddpo_seed{seed}.json").read_text())


@pytest.mark.slow
def test_a_plan_that_was_interrupted_ends_as_the_one_that_was_not(plan, tmp_path, monkeypatch, capsys):
    spent: list[tuple[str, str, float]] = []

    def counting(arguments: list[str], log: Path, keep: int) -> Ended:
        ended = in_process(arguments, log, keep)
        spent.append((log.parent.name, log.stem, ended.cpu))
        return ended

    plan = replace(plan, compare=[["ddpo", "ddpo"]])
    assert run(replace(plan, seeds=[1]), tmp_path / "whole") == {}
    with monkeypatch.context() as patch:
        collect, calls = DDPOModule.collect, []

        def dying(self: DDPOModule, *arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:  # the second rollout batch of the first cell
                raise OSError("the lights went out")
            return collect(self, *arguments)

        patch.setattr(DDPOModule, "collect", dying)
        failed = run(plan, tmp_path / "cut", counting)
    assert list(failed) == ["ddpo_seed1"]
    assert "the lights went out" in failed["ddpo_seed1"]
    others = (tmp_path / "cut" / "results" / "tiny" / "ddpo_seed2.json").stat().st_mtime_ns
    assert "seed 1 has no result" in capsys.readouterr().out

    assert run(plan, tmp_path / "cut", counting) == {}
    assert (tmp_path / "cut" / "results" / "tiny" / "ddpo_seed2.json").stat().st_mtime_ns == others
    whole, cut = read(tmp_path / "whole", 1), read(tmp_path / "cut", 1)
    for part in ("validation", "test", "curves", "images", "reward_queries"):
        assert whole[part] == cut[part], part
    assert [name.partition("--")[0] for name in whole["commands"]] == [
        f"python -m lit_align {stage} " for stage in ("fit", "test")
    ]
    assert "--ckpt_path" in cut["commands"][1]
    assert len(cut["commands"]) == 3
    of_fit = [cpu for cell, stage, cpu in spent if (cell, stage) == ("ddpo_seed1", "fit")]
    assert len(of_fit) == 2
    assert cut["cpu_seconds"]["fit"] == pytest.approx(sum(of_fit), abs=0.06)

    assert [images for images, _ in whole["curves"]["val/reward"]] == [0, 4, 8]
    assert [images for images, _ in whole["curves"]["train/reward"]] == [4, 8]
    assert whole["curves"]["val/truth"][-1][1] == pytest.approx(whole["validation"]["truth"]["after"])
    assert whole["test"]["reward"]["num_pairs"] == 4
    assert whole["images"] == 8
    assert read(tmp_path / "cut", 2)["test"] != whole["test"]

    results = tmp_path / "cut" / "results"
    table = (results / "tiny.md").read_text()
    assert f"{whole['test']['reward']['after']:.3f} (" in table
    assert f"| {whole['test']['kl']['after']:.2f} ± " in table
    assert "**inconclusive**" in table or "**fails**" in table
    assert "not measured for itself: other tests measure it." in table
    assert table.count("| +0.000 ± 0.000, 50% ± 0% |") >= 2  # against itself, of each seed
    for image in ("tiny.png", "tiny/ddpo_before.png", "tiny/ddpo_after.png"):
        assert image in table
        assert (results / image).stat().st_size > 1000


def made_up_sweep(lead: float) -> dict[str, Any]:
    """Of two objectives, at one weight: MSDDA is ahead of a soup by ``lead``, with an error of 0.3."""
    rewards = {"reward/a": 1.0, "reward/a/se": 0.1, "reward/b": 2.0, "reward/b/se": 0.1, "seconds": 0.5}
    even = {"weight/a": 0.5, "weight/b": 0.5, "gain": 1.0, "gain/se": 0.3, "truth": 0.7, "truth/se": 0.01}
    return {
        "images": 8,
        "objectives": ["a", "b"],
        "hypervolume": {"base": 1.0, "MSDDA": 1.5, "soup": 1.5 - lead},
        "hypervolume_error": {"base": 0.3, "MSDDA": 0.3, "soup": 0.3},
        "hypervolume_lead": {"base": 0.5, "soup": lead},
        "hypervolume_lead_error": {"base": 0.3, "soup": 0.3},
        "points": [
            {"method": "base", "weight/a": None, "weight/b": None, "kl": 0.0, "kl/se": 0.0} | rewards,
            {"method": "MSDDA", "kl": 1.0, "kl/se": 0.3} | even | rewards,
            {"method": "soup", "lead": lead, "lead/se": 0.3} | even | rewards,
        ],
    }


def test_sweeps_of_several_seeds_are_pooled():
    lines = sweeps([made_up_sweep(lead) for lead in (1.0, 2.0, -0.9)])
    assert lines[0] == "Sweep of 8 images, 3 seeds:"
    error = math.sqrt(3 * 0.3**2) / 3
    assert f"| soup | 0.800 ± {error:.3f} | +0.700 ± {error:.3f} | 2 ahead, 1 behind |" in lines
    assert f"| base | 1.000 ± {error:.3f} | +0.500 ± {error:.3f} | 0 ahead, 0 behind |" in lines  # of .3 each
    assert "| MSDDA | 1.500 ± 0.173 |  |  |" in lines
    (base,) = [line for line in lines if line.startswith("|  | base |")]
    assert base.endswith("| 0.000 ± 0.000 |  |  |  | 0.500 |")
    soup = lines[-1].split(" | ")
    assert soup[:2] == ["| 0.5 0.5", "soup"]
    assert soup[4:] == [
        "0.700 ± 0.006",
        "",
        "+1.000 ± 0.173",
        "+0.700 ± 0.173",
        "2 ahead, 1 behind",
        "0.500 |",
    ]


@pytest.mark.slow
def test_a_longer_run_goes_on_from_a_shorter_one_and_is_tested_further(plan, tmp_path):
    """As if it had never stopped; what a sweep left is that of the test proper."""

    def launch(arguments: list[str], log: Path, keep: int) -> Ended:
        """Writes a sweep after a test, where one would be: beside any that is there."""
        ended = in_process(arguments, log, keep)
        if arguments[0] == "test" and ended.status == 0:
            cell = next(a for a in arguments if "logger.init_args.name" in a).partition("=")[2]
            run_folder = tmp_path / "further" / "runs" / "tiny" / cell / "version_0"
            place = run_folder / ("sweep-2" if (run_folder / "sweep").exists() else "sweep")
            place.mkdir()
            (place / "sweep.json").write_text(
                json.dumps(made_up_sweep(float("--data.init_args.test_split=train" in arguments)))
            )
        return ended

    def found(which: str, config: str) -> dict[str, Any]:
        return json.loads((tmp_path / which / f"results/tiny/{config}_seed1.json").read_text())

    def stages(result: dict[str, Any]) -> list[str]:
        return [command.split()[3] for command in result["commands"]]

    sizes = {name: value for name, value in plan.budget.items() if name != "trainer.max_epochs"}
    configs = {f"ddpo_{n}": ["configs/ddpo.yaml", f"--trainer.max_epochs={n}"] for n in (1, 2)}
    alone = replace(plan, configs={"ddpo_2": configs["ddpo_2"]}, budget=sizes, seeds=[1])
    assert run(alone, tmp_path / "apart") == {}
    # A cell can be tested on the prompts that it was trained on too.
    seen = ["--data.init_args.test_split=train", "--data.init_args.test_prompts=3"]
    both = replace(alone, configs=configs, continues={"ddpo_2": "ddpo_1"}, also={"seen": seen})
    assert both.cells()[1].fingerprint() != alone.cells()[0].fingerprint()
    assert run(both, tmp_path / "further", launch) == {}

    apart, further = found("apart", "ddpo_2"), found("further", "ddpo_2")
    for part in ("validation", "test", "curves", "images"):
        assert apart[part] == further[part], part
    assert stages(apart) == ["fit", "test"]
    assert stages(further) == ["fit", "fit", "test", "test"]
    assert "--trainer.max_epochs=1" in further["commands"][0]
    assert "--ckpt_path" in further["commands"][1]
    assert further["seconds"]["fit"] > 0
    assert further["sweep"] == found("further", "ddpo_1")["sweep"] == made_up_sweep(0.0)
    assert further["test"]["reward"]["num_pairs"] == 4
    assert further["also"]["seen"]["reward"]["num_pairs"] == 6
    table = (tmp_path / "further" / "results" / "tiny.md").read_text()
    assert f"seen, `{' '.join(seen)}`:" in table
    assert f"{further['also']['seen']['reward']['after']:.3f} (" in table
    rows = (tmp_path / "further" / "results" / "tiny" / "ddpo_2_seed1.csv").read_text().splitlines()
    assert len(rows) == 5  # of the test proper

    # The fit and the first further test stand; what follows another one is run.
    more = replace(both, also={"seen": seen, "warm": ["--data.init_args.test_prompts=2"]})
    more.configs.pop("ddpo_1")
    assert run(replace(more, continues={}), tmp_path / "further", launch) == {}
    again = found("further", "ddpo_2")
    assert again["commands"][:3] == further["commands"][:3]
    assert stages(again) == ["fit", "fit", "test", "test", "test"]
    assert again["also"]["seen"] == further["also"]["seen"]
    assert again["also"]["warm"]["reward"]["num_pairs"] == 4
    assert again["test"] == further["test"]
    assert again["fingerprint"] != further["fingerprint"]


def test_a_cell_runs_again_when_its_settings_change_and_others_go_on_after_a_failure(tmp_path):
    ran: list[str] = []

    def launch(arguments: list[str], log: Path, keep: int) -> Ended:
        ran.append(arguments[0])
        log.write_text("\n".join(f"line {i}" for i in range(50)))
        return Ended(3, 0.0)

    plan = load_plan(write_plan(tmp_path))
    failed = run(plan, tmp_path, launch)
    assert list(failed) == ["ddpo_seed1", "ddpo_seed2"]
    assert "status 3" in failed["ddpo_seed2"]
    assert "line 49" in failed["ddpo_seed2"]
    assert "line 29" not in failed["ddpo_seed2"]
    assert ran == ["fit", "fit"]

    (cell, other) = plan.cells()
    changed = load_plan(write_plan(tmp_path, overrides=["--model.init_args.clip_range=1"])).cells()[0]
    configuration = tmp_path / "other.yaml"
    configuration.write_text("a: 1")
    mine = load_plan(write_plan(tmp_path, configs={"ddpo": [str(configuration)]})).cells()[0]
    prints = [c.fingerprint() for c in (cell, other, changed, mine)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness_plan, "WEIGHTS_HASH", "other")
        prints.append(cell.fingerprint())
    configuration.write_text("a: 2")
    assert len({*prints, mine.fingerprint()}) == 6
    added = load_plan(write_plan(tmp_path, also={"seen": [f"--config={configuration}"]})).cells()[0]
    before = added.fingerprint()
    configuration.write_text("a: 3")
    assert len({before, added.fingerprint(), cell.fingerprint()}) == 3
    assert cell.fingerprint() == plan.cells()[0].fingerprint()


def test_new_weights_of_the_flow_model_make_its_own_cells_run_again(tmp_path, monkeypatch):
    flow = ["configs/ddpo.yaml", "configs/backbone/shapes_flow.yaml"]
    option = ["configs/ddpo.yaml", "--model.init_args.backbone=StableDiffusion3Backbone"]
    configs = {"unet": ["configs/ddpo.yaml"], "flow": flow, "option": option}
    cells = load_plan(write_plan(tmp_path, configs=configs, seeds=[1])).cells()
    pretrained = tmp_path / "pretrained.yaml"  # as it is written: with all values, and whole names of classes
    pretrained.write_text("{class_path: lit_align.backbones.StableDiffusion3Backbone}")
    cells.append(Cell("pretrained", "key", 1, (f"--config={pretrained}",), steps=("validate",)))

    def made_by() -> dict[str, Any]:
        return {c.config: (c.fingerprint(), c.stages()) for c in cells}

    before = made_by()
    monkeypatch.setattr(harness_plan, "FLOW_WEIGHTS_HASH", "other")
    now = made_by()
    assert [name for name in now if now[name] == before[name]] == ["unet"]
    assert {cell.config: cell.weights for cell in cells}["unet"] == WEIGHTS_HASH


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": [1]}, "unknown seed"),
        ({"because": ""}, "leaves out the pretrained model; say why"),
        ({"guidances": 2}, "guidances: 2 is no list of numbers"),
        ({"guidances": ["a"]}, "is no list of numbers"),
        ({"seeds": []}, "give configs"),
        ({"configs": {"a": ["configs/nothing.yaml"]}}, "there is no configs/nothing.yaml"),
        ({"overrides": ["trainer.max_epochs=1"]}, "overrides: .* --option=value"),
        ({"also": {"seen": ["data.seed=1"]}}, r"also\.seen: .* --option=value"),
        ({"also": {"seen": None}}, r"also\.seen: None is no list"),
        ({"also": {"test": []}}, "'test' cannot name a further test"),
        ({"also": {"a/b": []}}, "'a/b' cannot name a further test"),
        ({"also": {"seen": ["--config=configs/nothing.yaml"]}}, "there is no configs/nothing.yaml"),
        ({"compare": [["ddpo", "prdp"]]}, "no prdp in configs: ddpo"),
        ({"towards": {"prdp": {"reward": {"test": 1.0}}}}, "no prdp in configs: ddpo"),
        ({"towards": {"ddpo": {"reward": {"seen": 1.0}}}}, "no seen in also"),
        ({"side_by_side": {"test": "seen"}}, "side_by_side has .*give joint, metrics, test"),
        (
            {
                "also": {"seen": []},
                "leaves_out": {"ddpo": ["seen"]},
                "side_by_side": {"test": "seen", "metrics": {"ddpo": "reward"}, "joint": "ddpo"},
            },
            "ddpo leaves out seen",
        ),
        ({"leaves_out": {"ddpo": ["seen"]}}, "no seen in also"),
        ({"side_by_side": {"test": "seen", "metrics": {}, "joint": "ddpo"}}, "no seen in also"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(tmp_path, changes, told):
    with pytest.raises(ConfigError, match=told):
        load_plan(write_plan(tmp_path, **changes))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests/benchmarks/plans").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_plans_name_what_exists_and_report_three_seeds(path):
    shown_once = ["alignprop_objectives", "msdda_three"]  # what objectives do to images; no claim
    plan = load_plan(path)
    assert plan.name == path.stem
    assert len(set(plan.seeds)) >= (1 if plan.name in shown_once else 3)


def result(seed: int, reward: float | None, truth: float | None, pairs: int = 256) -> dict[str, Any]:
    """A made-up result; changes are in standard errors of 0.01."""
    metrics = {
        name: {
            "before": 0.5,
            "after": None if by is None else 0.5 + by / 100,
            "difference": None if by is None else by / 100,
            "standard_error": 0.01,
            "num_pairs": pairs,
        }
        for name, by in (("reward", reward), ("truth", truth))
    }
    return {"seed": seed, "test": metrics}


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ([result(3, 3.1, -1.9)], "**passes** in 3 of 3 seeds: the reward rose by 4.0, 5.0, 3.1 s.e."),
        ([result(3, 2.9, 1)], "**inconclusive**: seed 3: reward changed by +2.9 s.e., +3 are needed"),
        ([result(3, -1.5, 1)], "**inconclusive**: seed 3: reward changed by -1.5 s.e., +3 are needed"),
        ([result(3, 0, 0)], "**inconclusive**: seed 3: reward changed by +0.0 s.e., +3 are needed"),
        ([result(3, None, 1)], "**inconclusive**: seed 3: reward changed by +nan s.e., +3 are needed"),
        ([result(3, 5, None)], "**inconclusive**: seed 3: the truth has no value"),
        ([result(3, 5, 5, pairs=255)], "**inconclusive**: seed 3: 255 pairs, 256 are needed"),
        ([], "**inconclusive**: seed 3 has no result"),
        ([result(3, 9, -2.1)], "**fails**: seed 3: truth fell by 2.1 s.e."),
        ([result(3, -4, 1)], "**fails**: seed 3: reward fell by 4.0 s.e."),
    ],
)
def test_verdicts(others, says):
    assert verdict([result(1, 4, 1), result(2, 5, 2), *others], [1, 2, 3]) == says


def made_up(config: str, seed: int, **gains: float) -> dict[str, Any]:
    """A result whose further test raised each metric from 0.5 by so much, with an error of 0.1."""
    metrics = {
        f"reward/{name}": {"before": 0.5, "after": 0.5 + by, "difference": by, "standard_error": 0.1}
        for name, by in gains.items()
    }
    return {"config": config, "seed": seed, "test": metrics, "also": {"table": metrics}}


def test_the_way_to_a_bound_is_reported_of_every_test(plan):
    bounds = {"reward/a": {"test": 0.9, "table": 0.7}, "reward/b": {"test": 1.0}}
    plan = replace(plan, also={"table": []}, towards={"ddpo": bounds})
    lines = shares(plan, "ddpo", [made_up("ddpo", 1, a=0.1), made_up("ddpo", 2, a=-0.2)])
    assert lines[-2:] == [
        "| reward/a | 0.9 | test | 1: 25% ± 25%, 2: -50% ± 25% |",
        "| reward/a | 0.7 | table | 1: 50% ± 50%, 2: -100% ± 50% |",
    ]
    there = replace(plan, towards={"ddpo": {"reward/a": {"test": 0.5}}})
    assert shares(there, "ddpo", [made_up("ddpo", 1, a=0.1)])[-1].endswith("1: there from the beginning |")
    assert shares(plan, "other", [made_up("other", 1, a=0.1)]) == []


def test_joint_training_is_put_beside_training_on_each_task(plan):
    asked = SideBySide("table", {"one": "reward/a", "two": "reward/b"}, "joint")
    plan = replace(plan, also={"table": []}, side_by_side=asked)
    results = []
    for seed in (1, 2):
        joint = made_up("joint", seed, a=0.3, b=0.1) | {"also": {}}  # its own test is on all tasks
        single = made_up("two", seed, a=0.0, b=0.15 * seed)
        results += [made_up("one", seed, a=0.4, b=-0.1), single, joint]
    lines = side_by_side(plan, results)
    error = f"{0.1 / math.sqrt(2):.3f}"
    assert f"| one | 0.900 (+0.400 ± {error}) | 0.400 (-0.100 ± {error}) |" in lines
    assert f"| joint | 0.800 (+0.300 ± {error}) | 0.600 (+0.100 ± {error}) |" in lines
    assert "| pretrained | 0.500 | 0.500 |" in lines
    # The gain of seed 1 alone is within its error: nothing to keep a share of.
    assert lines[-2:] == ["| 1 | 75% | no clear gain alone |", "| 2 | 75% | 33% |"]
    assert side_by_side(plan, results[:2]) == []  # no seed has all


def test_a_configuration_can_leave_out_a_further_test(plan):
    also = {"seen": ["--data.init_args.test_split=train"], "more": ["--data.init_args.test_prompts=3"]}
    found = replace(plan, also=also, leaves_out={"ddpo": ["seen"]}).cells()[0].also
    assert set(found) == {"more"}


@pytest.mark.slow
def test_a_killed_command_goes_on_in_its_processes(tmp_path):
    budget = TINY | {"trainer.max_epochs": 6}
    path = write_plan(tmp_path, budget=budget)
    command = [sys.executable, "-m", "tests.benchmarks.results", f"--plan={path}", "--workers=2"]
    command += [f"--out={tmp_path / 'results'}", f"--work={tmp_path / 'runs'}"]
    harness = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    runs = tmp_path / "runs" / "tiny"
    while not list(runs.glob("*/version_0/checkpoints/last.ckpt")):
        assert harness.poll() is None
        time.sleep(0.05)
    harness.send_signal(signal.SIGTERM)
    assert harness.wait(timeout=60) == 143
    assert not list((tmp_path / "results").glob("**/*.json"))
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    for seed in (1, 2):
        assert read(tmp_path, seed)["curves"]["val/reward"][-1][0] == 24
    assert any(len(read(tmp_path, seed)["commands"]) == 3 for seed in (1, 2))
