"""Whether a clip range of log-ratios fits the size of a latent."""

from lightning.pytorch.utilities import rank_zero_warn

NATS = (0.05, 50.0)
"""Clip range of a step's log-ratio in nats between which runs have been seen to learn."""

PUBLISHED = 1.6
"""DDPO's (arXiv 2305.13301, table D.5), 1e-4 of the mean over the 16,384 elements of Stable Diffusion."""


def misfit(clip_range: float, elements: int) -> tuple[str, str] | None:
    """What is wrong with a clip range, and what would fit; None if nothing is.

    Args:
        clip_range: Of a log-ratio, as a mean over this many elements.
        elements: Of a latent; 1 where the log-ratio is their sum.
    """
    nats = clip_range * elements
    if NATS[0] <= nats <= NATS[1]:
        return None
    stops = "nearly every update" if nats < NATS[0] else "none"
    of_what = f"{nats:.3g} nats a step" + (f" for a latent of {elements} elements" if elements > 1 else "")
    what = f"{clip_range:g} is {of_what}: it stops {stops}"
    return what, f"published runs have {PUBLISHED} nats, which is {PUBLISHED / elements:.2g} here"


def warn_of_misfit(clip_range: float | None, elements: int) -> None:
    """Warn at the start of a run about what :func:`misfit` finds."""
    if clip_range is not None and (found := misfit(clip_range, elements)):
        rank_zero_warn("clip_range: " + "; ".join(found))
