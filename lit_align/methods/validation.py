"""What is measured of held-out images. Shapes: ``B`` images, ``T`` steps."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_align.backbones import POLICY, REFERENCE, Conditioning
from lit_align.comparison import DISTANCES, diversity, high_frequency, saturation
from lit_align.data import Batch
from lit_align.gaussian import GaussianStep
from lit_align.methods.sampling import BatchPolicy, SamplingModule
from lit_align.methods.skipped import SkippingModule
from lit_align.methods.strategies import forget_scores
from lit_align.rewards import RewardBank, RewardOutput
from lit_align.rollout import Trajectory
from lit_align.samplers import Sampler

DRIFT_STEPS = 4
"""Steps of a deterministic chain at which the drift is measured, evenly spaced; all would cost a rollout."""


def measure(images: Tensor, scores: RewardOutput, batch: Batch) -> dict[str, Tensor]:
    """What is reported of each image, ``(B,)`` on the CPU: its scores, diversity, artefacts, and its place.

    ``unscored`` is there only if some image has no score.
    """
    measured = dict(scores.report)
    if bool(scores.total.isnan().any()):
        measured["unscored"] = scores.total.isnan().float().cpu()
    measured["diversity"] = diversity(images, batch.groups).cpu()
    measured |= {"saturation": saturation(images).cpu(), "high_frequency": high_frequency(images).cpu()}
    if "reward/truth" in measured:
        measured["truth"] = measured["reward/truth"]
    return measured | {"index": batch.index, "group": batch.groups}


def kl_to_reference(
    reference: BatchPolicy,
    trajectory: Trajectory,
    stochastic: Tensor,
    chunk: int,
    stds: Sequence[Tensor] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """KL to the reference along chains, summed over the stochastic steps: nats per image, ``(B,)``.

    Args:
        reference: For the same images.
        trajectory: Their chains.
        stochastic: ``(T,)`` bool; the other steps have no density, and the reference is not asked there.
        chunk: Images at once.
        stds: Of the ``T`` steps that made the chains, where they are not the reference's.
        device: Where the reference computes; that of the chains if not given.
    """
    totals = []
    where = device or trajectory.states.device
    for rows in torch.arange(trajectory.states.shape[1]).split(chunk):
        total = trajectory.states.new_zeros(len(rows), device=where)
        policy = reference[rows]
        for k in stochastic.nonzero().flatten().tolist():
            step = policy(trajectory.states[k, rows].to(where), k)
            std = step.std if stds is None else stds[k]
            total += GaussianStep(trajectory.means[k, rows].to(where), std).kl(step)
        totals.append(total)
    return torch.cat(totals)


def drift_from_reference(
    reference: BatchPolicy,
    trajectory: Trajectory,
    sampler: Sampler,
    chunk: int,
    device: torch.device | None = None,
) -> Tensor:
    """How far predictions have moved from the reference's, ``(B,)``: what can be said without a density.

    It is the root mean square difference of the predictions at the states of the chain, over the latent's
    elements and :data:`DRIFT_STEPS` of the steps, in the units of the network's output.
    """
    count = min(DRIFT_STEPS, sampler.num_steps)
    steps = torch.linspace(0, sampler.num_steps - 1, count).round().long().tolist()
    one = torch.ones(1, 1, dtype=torch.float64)
    squares = []
    where = device or trajectory.states.device
    for rows in torch.arange(trajectory.states.shape[1]).split(chunk):
        policy, total = reference[rows], trajectory.states.new_zeros(len(rows), device=where)
        for k in steps:
            # A step is linear in the prediction, so that means differ by this factor times predictions.
            factor = sampler.step(0 * one, one, k).mean.item()
            state, mean = (part[k, rows].to(where) for part in (trajectory.states, trajectory.means))
            difference = (mean - policy(state, k).mean) / factor
            total += difference.square().flatten(1).mean(1)
        squares.append(total / count)
    return torch.cat(squares).sqrt()


def in_global_order(parts: Iterable[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """The metrics of all images in the order of their numbers, and their prompt groups.

    Args:
        parts: What :func:`measure` gave of each batch, over all ranks. ``unscored`` may be missing in some.
    """
    listed = list(parts)
    names = dict.fromkeys(name for part in listed for name in part)

    def values(part: dict[str, Tensor], name: str) -> Tensor:
        return part[name] if name in part else torch.zeros(len(part["index"]))

    merged = {name: torch.cat([values(part, name) for part in listed]) for name in names}
    order = merged.pop("index").argsort()
    merged = {name: found[order] for name, found in merged.items()}
    return merged, merged.pop("group")


class ValidatedModule(SamplingModule, SkippingModule):
    """A module whose policy is compared with the pretrained model on held-out prompts and the same noise.

    Attributes:
        baseline: What was measured of the pretrained model, by name, ``(N,)`` each.
        latest: The same of the policy, in the newest validation.
        measured_at: The :attr:`position` at which that was measured; and ``compared_since``, after how many
            images validations are measured as now, where earlier ones were measured otherwise.
        prompt_groups: ``(N,)``, the prompt of each image.
        tested: What the newest test measured of the policy, and of the pretrained model as ``base/<name>``.
        tested_groups: The prompt of each of its images.
        set_metrics: What callbacks measured of all images of a test, by name: ``before`` and ``after``.
        taken_back: What an earlier validation measured, if the guard has restored its weights.
    """

    rewards: RewardBank
    baseline: dict[str, Tensor]
    latest: dict[str, Tensor]
    images: int
    reward_queries: int
    measured_at: dict[str, int]
    prompt_groups: Tensor
    tested: dict[str, Tensor]
    tested_groups: Tensor
    set_metrics: dict[str, dict[str, float]]
    taken_back: dict[str, Tensor]
    _evaluated: list[dict[str, Tensor]]

    @property
    def held_out(self) -> tuple[str, ...]:
        """The rewards that nothing is trained on, by the names under which they are measured."""
        return tuple(f"reward/{name}" for name in self.rewards.monitored)

    @property
    def standing(self) -> dict[str, Tensor]:
        """What was measured of the present weights; after a rollback, of the restored ones."""
        return self.taken_back or self.latest

    @torch.no_grad()
    def score(self, images: Tensor, batch: Batch) -> RewardOutput:
        """What the rewards say of images, without gradient."""
        return self.bank_of(batch)(images, batch.prompts, batch.groups, batch.columns)

    def evaluate(self, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What :func:`measure` reports of images that it scores."""
        return measure(images, self.score(images, batch), batch)

    def score_ahead(self, images: Tensor, batch: Batch) -> None:
        self.bank_of(batch).ahead(images, batch.prompts, batch.columns)

    def bank_of(self, batch: Batch) -> RewardBank:
        """The rewards that score a batch; several tasks have a bank each."""
        return self.rewards

    @property
    def position(self) -> dict[str, int]:
        """How far the run is: images sampled, and scores that were asked for."""
        return {"images": self.images, "reward_queries": self.reward_queries}

    def forget_baseline(self) -> None:
        """Drop what was measured before: the pretrained model is measured anew when training starts."""
        self.baseline, self.latest, self.taken_back = {}, {}, {}

    def on_train_start(self) -> None:
        """Measure the pretrained model where that was not done: every curve has a point at 0 images."""
        if self.baseline or not self.trainer.enable_validation:
            return
        if self.images:
            self.trainer.fit_loop.epoch_loop.val_loop.setup_data()
            self._measure_reference()
            self.measured_at = self.position | {"compared_since": self.images}
            return
        self.trainer.validating = True
        self.trainer.fit_loop.epoch_loop.val_loop.run()
        self.trainer.training = True

    @torch.no_grad()
    def _measure_reference(self) -> None:
        """The baseline where the policy is another one; outside of the Trainer's loop, which has counters."""
        total = int(sum(self.trainer.num_val_batches))
        batches: Any = self.trainer.val_dataloaders
        for batch in islice(batches, total):
            with self.trainer.precision_plugin.forward_context(), self.evaluating():
                cond = self.backbone.encode(batch.prompts)
                samples = self.sample(self.policy(batch, cond, REFERENCE), batch, "validation")
                measured = self.evaluate(samples.images, batch)
            distance = "kl" if self.eval_sampler.stochastic.any() else "drift"
            self._evaluated.append(measured | {distance: torch.zeros(len(batch))})  # from itself
        parts = [part for rank in self.gather(self._evaluated) for part in rank]
        self.baseline, self._evaluated = in_global_order(parts)[0], []

    def _is_pretrained(self) -> bool:
        """Whether the policy of the newest validation, before any training, was the pretrained model.

        It was not, if the run started from adapters or loaded experts, or if another module had trained this
        backbone. Without these a distance above 0 is rounding: a fusion of untrained experts is the
        pretrained model up to rounding.
        """
        distances = [self.latest[name] for name in DISTANCES if name in self.latest]
        sets = self.backbone.weight_sets
        moved = bool(sets.file_hashes) or sets.trained
        return not (moved and any(bool((values != 0).any()) for values in distances))

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """A rollout on held-out prompts with the same noise every time; returns the images."""
        cond = self.backbone.encode(batch.prompts)
        with self.evaluating():
            samples = self.sample(self.policy(batch, cond), batch, "validation")
            distance = self.distance(batch, cond, samples.trajectory)
        self._evaluated.append(self.evaluate(samples.images, batch) | distance)
        return samples.images

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Policy and reference on the same prompts and noise; returns their images by weight set."""
        cond = self.backbone.encode(batch.prompts)
        with self.evaluating():
            samples, before = (
                self.sample(self.policy(batch, cond, weights), batch, "test")
                for weights in (POLICY, REFERENCE)
            )
            distance = self.distance(batch, cond, samples.trajectory)
        base = self.evaluate(before.images, batch)
        base |= {name: torch.zeros_like(values) for name, values in distance.items()}
        measured = self.evaluate(samples.images, batch)
        base = {f"base/{name}": values for name, values in base.items() if name not in ("index", "group")}
        self._evaluated.append(base | measured | distance)
        return {POLICY: samples.images, REFERENCE: before.images}

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Images ``(B, 3, H, W)`` and their rewards."""
        with self.evaluating():
            policy = self.policy(batch, self.backbone.encode(batch.prompts))
            images = self.sample(policy, batch, "predict").images
        return images, self.score(images, batch).report

    def distance(self, batch: Batch, cond: Conditioning, trajectory: Trajectory) -> dict[str, Tensor]:
        """How far the policy is from the reference along its chains, ``(B,)`` on the CPU.

        ``kl`` in nats per image; where no step has noise, and so no density, ``drift``.
        """
        reference, chunk = self.policy(batch, cond, REFERENCE), self.sampling.batch
        if not self.sampler.stochastic.any():
            drift = drift_from_reference(reference, trajectory, self.sampler, chunk, self.device)
            return {"drift": drift.cpu()}
        stds, noisy = self.step_stds(), self.sampler.stochastic
        return {"kl": kl_to_reference(reference, trajectory, noisy, chunk, stds, self.device).cpu()}

    def step_stds(self) -> Sequence[Tensor] | None:
        """Stds of the ``T`` steps that sample; None where they are the sampler's."""
        return None

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:  # some batches only, and measured again before the first update
            self._evaluated = []
            return
        if self.measured_at and self.measured_at["images"] == self.measured_at.get("compared_since"):
            forget_scores(self.trainer)  # the first validation that measures otherwise
        (self.latest, self.prompt_groups), self.taken_back = self._report("val"), {}
        self.measured_at = self.measured_at | self.position
        if self.images:
            return
        if self._is_pretrained():
            self.baseline = self.latest
        else:
            self._measure_reference()

    def on_test_start(self) -> None:
        self.set_metrics = {}

    def on_test_epoch_end(self) -> None:
        self.tested, self.tested_groups = self._report("test")

    def _report(self, stage: str) -> tuple[dict[str, Tensor], Tensor]:
        """The metrics of all ranks' images in their global order and their groups; logs the means."""
        parts = [part for rank in self.gather(self._evaluated) for part in rank]
        self._evaluated = []
        merged, groups = in_global_order(parts)
        if bool(merged["reward"].isnan().all()):
            rank_zero_warn(f"none of the {len(merged['reward'])} images of this {stage} has a score")
        means = {f"{stage}/{name}": values.nanmean() for name, values in merged.items()}
        self.log_dict(means | {"step": torch.tensor(float(self.images))}, sync_dist=True)
        return merged, groups
