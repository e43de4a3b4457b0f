r"""MSDDA: several objectives fused at denoising time (Zhang, Wang and Zou 2026, arXiv 2604.14379).

An expert for the reward :math:`r_i` is, at every state :math:`x_t` of the chain, the optimum of a
*step-level* problem: the kernel :math:`\pi_i` that maximises :math:`E[r_i] - \beta\, KL(\pi_i \| \pi_{ref})`,
which is :math:`\pi_{ref} e^{r_i / \beta}`. Then the optimum for the mixed reward :math:`\sum_i w_i r_i` is
the product of the experts' kernels to the powers :math:`w_i`, a Gaussian in closed form: weights are chosen
at sampling time, and nothing is trained again. Shapes: ``B`` images, ``T`` steps.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lit_align.backbones import POLICY, REFERENCE, DenoisingPolicy, DiffusionBackbone
from lit_align.backbones.base import SamplerFactory
from lit_align.data import Batch
from lit_align.errors import ConfigError, check_positive
from lit_align.fusion import (
    TOLERANCE,
    FusedPolicy,
    RandomExpertPolicy,
    draw_choices,
    fusion_weights,
    is_one_hot,
)
from lit_align.gaussian import Policy, fuse
from lit_align.methods.experts import ExpertModule
from lit_align.randomness import generator
from lit_align.rewards import RewardBank, RewardOutput
from lit_align.rollout import Trajectory
from lit_align.sweep import BASE, EXPERT, FUSED, JOINT, RANDOM, Front, Measured, Point, Sweep, Weights


class MSDDAModule(ExpertModule):
    r"""Experts for single objectives, and their fusion at sampling time.

    ``validate``, ``test`` and ``predict`` sample the fused policy. Experts are adapters of earlier runs, or
    are trained by ``fit``, side by side over one frozen model.

    **Which step reward ``fit`` uses.** :math:`r_t(x_{t-1})` is the mean reward of the images that the
    *reference* makes from :math:`x_{t-1}`. Its samples are the rewards of the reference's own images, so
    one rollout batch serves all experts and all steps, with importance weights of one step. It is linear in
    the reward and knows no expert, so the experts' optima fuse exactly to the optimum of the mixed step
    reward: the theorem's premise holds, up to how far training gets and to what a shifted Gaussian can
    follow of :math:`\pi_{ref} e^{r_t / \beta}`. The fused chain is *not* the optimum of the terminal reward
    with a KL on the whole chain: the tilts of that problem are soft values,
    :math:`\log E_{ref}\, e^{r / \beta}`, which do not add. Experts from elsewhere, such as DDPO's or DPOK's
    (the paper's), are near neither: with them the fusion is a heuristic.

    **Own eta of experts.** The theorem has one reference kernel. It is exact for a common eta, where the
    fused mean is the weighted mean of means. Experts with samplers of their own (``samplers``) are a
    heuristic. For learned variances :func:`~lit_align.gaussian.fuse` has the formula; no sampler here has
    them.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        sampler: SamplerFactory,
        rewards: RewardBank,
        experts: dict[str, str | None],
        weights: dict[str, float],
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        beta: float = 0.5,
        betas: dict[str, float] | None = None,
        target_beta: float | None = None,
        samplers: dict[str, SamplerFactory] | None = None,
        one_expert_per_step: bool = False,
        sweep: Sweep | None = None,
        joint: list[dict[str, float]] | None = None,
        max_ratio: float = 5.0,
        updates: int = 1,
        inner_epochs: int = 1,
        timestep_fraction: float = 1.0,
        guidance: float = 7.5,
        clip_norm: float = 1.0,
        micro_batch: int = 8,
        rollout_batch: int = 8,
        seed: int | None = None,
    ) -> None:
        """Wire the parts.

        Args:
            backbone: The diffusion model. Its ``policy`` set is not used.
            sampler: How it is sampled. Diffusion Blend, whose set-up the paper shares: 50 steps, eta 1.
            rewards: The objectives and what is monitored. The weights in the bank are the objectives' scales:
                an expert's reward is ``weight * reward``, and one ``beta`` asks for comparable scales.
            experts: For each objective the folder of its expert (``adapter/`` of a run, or a pipeline of a
                full fine-tuning), or null to train it with ``fit``.
            weights: Of the objectives; together at most 1, the rest is the reference's.
            optimizer: Of the trained experts.
            lr_scheduler: Stepped once per update.
            beta: KL strength of the experts, in units of the scaled reward per nat.
            betas: KL strengths of experts that were, or by ``fit`` will be, trained with another.
            target_beta: KL strength of the fused policy; ``beta`` if not given. Lower goes further from the
                reference than any expert.
            samplers: Own samplers of experts, with the same steps: a heuristic (see above).
            one_expert_per_step: Follow one expert in each step, at random with its weight, instead of the
                fused policy: the cost of one model, not exact.
            sweep: Weights and baselines that ``test`` measures; null for none.
            joint: ``fit`` also trains one adapter on the mixed reward at each of these weights, at
                ``target_beta``: what fusing saves, and the oracle of the sweep.
            max_ratio: Bound on importance weights in ``fit``. Own choice.
            updates: Optimiser steps per pass over a rollout batch; each takes whole prompts.
            inner_epochs: Passes over a rollout batch. Its images are the reference's, and never grow stale.
            timestep_fraction: Share of the stochastic steps of each image that an update uses, at random.
            guidance: Scale of classifier-free guidance. Diffusion Blend: 7.5.
            clip_norm: Largest norm of each expert's gradient.
            micro_batch: (image, step) pairs in one backward pass, for each expert. Bounds memory and changes
                no result.
            rollout_batch: Images sampled at once. Bounds memory and changes no result.
            seed: Seed of all noise; that of ``seed_everything`` if not given.

        Raises:
            ConfigError: Names do not fit, an expert cannot be loaded, or the fusion is not defined.
        """
        _check_names(experts, weights, betas or {}, samplers or {}, rewards)
        positive = {"beta": beta, "target_beta": target_beta}
        positive |= {f"betas.{name}": value for name, value in (betas or {}).items()}
        check_positive(positive)
        for point in joint or []:
            _check_weights("joint", point, experts)
        for point in sweep.points if sweep else []:
            _check_weights("sweep.points", point, experts)
        objectives = {name: {name: 1.0} for name, folder in experts.items() if folder is None}
        mixed = {f"joint{i}": _whole(point, experts) for i, point in enumerate(joint or [])}
        all_betas = dict.fromkeys(experts, beta) | (betas or {})
        super().__init__(
            backbone,
            sampler,
            rewards,
            objectives | mixed,
            dict.fromkeys(mixed, target_beta or beta) | all_betas,
            optimizer,
            lr_scheduler,
            max_ratio,
            updates,
            inner_epochs,
            timestep_fraction,
            guidance,
            clip_norm,
            micro_batch,
            rollout_batch,
            seed,
        )
        self.experts = experts
        self.weights = _whole(weights, experts)
        self.beta, self.target_beta = beta, target_beta or beta
        self.betas = all_betas
        self.samplers = {name: backbone.make_sampler(own) for name, own in (samplers or {}).items()}
        self.one_expert_per_step = one_expert_per_step
        for name, own in self.samplers.items():
            if not torch.equal(own.timesteps, self.sampler.timesteps):
                raise ConfigError(f"samplers: that of {name} has other steps; give all the same num_steps")
        if self.samplers and self.one_expert_per_step:
            raise ConfigError("one_expert_per_step: it follows one sampler; take samplers out")
        self.joint = mixed
        for name, folder in experts.items():
            if folder is not None:
                backbone.load_weights(name, Path(folder).expanduser())
        self.sweep = sweep
        self.front: Front | None = None
        self._swept: dict[Point, list[dict[str, Tensor]]] = {}
        self._shown: list[tuple[int, str]] = []
        for baseline in sweep.baselines if sweep else []:
            baseline.prepare(self)
        backbone.train_only(self.trained)
        self._made = {name: self._size(name) for name in self.trained}
        for point in [self.weights, *(sweep.weights(list(experts)) if sweep else [])]:
            self._check_fusion(point)

    # ---- the fused policy

    def policy(self, batch: Batch, weights: str = POLICY) -> Policy:
        """The fused policy, or that of a weight set."""
        return self.fused(self.weights, batch) if weights == POLICY else self.expert(weights, batch)

    def fused(self, weights: Mapping[str, float], batch: Batch) -> Policy:
        """The policy for any weights of the objectives."""
        exponents = self.exponents(weights)
        policies = [self.expert(name, batch) for name in exponents]
        if not self.one_expert_per_step:
            return FusedPolicy(policies, list(exponents.values()))
        draws = [generator(self.seed, "expert", i) for i in batch.index.tolist()]
        choices = draw_choices(list(exponents.values()), self.sampler.num_steps, draws)
        return RandomExpertPolicy(policies, choices)

    def expert(self, name: str, batch: Batch) -> DenoisingPolicy:
        """One expert's policy, or the reference's."""
        cond, sampler = self.backbone.encode(batch.prompts), self.samplers.get(name, self.sampler)
        return self.backbone.policy(sampler, cond, self.guidance, name)

    def exponents(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The powers of the experts' kernels and of the reference's in the fused one."""
        return fusion_weights(weights, self.target_beta, self.betas)

    def alone(self, weights: Mapping[str, float]) -> str | None:
        """The expert which the fused policy is where all weight is on it, if it goes just as far."""
        if not (is_one_hot(weights) and is_one_hot(self.exponents(weights))):
            return None
        return next(name for name, weight in weights.items() if weight)

    def stds(self, exponents: Mapping[str, float]) -> list[Tensor] | None:
        """Stds of the steps of a product of kernels; None where they are the sampler's."""
        if not self.samplers:
            return None
        found = []
        for k in range(self.sampler.num_steps):
            x = torch.zeros(1, *(1,) * len(self.backbone.latent_shape))
            steps = [self.samplers.get(name, self.sampler).step(x, x, k) for name in exponents]
            found.append(fuse(steps, list(exponents.values())).std.to(self.device))
        return found

    def _check_fusion(self, weights: Mapping[str, float]) -> None:
        """Refuse what has no fused kernel, before anything is sampled."""
        if self.one_expert_per_step:
            draw_choices(list(self.exponents(weights).values()), 1, [torch.Generator()])
        try:
            self.stds(self.exponents(weights))
        except ValueError as error:
            raise ConfigError(f"weights, betas and samplers do not go together: {error}") from error

    def trajectory_kl(
        self, batch: Batch, trajectory: Trajectory, stds: Sequence[Tensor] | None = None
    ) -> Tensor:
        """KL to the reference along chains, by default of the fused policy: see :class:`AlignmentModule`."""
        return super().trajectory_kl(batch, trajectory, stds or self.stds(self.exponents(self.weights)))

    def score(self, images: Tensor, batch: Batch) -> RewardOutput:
        """What the rewards say of images; the reported one is the weighted sum of the scaled objectives."""
        scores = super().score(images, batch)
        shown = {name: scores.report[f"reward/{name}"] for name in self.rewards.names}
        reward = self.weighted_reward(shown, self.weights)
        return replace(scores, report=scores.report | {"reward": reward})

    def objective(self, name: str, images: Tensor, batch: Batch) -> Tensor:
        """The scaled reward of one objective, ``(B,)``, with its gradient."""
        return self.rewards.weighted(name, images, batch.prompts, batch.groups, batch.columns)

    # ---- the sweep

    def _check_trained(self) -> None:
        if not self.images and (
            as_made := [name for name in self.trained if self._size(name) == self._made[name]]
        ):
            raise ConfigError(
                f"ckpt_path: {', '.join(as_made)} would be the pretrained model itself, as nothing has "
                "trained it; give the checkpoint of a fit, or folders under experts and no joint"
            )

    def _size(self, name: str) -> float:
        return sum(
            parameter.detach().double().square().sum().item()
            for parameter in self.backbone.parameters_of(name)
        )

    def on_test_start(self) -> None:
        """Refuse what was never trained."""
        self._check_trained()

    def on_predict_start(self) -> None:
        """Refuse what was never trained."""
        self._check_trained()

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The fused policy and the reference on the same noise, then the sweep."""
        images = super().test_step(batch, batch_idx)
        if self.sweep is None:
            return images
        # The first image of each of the first prompts is shown.
        first = torch.cat([torch.tensor([True]), batch.groups[1:] != batch.groups[:-1]])
        rows = (first & (batch.groups < self.sweep.images)).nonzero().flatten()
        self._shown += [(int(batch.groups[row]), batch.prompts[row]) for row in rows.tolist()]
        points, _ = self._points()
        for point, policy in self.track(points.items(), len(points), "Sweep"):
            started = time.perf_counter()
            samples = self.sample_from(policy, batch, "test")
            samples.images.sum().item()  # a GPU has then done its work
            seconds = (time.perf_counter() - started) / len(batch)
            metrics = self._measure(batch, samples, with_kl=False)
            metrics["seconds"] = torch.full((len(batch),), seconds)
            if self._has_kl(point):
                stds = self.stds(exponents) if (exponents := self._exponents_at(point)) else None
                metrics["kl"] = super().trajectory_kl(batch, samples.trajectory, stds).cpu()
            metrics["images"] = samples.images[rows.to(samples.images.device)].cpu()
            self._swept.setdefault(point, []).append(metrics)
        return images

    def _points(self) -> tuple[dict[Point, Callable[[Batch], Policy]], dict[str, list[Weights]]]:
        """All policies of the sweep, in order; and of each method where it is an expert, sampled as such."""
        assert self.sweep is not None
        grid = {tuple(weights.items()): weights for weights in self.sweep.weights(list(self.experts))}
        found: dict[Point, Callable[[Batch], Policy]] = {Point(BASE): partial(self.expert, REFERENCE)}
        method = RANDOM if self.one_expert_per_step else FUSED
        ends: dict[str, list[Weights]] = {method: []}
        for of, weights in grid.items():
            if is_one_hot(weights):
                (name,) = (name for name, weight in of if weight)
                found[Point(EXPERT, of)] = partial(self.expert, name)
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
            found[Point(JOINT, tuple(weights.items()))] = partial(self.expert, name)
        # Training on all of the weight is training the expert, where fit does so at the same KL strength.
        trained = [of for of in ends[method] if self.alone(grid[of]) in self.trained]
        ends[JOINT] = [of for of in trained if Point(JOINT, of) not in found]
        return found, ends

    def _exponents_at(self, point: Point) -> dict[str, float]:
        """Those of the kernels whose product is sampled at a point; empty where it is none of experts."""
        if point.method == EXPERT:
            return {name: weight for name, weight in point.weights if weight}
        return self.exponents(dict(point.weights)) if point.method in (FUSED, RANDOM) else {}

    def _has_kl(self, point: Point) -> bool:
        """Whether its steps are Gaussians of known std: those of a search are not."""
        assert self.sweep is not None
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

    # ---- training, and files

    def setup(self, stage: str) -> None:
        """As for all experts; those with a sampler of their own cannot be trained.

        Raises:
            ConfigError: There is nothing to train, or it cannot be trained, or followed, like this.
        """
        super().setup(stage)
        if stage == "fit" and (own := [name for name in self.samplers if name in self.trained]):
            raise ConfigError(
                f"samplers: fit learns {own[0]} from chains of the common sampler; take its own "
                "out, and give it to the test"
            )
        if self.one_expert_per_step and self.device_mesh is not None:
            raise ConfigError(
                "one_expert_per_step: processes draw different experts, and one that shares its weights with "
                "others waits for them for ever; use DDP (trainer.devices), or set it to false"
            )

    def export(self, folder: Path | None) -> None:
        """Write each trained expert to ``folder/<name>``, and in ``folder`` the rewarded soup of all experts.

        The soup is one adapter at the configured weights, linear in the updates and as far as the fused
        policy goes, for programs that cannot fuse: an approximation of it.
        """
        for name in self.trained:
            self.backbone.save_weights(folder and folder / name, name)
        with suppress(ConfigError):  # whole models have no soup
            exponents = {name: a for name, a in self.exponents(self.weights).items() if name != REFERENCE}
            self.backbone.mix_weights("soup", exponents)
            self.backbone.save_weights(folder, "soup")


def _whole(weights: Mapping[str, float], experts: Mapping[str, object]) -> dict[str, float]:
    """The weights with those that are 0, in the order of the experts."""
    return {name: weights.get(name, 0.0) for name in experts}


def _check_names(
    experts: Mapping[str, object],
    weights: Mapping[str, float],
    betas: Mapping[str, object],
    samplers: Mapping[str, object],
    rewards: RewardBank,
) -> None:
    """Refuse names that do not fit together, and weights outside the simplex."""
    for name in experts:
        taken = name in (POLICY, REFERENCE, "soup", "factors") or re.fullmatch(r"joint\d+", name)
        if taken or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(f"experts: {name!r} cannot name an expert; use the name of its reward")
        if name not in rewards.weights:
            raise ConfigError(
                f"experts: {name} is no reward with a weight in the bank; those are "
                f"{', '.join(rewards.trained)}"
            )
    _check_weights("weights", weights, experts)
    for place, names in {"betas": betas, "samplers": samplers}.items():
        if unknown := [name for name in names if name not in experts]:
            raise ConfigError(f"{place}: there is no expert {unknown[0]}, only {', '.join(experts)}")


def _check_weights(place: str, weights: Mapping[str, float], experts: Mapping[str, object]) -> None:
    """Refuse names that are no experts, and weights outside the simplex."""
    if unknown := [name for name in weights if name not in experts]:
        raise ConfigError(f"{place}: there is no expert {unknown[0]}, only {', '.join(experts)}")
    if min(weights.values(), default=0) < 0 or not 0 < sum(weights.values()) <= 1 + TOLERANCE:
        raise ConfigError(
            f"{place}: {dict(weights)} must not be negative and sum to more than 0 and at most 1; what is "
            "missing to 1 is the reference's"
        )
