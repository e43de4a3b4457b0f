"""Every command and every Python block of the documentation runs, in small: what cannot is named here."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_align.cli import main
from lit_align.shapes import PICK

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "configs" / "README.md",
    *sorted((ROOT / "lit_align").glob("*/README.md")),
    ROOT / "tests" / "benchmarks" / "README.md",
    ROOT / "tests" / "reliability" / "README.md",
]
ELSEWHERE = (
    "python3 -m venv",
    "ruff check",
    "python -m tests.",
    "python -m lit_align.shapes.recipe",
    "python -m lit_align report",
    "python -m lit_align doctor",
    "python -m lit_align serve",
    "hf download",
)
"""Run by CI, by the tests of these programs, and by tests/shapes; and downloads."""

SMALL = """
trainer:
  accelerator: cpu
  max_epochs: 1
  limit_train_batches: 1
  limit_val_batches: 1
  limit_test_batches: 1
  limit_predict_batches: 1
  enable_progress_bar: false
data:
  init_args:
    validation_prompts: 1
    validation_images_per_prompt: 2
    test_prompts: 1
    test_images_per_prompt: 2
    eval_batch: 4
"""
PROMPTS = "data: {init_args: {images_per_prompt: 2, prompts_per_batch: 2}}"
STEPS = "sampler: {init_args: {num_steps: 3, noisy_steps: 2}}"
SMALLER = {
    "ddpo": f"{PROMPTS}\nmodel: {{init_args: {{{STEPS}, updates: 1}}}}",
    "nft": f"{PROMPTS}\nmodel: {{init_args: {{{STEPS}, timesteps: 1}}}}",
    "prdp": f"{PROMPTS}\nmodel: {{init_args: {{{STEPS}, updates: 1}}}}",
    "msdda": f"{PROMPTS}\nmodel: {{init_args: {{{STEPS}, updates: 1}}}}",
    "alignprop": "data: {init_args: {prompts_per_batch: 2}}\n"
    f"model: {{init_args: {{{STEPS}, truncation: {{init_args: {{high: 3}}}}}}}}",
    "spin": "data: {init_args: {pairs_per_batch: 2}}\nmodel: {init_args: {steps: 1, iterations: 1}}",
    "dpo": "data: {init_args: {pairs_per_batch: 2}}",
    "my_method": PROMPTS,
}
"""What makes the configurations small, by the name of the first file."""


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The command lines of a page, without comments."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    found = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return [line for line in found if line and not line.startswith(ELSEWHERE)]


COMMANDS = list(dict.fromkeys(line for page in PAGES for line in commands(page)))
TWO = [line for line in COMMANDS if "--trainer.devices 2" in line or "fsdp.yaml" in line]
FIRST = commands(ROOT / "README.md")
"""What the default suite runs: the commands that a newcomer meets first."""

ONE = [
    pytest.param(line, marks=[] if line in FIRST else [pytest.mark.slow])
    for line in COMMANDS
    if line not in TWO
]


def test_there_are_commands_and_all_are_of_lit_align():
    assert len(COMMANDS) >= 15
    assert {line.split()[:3][2] for line in COMMANDS} == {"lit_align"}


def named_blocks() -> dict[str, str]:
    """Blocks that begin with a comment that names their file."""
    found = {}
    for page in PAGES:
        for block in blocks(page, "python") + blocks(page, "yaml"):
            if name := re.match(r"# (\w+\.(?:py|yaml))", block):
                found[name[1]] = block
    return found


@pytest.fixture
def work(
    tmp_path: Path,
    tiny: Path,
    tiny_xl: Path,
    flow_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder as a reader has it: the configurations, prompts, and the files that the pages show."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    looks = [
        f"a {look} {shape}" for shape in ("circle", "star", "heart") for look in ("red", "blue", "small")
    ]
    counts = [
        f"{count} {shape}s" for count in ("two", "three", "four") for shape in ("circle", "star", "heart")
    ]
    more = [f"{one} and {other}" for one in looks for other in counts]
    (tmp_path / "prompts.txt").write_text("\n".join(looks + counts + more))
    rows = "".join(f"{look}\tPeople\tBasic\t\n" for look in looks)
    (tmp_path / "PartiPrompts.tsv").write_text(f"Prompt\tCategory\tChallenge\tNote\n{rows}")
    for name, text in named_blocks().items():
        (tmp_path / name).write_text(text)
    (tmp_path / "FOLDER").symlink_to(tiny)
    (tmp_path / "FOLDER_XL").symlink_to(tiny_xl)
    (tmp_path / "FLOW").symlink_to(flow_folder("sd3"))
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    monkeypatch.delitem(sys.modules, "my_method", raising=False)
    return tmp_path


def small(line: str, work: Path) -> list[str]:
    """The arguments of a command, and what makes it small and lets it run without a download."""
    arguments = shlex.split(line)[3:]
    if arguments[0] == "export":
        return [*arguments, "--steps", "1"]
    name = Path(arguments[arguments.index("--config") + 1]).stem
    (work / "smaller.yaml").write_text(SMALLER[name])
    files = [part for name in ("small.yaml", "smaller.yaml") for part in ("--config", name)]
    after = max(place for place, argument in enumerate(arguments) if argument == "--config") + 2
    arguments[after:after] = files  # before the options of the page, which win
    folders = {f"configs/backbone/{name}.yaml": "FOLDER" for name in ("sd15", "sd15_any")}
    folders["configs/backbone/sd35.yaml"] = "FLOW"
    if found := [folder for overlay, folder in folders.items() if overlay in arguments]:
        # PickScore and the models are downloads; the tiny ones have their format and 16 pixels a side.
        arguments += [
            "--config",
            "configs/variant/compressibility.yaml",
            "--model.backbone.pretrained",
            *found,
        ]
        size = "[16,24]" if "--model.backbone.size" in arguments else "16"
        arguments += ["--model.backbone.size", size, "--model.sampler.num_steps", "2"]
        if found == ["FLOW"]:
            arguments += ["--model.sampler.noisy_steps", "1"]
    if "configs/backbone/sd15_pairs.yaml" in arguments:
        arguments += ["--config", "configs/variant/compressibility.yaml", "--data.source.path", str(PICK)]
        arguments += ["--model.backbone.pretrained", "FOLDER", "--data.resolution", "16"]
        arguments += ["--model.sampler.num_steps", "2"]
    if "configs/backbone/sdxl.yaml" in arguments:
        arguments += ["--config", "configs/variant/compressibility.yaml"]
        arguments += ["--model.backbone.pretrained", "FOLDER_XL", "--model.sampler.num_steps", "2"]
    return arguments


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the runs that several commands go on with, by configuration."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("line", ONE)
def test_a_command_of_the_pages_runs(line: str, work: Path, runs: Path):
    if "--ckpt_path last" in line or "version_0" in line:
        config = re.search(r"--config (\S+)", line)
        name = config[1] if config else "configs/ddpo.yaml"  # the run that is exported
        kept = runs / Path(name).stem
        if not kept.exists():
            main(small(f"python -m lit_align fit --config {name}", work))
            Path("logs").rename(kept)
        shutil.copytree(kept, "logs")
        if line.split()[3] == "fit":
            line += " --trainer.max_epochs 2"  # the run is complete after one
    if line.split()[3] == "fit" and "pinterest_joint" in line:
        pytest.skip("tests/test_cli.py runs the configuration of several tasks")
    main(small(line, work))


@pytest.mark.slow
@pytest.mark.parametrize("line", TWO)
def test_a_command_on_two_processes_runs(line: str, work: Path):
    shared = ["--data.validation_prompts", "2"]  # one for each process
    subprocess.run([sys.executable, "-m", "lit_align", *small(line, work), *shared], check=True, timeout=600)


def test_the_script_of_the_page_on_configurations_runs(work: Path):
    (script,) = blocks(ROOT / "configs" / "README.md", "python")
    for large, little in {
        "max_epochs=3": "max_epochs=1, accelerator='cpu', limit_val_batches=1",
        "limit_train_batches=8": "limit_train_batches=1",
        "images_per_prompt=8": "images_per_prompt=2, eval_batch=4",
        "prompts_per_batch=16": "prompts_per_batch=2",
        "num_steps=10, noisy_steps=8": "num_steps=3, noisy_steps=2",
    }.items():
        assert large in script
        script = script.replace(large, little)
    names: dict[str, object] = {}
    exec(compile(script, "script", "exec"), names)  # the documentation's own
    assert tuple(names["images"].shape) == (4, 3, 64, 64)  # type: ignore[attr-defined]


ROWS = {
    "**NFT**": "nft",
    "AWM": "awm",
    "PRDP": "prdp",
    "DDPO with Flow-GRPO's loss": "flow_grpo",
    "DDPO": "ddpo",
    "DPOK": "dpok",
    "AlignProp, gradient through all ten steps": "whole",
    "DRaFT-3": "draft_k",
    "AlignProp": "alignprop",
    "AlignProp, the released code's rule": "per_step",
    "DRaFT-LV": "draft_lv",
    "ReFL": "refl",
    "DRaFT-1": "draft_1",
    "finetuning on winners": "sft",
    "SPIN": "spin",
    "Diffusion-DPO": "dpo",
}
"""The rows of the README's table of results, and their configurations in the plan."""


