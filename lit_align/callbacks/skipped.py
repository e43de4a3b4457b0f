"""The file of a run that ended because of numbers that are not finite: what it skipped."""

import json
import math
from dataclasses import asdict
from typing import Any

from lightning import Callback, Trainer

from lit_align.callbacks.files import writes
from lit_align.errors import tell
from lit_align.files import unused, write
from lit_align.folder import run_folder
from lit_align.methods.skipped import NotFinite


class SkippedUpdates(Callback):
    """Writes ``non_finite.json``: prompts, steps, losses and rewards of updates that could not be made."""

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if not isinstance(exception, NotFinite) or not writes(trainer):
            return
        found = [
            {"reason": one.reason, "images": one.images, "step": one.step}
            | {name: [value for rank in ranks for value in asdict(rank)[name]] for name in ("losses", "rows")}
            for ranks in zip(*exception.skipped, strict=True)
            for one in ranks[:1]
        ]
        path = unused(run_folder(trainer) / "non_finite.json")
        write(path, json.dumps(_told({"error": str(exception), "skipped": found}), indent=1))
        tell(f"what was skipped is in {path}")


def _told(value: Any) -> Any:
    """Numbers that are not finite as text, since JSON has none."""
    if isinstance(value, dict):
        return {name: _told(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_told(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
