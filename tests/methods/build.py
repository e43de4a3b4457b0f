"""Small runs of every method, of which a test says only what matters to it.

Options are named as in a configuration but without their group: ``make(DDPOModule, tiny, lr=1e-2, batch=4,
eta=0.5, updates=2)`` finds ``optimisation``, ``sampling``, the sampler and the backbone by itself; what
belongs to none of these is the method's own.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from lit_align import backbones
from lit_align.advantages import GroupAdvantages
from lit_align.backbones import POLICY
from lit_align.callbacks import BatchCheckpoint
from lit_align.data import (
    Batch,
    CaptionedImages,
    MultiTaskDataModule,
    PickaPicDataModule,
    PromptDataModule,
    ShapesPrompts,
    TaskPrompts,
)
from lit_align.methods import (
    AlignmentModule,
    AlignPropModule,
    DDPOModule,
    DPOModule,
    MSDDAModule,
    NFTModule,
    PRDPModule,
    SFTModule,
    SPINModule,
)
from lit_align.methods.alignprop import UniformWindow
from lit_align.methods.optimisation import Optimisation
from lit_align.methods.sampling import Samples, Sampling
from lit_align.rewards import Brightness, Redness, Reward, RewardBank, SetReward
from lit_align.samplers import DDIM
from tests.backbones.fresh import fresh
from tests.methods.recorders import Recorder

Method = TypeVar("Method", bound=AlignmentModule)

OPTIMISATION = ("optimizer", "lr_scheduler", "clip_norm", "micro_batch")
SAMPLING = ("guidance", "batch", "seed", "store", "eval_sampler")
SAMPLER = ("num_steps", "eta", "noisy_steps")
BACKBONE = ("lora", "checkpointing", "adapters", "size", "dtype", "offload_text_encoders")

OF_PAIRS: dict[str, Any] = {"num_steps": 3, "lr": 1e-2, "micro_batch": 3}

OWN: dict[type[AlignmentModule], dict[str, Any]] = {
    DDPOModule: {"clip_range": 1e-2},
    NFTModule: {},
    PRDPModule: {"beta": 1e-3, "clip_range": 1e-2},
    AlignPropModule: {"truncation": UniformWindow(), "coefficient": 1.0, "reward": Redness()},
    MSDDAModule: {
        "experts": {"bright": None, "red": None},
        "weights": {"bright": 0.5, "red": 0.5},
        "beta": 0.05,
        "batch": 16,
        "lr": 1e-2,
    },
    SPINModule: OF_PAIRS | {"iterations": 2, "steps": 3, "beta": 200.0},
    DPOModule: OF_PAIRS | {"beta": 500.0},
    SFTModule: OF_PAIRS,
}
"""What a test of each method gets that asks for nothing else."""


def bank(reward: Reward | None = None) -> RewardBank:
    """A trained reward (its brightness if none is given), and how red an image is, monitored."""
    return RewardBank({"trained": reward or Brightness(), "monitored": Redness()}, {"trained": 1.0})


def both_objectives() -> RewardBank:
    """The two objectives of MSDDA's experts, ``bright`` and ``red``, of comparable scale."""
    return RewardBank({"bright": Brightness(), "red": Redness()}, {"bright": 10.0, "red": 30.0})


