"""Reports: what a tested run is worth, as one page that needs nothing else."""

from lit_align.report.comparable import differences
from lit_align.report.page import at_equal, render
from lit_align.report.run import Run, Shown, names_of, page_of, read_run

__all__ = ["Run", "Shown", "at_equal", "differences", "names_of", "page_of", "read_run", "render"]
