import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lit_align.cli import main
from lit_align.errors import ConfigError
from lit_align.methods import DDPOModule
from lit_align.methods.base import _check_strategy
from lit_align.shapes import CLIP, PIPELINE

ROOT = Path(__file__).parents[1]
DDPO = ROOT / "configs" / "ddpo.yaml"
FSDP = ROOT / "configs" / "backbone" / "fsdp.yaml"
METHODS = sorted(ROOT.glob("configs/*.yaml"))
VARIANTS = sorted(ROOT.glob("configs/variant/*.yaml"))
SMALL = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=3",
    "--trainer.accelerator=cpu",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_progress_bar=false",
    "--data.init_args.images_per_prompt=2",
    "--data.init_args.prompts_per_batch=4",
    "--data.init_args.validation_prompts=4",
    "--data.init_args.validation_images_per_prompt=2",
    "--data.init_args.test_prompts=4",
    "--data.init_args.test_images_per_prompt=2",
    "--data.init_args.eval_batch=4",
]
OWN = {
    "pinterest_joint": [
        "--data.init_args.tasks.preference.prompts_per_batch=4",
        "--data.init_args.tasks.fairness.images_per_prompt=2",
        "--data.init_args.tasks.fairness.validation_prompts=4",
        "--data.init_args.tasks.fairness.validation_images_per_prompt=2",
        "--data.init_args.tasks.fairness.test_prompts=4",
        "--data.init_args.tasks.fairness.test_images_per_prompt=2",
    ]
}
"""Further sizes, of configurations that have some of their own."""
ON_PAIRS = {"dpo", "sft", "spin"}
"""Methods on pairs of images: no reward scores what they train on."""
OF_PROMPTS = ("--data.init_args.images_per_prompt", "--data.init_args.prompts_per_batch")
SMALL_PAIRS = [a for a in SMALL if not a.startswith(OF_PROMPTS)] + ["--data.init_args.pairs_per_batch=4"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit_align"])


@pytest.fixture
def small(tiny: Path) -> list[str]:
    """Arguments that make the shipped configuration small; the model is a tiny one of the same format."""
    return ["--config", str(DDPO), *SMALL, f"--model.init_args.backbone.init_args.pretrained={tiny}"]


def without_judge() -> list[str]:
    """A tiny model's images are not of Shapes' size, which its judge refuses."""
    rewards = {"brightness": {"class_path": "Brightness"}, "redness": {"class_path": "Redness"}}
    return [
        f"--model.init_args.rewards.init_args.rewards={json.dumps(rewards)}",
        '--model.init_args.rewards.init_args.weights={"brightness": 1.0}',
    ]


def scalars(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run))
    events.Reload()
    return events


def base_of(config: Path) -> list[str]:
    """Arguments for the configuration that an overlay is for; its first line names it."""
    if config in METHODS:
        return []
    (base,) = re.findall(r"Overlay for (configs/\w+\.yaml)", config.read_text().splitlines()[0])
    return ["--config", str(ROOT / base)]


@pytest.mark.parametrize("config", METHODS + VARIANTS, ids=lambda path: path.stem)
def test_every_shipped_config_trains_through_the_real_entry_point(config: Path):
    on_pairs = Path([*base_of(config), str(config)][0 if config in METHODS else 1]).stem in ON_PAIRS
    main(
        [
            "fit",
            *base_of(config),
            "--config",
            str(config),
            *(SMALL_PAIRS if on_pairs else SMALL),
            *OWN.get(config.stem, []),
            "--trainer.max_epochs=1",
            "--trainer.limit_train_batches=2",
            "--data.init_args.eval_batch=8",  # one batch: there are many configurations
        ]
    )
    (run,) = Path("logs").glob("*/version_0")
    names = scalars(run).Tags()["scalars"]
    wanted = {"train/loss", "train/reward", "val/reward", "val/kl", "val/diversity", "val/truth"}
    assert wanted - ({"train/reward"} if on_pairs else set()) <= set(names)
    assert (run / "adapter" / "pytorch_lora_weights.safetensors").exists()


