"""The sweep of MSDDA's test: every point of it, on the same prompts and noise."""

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_align.backbones import REFERENCE, Conditioning
from lit_align.data import Batch
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

if TYPE_CHECKING:
    from lit_align.methods.msdda.module import MSDDAModule

PolicyFactory = Callable[[Batch, Conditioning], BatchPolicy]
"""Makes the policy for the images of a batch and their encoded prompts."""


class Sweeping:
    """Measures all points of a sweep during a test.

    Args:
        module: The method; one test of it.
        sweep: What is swept.
    """

    def __init__(self, module: "MSDDAModule", sweep: Sweep) -> None:
        self.module, self.sweep = module, sweep
        self._measured: dict[Point, list[dict[str, Tensor]]] = {}
        self._shown: list[tuple[int, str]] = []

    def measure(self, batch: Batch) -> None:
        """Sample and score a batch at all points; keep an image of each of the first prompts."""
        module = self.module
        rows = (batch.firsts & (batch.groups < self.sweep.images)).nonzero().flatten()
        self._shown += [(int(batch.groups[row]), batch.prompts[row]) for row in rows.tolist()]
        points, _ = self._points()
        cond = module.backbone.encode(batch.prompts)
        for point, policy in module.track(points.items(), len(points), "Sweep"):
            started = time.perf_counter()
            samples = module.sample(policy(batch, cond), batch, "test")
            samples.images.sum().item()  # a GPU has then done its work
            seconds = (time.perf_counter() - started) / len(batch)
            metrics = module.evaluate(samples.images, batch)
            metrics["seconds"] = torch.full((len(batch),), seconds)
            if self._has_kl(point):
                stds = module.stds(exponents) if (exponents := self._exponents_at(point)) else None
                metrics["kl"] = kl_to_reference(
                    module.expert(REFERENCE, cond),
                    samples.trajectory,
                    module.sampler.stochastic,
                    module.sampling.batch,
                    stds,
                    module.device,
                ).cpu()
            metrics["images"] = samples.images[rows.to(samples.images.device)].cpu()
            self._measured.setdefault(point, []).append(metrics)

    def front(self) -> Front:
        """All points of all ranks; every rank must call it."""
        gather = self.module.gather
        shown = [one for rank in gather(self._shown) for one in rank]
        placed = sorted(range(len(shown)), key=shown.__getitem__)  # ranks hold prompts in turns
        measured = []
        for point, own in self._measured.items():
            parts = [part for rank in gather(own) for part in rank]
            merged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            images, order = merged.pop("images")[placed], merged.pop("index").argsort()
            metrics = {name: values[order] for name, values in merged.items()}
            groups, seconds = metrics.pop("group"), float(metrics.pop("seconds").mean())
            measured.append(Measured(point, metrics, groups, seconds, images))
        prompts, experts = [shown[place][1] for place in placed], tuple(self.module.experts)
        return Front(experts, measured, self.module.rewards.weights, self._points()[1], prompts)

    def _points(self) -> tuple[dict[Point, PolicyFactory], dict[str, list[Weights]]]:
        """All policies of the sweep, in order; and by method the weights at which it equals an expert."""
        module = self.module
        grid = {tuple(weights.items()): weights for weights in self.sweep.weights(list(module.experts))}
        found: dict[Point, PolicyFactory] = {Point(BASE): partial(self._alone, REFERENCE)}
        method = RANDOM if module.one_expert_per_step else FUSED
        ends: dict[str, list[Weights]] = {method: []}
        for of, weights in grid.items():
            if is_one_hot(weights):
                (name,) = (name for name, weight in of if weight)
                found[Point(EXPERT, of)] = partial(self._alone, name)
                if module.alone(weights):
                    ends[method].append(of)
                    continue
            found[Point(method, of)] = partial(module.fused, weights)
        for baseline in self.sweep.baselines:
            # With samplers of their own experts are nobody else's ends: all others sample by the common one.
            own = [] if module.samplers else [of for of, w in grid.items() if baseline.is_expert(module, w)]
            ends[baseline.name] = own
            for of, weights in grid.items():
                if of not in own:
                    found[Point(baseline.name, of)] = partial(baseline.policy, module, weights)
        for name, weights in module.joint.items():
            found[Point(JOINT, tuple(weights.items()))] = partial(self._alone, name)
        # Training on all of the weight is training the expert, where fit does so at the same KL strength.
        trained = [of for of in ends[method] if module.alone(grid[of]) in module.trained]
        ends[JOINT] = [of for of in trained if Point(JOINT, of) not in found]
        return found, ends

    def _alone(self, name: str, batch: Batch, cond: Conditioning) -> BatchPolicy:
        return self.module.expert(name, cond)

    def _exponents_at(self, point: Point) -> dict[str, float]:
        """Exponents of the kernels whose product is sampled at a point; empty if it is no product."""
        if point.method == EXPERT:
            return {name: weight for name, weight in point.weights if weight}
        return self.module.exponents(dict(point.weights)) if point.method in (FUSED, RANDOM) else {}

    def _has_kl(self, point: Point) -> bool:
        """Whether its steps are Gaussians of known std: those of a search, or without noise, are not."""
        if not self.module.sampler.stochastic.any():
            return False
        return all(b.has_kl for b in self.sweep.baselines if b.name == point.method)
