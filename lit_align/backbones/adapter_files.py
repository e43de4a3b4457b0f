"""What is in an adapter's file, looked at before anything is made of it: it may come from anywhere."""

import math
from collections.abc import Mapping
from typing import Any

from lit_align.pretrained import not_finite


def check_contents(layers: Mapping[str, Any], metadata: Mapping[str, Any] | None) -> None:
    """Refuse what would do harm before anything is made of it.

    Raises:
        ValueError: A number is not finite, or the metadata ask for other layers than the file has.
    """
    if broken := not_finite(layers):
        raise ValueError(f"{broken} holds numbers that are not finite")
    largest = max((max(value.shape, default=1) for value in layers.values()), default=1)
    for name, value in (metadata or {}).items():
        named = value.values() if name.endswith(("_pattern",)) and isinstance(value, dict) else [value]
        numbers = [number for number in named if isinstance(number, int | float)]
        if any(not math.isfinite(number) for number in numbers):
            raise ValueError(f"its metadata say {name}: {value}")
        if name.endswith((".r", ".rank_pattern")) and max(numbers, default=1) > largest:
            raise ValueError(f"its metadata say {name}: {value}, and no tensor has so many rows")
        if name.endswith(".use_dora") and value:
            raise ValueError("it is a DoRA, whose updates do not add up")


def reason(error: Exception) -> str:
    """The first line of what a library says, with the type where it is no sentence."""
    text = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return (
        text if isinstance(error, ValueError | RuntimeError | OSError) else f"{type(error).__name__}: {text}"
    )
