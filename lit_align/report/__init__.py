"""Reports: the results of tested runs on one page that needs no other file."""

from lit_align.report.comparable import differences
from lit_align.report.page import at_equal, render
from lit_align.report.run import Run, Shown, names_of, page_of, read_run

__all__ = ["Run", "Shown", "at_equal", "differences", "names_of", "page_of", "read_run", "render"]
