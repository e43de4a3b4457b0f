"""FID and KID of a test's images against a folder of images."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from scipy.linalg import sqrtm
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

from lit_align.callbacks import ImageDistance, RunFolder, RunSummary, TestReport
from lit_align.callbacks.distance import distances, in_order
from lit_align.errors import ConfigError
from lit_align.methods import DDPOModule
from lit_align.rewards import ImageFeatures
from tests.methods.build import make, prompts, randomise, trainer


def test_overlays_add_callbacks_and_take_none_away():
    """A guard of an earlier file must not be lost without a word."""
    for file in (Path(__file__).parents[2] / "configs").rglob("*.yaml"):
        assert "callbacks" not in (yaml.safe_load(file.read_text()).get("trainer") or {}), file


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("reference")
    (folder / "more").mkdir()
    draw = np.random.default_rng(0)
    for number in range(5):
        name = f"more/{number}.jpg" if number % 2 else f"{number}.png"
        Image.fromarray(draw.integers(0, 255, (24, 20, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("dino")
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    Dinov2Model(Dinov2Config(**sizes, patch_size=14)).save_pretrained(folder)
    return folder


def test_the_distances_are_those_of_their_definitions():
    draw = torch.Generator().manual_seed(0)
    real, drawn = (torch.randn(count, 4, generator=draw, dtype=torch.float64) for count in (30, 20))
    drawn = 0.5 * drawn + 1
    state = torch.get_rng_state()
    found = distances(real, drawn)
    assert torch.equal(torch.get_rng_state(), state)
    means, covariances = ([f(x.numpy().T) for x in (real, drawn)] for f in (lambda x: x.mean(1), np.cov))
    root = sqrtm(covariances[0] @ covariances[1]).real
    fid = np.square(means[0] - means[1]).sum() + np.trace(sum(covariances) - 2 * root)
    assert found["fid"] == pytest.approx(fid, rel=1e-4)
    # KID of all images of both sets is the unbiased estimate with the cubic kernel; here of the first 20.
    alike = distances(real[:20], drawn)["kid"]
    kernels = [
        (x @ y.T / 4 + 1) ** 3 for x, y in ((real[:20], real[:20]), (drawn, drawn), (real[:20], drawn))
    ]
    within = [(k.sum() - k.trace()) / (20 * 19) for k in kernels[:2]]
    assert alike == pytest.approx(float(sum(within) - 2 * kernels[2].mean()), rel=1e-5)
    assert distances(real, real)["fid"] == pytest.approx(0, abs=1e-5)


def test_the_order_is_that_of_the_images_whichever_process_measured_them():
    features, numbers = torch.randn(30, 4), torch.arange(30)
    ranks = [(numbers[rank::2], features[rank::2]) for rank in range(2)]
    assert torch.equal(in_order(ranks), features)
    assert distances(features, torch.cat([part for _, part in ranks]), 9) != distances(features, features, 9)


def test_features_come_from_a_clip_or_from_what_a_vision_model_pools(dino: Path):
    images = torch.rand(3, 3, 40, 30, generator=torch.Generator().manual_seed(0))
    clip = ImageFeatures("shapes")(images)
    torch.testing.assert_close(clip.norm(dim=1), torch.ones(3))
    features = ImageFeatures(str(dino))
    assert features(images).shape == (3, 12)
    assert not any(p.requires_grad for p in features.parameters())
    pixels = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = Dinov2Model.from_pretrained(dino).eval()(pixel_values=(pixels - 0.5) / 0.5).pooler_output
    torch.testing.assert_close(features(pixels), own)


def test_a_model_without_images_and_a_folder_without_them_are_refused(reference, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(**sizes, vocab_size=10)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="is a bert, for which no image vector is known"):
        ImageFeatures(str(tmp_path / "bert"))
    with pytest.raises(ConfigError, match="finds 0 images under"):
        ImageDistance(str(tmp_path), "shapes")
    with pytest.raises(ConfigError, match="not a folder"):
        ImageDistance(str(reference), "./nowhere")


def test_a_test_and_its_report_have_both(reference: Path, dino: Path, tiny: Path, tmp_path: Path, capsys):
    module = make(DDPOModule, tiny, num_steps=2, lr=0.1)
    distance = ImageDistance(str(reference), str(dino))
    data = prompts(test_prompts=3, test_images_per_prompt=2)
    logger = CSVLogger(tmp_path, name=None, version="")
    callbacks = [RunFolder(tmp_path), RunSummary(), TestReport(), distance]
    testing = trainer(tmp_path, 1, *callbacks, logger=logger)
    with pytest.warns(UserWarning, match="fid of 5 images and 12 features"):
        testing.test(module, data, verbose=False)
    metrics = json.loads((tmp_path / "test.json").read_text())["metrics"]
    for name in ("fid", "kid"):
        found = metrics[name]
        assert math.isfinite(found["before"])
        assert found["difference"] == found["after"] - found["before"] == 0  # nothing was trained
        assert f"<td>{name}</td>" in (tmp_path / "report.html").read_text()
    assert "against 5 images" in capsys.readouterr().out.replace("\n", " ")
    pretrained = {name: dict(found) for name, found in module.set_metrics.items()}
    randomise(module)
    trainer(tmp_path, 1, distance).test(module, data, verbose=False)
    for name, found in module.set_metrics.items():
        assert found["before"] == pretrained[name]["before"] != found["after"]
        assert found["difference"] == found["after"] - found["before"]
    (reference / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    broken = ImageDistance(str(reference), str(dino))
    try:
        with pytest.raises(ConfigError, match=r"broken\.png.*take it out"):
            trainer(tmp_path, 1, broken).test(module, data, verbose=False)
    finally:
        (reference / "broken.png").unlink()
    module.set_metrics = {"fid": {}}
    trainer(tmp_path, 1).test(module, data, verbose=False)
    assert module.set_metrics == {}  # of a test without it
