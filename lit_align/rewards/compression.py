"""How well an image compresses: the true size of its JPEG file, the reward that needs no model at all."""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lit_align.rewards.base import BlackBoxReward


class JPEGIncompressibility(BlackBoxReward):
    """Size of the JPEG file in kB (1000 bytes): rewards texture (Black et al. 2023, arXiv:2305.13301).

    Args:
        quality: JPEG quality; the paper's code uses 95, with PIL's other defaults.
    """

    sign = 1.0

    def __init__(self, quality: int = 95) -> None:
        super().__init__()
        self.quality = quality

    def score(self, image: NDArray[np.uint8], prompt: str) -> float:
        """Encode one image, ``(H, W, 3)`` uint8, and count its bytes; the prompt plays no part."""
        file = BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=self.quality)
        return self.sign * file.tell() / 1000


class JPEGCompressibility(JPEGIncompressibility):
    """Minus the size of the JPEG file in kB: rewards smooth, plain images (Black et al. 2023)."""

    sign = -1.0