def make(
    method: type[Method],
    folder: Path,
    reward: Reward | None = None,
    rewards: RewardBank | None = None,
    lr: float | None = None,
    sampler: Any = None,
    rates: float | list[float] | None = None,
    **options: Any,
) -> Method:
    """A module of a method on the tiny pipeline in ``folder``; the same weights every time.

    Args:
        method: Its class.
        folder: Of a fixture, such as ``tiny`` or ``tiny_xl``.
        reward: What is trained on, in :func:`bank`.
        rewards: The whole bank instead.
        lr: Of AdamW without decay, if no ``optimizer`` is given.
        rates: SPIN's ``lr``, that of each iteration.
        sampler: Instead of DDIM with ``num_steps``, ``eta`` and ``noisy_steps``.
        options: Of any group.
    """
    given = {"lr": 1e-3, "num_steps": 3, "guidance": 1.0, "micro_batch": 16} | OWN[method] | options
    if lr is not None:
        given["lr"] = lr
    groups = [
        {name: given.pop(name) for name in names if name in given}
        for names in (OPTIMISATION, SAMPLING, SAMPLER, BACKBONE)
    ]
    optimisation, sampling, steps, backbone = groups
    optimizer = partial(torch.optim.AdamW, lr=given.pop("lr"), weight_decay=0.0)
    if rates is not None:
        given["lr"] = rates
    own_reward = given.pop("reward", None)
    if "tasks" not in given:
        default = (
            both_objectives() if method is MSDDAModule and reward is None else bank(reward or own_reward)
        )
        given["rewards"] = rewards or default
        if method in (DDPOModule, NFTModule):
            given.setdefault("advantages", GroupAdvantages())
    return method(
        fresh(backbone_of(folder), folder, **backbone),
        sampler=sampler or partial(DDIM, **steps),
        optimisation=Optimisation(**{"optimizer": optimizer} | optimisation),
        sampling=Sampling(**sampling),
        **given,
    )


def backbone_of(folder: Path) -> Any:
    """The class for a pipeline's folder, which is named as the pipeline's."""
    pipeline = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return getattr(backbones, pipeline.replace("Pipeline", "Backbone"))


def prompts(prompts: int = 4, images: int = 4, **options: Any) -> PromptDataModule:
    """Data for the methods that sample: a rollout batch has ``prompts * images`` images; 8 are validated."""
    return PromptDataModule(
        ShapesPrompts(["open"]), **_sizes(images_per_prompt=images, prompts_per_batch=prompts) | options
    )


def task_prompts(*names: str, prompts: int = 2, images: int = 4, **options: Any) -> MultiTaskDataModule:
    """The same for several tasks, called ``a``, ``b`` and ``c``."""
    sources = {"a": ShapesPrompts(["open"]), "b": ShapesPrompts(["single"]), "c": ShapesPrompts(["open"])}
    sizes = _sizes(images_per_prompt=images, prompts_per_batch=prompts)
    return MultiTaskDataModule({name: TaskPrompts(sources[name]) for name in names}, **sizes | options)


def _sizes(**sizes: int) -> dict[str, Any]:
    held_out = {f"{stage}_prompts": 4 for stage in ("validation", "test")}
    return sizes | held_out | {f"{stage}_images_per_prompt": 2 for stage in ("validation", "test")}


def pairs(view: Any = "pairs", size: int = 4, **options: Any) -> PickaPicDataModule:
    """Data for the methods that learn from pairs: ``size`` in a batch, of the tiny pipeline's resolution."""
    settings: dict[str, Any] = {"pairs_per_batch": size, "resolution": 16}
    held_out = {f"{stage}_prompts": 2 for stage in ("validation", "test")}
    held_out |= {f"{stage}_images_per_prompt": 1 for stage in ("validation", "test")}
    return PickaPicDataModule(view=view, **settings | held_out | options)


def data_for(module: AlignmentModule, **options: Any) -> LightningDataModule:
    """The data that a module of :func:`make` learns from."""
    if isinstance(module, DPOModule):
        return pairs(**options)
    if isinstance(module, (SPINModule, SFTModule)):
        return pairs("winners", **options)
    tasks = getattr(module, "tasks", {"": None})
    return prompts(**options) if list(tasks) == [""] else task_prompts(*tasks, **options)


