"""Where tables and last words go."""

import sys

from rich.console import Console, RenderableType

WIDTH = 140
"""Columns where nobody knows how many there are: in a file, a table must not lose its columns."""


def show(what: RenderableType) -> None:
    """Print a table or a line; only a table is fitted to the width."""
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    console.print(what, soft_wrap=isinstance(what, str), highlight=False, markup=False)
