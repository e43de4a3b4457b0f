"""The overlays of flow models train one batch, with every method that they go on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lit_align.cli import main
from tests.test_cli import METHODS, ON_PAIRS, OWN, ROOT, SMALL_PAIRS, scalars
from tests.test_cli import SMALL as SMALL_PROMPTS

MODELS = {"sd35": "sd3", "flux": "flux", "flux2": "klein", "z_image": "z_image"}
SMALL = {
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": 1,
    "trainer.limit_train_batches": 1,
    "trainer.limit_val_batches": 1,
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "data.images_per_prompt": 2,
    "data.prompts_per_batch": 2,
    "data.validation_prompts": 2,
    "data.validation_images_per_prompt": 1,
    "model.sampler.num_steps": 3,
    "model.sampler.noisy_steps": 2,
    "model.optimisation.micro_batch": 4,
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lit_align"])
    (tmp_path / "prompts.txt").write_text("\n".join(f"a star number {i}" for i in range(200)))
    return tmp_path


def train(method: str, overlays: list[str], model: Path, **options: object) -> dict[str, float]:
    """What one batch logs, by name."""
    files = [f"configs/{method}.yaml", *(f"configs/{overlay}.yaml" for overlay in overlays)]
    given = SMALL | {"model.backbone.pretrained": model, "data.source.path": "prompts.txt"} | options
    main(
        ["fit", *(f"--config={ROOT / file}" for file in files), *(f"--{n}={v}" for n, v in given.items())],
    )
    (run,) = Path("logs").glob("*/version_0")
    found = scalars(run)
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["sampler"]
    assert saved["class_path"].endswith("FlowSDE")
    assert set(saved["init_args"]) == {"num_steps", "rule", "noise_level", "noisy_steps"}
    return {name: found.Scalars(name)[-1].value for name in found.Tags()["scalars"]}


@pytest.mark.parametrize(
    ("overlay", "size", "more"),
    [
        ("sd35", 64, []),
        pytest.param("flux", "[32,48]", ["variant/flow_grpo"], marks=pytest.mark.slow),
        pytest.param("flux2", 64, [], marks=pytest.mark.slow),
        pytest.param("flux2", 32, ["variant/flow_grpo"], marks=pytest.mark.slow),
        pytest.param("z_image", "[32,48]", ["variant/flow_grpo"], marks=pytest.mark.slow),
        pytest.param("sd35", "[32,48]", ["variant/flow_grpo"], marks=pytest.mark.slow),
    ],
)
def test_the_overlays_go_on_ddpo_with_any_reward(
    overlay: str, size: object, more: list[str], work: Path, flow_folder: Callable[[str], Path]
) -> None:
    overlays = [f"backbone/{overlay}", *more, "variant/compressibility"]
    logged = train("ddpo", overlays, flow_folder(MODELS[overlay]), **{"model.backbone.size": size})
    assert {"train/reward/jpeg", "val/reward/jpeg", "val/kl"} <= set(logged)
    assert logged["train/kl"] > 0


@pytest.mark.slow
def test_a_run_is_exported_as_an_adapter_and_as_a_pipeline(
    work: Path, flow_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    overlays = ["backbone/sd35", "variant/compressibility"]
    train("ddpo", overlays, flow_folder("sd3_without_t5"), **{"model.backbone.size": 32})
    (run,) = Path("logs").glob("*/version_0")
    main(["export", str(run), "--out", "one"])
    assert "largest pixel difference to the live model: 0\n" in capsys.readouterr().out
    assert not list(Path("one").glob("*.safetensors"))  # kohya's names are for UNets
    main(["export", str(run), "--form", "pipeline", "--out", "other"])
    assert "largest pixel difference" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("overlay", MODELS)
@pytest.mark.parametrize("method", ["prdp", "nft", "alignprop"])
def test_the_overlays_go_on_the_other_methods_on_prompts(
    method: str, overlay: str, work: Path, flow_folder: Callable[[str], Path]
) -> None:
    variant = ["variant/alignprop_compressibility"] if method == "alignprop" else ["variant/compressibility"]
    logged = train(
        method,
        [f"backbone/{overlay}", *variant],
        flow_folder(MODELS[overlay]),
        # AlignProp's windows have up to 10 steps, and DiffusionNFT takes 4 timesteps.
        **{"model.backbone.size": 32, "model.sampler.num_steps": 10, "model.sampler.noisy_steps": 5},
    )
    assert logged["train/loss"] == logged["train/loss"]
    assert "val/reward" in logged


ON_SHAPES = [
    *((path.stem, ()) for path in METHODS),
    ("ddpo", ("variant/dpok",)),
    ("ddpo", ("variant/flow_grpo", "clip_range=3e-3")),
    ("nft", ("variant/awm",)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "more"), ON_SHAPES, ids=lambda part: part if isinstance(part, str) else Path(*part[:1]).stem
)
def test_the_bundled_flow_model_goes_on_every_method(method: str, more: tuple[str, ...], work: Path) -> None:
    names = [method, "backbone/shapes_flow", *(name for name in more if "=" not in name)]
    options = [f"--model.{option}" for option in more if "=" in option]
    small = SMALL_PAIRS if method in ON_PAIRS else SMALL_PROMPTS
    files = [f"--config={ROOT}/configs/{name}.yaml" for name in names]
    main(["fit", *files, *small, *OWN.get(method, []), *options])
    (run,) = Path("logs").glob("*/version_0")
    found = scalars(run)
    assert {"train/loss", "val/truth"} <= set(found.Tags()["scalars"])
    assert found.Scalars("val/kl")[-1].value > 0
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    assert saved["backbone"]["class_path"].endswith("StableDiffusion3Backbone")
    assert saved["backbone"]["init_args"]["pretrained"] == "shapes"
