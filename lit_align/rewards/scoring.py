"""Scoring with one reward of a bank, and trying it out before a run depends on it."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lit_align.errors import ConfigError, described, same_directory
from lit_align.rewards.base import Reward, Scope
from lit_align.rewards.calling import as_scores, is_ours, title
from lit_align.rewards.function import code_of

Columns = Mapping[str, list[Any]]

SIDES = (64, 512)
"""Sizes of the trial's images in pixels; the second is for a reward that cannot score small ones."""

PROMPTS = ["a red circle", "two blue squares"]


def score(
    name: str,
    reward: Reward,
    images: Tensor,
    prompts: list[str],
    groups: Tensor | None,
    columns: Columns | None,
) -> tuple[Tensor, Tensor]:
    """Scores and what is reported of each image, ``(B,)`` each; arguments as in :meth:`Reward.forward`.

    The reward works on copies, so that it cannot change what other rewards, the methods or the files see.
    Autocast is off: scores must not change with the trainer's precision.

    Raises:
        ConfigError: The reward fails, or does not return one number per image.
    """
    subject = _subject(name, reward)
    own: Any = None if groups is None else groups.clone(), copy.deepcopy(columns)
    try:
        with torch.autocast(images.device.type, enabled=False), _own_defaults():
            scores, shown = reward.shared_out(images.clone(), list(prompts), *own)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{subject} failed: {described(error)}; fix it, or return NaN where there is no score."
        ) from error
    read = as_scores(scores, images, subject)
    attached = reward.differentiable and images.requires_grad and torch.is_grad_enabled()
    if attached and not read.requires_grad:
        raise ConfigError(
            f"{subject} declares that it is differentiable, but its scores carry no gradient; compute them "
            "with torch and without detach or no_grad, or declare differentiable = False."
        )
    return read, read if shown is scores else as_scores(shown, images, subject)


@contextmanager
def _own_defaults() -> Iterator[None]:
    """Put back torch's default precision and device, with which a run's noise would be other noise.

    And the working directory, to which its folder may be relative.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    try:
        with same_directory():
            yield
    finally:
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)


def try_out(name: str, reward: Reward) -> None:
    """Score two images, so that a reward that cannot work is refused before anything is sampled.

    Classes of this package are not tried: tests prove them, and a large model would take seconds. No random
    state is changed. Where a reward fails because it asks for a column of the data, which the trial does not
    have, the first batch decides.

    Raises:
        ConfigError: The reward fails, returns anything but one number per image, or declares a gradient that
            it does not have.
    """
    subject = _subject(name, reward)
    if reward.scope not in get_args(Scope):
        raise ConfigError(
            f"{subject} declares the scope {reward.scope!r}; give {', '.join(get_args(Scope))}."
        )
    if is_ours(code_of(reward)):
        return
    with isolate_rng(include_cuda=torch.cuda.is_initialized()), torch.set_grad_enabled(reward.differentiable):
        images, scores = _scores_of_two(name, reward)
        if scores is None:
            return
        if reward.scope == "sample" and scores.isnan().all():
            rank_zero_warn(f"{subject} gave neither of two trial images a score (None, NaN or infinite)")
            return
        if reward.differentiable:
            _check_gradient(subject, scores, images)
        if reward.scope == "sample":
            _check_scope(name, reward, images, scores)


@torch.no_grad()
def _check_scope(name: str, reward: Reward, images: Tensor, scores: Tensor) -> None:
    """Warn where an image's score is another without the other image: curves and comparisons mean nothing."""
    groups = torch.zeros(1, dtype=torch.long, device=images.device)
    farthest = int(scores.nan_to_num().abs().argmax())  # one of two ranks is 0, and so is that of one image
    try:
        one_image, one_prompt = images[farthest, None], [PROMPTS[farthest]]
        alone, _ = score(name, reward, one_image, one_prompt, groups, _NoColumns())
    except ConfigError:  # it needs more than one
        alone = scores.new_full((1,), torch.nan)
    one, two = alone.item(), scores[farthest].item()
    if not math.isclose(one, two, rel_tol=1e-2, abs_tol=1e-4) and not math.isnan(two):
        rank_zero_warn(
            f"{_subject(name, reward)} gives an image {two:g} beside another and {one:g} alone: a score of "
            "the scope sample may depend neither on other images nor on chance; correct it, or declare the "
            "scope group or batch"
        )


def _check_gradient(subject: str, scores: Tensor, images: Tensor) -> None:
    """Refuse scores that do not depend on the pixels, and warn where the dependence has no slope."""
    try:
        (gradient,) = torch.autograd.grad(scores.nansum(), images, allow_unused=True)
    except RuntimeError as error:
        raise ConfigError(f"{subject} has no gradient: {described(error)}.") from error
    if gradient is None:
        raise ConfigError(
            f"{subject} declares that it is differentiable, but its scores do not come from the pixels by "
            "torch operations; compute them from images, or declare differentiable = False."
        )
    if not gradient.any():
        rank_zero_warn(f"{subject} has a gradient of 0 for two trial images: does it round or compare?")


def _scores_of_two(name: str, reward: Reward) -> tuple[Tensor, Tensor | None]:
    """Two images and their scores; no scores where the reward needs the data's columns."""
    held = next((tensor for tensor in [*reward.parameters(), *reward.buffers()]), torch.zeros(()))
    draw, columns = torch.Generator().manual_seed(0), _NoColumns()
    for side in SIDES:
        images = torch.rand(2, 3, side, side, generator=draw).to(held.device)
        images.requires_grad_(reward.differentiable)
        try:
            groups = torch.zeros(2, dtype=torch.long, device=held.device)
            return images, score(name, reward, images, PROMPTS, groups, columns)[0]
        except ConfigError as error:
            if columns.asked or isinstance(error.__cause__, KeyError):
                return images, None
            if error.__cause__ is None:  # it returned something, whatever the size
                raise
            failure = error
    tried = f"tried on two images of {side} x {side} pixels with the prompts {', '.join(PROMPTS)}"
    raise ConfigError(f"{str(failure).rstrip('.')} ({tried}).") from failure.__cause__


class _NoColumns(Mapping[str, list[Any]]):
    """The columns of a trial, which has no data: notes whether a reward asks for one."""

    def __init__(self) -> None:
        self.asked = False

    def __getitem__(self, name: str) -> list[Any]:
        self.asked = True
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __deepcopy__(self, memo: object) -> "_NoColumns":
        return self


def _subject(name: str, reward: Reward) -> str:
    return f"The reward '{name}' ({title(code_of(reward))})"
