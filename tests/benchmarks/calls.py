"""The bare calls that a method must make in one rollout batch: to add a method, add a function here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, singledispatch
from typing import Any, Literal

import torch
from lightning import LightningModule

from lit_align.data import Batch, PairBatch
from lit_align.methods import (
    AlignPropModule,
    DDPOModule,
    DPOModule,
    MSDDAModule,
    PRDPModule,
    SFTModule,
    SPINModule,
)
from lit_align.randomness import generator
from lit_align.replay import draw_few_pairs, measured_one_in

Kind = Literal["forward", "gradient", "decode", "decode gradient"]


@dataclass(frozen=True)
class Calls:
    """Bare calls of one kind: so many rows in all, in the batches that the method makes of them."""

    kind: Kind
    rows: int
    size: int


@dataclass(frozen=True)
class Part:
    """A method of the module, and the calls that the algorithm must make in it in one rollout batch."""

    name: str
    method: str
    calls: tuple[Calls, ...] = ()


@singledispatch
def parts(module: LightningModule, batch: Batch) -> tuple[Part, ...]:
    """The parts of one rollout batch of a method; what is in none of them is Lightning's, files and logs."""
    raise SystemExit(f"floor: {type(module).__name__} has no function under parts in {__file__}")


def _width(guidance: float) -> int:
    """Rows of a prediction for one image."""
    return 1 if guidance == 1 else 2


def _sampled(module: DDPOModule | PRDPModule | MSDDAModule, images: int) -> tuple[Part, Part]:
    """T forwards and a decode an image, and the rewards."""
    width, chunk = _width(module.sampling.guidance), min(module.sampling.batch, images)
    sampling = Calls("forward", width * images * module.sampler.num_steps, width * chunk)
    decoding = Calls("decode", images, min(module.backbone.decode_batch, chunk))
    return Part("sampling", "sample", (sampling, decoding)), Part("rewards", "score")


