"""The stages of the recipe, over one folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from lit_align.errors import ConfigError
from lit_align.shapes.recipe.aesthetic import make_aesthetic
from lit_align.shapes.recipe.classifier import make_classifier
from lit_align.shapes.recipe.clip import CLIPStage, load_clip, make_clip, tokenize
from lit_align.shapes.recipe.detector import make_detector
from lit_align.shapes.recipe.flow import (
    FURTHER_RATE,
    LIES_RATE,
    RATE,
    make_transformer,
    with_projection,
)
from lit_align.shapes.recipe.following import Following
from lit_align.shapes.recipe.images import Images, draw_images, frame
from lit_align.shapes.recipe.kinds import UNET, Kind, flow_kind
from lit_align.shapes.recipe.lies import CARELESS, SHARE, confuse
from lit_align.shapes.recipe.pick import make_pick
from lit_align.shapes.recipe.pipeline import load_pipeline, replace_folder, save_clip
from lit_align.shapes.recipe.preference import make_preference
from lit_align.shapes.recipe.quality import measure
from lit_align.shapes.recipe.tokenizer import make_tokenizer
from lit_align.shapes.recipe.training import CHECKPOINT, Batches, Budget, fit
from lit_align.shapes.recipe.unet import make_unet
from lit_align.shapes.recipe.vae import VAEStage, encode, make_vae, whiten
from lit_align.shapes.world import words

RewardModel = Literal["aesthetic", "preference", "detector", "classifier"]
StageName = Literal[
    "images",
    "tokenizer",
    "clip",
    "vae",
    "decoder",
    "unet",
    "lies",
    "flow",
    "flow_lies",
    "pick",
    RewardModel,
    "quality",
]
REWARD_MODELS: dict[RewardModel, Callable[[Path, Budget, str, int], None]] = {
    "aesthetic": make_aesthetic,
    "preference": make_preference,
    "detector": make_detector,
    "classifier": make_classifier,
}
MINUTES: dict[str, float] = {"clip": 98.0, "vae": 14.0, "decoder": 7.0, "unet": 148.0, "lies": 20.0}
MINUTES |= {"flow": 153.0, "flow_lies": 20.0}
MINUTES |= {"aesthetic": 1.0, "preference": 10.0, "detector": 51.0, "classifier": 5.0}
FURTHER = ("clip", "unet", "flow", "detector")
"""Stages that can be trained for another round."""
DENOISERS = ("unet", "lies", "flow", "flow_lies")
"""Stages that several processes can train."""
SAMPLE = 1000
"""Pairs of the sample that ships; no model is trained on them."""


@dataclass
class Recipe:
    """All stages, over one folder: working files beside the folders that ship.

    Args:
        out: The folder.
        minutes: CPU-minutes of each trained stage; None takes the shipped weights'.
        steps: Budget of each trained stage in optimizer steps.
        num_images: Training images.
        num_latents: How many of them the denoiser sees.
        num_pairs: Preference pairs.
        precision: "bf16-mixed" is faster on CPUs that have bfloat16 units, "32-true" on others.
        export_every: Minutes between two exports of the denoiser while it trains.
        num_samples: Images per cell of the quality table.
        seed: Of everything.
        further: Train what the stage made (one of ``FURTHER``) for another round.
        num_processes: Processes that train the denoiser, one thread each (set OMP_NUM_THREADS=1).
        compile: Compile the flow model: a quarter faster, after some minutes; needs a C++ compiler.
    """

    out: Path
    minutes: float | None = None
    steps: int = 1_000_000
    num_images: int = 200_000
    num_latents: int = 120_000
    num_pairs: int = 20_000
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed"
    export_every: float = 10.0
    num_samples: int = 256
    seed: int = 0
    further: bool = False
    num_processes: int = 1
    compile: bool = False

    def budget(self, stage: str) -> Budget:
        """The budget of a trained stage."""
        return Budget(MINUTES[stage] if self.minutes is None else self.minutes, self.steps)

    def found(self, *names: str) -> Path:
        """A file of an earlier stage.

        Raises:
            ConfigError: if it is not there.
        """
        path = self.out.joinpath(*names)
        if not path.exists():
            raise ConfigError(
                f"'{path}' is missing; run the stage that makes it first, or leave --stage out."
            )
        return path

    def train(self, stage: Any, num_items: int, batch_size: int, name: str, *callbacks: Any) -> None:
        """Fit one stage on batches of item numbers."""
        batches = Batches(num_items, min(batch_size, num_items), self.seed)
        num_processes = self.num_processes if name in DENOISERS else 1
        fit(stage, batches, self.out / "logs" / name, self.precision, num_processes, callbacks)

    def images(self) -> None:
        """Draw the training images."""
        if not (self.out / "images" / "captions.txt").exists():
            draw_images(self.out / "images", self.num_images, self.seed)

    def tokenizer(self) -> None:
        """Make the tokenizer."""
        if not (self.out / "tokenizer").exists():
            replace_folder(self.out / "tokenizer", make_tokenizer(words()).save_pretrained)

    def clip(self) -> None:
        """Train CLIP; a further round begins with the last one's weights and a fresh learning rate."""
        tokenizer = CLIPTokenizer.from_pretrained(self.found("tokenizer"))
        model = make_clip(tokenizer)
        if (self.out / "clip").exists():
            if not self.further:
                return
            model.load_state_dict(load_clip(self.out / "clip").state_dict())
        stage = CLIPStage(model, Images(self.found("images"), self.seed), tokenizer, self.budget("clip"))
        self.train(stage, len(stage.contrast.allowed), 128, "clip")
        save_clip(self.out / "clip", tokenizer, stage.average)

    def vae(self) -> None:
        """Train the autoencoder, whiten its latent and keep the latents of all images."""
        if (self.out / "latents.pt").exists():
            return
        images = Images(self.found("images"), self.seed)
        if not (self.out / "vae").exists():
            stage = VAEStage(make_vae(), images, self.budget("vae"))
            self.train(stage, len(images), 16, "vae")
            whiten(stage.average, encode(stage.average, images, torch.arange(min(4000, len(images)))))
            replace_folder(self.out / "vae", stage.average.save_pretrained)
        vae = AutoencoderKL.from_pretrained(self.out / "vae")
        torch.save(
            encode(vae, images, torch.arange(min(self.num_latents, len(images)))), self.out / "latents.pt"
        )

    def decoder(self) -> None:
        """Train the decoder for longer on the latents as they are; the denoiser does not notice."""
        if (self.out / "vae_final").exists():
            return
        vae = AutoencoderKL.from_pretrained(self.found("vae"))
        stage = VAEStage(
            vae, Images(self.found("images"), self.seed), self.budget("decoder"), decoder_only=True
        )
        self.train(stage, len(stage.images), 16, "decoder")
        replace_folder(self.out / "vae_final", stage.average.save_pretrained)

    def unet(self) -> None:
        """Train the denoiser, and the text tower that it reads, on clean captions."""
        if not (self.out / "clean").exists() or self.unfinished("unet"):
            tower = self.out / "text"
            text = (
                CLIPTextModel.from_pretrained(tower, attn_implementation="eager", dtype=torch.float32)
                if tower.exists()
                else load_clip(self.found("clip")).text_model
            )
            self.denoiser("unet", "clean", UNET, text, make_unet())
        elif self.further:
            last = load_pipeline(self.found("clean"))
            self.denoiser("unet", "clean", UNET, last.text_encoder, last.unet)

    def lies(self) -> None:
        """Train the clean denoiser on with captions that are wrong: the pipeline that ships."""
        if not (self.out / "pipeline").exists() or self.unfinished("lies"):
            clean = load_pipeline(self.found("clean"))
            self.denoiser("lies", "pipeline", UNET, clean.text_encoder, clean.unet, careless=True)

    def flow(self) -> None:
        """Train the flow model on the clean denoiser's velocities."""
        made = (self.out / "flow_clean").exists() and not self.unfinished("flow")
        if made and not self.further:
            return
        teacher = load_pipeline(self.found("clean"))
        if made:
            last = load_pipeline(self.found("flow_clean"))
            text, transformer = last.text_encoder, last.transformer
        else:
            projection = load_clip(self.found("clip")).text_projection
            text, transformer = with_projection(teacher.text_encoder, projection), make_transformer()
        kind = flow_kind(teacher, FURTHER_RATE if self.further else RATE)
        self.denoiser("flow", "flow_clean", kind, text, self.compiled(transformer))

    def flow_lies(self) -> None:
        """Train it on with the careless denoiser's velocities: the flow pipeline that ships."""
        if not (self.out / "flow").exists() or self.unfinished("flow_lies"):
            clean, teacher = load_pipeline(self.found("flow_clean")), load_pipeline(self.found("pipeline"))
            text, transformer = clean.text_encoder, self.compiled(clean.transformer)
            kind = flow_kind(teacher, LIES_RATE)
            self.denoiser("flow_lies", "flow", kind, text, transformer, careless=True)

    def compiled(self, transformer: Any) -> Any:
        """The flow model, its blocks compiled if that is wanted."""
        for block in transformer.transformer_blocks if self.compile else ():
            block.compile(dynamic=False)
        return transformer

    def unfinished(self, stage: str) -> bool:
        """Whether a stage has been interrupted."""
        return (self.out / "logs" / stage / CHECKPOINT).exists()

    def denoiser(
        self, stage: str, folder: str, kind: Kind, text: Any, network: Any, careless: bool = False
    ) -> None:
        """Train a denoiser, on careless images and captions too if wanted, and write its pipeline."""
        tokenizer = CLIPTokenizer.from_pretrained(self.found("tokenizer"))
        latents = torch.load(self.found("latents.pt"), weights_only=True)
        images = Images(self.found("images"), self.seed)
        captions, rng = images.captions[: len(latents)], images.rng("lies")
        if careless:
            chosen = rng.random(len(latents)) < CARELESS
            captions = [
                confuse(caption, SHARE, rng) if wrong else caption
                for caption, wrong in zip(captions, chosen, strict=True)
            ]
            numbers = torch.from_numpy(chosen.nonzero()[0])
            vae = AutoencoderKL.from_pretrained(self.found("vae"))
            latents[numbers] = encode(vae, images, numbers, frame)
        tokens, empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])[0]

        def write(average: torch.nn.ModuleDict) -> None:
            vae = AutoencoderKL.from_pretrained(
                self.found("vae_final" if (self.out / "vae_final").exists() else "vae")
            )
            saved = CLIPTokenizer.from_pretrained(self.found("tokenizer"), model_max_length=kind.positions)
            kind.save(self.out / folder, saved, average["text"], vae, average[kind.part])

        module = kind.stage(
            text,
            network,
            latents=latents,
            tokens=tokens,
            empty=empty,
            budget=self.budget(stage),
            lies=careless,
        )
        file = self.out / f"{stage}.jsonl"
        following = Following(
            self.export_every, write, self.out / folder, file, self.num_samples, self.seed + 2
        )
        self.train(module, len(latents), kind.batch_size // self.num_processes, stage, following)
        if module.global_rank > 0:
            raise SystemExit(0)  # the helpers' work is done

    def pick(self) -> None:
        """Make preference pairs for training, and a sample that ships and measures."""
        make_pick(self.out, self.num_pairs, self.seed, self.found("pipeline"))
        make_pick(self.out / "sample", min(SAMPLE, self.num_pairs), self.seed + 1, self.found("pipeline"))

    def reward_model(self, name: RewardModel) -> None:
        """Train one of the reward models."""
        if self.further or not (self.out / name).exists():
            for needed in ("clip", "pick"):
                self.found(needed)
            REWARD_MODELS[name](self.out, self.budget(name), self.precision, self.seed)

    def quality(self) -> None:
        """Measure the models."""
        for name in ("pipeline", "flow", "clip", *REWARD_MODELS):
            self.found(name)
        pairs = self.out / "sample" / "pick"
        measure(self.out / "quality", self.out, self.out / "flow", pairs, self.num_samples, self.seed + 1)
