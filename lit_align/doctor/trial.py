"""Two rollout batches in small, on the real model and data, and what was seen in them."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from lit_align.data import MultiTaskDataModule, PickaPicDataModule, PromptDataModule
from lit_align.doctor.memory import Memory, count
from lit_align.methods import AlignmentModule, AlignPropModule

BATCHES = 2
"""An adapter's first factors get a gradient in the second: its second factors are 0 in the first."""

PROMPTS, IMAGES = 2, 4
"""Of a rollout batch in small."""

KEPT = 256
"""Values of each trained weight that are compared."""


@dataclass
class Seen:
    """What was seen in a trial.

    Attributes:
        scores: What the rewards report of the images of all batches, by name.
        images_per_prompt: In these batches; prompts stand together.
        metrics: Logged with each batch.
        trained: Names of the weights that require gradients.
        reached: Those that got one which is not 0.
        foreign: Other weights that got one: something has switched them on since the start.
        norms: Of the gradients.
        moved: Names of trained weights that changed.
        seconds: Of each batch.
        images: Of each batch.
        memory: Of a training step with the real micro-batch; None where it was not counted.
    """

    scores: dict[str, Tensor] = field(default_factory=dict)
    images_per_prompt: int = 1
    metrics: list[dict[str, float]] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    reached: set[str] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)
    norms: list[float] = field(default_factory=list)
    moved: set[str] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    memory: Memory | None = None


class Trial(Callback):
    """Makes rollout batches small, after the method has checked the real ones, and watches them.

    Attributes:
        seen: What was seen.
    """

    def __init__(self) -> None:
        self.seen = Seen()
        self._before: dict[str, Tensor] = {}
        self._started, self._images = 0.0, 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Before the method's own: of a trial nothing is kept."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, PickaPicDataModule):
            data.latent_cache = None

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        _shrink(data, pl_module)
        data.setup("fit")
        if isinstance(data, PromptDataModule):
            self.seen.images_per_prompt = data.images_per_prompt

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        self.seen.trained = list(trained)
        self._before = {name: _some(parameter) for name, parameter in trained.items()}

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen.memory = count(pl_module)  # at the end: nothing of it can reach what is trained

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is None:
                continue
            if name not in self._before:
                self.seen.foreign.add(name)
            elif bool((parameter.grad != 0).any()):
                self.seen.reached.add(name)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seen = self.seen
        seen.seconds.append(time.perf_counter() - self._started)
        seen.images.append(pl_module.images - self._images)
        self._images = pl_module.images
        seen.norms.append(float(pl_module.gradient_norm))
        seen.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        for name, values in pl_module.collected.items():
            seen.scores[name] = torch.cat([seen.scores.get(name, values[:0]), values])
        for name, parameter in pl_module.named_parameters():
            if name in self._before and not torch.equal(_some(parameter), self._before[name]):
                seen.moved.add(name)


def _some(parameter: Tensor) -> Tensor:
    flat = parameter.detach().flatten()
    return flat[:: max(1, len(flat) // KEPT)].cpu().clone()


def _shrink(data: Any, module: AlignmentModule) -> None:
    """Fewer prompts and images in a batch; whole prompts for each update."""
    updates = getattr(module, "updates", 1)
    for one in data.modules.values() if isinstance(data, MultiTaskDataModule) else [data]:
        if isinstance(one, PickaPicDataModule):
            one.pairs_per_batch = min(one.pairs_per_batch, PROMPTS)
        elif isinstance(one, PromptDataModule):
            one.prompts_per_batch = min(one.prompts_per_batch, -(-PROMPTS // updates) * updates)
            # Rewards of sets may need more of a prompt.
            smallest = max(getattr(r, "smallest", 1) for b in module.reward_banks for r in b.rewards.values())
            few = 1 if isinstance(module, AlignPropModule) else max(IMAGES, smallest)
            one.images_per_prompt = min(one.images_per_prompt, few)
