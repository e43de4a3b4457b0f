"""Whole files or none, and names and folders that two processes never share."""

import csv
import errno
import multiprocessing
import os
import resource
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from lit_align.callbacks import RunFolder, run_folder
from lit_align.callbacks.checkpoints import WholeCheckpoints, check_whole, write_whole
from lit_align.callbacks.images import png
from lit_align.cli.loggers import KeptTable
from lit_align.cli.run import _sentence
from lit_align.errors import ConfigError, chain
from lit_align.files import (
    follow_umask,
    new_folder,
    rename_new,
    replace_file,
    replace_folder,
    unused,
    unwritable,
    write,
    write_new,
)
from lit_align.folder import Hold, claim
from lit_align.pool import Pool


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the system refuses it, as it does on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    write(path, "old")

    def fail(draft: Path) -> None:
        draft.write_text("half")
        assert path.read_text() == "old"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ConfigError, match=r"a.txt cannot be written \(No space left on device\): make room"):
        replace_file(path, fail)
    assert path.read_text() == "old"
    assert listing(tmp_path) == ["a.txt"]


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_last_one(tmp_path):
    """torch says "unexpected pos 64 vs 0" or "iostream error"."""
    path, io = tmp_path / "checkpoints" / "last.ckpt", WholeCheckpoints()
    io.save_checkpoint({"images": 1}, path)
    for size in (0, 100, 5_000, 50_000):
        big = {"images": 2, "weights": torch.zeros(size // 2)}
        with (
            full_disk(size),
            pytest.raises(ConfigError, match=r"last.ckpt cannot be written \(File"),
        ):
            io.save_checkpoint(big, path)
        assert io.load_checkpoint(path) == {"images": 1}
        assert listing(path.parent) == ["last.ckpt"]


def test_whatever_does_not_fit_on_the_disk_is_told_and_leaves_what_was_there(tmp_path):
    noise = Image.fromarray(torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy())
    write(tmp_path / "grid.png", b"old")
    pool = Pool(tmp_path / "pool", "source")
    pool.add([0], torch.zeros(1, 10))
    with full_disk(4096):
        with pytest.raises(ConfigError, match=r"grid.png cannot be written \(File too large"):
            write(tmp_path / "grid.png", png(noise))
        with pytest.raises(ConfigError, match="safetensors cannot be written"):
            pool.add([1], torch.zeros(1, 10_000))
        with pytest.raises(ConfigError, match=r"test\.csv cannot be written"):
            write_new(tmp_path / "test.csv", "x" * 5000)
    assert (tmp_path / "grid.png").read_bytes() == b"old"
    assert len(Pool(tmp_path / "pool", "source")) == 1
    assert listing(tmp_path) == ["grid.png", "pool"]


def test_a_checkpoint_that_a_disk_has_changed_is_refused(tmp_path):
    """torch reads over it: the weights would be others."""
    path, other = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    io = WholeCheckpoints()
    io.save_checkpoint({"weights": torch.arange(1000.0)}, path)
    check_whole(path)
    good = path.read_bytes()
    for place in range(0, len(good), 257):
        path.write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1 :])
        with suppress(ConfigError):  # and no other error
            loaded = io.load_checkpoint(path)["weights"]
            assert torch.equal(loaded, torch.arange(1000.0))  # a byte that says nothing
    other.touch()
    path.write_bytes(good[:-100])
    with pytest.raises(ConfigError, match=r"last.ckpt is damaged .*; take another one \(best.ckpt\)"):
        io.load_checkpoint(path)


def test_nothing_in_a_checkpoint_is_executed_in_python(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ConfigError, match="is not a checkpoint of lit_align"):
        WholeCheckpoints().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert not (tmp_path / "executed").exists()


def test_a_trainer_writes_whole_checkpoints_unless_it_was_given_another_way():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    write_whole(trainer)
    assert type(trainer.strategy.checkpoint_io) is WholeCheckpoints

    class Own(WholeCheckpoints):
        pass

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, plugins=[Own()])
    write_whole(trainer)
    assert type(trainer.strategy.checkpoint_io) is Own


