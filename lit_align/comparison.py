"""Paired comparison: two models on the same prompts and the same noise."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DISTANCES = ("kl", "drift")
"""Metrics of how far a policy is from the pretrained model: 0 of that itself, and a chain has one of them."""


@dataclass(frozen=True)
class Comparison:
    """What a paired comparison found.

    Attributes:
        before: Mean score of the first model.
        after: Mean score of the second model.
        difference: Mean of the paired differences, ``after - before``.
        standard_error: Standard error of ``difference``.
        win_rate: Share of the pairs where the second model scores higher; ties count half.
        win_rate_error: Standard error of ``win_rate``.
        num_pairs: Pairs in which both have a score.
    """

    before: float
    after: float
    difference: float
    standard_error: float
    win_rate: float
    win_rate_error: float
    num_pairs: int

    def __str__(self) -> str:
        change = f"{self.difference:+.4f} ± {self.standard_error:.4f}"
        return f"{self.before:.4f} -> {self.after:.4f}  ({change}, {self.num_pairs} pairs)"


def compare(before: Tensor, after: Tensor, groups: Tensor) -> Comparison:
    """Compare two models on the same (prompt, noise) pairs.

    Args:
        before: Scores of the first model, ``(N,)``; NaN where there is none.
        after: Scores of the second model on the same pairs, ``(N,)``.
        groups: ``(N,)`` prompt numbers. Images of one prompt are not independent, so the standard error is
            that of the prompts' sums of differences around their expectation (clustered by prompt).

    Returns:
        The comparison over the pairs in which both have a score. With fewer than two prompts the standard
        errors are NaN.
    """
    assert before.shape == after.shape == (len(before),)
    both = before.isfinite() & after.isfinite()
    before, after, groups = before[both].double(), after[both].double(), groups[both]
    difference = after - before
    count = len(difference)
    prompts, which = groups.unique(return_inverse=True)
    clusters = len(prompts)

    def error(values: Tensor) -> float:
        if clusters < 2:
            return math.nan
        sums = torch.zeros(clusters, dtype=torch.float64).index_add(0, which, values - values.mean())
        return math.sqrt(clusters / (clusters - 1) * sums.square().sum().item()) / count

    wins = (difference > 0).double() + 0.5 * (difference == 0).double()
    mean = [x.mean().item() if count else math.nan for x in (before, after, difference, wins)]
    return Comparison(mean[0], mean[1], mean[2], error(difference), mean[3], error(wins), count)


def spread(values: Tensor) -> float:
    """Standard deviation of those that are numbers; NaN where fewer than two are."""
    known = values[values.isfinite()].double()
    return float(known.std()) if len(known) > 1 else math.nan


def diversity(images: Tensor, groups: Tensor, side: int = 16) -> Tensor:
    """Distance of each image to the others of its prompt.

    It is the root mean square difference of pixels, averaged over the others. Images are first averaged
    down to ``side`` pixels, so that layout and colour count and fine texture does not. In units of the pixel
    range: 0 for identical images; two independent noise images without averaging would be at 0.41.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        groups: ``(B,)``; images with the same number belong to the same prompt.
        side: Pixels a side of the averaged images.

    Returns:
        ``(B,)``; NaN for an image that is the only one of its prompt.
    """
    small = torch.nn.functional.adaptive_avg_pool2d(images.float(), side).flatten(1)
    distance = torch.cdist(small, small, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(
        small.shape[1]
    )
    same = (groups[:, None] == groups[None, :]).to(distance.device)
    others = same.sum(1) - 1
    return torch.where(others > 0, torch.where(same, distance, 0.0).sum(1) / others.clamp(min=1), math.nan)


def saturation(images: Tensor) -> Tensor:
    """Mean saturation of each image, ``(B,)``: ``(max - min) / max`` over channels, as in HSV; 0 for black.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
    """
    high, low = images.float().amax(1), images.float().amin(1)
    return ((high - low) / high.clamp(min=1e-6)).flatten(1).mean(1)


def high_frequency(images: Tensor) -> Tensor:
    """Fine texture of each image, ``(B,)``: root mean square of what averaging over 2 x 2 pixels takes away.

    In units of the pixel range. A side of odd length loses its last row of pixels.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
    """
    images = images.float()
    height, width = (side // 2 * 2 for side in images.shape[-2:])
    images = images[..., :height, :width]
    coarse = torch.nn.functional.avg_pool2d(images, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return (images - coarse).square().flatten(1).mean(1).sqrt()
