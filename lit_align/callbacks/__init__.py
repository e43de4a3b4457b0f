"""What a run leaves behind: checkpoints, adapters, image grids, predictions, and a summary at its end."""

from lit_align.callbacks.checkpoints import AdapterExport, BatchCheckpoint, BestCheckpoint
from lit_align.callbacks.folder import run_folder
from lit_align.callbacks.images import ImageGrids, ImageWriter, image_grid
from lit_align.callbacks.report import RewardHistograms, RunConfig, RunSummary
from lit_align.callbacks.sweep import SweepReport

__all__ = [
    "AdapterExport",
    "BatchCheckpoint",
    "BestCheckpoint",
    "ImageGrids",
    "ImageWriter",
    "RewardHistograms",
    "RunConfig",
    "RunSummary",
    "SweepReport",
    "image_grid",
    "run_folder",
]
