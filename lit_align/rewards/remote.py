"""Rewards of another process or machine: ``python -m lit_align serve``, or any program with its protocol.

The protocol is JSON, without anything that runs code. ``GET /rewards`` answers
``{"rewards": [name, ...]}``. ``POST /score`` takes ``{"reward": name or null, "images": ..., "prompts":
[...], "columns": {name: [...]}}`` and answers ``{"scores": [number or null, ...]}``, one for each image.
``images`` is ``{"png": [base64, ...]}``, or ``{"safetensors": base64}`` of a file with a tensor ``images``
``(B, 3, H, W)`` float32 in [0, 1].

Both answers may have ``contents``: a text that changes with what computes the scores. ``/rewards`` has it by
name, of the weighted sum under the empty name, ``/score`` that of the reward which was asked for. A run whose
server answers with another one ends with an error.
"""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.rewards.base import to_bytes
from lit_align.rewards.http import NoAnswer, Server, Unanswered
from lit_align.rewards.served import CACHED, Asked, Failure, ServedReward

Form = Literal["safetensors", "png"]


class RemoteReward(ServedReward):
    """A reward that a server computes: ``python -m lit_align serve --rewards bank.yaml``.

    Args:
        url: The server, such as ``http://localhost:8000``.
        reward: Which of its rewards; the weighted sum of its bank if not given.
        images: How images are sent: ``safetensors`` exactly, ``png`` rounded to 8 bits in a tenth of the
            size, which is exact for rewards that look at 8 bits.
        columns: The data's columns that the reward needs.
        batch: Images of a request.
        connections: Requests at the same time.
        timeout: Seconds for one try.
        retries: Tries after the first; the waits between them double from half a second to half a minute.
        on_failure: Where the server does not answer after all tries: ``stop``, or ``nan``: the images have no
            score, which is counted in ``unscored``.
        cached: Scores that are remembered by the hash of what was sent.

    Raises:
        ConfigError: The server does not answer, or has no such reward; on scoring, if it refuses or, with
            ``stop``, does not answer.
    """

    def __init__(
        self,
        url: str,
        reward: str | None = None,
        images: Form = "safetensors",
        columns: list[str] | None = None,
        batch: int = 16,
        connections: int = 4,
        timeout: float = 60.0,
        retries: int = 8,
        on_failure: Failure = "stop",
        cached: int = CACHED,
    ) -> None:
        server = Server(url, timeout, retries, connections)
        super().__init__(server, batch, columns or (), on_failure, cached)
        self.reward, self.form = reward, images
        try:
            there, contents = server.ask("/rewards", None, _offered)
        except Unanswered as error:
            raise ConfigError(
                f"RemoteReward: {error}; start it with python -m lit_align serve --rewards bank.yaml, or "
                "correct url."
            ) from error
        if reward is not None and reward not in there:
            raise ConfigError(
                f"RemoteReward: {url} has no reward {reward!r}; it has {', '.join(there)}; give one of them, "
                "or none for their weighted sum."
            )
        self.served_by = contents.get(reward or "", "")

    def ask(self, asked: Sequence[Asked]) -> list[float]:
        """The scores of some images."""
        body = {
            "reward": self.reward,
            "images": packed(torch.stack([one.image for one in asked]), self.form),
            "prompts": [one.prompt for one in asked],
            "columns": {name: [one.columns[name] for one in asked] for name in self.columns},
        }
        return self.server.ask("/score", body, lambda answer: self._read(answer, len(asked)))

    def _read(self, answer: Any, count: int) -> list[float]:
        scores, contents = scores_of(answer, count), answer.get("contents")
        if self.served_by and contents and contents != self.served_by:
            raise ConfigError(
                f"RemoteReward: {self.server.url} computes {self.reward or 'the weighted sum'} with other "
                "weights, options or code than when this run began, so its scores cannot be compared; serve "
                "the bank of then and resume, or start a new run."
            )
        return scores

    def encoded(self, image: Tensor) -> bytes:
        if self.form == "png":
            return to_bytes(image[None]).tobytes()
        return image.numpy().tobytes()


def _offered(answer: Any) -> tuple[list[str], dict[str, str]]:
    """The rewards of a server, and what computes them, where it says so."""
    names = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(names, list):
        raise NoAnswer("it sent no list of rewards")
    contents = answer.get("contents")
    told = contents if isinstance(contents, dict) else {}
    return [str(name) for name in names], {str(name): str(value) for name, value in told.items()}


def scores_of(answer: Any, count: int) -> list[float]:
    """The scores of an answer, NaN for null.

    Raises:
        NoAnswer: It is not that of ``count`` images.
    """
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list) or len(scores) != count:
        raise NoAnswer(f"it sent no list of {count} scores")
    if not all(score is None or type(score) in (int, float) for score in scores):
        raise NoAnswer("it sent scores that are not numbers")
    return [math.nan if score is None else float(score) for score in scores]


def packed(images: Tensor, form: Form) -> dict[str, Any]:
    """Images ``(B, 3, H, W)`` as JSON."""
    if form == "png":
        return {"png": [png(image) for image in to_bytes(images)]}
    return {"safetensors": base64.b64encode(save({"images": images.contiguous()})).decode()}


def png(image: Any) -> str:
    """An image ``(H, W, 3)`` uint8 as a PNG file in base64."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def unpacked(packed: Any) -> Tensor:
    """The images ``(B, 3, H, W)`` float32 of :func:`packed`.

    Raises:
        ConfigError: They cannot be read.
    """
    try:
        if "png" in packed:
            data = [io.BytesIO(base64.b64decode(one, validate=True)) for one in packed["png"]]
            # Pillow opens other formats too, and hands some of them to other programs.
            files = [Image.open(one, formats=["PNG"]) for one in data]
            arrays = np.stack([np.asarray(file.convert("RGB")) for file in files])
            return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
        images = load(base64.b64decode(packed["safetensors"], validate=True))["images"]
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"a tensor {tuple(images.shape)} of {images.dtype}")
        return images.float()
    except Exception as error:  # each library raises errors of its own; the request is to blame
        raise ConfigError(
            f"images cannot be read ({type(error).__name__}: {str(error).splitlines()[:1]}); send "
            '{"png": [base64, ...]} or {"safetensors": base64} of a tensor images (B, 3, H, W) in [0, 1].'
        ) from None
