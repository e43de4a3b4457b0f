"""The methods, one file each; to add one, see CONTRIBUTING.md."""

from lit_align.methods.alignprop import AlignPropModule
from lit_align.methods.base import AlignmentModule
from lit_align.methods.ddpo import DDPOModule
from lit_align.methods.dpo import DPOModule
from lit_align.methods.msdda import MSDDAModule
from lit_align.methods.nft import NFTModule
from lit_align.methods.optimisation import Optimisation
from lit_align.methods.prdp import PRDPModule
from lit_align.methods.sampling import Sampling
from lit_align.methods.sft import SFTModule
from lit_align.methods.spin import SPINModule

__all__ = [
    "AlignPropModule",
    "AlignmentModule",
    "DDPOModule",
    "DPOModule",
    "MSDDAModule",
    "NFTModule",
    "Optimisation",
    "PRDPModule",
    "SFTModule",
    "SPINModule",
    "Sampling",
]
