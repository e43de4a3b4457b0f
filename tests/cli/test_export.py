"""What is exported draws the images of the model that was trained."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_align.cli import main
from lit_align.cli.export import check_replaced
from lit_align.errors import ConfigError
from lit_align.export import export, mixture_of, read_run
from lit_align.export.card import _rewards, card
from lit_align.export.forms import facts
from lit_align.export.live import Run
from lit_align.identity import read_stamp, stamp

ROOT = Path(__file__).parents[2]
SMALL = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.accelerator=cpu",
    "--data.images_per_prompt=2",
    "--data.prompts_per_batch=2",
    "--data.validation_prompts=2",
    "--data.validation_images_per_prompt=2",
    "--data.test_prompts=2",
    "--data.test_images_per_prompt=2",
    "--data.eval_batch=4",
    "--model.updates=1",
    "--model.backbone.dtype=float32",
    "--model.sampler.num_steps=2",
    "--model.optimisation.optimizer.lr=0.1",
    "--model.rewards.rewards={brightness: {class_path: Brightness}, redness: {class_path: Redness}}",
    "--model.rewards.weights={brightness: 1.0}",
]


def fit(model: Path, *options: str) -> None:
    config = [
        "--config",
        str(ROOT / "configs/ddpo.yaml"),
        "--config",
        str(ROOT / "configs/backbone/sdxl.yaml"),
    ]
    (Path.cwd() / "prompts.txt").write_text("\n".join(f"a star number {i}" for i in range(200)))
    main(["fit", *config, *SMALL, f"--model.backbone.pretrained={model}", *options])


@pytest.fixture(scope="module")
def runs(tiny_xl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``version_0``: an adapter whose alpha is not its rank; ``version_1``: another, which is validated at 8
    of its 12 images."""
    folder, here, arguments = tmp_path_factory.mktemp("runs"), Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["lit_align"]
    fit(
        tiny_xl,
        "--model.backbone.lora.alpha=8",
        "--model.backbone.lora.rank=2",
        "--model.backbone.size=[16,24]",
    )
    fit(
        tiny_xl,
        "--model.backbone.lora.rank=3",
        "--model.backbone.size=[16,24]",
        "--trainer.limit_train_batches=3",
        "--trainer.val_check_interval=2",
    )
    os.chdir(here)
    sys.argv = arguments
    return folder / "logs" / "ddpo"


def test_every_form_draws_what_the_live_model_draws(runs: Path, tiny_xl: Path, tmp_path: Path, capsys: Any):
    run = runs / "version_0"
    main(
        ["export", str(run), "--form", "adapter", "kohya", "pipeline", "--out", str(tmp_path), "--steps", "2"]
    )
    said = capsys.readouterr().out
    assert said.count("largest pixel difference to the live model: 0\n") == 2  # factors are copied exactly
    differences = [float(line.rpartition(" ")[2]) for line in said.splitlines() if "largest" in line]
    assert len(differences) == 3
    assert max(differences) < 1e-4  # the merged weights are rounded
    factors = load_file(tmp_path / "ddpo_version_0.safetensors")
    assert all(name.startswith("lora_unet_") for name in factors)
    assert {float(value) for name, value in factors.items() if name.endswith(".alpha")} == {2.0}
    with safe_open(tmp_path / "ddpo_version_0.safetensors", "pt") as file:
        assert file.metadata()["ss_network_alpha"] == "2"
    assert read_stamp(tmp_path / "adapter") == read_stamp(run / "adapter")
    text = (tmp_path / "README.md").read_text()
    for told in (
        f"Trained from `{tiny_xl}`",
        "height=16,\n    width=24,",
        "num_inference_steps=2,\n    eta=1.0,\n    guidance_scale=5.0,",
        "brightness (Brightness, weight 1), redness (Redness, monitored)",
        "TextPrompts (path prompts.txt",
        "| reward |",
        "DDIM (num_steps 2, eta 1.0)",
        "![held-out images](validation_",
        "StableDiffusionXLPipeline",
        "LoRA (rank 2, alpha 8",
    ):
        assert told in text, told
    assert "base_model" not in text  # a folder of this machine
    assert [path.name for path in tmp_path.glob("validation_*.png")] == ["validation_00000004.png"]


