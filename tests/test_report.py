"""Reports: what they say, and that the page stands alone."""

import base64
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from lit_align.backbones import POLICY, REFERENCE
from lit_align.callbacks import RunFolder, RunSummary, TestReport
from lit_align.callbacks.grid import pixels, uint8
from lit_align.cli.run import main
from lit_align.comparison import high_frequency, saturation
from lit_align.data import PromptDataModule
from lit_align.errors import ConfigError
from lit_align.methods import DDPOModule, NFTModule
from lit_align.report import read_run, render
from lit_align.report.chart import _ticks, chart
from lit_align.report.curves import against, at, first_at, read_curves
from lit_align.report.page import table, verdict
from tests.methods.build import draw, make, prompts, randomise, trainer


def metric(before: float, difference: float, error: float = 0.01, wins: float = 0.5) -> dict[str, float]:
    values = {"before": before, "after": before + difference, "difference": difference}
    return values | {"standard_error": error, "win_rate": wins, "win_rate_error": 0.02, "num_pairs": 8}


def run_folder(folder: Path, curve: list[float], distance: list[float], **metrics: dict[str, float]) -> Path:
    """A run as it would lie on disk: a configuration, a test, curves."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {class_path: DDPOModule}\n")
    metrics = {"reward": metric(1.0, 0.5, 0.1, 0.7), "kl": metric(0, 2.0)} | metrics
    (folder / "test.json").write_text(json.dumps({"split": "test", "images": 128, "metrics": metrics}))
    writer = SummaryWriter(str(folder))
    for i, (reward, kl) in enumerate(zip(curve, distance, strict=True)):
        writer.add_scalar("val/reward", reward, 64 * i)
        writer.add_scalar("val/kl", kl, 64 * i)
    writer.close()
    return folder


# ---- what is measured


def test_saturation_is_that_of_hsv():
    grey, red, pink = torch.full((3, 4, 4), 0.3), torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.5)
    red[0], pink[0] = 1.0, 1.0
    assert saturation(torch.stack([grey, red, pink, torch.zeros(3, 4, 4)])).tolist() == [0, 1, 0.5, 0]


def test_fine_texture_is_what_averaging_takes_away():
    flat, stripes, coarse = torch.full((3, 5, 7), 0.7), torch.zeros(3, 5, 7), torch.zeros(3, 5, 7)
    stripes[:, :, ::2] = 1.0
    coarse[:, :2, :4] = 1.0
    torch.testing.assert_close(
        high_frequency(torch.stack([flat, stripes, coarse])), torch.tensor([0.0, 0.5, 0.0])
    )


# ---- curves


def test_curves_are_read_from_events_and_tables_and_the_newest_point_of_a_step_counts(tmp_path):
    writer = SummaryWriter(str(tmp_path / "events"))
    for step, value in ((0, 1.0), (64, 2.0), (64, 3.0), (128, float("nan"))):
        writer.add_scalar("val/reward", value, step)
    writer.close()
    assert read_curves(tmp_path / "events") == {"val/reward": [(0, 1.0), (64, 3.0)]}
    (tmp_path / "metrics.csv").write_text("step,epoch,val/reward,val/kl\n0,0,1.5,\n64,,2.5,0.25\n")
    assert read_curves(tmp_path) == {"val/reward": [(0, 1.5), (64, 2.5)], "val/kl": [(64, 0.25)]}
    assert read_curves(tmp_path / "nothing") == {}


def test_a_run_that_went_on_with_another_logger_has_the_curves_of_both(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step, value in ((0, 1.0), (64, 2.0), (96, 9.0)):  # the run goes on from 64
            writer.add_scalar("val/reward", value, step)
    (events,) = tmp_path.iterdir()
    (tmp_path / "metrics.csv").write_text("step,epoch,val/reward\n96,,3.0\n128,,4.0\n")
    os.utime(events, (1, 1))
    assert read_curves(tmp_path) == {"val/reward": [(0, 1.0), (64, 2.0), (96, 3.0), (128, 4.0)]}
    os.utime(tmp_path / "metrics.csv", (0, 0))
    assert read_curves(tmp_path) == {"val/reward": [(0, 1.0), (64, 2.0), (96, 9.0), (128, 4.0)]}


def test_runs_are_compared_at_equal_images_and_equal_distance():
    curve = [(0.0, 1.0), (64.0, 2.0), (128.0, 4.0)]
    assert [at(curve, x) for x in (0, 32, 64, 96, 128, 129, -1)] == [1, 1.5, 2, 3, 4, None, None]
    path = against({"x": [(0, 0.0), (1, 2.0), (2, 1.0)], "y": [(0, 5.0), (2, 7.0)]}, "x", "y")
    assert path == [(0.0, 5.0), (1.0, 7.0)]
    assert first_at([(0, 0.0), (2, 10.0), (1, 7.0)], 1.0) == 5.0
    assert first_at(path, 1.0) == 7.0
    assert first_at(path, 1.5) is None


def test_a_chart_holds_all_points_and_ticks_are_round():
    assert _ticks([0.0, 128.0]) == [0, 50, 100, 150]
    assert _ticks([0.61, 0.63]) == [0.61, 0.615, 0.62, 0.625, 0.63]
    assert _ticks([2.0, 2.0])[0] < 2 < _ticks([2.0, 2.0])[-1]
    assert _ticks([0.0, 2e-13]) == [0, 5e-14, 1e-13, 1.5e-13, 2e-13]  # the KL after a step that is too small
    drawn = chart("a <title>", {"one": [(0, 1.0), (64, 2.0)], "two": [(0, 1.5)]})
    assert drawn.count("<circle") == 3
    assert "a &lt;title&gt;" in drawn
    places = [float(x) for x in re.findall(r'c[xy]="([\d.-]+)"', drawn)]
    assert min(places) > 0
    assert max(places) < 340
    assert chart("a point is no line", {"one": [(0, 1.0)]}) == ""


# ---- the page


def test_the_verdict_says_what_is_clear_and_what_warns(tmp_path):
    signs = {"diversity": metric(0.2, -0.1), "saturation": metric(0.5, 0.01), "truth": metric(0.6, -0.2)}
    signs["high_frequency"] = metric(0.03, 0.01, error=0.02)
    run = read_run(run_folder(tmp_path / "a", [1, 2], [0, 1], **signs))
    assert [list(row.values()) for row in table(run)[:2]] == [
        ["reward", "1.0000", "1.5000", "+0.5000 ± 0.1000", "70% (66% to 74%)", "up"],
        ["kl", "", "2.0000", "", "", ""],
    ]
    assert {row["name"]: row["style"] for row in table(run)[2:]} == {
        "diversity": "clear",
        "saturation": "",
        "truth": "down",
        "high_frequency": "",
    }
    said = verdict(run)
    assert said[0] == "reward +0.5000 ± 0.1000, better in 70% of the images"
    assert any(line.startswith("diversity -0.1000") for line in said)
    assert not any("saturation" in line for line in said)  # by 2 %, of which a page does not speak
    assert not any("high_frequency" in line for line in said)  # by a third, within its error
    assert said[-1].startswith("the reward rises while the truth falls")


def test_what_has_no_error_has_no_interval(tmp_path):
    """Where all images are better, an interval from 100 % to 100 % would promise the same of others."""
    metrics = {"reward": metric(1.0, 0.5, wins=1.0) | {"win_rate_error": 0.0}}
    run = read_run(run_folder(tmp_path / "all", [1, 2], [0, 1], **metrics))
    assert table(run)[0]["wins"] == "100%"
    alone = {"reward": metric(1.0, 0.5) | {"standard_error": None, "win_rate_error": None}}
    run = read_run(run_folder(tmp_path / "one", [1, 2], [0, 1], **alone))
    assert verdict(run)[0].endswith("better in 50% of the images; its error is unknown, so inconclusive")
    unclear = verdict(read_run(run_folder(tmp_path / "b", [1, 2], [0, 1], reward=metric(1, 0.1, 0.2))))
    assert unclear == [
        "reward +0.1000 ± 0.2000, better in 50% of the images; within two standard errors, so inconclusive"
    ]


def test_a_run_without_a_result_is_refused(tmp_path):
    (tmp_path / "version_0").mkdir()
    with pytest.raises(ConfigError, match=r"neither test\.json nor validation\.json"):
        read_run(tmp_path / "version_0")
    metric = '{"split": "test", "images": 1, "metrics": {"reward": %s}}'
    for text in ("{", metric % "null", metric % "[1]", metric % '{"before": "0.5"}'):
        (tmp_path / "version_0" / "test.json").write_text(text)
        with pytest.raises(ConfigError, match="cannot be read"):
            read_run(tmp_path / "version_0")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("test_images/metadata.jsonl", '{"index": 0, "before": "a.png", "after": "a.png"}\n'),
        ("test_images/metadata.jsonl", "none\n"),
        ("metrics.csv", "step,val/reward\n0,high\n"),
        ("validation.json", '{"split": "validation", "images": 1, "metrics": {}, "run": ["a"]}'),
        ("test.json", '{"split": "test", "images": 1, "metrics": {}, "run": {"sampler": "DDIM"}}'),
    ],
)
def test_a_file_that_is_not_as_a_run_writes_it_is_one_sentence(file, text, tmp_path):
    run = run_folder(tmp_path / "run", [], [])
    for events in run.glob("events*"):
        events.unlink()
    (run / file).parent.mkdir(exist_ok=True)
    (run / file).write_text(text)
    (run / file).with_name("a.png").touch()
    with pytest.raises(ConfigError, match=rf"report: {run} has a file that is not as its run wrote it \("):
        read_run(run)


def test_the_command_compares_runs_and_leaves_their_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [
        run_folder(tmp_path / "logs/ddpo/version_0", [1.0, 2.0, 3.0], [0.0, 1.0, 4.0]),
        run_folder(tmp_path / "logs/ddpo/version_1", [1.0, 1.5], [0.0, 2.0]),
    ]
    main(["report", *map(str, runs)])
    page = (tmp_path / "report.html").read_text()
    # At 64 images 2.0 and 1.5; at a KL of 2 the first run is a third of the way from 2.0 to 3.0.
    cells = re.findall(r"<td>val/reward</td><td>([\d.]+)</td><td>([\d.]+)</td>", page)
    assert cells == [("2.0000", "1.5000"), ("2.3333", "1.5000")]
    found = json.loads((tmp_path / "report.json").read_text())
    assert len(found["runs"]) == 2
    assert [row["at"] for row in found["at_equal"]] == ["64 images", "kl 2"]
    assert found["at_equal"][1]["values"][0] == pytest.approx([7 / 3, 1.5])
    assert (tmp_path / "report.csv").read_text().count("\n") == 1 + 2 * 2
    with pytest.raises(SystemExit, match="2"):
        main(["report", "logs/ddpo/version_9"])
    assert "there is no folder logs/ddpo/version_9" in capsys.readouterr().err


def moved(tiny: Path) -> DDPOModule:
    module = make(DDPOModule, tiny, num_steps=2)
    randomise(module)
    return module


def few() -> PromptDataModule:
    return prompts(test_prompts=3, test_images_per_prompt=2)


@pytest.fixture(scope="module")
def tested(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that was tested twice, with prompts that are no clean HTML."""
    folder = tmp_path_factory.mktemp("tested")
    module, data = moved(tiny), few()
    callbacks = [RunFolder(folder), RunSummary(), TestReport()]
    logger = CSVLogger(folder, name=None, version="")
    for _ in range(2):
        testing = trainer(folder, 1, *callbacks, logger=logger)
        testing.test(module, data, verbose=False)
    return folder