def test_an_adapter_is_there_at_every_moment(tmp_path, monkeypatch):
    folder, draft = tmp_path / "adapter", tmp_path / ".adapter.draft"
    for name in ("weights", "old/weights"):
        write(draft / name, "old")
    replace_folder(folder, draft)
    for name in ("weights", "red/weights"):
        write(draft / name, "new")
    replace, seen = Path.replace, []

    def watched(self: Path, target: Path) -> Path:
        seen.append((folder / "weights").read_text())
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    replace_folder(folder, draft)
    assert seen == ["old", "old"]
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {"weights", "red/weights"}
    assert (folder / "weights").read_text() == "new"
    assert not draft.exists()


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
        Pool(tmp_path / "pool", "source").add([1], torch.zeros(1, 2))
        (shard,) = (tmp_path / "pool").iterdir()
    finally:
        os.umask(old)
    for path in (private, tmp_path / "a.txt", shard):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EROFS, "check the permissions"),
        (errno.EEXIST, "move it away"),
        (errno.EIO, "check the disk"),
    ],
)
def test_what_cannot_be_written_is_said_with_the_remedy(number, remedy):
    said = unwritable("logs/a", OSError(number, os.strerror(number)))
    assert said.startswith(f"logs/a cannot be written ({os.strerror(number)}): ")
    assert remedy in said


def test_an_error_that_stands_behind_itself_is_read_once():
    """As TensorBoard's: its thread hands the same error to whoever writes next."""
    first, second = OSError(errno.ENOENT, "gone", "events.out.tfevents.1"), ValueError("while handling it")
    first.__context__, second.__context__ = second, first
    assert list(chain(first)) == [first, second]
    assert "events.out.tfevents.1 cannot be written (gone)" in str(_sentence(first))


# ---- names that nobody else has


def test_names_that_are_taken_get_a_number(tmp_path):
    path = tmp_path / "test.json"
    assert unused(path) == path
    assert write_new(path, "one") == path
    (tmp_path / "test-2.json").touch()
    assert write_new(path, "three").name == "test-3.json"
    assert path.read_text() == "one"
    assert listing(tmp_path) == ["test-2.json", "test-3.json", "test.json"]


