"""The truth about a Shapes picture, as a reward without gradient."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lit_align.errors import ConfigError
from lit_align.rewards.base import PictureReward
from lit_align.shapes.world import PICTURE, Caption, judge, parse


class ShapesTruth(PictureReward):
    """The judge of the Shapes world: the share of the prompt's facts that the picture shows, in [0, 1].

    Args:
        whole: Score 1 if every fact holds and 0 otherwise, instead of the share.

    Raises:
        ConfigError: On scoring, for a prompt that is not of the Shapes grammar or a picture of another size.
    """

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole

    def score(self, picture: NDArray[np.uint8], prompt: str) -> float:
        """Judge one picture, ``(H, W, 3)`` uint8, by its prompt."""
        if picture.shape != (PICTURE, PICTURE, 3):
            raise ConfigError(
                f"ShapesTruth judges pictures of {PICTURE} x {PICTURE} pixels, and was given "
                f"{picture.shape[1]} x {picture.shape[0]}; use it with the Shapes pipeline, "
                "or take it out of the bank."
            )
        verdict = judge(picture, _caption(prompt))
        return float(all(verdict.facts.values())) if self.whole else verdict.score


@lru_cache(maxsize=4096)
def _caption(prompt: str) -> Caption:
    """Read a prompt once."""
    try:
        return parse(prompt)
    except ValueError as error:
        raise ConfigError(
            f"ShapesTruth only knows prompts of the Shapes world, and {prompt!r} is none ({error}); "
            f"use it with Shapes prompts, or take this reward out of the bank."
        ) from error
