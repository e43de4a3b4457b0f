"""MSDDA: experts for single objectives, fused at denoising time, and what it is compared with."""

from lit_align.methods.msdda.baselines import Baseline, CoDe, FactorSoup, RewardGradient, Soup
from lit_align.methods.msdda.module import MSDDAModule
from lit_align.methods.msdda.sweep import Sweep

__all__ = ["Baseline", "CoDe", "FactorSoup", "MSDDAModule", "RewardGradient", "Soup", "Sweep"]