def test_new_names_are_there_without_hard_links_too(tmp_path, monkeypatch):
    def none(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", none)
    assert [write_new(tmp_path / "a.txt", text).read_text() for text in "xy"] == ["x", "y"]
    assert listing(tmp_path) == ["a-2.txt", "a.txt"]


def _complete(draft: Path) -> Path:
    write(draft / "sweep.json", "{}")
    return draft


def _names(folder: Path, many: int) -> list[str]:
    return [
        name
        for number in range(many)
        for name in (
            claim(folder / "runs").name,
            write_new(folder / "test.csv", str(number)).name,
            new_folder(folder / "predictions").name,
            rename_new(_complete(folder / f".{os.getpid()}.draft"), folder / "sweep").name,
        )
    ]


def test_processes_that_start_at_once_get_names_of_their_own(tmp_path):
    (tmp_path / "runs" / "version_7").mkdir(parents=True)
    (tmp_path / "runs" / "version_mine").mkdir()
    with multiprocessing.get_context("fork").Pool(4) as processes:
        parts = processes.starmap(_names, [(tmp_path, 5)] * 4)
    names = [name for part in parts for name in part]
    assert len(set(names)) == len(names) == 4 * 5 * 4
    assert {f"version_{number}" for number in range(8, 28)} < set(names)
    assert {"test.csv", "test-20.csv", "predictions-20", "sweep", "sweep-20"} < set(names)


# ---- the folder of a run


@contextmanager
def another_process_holds(folder: Path) -> Iterator[int]:
    """A process that trains in a folder."""
    read, told = os.pipe()
    sys.stdout.flush()
    if not (child := os.fork()):
        os.write(told, b"1" if Hold().take(folder) else b"0")
        signal.pause()
    assert os.read(read, 1) == b"1"
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(told)


def test_one_process_trains_in_a_folder_and_a_killed_one_does_not_keep_it(tmp_path):
    with another_process_holds(tmp_path):
        assert not Hold().take(tmp_path)
        with pytest.raises(ConfigError, match="that another process is training"):
            RunFolder().hold(tmp_path)
    hold = Hold()
    assert hold.take(tmp_path)
    assert hold.take(tmp_path)  # the run itself, again
    hold.leave()
    assert not listing(tmp_path)


class PRDPModule:
    pass


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(default_root_dir=folder, enable_checkpointing=False, accelerator="cpu", **options)


def test_the_folder_of_a_trainer_is_that_of_its_logger_or_a_new_one(tmp_path):
    for number in range(2):
        folder = RunFolder()
        built = trainer(tmp_path, logger=False, callbacks=[folder])
        folder.setup(built, PRDPModule(), "fit")
        assert run_folder(built) == tmp_path / "logs" / "prdp" / f"version_{number}"
        assert run_folder(built).is_dir()
        folder.teardown(built, PRDPModule(), "fit")
        assert not listing(run_folder(built))
    logger = CSVLogger(tmp_path, name="table")
    built = trainer(tmp_path, logger=logger, callbacks=[folder := RunFolder()])
    folder.setup(built, PRDPModule(), "fit")
    assert run_folder(built) == Path(logger.log_dir)
    assert run_folder(trainer(tmp_path, logger=logger)) == Path(logger.log_dir)  # also without the callback
    assert run_folder(trainer(tmp_path, logger=False)) == tmp_path


def test_a_run_whose_number_lightning_gave_twice_moves_to_another_folder(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, name="run"), CSVLogger(tmp_path, name="run")]
    place, _ = [Path(logger.log_dir) for logger in loggers]  # numbered before the other's folder is there
    with another_process_holds(place):
        for logger in loggers:
            assert logger.experiment  # as the Trainer does first
        built = trainer(tmp_path, logger=loggers, callbacks=[folder := RunFolder()])
        folder.setup(built, PRDPModule(), "fit")
    assert run_folder(built) == tmp_path / "run" / "version_1"
    assert {Path(logger.log_dir) for logger in loggers} == {run_folder(built)}
    for logger in loggers:
        logger.log_metrics({"a": 1.0}, 1)
        logger.save()
    assert listing(place) == [".lock"]
    names = {name.partition(".")[0] for name in listing(run_folder(built))}
    assert {"events", "hparams", "metrics"} <= names


# ---- the table of a CSV logger


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def log(table: KeptTable, *steps: int, **values: float) -> None:
    for step in steps:
        table.log_metrics({"a": 0.1 * step, **values}, step)
        table.save()


def test_a_table_goes_on_after_a_kill_without_half_rows_gaps_or_repetitions(tmp_path):
    log(KeptTable(str(tmp_path), None), 0, 4, 8)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("1.2")  # of step 12
    log(KeptTable(str(tmp_path), 4), 8, 12, b=1.0)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "4", "8", "12"]
    assert [row["b"] for row in rows(tmp_path)] == ["", "", "1.0", "1.0"]
    log(KeptTable(str(tmp_path), None), 12, c=2.0)  # a test
    assert [row["step"] for row in rows(tmp_path)] == ["0", "4", "8", "12", "12"]


def test_a_start_that_fails_leaves_the_table_as_it_is(tmp_path):
    log(KeptTable(str(tmp_path), None), 0, 4, 8)
    KeptTable(str(tmp_path), 4).save()
    assert [row["step"] for row in rows(tmp_path)] == ["0", "4", "8"]


def test_a_row_that_does_not_fit_on_the_disk_leaves_no_half_of_it(tmp_path):
    table = KeptTable(str(tmp_path), None)
    log(table, 0, 4)
    size = (tmp_path / "metrics.csv").stat().st_size
    with full_disk(size + 3), pytest.raises(ConfigError, match=r"metrics\.csv cannot be written"):
        log(table, 8)
    log(table, 12)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "4", "8", "12"]
