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
from lit_align.rewards.features import ImageFeatures
from lit_align.rewards.function import FunctionReward
from lit_align.rewards.geneval import GenEval
from lit_align.rewards.hpsv2 import HPSv2
from lit_align.rewards.hpsv3 import HPSv3
from lit_align.rewards.image_reward import ImageReward
from lit_align.rewards.jpeg import SoftJPEGCompressibility, SoftJPEGIncompressibility
from lit_align.rewards.judge import VLMJudge
from lit_align.rewards.ocr import OCR
from lit_align.rewards.remote import RemoteReward
from lit_align.rewards.shapes import ShapesTruth
from lit_align.rewards.unified_reward import UnifiedReward
from lit_align.rewards.vqa import VQAScore

PictureReward = BlackBoxReward  # the old name

__all__ = [
    "OCR",
    "AestheticScore",
    "BatchPairwiseDiversity",
    "BatchStatisticalParity",
    "BlackBoxReward",
    "Brightness",
    "CLIPScore",
    "ColourFraction",
    "FunctionReward",
    "GenEval",
    "HPSv2",
    "HPSv3",
    "ImageFeatures",
    "ImageReward",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "ObjectCount",
    "ObjectPresence",
    "PairwiseDiversity",
    "PickScore",
    "PictureReward",
    "Redness",
    "RemoteReward",
    "Reward",
    "RewardBank",
    "RewardOutput",
    "Scope",
    "SetReward",
    "ShapesTruth",
    "SoftJPEGCompressibility",
    "SoftJPEGIncompressibility",
    "StatisticalParity",
    "UnifiedReward",
    "VLMJudge",
    "VQAScore",
]
