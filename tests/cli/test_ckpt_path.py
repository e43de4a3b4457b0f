"""Which checkpoint is meant, and what its run was asked otherwise."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import dict_to_namespace

from lit_align.cli.checkpoint import find, newest, read
from lit_align.cli.going_on import going_on
from lit_align.cli.loggers import new_folder, runs_of
from lit_align.cli.settings import Changes, changes, check
from lit_align.errors import ConfigError
from lit_align.identity import STAMP


def save(path: Path, images: int, epochs: int = 0, ended: bool = False) -> Path:
    """A checkpoint with the counters that are read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    epoch, batch = {"current": {"processed": epochs}}, {"is_last_batch": ended}
    loop = {"epoch_progress": epoch, "epoch_loop.batch_progress": batch}
    content = {"loops": {"fit_loop": loop}, "progress": {"images": images}, "global_step": images}
    torch.save(content | {"state_dict": {"w": torch.zeros(10)}}, path)
    return path


def test_last_is_what_the_counters_say_and_not_the_clock(tmp_path):
    folder = tmp_path / "version_0" / "checkpoints"
    last, best = save(folder / "last.ckpt", 16), save(folder / "best.ckpt", 8)
    os.utime(last, (1, 1))  # copied, or written in the same moment
    assert find("last", tmp_path).path == last
    save(best, 16)
    os.utime(last, (1, 1))
    assert find("last", tmp_path).path == last
    whole = last.read_bytes()
    last.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"last.ckpt cannot be read and is ignored; .*best.ckpt, at 16"):
        assert find("last", tmp_path).path == best
    last.write_bytes(whole)
    best.write_bytes(best.read_bytes()[:300])
    last.write_bytes(last.read_bytes()[:300])  # cut by a kill
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        find("last", tmp_path)


def test_last_is_of_the_newest_run_which_has_the_highest_number(tmp_path):
    for number in (2, 9, 10):
        save(tmp_path / f"version_{number}" / "checkpoints" / "last.ckpt", 100 - number)
    (tmp_path / "version_11").mkdir()  # of a test, or of nothing
    assert find("last", tmp_path).run == tmp_path / "version_10"


def test_a_job_that_left_its_named_run_before_a_checkpoint_starts_it_anew(tmp_path):
    """With ``auto``; what it wrote is kept. A run with a checkpoint is not moved."""
    logger = {
        "class_path": "CSVLogger",
        "init_args": {"save_dir": str(tmp_path), "name": "a", "version": "x"},
    }
    trainer = {"logger": logger, "default_root_dir": None}
    config = dict_to_namespace({"model": {"class_path": "DDPOModule"}, "trainer": trainer})
    config.trainer.default_root_dir = "elsewhere"
    with pytest.warns(UserWarning, match=r"elsewhere is passed over.*logger\.save_dir elsewhere"):
        assert runs_of(config) == tmp_path / "a"
    config.trainer.default_root_dir = None
    run = new_folder(config, again=True)
    with pytest.raises(ConfigError, match="is of another run"):
        new_folder(config, again=True)  # nothing says that a run began there
    (run / "config.yaml").write_text("seen: 1")
    (run / "checkpoints").mkdir()
    for name in ("guard_00000000.ckpt", ".last.ckpt.draft"):  # from before, and cut by a kill
        (run / "checkpoints" / name).touch()
    with pytest.raises(ConfigError, match="is of another run"):
        new_folder(config)
    assert new_folder(config, again=True) == run
    assert (tmp_path / "a" / "x-left" / "config.yaml").read_text() == "seen: 1"
    (run / "config.yaml").touch()
    save(run / "checkpoints" / "last.ckpt", 8)
    with pytest.raises(ConfigError, match="is of another run"):
        new_folder(config, again=True)


def test_last_is_of_the_run_that_the_user_names_by_a_version(tmp_path):
    for name in ("version_2", "exp-1"):
        save(tmp_path / name / "checkpoints" / "last.ckpt", 8)
    assert find("last", tmp_path, "exp-1").run == tmp_path / "exp-1"
    with pytest.raises(ConfigError, match=r"finds no run under .*exp-2; start without"):
        find("last", tmp_path, "exp-2")


