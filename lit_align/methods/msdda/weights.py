"""Weights of several objectives: completed, on the simplex, and under the names of the experts."""

import re
from collections.abc import Mapping

from lit_align.backbones import POLICY, REFERENCE
from lit_align.errors import ConfigError
from lit_align.methods.msdda.fusion import TOLERANCE
from lit_align.rewards import RewardBank


def completed(weights: Mapping[str, float], experts: Mapping[str, object]) -> dict[str, float]:
    """The weights of all experts, in their order: 0 for those that are not named."""
    return {name: weights.get(name, 0.0) for name in experts}


def check_names(
    experts: Mapping[str, object],
    weights: Mapping[str, float],
    betas: Mapping[str, object],
    samplers: Mapping[str, object],
    rewards: RewardBank,
) -> None:
    """Refuse names that do not fit together, and weights outside the simplex."""
    for name in experts:
        taken = name in (POLICY, REFERENCE, "soup", "factors") or re.fullmatch(r"joint\d+", name)
        if taken or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(f"experts: {name!r} cannot name an expert; use the name of its reward")
        if name not in rewards.weights:
            raise ConfigError(
                f"experts: {name} is not a reward with a weight in the bank; those are "
                f"{', '.join(rewards.trained)}"
            )
    check_weights("weights", weights, experts)
    for place, names in {"betas": betas, "samplers": samplers}.items():
        if unknown := [name for name in names if name not in experts]:
            raise ConfigError(f"{place}: there is no expert {unknown[0]}, only {', '.join(experts)}")


def check_weights(place: str, weights: Mapping[str, float], experts: Mapping[str, object]) -> None:
    """Refuse names that are no experts, and weights outside the simplex."""
    if unknown := [name for name in weights if name not in experts]:
        raise ConfigError(f"{place}: there is no expert {unknown[0]}, only {', '.join(experts)}")
    if min(weights.values(), default=0) < 0 or not 0 < sum(weights.values()) <= 1 + TOLERANCE:
        raise ConfigError(
            f"{place}: {dict(weights)} must not be negative and sum to more than 0 and at most 1; what is "
            "missing to 1 is the reference's"
        )
