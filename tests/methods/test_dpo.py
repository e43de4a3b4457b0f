import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch.nn.functional import logsigmoid

from lit_align.backbones import REFERENCE, LoRA, StableDiffusionBackbone
from lit_align.callbacks import BatchCheckpoint
from lit_align.data import PickaPicDataModule, ShapesPick
from lit_align.errors import ConfigError
from lit_align.methods import DPOModule, SFTModule
from lit_align.methods.pairs import PairModule
from lit_align.rewards import Brightness, RewardBank
from lit_align.samplers import DDIM

BATCH = 4


class Recorder(Callback):
    """Keeps what was logged; may die in a batch."""

    def __init__(self, crash: int = 0) -> None:
        self.crash = crash
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if len(self.logged) == self.crash - 1:
            raise RuntimeError("killed")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def module(method: type[PairModule[Any]], folder: Path, **options: Any) -> PairModule[Any]:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"guidance": 1.0, "micro_batch": 3} | options
    return method(
        StableDiffusionBackbone(str(folder), lora=LoRA()),
        sampler=partial(DDIM, num_steps=3),
        rewards=RewardBank({"brightness": Brightness()}, {"brightness": 1.0}),
        optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0),
        **settings,
    )


def data(view: Any = "pairs", **options: Any) -> PickaPicDataModule:
    settings: dict[str, Any] = {"validation_prompts": 2, "validation_images_per_prompt": 1} | options
    return PickaPicDataModule(view=view, pairs_per_batch=BATCH, resolution=16, **settings)


