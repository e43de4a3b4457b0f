"""Hashes of what decides a reward's scores: its weights and its program."""

import ast
import inspect
import json
from itertools import chain
from pathlib import Path

from lit_align.identity import text_hash, weights_hash
from lit_align.rewards.base import Reward
from lit_align.rewards.calling import is_ours, title
from lit_align.rewards.function import code_of
from lit_align.rewards.served import ServedReward

PLAIN = (str, int, float, list, tuple, dict)
"""Types of options."""


def contents(reward: Reward) -> str:
    """A hash of a reward's weights, and of the program in the file with it if a user wrote it."""
    weights = weights_hash(chain(reward.named_parameters(), reward.named_buffers()))
    served = [reward.served_by] if isinstance(reward, ServedReward) and reward.served_by else []
    return text_hash([weights, _program(reward), *served])


def settings(reward: Reward) -> str:
    """The class or function of a reward, and its options: plain values under the names of its arguments."""
    given = inspect.signature(type(reward)).parameters
    plain = {
        name: value for name, value in vars(reward).items() if name in given and isinstance(value, PLAIN)
    }
    kind = title(code_of(reward))
    # Not sorted: keys of several types have no order.
    return kind + json.dumps(plain, skipkeys=True, default=lambda value: type(value).__name__)


def _program(reward: Reward) -> str:
    """The program of the file, whatever its comments and spaces are.

    Empty where none is known, and for this package, of which checkpoints say the version.
    """
    written = code_of(reward)
    if is_ours(written):
        return ""
    try:
        return ast.unparse(ast.parse(Path(inspect.getfile(written)).read_bytes()))
    except (OSError, TypeError, ValueError, SyntaxError):  # of a notebook, or an object that can be called
        return ""
