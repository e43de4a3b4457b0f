"""A Trainer built in Python: the callbacks of every run, and what they leave."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Timer

from lit_align.advantages import GroupAdvantages
from lit_align.backbones import StableDiffusionBackbone
from lit_align.callbacks import BestCheckpoint, RunFolder, TestReport, checkpoint_callbacks, default_callbacks
from lit_align.cli.align import in_order
from lit_align.data import PromptDataModule, ShapesPrompts
from lit_align.errors import ConfigError
from lit_align.methods import AlignPropModule, DDPOModule
from lit_align.methods.sampling import Sampling
from lit_align.rewards import Brightness, RewardBank
from lit_align.samplers import DDIM
from tests.methods.build import fit, make, prompts


def test_a_run_from_python_leaves_what_one_of_the_command_line_leaves(tiny, tmp_path, capsys):
    sizes = {"validation_prompts": 2, "validation_images_per_prompt": 2, "test_prompts": 2}
    data = PromptDataModule(ShapesPrompts(["pair"]), images_per_prompt=2, prompts_per_batch=2, **sizes)

    def module() -> DDPOModule:
        return DDPOModule(
            backbone=StableDiffusionBackbone(str(tiny)),
            sampler=partial(DDIM, num_steps=3, eta=1.0),
            rewards=RewardBank({"brightness": Brightness()}, {"brightness": 1.0}),
            advantages=GroupAdvantages(),
            sampling=Sampling(guidance=1.0, seed=0),
        )

    def trainer() -> Trainer:
        return Trainer(
            accelerator="cpu",
            max_epochs=1,
            limit_train_batches=1,
            num_sanity_val_steps=2,
            logger=False,
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=default_callbacks(),
        )

    for number in range(2):
        trainer().fit(module(), data)
        run = tmp_path / "logs" / "ddpo" / f"version_{number}"
        names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
        assert names == {
            "checkpoints/best.ckpt",
            "checkpoints/last.ckpt",
            "adapter/pytorch_lora_weights.safetensors",
            "images/validation_00000000.png",
            "images/validation_00000004.png",
            "validation.csv",
            "validation.json",
        }
    assert json.loads((run / "validation.json").read_text())["metrics"]["reward"]["num_pairs"] == 4
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["progress"]["images"] == 4
    printed = capsys.readouterr().out
    assert "epoch 1/1  batch 1/1" in printed
    assert "win rate" in printed
    assert not list(tmp_path.glob("lit_align*"))


@pytest.mark.parametrize("falls", [True, False])
def test_a_best_checkpoint_below_the_pretrained_model_is_told(falls, tiny, tmp_path, caplog):
    optimizer = partial(torch.optim.SGD, lr=10.0, maximize=falls)
    module = make(AlignPropModule, tiny, Brightness(), optimizer=optimizer)
    callbacks = [RunFolder(tmp_path), *checkpoint_callbacks()]
    with caplog.at_level("INFO", "lit_align"):
        seen = fit(module, tmp_path, 1, *callbacks, data=prompts(2, 2), limit_val_batches=1.0)
    start, end = (float(one["reward"].mean()) for one in seen.validated)
    assert (end < start) is falls
    told = [message for message in caplog.messages if "than the pretrained model" in message]
    best = tmp_path / "checkpoints" / "best.ckpt"
    assert torch.load(best, weights_only=True)["progress"]["images"] == 4
    expected = (
        f"no validation after an update has a higher val/reward than the pretrained model ({start:.4f}); "
    )
    assert told == ([f"{expected}{best} is the best of them ({end:.4f})"] if falls else [])


def test_the_folder_is_decided_first_and_the_best_score_is_in_the_last_checkpoint():
    names = [type(callback).__name__ for callback in default_callbacks()]
    assert names[0] == RunFolder.__name__
    assert names.index("BestCheckpoint") < names.index("BatchCheckpoint")
    without = [type(callback).__name__ for callback in default_callbacks(checkpoints=False)]
    assert not [name for name in without if "Checkpoint" in name]


def test_a_run_is_not_written_to_an_address(tiny, tmp_path, monkeypatch):
    """Its files would lie in a folder ``s3:`` here."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="s3:/bucket is an address"):
        fit(make(DDPOModule, tiny), Path("s3://bucket"), 1, *default_callbacks())
    assert not list(tmp_path.iterdir())


def test_callbacks_that_are_used_again_write_over_nothing(tiny, tmp_path):
    """A second Trainer is another run, with a folder and a best checkpoint of its own."""
    callbacks, options = default_callbacks(), {"limit_val_batches": None}
    for seed in range(2):
        module = make(DDPOModule, tiny, num_steps=2, seed=seed)
        fit(module, tmp_path, 1, *callbacks, data=prompts(2, 2, validation_prompts=2), **options)
    scores = []
    for number in range(2):
        folder = tmp_path / "logs" / "ddpo" / f"version_{number}" / "checkpoints"
        best, last = (torch.load(folder / f"{name}.ckpt", weights_only=True) for name in ("best", "last"))
        assert torch.equal(best["progress"]["latest"]["reward"], last["progress"]["latest"]["reward"])
        scores.append(best["progress"]["latest"]["reward"])
    assert not torch.equal(*scores)


def test_a_callback_of_every_run_with_settings_of_its_own_stands_where_it_would():
    """The page of a test reads the result that is written before it; else it was about the one before."""
    timer, report, best = Timer(), TestReport(count=1), BestCheckpoint()
    ours = default_callbacks()
    others, placed = in_order([best, timer, report], ours)
    assert others == [timer]
    assert list(map(type, placed)) == list(map(type, ours))
    assert placed[ours.index(next(one for one in ours if isinstance(one, TestReport)))] is report
    assert best in placed
