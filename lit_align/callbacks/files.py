"""What callbacks share: whether this rank writes, and metrics as JSON."""

import math

from lightning import Trainer


def writes(trainer: Trainer) -> bool:
    """Whether this rank writes files; a ``fast_dev_run`` leaves none."""
    return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """Metrics for JSON, which has no NaN: what is not finite is None."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