def test_a_run_leaves_what_it_promises(capsys):
    main(["fit", "--config", str(DDPO), *SMALL, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"])
    run = Path("logs/ddpo/version_0")
    events = scalars(run)
    first = events.Scalars("val/reward")[0]
    assert first.step == 0
    assert [point.value for point in events.Scalars("progress/images")][-1] == 16
    assert "validation" in events.Tags()["images"]
    wanted = {
        "train/clip_fraction",
        "train/kl",
        "train/ratio_deviation",
        "train/grad_norm",
        "perf/images_per_second",
    }
    wanted |= {"perf/sampling_fraction", "progress/reward_queries", "train/reward/truth", "val/reward/clip"}
    assert wanted <= set(events.Tags()["scalars"])
    assert [path.name for path in sorted((run / "images").iterdir())] == [
        "validation_00000000.png",
        "validation_00000016.png",
    ]
    for stage in ("train_histogram", "val_histogram"):
        assert {f"{stage}/reward", f"{stage}/reward/clip"} <= set(events.Tags()["histograms"])
    assert (final := events.Scalars("final/truth")[0]).value == events.Scalars("val/truth")[-1].value
    assert final.step == events.Scalars("val/truth")[-1].step == 1
    (start,) = (
        HParamsPluginData.FromString(content).session_start_info
        for tag, content in events.PluginTagToContent("hparams").items()
        if tag.endswith("session_start_info")
    )
    assert start.hparams["model.kl_target"].number_value == 0.01
    assert start.hparams["model.sampler"].string_value == "DDIM"
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(".lora_" in name for name in checkpoint["state_dict"])
    assert (run / "checkpoints" / "last.ckpt").stat().st_size < 20e6
    report = json.loads((run / "validation.json").read_text())
    assert report["metrics"]["reward"]["num_pairs"] == 8
    printed = capsys.readouterr().out
    assert "before" in printed
    assert "adapter" in printed
    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE)
    pipeline.load_lora_weights(run / "adapter")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["class_path"].endswith("DDPOModule")


@pytest.mark.parametrize(("overlays", "model"), [(["sd15"], "tiny"), (["sd15", "sd21"], "tiny_v")])
def test_overlays_for_real_models_train_one_batch(overlays, model, request, tmp_path):
    """Only the pretrained models, the data and sizes are replaced."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"a star number {i}" for i in range(200)))
    local = {"class_path": "PickScore", "init_args": {"pretrained": "shapes", "processor": str(CLIP)}}
    rewards = {"preference": local, "jpeg": {"class_path": "JPEGIncompressibility"}}
    configs = [f"--config={ROOT}/configs/backbone/{name}.yaml" for name in overlays]
    arguments = [
        f"--config={DDPO}",
        *configs,
        *SMALL,
        "--trainer.limit_train_batches=1",
        "--trainer.max_epochs=1",
        f"--model.init_args.backbone.init_args.pretrained={request.getfixturevalue(model)}",
        "--model.init_args.sampler.init_args.num_steps=3",
        f"--model.init_args.rewards.init_args.rewards={json.dumps(rewards)}",
    ]
    main(["fit", *arguments])
    assert {"train/reward/preference", "val/reward/jpeg"} <= set(
        scalars(Path("logs/ddpo/version_0")).Tags()["scalars"]
    )


def crash_at(monkeypatch: pytest.MonkeyPatch, collection: int) -> None:
    """The process dies in the middle of a rollout batch, after its rollout and before its end."""
    look_back, calls = DDPOModule.look_back, []

    def dying(self: DDPOModule, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == collection:
            raise KeyboardInterrupt
        look_back(self, *arguments)

    monkeypatch.setattr(DDPOModule, "look_back", dying)


@pytest.mark.parametrize(
    ("crash", "advantages"),
    [
        (1, "GroupAdvantages"),
        (2, "GroupAdvantages"),
        (4, "PerPromptAdvantages"),
        (5, "PerPromptAdvantages"),
        (6, "GroupAdvantages"),
    ],
    ids=["first", "mid-epoch", "first-of-epoch", "mid-second-epoch", "last"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(small, monkeypatch, crash, advantages):
    rewards = {
        "clip": {"class_path": "CLIPScore", "init_args": {"pretrained": "shapes"}},
        "redness": {"class_path": "Redness"},
    }
    options = [
        *small,
        f"--model.init_args.rewards.init_args.rewards={json.dumps(rewards)}",
        '--model.init_args.rewards.init_args.weights={"clip": 1.0}',
        f"--model.init_args.advantages={advantages}",
        "--model.init_args.kl_target=1e-3",
        "--model.init_args.lr_scheduler=torch.optim.lr_scheduler.LinearLR",
        "--model.init_args.lr_scheduler.init_args.total_iters=8",
        "--data.init_args.source.init_args.kinds=[open]",
    ]
    main(["fit", *options, "--trainer.logger.init_args.name=whole"])
    with monkeypatch.context() as patch:
        crash_at(patch, crash)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main(["fit", *options, "--trainer.logger.init_args.name=cut"])
    main(["fit", *options, "--trainer.logger.init_args.name=cut", "--ckpt_path=last"])
    assert [path.name for path in Path("logs/cut").iterdir()] == ["version_0"]
    states = [
        torch.load(f"logs/{name}/version_0/checkpoints/last.ckpt", weights_only=True)
        for name in ("whole", "cut")
    ]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "progress", "tasks"):
        assert_equal(states[0][part], states[1][part])
    assert states[0]["global_step"] == states[1]["global_step"]
    best = [
        next(value for name, value in state["callbacks"].items() if "BestCheckpoint" in name)[
            "best_model_score"
        ]
        for state in states
    ]
    assert torch.equal(*best)
    loaders = [state["loops"]["fit_loop"]["state_dict"]["combined_loader"] for state in states]
    assert loaders[0] == loaders[1]
    curves = [scalars(Path(f"logs/{name}/version_0")).Scalars("train/reward") for name in ("whole", "cut")]
    assert [p.value for p in curves[0]] == [p.value for p in curves[1]]
    assert len(curves[0]) == 6
    baselines = [scalars(Path(f"logs/{name}/version_0")).Scalars("val/reward") for name in ("whole", "cut")]
    assert [p.value for p in baselines[0]] == [p.value for p in baselines[1]]
    configs = {path.name for path in Path("logs/cut/version_0").glob("config*.yaml")}
    assert configs == {"config.yaml", "config-2.yaml"}


def test_a_run_that_dies_in_its_validation_repeats_it(small, monkeypatch):
    options = [*small, *without_judge()]
    main(["fit", *options, "--trainer.logger.init_args.name=whole"])
    with monkeypatch.context() as patch:
        measure, calls = DDPOModule._measure, []

        def dying(self: DDPOModule, *arguments: Any, **named: Any) -> Any:
            calls.append(1)
            if len(calls) == 4:  # two batches before the first update, two after the first epoch
                raise KeyboardInterrupt
            return measure(self, *arguments, **named)

        patch.setattr(DDPOModule, "_measure", dying)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main(["fit", *options, "--trainer.logger.init_args.name=cut"])
    main(["fit", *options, "--trainer.logger.init_args.name=cut", "--ckpt_path=last"])
    curves = [scalars(Path(f"logs/{name}/version_0")).Scalars("val/reward") for name in ("whole", "cut")]
    assert [(p.step, p.value) for p in curves[0]] == [(p.step, p.value) for p in curves[1]]


def test_a_terminated_run_says_so_and_can_be_resumed(small, monkeypatch):
    options = [*small, *without_judge()]
    with monkeypatch.context() as patch:
        collect, calls = DDPOModule.collect, []

        def terminated(self: DDPOModule, *arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return collect(self, *arguments)

        patch.setattr(DDPOModule, "collect", terminated)
        with pytest.raises(SystemExit) as ended:
            main(["fit", *options])
    assert ended.value.code == 128 + signal.SIGTERM
    main(["fit", *options, "--ckpt_path=last"])
    (run,) = Path("logs/ddpo").iterdir()
    assert len({point.step for point in scalars(run).Scalars("train/reward")}) > 2


def fit_with_two_processes(*arguments: str) -> None:
    """A fit in processes of its own; says what they said where they fail."""
    done = subprocess.run(
        [sys.executable, "-m", "lit_align", "fit", *arguments],
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr[-2000:]


def adapter(name: str) -> dict[str, torch.Tensor]:
    """What the first run of this name hands on."""
    (file,) = Path(f"logs/{name}/version_0/adapter").iterdir()
    return load_file(file)


@pytest.mark.parametrize("how", ["--trainer.devices=2", f"--config={FSDP}"], ids=["ddp", "fsdp"])
def test_two_processes_from_the_command_line_leave_what_one_leaves(small, how):
    arguments = [*small, *without_judge(), "--trainer.max_epochs=1"]
    main(["fit", *arguments, "--trainer.logger.init_args.name=one"])
    fit_with_two_processes(*arguments, how, "--trainer.logger.init_args.name=two")
    one, two = adapter("one"), adapter("two")
    assert one.keys() == two.keys()
    # Adam's first steps are signs of gradients, of which some are 0 but for rounding.
    torch.testing.assert_close(two, one, atol=2e-4, rtol=0)
    files = [
        {str(path.relative_to(run)) for path in run.rglob("*") if "events" not in path.name}
        for run in (Path("logs/one/version_0"), Path("logs/two/version_0"))
    ]
    assert files[0] == files[1]
    for tag in ("val/reward", "train/reward", "train/kl", "progress/images"):
        curves = [scalars(Path(f"logs/{name}/version_0")).Scalars(tag) for name in ("one", "two")]
        assert [p.value for p in curves[0]] == pytest.approx([p.value for p in curves[1]], rel=1e-2, abs=1e-5)


def test_a_sharded_run_that_is_resumed_equals_the_uninterrupted_one(small):
    """Adam must not count the empty step by which torch finds out what it saves."""
    arguments = [*small, *without_judge(), f"--config={FSDP}", "--trainer.limit_train_batches=2"]
    fit_with_two_processes(*arguments, "--trainer.logger.init_args.name=whole")
    fit_with_two_processes(*arguments, "--trainer.logger.init_args.name=cut", "--trainer.max_epochs=1")
    fit_with_two_processes(*arguments, "--trainer.logger.init_args.name=cut", "--ckpt_path=last")
    assert_equal(adapter("whole"), adapter("cut"))


def test_processes_that_share_the_weights_go_back_through_the_same_steps(small):
    """AlignProp draws the steps of each image: one that went back through fewer would wait for ever."""
    arguments = ["--config", str(ROOT / "configs" / "alignprop.yaml"), *small[2:], *without_judge()]
    fit_with_two_processes(*arguments, f"--config={FSDP}", "--trainer.limit_train_batches=2")
    assert adapter("alignprop")


@pytest.mark.parametrize(
    ("strategy", "replicas", "message"),
    [
        (FSDPStrategy(), 2, "configs/backbone/fsdp.yaml"),
        (ModelParallelStrategy(), 1, "data_parallel_size, which is 1 with 2 processes"),
        (ModelParallelStrategy(), 2, "save_distributed_checkpoint"),
    ],
)
def test_a_strategy_that_shards_otherwise_is_refused(strategy, replicas, message):
    strategy._device_mesh = {"data_parallel": SimpleNamespace(size=lambda: replicas)}
    with pytest.raises(ConfigError, match=message):
        _check_strategy(strategy, world=2)


def test_weights_of_another_kind_are_refused(small, capsys):
    main(["fit", *small, *without_judge(), "--trainer.max_epochs=1"])
    overlay = ROOT / "configs" / "backbone" / "full.yaml"
    with pytest.raises(SystemExit):
        main(["test", *small, *without_judge(), f"--config={overlay}", "--ckpt_path=last"])
    assert "other trained weights" in capsys.readouterr().err


def test_a_fast_dev_run_leaves_no_files(small, tmp_path):
    before = set(tmp_path.rglob("*"))
    main(["fit", *small, *without_judge(), "--trainer.fast_dev_run=true"])
    assert set(tmp_path.rglob("*")) == before


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


def test_validate_test_and_predict_of_a_trained_run(small):
    main(["fit", *small, *without_judge(), "--trainer.max_epochs=1"])
    run = Path("logs/ddpo/version_0")
    main(["test", *small, *without_judge(), "--ckpt_path=last"])
    report = json.loads((run / "test.json").read_text())
    assert report["metrics"]["reward"]["num_pairs"] == 8
    assert report["metrics"]["reward"]["difference"] != 0
    with (run / "test.csv").open() as file:
        images = [float(row["reward"]) - float(row["base/reward"]) for row in csv.DictReader(file)]
    assert sum(images) / 8 == pytest.approx(report["metrics"]["reward"]["difference"], abs=1e-5)
    main(["validate", *small, *without_judge(), "--ckpt_path=last"])
    main(["predict", *small, *without_judge(), f"--ckpt_path={run}/checkpoints/last.ckpt"])
    rows = [json.loads(line) for line in (run / "predictions" / "metadata.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(8))
    assert {"file_name", "prompt", "seed", "reward", "reward/redness"} <= set(rows[0])
    assert all(Image.open(run / "predictions" / row["file_name"]).size == (16, 16) for row in rows)
    main(["predict", *small, *without_judge(), "--ckpt_path=last"])
    assert (run / "predictions-2" / "metadata.jsonl").exists()
    assert [path.name for path in Path("logs/ddpo").iterdir()] == ["version_0"]
    stages = {"config", "config-test", "config-validate", "config-predict", "config-predict-2"}
    assert {path.stem for path in run.glob("config*")} == stages


def test_full_fine_tuning_leaves_a_pipeline(small):
    overlay = ROOT / "configs" / "backbone" / "full.yaml"
    main(["fit", *small, *without_judge(), "--trainer.max_epochs=1", f"--config={overlay}"])
    folder = Path("logs/ddpo/version_0/adapter")
    base = load_file(next(Path(small[-1].partition("=")[2]).glob("unet/*.safetensors")))
    trained = load_file(next(folder.glob("unet/*.safetensors")))
    assert any(not torch.equal(base[name], trained[name]) for name in base)
    StableDiffusionPipeline.from_pretrained(folder)


def test_print_config_runs_again_and_a_saved_config_too(small, capsys):
    with pytest.raises(SystemExit) as exited:
        main(["fit", *small, *without_judge(), "--trainer.max_epochs=1", "--print_config"])
    assert exited.value.code == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    main(["fit", "--config=printed.yaml"])
    main(["fit", "--config=logs/ddpo/version_0/config.yaml"])
    curves = [scalars(Path(f"logs/ddpo/version_{i}")).Scalars("train/reward") for i in range(2)]
    assert [p.value for p in curves[0]] == [p.value for p in curves[1]]


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_mixed_precision_trains(small, precision):
    main(["fit", *small, *without_judge(), "--trainer.max_epochs=1", f"--trainer.precision={precision}"])
    assert all(p.value == p.value for p in scalars(Path("logs/ddpo/version_0")).Scalars("train/loss"))


def mistakes(tmp_path: Path, tiny: Path) -> dict[str, tuple[list[str], str]]:
    """Wrong arguments by what is wrong, with what the message must name."""
    empty, table = tmp_path / "empty.txt", tmp_path / "table.csv"
    empty.write_text("\n")
    table.write_text("prompt,style\na star,x\n")
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", str(tiny), str(broken)], check=True)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    source = "--data.init_args.source"
    pretrained = "--model.init_args.backbone.init_args.pretrained"
    return {
        "unknown key": (["--model.init_args.learning_rate=1"], "learning_rate"),
        "unknown trainer key": (["--trainer.max_epoch=1"], "max_epoch"),
        "unknown reward": (
            ['--model.init_args.rewards.init_args.rewards={"x": {"class_path": "Nothing"}}'],
            "Nothing",
        ),
        "weight without reward": (['--model.init_args.rewards.init_args.weights={"beauty": 1}'], "beauty"),
        "missing prompts": ([f"{source}=TextPrompts", f"{source}.init_args.path=nowhere.txt"], "nowhere.txt"),
        "empty prompts": ([f"{source}=TextPrompts", f"{source}.init_args.path={empty}"], "empty.txt"),
        "wrong column": (
            [f"{source}=CSVPrompts", f"{source}.init_args.path={table}", f"{source}.init_args.column=promt"],
            "promt",
        ),
        "unreachable hub id": ([f"{pretrained}=someone/nothing"], "someone/nothing"),
        "corrupt weights": ([f"{pretrained}={broken}"], "broken"),
        "eta 0": (["--model.init_args.sampler.init_args.eta=0"], "eta"),
        "one image per prompt": (["--data.init_args.images_per_prompt=1"], "images_per_prompt"),
        "no checkpoint": (["--ckpt_path=last"], "last"),
        "no such checkpoint": (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
        "config of nothing": (["--config=nowhere.yaml"], "nowhere.yaml"),
    }


NAMES = [
    "unknown key",
    "unknown trainer key",
    "unknown reward",
    "weight without reward",
    "missing prompts",
    "empty prompts",
    "wrong column",
    "unreachable hub id",
    "corrupt weights",
    "eta 0",
    "one image per prompt",
    "no checkpoint",
    "no such checkpoint",
    "config of nothing",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_one_clear_message(name, small, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, named = mistakes(tmp_path, tiny)[name]
    with pytest.raises(SystemExit) as exited:
        main(["fit", *small, *arguments])
    assert exited.value.code == 2
    message = capsys.readouterr().err
    told = message[message.rindex("lit_align:") :]
    assert named in told
    assert "Traceback" not in message
    assert len(told.splitlines()) <= 4, told


def test_a_misspelt_truncation_is_met_with_the_nearest(capsys):
    with pytest.raises(SystemExit):
        main(["fit", f"--config={ROOT}/configs/alignprop.yaml", "--model.init_args.truncation=LowVarianz"])
    assert "did you mean LowVariance" in capsys.readouterr().err


def test_python_m_lit_align_starts():
    done = subprocess.run(
        [sys.executable, "-m", "lit_align", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "fit" in done.stdout
