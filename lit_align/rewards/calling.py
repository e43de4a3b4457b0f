"""Calling a reward with the arguments that it takes, and reading what it returns."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_align.errors import ConfigError

BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
ALL_POSITIONS, ALL_NAMES = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def accepted(
    function: Callable[..., Any],
    images: Tensor,
    prompts: list[str],
    groups: Tensor | None,
    columns: Mapping[str, list[Any]] | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for a reward's ``forward`` or for a plain function.

    Images and prompts go by position, or by these names in the other order. What follows goes by name:
    ``groups``, ``columns``, or one column of the data; ``**columns`` takes all columns.

    Raises:
        ConfigError: A parameter without a default is none of these, or one stands where the prompts do.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # some built-in functions have no signature
        return (images, prompts), {}
    positions = sum(parameter.kind in BY_POSITION for parameter in parameters)
    second = parameters[1].name if positions > 1 else ""
    if second in ("groups", "columns", *(columns or ())) and second not in ("images", "prompts"):
        raise ConfigError(
            f"{title(function)} takes '{second}' as its second argument, which are the prompts; take "
            f"(images, prompts, {second})."
        )
    if any(parameter.kind is ALL_POSITIONS for parameter in parameters):
        positions = max(positions, 2)
    known = {"images": images, "prompts": prompts, "groups": groups, "columns": columns}
    data: Mapping[str, list[Any]] = {} if columns is None else columns
    there, named = list(data), dict[str, Any]()
    for parameter in parameters[min(positions, 2) :]:
        name = parameter.name
        if parameter.kind is ALL_NAMES:
            named |= {column: data[column] for column in there if column not in named}
        elif name in known:
            named[name] = known[name]
        elif name in there:
            named[name] = data[name]
        elif parameter.default is parameter.empty and parameter.kind is not ALL_POSITIONS:
            raise ConfigError(
                f"{title(function)} takes '{name}', and the data has no such column (its columns: "
                f"{', '.join(there) or 'none'}); give the parameter a default, or use data with that column."
            ) from KeyError(name)
    first: tuple[Any, ...] = (images, prompts)
    if [parameter.name for parameter in parameters[:positions]][:2] in (["prompts", "images"], ["prompts"]):
        first = (prompts, images)
    return first[:positions], named


def as_scores(returned: object, images: Tensor, reward: str) -> Tensor:
    """Read what a reward returned.

    It may be a tensor of any precision and device, a numpy array or a list, of the shape ``(B,)``,
    ``(B, 1)`` or ``(1, B)``; or a tuple of such scores and metadata, which is dropped. None in a list and
    infinite numbers count as no score.

    Args:
        returned: The value that the reward returned for ``images``.
        images: ``(B, 3, H, W)``.
        reward: Name of the reward, for the message.

    Returns:
        ``(B,)`` in the precision and on the device of the images; NaN where there is no score. Detached
        where gradients are off.

    Raises:
        ConfigError: It is not one number per image.
    """
    if isinstance(returned, tuple) and returned and _several(returned[0]):
        returned = returned[0]  # (scores, metadata), as the reward functions of DDPO's code return
    count = len(images)
    wanted = f"return one number per image: a tensor of shape ({count},) for {count} images"
    try:
        scores = _tensor(returned)
    except (TypeError, ValueError, RuntimeError):
        remedy = f"does it lack a return statement? It must {wanted}" if returned is None else wanted
        raise ConfigError(f"{reward} returned {_kind(returned)}; {remedy}.") from None
    if scores.ndim == 0 and count == 1:  # what squeeze() leaves of one image
        scores = scores[None]
    if scores.ndim == 0:
        raise ConfigError(f"{reward} returned one number for {count} images; {wanted}.")
    if scores.numel() != count or max(scores.shape) != count:
        raise ConfigError(f"{reward} returned the shape {tuple(scores.shape)}; {wanted}.")
    scores = scores.reshape(count).to(images.device, images.dtype)
    scores = scores.masked_fill(scores.isinf(), torch.nan)
    return scores if torch.is_grad_enabled() else scores.detach()


def title(code: object) -> str:
    """Name of a function or a class; that of the user's own with its module."""
    module, name = getattr(code, "__module__", ""), getattr(code, "__qualname__", type(code).__name__)
    return name if is_ours(code) else f"{module}.{name}"


def is_ours(code: object) -> bool:
    """Whether a function or a class is part of this package, whose tests prove what it declares."""
    return str(getattr(code, "__module__", "")).startswith("lit_align.")


def _several(value: object) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0


def _tensor(returned: object) -> Tensor:
    """Numbers as a tensor of their own shape."""
    if isinstance(returned, list | tuple):
        entries = [float("nan") if entry is None else entry for entry in returned]
        like = next((entry for entry in entries if isinstance(entry, Tensor)), None)
        if like is None:
            returned = entries
        else:
            returned = torch.stack(
                [
                    entry if isinstance(entry, Tensor) else torch.full_like(like, entry, dtype=torch.float32)
                    for entry in entries
                ]
            )
    if not isinstance(returned, Tensor):
        array = np.asarray(returned)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"no numbers: {array.dtype}")
        returned = torch.from_numpy(array.astype(np.float64))
    if returned.is_complex():
        raise TypeError("complex numbers")
    return returned


def _kind(returned: object) -> str:
    if isinstance(returned, Mapping):
        return f"a dict ({', '.join(map(str, returned)) or 'empty'})"
    return "None" if returned is None else f"a value of the type {type(returned).__name__}, not numbers"
