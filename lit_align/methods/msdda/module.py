r"""MSDDA: several objectives fused at denoising time (Zhang, Wang and Zou 2026, arXiv 2604.14379).

An expert for the reward :math:`r_i` is, at every state :math:`x_t` of the chain, the optimum of a
*step-level* problem: the kernel :math:`\pi_i` that maximises :math:`E[r_i] - \beta\, KL(\pi_i \| \pi_{ref})`,
which is :math:`\pi_{ref} e^{r_i / \beta}`. Then the optimum for the mixed reward :math:`\sum_i w_i r_i` is
the product of the experts' kernels to the powers :math:`w_i`, a Gaussian in closed form: weights are chosen
at sampling time, and nothing is trained again. Shapes: ``B`` images, ``T`` steps.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_align.backbones import POLICY, REFERENCE, Conditioning, DenoisingPolicy, DiffusionBackbone
from lit_align.backbones.base import SamplerFactory
from lit_align.data import Batch
from lit_align.errors import ConfigError, check_positive, user_path
from lit_align.gaussian import fuse
from lit_align.methods.msdda.experts import ExpertModule
from lit_align.methods.msdda.fusion import (
    FusedPolicy,
    RandomExpertPolicy,
    draw_choices,
    fusion_weights,
    is_one_hot,
)
from lit_align.methods.msdda.sweep import Front, Sweep
from lit_align.methods.msdda.sweeping import Sweeping
from lit_align.methods.msdda.weights import check_names, check_weights, completed
from lit_align.methods.optimisation import Optimisation
from lit_align.methods.sampling import BatchPolicy, Sampling
from lit_align.randomness import generator
from lit_align.rewards import RewardBank, RewardOutput


class MSDDAModule(ExpertModule):
    r"""Experts for single objectives, and their fusion at sampling time.

    ``validate``, ``test`` and ``predict`` sample the fused policy. Experts are adapters of earlier runs, or
    are trained by ``fit``, side by side over one frozen model.

    **Which step reward ``fit`` uses.** :math:`r_t(x_{t-1})` is the mean reward of the images that the
    *reference* makes from :math:`x_{t-1}`. Its samples are the rewards of the reference's own images, so
    one rollout batch serves all experts and all steps, with importance weights of one step. It is linear in
    the reward and does not depend on the experts, so the experts' optima fuse exactly to the optimum of the
    mixed step reward: the theorem's premise holds, as far as training converges and a shifted Gaussian can
    represent :math:`\pi_{ref} e^{r_t / \beta}`. The fused chain is *not* the optimum of the terminal reward
    with a KL on the whole chain: that problem has the soft values :math:`\log E_{ref}\, e^{r / \beta}`, which
    do not add. Experts of other methods, such as DDPO's or DPOK's (the paper's), are trained for neither
    problem: with them the fusion is a heuristic.

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
        optimisation: Optimisation = Optimisation(),
        sampling: Sampling = Sampling(),
    ) -> None:
        """Set up the method.

        Args:
            backbone: The diffusion model. Its ``policy`` set is not used.
            sampler: How it is sampled. Diffusion Blend, whose set-up the paper shares: 50 steps, eta 1.
            rewards: The objectives and what is monitored. The weights in the bank are the objectives' scales:
                an expert's reward is ``weight * reward``, and one ``beta`` asks for comparable scales.
            experts: For each objective the folder of its expert (``adapter/`` of a run, or a pipeline of a
                full fine-tuning), or null to train it with ``fit``.
            weights: Of the objectives; together at most 1, the rest is the reference's.
            beta: KL strength of the experts, in units of the scaled reward per nat. The default is ours.
            betas: KL strengths of experts that were, or by ``fit`` will be, trained with another.
            target_beta: KL strength of the fused policy; ``beta`` if not given. Lower goes further from the
                reference than any expert.
            samplers: Own samplers of experts, with the same steps: a heuristic (see above).
            one_expert_per_step: Follow one expert in each step, at random with its weight, instead of the
                fused policy: the cost of one model, not exact.
            sweep: Weights and baselines that ``test`` measures; null for none.
            joint: ``fit`` also trains one adapter on the mixed reward at each of these weights, at
                ``target_beta``: the training that fusing saves, and the oracle of the sweep.
            max_ratio: Bound on importance weights in ``fit``. Own choice.
            updates: Optimizer steps per pass over a rollout batch; each takes whole prompts.
            inner_epochs: Passes over a rollout batch. Its images are the reference's, and never grow stale.
            timestep_fraction: Share of the stochastic steps of each image that an update uses, at random.
            optimisation: How the experts are updated. ``micro_batch`` counts (image, step) pairs.
            sampling: How images are sampled. Guidance of Diffusion Blend: 7.5.

        Raises:
            ConfigError: Names do not fit, an expert cannot be loaded, or the fusion is not defined.
        """
        check_names(experts, weights, betas or {}, samplers or {}, rewards)
        positive = {"beta": beta, "target_beta": target_beta}
        positive |= {f"betas.{name}": value for name, value in (betas or {}).items()}
        check_positive(positive)
        for point in joint or []:
            check_weights("joint", point, experts)
        for point in sweep.points if sweep else []:
            check_weights("sweep.points", point, experts)
        objectives = {name: {name: 1.0} for name, folder in experts.items() if folder is None}
        mixed = {f"joint{i}": completed(point, experts) for i, point in enumerate(joint or [])}
        all_betas = dict.fromkeys(experts, beta) | (betas or {})
        super().__init__(
            backbone=backbone,
            sampler=sampler,
            rewards=rewards,
            objectives=objectives | mixed,
            expert_betas=dict.fromkeys(mixed, target_beta or beta) | all_betas,
            max_ratio=max_ratio,
            updates=updates,
            inner_epochs=inner_epochs,
            timestep_fraction=timestep_fraction,
            optimisation=optimisation,
            sampling=sampling,
        )
        self.experts = experts
        self.weights = completed(weights, experts)
        self.beta, self.target_beta = beta, target_beta or beta
        self.betas = all_betas
        self.samplers = {name: backbone.make_sampler(own) for name, own in (samplers or {}).items()}
        self.one_expert_per_step = one_expert_per_step
        for name, own in self.samplers.items():
            if not torch.equal(own.timesteps, self.sampler.timesteps):
                raise ConfigError(f"samplers: that of {name} has other steps; give all the same num_steps")
        if self.samplers and sampling.eval_sampler is not None:
            raise ConfigError(
                "sampling.eval_sampler: experts have samplers of their own, which are those of evaluation; "
                "take one of the two out"
            )
        if self.samplers and self.one_expert_per_step:
            raise ConfigError("one_expert_per_step: it follows one sampler; take samplers out")
        self.joint = mixed
        for name, folder in experts.items():
            if folder is not None:
                backbone.weight_sets.load(name, user_path(folder))
        self.sweep = sweep
        self.front: Front | None = None
        self._sweeping: Sweeping | None = None
        for baseline in sweep.baselines if sweep else []:
            baseline.prepare(self)
        backbone.weight_sets.train_only(self.trained)
        self._made = {name: self._size(name) for name in self.trained}
        for point in [self.weights, *(sweep.weights(list(experts)) if sweep else [])]:
            self._check_fusion(point)

    # ---- the fused policy

    def policy(self, batch: Batch, cond: Conditioning, weights: str = POLICY) -> BatchPolicy:
        """The fused policy, or that of a weight set."""
        return self.fused(self.weights, batch, cond) if weights == POLICY else self.expert(weights, cond)

    def fused(self, weights: Mapping[str, float], batch: Batch, cond: Conditioning) -> BatchPolicy:
        """The policy for any weights of the objectives."""
        exponents = self.exponents(weights)
        policies = [self.expert(name, cond) for name in exponents]
        if not self.one_expert_per_step:
            return FusedPolicy(policies, list(exponents.values()))
        draws = [generator(self.seed, "expert", i) for i in batch.index.tolist()]
        choices = draw_choices(list(exponents.values()), self.sampler.num_steps, draws)
        return RandomExpertPolicy(policies, choices)

    def expert(self, name: str, cond: Conditioning) -> DenoisingPolicy:
        sampler = self.samplers.get(name, self.sampler)
        return self.backbone.policy(sampler, cond, self.sampling.guidance, name)

    def exponents(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The exponents of the experts' kernels and of the reference's in the fused kernel."""
        return fusion_weights(weights, self.target_beta, self.betas)

    def alone(self, weights: Mapping[str, float]) -> str | None:
        """The expert that equals the fused policy: all weight is on it, and its KL strength is the same."""
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

    def step_stds(self) -> list[Tensor] | None:
        """Stds of the steps of the fused policy at the configured weights."""
        return self.stds(self.exponents(self.weights))

    def _check_fusion(self, weights: Mapping[str, float]) -> None:
        """Refuse what has no fused kernel, before anything is sampled."""
        if self.one_expert_per_step:
            draw_choices(list(self.exponents(weights).values()), 1, [torch.Generator()])
        try:
            self.stds(self.exponents(weights))
        except ValueError as error:
            raise ConfigError(f"weights, betas and samplers do not go together: {error}") from error

    def score(self, images: Tensor, batch: Batch) -> RewardOutput:
        """What the rewards say of images; the reported one is the weighted sum of the scaled objectives."""
        scores = super().score(images, batch)
        shown = {name: scores.report[f"reward/{name}"] for name in self.rewards.names}
        reward = self.weighted_reward(shown, self.weights)
        return replace(scores, report=scores.report | {"reward": reward})

    def scored_by(self) -> dict[str, Any]:
        """As for every method, and the weights of the objectives in the reported reward."""
        return super().scored_by() | {"weights": self.weights}

    # ---- training, and files

    def _check_trained(self) -> None:
        as_made = [name for name in self.trained if self._size(name) == self._made[name]]
        if as_made and not self.images:
            raise ConfigError(
                f"ckpt_path: {', '.join(as_made)} would be the pretrained model itself, as nothing has "
                "trained it; give the checkpoint of a fit, or folders under experts and no joint"
            )

    def _size(self, name: str) -> float:
        own = self.backbone.weight_sets.parameters_of(name)
        return sum(parameter.detach().double().square().sum().item() for parameter in own)

    def on_test_start(self) -> None:
        """Refuse what was never trained."""
        super().on_test_start()
        self._check_trained()
        self._sweeping = Sweeping(self, self.sweep) if self.sweep else None

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The fused policy and the reference on the same noise, then the sweep."""
        images = super().test_step(batch, batch_idx)
        if self._sweeping is not None:
            with self.evaluating():
                self._sweeping.measure(batch)
        return images

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        if self._sweeping is not None:
            self.front = self._sweeping.front()
            volumes = self.front.hypervolumes().items()
            self.log_dict({f"test/hypervolume/{name.replace(' ', '_')}": v for name, v in volumes})

    def on_predict_start(self) -> None:
        self._check_trained()

    def setup(self, stage: str) -> None:
        """As in the base; experts with a sampler of their own cannot be trained.

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
                "others waits for them forever; use DDP (trainer.devices), or set it to false"
            )

    def export(self, folder: Path | None) -> None:
        """Write each trained expert to ``folder/<name>``, and in ``folder`` the rewarded soup of all experts.

        The soup is one adapter at the configured weights, linear in the updates and scaled like the fused
        policy: an approximation of it for programs that cannot fuse.
        """
        for name in self.trained:
            self.backbone.weight_sets.save(folder and folder / name, name)
        with suppress(ConfigError):  # whole models have no soup
            exponents = {name: a for name, a in self.exponents(self.weights).items() if name != REFERENCE}
            self.backbone.weight_sets.mix("soup", exponents)
            self.backbone.weight_sets.save(folder, "soup")
