"""Rewards say once that prompts are longer than what they read."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_align.rewards import CLIPScore, HPSv2, ImageReward, PickScore, Reward


@pytest.mark.parametrize(
    ("reward", "folder", "whole", "other", "limit"),
    [
        (CLIPScore, "", "circle", "circla", 8),  # a letter is a token, and two more
        (PickScore, "", "circle", "circla", 8),
        (HPSv2, "hps", "circle", "circla", 8),
        (ImageReward, "image_reward", "a " * 32 + "red", "a " * 32 + "blue", 35),
    ],
)
def test_prompts_that_are_cut_are_told_once(
    reward: Callable[[str], Reward],
    folder: str,
    whole: str,
    other: str,
    limit: int,
    clip_folder: Path,
    published_folders: Path,
) -> None:
    judge = reward(str(clip_folder.with_name(folder) if folder else clip_folder))
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = judge(images, [whole, other, whole])
    assert abs(scores[0] - scores[1]) > 1e-5 > abs(scores[0] - scores[2])  # all of it is read
    long, longer = f"{whole} and", f"{whole} on"
    said = f"2 of the first 2 prompts are longer than the {limit} tokens that the reward model '/"
    with pytest.warns(UserWarning, match=said) as told:
        scores = judge(images, [long, longer, long])
    assert len(told) == 1
    assert abs(scores[0] - scores[1]) < 1e-6  # the end is not read
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge(images, [f"{whole} the", long, longer])