def test_a_newest_run_without_a_checkpoint_is_told_with_the_one_that_could_go_on(tmp_path):
    save(tmp_path / "version_0" / "checkpoints" / "last.ckpt", 8)
    (tmp_path / "version_1").mkdir()
    (tmp_path / "version_1" / "config.yaml").touch()
    with pytest.raises(
        ConfigError, match=r"version_1, has no whole checkpoint yet.*--ckpt_path .*version_0$"
    ):
        find("last", tmp_path)


def test_the_folder_of_a_run_is_its_newest_checkpoint(tmp_path):
    last = save(tmp_path / "run" / "checkpoints" / "last.ckpt", 8)
    assert find(str(tmp_path / "run"), tmp_path).path == last
    assert newest(tmp_path) is None


def test_other_folders_and_files_are_refused(tmp_path):
    sharded = tmp_path / "sharded.ckpt"
    sharded.mkdir()
    (sharded / ".metadata").write_bytes(b"a pickle")
    with pytest.raises(ConfigError, match="is a folder, and not that of a run"):
        find(str(sharded), tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    for name in ("other.ckpt", "text.ckpt"):
        with pytest.raises(ConfigError, match="cannot be read"):
            find(str(tmp_path / name), tmp_path)


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, "evil.ckpt")
    with pytest.raises(ConfigError, match="cannot be read"):
        find("evil.ckpt", tmp_path)
    assert not Path("executed").exists()


def test_complete_epochs_are_counted_with_the_one_whose_last_batch_is_done(tmp_path):
    assert read(save(tmp_path / "a.ckpt", 8, epochs=1, ended=True)).epochs == 2
    assert read(save(tmp_path / "b.ckpt", 8, epochs=1, ended=False)).epochs == 1


SAVED = {
    "seed_everything": 0,
    "trainer.precision": None,
    "trainer.limit_val_batches": None,
    "model": "DDPOModule",
    "model.backbone": "StableDiffusionBackbone",
    "model.backbone.pretrained": "models/sd15",
    "model.backbone.lora.rank": 8,
    "model.backbone.adapters": None,
    "model.backbone.checkpointing": "none",
    "model.sampler.num_steps": 10,
    "model.sampling.guidance": 1.0,
    "model.sampling.batch": 8,
    "model.rewards.weights.clip": 1.0,
    "model.weights.clip": 0.5,
    "model.tasks.a.weight": 1.0,
    "model.tasks.b.weight": 0.0,
    "model.clip_range": 1e-3,
    "model.optimisation.optimizer": "AdamW",
    "model.optimisation.optimizer.lr": 1e-3,
    "model.optimisation.lr_scheduler": None,
    "model.optimisation.micro_batch": 8,
    "data": "PromptDataModule",
    "data.source.path": "a.txt",
    "data.validation_prompts": 64,
    "data.images_per_prompt": 8,
    "data.test_prompts": 64,
    "data.eval_batch": 64,
}


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("model.backbone.pretrained", "elsewhere/sd15", None),  # moved
        ("model.backbone.pretrained", "models/sd21", "weights"),
        ("model.backbone.lora.rank", 4, "weights"),
        ("model.backbone.adapters.logs/a/adapter", 0.5, "weights"),
        ("model.backbone.checkpointing", "blocks", "other"),
        ("model.optimisation.optimizer", "SGD", "optimizer"),
        ("model.optimisation.optimizer.lr", 1e-4, "optimizer"),
        ("model.optimisation.lr_scheduler", "LinearLR", "optimizer"),
        ("model.sampler.num_steps", 20, "measurement"),
        ("model.sampling.guidance", 3.0, "measurement"),
        ("model.rewards.weights.clip", 2.0, "measurement"),
        ("model.rewards.rewards.blue", "Blue", "measurement"),
        ("model.weights.clip", 0.9, "measurement"),  # of MSDDA's objectives
        ("model.tasks.a.weight", 0.5, "other"),
        ("model.tasks.a.weight", 0.0, "measurement"),  # it is no longer part of the reward
        ("model.tasks.b.weight", 0.5, "measurement"),
        ("data.source.path", "b.txt", "measurement"),
        ("data.validation_prompts", 32, "measurement"),
        ("seed_everything", 1, "measurement"),
        ("trainer.precision", "bf16-mixed", "measurement"),
        ("trainer.limit_val_batches", 1, "measurement"),
        ("model.sampling.batch", 4, "other"),
        ("model.clip_range", 1e-4, "other"),
        ("model.optimisation.micro_batch", 4, "other"),
        ("data.images_per_prompt", 4, "other"),
        ("data.test_prompts", 4, "other"),
        ("data.tasks.test_a.test_prompts", 4, "other"),
        ("data.tasks.test_a.source.path", "b.txt", "measurement"),
        ("data.test_source.path", "b.txt", "measurement"),  # the validation skips its prompts
        ("data.predict_source.path", "b.txt", "other"),
        ("data.eval_batch", 4, "other"),
    ],
)
def test_what_a_setting_decides(name, value, kind):
    expected = Changes()
    if kind:
        getattr(expected, kind).append(name)
    assert changes(SAVED, SAVED | {name: value}) == expected


