"""A reward that says where a run is, and does there what a test asks for."""

import math
import os
import time
from pathlib import Path
from typing import Any

from lit_align.rewards import Brightness

LIMIT = 300.0
"""Seconds after which nothing is waited for any more."""


class Gate(Brightness):
    """Brightness; in its ``n``-th call on a rank it leaves the file ``call-RANK-n``.

    A file ``hold-RANK-n`` lets it wait there until the file is gone. Others let it ``raise``, ``exit``, or
    have no score (``nan``).
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Any, *others: Any) -> Any:
        self.calls += 1
        place = f"{os.environ.get('RANK', '0')}-{self.calls}"
        Path(f"call-{place}").touch()
        wait(lambda: not Path(f"hold-{place}").exists())
        if Path(f"raise-{place}").exists():
            raise ValueError("the scorer broke")
        if Path(f"exit-{place}").exists():
            os._exit(7)
        scores = super().forward(images, *others)
        return scores * math.nan if Path(f"nan-{place}").exists() else scores


def wait(condition: Any) -> None:
    """Until something holds."""
    limit = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < limit, "what was waited for did not come"
        time.sleep(0.01)
