"""Runs through the real entry point, as small as can be; ``done`` is a finished run that many tests copy."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
import yaml
from diffusers import StableDiffusionPipeline
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import lit_align.methods.alignprop
from lit_align.cli import main
from lit_align.cli.align import AlignCLI
from lit_align.methods import DDPOModule
from lit_align.samplers import DDIM
from lit_align.shapes import PICK, PIPELINE

ROOT = Path(__file__).parents[1]
DDPO = ROOT / "configs" / "ddpo.yaml"
FSDP = ROOT / "configs" / "backbone" / "fsdp.yaml"
METHODS = sorted(ROOT.glob("configs/*.yaml"))
VARIANTS = sorted(ROOT.glob("configs/variant/*.yaml"))
SMALL = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=1",
    "--trainer.accelerator=cpu",
    "--data.images_per_prompt=2",
    "--data.prompts_per_batch=2",
    "--data.validation_prompts=2",
    "--data.validation_images_per_prompt=2",
    "--data.test_prompts=2",
    "--data.test_images_per_prompt=2",
    "--data.eval_batch=4",
]
STEPS = ["--model.sampler.num_steps=3", "--model.sampler.noisy_steps=2"]
"""A short chain: more steps take longer and run no other line."""
FEW = ["--data.validation_prompts=1"]
"""Two held-out images, which have a diversity."""
ON_PAIRS = {"dpo", "sft", "spin"}
"""Methods on pairs of images: no reward scores what they train on."""
OWN = {
    "alignprop": ["--model.truncation.high=3"],
    "msdda": ["--model.updates=1"],
    "nft": ["--model.timesteps=2"],
}
OF_PROMPTS = ("--data.images_per_prompt", "--data.prompts_per_batch")
SMALL_PAIRS = [a for a in SMALL if not a.startswith(OF_PROMPTS)] + ["--data.pairs_per_batch=2"]
BRIGHT = [
    "--model.rewards.rewards={brightness: {class_path: Brightness}, redness: {class_path: Redness}}",
    "--model.rewards.weights={brightness: 1.0}",
]
"""Rewards of images of any size; the judge of Shapes has one size."""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit_align"])


@pytest.fixture(scope="module")
def small(tiny: Path) -> list[str]:
    """Arguments that make DDPO's configuration small; the model is a tiny one of the same format."""
    model = [
        f"--model.backbone.pretrained={tiny}",
        *STEPS,
    ]
    return ["--config", str(DDPO), *SMALL, *model, *BRIGHT]