def test_an_export_replaces_an_earlier_one_and_nothing_else(runs: Path, tmp_path: Path, capsys: Any) -> None:
    (own := tmp_path / "pipeline" / "mine.py").parent.mkdir()
    own.write_text("a program")
    main(
        [
            "export",
            str(runs / "version_0"),
            "--form",
            "adapter",
            "--out",
            str(tmp_path / "out"),
            "--steps=1",
            "--name=name",
        ]
    )
    before = read_stamp(runs / "version_1" / "adapter")
    for given, said in (
        (["--out", str(tmp_path), "--form", "pipeline"], f"{own.parent} is there and no earlier export"),
        (["--out", str(runs / "version_1")], "version_1 is the folder of a run"),
    ):
        with pytest.raises(SystemExit):
            main(["export", str(runs / "version_0"), *given, "--steps=1"])
        assert said in capsys.readouterr().err
    assert own.read_text() == "a program"
    assert read_stamp(runs / "version_1" / "adapter") == before
    check_replaced(tmp_path / "out", ["adapter"], "name", [(read_run(runs / "version_0"), 1.0)])


def test_a_card_names_the_function_that_is_a_reward():
    function = {"class_path": "lit_align.rewards.FunctionReward", "init_args": {"function": "mine.blue"}}
    bank = {"init_args": {"rewards": {"blue": function}, "weights": {"blue": 2.0}}}
    assert _rewards({"rewards": bank}) == ["blue (mine.blue, weight 2)"]


def test_figures_and_facts_are_of_the_weights_that_are_exported(runs: Path, tmp_path: Path):
    run = runs / "version_1"
    validated = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    validated["progress"]["images"] = 8  # as it was then
    validated["callbacks"]["RunConfig"]["settings"]["model.sampling.guidance"] = 3.0  # before it went on
    config = (run / "config.yaml").read_text()
    torch.save(validated, run / "checkpoints" / "then.ckpt")
    (run / "config-2.yaml").write_text(config)
    (run / "config.yaml").write_text(config.replace("guidance: 5.0", "guidance: 3.0"))
    texts = {}
    for name, given in {"then": "checkpoints/then.ckpt", "end": ""}.items():
        main(["export", str(run / given), "--form", "adapter", "--out", str(tmp_path / name), "--steps", "1"])
        texts[name] = (tmp_path / name / "README.md").read_text()
        images = 8 if name == "then" else 12
        stamped = read_stamp(tmp_path / name / "adapter")
        assert stamped == read_stamp(run / "adapter") | {"images": images}
        assert f"| images | {images} |" in texts[name]
    report = json.loads((run / "validation.json").read_text())
    assert (report["images"], report["reward_queries"], report["complete"]) == (8, 8, True)
    own = report["metrics"]["reward"]
    row = f"| reward | {own['before']:.4f} | {own['after']:.4f} | {own['difference']:+.4f} |"
    assert "validation, 8 images trained on, 4 pairs of images\n\n" in texts["then"]
    assert row in texts["then"]
    assert texts["then"].count("| reward |") == 1
    assert "validation_00000008.png" in texts["then"]
    assert "guidance_scale=3.0" in texts["then"]
    assert "## Metrics" not in texts["end"]
    assert "validation_" not in texts["end"]
    last = mixture_of([read_run(run / "checkpoints" / "last.ckpt")], [1.0])
    assert facts(last.runs)["images"] == 12
    assert "## Metrics" not in card(last, [], "last", [])
    (run / "test.json").write_text(json.dumps(report | {"split": "test", "images": 12}))
    shown = card(mixture_of([read_run(run)], [1.0]), [], "end", [])
    assert "test, 12 images trained on" in shown
    assert shown.count("| reward |") == 1
    (run / "test.json").unlink()


