"""The truth about a Shapes image, as a reward without gradient."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lit_align.errors import ConfigError
from lit_align.rewards.base import BlackBoxReward
from lit_align.shapes.world import IMAGE_SIDE, Caption, judge, parse


class ShapesTruth(BlackBoxReward):
    """The judge of the Shapes world: the share of the prompt's facts that the image shows, in [0, 1].

    Args:
        whole: Score 1 if every fact holds and 0 otherwise, instead of the share.

    Raises:
        ConfigError: On scoring, for a prompt that is not of the Shapes grammar or an image of another size.
    """

    domain = "shapes"
    documented = (0.0, 1.0)

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole

    def score(self, image: NDArray[np.uint8], prompt: str) -> float:
        """Judge one image, ``(H, W, 3)`` uint8, by its prompt."""
        if image.shape != (IMAGE_SIDE, IMAGE_SIDE, 3):
            raise ConfigError(
                f"ShapesTruth judges images of {IMAGE_SIDE} x {IMAGE_SIDE} pixels, and was given "
                f"{image.shape[1]} x {image.shape[0]}; use it with the Shapes pipeline, "
                "or take it out of the bank."
            )
        verdict = judge(image, _caption(prompt))
        return float(all(verdict.facts.values())) if self.whole else verdict.score


@lru_cache(maxsize=4096)
def _caption(prompt: str) -> Caption:
    """Read a prompt once."""
    try:
        return parse(prompt)
    except ValueError as error:
        raise ConfigError(
            f"ShapesTruth only knows prompts of the Shapes world, and {prompt!r} is not one ({error}); "
            f"use it with Shapes prompts, or take this reward out of the bank."
        ) from error
