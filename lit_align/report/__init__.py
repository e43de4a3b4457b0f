"""Reports: what a tested run is worth, as one page that needs nothing else."""

from lit_align.report.page import at_equal, render
from lit_align.report.run import Run, Shown, read_run

__all__ = ["Run", "Shown", "at_equal", "read_run", "render"]
