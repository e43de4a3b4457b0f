"""What the gains of the large-scale tasks on Shapes are measured by.

    python -m tests.benchmarks.bounds [--prompts 128] [--renders 4] [--draws 2000]

For fairness the statistical parity of 16 images whose colours are drawn evenly from those that a prompt
allows (no object has its background's colour), over the prompts of the test split and the first that
training sees (those of seed 1). For composition the score that the detector gives to true renders of such
prompts, which a generated image may exceed.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import yaml

from lit_align.data import PromptDataModule, ShapesPrompts
from lit_align.rewards import ObjectPresence, StatisticalParity
from lit_align.shapes.recipe.images import as_images
from lit_align.shapes.world import COLOURS, parse, render, sample_scene
from tests.benchmarks.harness.plan import ROOT


def source_of(task: str) -> dict[str, Any]:
    """Arguments of the prompts on which a task is trained."""
    overlay = yaml.safe_load((ROOT / "configs" / "variant" / f"pinterest_{task}.yaml").read_text())
    return dict(overlay["data"]["init_args"]["source"]["init_args"])


def prompts_of(source: dict[str, Any], split: str, count: int, **sources: Any) -> list[str]:
    """The prompts on which a task is tested."""
    sizes = {"test_prompts": count, "test_images_per_prompt": 1}
    module = PromptDataModule(ShapesPrompts(**source), seed=1, test_split=split, **sizes, **sources)  # type: ignore[arg-type]
    module.setup("test")
    return [prompt for batch in module.test_dataloader() for prompt in batch.prompts]


def least_parity(prompts: Sequence[str], draws: int, images: int = 16) -> float:
    """Mean statistical parity of sets of images with even colours."""
    rng, reward, names = np.random.default_rng(0), StatisticalParity("shapes"), list(COLOURS)
    found = []
    for prompt in prompts:
        allowed = [i for i, name in enumerate(names) if name != parse(prompt).background]
        colours = rng.choice(allowed, size=(draws, images))
        counts = torch.stack([torch.from_numpy(np.bincount(row, minlength=8)) for row in colours])
        found.append(-reward.value(counts.double(), torch.full((draws,), images)).mean())
    return float(torch.stack(found).mean())


def score_of_renders(prompts: Sequence[str], renders: int) -> float:
    """Mean presence of the objects in true renders of the prompts."""
    rng, repeated = np.random.default_rng(0), [prompt for prompt in prompts for _ in range(renders)]
    renders_of = [render(sample_scene(parse(prompt), rng)) for prompt in repeated]
    images = as_images(np.stack(renders_of))
    return float(ObjectPresence("shapes")(images, repeated).mean())


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compute and print; returns the metrics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--prompts", type=int, default=128, help="of two objects; of fairness at most 32")
    parser.add_argument("--renders", type=int, default=4, help="true images of a prompt")
    parser.add_argument("--draws", type=int, default=2000, help="sets of 16 colours of a prompt")
    options = parser.parse_args(arguments)
    fairness, composition = source_of("fairness"), source_of("composition")
    unseen = ShapesPrompts(kinds=composition["kinds"], only=composition["without"])
    of_pairs = {
        "test": prompts_of(composition, "test", options.prompts),
        "seen": prompts_of(composition, "train", options.prompts),
        "unseen_pairs": prompts_of(composition, "test", options.prompts, test_source=unseen),
    }
    of_open = {"test": "test", "seen": "train"}
    metrics = {
        "parity": {
            test: least_parity(prompts_of(fairness, split, min(32, options.prompts)), options.draws)
            for test, split in of_open.items()
        },
        "presence": {test: score_of_renders(prompts, options.renders) for test, prompts in of_pairs.items()},
    }
    print(json.dumps(metrics, indent=1))
    return metrics


if __name__ == "__main__":
    main()
