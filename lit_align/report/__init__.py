"""Reports: what a tested run is worth, as one page that needs nothing else."""

from lit_align.report.page import render
from lit_align.report.run import Run, Shown, read_run

__all__ = ["Run", "Shown", "read_run", "render"]
