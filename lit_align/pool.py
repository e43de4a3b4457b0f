"""Samples that were drawn ahead of their use, on disk: resumable, and of one model only.

A pool is a folder of safetensors shards. A shard holds ``index`` (N,), the numbers of its rows, and
``samples`` (N, ...); its metadata name the model that drew them. Shards are written whole or not at all, so
an interrupt costs at most the shard in hand, and what a folder holds is found by looking at it.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.files import replace_file


class Pool:
    """Samples by row number.

    Args:
        folder: Where the shards lie; None keeps the samples in memory and leaves no files.
        source: Hash of the model that draws the samples; shards of another one are refused.

    Raises:
        ConfigError: A shard is corrupt, or of another model; later, one cannot be written, or is gone.
    """

    def __init__(self, folder: Path | None, source: str) -> None:
        self.folder = folder
        self.source = source
        self._places: dict[int, tuple[Path, int]] = {}
        self._memory: dict[int, Tensor] = {}
        self._read: set[Path] = set()
        self._shape: list[int] | None = None  # of one sample
        self.refresh()

    def __len__(self) -> int:
        return len(self._places) + len(self._memory)

    def __contains__(self, row: int) -> bool:
        return row in self._places or row in self._memory

    def missing(self, rows: Iterable[int]) -> list[int]:
        """Those of ``rows`` that have no sample yet, each once, in their order."""
        return [row for row in dict.fromkeys(rows) if row not in self]

    def refresh(self) -> None:
        """Look for shards that this process does not know: those of other ranks and of an earlier run."""
        if self.folder is None:
            return
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._read):
            self._index(path)

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as shard:
                source, rows = shard.metadata()["source"], shard.get_tensor("index")
                shape = shard.get_slice("samples").get_shape()
            if rows.ndim != 1 or rows.is_floating_point() or not 0 < len(rows) == shape[0]:
                raise ValueError(f"index {tuple(rows.shape)} for samples {shape}")
            self._shape = shape[1:] if self._shape is None else self._shape
            if shape[1:] != self._shape:
                raise ValueError(f"samples of the shape {shape[1:]} among others of {self._shape}")
        except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{path} is corrupt ({error}); delete it: its samples will be drawn again"
            ) from error
        if source != self.source:
            raise ConfigError(f"{path} was drawn by {source}, not by {self.source}: delete it")
        # Two runs that share a pool may draw a row at the same time, which gives the same sample twice.
        self._places = {row: (path, place) for place, row in enumerate(rows.tolist())} | self._places
        self._read.add(path)

    def add(self, rows: Sequence[int], samples: Tensor) -> None:
        """Store one shard.

        Args:
            rows: Numbers of ``N`` rows that are not there yet.
            samples: ``(N, ...)``.
        """
        assert len(rows) == len(samples) > 0
        assert self.missing(rows) == list(rows), "a row is drawn twice"
        samples = samples.detach().cpu().contiguous()
        if self.folder is None:
            self._memory |= dict(zip(rows, samples, strict=True))
            return
        name = hashlib.sha256(str(list(rows)).encode()).hexdigest()[:8]
        path = self.folder / f"{rows[0]:09d}-{name}.safetensors"
        shard = {"index": torch.tensor(rows), "samples": samples}
        replace_file(path, lambda draft: save_file(shard, draft, {"source": self.source}))
        self._index(path)

    def __getitem__(self, index: Tensor) -> Tensor:
        """The samples of the rows ``index`` (B,), ``(B, ...)`` on the CPU."""
        return torch.stack([self._sample(row) for row in index.tolist()])

    def _sample(self, row: int) -> Tensor:
        if self.folder is None:
            return self._memory[row]
        path, place = self._places[row]
        try:
            with safe_open(path, "pt") as shard:
                if shard.metadata()["source"] != self.source or shard.get_tensor("index")[place] != row:
                    raise ValueError("it holds others now")
                sample: Tensor = shard.get_slice("samples")[place]
        except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{path} was deleted or changed while the run used it ({error}); start it again with "
                "--ckpt_path last: what is missing is drawn again"
            ) from error
        return sample
