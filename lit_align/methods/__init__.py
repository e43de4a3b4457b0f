"""The methods, one file each; to add one, see CONTRIBUTING.md."""

from lit_align.methods.alignprop import AlignPropModule
from lit_align.methods.base import AlignmentModule
from lit_align.methods.ddpo import DDPOModule

__all__ = ["AlignPropModule", "AlignmentModule", "DDPOModule"]
