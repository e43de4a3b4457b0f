"""SPIN: self-play finetuning."""

from lit_align.methods.spin.module import SPINModule

__all__ = ["SPINModule"]
