"""The command line of lit_align."""

import os

# Before transformers is imported: it would say at length that torchvision, which nothing here uses, is not
# installed.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from lit_align.cli.run import main

__all__ = ["main"]
