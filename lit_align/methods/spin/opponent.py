"""The opponent of self-play: a frozen copy of the policy, and the images that it draws ahead of updates."""

import hashlib
import shutil
from abc import ABC
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lit_align.backbones import whole
from lit_align.errors import ConfigError
from lit_align.folder import run_folder
from lit_align.methods.identity import BASE
from lit_align.methods.pairs import PairModule
from lit_align.pool import Pool
from lit_align.rollout import rollout

OPPONENT = "opponent"
"""The weight set of the policy as it was when the iteration began."""

SHARD = 256
"""Images of the opponent in a shard of the pool: an interrupt loses at most so many."""

Prepared = TypeVar("Prepared")


class OpponentModule(PairModule[Prepared], ABC):
    """Draws the opponent's images for the coming pairs, and keeps them in the run's folder.

    Attributes:
        steps: Updates of each iteration.
        iteration: The one in progress, from 1; 0 before the first.
        done: Its updates so far.
        exact: Whether whole chains are kept, and not only their ends.
        opponent_guidance: Scale of guidance for the opponent's images.
        pool: What was drawn; None before the first update of a process.
    """

    steps: list[int]
    iteration: int
    done: int
    exact: bool
    opponent_guidance: float
    pool: Pool | None

    def _opponent_hash(self) -> str:
        """Changes with the opponent, the pretrained model under it, the prompts, and how it is sampled."""
        source = self.trainer.datamodule.source  # type: ignore[attr-defined]
        settings = [self.seed, self.iteration, self.opponent_guidance, self.exact, source.fingerprint()]
        digest = hashlib.sha256(f"{settings} {self.sampler.timesteps.tolist()}".encode())
        one = torch.ones(1, 1, dtype=torch.float64)
        for k in range(self.sampler.num_steps):
            step = self.sampler.step(one, one, k)
            digest.update(f"{step.mean.item()} {step.std.item()}".encode())
        dtypes = sorted({str(weight.dtype) for weight in self.backbone.parameters()})
        digest.update(f"{[self._facts[name] for name in BASE]} {dtypes}".encode())
        opponent = set(self.backbone.weight_sets.parameters_of(OPPONENT))
        for name, parameter in self.named_parameters():
            if parameter not in opponent:
                continue
            digest.update(name.encode())
            digest.update(whole(parameter.detach()).float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _pool_folder(self) -> Path | None:
        """Where this opponent's images lie; every rank must call it."""
        trainer = self.trainer
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        return run_folder(trainer) / "pool" / self._opponent_hash()

    def _drop_pool(self) -> None:
        """Delete the images of a finished iteration, and nothing else in the folder."""
        folder = self._pool_folder()
        if folder is not None and self.trainer.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)

    def _coming(self, batch_idx: int) -> int:
        """Batches that this iteration still has, this one included, as far as the Trainer goes."""
        trainer, left = self.trainer, float(self.steps[self.iteration - 1] - self.done)
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            epochs = trainer.max_epochs - trainer.current_epoch
            left = min(left, epochs * trainer.num_training_batches - batch_idx)
        if trainer.max_steps >= 0:
            left = min(left, trainer.max_steps - self.batches)
        return max(1, int(left))

    def _coming_rows(self, batches: int) -> dict[int, str]:
        """Row and prompt of this rank's coming pairs, each of which is read once to see that it can be."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        total = batches * data.pairs_per_batch // self.trainer.world_size
        rows = data.train_dataloader().rows(self.batches, batches)
        return dict(self.track(rows, total, f"Pairs of iteration {self.iteration}"))

    def _fill_pool(self, batch_idx: int) -> None:
        """Sample the opponent for the coming pairs; what the run's folder has of it already is kept."""
        trainer, folder = self.trainer, self._pool_folder()
        on_disk = folder is not None
        self.pool = Pool(folder, folder.name if folder else "memory")
        own = self._coming_rows(self._coming(batch_idx))
        ranks = self.gather(list(own.items())) if on_disk else [list(own.items())]
        prompts = dict(row for rank in ranks for row in rank)
        missing = self.pool.missing(prompts)
        if on_disk:
            share = missing[trainer.global_rank :: trainer.world_size]
            self._add_to_pool(share, prompts, missing[: -(-len(missing) // trainer.world_size) - len(share)])
        else:
            self._add_to_pool(missing, prompts, [])
        trainer.strategy.barrier("pool")
        self.pool.refresh()
        if missing := self.pool.missing(own):
            raise ConfigError(
                f"{folder} lacks {len(missing)} of {len(own)} images that were written there; all processes "
                "must see the run's folder, and none may delete files there"
            )

    def _add_to_pool(self, share: list[int], prompts: dict[int, str], padding: list[int]) -> None:
        """Draw and store ``share``; ``padding`` is drawn only, as all ranks call a sharded model together."""
        assert self.pool is not None
        starts = range(0, len(share + padding), SHARD)
        for start in self.track(starts, len(starts), f"Images of opponent {self.iteration}"):
            rows = (share + padding)[start : start + SHARD]
            samples = self._play(rows, [prompts[row] for row in rows])
            if stored := share[start : start + SHARD]:
                self.pool.add(stored, samples[: len(stored)])

    def _play(self, rows: list[int], prompts: list[str]) -> Tensor:
        """The opponent's latents, ``(N, C, H, W)``; its chains, ``(N, T + 1, C, H, W)``, if exact."""
        cond = self.backbone.encode(prompts)
        policy = self.backbone.policy(self.sampler, cond, self.opponent_guidance, OPPONENT)
        samples = []
        for part in torch.arange(len(rows)).split(self.sampling.batch):
            noise, draws = self.draw_noise(torch.tensor(rows)[part], f"opponent {self.iteration}")
            states = rollout(policy[part], noise, self.sampler.num_steps, draws).states
            samples.append(states.transpose(0, 1) if self.exact else states[-1])
        return torch.cat(samples)