@pytest.fixture(scope="module")
def finished(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``logs/ddpo/version_0``, a run of two epochs that is over."""
    folder = tmp_path_factory.mktemp("finished")
    with chdir(folder):
        main(["fit", *small])
    return folder


@pytest.fixture
def done(finished: Path) -> Path:
    """A copy of the finished run in the folder of this test."""
    shutil.copytree(finished / "logs", "logs")
    return Path("logs/ddpo/version_0")


def scalars(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    events.Reload()
    return events


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in scalars(run).Scalars(tag)]


def files(folder: Path | str) -> dict[str, bytes]:
    """All files below a folder, with their content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that ends early says."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(list(arguments))
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return out + err


# ---- what is shipped


@pytest.mark.parametrize("config", [path for path in METHODS if path != DDPO], ids=lambda path: path.stem)
def test_every_method_trains_through_the_real_entry_point(config: Path):
    on_pairs = config.stem in ON_PAIRS
    sizes = [*(SMALL_PAIRS if on_pairs else SMALL), *OWN.get(config.stem, [])]
    main(["fit", "--config", str(config), *sizes, *STEPS, "--trainer.max_epochs=1", *FEW])
    run = Path("logs", config.stem, "version_0")
    names = scalars(run).Tags()["scalars"]
    wanted = {"train/loss", "train/reward", "val/reward", "val/kl", "val/diversity", "val/truth"}
    assert wanted - ({"train/reward"} if on_pairs else set()) <= set(names)
    assert not [name for name in names if name == "epoch" or name.startswith("final/")]
    assert (run / "adapter" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("config", METHODS, ids=lambda path: path.stem)
def test_the_chain_that_ships_is_possible(config: Path):
    """The runs here are of shorter chains."""
    options = yaml.safe_load(config.read_text())["model"]["init_args"]
    scheduler = json.loads((PIPELINE / "scheduler" / "scheduler_config.json").read_text())
    steps = DDIM(scheduler, **options["sampler"]["init_args"]).num_steps
    assert options.get("timesteps", 1) <= steps
    if window := options.get("truncation"):
        truncation = getattr(lit_align.methods.alignprop, window["class_path"])(**window["init_args"])
        assert truncation.attached(steps, torch.Generator()).any()


class Parsed(Exception):
    """Raised instead of what comes after the parser."""


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations of the commands, of which nothing is built."""
    found: list[Any] = []

    def stop(self: AlignCLI) -> None:
        found.append(self.config[self.subcommand])
        raise Parsed

    monkeypatch.setattr(AlignCLI, "before_instantiate_classes", stop)
    return found


@pytest.mark.parametrize("config", VARIANTS, ids=lambda path: path.stem)
def test_every_overlay_is_read_after_the_configuration_that_it_names(config: Path, parsed):
    (base,) = re.findall(r"Overlay for (configs/\w+\.yaml)", config.read_text().splitlines()[0])
    with pytest.raises(Parsed):
        main(["fit", "--config", str(ROOT / base), "--config", str(config)])
    assert parsed[0].model.init_args.backbone.class_path.endswith("StableDiffusionBackbone")


def _named_rewards(config: Path) -> dict[tuple[str, str], set[str]]:
    """The options of each reward of a configuration, by its name and class."""
    options = yaml.safe_load(config.read_text()).get("model", {}).get("init_args", {})
    bank = (options.get("rewards") or {}).get("init_args", {}).get("rewards", {})
    return {(name, one["class_path"]): set(one.get("init_args", {})) for name, one in bank.items()}


@pytest.mark.parametrize("config", METHODS, ids=lambda path: path.stem)
def test_no_overlay_takes_a_model_of_a_reward_from_the_configuration_before_it(config: Path):
    """A class that is named twice keeps its options: a published reward model would be that of Shapes."""
    base = _named_rewards(config)
    for overlay in [*VARIANTS, *sorted(ROOT.glob("configs/backbone/*.yaml"))]:
        for which, options in _named_rewards(overlay).items():
            assert base.get(which, set()) <= options, (overlay.name, which)


def test_two_experts_of_a_real_model_train_one_batch(tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(f"a star number {i}" for i in range(200)))
    arguments = [
        f"--config={ROOT}/configs/msdda.yaml",
        f"--config={ROOT}/configs/variant/msdda_sd15.yaml",
        *SMALL,
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=1",
        f"--model.backbone.pretrained={tiny}",
        "--model.sampler.num_steps=2",
        "--model.updates=1",
        "--model.rewards.rewards.preference={class_path: JPEGIncompressibility}",
    ]
    main(["fit", *arguments])
    curves = set(scalars(Path("logs/msdda/version_0")).Tags()["scalars"])
    assert {"val/reward/preference", "val/reward/small_file", "train/kl/small_file"} <= curves


def test_a_run_leaves_what_it_promises(capsys):
    main(["fit", "--config", str(DDPO), *SMALL, *STEPS])
    run = Path("logs/ddpo/version_0")
    events = scalars(run)
    assert [step for step, _ in curve(run, "val/reward")] == [0, 4, 8]
    assert curve(run, "progress/images") == [(4, 4.0), (8, 8.0)]
    wanted = {"train/clip_fraction", "train/kl", "train/grad_norm", "train/lr", "perf/images_per_second"}
    wanted |= {"perf/sampling_fraction", "progress/reward_queries", "train/reward/truth", "val/reward/clip"}
    assert wanted <= set(events.Tags()["scalars"])
    assert [image.step for image in events.Images("validation")] == [0, 4, 8]
    for stage, steps in (("train_histogram", [4, 8]), ("val_histogram", [0, 4, 8])):
        assert [one.step for one in events.Histograms(f"{stage}/reward/clip")] == steps
    (start,) = (
        HParamsPluginData.FromString(content).session_start_info
        for tag, content in events.PluginTagToContent("hparams").items()
        if tag.endswith("session_start_info")
    )
    assert start.hparams["model.kl_target"].number_value == 0.03
    assert start.hparams["model.sampler"].string_value == "DDIM"
    grids = [path.name for path in sorted((run / "images").iterdir())]
    assert grids == [f"validation_{images:08d}.png" for images in (0, 4, 8)]
    before, after = (Image.open(run / "images" / name) for name in (grids[0], grids[-1]))
    assert after.width > 1.9 * before.width  # before beside after
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(".lora_" in name for name in checkpoint["state_dict"])
    assert (run / "checkpoints" / "last.ckpt").stat().st_size < 20e6
    report = json.loads((run / "validation.json").read_text())
    assert report["metrics"]["reward"]["num_pairs"] == 4
    StableDiffusionPipeline.from_pretrained(PIPELINE).load_lora_weights(run / "adapter")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["class_path"].endswith("DDPOModule")
    assert saved["trainer"]["logger"]["init_args"]["version"] is None  # so that it makes a run of its own
    modes = {path.stat().st_mode & 0o777 for path in run.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~_umask()}
    printed = capsys.readouterr().out
    for told in (
        "before",
        "win rate",
        str(run / "adapter"),
        "on cpu, 32-true",
        "epoch 2/2  batch 1/1  reward",
    ):
        assert told in printed
    assert "nan" not in printed
    assert printed.count("truth") == 4  # three validations, and one row of the table


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_run_in_a_job_says_only_what_helps(small, tmp_path):
    """Not on a terminal: no bars, no control codes, nothing of other libraries; whatever the locale.

    Nor does onnxruntime gather what it would send its makers.
    """
    job = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "lit_align", "fit", *small],
        env=os.environ | job | {"LC_ALL": "C", "PYTHONUTF8": "0"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert not done.stderr
    read, *lines = done.stdout.splitlines()
    assert read == "lit_align: ShapesPrompts: 2565120 prompts read"
    assert lines[0].startswith("DDPOModule trains")
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    beginnings = ["validation after 0", "epoch 1/2", "validation after 4", "epoch 2/2", "validation after 8"]
    assert all(line.startswith(begun) for line, begun in zip(lines[1:6], beginnings, strict=True))
    assert "left" in lines[2]
    assert "±" in done.stdout
    assert not list((tmp_path / "cache").rglob("*onnxruntime*"))


def test_help_comes_at_once_and_names_every_command():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lit_align", "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("usage: python -m lit_align")
    assert all(f"\n  {command} " in done.stdout for command in AlignCLI.subcommands())
    assert "torch" not in done.stderr  # nothing heavy was imported


@pytest.mark.parametrize(
    ("method", "overlays", "model"),
    [
        ("ddpo", ["sd15"], "tiny"),
        ("ddpo", ["sd15", "sd21"], "tiny_v"),
        pytest.param("ddpo", ["sdxl"], "tiny_xl", marks=pytest.mark.slow),  # the next has it too
        ("ddpo", ["sdxl", "sdxl_turbo"], "tiny_xl"),
        ("ddpo", ["sdxl", "sdxl_lightning"], "single_xl"),
        ("nft", ["sd15_any"], "tiny"),
        pytest.param("nft", ["sdxl_any"], "tiny_xl", marks=pytest.mark.slow),
        pytest.param("prdp", ["sd15_any"], "tiny", marks=pytest.mark.slow),
        pytest.param("prdp", ["sdxl_any"], "tiny_xl", marks=pytest.mark.slow),
        pytest.param("alignprop", ["sd15_any"], "tiny", marks=pytest.mark.slow),
        pytest.param("alignprop", ["sdxl_any"], "tiny_xl", marks=pytest.mark.slow),
    ],
)
def test_overlays_for_real_models_train_one_batch(method, overlays, model, request, tmp_path):
    """Only the pretrained models, the data and sizes are replaced."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"a star number {i}" for i in range(200)))
    reward = "SoftJPEGCompressibility" if method == "alignprop" else "JPEGIncompressibility"
    arguments = [
        f"--config={ROOT}/configs/{method}.yaml",
        *(f"--config={ROOT}/configs/backbone/{name}.yaml" for name in overlays),
        *SMALL,
        "--trainer.max_epochs=1",
        f"--model.backbone.pretrained={request.getfixturevalue(model)}",
        "--model.sampler.num_steps=3",
        *([f"--model.backbone.config={request.getfixturevalue('tiny_xl')}"] if "single" in model else []),
        f"--model.rewards.rewards={{jpeg: {{class_path: {reward}}}}}",
        "--model.rewards.weights={jpeg: 1.0}",
        *(["--model.updates=1"] if method in ("ddpo", "prdp") else OWN[method]),
    ]
    main(["fit", *arguments])
    assert {"train/reward/jpeg", "val/reward/jpeg"} <= set(
        scalars(Path("logs", method, "version_0")).Tags()["scalars"]
    )


@pytest.mark.parametrize(
    "method", ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "spin"))]
)
def test_an_overlay_for_pairs_trains_one_batch(method, tiny):
    """The pairs that ship, as files of Pick-a-Pic; the model and sizes are replaced."""
    main(
        [
            "fit",
            f"--config={ROOT}/configs/{method}.yaml",
            f"--config={ROOT}/configs/backbone/sd15_pairs.yaml",
            *SMALL_PAIRS,
            "--trainer.max_epochs=1",
            f"--data.source.path={PICK}",
            "--data.resolution=16",
            f"--model.backbone.pretrained={tiny}",
            "--model.sampler.num_steps=3",
            "--model.rewards.rewards={jpeg: {class_path: JPEGIncompressibility}}",
            "--model.rewards.weights={jpeg: 1.0}",
            *(["--model.beta=2000"] if method != "sft" else []),
        ]
    )
    names = scalars(Path("logs", method, "version_0")).Tags()["scalars"]
    assert {"train/loss", "val/reward/jpeg"} <= set(names)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_overlay_for_any_method_is_that_of_ddpo_without_its_own_values(name):
    def given(file, part):
        return yaml.safe_load((ROOT / f"configs/backbone/{file}.yaml").read_text())[part]["init_args"]

    own = {"advantages", "clip_range", "kl_target", "updates", "timestep_fraction"}
    assert given(f"{name}_any", "model") == {k: v for k, v in given(name, "model").items() if k not in own}
    assert given(f"{name}_any", "data") == {"source": given(name, "data")["source"]}


