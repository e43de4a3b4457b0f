"""Callbacks of Lightning in a run: those that work, and those that cannot."""

from contextlib import nullcontext
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging

from lit_align.callbacks import BatchCheckpoint, RunSummary
from lit_align.errors import ConfigError
from lit_align.methods import DDPOModule
from lit_align.rewards import Brightness, RewardBank
from tests.methods.build import fit, make, prompts
from tests.methods.recorders import Killed, Recorder


def run(tiny: Path, folder: Path, *callbacks, rewards=None, **options):
    """A fit of two rollout batches an epoch, with validations; its module."""
    module = make(DDPOModule, tiny, num_steps=2, rewards=rewards)
    options = {"limit_val_batches": None, "max_epochs": 4} | options
    data = prompts(2, 2, validation_prompts=2)
    fit(module, folder, 2, *callbacks, BatchCheckpoint(), data=data, **options)
    return module


def test_a_run_that_was_stopped_early_stays_stopped_when_it_goes_on(tiny, tmp_path):
    """It goes on at the end of the epoch, where the callback looks again at what was logged before."""
    for monitor in ("val/kl", "train/lr"):
        stops = {"monitor": monitor, "mode": "min", "patience": 1}
        first = run(tiny, tmp_path / monitor, EarlyStopping(**stops))
        assert first.images == 2 * 2 * 4  # the second epoch is not better than the first
        last = tmp_path / monitor / "checkpoints" / "last.ckpt"
        second = run(tiny, tmp_path / monitor, EarlyStopping(**stops), ckpt_path=last)
        assert second.images == first.images


@pytest.mark.parametrize("killed", [False, True])
def test_validations_that_measure_otherwise_are_compared_with_none_before(killed, tiny, tmp_path):
    """Also where the run that changed them ends before the first of them."""

    def callbacks():
        kept = ModelCheckpoint(tmp_path / "kept", "kept_{step}", monitor="val/reward", mode="max")
        return EarlyStopping("val/reward", mode="max", patience=1), kept

    first = run(tiny, tmp_path, *callbacks(), max_epochs=1)
    last = tmp_path / "checkpoints" / "last.ckpt"
    darker = RewardBank({"trained": Brightness()}, {"trained": 0.1})
    stopping, kept = callbacks()
    if killed:
        ends = Recorder(crash=2)
        with pytest.warns(UserWarning, match="measured with another rewards"), pytest.raises(Killed):
            run(tiny, tmp_path, *callbacks(), rewards=darker, max_epochs=2, ckpt_path=last, recorder=ends)
    with nullcontext() if killed else pytest.warns(UserWarning, match="measured with another rewards"):
        second = run(tiny, tmp_path, stopping, kept, rewards=darker, max_epochs=2, ckpt_path=last)
    assert second.images == 2 * first.images
    assert stopping.wait_count == 0
    assert float(stopping.best_score) == pytest.approx(float(second.latest["reward"].mean()))
    assert float(kept.best_model_score) == pytest.approx(float(stopping.best_score))


@pytest.mark.parametrize(
    ("monitor", "told", "options"),
    [
        ("val_loss", "monitor val_loss is not in the validation; there are val/reward, ", {}),
        ("train/rewrd", "monitor train/rewrd is not logged; did you mean train/reward", {}),
        ("val/reward", "is never measured, since trainer.limit_val_batches is 0", {"limit_val_batches": 0}),
    ],
)
def test_a_metric_that_never_comes_is_told_before_the_end_of_an_epoch(monitor, told, options, tiny, tmp_path):
    for callback in (EarlyStopping(monitor), ModelCheckpoint(monitor=monitor)):
        with pytest.raises(ConfigError, match=f"{type(callback).__name__}: .*{told}"):
            run(tiny, tmp_path, callback, **options)


def test_a_callback_that_takes_over_what_a_method_does_is_refused_in_python(tiny, tmp_path):
    with pytest.raises(ConfigError, match="StochasticWeightAveraging averages weights that nothing"):
        run(tiny, tmp_path, StochasticWeightAveraging(1e-3))


@pytest.mark.parametrize(
    ("callbacks", "options", "told"),
    [
        ([], {"max_time": {"microseconds": 1}}, "its time limit is reached"),
        ([EarlyStopping("val/kl", patience=1)], {}, "val/kl has not improved in 1 validations"),
    ],
    ids=["time", "early"],
)
def test_a_fit_that_ends_before_its_epochs_says_why(callbacks, options, told, tiny, tmp_path, caplog):
    module = run(tiny, tmp_path, *callbacks, RunSummary(), **options)
    assert f"ends after {module.images} images, since {told}" in caplog.text