def test_a_mixture_and_a_checkpoint_are_exported_without_a_fit(runs: Path, tmp_path: Path, tiny_xl: Path):
    both = [read_run(runs / f"version_{number}") for number in range(2)]
    live = mixture_of(both, [0.3, 0.7])
    made = export(live, ["adapter", "kohya"], tmp_path / "mixture", "soup", 2)
    assert max(one.difference for one in made) < 1e-5
    text = card(live, made, "soup", [])
    assert "0.3 x version_0, 0.7 x version_1" in text
    assert "## Metrics of version_0" in text  # and not of the mixture
    assert facts([(both[0], 0.5)]) == {"mixture": [{"weight": 0.5} | both[0].facts]}
    saved = read_run(runs / "version_0" / "checkpoints" / "last.ckpt")
    (one,) = export(mixture_of([saved], [1.0]), ["adapter"], tmp_path / "checkpoint", "last", 2)
    assert one.difference == 0
    newest = load_file(runs / "version_0" / "adapter" / "pytorch_lora_weights.safetensors")
    again = load_file(one.path / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(again[name], value) for name, value in newest.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no nowhere; give the folder of a run"),
        (["{runs}"], "is not in a folder with a config.yaml"),
        (["{runs}/version_0", "{runs}/version_1"], "2 runs need --weights with a number for each"),
        (["{runs}/version_0", "--weights", "nan"], "--weights nan make no mixture"),
        (["{runs}/version_0", "{runs}/version_1", "--weights", "0", "0"], "--weights 0 0 make no mixture"),
        (["{runs}/version_0", "--steps", "0"], "export: --steps: 0 must be positive"),
        (["{runs}/version_0", "--device", "gpu"], "--device gpu cannot be used"),
        (["{runs}/version_0", "--name", "../a"], "--name '../a' is not a file name; give --out"),
        (["{runs}/version_0", "--out", "{runs}/version_1"], "is the folder of a run; give another"),
    ],
)
def test_what_cannot_be_exported_is_named(runs: Path, capsys: Any, arguments: list[str], message: str):
    with pytest.raises(SystemExit):
        main(["export", *(argument.format(runs=runs) for argument in arguments)])
    assert message in capsys.readouterr().err


def test_nothing_else_is_replaced(runs: Path, tmp_path: Path, capsys: Any):
    def exported(run: str, name: str) -> str:
        capsys.readouterr()
        try:
            out = ["--out", str(tmp_path), "--name", name]
            main(["export", str(runs / run), *out, "--form", "kohya", "--steps=1"])
        except SystemExit:
            return str(capsys.readouterr().err)
        return ""

    (tmp_path / "README.md").write_text("# My project\n")
    assert "README.md is there and no earlier export of star; give another" in exported("version_0", "star")
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    (tmp_path / "README.md").unlink()
    assert exported("version_0", "star.safetensors") == exported("version_0", "star") == ""
    assert sorted(file.suffix for file in tmp_path.glob("star*")) == [".safetensors"]
    assert "no earlier export of moon" in exported("version_0", "moon")
    facts_of = read_stamp(tmp_path / "star.safetensors")
    stamp(tmp_path / "star.safetensors", facts_of | {"seed": 5})
    assert "star.safetensors is of another run (seed: 5 -> 0); give another --out" in exported(
        "version_0", "star"
    )


def test_a_soup_of_experts_and_an_expert_are_not_told_to_be_what_was_measured(
    runs: Path, tmp_path: Path, capsys: Any
):
    """MSDDA measures the fused policy; its best.ckpt, which was named beside, cannot be exported."""
    shutil.copytree(runs / "version_0", run := tmp_path / "run")
    expert = shutil.copytree(runs / "version_0" / "adapter", run / "adapter" / "red")
    for place, told in ((run, "the soup of the run's experts"), (expert, "the run's expert red.")):
        main(
            [
                "export",
                str(place),
                "--form=adapter",
                "--steps=1",
                "--out",
                str(out := tmp_path / f"of_{place.name}"),
            ]
        )
        assert f"These weights are {told}" in (out / "README.md").read_text()
        assert "| reward |" not in (out / "README.md").read_text()
        said = capsys.readouterr().out
        assert "best.ckpt" not in said
        assert ("an approximation of the fused policy" in said) == (place is run)


def test_experts_that_are_whole_models_are_exported_one_by_one(tmp_path: Path):
    (expert := tmp_path / "adapter" / "red").mkdir(parents=True)
    (expert / "model_index.json").touch()
    backbone = {"init_args": {"pretrained": "shapes", "lora": None}}
    run = Run(tmp_path, tmp_path / "adapter", {"model": {"init_args": {"backbone": backbone}}})
    with pytest.raises(ConfigError, match=f"cannot be one: give one of them, such as {expert}"):
        mixture_of([run], [1.0])