def test_full_fine_tuning_leaves_a_pipeline(small, tiny):
    main(["fit", *small, "--trainer.max_epochs=1", f"--config={ROOT}/configs/backbone/full.yaml"])
    folder = Path("logs/ddpo/version_0/adapter")
    base = load_file(next(tiny.glob("unet/*.safetensors")))
    trained = load_file(next(folder.glob("unet/*.safetensors")))
    assert any(not torch.equal(base[name], trained[name]) for name in base)
    StableDiffusionPipeline.from_pretrained(folder)


def test_mixed_precision_trains(small):
    main(["fit", *small, "--trainer.max_epochs=1", "--trainer.precision=bf16-mixed"])
    assert all(value == value for _, value in curve(Path("logs/ddpo/version_0"), "train/loss"))


def test_a_fast_dev_run_leaves_no_files_and_a_terminal_gets_a_bar(small, tmp_path, capsys):
    main(["fit", *small, "--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=true"])
    assert not list(tmp_path.rglob("*"))
    printed = capsys.readouterr().out
    assert "epoch 1/1" in printed
    assert "reward: " in printed
    assert "v_num" not in printed
    assert "batch 1/1" not in printed  # the lines


def test_print_config_runs_again_and_a_saved_config_too(small, done, capsys):
    with pytest.raises(SystemExit) as exited:
        main(["fit", *small, "--trainer.max_epochs=1", "--print_config"])
    assert exited.value.code == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    main(["fit", "--config=printed.yaml"])
    curves = [curve(Path(f"logs/ddpo/version_{i}"), "train/reward")[0] for i in range(2)]
    assert curves[0] == curves[1]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", f"--config={done}/config.yaml", "--trainer.max_epochs=1", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(Path("printed.yaml").read_text())