def fit(
    aligned: PairModule[Any],
    folder: Path,
    batches: int,
    *callbacks: Callback,
    source: PickaPicDataModule | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> None:
    settings: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0} | options
    trainer = Trainer(
        accelerator="cpu",
        limit_train_batches=batches,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=any(isinstance(callback, BatchCheckpoint) for callback in callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(aligned, source or data(), ckpt_path=ckpt_path)


def test_diffusion_dpo_starts_at_log_2_and_learns_which_images_won(tiny, tmp_path):
    recorder = Recorder()
    fit(module(DPOModule, tiny, beta=500.0), tmp_path, 12, recorder)
    first, last = recorder.logged[0], recorder.logged[-4:]
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["train/accuracy"] == 0.5
    assert first["train/winner_shift"] == first["train/loser_shift"] == 0
    assert sum(metrics["train/margin"] for metrics in last) > 0
    assert first["progress/images"] == 2 * BATCH


def test_equals_the_released_loss_of_diffusion_dpo(tiny):
    aligned = module(DPOModule, tiny, beta=5000.0)
    for parameter in aligned.kept().values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    source = data()
    source.setup("fit")
    with torch.no_grad():
        winners, losers = pairs = aligned.prepare(next(iter(source.train_dataloader())))
        loss = aligned.loss(pairs, torch.arange(BATCH), {})
        assert torch.equal(winners.noise, losers.noise)
        assert not torch.equal(winners.latents, losers.latents)
        sides = []
        for side in (winners, losers):
            noisy = aligned.backbone.pipeline.scheduler.add_noise(side.latents, side.noise, side.t)
            for name in ("policy", REFERENCE):
                prediction = aligned.backbone.predict(noisy, side.t, side.cond, weights=name)
                sides.append((prediction - side.noise).pow(2).mean(dim=[1, 2, 3]))
    model_w, reference_w, model_l, reference_l = sides
    inside = -0.5 * 5000.0 * ((model_w - model_l) - (reference_w - reference_l))
    torch.testing.assert_close(loss, -logsigmoid(inside), rtol=1e-3, atol=1e-4)


def test_finetuning_lowers_the_error_on_winners(tiny, tmp_path):
    aligned, source = module(SFTModule, tiny), data("winners")
    source.setup("fit")
    with torch.no_grad():
        winners = aligned.prepare(next(iter(source.train_dataloader())))
        before = aligned.errors(winners)
    fit(aligned, tmp_path, 16, source=data("winners"))
    with torch.no_grad():
        after = aligned.errors(winners)
    assert after.mean() < 0.95 * before.mean()
    assert aligned.images == 16 * BATCH


@pytest.mark.parametrize("method", [DPOModule, SFTModule])
def test_kept_latents_change_nothing_and_spare_the_images(tiny, tmp_path, monkeypatch, method):
    view, cache = "pairs" if method is DPOModule else "winners", str(tmp_path / "latents")
    plain, kept, again = (module(method, tiny) for _ in range(3))
    fit(plain, tmp_path, 6, source=data(view))
    fit(kept, tmp_path, 3, source=data(view, latent_cache=cache))
    fit(kept := module(method, tiny), tmp_path, 6, source=data(view, latent_cache=cache))  # the rest is added
    (folder,) = Path(cache).iterdir()
    assert len(list(folder.iterdir())) == 6 * (2 if method is DPOModule else 1)

    def unread(self: ShapesPick, row: int, side: int) -> bytes:
        raise AssertionError("an image was read")

    monkeypatch.setattr(ShapesPick, "image", unread)
    fit(again, tmp_path, 6, source=data(view, latent_cache=cache, workers=1))
    for other in (kept, again):
        for one, two in zip(plain.kept().values(), other.kept().values(), strict=True):
            assert torch.equal(one, two)


def test_kept_latents_belong_to_one_autoencoder_and_to_its_images(tiny, tmp_path):
    cache = tmp_path / "latents"
    fit(module(SFTModule, tiny), tmp_path, 1, source=data("winners", latent_cache=str(cache)))
    other = module(SFTModule, tiny)
    with torch.no_grad():
        next(other.backbone.vae.parameters()).mul_(1.01)
    fit(other, tmp_path, 1, source=data("winners", latent_cache=str(cache)))
    assert len(list(cache.iterdir())) == 2
    few = ShapesPick()
    few.label = lambda row: 1.0  # type: ignore[method-assign]
    fit(module(SFTModule, tiny), tmp_path, 1, source=data("winners", source=few, latent_cache=str(cache)))
    assert len(list(cache.iterdir())) == 3


def test_a_dry_run_keeps_no_latents(tiny, tmp_path):
    source = data("winners", latent_cache=str(tmp_path / "latents"))
    fit(module(SFTModule, tiny), tmp_path, 1, source=source, fast_dev_run=True)
    assert not (tmp_path / "latents").exists()


def test_timesteps_are_uniform_over_all_that_the_network_knows(tiny):
    aligned = module(SFTModule, tiny)
    drawn = aligned.timesteps(aligned.draws(torch.arange(4000))).double()
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    assert drawn.mean().item() == pytest.approx(499.5, abs=5 * 289 / math.sqrt(4000))
    assert drawn.std().item() == pytest.approx(288.7, rel=0.05)
    again = aligned.timesteps(aligned.draws(torch.tensor([7])))
    assert again.item() == drawn[7].item()
    aligned.batches = 1
    assert aligned.timesteps(aligned.draws(torch.tensor([7]))).item() != drawn[7].item()


@pytest.mark.parametrize("method", [DPOModule, SFTModule])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tiny, tmp_path, method):
    options: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 1.0}
    whole, cut, resumed = (module(method, tiny) for _ in range(3))
    recorders = [Recorder(), Recorder(crash=5), Recorder()]
    fit(whole, tmp_path / "whole", 3, recorders[0], **options)
    with pytest.raises(RuntimeError, match="killed"):
        fit(cut, tmp_path / "cut", 3, recorders[1], BatchCheckpoint(), **options)
    (last,) = (tmp_path / "cut").rglob("last.ckpt")
    fit(resumed, tmp_path / "cut", 3, recorders[2], ckpt_path=last, **options)
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    losses = [[metrics["train/loss"] for metrics in recorder.logged] for recorder in recorders]
    assert losses[0] == losses[1] + losses[2]
    assert resumed.images == whole.images == 6 * BATCH * (2 if method is DPOModule else 1)


def test_winners_alone_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"data.view.*pairs"):
        fit(module(DPOModule, tiny), tmp_path, 1, source=data("winners"))


def test_a_strength_that_is_not_positive_is_refused(tiny):
    with pytest.raises(ConfigError, match="beta"):
        module(DPOModule, tiny, beta=0.0)
