"""Whether an image shows the words that its prompt puts in quotes."""

import re
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lit_align.errors import ConfigError
from lit_align.rewards.base import BlackBoxReward

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')
"""What a prompt asks to be written."""


class OCR(BlackBoxReward):
    """1 minus the share of the wanted letters that are wrong, in [0, 1].

    The wanted text stands in the first quotes of the prompt; a prompt without quotes gives no score. Letters
    are compared without spaces and case; text that is there among other text is whole. The reward of
    Flow-GRPO (Liu et al. 2025, arXiv:2505.05470), which reads with PaddleOCR 2; here RapidOCR runs models of
    the same family, which come with the package: ``pip install 'lit_align[ocr]'``.

    Raises:
        ConfigError: The package is not installed.
    """

    differentiable = False
    scope = "sample"
    documented = (0.0, 1.0)

    def __init__(self) -> None:
        super().__init__()
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ConfigError(
                f"OCR needs the package rapidocr ({error}); install it with pip install 'lit_align[ocr]'."
            ) from error
        # As many threads as torch, and not one for each core: several processes score at the same time.
        threads = {"EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads()}
        self.reader: Any = RapidOCR(params={"Global.log_level": "critical"} | threads)

    def score(self, image: NDArray[np.uint8], prompt: str) -> float | None:
        """Read one image, ``(H, W, 3)`` uint8, and compare with the words in quotes."""
        quoted = QUOTED.search(prompt)
        if quoted is None:
            return None
        read = self.reader(image[..., ::-1])  # arrays are BGR, as of OpenCV
        return likeness("".join(read.txts or ()), quoted[1] or quoted[2])


def likeness(read: str, wanted: str) -> float:
    """1 minus the edit distance over the length of the wanted text, at least 0."""
    read, wanted = (re.sub(r"\s", "", text).lower() for text in (read, wanted))
    if not wanted or wanted in read:
        return 1.0
    return 1 - min(distance(read, wanted), len(wanted)) / len(wanted)


def distance(one: str, other: str) -> int:
    """Least number of letters to insert, delete or replace (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        last, row[0] = row[0], i
        for j, wanted in enumerate(other, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (letter != wanted))
    return row[-1]
