"""Identities and refusals of Diffusion-DPO and finetuning; what every method does is in test_protocol.py."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from lit_align.backbones import REFERENCE
from lit_align.data import ShapesPick
from lit_align.errors import ConfigError
from lit_align.methods import DPOModule, SFTModule
from tests.methods.build import assert_same, fit, make, pairs, trained

BATCH = 4
"""Pairs in a batch of the builder's data."""


def test_diffusion_dpo_starts_at_log_2(tiny, tmp_path):
    (first,) = fit(make(DPOModule, tiny, beta=500.0), tmp_path, 1).logged
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["train/accuracy"] == 0.5
    assert first["train/winner_shift"] == first["train/loser_shift"] == 0
    assert first["progress/images"] == 2 * BATCH


def test_diffusion_dpo_learns_which_images_won(tiny_attentive):
    """Of the same pairs, with the same noise: a batch of other noise says little of so few updates."""
    module, source = make(DPOModule, tiny_attentive, beta=500.0), pairs()
    source.setup("fit")
    with torch.no_grad():
        prepared = module.prepare(next(iter(source.train_dataloader())))
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        loss, metrics = module.loss(prepared, torch.arange(BATCH))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert metrics["margin"].min() > 0
    assert metrics["accuracy"].mean() == 1


def test_equals_the_released_loss_of_diffusion_dpo(tiny):
    module = make(DPOModule, tiny, beta=5000.0)
    for parameter in module.kept().values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    source = pairs()
    source.setup("fit")
    batch = next(iter(source.train_dataloader()))
    with torch.no_grad():
        winners, losers = prepared = module.prepare(batch)
        loss, _ = module.loss(prepared, torch.arange(BATCH))
        assert torch.equal(winners.noise, losers.noise)
        assert not torch.equal(winners.latents, losers.latents)
        sides = []
        for side in (winners, losers):
            noisy = module.backbone.pipeline.scheduler.add_noise(side.latents, side.noise, side.t)
            for name in ("policy", REFERENCE):
                prediction = module.backbone.predict(noisy, side.t, side.cond, weights=name)
                sides.append((prediction - side.noise).pow(2).mean(dim=[1, 2, 3]))
    model_w, reference_w, model_l, reference_l = sides
    inside = -0.5 * 5000.0 * ((model_w - model_l) - (reference_w - reference_l))
    torch.testing.assert_close(loss, -logsigmoid(inside), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        winners, losers = make(DPOModule, tiny, shared_noise=False).prepare(batch)
    assert torch.equal(winners.t, losers.t)
    assert not torch.equal(winners.noise, losers.noise)


def test_finetuning_lowers_the_error_on_winners(tiny_attentive, tmp_path):
    module, source = make(SFTModule, tiny_attentive, lr=2e-2), pairs("winners")
    source.setup("fit")
    with torch.no_grad():
        winners = module.prepare(next(iter(source.train_dataloader())))
        before = module.errors(winners)
    fit(module, tmp_path, 16)
    with torch.no_grad():
        after = module.errors(winners)
    assert after.mean() < 0.95 * before.mean()
    assert module.images == 16 * BATCH


@pytest.mark.parametrize("method", [DPOModule, SFTModule])
def test_kept_latents_change_nothing_and_spare_the_images(tiny, tmp_path, monkeypatch, method):
    view, cache = "pairs" if method is DPOModule else "winners", str(tmp_path / "latents")
    plain, kept, again = (make(method, tiny) for _ in range(3))
    fit(plain, tmp_path, 2, data=pairs(view))
    fit(kept, tmp_path, 1, data=pairs(view, latent_cache=cache))
    fit(kept := make(method, tiny), tmp_path, 2, data=pairs(view, latent_cache=cache))  # the rest is added
    (folder,) = Path(cache).iterdir()
    assert len(list(folder.iterdir())) == 2 * (2 if method is DPOModule else 1)

    def unread(self: ShapesPick, row: int, side: int) -> bytes:
        raise AssertionError("an image was read")

    monkeypatch.setattr(ShapesPick, "image", unread)
    fit(again, tmp_path, 2, data=pairs(view, latent_cache=cache, workers=1))
    for other in (kept, again):
        assert_same(trained(plain), trained(other))


def test_kept_latents_belong_to_one_autoencoder_and_to_its_images(tiny, tmp_path):
    cache = tmp_path / "latents"
    fit(make(SFTModule, tiny), tmp_path, 1, data=pairs("winners", latent_cache=str(cache)))
    other = make(SFTModule, tiny)
    with torch.no_grad():
        next(other.backbone.vae.parameters()).mul_(1.01)
    fit(other, tmp_path, 1, data=pairs("winners", latent_cache=str(cache)))
    assert len(list(cache.iterdir())) == 2
    few = ShapesPick()
    few.label = lambda row: 1.0  # type: ignore[method-assign]
    fit(make(SFTModule, tiny), tmp_path, 1, data=pairs("winners", source=few, latent_cache=str(cache)))
    assert len(list(cache.iterdir())) == 3


def test_a_dry_run_keeps_no_latents(tiny, tmp_path):
    source = pairs("winners", latent_cache=str(tmp_path / "latents"))
    fit(make(SFTModule, tiny), tmp_path, 1, data=source, fast_dev_run=True)
    assert not (tmp_path / "latents").exists()


def test_timesteps_are_uniform_over_all_that_the_network_knows(tiny):
    module = make(SFTModule, tiny)
    draw_t = module.sampler.schedule.draw_t
    drawn = draw_t(module.draws(torch.arange(4000))).double()
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    assert drawn.mean().item() == pytest.approx(499.5, abs=5 * 289 / math.sqrt(4000))
    assert drawn.std().item() == pytest.approx(288.7, rel=0.05)
    again = draw_t(module.draws(torch.tensor([7])))
    assert again.item() == drawn[7].item()
    for module.batches, module.seed in ((1, 0), (0, 1)):
        assert draw_t(module.draws(torch.tensor([7]))).item() != drawn[7].item()


def test_a_strength_that_is_not_positive_is_refused(tiny):
    with pytest.raises(ConfigError, match="beta"):
        make(DPOModule, tiny, beta=0.0)