def cells(text: str) -> list[list[str]]:
    """The rows of all tables of a text."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in re.findall(r"^\|.*\|$", text, re.MULTILINE)
    ]


def test_the_table_of_the_readme_is_the_page_of_the_plan():
    page = (ROOT / "tests" / "benchmarks" / "results" / "methods.md").read_text()
    summary, *sections = re.split(r"^## (?=\w+$)", page, flags=re.MULTILINE)[1:]
    means = {row[0]: row for row in cells(summary)}
    seeds = {section.split("\n")[0]: cells(section) for section in sections}
    shown = {row[0]: row for row in cells((ROOT / "README.md").read_text()) if row[0] in ROWS}
    assert shown.keys() == ROWS.keys()
    for name, (_, _, truth, gain, diversity, kl, images, minutes) in shown.items():
        head, *rows = seeds[ROWS[name]]
        runs = [dict(zip(head, row, strict=True)) for row in rows if row[0].isdigit()]
        mean = means[ROWS[name]]
        assert truth.strip("*").split(", ") == [run["truth"].split("-> 0")[1][:4] for run in runs], name
        distances = [float(run[next(c for c in head if c.startswith("KL"))].split()[0]) for run in runs]
        assert [float(one) for one in kl.split(",")] == pytest.approx(distances, abs=0.51), name
        assert f"+0{gain} " in mean[3], name
        assert [diversity, images, minutes] == [mean[4], mean[6], mean[8]], name
