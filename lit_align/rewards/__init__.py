"""Rewards score images: one number per image, higher is better. One file per family."""

from lit_align.rewards.aesthetic import AestheticScore
from lit_align.rewards.bank import RewardBank, RewardOutput
from lit_align.rewards.base import BlackBoxReward, Reward, Scope
from lit_align.rewards.clip import CLIPScore, PickScore
from lit_align.rewards.colour import Brightness, ColourFraction, Redness
from lit_align.rewards.composition import ObjectPresence
from lit_align.rewards.compression import JPEGCompressibility, JPEGIncompressibility
from lit_align.rewards.detection import ObjectCount
from lit_align.rewards.distribution import (
    BatchPairwiseDiversity,
    BatchStatisticalParity,
    PairwiseDiversity,
    SetReward,
    StatisticalParity,
)
from lit_align.rewards.function import FunctionReward
from lit_align.rewards.jpeg import SoftJPEGCompressibility, SoftJPEGIncompressibility
from lit_align.rewards.shapes import ShapesTruth

PictureReward = BlackBoxReward  # the old name

__all__ = [
    "AestheticScore",
    "BatchPairwiseDiversity",
    "BatchStatisticalParity",
    "BlackBoxReward",
    "Brightness",
    "CLIPScore",
    "ColourFraction",
    "FunctionReward",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "ObjectCount",
    "ObjectPresence",
    "PairwiseDiversity",
    "PickScore",
    "PictureReward",
    "Redness",
    "Reward",
    "RewardBank",
    "RewardOutput",
    "Scope",
    "SetReward",
    "ShapesTruth",
    "SoftJPEGCompressibility",
    "SoftJPEGIncompressibility",
    "StatisticalParity",
]
