"""The latents of stored images, on disk: each is encoded once, in all runs that share a folder."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lit_align.pool import Pool


class LatentCache:
    """Latents by row and side of a pair, found where they are known and encoded where they are not.

    Args:
        folder: Of all caches; each lies in a folder of its own below, named by its key.
        key: Hash of all that decides the latents: the autoencoder, the images and their size.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._pool = Pool(folder / key, key)

    def __len__(self) -> int:
        return len(self._pool)

    def known(self, row: int, side: int) -> bool:
        """Whether an image's latent is there, so that the image need not be read."""
        return 2 * row + side in self._pool

    def get(self, rows: Tensor, side: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Latents ``(B, C, H, W)`` of images, on the CPU.

        Args:
            rows: Rows of their pairs, ``(B,)``.
            side: 0 for the preferred images, 1 for the others.
            encode: Makes the latents of the images at some places of the batch, ``(N,)``, and is called
                where some are not known.
        """
        numbers = 2 * rows + side
        if self._pool.missing(numbers.tolist()):
            self._pool.refresh()  # another rank or run may have them by now
        if missing := self._pool.missing(numbers.tolist()):
            places = torch.stack([(numbers == number).nonzero()[0, 0] for number in missing])
            self._pool.add(missing, encode(places))
        return self._pool[numbers]
