"""HPS v2 against the model that its checkpoint was written from, and transformers' own processor."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lit_align.errors import ConfigError
from lit_align.rewards import HPSv2, RewardBank
from lit_align.shapes.recipe.images import as_images
from tests.rewards import published

PROMPTS = ["a red circle", "two blue squares on the", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hps")
    published.hps(folder)
    return folder


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(64, 192, (3, 16, 16, 3), dtype=np.uint8)


def test_the_checkpoint_is_the_model_it_was_written_from(folder: Path) -> None:
    model, read = published.clip_of_towers(), HPSv2(str(folder)).clip.model
    for name, weight in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], weight), name
    assert read.config.text_config.num_attention_heads == 1
    assert read.config.vision_config.num_attention_heads == 2


def test_scores_are_cosines_of_transformers(folder: Path, pixels: np.ndarray) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    values = processor(list(pixels), return_tensors="pt").pixel_values
    tokens = published.clip_tokenizer()(
        PROMPTS, padding="max_length", truncation=True, max_length=8, return_tensors="pt"
    )
    with torch.no_grad():
        out = published.clip_of_towers()(**tokens, pixel_values=values)
    cosines = (out.image_embeds * out.text_embeds).sum(-1)
    assert cosines.std() > 0.01
    scores = HPSv2(str(folder))(as_images(pixels), PROMPTS)
    torch.testing.assert_close(scores, cosines, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32), (8, 12), (16, 15)])
def test_the_longer_side_fits_between_black_borders(folder: Path, shape: tuple[int, int]) -> None:
    """Pillow rounds to 8 bits after the resize, hence the tolerance."""
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    scale = 16 / max(shape)
    size = (round(shape[0] * scale), round(shape[1] * scale))
    small = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (16, 16))
    canvas.paste(small, ((16 - size[1]) // 2, (16 - size[0]) // 2))
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    theirs = processor(canvas, return_tensors="pt").pixel_values
    clip = HPSv2(str(folder)).clip
    ours = clip.preprocess(as_images(image[None]))
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs() * clip.std < 1.5 / 255).all()


@pytest.mark.parametrize("form", ["file", "safetensors", "version 2.0", "transformers", "bfloat16"])
def test_forms_in_which_the_checkpoint_lies(
    form: str, folder: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    images = as_images(pixels)
    expected = HPSv2(str(folder))(images, PROMPTS)
    model = published.clip_of_towers()
    if form == "file":
        reward = HPSv2(str(folder / "HPS_v2.1_compressed.pt"), processor=str(folder))
    elif form == "safetensors":
        state = {name: weight.contiguous() for name, weight in published.open_clip_names(model).items()}
        save_file(state, tmp_path / "hps.safetensors")
        reward = HPSv2(str(tmp_path), processor=str(folder))
    elif form == "version 2.0":
        published.hps(tmp_path, "HPS_v2_compressed.pt")
        published.hps(tmp_path)
        assert HPSv2(str(tmp_path), version="2.0").clip.published == "HPS_v2_compressed.pt"
        reward = HPSv2(str(tmp_path), version="2.0")
    elif form == "transformers":
        model.save_pretrained(tmp_path)
        reward = HPSv2(str(tmp_path), processor=str(folder))
    else:
        reward = HPSv2(str(folder), dtype="bfloat16")
        assert reward.clip.model.dtype == torch.bfloat16
    tolerance = 0.02 if form == "bfloat16" else 1e-6
    torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=0, atol=tolerance)


def test_gradient_of_every_pixel(folder: Path) -> None:
    reward = HPSv2(str(folder)).double()
    draw = torch.Generator().manual_seed(5)
    pixels = torch.rand(1, 3, 12, 20, generator=draw, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(pixels, PROMPTS[:1]).sum(), pixels)
    assert gradient.ne(0).all()  # nothing is cropped
    assert torch.autograd.gradcheck(lambda x: reward(x, PROMPTS[:1]), (pixels,), fast_mode=True)


def test_two_rewards_share_what_they_load_alike(folder: Path) -> None:
    one, two, low = HPSv2(str(folder)), HPSv2(str(folder)), HPSv2(str(folder), dtype="bfloat16")
    assert one.clip is two.clip
    assert one.clip is not low.clip
    bank = RewardBank({"one": one, "two": two}, {"one": 1.0})
    assert sum(weight.numel() for weight in bank.parameters()) == sum(w.numel() for w in one.parameters())
    one.double()
    assert HPSv2(str(folder)).clip is not one.clip  # it was changed


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (
            "empty",
            r"has no HPS_v2.1_compressed.pt; give the file, or the folder with it, or the fol",
        ),
        ("other", r"not a checkpoint of HPS v2: it has no .*patch_embedding.*; give HPS_v2.1"),
        ("broken", r"cannot read .*download it again"),
        ("half", r"missing keys, \d+ of them"),
        ("./nowhere.pt", "neither a file nor a folder"),
    ],
)
def test_what_is_no_checkpoint(place: str, said: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "HPS_v2.1_compressed.pt"
    if place == "other":
        torch.save({"state_dict": {"weight": torch.zeros(2)}}, file)
    elif place == "broken":
        file.write_bytes((folder / file.name).read_bytes()[:1000])
    elif place == "half":
        state = published.open_clip_names(published.clip_of_towers())
        torch.save({n: w for n, w in state.items() if "resblocks.1.mlp" not in n}, file)
    with pytest.raises(ConfigError, match=said) as caught:
        HPSv2(place if place.startswith(".") else str(tmp_path), processor=str(folder))
    assert "\n" not in str(caught.value)