def test_the_batch_of_an_evaluation_counts_where_batches_are_limited():
    saved = SAVED | {"trainer.limit_val_batches": 1}
    assert changes(saved, saved | {"data.eval_batch": 4}).measurement == ["data.eval_batch"]


@pytest.mark.parametrize(
    ("name", "value", "stage"),
    [
        ("model.backbone.lora.rank", 4, "test"),
        ("model", "PRDPModule", "fit"),
        ("model.optimisation.optimizer", "SGD", "fit"),
        ("model.optimisation.lr_scheduler", "LinearLR", "fit"),
        ("data.images_per_prompt", 4, "fit"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_values(name, value, stage):
    now = SAVED | {name: value}
    with pytest.raises(ConfigError, match=rf"{SAVED[name] or 'none'}.*{value}"):
        check(changes(SAVED, now), SAVED, now, stage)
    if stage == "fit":
        check(changes(SAVED, now), SAVED, now, "test")  # only the weights count


def test_another_order_of_the_prompts_is_refused_before_anything_is_loaded():
    """It was refused by the loader, as ``data.seed``, which nobody had given."""
    now = SAVED | {"seed_everything": 1}
    with pytest.raises(ConfigError, match=r"order of the data .*\(seed_everything 0 -> 1\); set this back"):
        check(changes(SAVED, now), SAVED, now, "fit")
    for own in ({"data.seed": 3}, {"data": "mine.Prompts"}):
        check(changes(SAVED | own, now | own), SAVED | own, now | own, "fit")
    check(changes(SAVED, now), SAVED, now, "validate")


@pytest.mark.parametrize(("reported", "complete"), [(4, True), (8, False)])
def test_a_run_that_ended_after_its_last_validation_is_complete(tmp_path, reported, complete):
    """``validation.json`` has the number of images at which it was measured, and not that of the end."""
    path = save(tmp_path / "checkpoints" / "last.ckpt", 8, epochs=1)
    content = torch.load(path, weights_only=True)
    content["progress"] |= {"latest": {"reward": torch.zeros(2)}}
    content["progress"] |= {"measured_at": {"images": 4, "reward_queries": 4}}
    torch.save(content, path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / STAMP).write_text(json.dumps({"images": 8}))
    (tmp_path / "validation.json").write_text(json.dumps({"complete": True, "images": reported}))
    config = SimpleNamespace(trainer=SimpleNamespace(max_epochs=1, max_steps=-1))
    with pytest.raises(SystemExit) if complete else nullcontext():
        going_on(read(path), {}, config, "fit")


@pytest.mark.parametrize(("limit", "complete"), [("00:00:00:09", True), ({"seconds": 11}, False)])
def test_a_run_whose_time_is_over_is_complete(limit, complete, tmp_path, caplog):
    """It would be loaded, do nothing and end with 0."""
    path = save(tmp_path / "last.ckpt", 8)
    content = torch.load(path, weights_only=True)
    content["callbacks"] = {"Timer": {"time_elapsed": {"train": 10.0}}}
    torch.save(content, path)
    config = SimpleNamespace(trainer=SimpleNamespace(max_epochs=9, max_steps=-1, max_time=limit))
    with (
        pytest.raises(SystemExit) if complete else pytest.warns(UserWarning, match="does not say with which")
    ):
        going_on(read(path), {}, config, "fit")
    assert ("is complete (10 seconds); add --trainer.max_time 0:00:20" in caplog.text) == complete