# ---- going on


def assert_equal(one: Any, two: Any) -> None:
    """Equality to the bit through nested lists and dicts."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            assert_equal(first, second)
    else:
        assert one == two or (one != one and two != two)


@pytest.fixture(scope="module")
def long(small: list[str]) -> list[str]:
    """Four rollout batches in two epochs, with all that a checkpoint must hold."""
    return [
        *small,
        "--trainer.limit_train_batches=2",
        "--model.advantages=PerPromptAdvantages",
        "--model.kl_target=1e-3",
        "--model.optimisation.lr_scheduler=torch.optim.lr_scheduler.LinearLR",
        "--model.optimisation.lr_scheduler.init_args.total_iters=8",
        "--data.source.kinds=[open]",
    ]


@pytest.fixture(scope="module")
def whole(long: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with chdir(folder):
        main(["fit", *long])
    return folder / "logs/ddpo/version_0"


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("look_back", 1),
        ("look_back", 2),
        pytest.param("look_back", 3, marks=pytest.mark.slow),  # so have the slow tests of each method
        pytest.param("look_back", 4, marks=pytest.mark.slow),  # in mid-epoch too
        ("validation_step", 2),
    ],
    ids=["first", "mid-epoch", "first-of-epoch", "last", "in a validation"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(method, call, long, whole, monkeypatch):
    with monkeypatch.context() as patch:
        real, calls = getattr(DDPOModule, method), []

        def dying(self: DDPOModule, *arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return real(self, *arguments)

        patch.setattr(DDPOModule, method, dying)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main(["fit", *long])
    main(["fit", *long, "--ckpt_path=last"])
    run = Path("logs/ddpo/version_0")
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    states = [torch.load(one / "checkpoints/last.ckpt", weights_only=True) for one in (whole, run)]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "progress", "tasks", "global_step"):
        assert_equal(states[0][part], states[1][part])
    best = [
        next(
            value["best_model_score"]
            for name, value in state["callbacks"].items()
            if "BestCheckpoint" in name
        )
        for state in states
    ]
    assert torch.equal(*best)
    assert_equal(*(state["callbacks"]["ImageGrids"] for state in states))
    loaders = [state["loops"]["fit_loop"]["state_dict"]["combined_loader"] for state in states]
    assert loaders[0] == loaders[1]
    for tag in ("train/reward", "val/reward"):
        assert curve(whole, tag) == curve(run, tag)
    assert {path.name for path in run.glob("config*.yaml")} == {"config.yaml", "config-2.yaml"}
    assert (run / "validation.csv").read_bytes() == (whole / "validation.csv").read_bytes()
    assert_equal(*(load_file(one / "adapter/pytorch_lora_weights.safetensors") for one in (whole, run)))


def test_a_terminated_run_says_so_and_can_be_resumed(small, monkeypatch):
    with monkeypatch.context() as patch:
        collect, calls = DDPOModule.collect, []

        def terminated(self: DDPOModule, *arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return collect(self, *arguments)

        patch.setattr(DDPOModule, "collect", terminated)
        arguments = [*small, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
        with pytest.raises(SystemExit) as ended:
            main(["fit", *arguments])
    assert ended.value.code == 128 + signal.SIGTERM
    main(["fit", *arguments, "--ckpt_path=last"])
    assert [step for step, _ in curve(Path("logs/ddpo/version_0"), "train/reward")] == [4, 8]


def test_a_complete_run_says_so_before_anything_is_loaded(small, done, capsys, monkeypatch):
    before = files(".")
    monkeypatch.setattr(AlignCLI, "instantiate_classes", lambda self: pytest.fail("something was loaded"))
    told = said(capsys, "fit", *small, "--ckpt_path=last")
    assert "complete (2 epochs); add --trainer.max_epochs 4" in told
    assert files(".") == before


def test_a_run_that_goes_on_from_an_older_checkpoint_gets_a_folder_of_its_own(small, done, capsys):
    earlier = files(done)
    shutil.copy(done / "checkpoints" / "last.ckpt", "kept.ckpt")
    main(["fit", *small, "--trainer.max_epochs=3", "--ckpt_path", str(done)])
    Path("kept.ckpt").rename(done / "checkpoints" / "kept.ckpt")
    newer = files(done)
    main(["fit", *small, "--trainer.max_epochs=3", "--ckpt_path", str(done / "checkpoints" / "kept.ckpt")])
    assert "is newer, so this run continues in a new folder" in capsys.readouterr().out
    assert files(done) == newer != earlier
    run = done.with_name("version_1")
    assert (run / "checkpoints" / "best.ckpt").exists()
    assert [step for step, _ in curve(run, "val/reward")] == [12]
    assert (run / "validation.csv").read_bytes() == (done / "validation.csv").read_bytes()


def test_a_run_that_goes_on_keeps_the_numbers_of_its_earlier_end(small, done):
    earlier = (done / "validation.json").read_bytes()
    main(["fit", *small, "--trainer.max_epochs=3", "--ckpt_path", str(done)])
    assert (done / "validation_00000008.json").read_bytes() == earlier
    assert (done / "validation_00000008.csv").exists()
    assert json.loads((done / "validation.json").read_text())["images"] == 12
    assert [path.name for path in done.parent.iterdir()] == ["version_0"]


def test_another_learning_rate_is_applied_to_a_run_that_goes_on(small, capsys):
    scheduler = "--model.optimisation.lr_scheduler=torch.optim.lr_scheduler.LinearLR"
    total = "--model.optimisation.lr_scheduler.init_args.total_iters=8"
    arguments = [*small, "--model.kl_target=null", "--model.updates=1", scheduler, total]
    arguments += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    main(["fit", *arguments])
    arguments += ["--trainer.max_epochs=2", "--ckpt_path=last"]
    main(["fit", *arguments, "--model.optimisation.optimizer.lr=1e-4"])
    rates = [value for _, value in curve(Path("logs/ddpo/version_0"), "train/lr")]
    factors = [(1 + 2 * k / 8) / 3 for k in range(4)]  # of LinearLR: from a third to all
    assert rates == pytest.approx([1e-3 * f for f in factors[:2]] + [1e-4 * f for f in factors[2:]])
    assert "model.optimisation.optimizer.lr 0.001 -> 0.0001" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ("--model.backbone.lora.rank=4", "lora.rank 16 -> 4"),
        ("--model.optimisation.optimizer=torch.optim.SGD", "optimizer AdamW -> SGD"),
        (
            "--model.optimisation.lr_scheduler=torch.optim.lr_scheduler.ConstantLR",
            "lr_scheduler none -> ConstantLR",
        ),
        ("--data.images_per_prompt=4", "images_per_prompt"),
    ],
)
def test_what_cannot_change_in_a_run_that_goes_on_is_refused(changed, told, small, done, capsys):
    before = files(".")
    arguments = ["--ckpt_path=last", "--trainer.max_epochs=3", changed]
    assert told in said(capsys, "fit", *small, *arguments)
    assert files(".") == before


def test_held_out_images_that_are_measured_differently_are_compared_with_a_new_baseline(small, done, capsys):
    best = (done / "checkpoints" / "best.ckpt").read_bytes()
    old = json.loads((done / "validation.json").read_text())["metrics"]
    changed = [a.replace("brightness: 1.0", "redness: 5.0") for a in small]
    main(["fit", *changed, "--trainer.max_epochs=3", "--ckpt_path=last"])
    new = json.loads((done / "validation.json").read_text())["metrics"]
    printed = capsys.readouterr().out
    assert "measured differently" in printed
    assert "model.rewards.weights.redness none -> 5.0" in printed
    assert new["reward"]["before"] == pytest.approx(5 * old["reward/redness"]["before"], rel=1e-5)
    assert new["reward/redness"]["before"] == old["reward/redness"]["before"]  # the pretrained model
    assert (done / "checkpoints" / "best_00000008.ckpt").read_bytes() == best
    state = torch.load(done / "checkpoints" / "best.ckpt", weights_only=True)["callbacks"]
    score = next(value["best_model_score"] for name, value in state.items() if "BestCheckpoint" in name)
    assert float(score) == pytest.approx(new["reward"]["after"], rel=1e-5)


def test_a_checkpoint_is_not_tested_without_the_adapters_that_its_run_mixed_in(small, done, capsys):
    mix = Path("mix.yaml")
    adapters = {str(done / "adapter"): 0.5}
    mix.write_text(yaml.dump({"model": {"init_args": {"backbone": {"init_args": {"adapters": adapters}}}}}))
    main(["fit", *small, f"--config={mix}", "--trainer.max_epochs=1"])
    assert "adapters" in said(capsys, "test", *small, "--ckpt_path=last")
    main(["test", *small, f"--config={mix}", "--ckpt_path=last"])
    assert (done.parent / "version_1" / "test.json").exists()


def test_validate_test_and_predict_of_a_trained_run(small, done, capsys):
    main(["test", *small, "--ckpt_path=last"])
    report = json.loads((done / "test.json").read_text())
    assert report["metrics"]["reward"]["num_pairs"] == 4
    assert report["metrics"]["reward"]["difference"] != 0
    with (done / "test.csv").open() as file:
        images = [float(row["reward"]) - float(row["base/reward"]) for row in csv.DictReader(file)]
    assert sum(images) / 4 == pytest.approx(report["metrics"]["reward"]["difference"])
    assert [step for step, _ in curve(done, "test/reward")] == [8]
    assert "test/reward" not in capsys.readouterr().out  # Lightning's table
    kept = {name: content for name, content in files(done).items() if name.startswith("test")}
    main(["test", *small, "--data.test_prompts=3", "--ckpt_path", str(done)])
    assert {name: (done / name).read_bytes() for name in kept} == kept
    assert json.loads((done / "test-2.json").read_text())["metrics"]["reward"]["num_pairs"] == 6
    assert (done / "test-2.csv").exists()
    grid = done / "images" / "validation_00000008.png"
    drawn = grid.read_bytes()
    main(["validate", *small, "--ckpt_path=last"])
    assert grid.read_bytes() == drawn  # that of the fit
    assert grid.with_stem("validation_00000008-2").exists()
    validated = json.loads((done / "validate.json").read_text())["metrics"]
    assert validated == json.loads((done / "validation.json").read_text())["metrics"]
    for number in ("", "-2"):
        main(["predict", *small, f"--ckpt_path={done}/checkpoints/last.ckpt"])
        folder = done / f"predictions{number}"
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        assert [row["index"] for row in rows] == list(range(4))
        assert {"file_name", "prompt", "seed", "reward", "reward/redness"} <= set(rows[0])
        assert len({row["reward"] for row in rows}) == 4  # each image has its own
        assert all(Image.open(folder / row["file_name"]).size == (16, 16) for row in rows)
    assert [path.name for path in Path("logs/ddpo").iterdir()] == ["version_0"]
    stages = {
        "config",
        "config-test",
        "config-test-2",
        "config-validate",
        "config-predict",
        "config-predict-2",
    }
    assert {path.stem for path in done.glob("config*")} == stages


def test_columns_that_the_table_of_predict_has_itself_are_told(small, done):
    Path("p.csv").write_text("prompt,seed,style\na red circle,7,ink\na blue star,8,oil\n")
    source = ["--data.predict_source=CSVPrompts", "--data.predict_source.path=p.csv"]
    with pytest.warns(UserWarning, match=r"metadata.jsonl has its own seed, so these columns"):
        main(["predict", *small, "--ckpt_path=last", *source])
    rows = [json.loads(line) for line in (done / "predictions" / "metadata.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["style"]) for row in rows] == [(0, "ink")] * 2 + [(0, "oil")] * 2


# ---- one folder


def test_runs_have_folders_of_their_own_whatever_the_logger(small, done, monkeypatch):
    earlier = files(done)
    Path("mylogger.py").write_text(
        "from lightning.pytorch.loggers import Logger\n"
        "class MyLogger(Logger):\n"
        "    name, version = 'project', 'abc'\n"
        "    save_dir = '.'\n"
        "    def log_metrics(self, metrics, step=None):\n"
        "        open('mine.txt', 'a').write(f'{step} {sorted(metrics)}\\n')\n"
        "    def log_hyperparams(self, params, *args, **kwargs): pass\n"
    )
    monkeypatch.syspath_prepend(".")
    tensorboard = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "logs", "name": "ddpo"}}
    table = {"class_path": "CSVLogger", "init_args": {"save_dir": "elsewhere"}}
    choices = ["false", "mylogger.MyLogger", json.dumps([tensorboard, table])]
    for number, logger in enumerate(choices, start=1):
        main(["fit", *small, "--trainer.max_epochs=1", f"--trainer.logger={logger}"])
        run = Path(f"logs/ddpo/version_{number}")
        assert (run / "checkpoints" / "best.ckpt").exists()
        assert (run / "adapter").is_dir()
        assert {"config.yaml", "validation.json"} <= set(files(run))
    assert files(done) == earlier
    left = {path.name for path in Path().iterdir()} - {"__pycache__"}
    assert left == {"logs", "mylogger.py", "mine.txt"}
    assert "train/reward" in Path("mine.txt").read_text()
    assert {"metrics.csv"} <= set(files("logs/ddpo/version_3"))
    main(["fit", *small, "--trainer.logger=false", "--ckpt_path=last", "--trainer.max_epochs=2"])
    assert "config-2.yaml" in files("logs/ddpo/version_3")


def test_a_csv_logger_keeps_its_rows_when_the_run_goes_on_or_is_tested(small):
    arguments = [*small, "--trainer.logger=CSVLogger", "--trainer.max_epochs=1"]
    main(["fit", *arguments])
    path = Path("logs/ddpo/version_0/metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    main(["test", *arguments, "--ckpt_path=last"])
    main(["fit", *arguments, "--ckpt_path=last", "--trainer.max_epochs=2"])
    with path.open() as file:
        now = list(csv.DictReader(file))
    assert [row["train/reward"] for row in now[: len(rows)]] == [row["train/reward"] for row in rows]
    assert {row["step"] for row in now if row["test/reward"]} == {"4"}
    assert [row["step"] for row in now if row["val/reward"]] == ["0", "4", "8"]


@pytest.mark.parametrize(
    "wrong",
    ["--model.sampler.eta=0", "--data.source={class_path: TextPrompts, init_args: {path: empty.txt}}"],
    ids=["model", "data"],
)
def test_a_start_that_fails_leaves_nothing(wrong, small, done, capsys):
    Path("empty.txt").write_text("\n")
    before = files(".")
    said(capsys, "fit", *small, wrong)
    assert [path.name for path in done.parent.iterdir()] == ["version_0"]
    said(capsys, "fit", *small, wrong, "--ckpt_path=last", "--trainer.max_epochs=3")
    assert files(".") == before


def test_a_version_that_is_taken_is_refused(small, done, capsys):
    before = files(".")
    for version in ("0", "version_0"):
        assert "is of another run" in said(
            capsys, "fit", *small, f"--trainer.logger.init_args.version={version}"
        )
    assert files(".") == before


# ---- processes


def in_two_processes(*arguments: str) -> None:
    """The command in two processes, as torchrun starts them; forked, since an import takes seconds."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, (port, arguments), nprocs=2, start_method="fork")


