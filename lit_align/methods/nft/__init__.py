"""Policy optimisation on the forward process: DiffusionNFT and advantage-weighted matching (AWM)."""

from lit_align.methods.nft.module import NFTModule
from lit_align.methods.nft.objectives import (
    AWM,
    NFT,
    OLD,
    ForwardObjective,
    Matched,
    OldPolicy,
    awm_log_prob,
    awm_loss,
    implicit_policies,
    nft_loss,
    normalised_error,
)

__all__ = [
    "AWM",
    "NFT",
    "OLD",
    "ForwardObjective",
    "Matched",
    "NFTModule",
    "OldPolicy",
    "awm_log_prob",
    "awm_loss",
    "implicit_policies",
    "nft_loss",
    "normalised_error",
]
