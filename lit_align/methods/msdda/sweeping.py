"""The test of MSDDA: the fused policy, then every point of a sweep, on the same prompts and noise."""

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lit_align.backbones import REFERENCE, Conditioning
from lit_align.data import Batch
from lit_align.methods.msdda.experts import ExpertModule
from lit_align.methods.msdda.fusion import is_one_hot
from lit_align.methods.msdda.sweep import (
    BASE,
    EXPERT,
    FUSED,
    JOINT,
    RANDOM,
    Front,
    Measured,
    Point,
    Sweep,
    Weights,
)
from lit_align.methods.sampling import BatchPolicy
from lit_align.methods.validation import kl_to_reference
from lit_align.samplers import Sampler

PolicyFactory = Callable[[Batch, Conditioning], BatchPolicy]
"""Makes the policy for the images of a batch and their encoded prompts."""


class SweepModule(ExpertModule):
    """Measures other weights than the configured ones, and other ways to serve them.

    Attributes:
        experts: For each objective the folder of its expert, or None for one that ``fit`` trains.
        samplers: Own samplers of experts.
        joint: Weights of the adapters that ``fit`` trains on a mixed reward, by name.
        sweep: What ``test`` sweeps; None for nothing.
        front: What the newest test found.
    """

    experts: dict[str, str | None]
    samplers: dict[str, Sampler]
    joint: dict[str, dict[str, float]]
    one_expert_per_step: bool
    sweep: Sweep | None
    front: Front | None
    _swept: dict[Point, list[dict[str, Tensor]]]
    _shown: list[tuple[int, str]]

    @abstractmethod
    def fused(self, weights: Mapping[str, float], batch: Batch, cond: Conditioning) -> BatchPolicy:
        """The policy for any weights of the objectives."""

    @abstractmethod
    def exponents(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The powers of the experts' kernels and of the reference's in the fused one."""

    @abstractmethod
    def alone(self, weights: Mapping[str, float]) -> str | None:
        """The expert that the fused policy is at these weights, if it is one."""

    @abstractmethod
    def stds(self, exponents: Mapping[str, float]) -> Sequence[Tensor] | None:
        """Stds of the steps of a product of kernels; None where they are the sampler's."""

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The fused policy and the reference on the same noise, then the sweep."""
        images = super().test_step(batch, batch_idx)
        if self.sweep is not None:
            with self.evaluating():
                self._measure_points(batch, self.sweep.images)
        return images

    def _measure_points(self, batch: Batch, count: int) -> None:
        """Sample and score the batch at all points; keep images of the first ``count`` prompts."""
        # The first image of each of the first prompts is shown.
        rows = (batch.firsts & (batch.groups < count)).nonzero().flatten()
        self._shown += [(int(batch.groups[row]), batch.prompts[row]) for row in rows.tolist()]
        points, _ = self._points()
        cond = self.backbone.encode(batch.prompts)
        for point, policy in self.track(points.items(), len(points), "Sweep"):
            started = time.perf_counter()
            samples = self.sample(policy(batch, cond), batch, "test")
            samples.images.sum().item()  # a GPU has then done its work
            seconds = (time.perf_counter() - started) / len(batch)
            metrics = self.evaluate(samples.images, batch)
            metrics["seconds"] = torch.full((len(batch),), seconds)
            if self._has_kl(point):
                stds = self.stds(exponents) if (exponents := self._exponents_at(point)) else None
                metrics["kl"] = kl_to_reference(
                    self.expert(REFERENCE, cond),
                    samples.trajectory,
                    self.sampler.stochastic,
                    self.sampling.batch,
                    stds,
                    self.device,
                ).cpu()
            metrics["images"] = samples.images[rows.to(samples.images.device)].cpu()
            self._swept.setdefault(point, []).append(metrics)

    def _points(self) -> tuple[dict[Point, PolicyFactory], dict[str, list[Weights]]]:
        """All policies of the sweep, in order; and of each method where it is an expert, sampled as such."""
        assert self.sweep is not None
        grid = {tuple(weights.items()): weights for weights in self.sweep.weights(list(self.experts))}
        found: dict[Point, PolicyFactory] = {Point(BASE): partial(self._alone, REFERENCE)}
        method = RANDOM if self.one_expert_per_step else FUSED
        ends: dict[str, list[Weights]] = {method: []}
        for of, weights in grid.items():
            if is_one_hot(weights):
                (name,) = (name for name, weight in of if weight)
                found[Point(EXPERT, of)] = partial(self._alone, name)
                if self.alone(weights):
                    ends[method].append(of)
                    continue
            found[Point(method, of)] = partial(self.fused, weights)
        for baseline in self.sweep.baselines:
            # With samplers of their own experts are nobody else's ends: all others sample by the common one.
            own = [] if self.samplers else [of for of, w in grid.items() if baseline.is_expert(self, w)]
            ends[baseline.name] = own
            for of, weights in grid.items():
                if of not in own:
                    found[Point(baseline.name, of)] = partial(baseline.policy, self, weights)
        for name, weights in self.joint.items():
            found[Point(JOINT, tuple(weights.items()))] = partial(self._alone, name)
        # Training on all of the weight is training the expert, where fit does so at the same KL strength.
        trained = [of for of in ends[method] if self.alone(grid[of]) in self.trained]
        ends[JOINT] = [of for of in trained if Point(JOINT, of) not in found]
        return found, ends

    def _alone(self, name: str, batch: Batch, cond: Conditioning) -> BatchPolicy:
        return self.expert(name, cond)

    def _exponents_at(self, point: Point) -> dict[str, float]:
        """Exponents of the kernels whose product is sampled at a point; empty where no product is."""
        if point.method == EXPERT:
            return {name: weight for name, weight in point.weights if weight}
        return self.exponents(dict(point.weights)) if point.method in (FUSED, RANDOM) else {}

    def _has_kl(self, point: Point) -> bool:
        """Whether its steps are Gaussians of known std: those of a search, or without noise, are not."""
        assert self.sweep is not None
        if not self.sampler.stochastic.any():
            return False
        return all(b.has_kl for b in self.sweep.baselines if b.name == point.method)

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        if self.sweep is None:
            return
        shown = [one for rank in self.gather(self._shown) for one in rank]
        placed = sorted(range(len(shown)), key=shown.__getitem__)  # ranks hold prompts in turns
        measured = []
        for point, own in self._swept.items():
            parts = [part for rank in self.gather(own) for part in rank]
            merged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            images, order = merged.pop("images")[placed], merged.pop("index").argsort()
            metrics = {name: values[order] for name, values in merged.items()}
            groups, seconds = metrics.pop("group"), float(metrics.pop("seconds").mean())
            measured.append(Measured(point, metrics, groups, seconds, images))
        self._swept, self._shown = {}, []
        prompts = [shown[place][1] for place in placed]
        self.front = Front(tuple(self.experts), measured, self.rewards.weights, self._points()[1], prompts)
        volumes = self.front.hypervolumes().items()
        self.log_dict({f"test/hypervolume/{name.replace(' ', '_')}": volume for name, volume in volumes})
