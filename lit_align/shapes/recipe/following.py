"""How a denoiser gets on while it trains: its pipeline, written and measured every so many minutes."""

import json
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from torch import nn

from lit_align.shapes.recipe.pipeline import load_pipeline
from lit_align.shapes.recipe.quality import Sampling, draw, rates, sample
from lit_align.shapes.recipe.training import Stage

WAY = Sampling(10, 1.0, 1.0)
"""How images are drawn while a denoiser trains, and when it is asked what it could show."""


class Following(L.Callback):
    """Write the averaged weights now and then, and add to a file how many facts their images show.

    Args:
        minutes: CPU-minutes between two times.
        write: Called with the averaged weights, writes a pipeline.
        pipeline: Folder that ``write`` fills.
        file: One line of JSON for each time.
        num_samples: Images without guidance, of the same captions and noise each time.
        seed: Of captions and noise; other than that of the quality table.
    """

    def __init__(
        self,
        minutes: float,
        write: Callable[[nn.ModuleDict], None],
        pipeline: Path,
        file: Path,
        num_samples: int,
        seed: int,
    ) -> None:
        self.minutes, self.write, self.pipeline, self.file = minutes, write, pipeline, file
        self.num_samples, self.seed = num_samples, seed
        self.last: float | None = None

    def on_train_batch_end(self, trainer: L.Trainer, stage: L.LightningModule, *_: object) -> None:
        """Look when it is time."""
        assert isinstance(stage, Stage)
        now = stage.minutes()
        self.last = now if self.last is None else self.last
        if stage.global_rank == 0 and now - self.last >= self.minutes:
            self.look(stage)
            self.last = stage.minutes()

    def on_train_end(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        """Look at the result."""
        assert isinstance(stage, Stage)
        if stage.global_rank == 0:
            self.look(stage)

    def look(self, stage: Stage) -> None:
        """Write, measure, and leave the random numbers of the training as they were."""
        self.write(stage.average)
        with torch.random.fork_rng():
            pipeline = load_pipeline(self.pipeline)
            captions, _ = draw(self.num_samples, self.seed, "following")
            shares = rates(sample(pipeline, captions, WAY, self.seed), captions)
        line = {"minutes": stage.minutes(), "steps": stage.global_step, **shares}
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({name: round(value, 4) for name, value in line.items()}) + "\n")
