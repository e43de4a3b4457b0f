"""Optimizers and schedules that a method can step once per update, and those that are refused."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lit_align.errors import ConfigError
from lit_align.methods import DDPOModule
from tests.methods.build import fit, flat, make, prompts, trained


class NoRate(torch.optim.SGD):
    """An optimizer that sets its own step size, as Adafactor does with ``lr: null``."""

    def __init__(self, params) -> None:
        super().__init__(params, lr=1e-3)
        for group in self.param_groups:
            group["lr"] = None

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            assert group["lr"] is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"optimizer": torch.optim.LBFGS}, "LBFGS evaluates a loss several times"),
        ({"lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, "waits for a validation metric"),
        ({"optimizer": partial(torch.optim.AdamW, lr=0.0), "kl_target": 1e-2}, "optimizer is 0.0; give"),
        ({"optimizer": NoRate, "kl_target": 1e-2}, "optimizer is None; give"),
        ({"optimizer": lambda _: None}, r"optimizer: it makes a NoneType, and no Optimizer; give partial"),
        ({"optimizer": 1e-3}, r"optimizer: a float makes none; .* as partial\(torch\.optim\.AdamW, lr=1e-4"),
        ({"lr_scheduler": lambda _: None}, "lr_scheduler: it makes a NoneType, and no LRScheduler"),
        (
            {"lr_scheduler": torch.optim.lr_scheduler.StepLR},
            "lr_scheduler: .* missing 1 .* 'step_size'",
        ),
    ],
)
def test_what_cannot_be_stepped_once_per_update_is_refused(tiny: Path, options, told):
    with pytest.raises(ConfigError, match=told):
        make(DDPOModule, tiny, **options).configure_optimizers()


def test_a_schedule_that_is_shorter_than_the_run_is_told(tiny: Path, tmp_path: Path):
    """Only OneCycleLR counts its steps: the run ended with torch's traceback."""
    schedule = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-3, total_steps=3)
    module = make(DDPOModule, tiny, lr_scheduler=schedule, num_steps=2, updates=4)
    with pytest.raises(ConfigError, match="total steps is 3; it is stepped once per update: make it as long"):
        fit(module, tmp_path, data=prompts(prompts=4, images=2))


def test_an_optimizer_without_a_rate_is_stepped_and_logs_none(tiny: Path, tmp_path: Path):
    module = make(DDPOModule, tiny, optimizer=NoRate, num_steps=2)
    recorder = fit(module, tmp_path, data=prompts(prompts=2, images=2))
    assert module.lr is None
    assert "train/loss" in recorder.logged[0]
    assert "train/lr" not in recorder.logged[0]


def test_a_rate_that_is_a_tensor_is_what_it_was_after_a_scaled_step(tiny: Path, tmp_path: Path):
    module = make(
        DDPOModule,
        tiny,
        optimizer=partial(torch.optim.AdamW, lr=torch.tensor(1e-3)),
        kl_target=1e-3,
        num_steps=2,
    )
    module.rate_factor = 0.5
    recorder = fit(module, tmp_path, 3, data=prompts(prompts=2, images=2))
    (group,) = module.optimizers().param_groups
    assert group["lr"] == pytest.approx(1e-3)
    scales = [1.0, *(logged["train/step_scale"] for logged in recorder.logged)]
    used = [logged["train/lr"] for logged in recorder.logged]
    assert used == pytest.approx([0.5e-3 * scale for scale in scales[:-1]])


def test_a_gradient_is_clipped_to_the_norm_that_is_asked_for(tiny: Path, tmp_path: Path):
    """Weights that descend along it move as far; those of a new adapter's second factor are 0 before."""
    descent = partial(torch.optim.SGD, lr=0.5)
    module = make(DDPOModule, tiny, optimizer=descent, clip_norm=1e-5, num_steps=2)
    before = flat(trained(module))
    (logged,) = fit(module, tmp_path, data=prompts(prompts=2, images=2)).logged
    assert logged["train/grad_norm"] > 1e-4  # before it was clipped
    assert (flat(trained(module)) - before).norm().item() == pytest.approx(0.5e-5, rel=0.02)


