"""Whole files or none, and folders that two runs never share."""

import multiprocessing
import os
import stat
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from lit_align.callbacks import RunFolder, run_folder
from lit_align.callbacks.checkpoints import WholeCheckpoints, write_whole
from lit_align.files import follow_umask, replace_file, unused, write
from lit_align.folder import claim


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    write(path, "old")

    def fail(draft: Path) -> None:
        draft.write_text("half")
        assert path.read_text() == "old"
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        replace_file(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    path, io = tmp_path / "checkpoints" / "last.ckpt", WholeCheckpoints()
    io.save_checkpoint({"images": 1}, path)
    save = torch.save

    def full(content: object, draft: Path) -> None:
        save(content, draft)
        draft.write_bytes(draft.read_bytes()[:100])
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        io.save_checkpoint({"images": 2}, path)
    assert torch.load(path, weights_only=True) == {"images": 1}


def test_a_trainer_writes_whole_checkpoints_unless_it_was_given_another_way():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    write_whole(trainer)
    assert type(trainer.strategy.checkpoint_io) is WholeCheckpoints

    class Own(WholeCheckpoints):
        pass

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, plugins=[Own()])
    write_whole(trainer)
    assert type(trainer.strategy.checkpoint_io) is Own


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_modes_follow_the_umask(mask, tmp_path):
    old = os.umask(mask)
    try:
        private = tmp_path / "folder" / "weights"
        private.parent.mkdir()
        private.touch(mode=0o600)
        private.chmod(0o600)
        follow_umask(private.parent)
        write(tmp_path / "a.txt", "text")
    finally:
        os.umask(old)
    for path in (private, tmp_path / "a.txt"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_names_that_are_taken_get_a_number(tmp_path):
    path = tmp_path / "test.json"
    assert unused(path) == path
    path.touch()
    (tmp_path / "test-2.json").touch()
    assert unused(path).name == "test-3.json"


def _claim(runs: Path, many: int) -> list[str]:
    return [claim(runs).name for _ in range(many)]


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path):
    (tmp_path / "version_7").mkdir()
    (tmp_path / "version_mine").mkdir()
    with multiprocessing.get_context("fork").Pool(4) as pool:
        names = pool.starmap(_claim, [(tmp_path, 25)] * 4)
    flat = [name for part in names for name in part]
    assert sorted(flat) == sorted(f"version_{number}" for number in range(8, 108))


def test_the_folder_of_a_trainer_is_that_of_its_logger_or_a_new_one(tmp_path):
    def trainer(**options: object) -> Trainer:
        return Trainer(default_root_dir=tmp_path, enable_checkpointing=False, accelerator="cpu", **options)  # type: ignore[arg-type]

    class PRDPModule:
        pass

    for number in range(2):
        folder = RunFolder()
        built = trainer(logger=False, callbacks=[folder])
        folder.setup(built, PRDPModule(), "fit")
        assert run_folder(built) == tmp_path / "logs" / "prdp" / f"version_{number}"
        assert run_folder(built).is_dir()
    logger = CSVLogger(tmp_path, name="table")
    built = trainer(logger=logger, callbacks=[folder := RunFolder()])
    folder.setup(built, PRDPModule(), "fit")
    assert run_folder(built) == Path(logger.log_dir)
    assert run_folder(trainer(logger=logger)) == Path(logger.log_dir)  # also without the callback
    assert run_folder(trainer(logger=False)) == tmp_path
