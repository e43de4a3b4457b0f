"""What both sides of the comparison share: the work, whose turn it is, and what is measured in a turn.

TRL's interpreter imports this too, and its memory is measured: it imports nothing of lit_align.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.machine import peak_bytes, reset_peak

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "trl", "lightning")


@dataclass(frozen=True)
class Work:
    """One round of a method: a rollout batch and all its updates.

    Attributes:
        method: ``ddpo`` or ``alignprop``.
        pipeline: Folder of a diffusers pipeline.
        prompts: File with the distinct prompts, one a line; each has the same number of images.
        images: Images of a round.
        steps: Sampling steps; DDPO replays all of them.
        guidance: Scale of classifier-free guidance, in sampling and in training.
        rank: Of the LoRA.
        batch: Images sampled at once; items in one backward pass; and images of one update of DDPO.
        attached: Last steps that AlignProp differentiates.
        rounds: Rounds that are measured; one more warms up.
    """

    method: str
    pipeline: str
    prompts: str
    images: int
    steps: int
    guidance: float
    rank: int
    batch: int
    attached: int
    rounds: int

    @property
    def given(self) -> list[str]:
        """The prompt of each image of a round, images of a prompt together."""
        prompts = Path(self.prompts).read_text().splitlines()
        return [prompt for prompt in prompts for _ in range(self.images // len(prompts))]

    def to_json(self) -> str:
        """For the command line of a worker."""
        return json.dumps(asdict(self))


def redness(images: Tensor) -> Tensor:
    """The reward of both sides, ``(B, 3, H, W)`` to ``(B,)``: that of ``lit_align.rewards.Redness``."""
    red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
    return red - (green + blue) / 2


class Turns:
    """A worker's end: waits for its turn, measures it and tells what it measured.

    Args:
        descriptor: Of its end of the pipe, inherited from the benchmark.
    """

    def __init__(self, descriptor: int) -> None:
        self.connection = Connection(descriptor)
        self.rows: Counter[str] = Counter()
        self.started = 0.0
        self.resident = 0

    def watch(self, denoiser: nn.Module, decoder: nn.Module) -> None:
        """Count the rows that the models evaluate, by kind."""

        def count(kind: str, _model: nn.Module, inputs: Sequence[Any]) -> None:
            self.rows[f"{kind} with gradient" if torch.is_grad_enabled() else kind] += len(inputs[0])

        denoiser.register_forward_pre_hook(partial(count, "denoiser"))
        decoder.register_forward_pre_hook(partial(count, "decoder"))

    def begin(self) -> None:
        """Wait for the turn, and begin it."""
        self.connection.recv_bytes()
        self.rows.clear()
        reset_peak()
        self.resident = peak_bytes()
        self.started = time.process_time()

    def end(self, reward: float) -> None:
        """Tell what the turn took, and the mean reward of its images."""
        seconds = time.process_time() - self.started
        peak = max(peak_bytes(), self.resident)  # the kernel's count is some pages late
        measured = {"seconds": seconds, "peak_bytes": peak, "resident_bytes": self.resident}
        told = measured | {"reward": reward, "rows": dict(self.rows)}
        self.connection.send_bytes(json.dumps(told).encode())

    def introduce(self, trained: int) -> None:
        """Tell the versions in use, and how many numbers are trained."""
        told = {"versions": versions(), "trained": trained, "threads": torch.get_num_threads()}
        self.connection.send_bytes(json.dumps(told).encode())


def versions() -> dict[str, str]:
    """Versions of the libraries that are installed."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
