"""AlignProp: the reward's gradient through the sampler, and which steps of a chain it goes through."""

from lit_align.methods.alignprop.module import AlignPropModule
from lit_align.methods.alignprop.truncation import (
    FixedWindow,
    GaussianWindow,
    LowVariance,
    NoTruncation,
    OneShot,
    PerStep,
    Truncation,
    UniformWindow,
)

__all__ = [
    "AlignPropModule",
    "FixedWindow",
    "GaussianWindow",
    "LowVariance",
    "NoTruncation",
    "OneShot",
    "PerStep",
    "Truncation",
    "UniformWindow",
]
