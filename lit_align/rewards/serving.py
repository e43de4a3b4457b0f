"""A bank of rewards as a small web application: what :class:`lit_align.rewards.RemoteReward` asks."""

import asyncio
import math
from typing import Any

import torch
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.identity import text_hash
from lit_align.rewards.bank import RewardBank
from lit_align.rewards.contents import settings
from lit_align.rewards.remote import unpacked
from lit_align.rewards.scoring import score

REFUSED, FAILED = 422, 500
"""Statuses of what cannot be scored, ever, and of what failed this time."""


def application(bank: RewardBank, device: torch.device) -> Any:
    """An ASGI application that scores images with a bank; see :mod:`lit_align.rewards.remote`.

    Raises:
        ConfigError: starlette is not installed, or a reward scores sets of images: those of a request are not
            those of a prompt.
    """
    try:
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise ConfigError(
            f"serve needs the package starlette ({error}); install it with pip install 'lit_align[serve]'."
        ) from error
    of_sets = [name for name, reward in bank.rewards.items() if reward.scope != "sample"]
    if of_sets:
        raise ConfigError(
            f"rewards: {', '.join(of_sets)} score sets of images, which requests do not hold; serve rewards "
            "of single images, and compute these where the images are sampled."
        )
    bank.to(device)
    contents = contents_of(bank)
    turn = asyncio.Lock()  # one request at a time is scored: a model has one device

    async def names(request: Request) -> Response:
        return JSONResponse({"rewards": list(bank.names), "contents": contents})

    async def scores(request: Request) -> Response:
        try:
            asked = await request.json()
        except ValueError as error:
            return JSONResponse({"error": f"the request is not JSON ({error})"}, REFUSED)
        async with turn:
            try:
                found = await asyncio.to_thread(answer, bank, asked, device)
            except ConfigError as error:
                # A reward that raised may work another time; what was asked wrongly never will.
                failed = error.__cause__ is not None and not isinstance(error.__cause__, KeyError)
                return JSONResponse({"error": str(error)}, FAILED if failed else REFUSED)
        return JSONResponse({"scores": found, "contents": contents[asked.get("reward") or ""]})

    return Starlette(routes=[Route("/rewards", names), Route("/score", scores, methods=["POST"])])


def contents_of(bank: RewardBank) -> dict[str, str]:
    """A hash of what computes each reward by name, and of their weighted sum under the empty name."""
    found = {name: text_hash([bank.contents[name], settings(bank.rewards[name])]) for name in bank.names}
    parts = [f"{weight:g} {found[name]}" for name, weight in bank.weights.items()]
    return found | {"": text_hash(parts)}


@torch.inference_mode()
def answer(bank: RewardBank, asked: Any, device: torch.device) -> list[float | None]:
    """The scores that a request asks for, None where there is none.

    Raises:
        ConfigError: The request cannot be understood, or a reward fails.
    """
    images, prompts, columns, reward = _read(bank, asked)
    images = images.to(device)
    if reward is None:
        found: Tensor = bank(images, prompts, None, columns).total
    else:
        found, _ = score(reward, bank.rewards[reward], images, prompts, None, columns)
    return [None if math.isnan(value) else value for value in found.float().tolist()]


def _read(bank: RewardBank, asked: Any) -> tuple[Tensor, list[str], dict[str, list[Any]], str | None]:
    """Images, prompts, columns, and the name of the reward."""
    try:
        images, prompts = unpacked(asked["images"]), [str(prompt) for prompt in asked["prompts"]]
        columns = {str(name): list(values) for name, values in (asked.get("columns") or {}).items()}
        reward = asked.get("reward")
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            'the request must be {"reward": name or null, "images": ..., "prompts": [...], "columns": {...}} '
            f"({type(error).__name__}: {error})"
        ) from None
    if reward is not None and reward not in bank.names:
        raise ConfigError(f"there is no reward {reward!r}, only {', '.join(bank.names)}")
    lengths = {len(images), len(prompts), *map(len, columns.values())}
    if len(lengths) > 1:
        raise ConfigError(f"images, prompts and columns differ in length: {sorted(lengths)}")
    return images, prompts, columns, reward
