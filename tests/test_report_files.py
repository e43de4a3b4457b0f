"""Files of reports: what they never replace, and the commands that make a run and its test again."""

import html
import shlex

import pytest

from lit_align.cli.run import main
from lit_align.errors import ConfigError
from lit_align.files import numbered
from lit_align.report import read_run, render
from tests.methods.build import prompts
from tests.test_report_compared import compared, measured_again

# ---- what is never replaced


@pytest.mark.parametrize(
    "out", ["page.json", "page", "test.html", "validation.html", "metrics.html", "mine.html"]
)
def test_a_report_replaces_nothing_but_reports(out, tmp_path, capsys):
    run = compared(tmp_path, "run")
    for name in ("test.csv", "metrics.csv"):
        (run / name).write_text("prompt,step,val/reward\n0,0,1.5\n")
    (run / "mine.html").write_text("<title>mine</title>")
    before = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(run), "--out", str(run / out)])
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    assert f"--out: {run}" in capsys.readouterr().err
    for _ in range(2):  # an earlier report is replaced
        main(["report", str(run), "--out", str(run / "report.html")])
    assert len(list(run.glob("report.*"))) == 3


def test_the_page_of_an_earlier_test_stays(tmp_path):
    run = compared(tmp_path, "run")
    (run / "report.html").write_text("the first test's")
    (run / "test-2.json").write_bytes((run / "test.json").read_bytes())
    main(["report", str(run)])
    assert (run / "report.html").read_text() == "the first test's"
    assert (run / "report-2.html").exists()


# ---- to make it again


def commands(page: str) -> list[list[str]]:
    lines = html.unescape(page.replace("<pre>", "")).splitlines()
    return [shlex.split(line) for line in lines if line.startswith("python -m ")]


def test_files_are_listed_by_their_numbers(tmp_path):
    assert numbered(tmp_path / "none" / "config.yaml") == []
    for name in (
        "config-2.yaml",
        "config-10.yaml",
        "config-test-11.yaml",
        "config-12.yml",
        "myconfig-13.yaml",
    ):
        (tmp_path / name).touch()
    assert [path.name for path in numbered(tmp_path / "config.yaml")] == ["config-2.yaml", "config-10.yaml"]


def test_a_fit_is_made_again_by_its_newest_configuration(tmp_path):
    run = compared(tmp_path / "my runs", "run")
    page = render([read_run(run)])
    fit = ["python", "-m", "lit_align", "fit", "--config"]
    assert commands(page) == [[*fit, f"{run}/config.yaml"]]
    (run / "config-2.yaml").write_text("{model: {class_path: NFTModule}, ckpt_path: its/last.ckpt}")
    page = render([read_run(run)])
    assert commands(page) == [[*fit, f"{run}/config-2.yaml", "--ckpt_path", "null"]]
    assert "<pre># config-2.yaml is of a run that went on" in page
    assert "NFT, trained on" in page
    assert "its/last.ckpt" in page
    (run / "config.yaml").write_text("{model: {class_path: DDPOModule}, ckpt_path: of another.ckpt}")
    (found,) = commands(render([read_run(run)]))
    assert found[-2:] == ["--ckpt_path", "of another.ckpt"]
    (run / "config-2.yaml").write_text("model: [1")
    with pytest.raises(
        ConfigError, match=r"config-2.yaml is not a configuration; put back what the run wrote"
    ):
        render([read_run(run)])


def test_a_test_is_made_again_by_its_own_configuration(tiny, tmp_path):
    (tmp_path / "config-test.yaml").write_text("of a test that was killed")
    data = prompts(test_prompts=1, test_images_per_prompt=1)
    texts = ["{model: {class_path: DDPOModule}, number: 1}", "{model: {class_path: DDPOModule}, number: 2}"]
    for number, text in enumerate(texts, 2):
        assert measured_again(tiny, tmp_path, data, text=text)["config"] == f"config-test-{number}.yaml"
    for page, number in (("report.html", 2), ("report-2.html", 3)):
        (found,) = commands((tmp_path / page).read_text())
        assert found == [
            "python",
            "-m",
            "lit_align",
            "test",
            "--config",
            f"{tmp_path}/config-test-{number}.yaml",
        ]
    assert texts[1] in (tmp_path / "report-2.html").read_text()
    assert read_run(tmp_path).method == "DDPO"