def test_a_test_leaves_a_page_with_its_images(tested: Path):
    for number in ("", "-2"):
        page = (tested / f"report{number}.html").read_text()
        rows = [json.loads(line) for line in (tested / f"test{number}_images/metadata.jsonl").open()]
        assert len(rows) == 3  # the first image of each prompt
        assert [row["index"] for row in rows] == [0, 2, 4]
        assert page.count("data:image/png;base64,") == 6
        assert Image.open(tested / f"test{number}_images" / rows[0]["before"]).size == (16, 16)
        for row in rows:
            assert row["prompt"] in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is loaded from elsewhere


def test_the_images_of_a_page_have_their_own_scores(tested: Path, tiny: Path):
    run, data = read_run(tested, tested / "test.json"), few()
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    images = [uint8(draw(moved(tiny), batch, "test", weights).images) for weights in (REFERENCE, POLICY)]
    page = render([run])
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    gains = [float(gain) for gain in re.findall(r'data-gain="([^"]+)"', page)]
    lines = (tested / "test.csv").read_text().splitlines()
    header = lines[0].split(",")
    for number, one in enumerate(run.shown):
        row = dict(zip(header, lines[1 + 2 * number].split(","), strict=True))
        scores = float(row["base/reward"]), float(row["reward"])
        assert one.scores["reward"] == scores
        assert gains[number] == scores[1] - scores[0]
        assert not torch.equal(*(drawn[2 * number] for drawn in images))
        for side, file in enumerate((one.before, one.after)):
            assert np.array_equal(np.asarray(Image.open(file)), pixels(images[side][2 * number]))
            assert base64.b64decode(sources[2 * number + side]) == file.read_bytes()


def test_prompts_are_text_and_not_html(tested: Path):
    run = read_run(tested, tested / "test.json")
    shown = [type(one)("<script>alert('x')</script>", one.before, one.after, one.scores) for one in run.shown]
    page = render([type(run)(**(vars(run) | {"shown": shown}))])
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.slow
def test_a_browser_shows_and_sorts_the_images(tested: Path):
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command = ["chromium", *options, (tested / "report.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "3 of 3 prompts" in shown  # written by the script of the page
    assert shown.count("<figure") == 3


def test_methods_without_a_likelihood_are_reported_too(tiny: Path, tmp_path: Path):
    module = make(NFTModule, tiny, num_steps=2, eta=0.0)
    testing = trainer(tmp_path, 1, RunFolder(tmp_path), RunSummary(), TestReport())
    testing.test(module, prompts(test_prompts=2, test_images_per_prompt=1), verbose=False)
    assert "drift" in (tmp_path / "report.html").read_text()
