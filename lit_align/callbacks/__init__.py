"""What a run writes and prints: checkpoints, adapters, images, predictions, curves; and the guard."""

from lightning import Callback

from lit_align.callbacks.adapter import AdapterExport
from lit_align.callbacks.checkpoints import BatchCheckpoint, BestCheckpoint, checkpoint_callbacks
from lit_align.callbacks.distance import ImageDistance
from lit_align.callbacks.grid import image_grid
from lit_align.callbacks.guard import Guard
from lit_align.callbacks.histograms import RewardHistograms
from lit_align.callbacks.images import ImageGrids, ImageWriter
from lit_align.callbacks.new_settings import NewSettings
from lit_align.callbacks.progress import ProgressBar, ProgressLines
from lit_align.callbacks.report import TestReport
from lit_align.callbacks.run_config import RunConfig
from lit_align.callbacks.skipped import SkippedUpdates
from lit_align.callbacks.summary import RunSummary
from lit_align.callbacks.sweep import SweepReport
from lit_align.folder import RunFolder, run_folder

__all__ = [
    "AdapterExport",
    "BatchCheckpoint",
    "BestCheckpoint",
    "Guard",
    "ImageDistance",
    "ImageGrids",
    "ImageWriter",
    "NewSettings",
    "ProgressBar",
    "ProgressLines",
    "RewardHistograms",
    "RunConfig",
    "RunFolder",
    "RunSummary",
    "SkippedUpdates",
    "SweepReport",
    "TestReport",
    "default_callbacks",
    "image_grid",
    "run_folder",
]


def default_callbacks(checkpoints: bool = True) -> list[Callback]:
    """The callbacks that every run of the command line has, for ``Trainer(callbacks=...)``.

    Args:
        checkpoints: Whether ``checkpoints/`` is written; if not, give ``enable_checkpointing=False`` too.
    """
    callbacks: list[Callback] = [
        RunFolder(),
        ProgressLines(),
        ImageGrids(),
        AdapterExport(),
        ImageWriter(),
        RewardHistograms(),
        RunSummary(),
        TestReport(),
        SweepReport(),
        SkippedUpdates(),
    ]
    return callbacks + (checkpoint_callbacks() if checkpoints else [])
