"""Printing of tables and lines."""

import sys

from rich.console import Console, RenderableType

WIDTH = 140
"""Characters in a line of a table that goes to a file, where no terminal says how many fit."""


def show(what: RenderableType) -> None:
    """Print a table or a line; only a table is fitted to the width of the terminal."""
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    console.print(what, soft_wrap=isinstance(what, str), highlight=False, markup=False)
