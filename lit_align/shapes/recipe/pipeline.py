"""Writing the folders that ship: half precision, and never half-written."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lit_align.shapes.recipe.flow import make_flow_scheduler
from lit_align.shapes.recipe.images import MEAN, STD
from lit_align.shapes.recipe.unet import make_scheduler
from lit_align.shapes.world import IMAGE_SIDE


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a folder beside ``folder``, then put it in its place.

    Args:
        folder: What is replaced.
        write: Called with the path of the new folder.
    """
    fresh, old = (folder.with_name(f".{folder.name}.{name}") for name in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write(fresh)
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)  # transformers leaves them to their owner alone
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save_pipeline(
    folder: Path,
    tokenizer: CLIPTokenizer,
    text: CLIPTextModel,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
) -> None:
    """Write a ``StableDiffusionPipeline`` in float16; the models given stay as they are."""
    text, vae, unet = (half(model) for model in (text, vae, unet))
    unet.set_attn_processor(AttnProcessor2_0())
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    _save(folder, pipeline)


def save_flow_pipeline(
    folder: Path,
    tokenizer: CLIPTokenizer,
    text: CLIPTextModelWithProjection,
    vae: AutoencoderKL,
    transformer: SD3Transformer2DModel,
) -> None:
    """Write a ``StableDiffusion3Pipeline`` in float16, without T5; the models given stay as they are.

    Both of its CLIPs are the text tower.
    """
    text, vae, transformer = (half(model) for model in (text, vae, transformer))
    vae.register_to_config(shift_factor=0.0)  # this pipeline adds it
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=make_flow_scheduler(),
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        text_encoder_2=text,
        tokenizer_2=tokenizer,
        text_encoder_3=None,  # type: ignore[arg-type]
        tokenizer_3=None,  # type: ignore[arg-type]
    )
    _save(folder, pipeline)


def load_pipeline(folder: Path) -> Any:
    """A pipeline that was saved here, in float32; diffusers must be told that the flow model's has no T5."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if (folder / "transformer").exists() else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _save(folder: Path, pipeline: DiffusionPipeline) -> None:
    def write(fresh: Path) -> None:
        pipeline.save_pretrained(fresh)
        for config in fresh.glob("*/config.json"):
            tidy(config)

    replace_folder(folder, write)


def save_clip(folder: Path, tokenizer: CLIPTokenizer, clip: CLIPModel) -> None:
    """Write CLIP and its tokenizer in float16; the model given stays as it is."""

    def write(fresh: Path) -> None:
        half(clip).save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        tidy(fresh / "config.json")
        write_processor(fresh)

    replace_folder(folder, write)


def write_processor(folder: Path) -> None:
    """Say how images are prepared for CLIP; without this file OpenAI's statistics would be taken."""
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    statistics = {"image_mean": MEAN, "image_std": STD}
    config = {"image_processor_type": "CLIPImageProcessor", **statistics, "crop_size": side}
    text = json.dumps({**config, "size": {"shortest_edge": IMAGE_SIDE}}, indent=2)
    (folder / "preprocessor_config.json").write_text(text + "\n", "utf-8")


def digest(folder: Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a folder's files: their names and contents."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(file.relative_to(folder).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:16]


def half(model: Any) -> Any:
    """A copy in float16."""
    return copy.deepcopy(model).half().eval()


def tidy(config: Path) -> None:
    """Forget the working folder; let transformers load float32, as diffusers does."""
    values = json.loads(config.read_text("utf-8"))
    values.pop("_name_or_path", None)
    if "dtype" in values:
        values["dtype"] = "float32"
    for part in ("text_config", "vision_config"):
        if "dtype" in values.get(part, {}):
            values[part]["dtype"] = "float32"
    config.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
