"""What a reward computes with: other scores come of other weights, or of another program."""

import inspect
from itertools import chain
from pathlib import Path

from lit_align.identity import text_hash, weights_hash
from lit_align.rewards.base import Reward
from lit_align.rewards.function import FunctionReward


def contents(reward: Reward) -> str:
    """A hash of a reward's weights, and of the text of the file with it if a user wrote it."""
    weights = weights_hash(chain(reward.named_parameters(), reward.named_buffers()))
    return text_hash([weights, _program(reward)])


def _program(reward: Reward) -> str:
    """The file; empty where none is known, and for this package, of which checkpoints say the version."""
    written = reward.function if isinstance(reward, FunctionReward) else type(reward)
    if str(getattr(written, "__module__", "")).startswith("lit_align."):
        return ""
    try:
        return Path(inspect.getfile(written)).read_text()
    except (OSError, TypeError, ValueError):  # of a notebook, or an object that can be called
        return ""
