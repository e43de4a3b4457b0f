"""Names of the first edition, on the command line and in files."""

import sys
from pathlib import Path

import pytest
import yaml

from lit_align.cli import main
from lit_align.cli.align import AlignCLI
from lit_align.cli.renamed import OPTIONS, first_edition, translated, translated_arguments

OLD = """
model:
  class_path: lit_align.methods.AlignPropModule
  init_args:
    backbone: {class_path: StableDiffusionBackbone, init_args: {checkpointing: true}}
    truncation: {class_path: lit_align.truncation.UniformWindow, init_args: {low: 1}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
    lr_scheduler: null
    clip_norm: 0.3
    micro_batch: 16
    guidance: 1.0
    rollout_batch: 64
    seed: 3
data:
  init_args:
    prompts_per_collection: 32
    collections_per_epoch: null
    tasks: {preference: {prompts_per_collection: 4}}
trainer:
  callbacks: [{class_path: lit_align.callbacks.PictureGrids, init_args: {count: 3}}]
"""
NEW = """
model:
  class_path: lit_align.methods.AlignPropModule
  init_args:
    backbone: {class_path: StableDiffusionBackbone, init_args: {checkpointing: prediction}}
    truncation: {class_path: lit_align.methods.alignprop.UniformWindow, init_args: {low: 1}}
    optimisation:
      optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
      lr_scheduler: null
      clip_norm: 0.3
      micro_batch: 16
    sampling: {guidance: 1.0, batch: 64, seed: 3}
data:
  init_args:
    prompts_per_batch: 32
    batches_per_epoch: null
    tasks: {preference: {prompts_per_batch: 4}}
trainer:
  callbacks: [{class_path: lit_align.callbacks.ImageGrids, init_args: {count: 3}}]
"""


def test_a_configuration_has_the_names_of_today():
    with pytest.warns(UserWarning, match="is now") as told:
        assert translated(yaml.safe_load(OLD)) == yaml.safe_load(NEW)
    messages = [str(warning.message) for warning in told]
    assert "model.micro_batch is now model.optimisation.micro_batch" in messages
    assert (
        "data.tasks.preference.prompts_per_collection is now data.tasks.preference.prompts_per_batch"
        in messages
    )
    assert len(messages) == len(set(messages)) == 13  # one for each name


def test_names_of_today_stay_as_they_are(recwarn):
    new = yaml.safe_load(NEW)
    assert translated(new) == new
    assert not recwarn


def test_without_init_args_the_new_place_has_none():
    with pytest.warns(UserWarning, match="is now"):
        new = translated({"model": {"micro_batch": 4, "optimisation": {"clip_norm": 1.0}}})
    assert new == {"model": {"optimisation": {"clip_norm": 1.0, "micro_batch": 4}}}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--model.micro_batch=4"], ["--model.optimisation.micro_batch=4"]),
        (["--model.init_args.micro_batch", "4"], ["--model.init_args.optimisation.micro_batch", "4"]),
        (
            ["--model.init_args.optimizer.init_args.lr=1e-3"],
            ["--model.init_args.optimisation.optimizer.init_args.lr=1e-3"],
        ),
        (["--model.optimizer.lr", "1e-3"], ["--model.optimisation.optimizer.lr", "1e-3"]),
        (["--model.rollout_batch=8"], ["--model.sampling.batch=8"]),
        (["--data.init_args.prompts_per_collection=8"], ["--data.init_args.prompts_per_batch=8"]),
        (["--data.tasks.a.prompts_per_collection=8"], ["--data.tasks.a.prompts_per_batch=8"]),
        (["--model.backbone.checkpointing=true"], ["--model.backbone.checkpointing=prediction"]),
        (
            ["--model.init_args.backbone.init_args.checkpointing", "false"],
            ["--model.init_args.backbone.init_args.checkpointing", "none"],
        ),
        (
            ["--model.truncation=lit_align.truncation.PerStep"],
            ["--model.truncation=lit_align.methods.alignprop.PerStep"],
        ),
        (["--trainer.callbacks+=PictureGrids"], ["--trainer.callbacks+=ImageGrids"]),
    ],
)
def test_arguments_have_the_names_of_today(old, new):
    with pytest.warns(UserWarning, match="is now"):
        assert translated_arguments(["fit", *old]) == ["fit", *new]


def test_other_arguments_stay_as_they_are(recwarn):
    arguments = ["fit", "--config", "a.yaml", "--trainer.devices", "2", "--model.rewards.rewards.x", "true"]
    arguments += ["--seed_everything=1", "--model.optimisation.micro_batch", "4", "-c", "b.yaml"]
    assert translated_arguments(arguments) == arguments
    assert not recwarn


def test_where_an_option_was_is_known_for_messages():
    for old, new in OPTIONS.items():
        assert first_edition(new.split(".")) == old.split(".")
    assert first_edition(["model", "optimisation", "optimizer", "lr"]) == ["model", "optimizer", "lr"]
    assert first_edition(["trainer", "devices"]) == ["trainer", "devices"]


def test_old_names_reach_the_new_options(tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    found = {}

    def stop(self: AlignCLI) -> None:
        found.update(self.config["fit"].model.init_args.as_dict())
        raise SystemExit

    monkeypatch.setattr(AlignCLI, "before_instantiate_classes", stop)
    monkeypatch.setattr(sys, "argv", ["lit_align"])
    overlay = tmp_path / "old.yaml"
    overlay.write_text("model: {init_args: {guidance: 3, optimizer: {init_args: {lr: 0.5}}}}\n")
    with pytest.raises(SystemExit):
        main(["fit", f"--config={root}/configs/ddpo.yaml", f"--config={overlay}", "--model.micro_batch=7"])
    assert found["sampling"]["guidance"] == 3
    assert found["optimisation"]["micro_batch"] == 7
    assert found["optimisation"]["optimizer"]["init_args"]["lr"] == 0.5
