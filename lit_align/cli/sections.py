"""Parts of a configuration file that have no content, and are left out."""

from typing import Any

SECTIONS = ("trainer", "model", "data", "init_args", "optimisation", "sampling")
"""What cannot be null: all that stood below it is commented out."""

DECIDED = ("verbose", "return_predictions")
"""Options of single commands that are decided here: a run's ``config-test.yaml`` is for ``predict`` too."""


def with_content(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, or an overlay, without empty sections and without options that are decided here."""
    found: dict[str, Any] = _without_empty({n: v for n, v in config.items() if n not in DECIDED})
    return found


def _without_empty(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_empty(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {n: _without_empty(part) for n, part in value.items() if part is not None or n not in SECTIONS}
