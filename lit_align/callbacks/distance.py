"""How far the images of a test are, as a set, from the images of a folder: FID and KID."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from lit_align.backbones import POLICY, REFERENCE
from lit_align.callbacks.console import show
from lit_align.data import Batch
from lit_align.data.images import UnreadableImage, decode, read_inside
from lit_align.errors import ConfigError
from lit_align.rewards import ImageFeatures
from lit_align.rewards.base import are_whole

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

AT_ONCE = 64

Numbered = tuple[Tensor, Tensor]
"""Numbers of images ``(N,)`` and their features ``(N, F)``."""


class ImageDistance(Callback):
    """FID (Heusel et al. 2017) and KID (Binkowski et al. 2018) of a test's images, by torchmetrics.

    Both are also measured for the pretrained model; the values are in ``test.json`` and the report. The
    features are those of a model that you name, not of Inception: compare such values with each other, not
    with published ones.

    Args:
        folder: Images to compare with, at any depth; scaled and cropped to the size of the model's.
        pretrained: See :class:`~lit_align.rewards.ImageFeatures`.
        subset_size: Images of one of the 100 draws of KID, at most.

    Raises:
        ConfigError: The folder has fewer than two images, or the model cannot be loaded; when the test
            begins, for an image that cannot be read.
    """

    def __init__(self, folder: str, pretrained: str, subset_size: int = 1000) -> None:
        self.folder = Path(folder).expanduser()
        self.files = sorted(f for f in self.folder.rglob("*") if f.suffix.lower() in ENDINGS)
        if len(self.files) < 2:
            raise ConfigError(
                f"trainer.callbacks: ImageDistance finds {len(self.files)} images under {folder}; give a "
                f"folder with two or more ({', '.join(ENDINGS)})"
            )
        if subset_size < 2:
            raise ConfigError(f"ImageDistance: subset_size: {subset_size}; give 2 or more")
        self.subset_size = subset_size
        self.features = ImageFeatures(pretrained)
        self._found: dict[str, list[Numbered]] = {}

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.features.to(pl_module.device)
        self._found = {"real": [], POLICY: [], REFERENCE: []}
        own = torch.arange(trainer.global_rank, len(self.files), trainer.world_size)
        for numbers in own.split(AT_ONCE) if len(own) else ():
            images = [self._read(self.files[number], pl_module.backbone.size) for number in numbers.tolist()]
            self._add("real", torch.stack(images).to(pl_module.device), numbers)

    def _read(self, file: Path, size: tuple[int, int]) -> Tensor:
        try:
            return decode(read_inside([self.folder], str(file.relative_to(self.folder))), size)
        except UnreadableImage as error:
            raise ConfigError(f"ImageDistance: {file}: {error}; take it out of the folder") from error

    def _add(self, kind: str, images: Tensor, numbers: Tensor) -> None:
        whole = are_whole(images)
        self._found[kind].append((numbers[whole.cpu()], self.features(images[whole]).float().cpu()))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for kind in (POLICY, REFERENCE):
            self._add(kind, outputs[kind], batch.index)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        everywhere = pl_module.gather(self._found)
        found = {kind: in_order([part for rank in everywhere for part in rank[kind]]) for kind in self._found}
        self._found = {}
        width = found["real"].shape[1]
        if (least := min(map(len, found.values()))) <= width:
            rank_zero_warn(
                f"fid of {least} images and {width} features is far too high; compare kid, or give more "
                "images than features"
            )
        before, after = (
            distances(found["real"], found[kind], self.subset_size) for kind in (REFERENCE, POLICY)
        )
        for name in before:
            change = after[name] - before[name]
            pl_module.set_metrics[name] = {"before": before[name], "after": after[name], "difference": change}
            if trainer.is_global_zero:
                count = f"{len(self.files)} images of {self.folder}"
                show(f"{name:<12} {before[name]:.4g} -> {after[name]:.4g}, against {count}")


def in_order(parts: Sequence[Numbered]) -> Tensor:
    """All features in the order of their images, since KID draws subsets by position."""
    numbers, features = (torch.cat(part) for part in zip(*parts, strict=True))
    return features[numbers.argsort()]


class _Given(nn.Module):
    """Passes features through, in place of the network of a metric: they were computed before."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def distances(real: Tensor, drawn: Tensor, subset_size: int = 1000) -> dict[str, float]:
    """``fid`` and ``kid`` of two sets of features, ``(N, F)`` and ``(M, F)``; no random state is changed."""
    smallest = min(len(real), len(drawn), subset_size)
    if smallest < 2:
        raise ConfigError("ImageDistance: fewer than two images of the test are finite; test more prompts")
    fid = FrechetInceptionDistance(_Given(real.shape[1]), normalize=True, sync_on_compute=False)
    kid = KernelInceptionDistance(
        _Given(real.shape[1]), subset_size=smallest, normalize=True, sync_on_compute=False
    )
    for metric in (fid, kid):
        metric.update(real.double(), real=True)
        metric.update(drawn.double(), real=False)
    with isolate_rng():
        torch.manual_seed(0)
        return {"fid": float(fid.compute()), "kid": float(kid.compute()[0])}
