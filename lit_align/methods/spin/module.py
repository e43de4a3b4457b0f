"""SPIN-Diffusion: self-play against one's own past (Yuan et al. 2024, arXiv 2402.10210).

A game of two players in iterations. The opponent is a copy of the model from the start of the iteration. The
main player learns to tell images that people preferred from the opponent's images of the same prompts, and is
the next opponent. No rejected images and no reward are needed. Shapes: ``B`` pairs, ``T`` steps, ``D`` latent
elements.
"""

import time
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_align.backbones import POLICY, DenoisingPolicy, DiffusionBackbone
from lit_align.backbones.base import SamplerFactory
from lit_align.data import PairBatch
from lit_align.errors import ConfigError
from lit_align.gaussian import Generators
from lit_align.methods.metrics import Metrics
from lit_align.methods.objectives import trajectory_margin
from lit_align.methods.optimisation import Optimisation
from lit_align.methods.pairs import Noised, logistic_preference
from lit_align.methods.sampling import Sampling
from lit_align.methods.spin.opponent import OPPONENT, OpponentModule
from lit_align.rewards import RewardBank
from lit_align.samplers import Sampler

Number = TypeVar("Number", int, float)


def forward_chain(sampler: Sampler, x0: Tensor, noise: Tensor, draws: Generators = None) -> Tensor:
    """A chain that ends in a given image: the forward process, drawn backwards by its posterior.

    The first state is the image at the sampler's first timestep; each next one is drawn from the sampler's
    step for the *right* prediction, which is the posterior given both ends (DDIM, arXiv 2010.02502, equation
    7). So every state has the marginal of the forward process.

    Args:
        sampler: Gives the steps; any eta.
        x0: Clean latents, ``(B, ...)``.
        noise: Standard normal, ``(B, ...)``.
        draws: Where the noise of the steps comes from.

    Returns:
        States, ``(T + 1, B, ...)``.
    """
    nothing, one, schedule = torch.zeros_like(x0), torch.ones_like(x0), sampler.schedule
    states = [schedule.add_noise(x0, noise, sampler.timesteps[0])]
    for k, t in enumerate(sampler.timesteps):
        implied = (states[-1] - schedule.add_noise(x0, nothing, t)) / schedule.add_noise(nothing, one, t)
        states.append(sampler.step(states[-1], schedule.target(x0, implied, t), k).rsample(draws))
    return torch.stack(states)


@dataclass(frozen=True)
class Chains:
    """Pairs of whole chains, for the exact objective.

    Attributes:
        policy: The policy for the pairs' prompts.
        opponent: The opponent for them.
        winners: Chains that end in the preferred images, ``(T + 1, B, C, H, W)``.
        losers: The opponent's chains.
    """

    policy: DenoisingPolicy
    opponent: DenoisingPolicy
    winners: Tensor
    losers: Tensor


