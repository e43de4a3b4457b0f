"""Make the Shapes weights: ``python -m lit_align.shapes.recipe --out DIR [--stage NAME] [--minutes M]``.

Without ``--stage`` all stages run in order. A stage whose result lies in DIR is not made again; delete its
folder to repeat it.
"""

import os

# Two threads that spin for each other's sake are several times slower on a busy machine; read when torch is
# imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from jsonargparse import CLI
from lightning import seed_everything

from lit_align.errors import ConfigError
from lit_align.shapes.recipe.stages import FURTHER, REWARD_MODELS, Recipe, StageName


def main(
    out: Path,
    stage: StageName | None = None,
    minutes: float | None = None,
    steps: int = 1_000_000,
    num_images: int = 200_000,
    num_latents: int = 120_000,
    num_pairs: int = 20_000,
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed",
    export_every: float = 10.0,
    num_samples: int = 256,
    seed: int = 0,
    further: bool = False,
    num_processes: int = 1,
    compile: bool = False,
) -> None:
    """Run one stage or all; see :class:`Recipe` for the arguments."""
    if further and stage not in FURTHER:
        raise ConfigError(
            f"--further true trains one stage for another round; give --stage {' or '.join(FURTHER)} with it."
        )
    out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        out,
        minutes,
        steps,
        num_images,
        num_latents,
        num_pairs,
        precision,
        export_every,
        num_samples,
        seed,
        further,
        num_processes,
        compile,
    )
    stages: dict[str, Callable[[], None]] = {
        "images": recipe.images,
        "tokenizer": recipe.tokenizer,
        "clip": recipe.clip,
        "vae": recipe.vae,
        "decoder": recipe.decoder,
        "unet": recipe.unet,
        "lies": recipe.lies,
        "flow": recipe.flow,
        "flow_lies": recipe.flow_lies,
        "pick": recipe.pick,
        **{name: partial(recipe.reward_model, name) for name in REWARD_MODELS},
        "quality": recipe.quality,
    }
    for name, run in stages.items():
        if stage in (None, name):
            seed_everything(seed, verbose=False)
            run()


if __name__ == "__main__":
    CLI(main, as_positional=False)