@parts.register
def ddpo(module: DDPOModule, batch: Batch) -> tuple[Part, ...]:
    """A gradient a replayed pair; KL on the first image of a prompt."""
    width, pairs = _width(module.sampling.guidance), len(batch) * module.steps_per_image
    micro = min(module.optimisation.micro_batch, pairs // module.updates) * width
    replayed = width * pairs * module.inner_epochs
    learning = [Calls("gradient", replayed, micro)]
    if module.kl_weight:
        learning.append(Calls("forward", replayed, micro))
    index, firsts, steps = batch.index, batch.firsts, module.stochastic_steps
    few = draw_few_pairs(
        index, firsts, steps, module.steps_per_image, measured_one_in(False, followed=True), module.seed, 0
    )
    measured = (Calls("forward", width * len(few.rows), min(micro, width * len(few.rows))),)
    return (
        *_sampled(module, len(batch)),
        Part("updates", "update", tuple(learning)),
        # Without a target the KL is only reported, which no algorithm asks for.
        Part("KL of the step", "look_back", measured if module.kl_target else ()),
    )


@parts.register
def alignprop(module: AlignPropModule, batch: Batch) -> tuple[Part, ...]:
    """A gradient an attached prediction, a forward each other, a differentiated decoding an image.

    Which predictions are attached is drawn: the first rollout batch's draws stand for all. All of it, rewards
    too, runs inside the update.
    """
    width, steps = _width(module.sampling.guidance), module.sampler.num_steps
    ends = 1 + module.truncation.copies
    draws = [generator(module.seed, "truncation", i) for i in batch.index.tolist()]
    drawn = torch.stack([module.truncation.attached(steps, draw) for draw in draws])
    # A one-shot ends the chain at its attached step.
    taken = int((drawn.int().argmax(1) + 1).sum()) if module.truncation.one_shot else steps * len(batch)
    attached, micro = int(drawn.sum()), min(module.optimisation.micro_batch, len(batch))
    predicted = attached * (2 if module.kl_weight else 1) + len(batch) * module.truncation.copies
    calls = (
        Calls("forward", width * (taken - attached), width * micro),
        Calls("gradient", width * predicted, width * micro),
        Calls("decode gradient", ends * len(batch), min(module.backbone.decode_batch, ends * micro)),
    )
    return (Part("sampling, rewards, update", "update", tuple(call for call in calls if call.rows)),)


@parts.register
def prdp(module: PRDPModule, batch: Batch) -> tuple[Part, ...]:
    """A forward of each noisy step by the reference, and two passes an update.

    The first update of a rollout batch needs no first pass: the weights are those that sampled.
    """
    width, pairs = _width(module.sampling.guidance), len(batch) * len(module.stochastic_steps)
    part, passed = pairs // module.updates, pairs * module.inner_epochs
    compared = Calls("forward", width * pairs, width * min(module.sampling.batch, pairs))
    first = Calls("forward", width * (passed - part), width * min(module.sampling.batch, part))
    second = Calls("gradient", width * passed, width * min(module.optimisation.micro_batch, part))
    return (
        *_sampled(module, len(batch)),
        Part("reference", "_compare", (compared,)),
        Part("updates", "_learn", tuple(call for call in (first, second) if call.rows)),
        # Only reported: no algorithm asks for it.
        Part("KL of the step", "_move"),
    )


@parts.register
def msdda(module: MSDDAModule, batch: Batch) -> tuple[Part, ...]:
    """The reference samples for all experts; a gradient a pair and expert."""
    width, pairs = _width(module.sampling.guidance), len(batch) * module.steps_per_image
    learnt = width * pairs * module.inner_epochs * len(module.trained)
    learning = Calls(
        "gradient", learnt, width * min(module.optimisation.micro_batch, pairs // module.updates)
    )
    return (*_sampled(module, len(batch)), Part("updates", "_learn", (learning,)))


@parts.register
def sft(module: SFTModule, batch: PairBatch) -> tuple[Part, ...]:
    """A gradient an image; that it is encoded by the VAE once has no floor here."""
    gradient = Calls("gradient", len(batch), min(module.optimisation.micro_batch, len(batch)))
    return Part("winners", "prepare"), Part("update", "update", (gradient,))


@parts.register
def dpo(module: DPOModule, batch: PairBatch) -> tuple[Part, ...]:
    """A gradient an image, and a forward by the reference."""
    comparing = _compared(2 * len(batch), 2 * module.optimisation.micro_batch)
    return Part("pairs", "prepare"), Part("update", "update", comparing)


@parts.register
def spin(module: SPINModule, batch: PairBatch) -> tuple[Part, ...]:
    """As Diffusion-DPO, and T forwards for each image of the opponent: give --model.steps 1.

    Then every rollout batch begins an iteration (of which there must be enough) and draws its own pool.
    """
    width = _width(module.opponent_guidance)
    pairs, chunk = len(batch), min(module.sampling.batch, len(batch))
    playing = Calls("forward", width * pairs * module.sampler.num_steps, width * chunk)
    times, size = (width * int(module.sampler.stochastic.sum()), width) if module.exact else (1, 1)
    comparing = _compared(2 * pairs * times, 2 * size * module.optimisation.micro_batch)
    return (
        Part("opponent's images", "_fill_pool", (playing,)),
        Part("pairs", "prepare"),
        Part("update", "update", comparing),
    )


def _compared(rows: int, size: int) -> tuple[Calls, ...]:
    """So many predictions with a gradient, and the same ones of a frozen weight set."""
    return Calls("gradient", rows, min(rows, size)), Calls("forward", rows, min(rows, size))


def bare_call(module: Any, kind: Kind, size: int, prompts: list[str], weights: str) -> Callable[[], object]:
    """One call at a batch of ``size`` rows with a weight set, its inputs made beforehand."""
    backbone = module.backbone
    x = torch.randn(size, *backbone.latent_shape).to(module.device)
    if kind == "decode":
        return torch.no_grad()(partial(backbone.vae.decode, x, return_dict=False))
    if kind == "decode gradient":
        x.requires_grad_()

        def decode_gradient() -> object:
            (images,) = backbone.vae.decode(x, return_dict=False)
            return torch.autograd.grad(images, x, torch.ones_like(images))

        return torch.enable_grad()(decode_gradient)
    steps = module.sampler.timesteps.to(module.device)
    t = steps[torch.arange(size, device=module.device) % len(steps)]
    cond = backbone.encode([prompts[i % len(prompts)] for i in range(size)]).prompt
    trained, ones = backbone.weight_sets.parameters_of(weights), torch.ones_like(x)

    def forward() -> torch.Tensor:
        return backbone.denoise(backbone.weight_sets.choose(weights), x, t, cond, 1.0)

    def gradient() -> object:
        prediction = forward()
        return torch.autograd.grad(prediction, trained, ones.to(prediction), allow_unused=True)

    return torch.no_grad()(forward) if kind == "forward" else torch.enable_grad()(gradient)
