"""Findings from a trial."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from lit_align.doctor.finding import Finding
from lit_align.doctor.memory import Memory
from lit_align.doctor.trial import Seen
from lit_align.methods import AlignmentModule
from lit_align.rewards import RewardBank

FAR, NEAR = 1.0, 1e-7
"""Nats a step: a rollout batch that moves the policy further breaks it, one that moves it less is lost."""

DWARFED = 0.01
"""Share of the total's spread below which a trained reward does not count."""

LOST = 0.25
"""Share of images above the ceiling; where it is 2 standard deviations above the mean, 2 % are."""


def judge(module: AlignmentModule, seen: Seen) -> Iterator[Finding]:
    """What is wrong with a run, from a trial of it.

    Args:
        module: The method.
        seen: In the trial.
    """
    for bank in module.reward_banks:
        yield from _scores(bank, seen)
        yield from _ranges(bank, seen)
    yield from _gradients(seen, module.backbone.unread)
    yield from _steps(module, seen)
    yield from _ceiling(seen)
    if seen.memory is not None:
        yield from _memory(module, seen.memory)


def _scores(bank: RewardBank, seen: Seen) -> Iterator[Finding]:
    found = {name: seen.scores[f"reward/{name}"] for name in bank.trained if f"reward/{name}" in seen.scores}
    spreads = {}
    for name, values in found.items():
        where, finite = f"model.rewards.rewards.{name}", values[values.isfinite()]
        if missing := len(values) - len(finite):
            yield Finding(
                "reward_unscored",
                where,
                f"{missing} of {len(values)} images have no finite score",
                "they are left out of training; see what the reward makes of such images and prompts",
            )
        if len(finite) > 1 and finite.std() == 0:
            yield Finding(
                "reward_constant",
                where,
                f"all {len(finite)} images score {finite[0]:g}",
                "there is nothing to learn; see whether the scorer, its prompts and its columns fit",
            )
        elif len(finite) > 1:
            spreads[name] = abs(bank.weights[name]) * _within(values, seen.images_per_prompt)
    total = math.sqrt(sum(spread**2 for spread in spreads.values()))
    for name, spread in spreads.items():
        if len(spreads) > 1 and spread < DWARFED * total:
            yield Finding(
                "reward_dwarfed",
                f"model.rewards.weights.{name}",
                f"it makes {spread / total:.1%} of the differences between images of a prompt",
                "weights multiply raw scores, whose scales differ: raise it, or take it out of weights",
            )
    for name, spread in spreads.items():
        if spread == 0 and seen.images_per_prompt > 1 and len(spreads) == 1:
            yield Finding(
                "no_signal",
                f"model.rewards.rewards.{name}",
                "the images of a prompt all score alike",
                "rewards that depend on the prompt alone teach nothing; take a finer one",
            )


def _ranges(bank: RewardBank, seen: Seen) -> Iterator[Finding]:
    for name, reward in bank.rewards.items():
        values = seen.scores.get(f"reward/{name}", Tensor())
        finite = values[values.isfinite()]
        if reward.documented is None or not len(finite):
            continue
        (low, high), middle = reward.documented, float(finite.median())
        if not low <= middle <= high:
            yield Finding(
                "reward_out_of_range",
                f"model.rewards.rewards.{name}",
                f"the median score of {len(finite)} images is {middle:.4g}, and {type(reward).__name__} is "
                f"documented to score from {low:g} to {high:g}",
                "see whether the files of its model belong to this class",
            )


def _memory(module: AlignmentModule, memory: Memory) -> Iterator[Finding]:
    if memory.weights + memory.activations <= memory.there:
        return
    fits = memory.weights < memory.there
    items = module.optimisation.micro_batch
    yield Finding(
        "memory",
        "model.optimisation.micro_batch" if fits else "model.backbone",
        f"weights, gradients and optimizer take {memory.weights / 1e9:.3g} GB, a micro-batch of {items} "
        f"at least {memory.activations / 1e9:.3g}, and {memory.name} has {memory.there / 1e9:.3g}",
        f"lower micro_batch ({items}), or set backbone.checkpointing to blocks"
        if fits
        else "train an adapter (lora), set backbone.dtype to bfloat16, or shard the weights (fsdp.yaml)",
    )