class SPINModule(OpponentModule[tuple[Noised, Noised] | Chains]):
    """Self-play finetuning on preferred images, all iterations in one fit."""

    also_kept: ClassVar[tuple[str, ...]] = (OPPONENT,)  # to resume in the middle of an iteration

    goes_back: ClassVar[bool] = False  # the pool holds images of the opponent, which is a later policy

    def __init__(
        self,
        backbone: DiffusionBackbone,
        sampler: SamplerFactory,
        rewards: RewardBank,
        iterations: int = 3,
        steps: int | list[int] = 500,
        beta: float | list[float] = 2000.0,
        lr: float | list[float] | None = None,
        exact: bool = False,
        shared_noise: bool = True,
        opponent_guidance: float | None = None,
        optimisation: Optimisation = Optimisation(),
        sampling: Sampling = Sampling(),
    ) -> None:
        """Set up the method. The paper's own values are in ``configs/paper/spin_sd15.yaml``, as far as known.

        Args:
            backbone: The diffusion model.
            sampler: How the opponent's images, validation, test and predict are sampled.
            rewards: What is monitored; the weights make ``val/reward``, and nothing is trained on it.
            iterations: Self-play iterations. 3 in the paper.
            steps: Updates of an iteration; a list has one number for each. Training ends after the last.
                Released models: 500.
            beta: Strength, one for all iterations or a list, in the convention of Diffusion-DPO's released
                code: errors are means over latent elements, and a half stands before it (see
                :func:`~lit_align.methods.objectives.error_margin`). With ``exact`` it stands before
                log-ratios in nats summed over steps and divided by the number of latent elements, so the
                paper's lambda is ``beta / D``. The default is Diffusion-DPO's for Stable Diffusion 1.5 in its
                paper (section 5.1).
            lr: Learning rate of each iteration, in place of the optimizer's.
            exact: Train on whole chains (equation 4.8), all of the steps that have noise, instead of on one
                timestep of each pair (equation 4.9, which bounds it from above, and which the paper trains).
                The pool then holds ``T + 1`` latents a pair, and a backward pass ``2 T`` predictions a pair:
                set the backbone's ``checkpointing`` to ``prediction``.
            shared_noise: Winner and loser get the same noise, as in the released code of Diffusion-DPO; the
                paper's formula draws two. At the start of an iteration the gradient is the same on average.
                Unused with ``exact``.
            opponent_guidance: Another scale for the opponent's images: with guidance they differ from what
                the denoiser has learnt, and training also pushes away from that difference. The same as
                ``sampling.guidance`` if not given.
            optimisation: How the weights are updated; optimizer and schedule begin anew in each iteration.
                Released models: AdamW, lr 2e-5 for all weights. ``micro_batch`` counts pairs.
            sampling: How images are sampled; the errors use no guidance. With ``exact`` the chains are those
                of the guided policy, and the log-ratios too.

        Raises:
            ConfigError: A list has not one entry for each iteration, a value is not positive, or the sampler
                has no noise for the exact objective.
        """
        super().__init__(
            backbone=backbone,
            sampler=sampler,
            rewards=rewards,
            optimisation=optimisation,
            sampling=sampling,
        )
        if iterations < 1:
            raise ConfigError(f"iterations: {iterations} must be at least 1")
        self.iterations = iterations
        self.steps = _of_each("steps", steps, iterations)
        self.betas = _of_each("beta", beta, iterations)
        self.rates = None if lr is None else _of_each("lr", lr, iterations)
        # The iteration in progress, from 1, and its updates so far.
        self.iteration, self.done = 0, 0
        if exact and not self.sampler.stochastic.any():
            raise ConfigError(
                f"exact: it needs the density of steps, and {self.sampler.no_noise}, or exact to false"
            )
        if exact and not self.sampler.keeps_forward_process:
            raise ConfigError(
                "exact: the chains of dataset images need steps that keep the forward process, which those "
                "of this rule do in first order only; set sampler.init_args.rule to precise, or exact to "
                "false"
            )
        self.exact, self.strengths = exact, [] if exact else self.betas
        self.shared_noise = shared_noise
        self.opponent_guidance = sampling.guidance if opponent_guidance is None else opponent_guidance
        backbone.check_guidance(self.opponent_guidance, "opponent_guidance")
        self.backbone.weight_sets.add(OPPONENT)
        self.pool = None

    # ---- iterations

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        """Begin the next iteration when one is over; fill the pool where it is not there yet."""
        length = self.steps[self.iteration - 1] if self.iteration else 0
        if begins := self.done >= length and self.iteration < self.iterations:
            self._begin_iteration()
        # After the last iteration (the Trainer has min_epochs) the pool is filled batch by batch.
        if begins or self.pool is None or self.done >= self.steps[self.iteration - 1]:
            started = time.perf_counter()
            with self.trainer.precision_plugin.forward_context(), torch.no_grad():
                self._fill_pool(batch_idx)
            self.sampling_seconds = time.perf_counter() - started

    def _begin_iteration(self) -> None:
        """Copy the policy to the opponent, and make a new optimizer."""
        if self.iteration:
            self._drop_pool()
        self.iteration, self.done = self.iteration + 1, 0
        self.backbone.weight_sets.copy(POLICY, OPPONENT)
        if self.iteration > 1:
            self.trainer.strategy.setup_optimizers(self.trainer)

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of the iteration in progress, at its learning rate."""
        optimizer = super().make_optimizer(groups)
        if self.rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.rates[max(self.iteration - 1, 0)]
        return optimizer

    def configure_optimizers(self) -> Any:
        """As in every method, anew in each iteration.

        Raises:
            ConfigError: The scheduler sets the learning rate itself, so that ``lr`` would do nothing.
        """
        made = super().configure_optimizers()
        optimizer = made["optimizer"] if isinstance(made, dict) else made
        rate = None if self.rates is None else self.rates[max(self.iteration - 1, 0)]
        for group in optimizer.param_groups:
            if rate is not None and (kept := group.get("initial_lr", rate)) != rate:
                raise ConfigError(
                    f"lr: iteration {max(self.iteration, 1)} wants {rate}, but the lr_scheduler begins from "
                    f"{kept}, a rate of its own; take lr out, or give a scheduler that multiplies the rate"
                )
        return made

    def training_step(self, batch: PairBatch, batch_idx: int) -> None:
        """One update; the last of the last iteration ends the fit."""
        super().training_step(batch, batch_idx)
        self.done += 1
        if (self.iteration, self.done) >= (self.iterations, self.steps[-1]):
            self.trainer.should_stop = True

    def on_train_start(self) -> None:
        """Warn if the Trainer ends before the last iteration, or if all iterations are done already."""
        super().on_train_start()
        if (self.iteration, self.done) >= (self.iterations, self.steps[-1]):
            self.trainer.should_stop = True
            rank_zero_warn(
                f"all {self.iterations} iterations are made, so nothing is trained; build the module anew, "
                "with backbone=module.backbone, for more"
            )
        trainer, wanted = self.trainer, sum(self.steps)
        if (epochs := trainer.max_epochs or -1) > 0 and epochs * trainer.num_training_batches < wanted:
            rank_zero_warn(
                f"the Trainer ends after {epochs} epochs of {trainer.num_training_batches} updates, and the "
                f"{self.iterations} iterations have {wanted}; raise trainer.max_epochs, "
                "trainer.limit_train_batches or data.batches_per_epoch"
            )

    # ---- one batch

    def prepare(self, batch: PairBatch) -> tuple[Noised, Noised] | Chains:
        assert self.pool is not None, "on_train_batch_start comes first"
        losers = self.pool[batch.index].to(self.device)
        if not self.exact:
            return self.noised_pairs(batch, losers, self.shared_noise)
        draws, cond = self.draws(batch.index), self.backbone.encode(batch.prompts)
        winners = forward_chain(self.sampler, self.winners(batch), self.noise(draws), draws)
        policy, opponent = (
            self.backbone.policy(self.sampler, cond, self.opponent_guidance, weights)
            for weights in (POLICY, OPPONENT)
        )
        return Chains(policy, opponent, winners, losers.transpose(0, 1))

    def loss(self, prepared: tuple[Noised, Noised] | Chains, rows: Tensor) -> tuple[Tensor, Metrics]:
        beta = self.betas[self.iteration - 1]
        if isinstance(prepared, Chains):
            loss, metrics = self._trajectory_loss(prepared, rows, beta)
        else:
            loss, metrics = self.preference(prepared, rows, OPPONENT, beta)
        settings = {"iteration": float(self.iteration), "beta": beta}
        return loss, metrics | {name: torch.tensor([value]) for name, value in settings.items()}

    def _trajectory_loss(self, chains: Chains, rows: Tensor, beta: float) -> tuple[Tensor, Metrics]:
        """The exact objective: log-ratios of all steps of both chains, as means over elements."""
        both = torch.cat([rows, rows])
        policy, opponent = chains.policy[both], chains.opponent[both]
        ratios = []
        for k in self.sampler.stochastic.nonzero().flatten().tolist():
            before, after = (
                torch.cat([chains.winners[place, rows], chains.losers[place, rows]]) for place in (k, k + 1)
            )
            with torch.no_grad():
                reference = opponent(before, k)
            ratios.append(policy(before, k).log_ratio(reference, after) / before[0].numel())
        winner, loser = torch.stack(ratios).chunk(2, dim=1)
        loss, metrics = logistic_preference(trajectory_margin(winner, loser, beta))
        sums = {"winner_ratio": winner.detach().sum(0), "loser_ratio": loser.detach().sum(0)}
        return loss, sums | metrics

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["spin"] = {"iteration": self.iteration, "done": self.done}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.iteration, self.done = checkpoint["spin"]["iteration"], checkpoint["spin"]["done"]


def _of_each(name: str, value: Number | list[Number], iterations: int) -> list[Number]:
    """One value an iteration, all of them positive."""
    values = list(value) if isinstance(value, list) else [value] * iterations
    if len(values) != iterations:
        raise ConfigError(
            f"{name}: {values} has {len(values)} entries for {iterations} iterations; give one each, or one "
            "number for all"
        )
    if not all(one > 0 for one in values):
        raise ConfigError(f"{name}: {value} must be positive")
    return values