def test_other_weights_under_the_name_of_the_base_are_refused(
    runs: Path, tiny_xl: Path, tmp_path: Path
) -> None:
    base, run = tmp_path / tiny_xl.name, tmp_path / "run"
    shutil.copytree(tiny_xl, base)
    shutil.copytree(runs / "version_0", run)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(tiny_xl), str(base)))
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, {"format": "pt"})
    for place in (run, run / "checkpoints" / "best.ckpt"):
        with pytest.raises(ConfigError, match=r"was trained over other weights \(\w+\) than those now in"):
            mixture_of([read_run(place)], [1.0])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: [1", "config.yaml is not a configuration; put back"),
        ("model: 1\n", "config.yaml does not say what the model is"),
        (
            "StableDiffusionXLBackbone -> mine.Backbone",
            "the backbone of .*run, mine.Backbone, cannot be made",
        ),
    ],
)
def test_a_run_without_its_configuration_is_named(runs: Path, tmp_path: Path, text: str, told: str) -> None:
    shutil.copytree(runs / "version_0", run := tmp_path / "run")
    old, arrow, new = text.partition(" -> ")
    whole = (run / "config.yaml").read_text()
    changed = re.sub(rf"[\w.]*\b{old}", new, whole) if arrow else text
    (run / "config.yaml").write_text(changed)
    with pytest.raises(ConfigError, match=told):
        mixture_of([read_run(run)], [1.0])


def test_the_snippet_of_the_readme_draws_an_image_of_predict_again(
    runs: Path, tiny: Path, tiny_xl: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """For SDXL with an adapter, and for Stable Diffusion 1 without, where the last step draws no noise."""
    page = (ROOT / "lit_align" / "backbones" / "README.md").read_text()
    (snippet,) = re.findall(r"^```python\n(# again.py.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(runs.parents[1])
    monkeypatch.setattr(sys, "argv", ["lit_align"])
    run = runs / "version_0"
    main(["predict", f"--config={run / 'config.yaml'}", f"--ckpt_path={run}", "--trainer.accelerator=cpu"])
    xl = again(
        snippet,
        run,
        {
            "stabilityai/stable-diffusion-xl-base-1.0": str(tiny_xl),
            "50, 1.0, 50, 5.0, (1024, 1024)": "2, 1.0, 2, 5.0, (16, 24)",
            "logs/ddpo/version_0/adapter": str(run / "adapter"),
        },
    )
    assert xl < 2
    pretrained = [f"--model.backbone.pretrained={tiny}", "--model.sampler.noisy_steps=1"]
    config = str(ROOT / "configs/ddpo.yaml")
    main(
        [
            "predict",
            "--config",
            config,
            *SMALL,
            *pretrained,
        ]
    )
    (run,) = Path("logs/ddpo").glob("version_2")
    one = again(
        snippet,
        run,
        {
            "stabilityai/stable-diffusion-xl-base-1.0": str(tiny),
            "50, 1.0, 50, 5.0, (1024, 1024)": "2, 1.0, 1, 1.0, (16, 16)",
            "StableDiffusionXLPipeline": "StableDiffusionPipeline",
            "add_watermarker=False": "safety_checker=None",
            'pipeline.load_lora_weights("logs/ddpo/version_0/adapter")\n': "",
        },
    )
    assert one < 2


def again(snippet: str, run: Path, replaced: dict[str, str]) -> int:
    """Largest difference of the snippet's image to the last one of ``predict``, of 255."""
    (folder,) = run.glob("predictions*")
    row = json.loads((folder / "metadata.jsonl").read_text().splitlines()[-1])
    assert row["index"] > 0
    shown = {name: row[name] for name in ("prompt", "seed", "index")}
    replaced = {'{"prompt": "a red star", "seed": 0, "index": 0}': repr(shown)} | replaced
    for old, new in replaced.items():
        assert old in snippet
        snippet = snippet.replace(old, new)
    names: dict[str, Any] = {}
    exec(compile(snippet, "again.py", "exec"), names)  # the documentation's own
    drawn, expected = (
        np.asarray(image).astype(int) for image in (names["image"], Image.open(folder / row["file_name"]))
    )
    return int(np.abs(drawn - expected).max())


@pytest.mark.slow
def test_a_run_of_all_weights_is_exported_as_a_pipeline(
    tiny_xl: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit_align"])
    fit(tiny_xl, f"--config={ROOT}/configs/backbone/full.yaml", "--model.optimisation.optimizer.lr=1e-3")
    for given in ("", "checkpoints/last.ckpt"):
        main(["export", f"logs/ddpo/version_0/{given}", "--out", "out", "--steps", "2"])
        assert "difference to the live model: 0\n" in capsys.readouterr().out
    pipeline = StableDiffusionXLPipeline.from_pretrained("out/pipeline")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(SystemExit):
        main(["export", "logs/ddpo/version_0", "--form", "kohya"])
    assert "all weights were trained, so there is no kohya" in capsys.readouterr().err