def _within(values: Tensor, images: int) -> float:
    """Standard deviation of scores around the mean of their prompt; of all, if a prompt has one image."""
    values = values.double().nan_to_num(nan=float(values.nanmean()))
    if images > 1 and len(values) % images == 0:
        values = values.view(-1, images)
        values = values - values.mean(1, keepdim=True)
    else:
        values = values - values.mean()
    return float(values.square().mean().sqrt())


def _gradients(seen: Seen, layers: Sequence[str]) -> Iterator[Finding]:
    def unread(name: str) -> bool:
        return any(f".{layer}." in name for layer in layers)

    if seen.foreign:
        yield Finding(
            "gradient_elsewhere",
            "model.backbone",
            f"{len(seen.foreign)} frozen weights get gradients, such as {min(seen.foreign)}",
            "requires_grad is set when the model is built; do not change it later",
        )
    if any(not math.isfinite(norm) for norm in seen.norms):
        yield Finding(
            "gradient_not_finite",
            "model.optimisation",
            "a gradient is not finite, and its update was skipped",
            "use precision bf16-mixed or 32-true, and see whether a reward returns infinities",
        )
    elif not seen.reached:
        yield Finding(
            "no_gradient",
            "model",
            "no trained weight gets a gradient",
            "see whether all advantages are 0, all images unscored, or the loss detached",
        )
    elif not seen.moved:
        yield Finding(
            "weights_fixed",
            "model.optimisation.optimizer",
            "two updates change no weight",
            "the learning rate is 0, or the schedule begins at 0",
        )
    elif missing := [name for name in seen.trained if name not in seen.reached and not unread(name)]:
        yield Finding(
            "gradient_missing",
            "model.backbone.lora.target_modules",
            f"{len(missing)} of {len(seen.trained)} trained weights get no gradient, such as {missing[0]}",
            "they are never used, or only with weights that are 0; train others",
        )


def _steps(module: AlignmentModule, seen: Seen) -> Iterator[Finding]:
    deviation = max((metrics.get("train/ratio_deviation", 0.0) for metrics in seen.metrics), default=0.0)
    clip = getattr(module, "clip_range", None)
    if clip is not None and deviation > 0.1 * clip:
        yield Finding(
            "ratio_is_not_1",
            "trainer.precision",
            f"before the first update the ratio is off by {deviation:.2g}, and the clip range is {clip:g}",
            "use precision 32-true for the policy, or a larger clip range",
        )
    moves = [metrics["train/kl"] for metrics in seen.metrics if "train/kl" in metrics]
    steered = getattr(module, "kl_target", None) is not None
    rate = "the learning rate" if module.lr is None else f"the learning rate ({module.lr:g})"
    if any(not move <= FAR for move in moves):
        yield Finding(
            "step_too_large",
            "model.optimisation.optimizer",
            f"one rollout batch moves the policy by {max(moves):.2g} nats a step",
            f"lower {rate}, or set kl_target where the method has it",
        )
    elif moves and max(moves) < NEAR and not steered and seen.moved:
        yield Finding(
            "step_too_small",
            "model.optimisation.optimizer",
            f"one rollout batch moves the policy by {max(moves):.2g} nats a step",
            f"raise {rate}",
        )


def _ceiling(seen: Seen) -> Iterator[Finding]:
    shares = [metrics["train/above_ceiling"] for metrics in seen.metrics if "train/above_ceiling" in metrics]
    if shares and max(shares) > LOST:
        yield Finding(
            "above_ceiling",
            "model.ceiling",
            f"{max(shares):.0%} of the images of a rollout batch are above it and have no gradient",
            "raise it: ReFL's is 2 standard deviations above the mean of the pretrained model's rewards",
        )
