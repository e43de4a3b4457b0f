"""Rewards that a server computes: in batches, while images are sampled, and once for each image."""

import hashlib
import json
import os
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_align.errors import ConfigError, check_positive
from lit_align.rewards.base import Reward
from lit_align.rewards.http import Server, Unanswered

Failure = Literal["stop", "nan"]

CACHED = 1 << 16
"""Scores that are remembered: those of the newest images."""


@dataclass(frozen=True)
class Asked:
    """An image that is to be scored.

    Attributes:
        image: ``(3, H, W)`` on the CPU.
        prompt: Its prompt.
        columns: The data's columns that are sent, one entry each.
        score: The future of its score.
    """

    image: Tensor
    prompt: str
    columns: dict[str, Any]
    score: "Future[float]"


class ServedReward(Reward):
    """A reward without gradient that a server computes.

    Images go in batches over several connections at a time. A score is remembered under the hash of what was
    sent, so no image is asked for twice. :meth:`ahead` takes images as soon as they are sampled: the server
    works while the next are; the batches, and so the scores, are the same as without it.

    Where a server does not answer after all tries, ``on_failure`` decides: ``stop`` ends the run with one
    sentence, ``nan`` leaves the images without a score, which methods count in ``unscored``, and warns.

    Attributes:
        served_by: A text of the server that changes with its weights, options and code; empty if it has none.

    Args:
        server: The server.
        batch: Images of a request.
        columns: The data's columns that are sent with the images; none if not given.
        on_failure: What to do where there is no answer.
        cached: Scores that are remembered.

    Raises:
        ConfigError: A number cannot work; on scoring, if the server refuses, or does not answer.
    """

    differentiable = False
    scope = "sample"
    served_by: str = ""

    def __init__(
        self,
        server: Server,
        batch: int,
        columns: Sequence[str] = (),
        on_failure: Failure = "stop",
        cached: int = CACHED,
    ) -> None:
        super().__init__()
        check_positive({"batch": batch})
        self.server, self.batch, self.on_failure, self.cached = server, batch, on_failure, cached
        self.columns = tuple(columns)
        self._scores: OrderedDict[bytes, Future[float]] = OrderedDict()
        self._waiting: list[Asked] = []
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(server.connections)

    @abstractmethod
    def ask(self, asked: Sequence[Asked]) -> list[float]:
        """The scores of some images of one size, NaN where there is none; called in several threads."""

    @abstractmethod
    def encoded(self, image: Tensor) -> bytes:
        """What is sent of an image ``(3, H, W)``: images that are sent alike are scored alike."""

    def check_columns(self, columns: Mapping[str, list[Any]]) -> None:
        for name in self.columns:
            self.need(name, columns, "Take it out of columns, or use data with that column.")

    def ahead(self, images: Tensor, prompts: list[str], columns: dict[str, list[Any]] | None) -> None:
        """Begin to score ``(B, 3, H, W)`` images; arguments as of :meth:`Reward.forward`."""
        self._futures(images, prompts, columns)

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        futures = self._futures(images, prompts, columns)
        self._send(len(self._waiting))
        failures: list[str] = []
        try:
            scores = [self._result(future, failures) for future in futures]
        except BaseException:  # also Ctrl-C: the threads would go on trying
            self._abandon()
            raise
        self._forget()
        if failures:
            rank_zero_warn(
                f"{type(self).__name__}: {len(failures)} of {len(images)} images have no score: {failures[0]}"
            )
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _futures(
        self, images: Tensor, prompts: list[str], columns: dict[str, list[Any]] | None
    ) -> list["Future[float]"]:
        """The futures of the images' scores; full batches are sent."""
        if self._process != os.getpid():  # forked: threads and connections are the other process's
            self._process, self.server = os.getpid(), self.server.renewed()
            self._abandon()
        there = columns or {}
        self.check_columns(there)
        found = []
        for row, image in enumerate(images.detach().to("cpu", torch.float32).contiguous()):
            if not bool(image.isfinite().all()):
                found.append(_known(float("nan")))
                continue
            given = {name: there[name][row] for name in self.columns}
            key = self._key(image, prompts[row], given)
            if key not in self._scores:
                asked = Asked(image.clone(), prompts[row], given, Future())
                self._scores[key] = asked.score
                if self._waiting and self._waiting[0].image.shape != image.shape:
                    self._send(len(self._waiting))
                self._waiting.append(asked)
                if len(self._waiting) == self.batch:
                    self._send(self.batch)
            self._scores.move_to_end(key)
            found.append(self._scores[key])
        return found

    def _key(self, image: Tensor, prompt: str, columns: dict[str, Any]) -> bytes:
        try:
            told = json.dumps([prompt, list(image.shape), columns], sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{type(self).__name__}: a column of {', '.join(self.columns)} cannot be sent ({error}); "
                "take it out of columns."
            ) from error
        return hashlib.blake2b(self.encoded(image) + told.encode(), digest_size=16).digest()

    def _send(self, count: int) -> None:
        """Send the first images that wait."""
        part, self._waiting = self._waiting[:count], self._waiting[count:]
        if part:
            self._pool.submit(self._answer, part)

    def _answer(self, part: Sequence[Asked]) -> None:
        """In a thread: get the scores of a batch."""
        try:
            scores = self.ask(part)
            assert len(scores) == len(part)
        except BaseException as error:
            for asked in part:
                asked.score.set_exception(error)
        else:
            for asked, score in zip(part, scores, strict=True):
                asked.score.set_result(score)

    def _result(self, future: "Future[float]", failures: list[str]) -> float:
        try:
            return future.result()
        except Unanswered as error:
            if self.on_failure == "stop":
                raise ConfigError(
                    f"{type(self).__name__}: {error}; start the server, raise timeout or retries, or set "
                    "on_failure to nan to leave such images without a score."
                ) from error
            failures.append(str(error))
            return float("nan")

    def _abandon(self) -> None:
        """Leave all that was asked."""
        self.server.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = ThreadPoolExecutor(self.server.connections)
        self._scores.clear()
        self._waiting = []

    def _forget(self) -> None:
        """Drop the oldest scores, and those that did not come: they are asked for again."""
        failed = [key for key, score in self._scores.items() if score.done() and score.exception()]
        for key in failed:
            del self._scores[key]
        while len(self._scores) > self.cached:
            self._scores.popitem(last=False)


def _known(score: float) -> "Future[float]":
    future: Future[float] = Future()
    future.set_result(score)
    return future