def _rank(rank: int, port: int, arguments: tuple[str, ...]) -> None:
    torch.set_num_threads(1)  # a forked process would wait for the threads of its parent, which it has not
    place = {"LOCAL_RANK": rank, "RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"})
    rank_zero_only.rank = rank  # found when Lightning is imported
    main(["fit", *arguments])


def assert_one_and_two_processes_agree(one: Path, two: Path) -> None:
    """The same files, the same curves, and weights that differ by rounding."""
    names = [{name for name in files(run) if "events" not in name} for run in (one, two)]
    assert names[0] == names[1]
    first, second = (load_file(run / "adapter/pytorch_lora_weights.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    # Adam's first steps are signs of gradients, of which some are 0 but for rounding.
    torch.testing.assert_close(second, first, atol=2e-3, rtol=0)
    for tag in ("val/reward", "train/reward", "progress/images"):
        values = [[value for _, value in curve(run, tag)] for run in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=1e-2, abs=1e-5)


def test_two_processes_leave_what_one_leaves(small):
    arguments = [*small, "--data.prompts_per_batch=4", "--trainer.max_epochs=1"]
    main(["fit", *arguments])
    in_two_processes(*arguments, "--trainer.devices=2")
    runs = [Path(f"logs/ddpo/version_{number}") for number in range(2)]
    assert sorted(Path("logs/ddpo").iterdir()) == runs
    assert_one_and_two_processes_agree(*runs)


@pytest.mark.slow
def test_processes_that_share_the_weights_leave_what_one_leaves_and_go_on_exactly(small):
    """Adam must not count the empty step by which torch finds out what it saves."""
    arguments = [*small, "--data.prompts_per_batch=4", "--trainer.check_val_every_n_epoch=2"]
    main(["fit", *arguments, "--trainer.logger.init_args.name=one"])
    in_two_processes(*arguments, f"--config={FSDP}", "--trainer.logger.init_args.name=whole")
    one, whole, cut = (Path("logs", name, "version_0") for name in ("one", "whole", "cut"))
    assert_one_and_two_processes_agree(one, whole)
    arguments += [f"--config={FSDP}", "--trainer.logger.init_args.name=cut"]
    in_two_processes(*arguments, "--trainer.max_epochs=1")
    in_two_processes(*arguments, "--ckpt_path=last")
    assert_equal(*(load_file(run / "adapter/pytorch_lora_weights.safetensors") for run in (whole, cut)))


@pytest.mark.slow
def test_processes_that_share_the_weights_go_back_through_the_same_steps(small):
    """AlignProp draws the steps of each image: one that went back through fewer would wait for ever."""
    alignprop = [f"--config={ROOT}/configs/alignprop.yaml", *small[2:], f"--config={FSDP}"]
    in_two_processes(*alignprop, "--trainer.max_epochs=1", "--model.truncation.high=3")
    assert Path("logs/alignprop/version_0/adapter").is_dir()


# ---- an own method


def test_a_method_of_ones_own_runs_with_the_configuration_of_its_base(small, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    Path("own.py").write_text(
        "from lit_align.methods import DDPOModule\n"
        "class Mine(DDPOModule):\n"
        "    pass\n"
        "class Untyped(DDPOModule):\n"
        "    def __init__(self, backbone, sampler): pass\n"
    )
    main(["fit", *small, "--trainer.max_epochs=1", "--model=own.Mine"])
    saved = torch.load("logs/ddpo/version_0/checkpoints/last.ckpt", weights_only=True)
    assert saved["callbacks"]["RunConfig"]["settings"]["model"] == "Mine"
    assert "no type for backbone, sampler" in said(capsys, "fit", *small, "--model=own.Untyped")