def trainer(folder: Path, batches: int, *callbacks: Callback, **options: Any) -> Trainer:
    """A Trainer of ``batches`` rollout batches an epoch; it validates nothing unless told.

    A checkpoint is written after each batch if :class:`BatchCheckpoint` is among the callbacks. With
    ``devices=2`` processes are forked: that takes a tenth of the time of new ones, which import everything.
    """
    settings: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0, "logger": False} | options
    if settings.get("devices", 1) > 1:
        settings["strategy"] = "ddp_fork"
    return Trainer(
        accelerator="cpu",
        limit_train_batches=batches,
        default_root_dir=folder,
        enable_checkpointing=any(isinstance(callback, BatchCheckpoint) for callback in callbacks),
        enable_model_summary=False,
        **{"enable_progress_bar": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1} | settings,
        callbacks=list(callbacks),
    )


def fit(
    module: AlignmentModule,
    folder: Path,
    batches: int = 1,
    *callbacks: Callback,
    data: LightningDataModule | None = None,
    ckpt_path: Path | None = None,
    recorder: Recorder | None = None,
    **options: Any,
) -> Recorder:
    """Train, on :func:`data_for` the module if no other ``data`` is given; returns what was recorded.

    With ``devices=2`` the module of this process stays as it is: what was trained is in the recorder.
    """
    recorder = recorder or Recorder()
    runs = trainer(folder, batches, recorder, *callbacks, **options)
    runs.fit(module, data or data_for(module), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    if runs.world_size > 1:
        recorder.read(folder)
    return recorder


def trained(module: LightningModule) -> list[Tensor]:
    """Copies of what is trained."""
    return [p.detach().clone() for p in module.parameters() if p.requires_grad]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers of some tensors, ``(N,)``."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def assert_same(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Equal bit for bit."""
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_close_gradients(one: Sequence[Tensor], other: Sequence[Tensor], tolerance: float = 1e-3) -> None:
    """Equal up to this share of the largest element: rounding differs with the batch of a prediction."""
    largest = flat(one).abs().max()
    assert largest > 0
    assert (flat(one) - flat(other)).abs().max() <= tolerance * largest


def held_out(module: AlignmentModule, data: LightningDataModule | None = None) -> Batch:
    """The first batch of validation prompts."""
    loaded = data or data_for(module)
    loaded.setup("validate")
    batch: Batch = next(iter(loaded.val_dataloader()))
    return batch


@torch.no_grad()
def draw(
    module: AlignmentModule, batch: Batch, purpose: str = "validation", weights: str = POLICY
) -> Samples:
    """What a weight set draws for a batch."""
    return module.sample(module.policy(batch, module.backbone.encode(batch.prompts), weights), batch, purpose)


def randomise(module: AlignmentModule, std: float = 0.3) -> list[Tensor]:
    """Move all that is trained to random numbers (an adapter starts at 0); returns the parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(std * torch.randn(parameter.shape, generator=numbers))
    return parameters


class Unscored(Reward):
    """Of so many neighbours the first image has no score; the others that of another reward."""

    scope = "sample"
    every = 2

    def __init__(self, scored: Reward) -> None:
        super().__init__()
        self.scored, self.differentiable = scored, scored.differentiable

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: Mapping[str, list[Any]] | None = None,
    ) -> Tensor:
        scores = self.scored(images, prompts, groups, columns)
        return torch.where(torch.arange(len(images)) % self.every == 0, math.nan, scores)


class EvenBrightness(SetReward):
    """Minus the squared mean distance of a set's brightness from a half, for as many bright as dark."""

    DEFINED_FROM = 1

    def features(self, images: Tensor) -> Tensor:
        return (images.mean(dim=(1, 2, 3))[:, None] - 0.5).double().cpu()

    def value(self, total: Tensor, count: Tensor) -> Tensor:
        return -(total[:, 0] / count).square()


class Greys(CaptionedImages):
    """Seven grey images of the tiny model's size."""

    def __len__(self) -> int:
        return 7

    def caption(self, row: int) -> str:
        return f"grey {row}"

    def image(self, row: int) -> Tensor:
        return torch.full((3, 16, 16), row / 7)
