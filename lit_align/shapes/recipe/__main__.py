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
from typing import Any

from jsonargparse import CLI
from lightning import seed_everything

from lit_align.errors import ConfigError
from lit_align.shapes.recipe.stages import FURTHER, REWARD_MODELS, Recipe, StageName


def main(stage: StageName | None = None, **options: Any) -> None:
    """Run one stage or all.

    Args:
        stage: The one to run; without it all run in order.
        options: Of :class:`Recipe`.
    """
    recipe = Recipe(**options)
    if recipe.further and stage not in FURTHER:
        raise ConfigError(
            f"--further true trains one stage for another round; give --stage {' or '.join(FURTHER)} with it."
        )
    recipe.out.mkdir(parents=True, exist_ok=True)
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
            seed_everything(recipe.seed, verbose=False)
            run()


if __name__ == "__main__":
    CLI(main, as_positional=False)