def test_gradients_are_clipped_in_their_own_size_in_float16_too(tiny: Path, tmp_path: Path):
    """Where they are scaled, which a fused optimizer undoes in its own step alone."""
    norms = []
    for options in ({}, {"plugins": MixedPrecision("16-mixed", "cpu")}):
        fused = partial(torch.optim.AdamW, lr=1e-3, fused=True)
        module = make(DDPOModule, tiny, optimizer=fused, num_steps=2)
        recorder = fit(module, tmp_path, data=prompts(prompts=2, images=2), **options)
        norms.append(recorder.logged[0]["train/grad_norm"])
    assert 0 < norms[0] < module.optimisation.clip_norm
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


@pytest.mark.parametrize(
    ("returned", "error", "told"),
    [
        (torch.zeros((), requires_grad=True), TypeError, r"returns \(loss, metrics\)"),
        ((torch.zeros((), requires_grad=True), {"loss": 1.0}), TypeError, r"returns \(loss, metrics\)"),
        ((torch.zeros(()), {}), TypeError, "a scalar with a gradient"),
        (
            (torch.zeros((), requires_grad=True), {"loss": torch.zeros(())}),
            TypeError,
            r"dict of tensors \(N,\)",
        ),
        (
            (torch.zeros((), requires_grad=True), {"reward": torch.zeros(1)}),
            ConfigError,
            "reward is the name of a",
        ),
    ],
)
def test_a_loss_that_returns_something_else_is_told(
    returned, error, told, tiny: Path, tmp_path: Path, monkeypatch
):
    module = make(DDPOModule, tiny, num_steps=2)
    monkeypatch.setattr(module, "_loss", lambda *_: returned)
    with pytest.raises(error, match=told):
        fit(module, tmp_path, data=prompts(prompts=2, images=2))


def test_what_a_method_gives_to_the_base_and_is_nothing_that_it_takes(tiny: Path):
    """Tracebacks that named neither method nor argument."""
    module, values = make(DDPOModule, tiny), torch.ones(2)
    for losses in (torch.zeros((), requires_grad=True), [torch.zeros(())], lambda: None):
        with pytest.raises(TypeError, match=r"update takes a list of functions, each of which returns"):
            module.update(losses)
    for given in ({}, {}), ({"reward": values}, {"mine": 3.0}), ({"reward": values}, {"mine": values[0]}):
        with pytest.raises(TypeError, match=r"log_rollout_batch takes the report of self\.score"):
            module.log_rollout_batch(*given, 1.0, 2.0)


@pytest.mark.parametrize("schedules", [False, True])
def test_optimizers_of_ones_own_that_cannot_be_stepped(schedules: bool, tiny: Path, tmp_path: Path):
    class Own(DDPOModule):
        def configure_optimizers(self):
            two = [torch.optim.SGD(self.parameters(), 1e-3) for _ in range(2)]
            return (two[:1], [torch.optim.lr_scheduler.ReduceLROnPlateau(two[0])]) if schedules else two

    module = make(DDPOModule, tiny, num_steps=2)
    module.__class__ = Own
    with pytest.raises(ConfigError, match=r"Own\.configure_optimizers: an update steps one optimizer"):
        fit(module, tmp_path, data=prompts(prompts=2, images=2))
    assert not module.images


def test_a_method_that_counts_no_image_is_told(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its curves, checkpoints and results were all at 0 images."""
    module = make(DDPOModule, tiny, num_steps=2)
    monkeypatch.setattr(module, "log_rollout_batch", lambda *_: None)
    with pytest.raises(ConfigError, match=r"let it end with self\.log_rollout_batch"):
        fit(module, tmp_path, data=prompts(prompts=2, images=2))


def test_load_from_checkpoint_says_what_to_do_instead():
    with pytest.raises(ConfigError, match="build the module"):
        DDPOModule.load_from_checkpoint("https://example.org/last.ckpt")
