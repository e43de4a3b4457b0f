"""Whether settings whose effect grows with the number of latent elements fit the size of a latent."""

from lightning.pytorch.utilities import rank_zero_warn

NATS = (0.05, 50.0)
"""Clip range of a step's log-ratio in nats between which runs have been seen to learn."""

PUBLISHED = 1.6
"""DDPO's (arXiv 2305.13301, table D.5), 1e-4 of the mean over the 16,384 elements of Stable Diffusion."""

STRENGTHS = (0.01, 3.0)
"""``beta`` of the pair losses per latent element: about a tenth of the published ones, and ten times."""

PUBLISHED_STRENGTH = 0.12
"""Diffusion-DPO's (arXiv 2311.12908), 2000 for the 16,384 elements of Stable Diffusion 1.5; 0.08 for SDXL."""


def clip_range_misfit(clip_range: float | None, elements: int) -> tuple[str, str] | None:
    """What is wrong with a clip range, and what would fit; None if nothing is, or there is no clip range.

    Args:
        clip_range: Of a log-ratio, as a mean over this many elements.
        elements: Of a latent; 1 where the log-ratio is their sum.
    """
    if clip_range is None or NATS[0] <= (nats := clip_range * elements) <= NATS[1]:
        return None
    stops = "nearly every update" if nats < NATS[0] else "none"
    of_what = f"{nats:.3g} nats a step" + (f" for a latent of {elements} elements" if elements > 1 else "")
    what = f"{clip_range:g} is {of_what}: it stops {stops}"
    return what, f"published runs have {PUBLISHED} nats, which is {PUBLISHED / elements:.2g} here"


def strength_misfit(beta: float, elements: int) -> tuple[str, str] | None:
    """What is wrong with the ``beta`` of a loss of pairs, and what would fit; None if nothing is.

    Args:
        beta: In the released convention: errors are means over latent elements.
        elements: Of a latent.
    """
    each = beta / elements
    if STRENGTHS[0] <= each <= STRENGTHS[1]:
        return None
    effect = "the loss hardly changes with the policy" if each < STRENGTHS[0] else "the loss soon saturates"
    what = f"{beta:g} is {each:.2g} for each of the {elements} latent elements: {effect}"
    published = PUBLISHED_STRENGTH * elements
    return what, f"published runs have about {PUBLISHED_STRENGTH}, which is {published:.3g} here"


def warn_of(setting: str, found: tuple[str, str] | None) -> None:
    """Warn about what one of these has found, if anything."""
    if found:
        rank_zero_warn(f"{setting}: " + "; ".join(found))
