"""Processes that train together: where one fails all end, with one message, and none waits for ever."""

import math
import re
import time
from datetime import timedelta
from pathlib import Path

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from lit_align.errors import ConfigError
from lit_align.methods.strategies import check_trainer
from tests.methods.build import trainer
from tests.reliability.gate import wait
from tests.reliability.processes import Job
from tests.test_preemption import FIRST, FIT, ROOT, SMALL, ended, job, messages

LIMIT = 300.0
"""Seconds in which a busy machine ends a run that has failed; a wait without a limit is half an hour."""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    Path("small.yaml").write_text(SMALL.replace("TINY", str(tiny)))


def alone(running: Job) -> tuple[list[int | None], str]:
    """The exit codes and the words of a job that no launcher ends."""
    return ended(running, LIMIT), running.said()


@pytest.mark.slow
def test_one_process_without_scores_goes_on_alike_and_one_that_dies_ends_all():
    Path(f"nan-1-{FIRST}").touch()
    Path(f"exit-1-{FIRST + 1}").touch()
    codes, said = alone(job(ranks=2))
    assert codes == [1, 7]
    assert "batch 1/3" in said
    assert "batch 2/3" not in said
    (told,) = messages(said)
    assert "another process of this run ended, so this one ends too; to resume: python -m" in told
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_reward_that_raises_on_one_process_ends_all(rank: int):
    Path(f"raise-{rank}-{FIRST}").touch()
    codes, said = alone(job(ranks=2))
    assert codes[rank] == 2
    assert codes[1 - rank] == 1
    told = [line for line in said.splitlines() if "the scorer broke" in line]
    assert len(told) == 1
    assert ("process 1: " in told[0]) == (rank == 1)
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_reward_that_raises_on_all_is_told_once():
    for rank in range(2):
        Path(f"raise-{rank}-{FIRST}").touch()
    running = job(ranks=2)
    assert running.wait(60)  # as torchrun, which ends the others
    assert running.said().count("the scorer broke") == 1


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_waited_for_no_longer_than_the_limit():
    Path(f"hold-1-{FIRST}").touch()
    running = job("--trainer.strategy=DDPStrategy", "--trainer.strategy.timeout=0:00:06", ranks=2)
    wait(lambda: Path(f"call-1-{FIRST}").exists())
    began = time.monotonic()
    while 0 in running.running():
        assert time.monotonic() - began < LIMIT
        time.sleep(0.1)
    Path(f"hold-1-{FIRST}").unlink()
    codes, said = alone(running)
    assert codes[0] == 1
    (told,) = messages(said)
    assert "did not answer within the time limit" in told


@pytest.mark.slow
def test_a_reward_with_a_gradient_that_has_no_scores_on_one_process_goes_on_alike():
    Path(f"nan-1-{FIRST}").touch()
    arguments = [part.replace("ddpo", "alignprop") for part in FIT] + ["--model.truncation.high=2"]
    codes, said = alone(Job([*arguments, "--trainer.devices=2"], Path(), 2))
    assert codes == [0, 0], said


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_is_replaced_and_all_go_on(tiny: Path):
    Path("images").mkdir()
    rows = ["prompt,image_0,image_1,label_0"]
    for number in range(12):
        for side in range(2):
            path = Path(f"images/{number}-{side}.png")
            Image.new("RGB", (16, 16), (20 * number, 100 * side, 0)).save(path)
        rows.append(f"a thing {number},images/{number}-0.png,images/{number}-1.png,1")
    for number in range(0, 12, 3):
        Path(f"images/{number}-0.png").write_bytes(b"no image")
    Path("pairs.csv").write_text("\n".join(rows))
    arguments = ["fit", "--config", "configs/dpo.yaml"]
    arguments += [f"--model.backbone.pretrained={tiny}", "--model.sampler.num_steps=3"]
    arguments += ["--model.sampler.noisy_steps=2"]
    arguments += ["--model.rewards.rewards={red: {class_path: Redness}}", "--model.rewards.weights={red: 1}"]
    arguments += ["--data.resolution=16", "--data.pairs_per_batch=4", "--trainer.max_epochs=1"]
    arguments += ["--data.source=FolderPairs", "--data.source.path=pairs.csv", "--trainer.accelerator=cpu"]
    arguments += ["--data.eval_batch=4", "--data.validation_images_per_prompt=1"]
    arguments += ["--data.validation_source=ShapesPromptSet", "--data.validation_source.name=validation"]
    arguments += ["--trainer.limit_train_batches=3", "--data.validation_prompts=2"]
    codes, said = alone(Job([*arguments, "--trainer.devices=2"], Path(), 2, fresh=True))
    assert codes == [0, 0], said
    assert "is skipped" in said  # by new interpreters: pytest keeps the warnings of forked ones
    assert math.isfinite(float(re.findall(r"loss (\S+)", said)[-1]))


@pytest.mark.parametrize(
    "place",
    [
        {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"},
        {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "a", "SLURM_PROCID": "0"},
    ],
    ids=["torchrun", "slurm"],
)
def test_processes_that_would_each_train_alone_are_refused(place, tmp_path, monkeypatch):
    alone = trainer(tmp_path, 1)
    check_trainer(alone)
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"2 processes were started together, and the Trainer expects 1"):
        check_trainer(alone)


def test_checkpoints_by_the_clock_are_refused_as_nothing_would_write_them(tmp_path):
    clock = ModelCheckpoint(tmp_path, train_time_interval=timedelta(minutes=10))
    with pytest.raises(ConfigError, match=r"train_time_interval 0:10:00 would write nothing.*every_n_train"):
        check_trainer(Trainer(accelerator="cpu", logger=False, callbacks=[clock]))
    steps = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    check_trainer(Trainer(accelerator="cpu", logger=False, callbacks=[steps]))
