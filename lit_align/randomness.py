"""Counter-based randomness: every draw is a pure function of a seed, a purpose and counters.

Nothing here has a state, so a run that is interrupted needs to remember only its counters, and an image
depends neither on the batch that it was made in, nor on the rank, nor on the device.
"""

import hashlib
import os
import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor


def run_seed(seed: int | None) -> int:
    """A seed that was given, or else that of ``seed_everything`` (0 where nothing was seeded)."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """Hash a seed, a purpose and counters into a seed of 63 bits.

    Args:
        seed: The run's seed.
        purpose: What the draws are for ("rollout", "steps", ...): two purposes never share a stream.
        counters: Rollout batch number, global image number and the like.
    """
    text = ":".join([str(seed), purpose, *(str(counter) for counter in counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A CPU generator that is a pure function of its arguments (see :func:`derive_seed`)."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *counters))


def normal(shape: Sequence[int], draws: Sequence[torch.Generator]) -> Tensor:
    """Standard normal numbers on the CPU, ``(B, *shape)``: each row from a generator of its own."""
    return torch.stack([torch.randn(shape, generator=draw) for draw in draws])


def place(prompt: str) -> float:
    """A number in [0, 1) that depends on the text of a prompt alone."""
    digest = hashlib.blake2b(one_spelling(prompt).encode(), digest_size=6, person=b"split").digest()
    return int.from_bytes(digest, "big") / (1 << 48)


def one_spelling(prompt: str) -> str:
    """A prompt with its accents in one form: an e with an accent may be one character or two."""
    return unicodedata.normalize("NFC", prompt)
