"""Callbacks of Lightning in a run: those that work, and those that cannot."""

from pathlib import Path

from lightning.pytorch.callbacks import EarlyStopping

from lit_align.callbacks import BatchCheckpoint
from lit_align.methods import DDPOModule
from tests.methods.build import fit, make, prompts


def run(tiny: Path, folder: Path, *callbacks, **options):
    """A fit of two rollout batches an epoch, with validations; its module."""
    module = make(DDPOModule, tiny, num_steps=2)
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
