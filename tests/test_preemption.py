"""Runs that are told to end: in seconds, with what can be saved, and a word how they go on."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

from lit_align.cli import main, signals
from lit_align.cli.align import AlignCLI
from lit_align.cli.checkpoint import Saved
from lit_align.cli.preemption import _check_same_start
from lit_align.cli.signals import GRACE
from lit_align.errors import ConfigError
from tests.reliability.gate import wait
from tests.reliability.processes import Job

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "lit_align" / "cli" / "README.md"
TERM, INT, USR1, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL
SLACK = 10.0
"""Seconds that a busy machine may take for what takes none."""

SMALL = """
trainer:
  accelerator: cpu
  max_epochs: 1
  limit_train_batches: 3
  enable_progress_bar: false
model:
  init_args:
    backbone: {init_args: {pretrained: TINY}}
    sampler: {init_args: {num_steps: 3, noisy_steps: 2}}
    rewards:
      init_args:
        rewards: {gate: tests.reliability.gate.Gate}
        weights: {gate: 1.0}
data:
  init_args:
    images_per_prompt: 2
    prompts_per_batch: 4
    validation_prompts: 2
    validation_images_per_prompt: 2
    eval_batch: 4
"""
FIRST = 4
"""The call of the reward in the first rollout batch: it is tried twice as it is made, and by a validation."""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    Path("small.yaml").write_text(SMALL.replace("TINY", str(tiny)))


FIT = ["fit", "--config", "configs/ddpo.yaml", "--config", "small.yaml"]


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes longer for the rest of a rollout batch; processes are forked from this one."""
    monkeypatch.setattr(signals, "GRACE", 60.0)


def job(*more: str, ranks: int = 1) -> Job:
    return Job([*FIT, *([f"--trainer.devices={ranks}"] if ranks > 1 else []), *more], Path(), ranks)


def reach(running: Job, rank: int, call: int) -> None:
    """Wait until a rank scores its images for the so-many-th time."""
    wait(lambda: Path(f"call-{rank}-{call}").exists() or not running.running())
    assert running.running(), running.said()


def ended(running: Job, within: float) -> list[int | None]:
    """The exit codes of a job that ends by itself."""
    began = time.monotonic()
    while running.running() and time.monotonic() < began + within + SLACK:
        time.sleep(0.01)
    alone = not running.running()
    running.wait(0)
    assert alone, f"it hangs: {running.said()}"
    return running.codes


def messages(said: str) -> list[str]:
    """What is said of the end."""
    return [line for line in said.splitlines() if line.startswith("lit_align: ") and "python -m" in line]


def images() -> int:
    content = torch.load("logs/ddpo/version_0/checkpoints/last.ckpt", weights_only=True)
    return int(content["progress"]["images"])


# ---- one process


@pytest.mark.slow
@pytest.mark.usefixtures("_patient")
def test_the_rollout_batch_that_ends_in_time_is_saved_and_the_command_that_is_told_goes_on():
    """Also where checkpoints are rare."""
    Path(f"hold-0-{FIRST}").touch()
    rare = "--trainer.callbacks={class_path: BatchCheckpoint, init_args: {every: 100}}"
    running = job(rare)
    reach(running, 0, FIRST)
    running.send(TERM, [0])
    Path(f"hold-0-{FIRST}").unlink()
    assert ended(running, 60) == [143]
    assert images() == 8
    (told,) = messages(running.said())
    assert "SIGTERM" in told
    assert "Traceback" not in running.said()
    command = shlex.split(told[told.index("python -m lit_align ") :])[3:]
    assert command == [*FIT, rare, "--ckpt_path", "logs/ddpo/version_0"]
    assert ended(Job(command, Path()), 60) == [0]
    assert images() == 24


def test_a_second_ctrl_c_ends_at_once_and_the_first_within_its_grace():
    Path(f"hold-0-{FIRST}").touch()
    running = job("--ckpt_path=auto")
    reach(running, 0, FIRST)
    running.send(INT, [0])
    time.sleep(0.5)
    assert running.running() == [0]
    running.send(INT, [0])
    sent = time.monotonic()
    assert ended(running, 0) == [130]
    assert time.monotonic() - sent < GRACE - 1
    (told,) = messages(running.said())
    assert "second Ctrl-C" in told
    assert told.endswith(shlex.join([*FIT, "--ckpt_path=auto"]))  # the same command
    assert images() == 0


def test_a_signal_before_anything_is_computed_leaves_nothing(monkeypatch, capsys):
    def loads(self: AlignCLI) -> None:
        os.kill(os.getpid(), USR1)
        time.sleep(60)

    monkeypatch.setattr(AlignCLI, "instantiate_classes", loads)
    before = {number: signal.getsignal(number) for number in (TERM, INT, USR1)}
    with pytest.raises(SystemExit) as end:
        main(FIT)
    assert end.value.code == 138
    assert not Path("logs").exists()
    assert {number: signal.getsignal(number) for number in before} == before
    (told,) = messages(capsys.readouterr().err)
    assert told.endswith(f"start again: python -m lit_align {shlex.join(FIT)}")


def test_the_same_command_begins_goes_on_and_is_complete(monkeypatch, capsys):
    """A run of other settings is another's."""
    runs = Path("logs/ddpo")
    auto = [*FIT, "--trainer.limit_train_batches=1", "--ckpt_path=auto"]

    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main(list(arguments))
        assert [path.name for path in runs.iterdir()] == ["version_0"]
        return "".join(capsys.readouterr())

    main(auto)
    assert "a new run begins" in capsys.readouterr().out
    monkeypatch.setattr(AlignCLI, "instantiate_classes", lambda self: sys.exit(1))
    assert "is complete" in said(*auto)
    more = [*auto, "--trainer.max_epochs=2"]
    memory = ["--model.optimisation.micro_batch=4", "--model.sampling.batch=2"]
    assert "resumes from logs/ddpo/version_0" in said(*more, *memory)
    other = said(*more, "--model.clip_range=0.5")
    assert "has other settings (model.clip_range" in other
    assert "resumes" not in other
    assert "auto is for fit" in said("test", *more[1:])


# ---- two processes


@pytest.mark.slow
def test_two_processes_end_together_also_where_one_waits_in_a_collective_call():
    """As scancel and torchrun end them: a signal to both at once, while one waits for the other."""
    Path(f"hold-1-{FIRST}").touch()
    running = job(ranks=2)
    reach(running, 1, FIRST)
    time.sleep(0.3)
    running.send(TERM, [0, 1])
    assert ended(running, GRACE) == [143, 143]
    assert len(messages(running.said())) == 1
    assert "Traceback" not in running.said()
    assert images() == 0


@pytest.mark.slow
@pytest.mark.usefixtures("_patient")
def test_a_signal_to_one_process_ends_both_after_the_rollout_batch():
    Path(f"hold-1-{FIRST}").touch()
    running = job("--ckpt_path=auto", ranks=2)
    reach(running, 1, FIRST)
    running.send(USR1, [1])
    time.sleep(0.3)
    Path(f"hold-1-{FIRST}").unlink()
    assert ended(running, 60) == [138, 138]
    assert len(messages(running.said())) == 1
    assert images() == 8
    assert ended(job("--ckpt_path=auto", ranks=2), 60) == [0, 0]
    assert images() == 24


def _start_apart(rank: int, file: str) -> None:
    torch.set_num_threads(1)  # a forked process would wait for the threads of its parent, which it has not
    torch.distributed.init_process_group("gloo", f"file://{file}.meeting", rank=rank, world_size=2)
    try:
        _check_same_start(None if rank else Saved(Path("a.ckpt"), 8, 2, 1, None), 2)
    except ConfigError as error:
        Path(f"{file}.{rank}").write_text(str(error))


def test_processes_that_see_other_checkpoints_are_refused(tmp_path):
    file = str(tmp_path / "said")
    torch.multiprocessing.start_processes(_start_apart, (file,), nprocs=2, start_method="fork")
    said = [Path(f"{file}.{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert "process 0 resumes from a.ckpt at 8 images, and process 1 from none" in said[0]


# ---- the launchers that are documented: new interpreters, which take seconds


def blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command with more in its environment; what is left of it after the test is killed."""
    processes: list[subprocess.Popen[str]] = []

    def started(command: list[str], **place: Any) -> subprocess.Popen[str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
        environment |= {name: str(value) for name, value in place.items()}
        with Path(f"said-{len(processes)}.txt").open("w") as said:
            process = subprocess.Popen(
                command, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )
        process.said = Path(said.name).resolve()  # type: ignore[attr-defined]
        processes.append(process)
        return process

    yield started
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, KILL)


def finished(processes: list[subprocess.Popen[str]], within: float) -> list[int]:
    limit = time.monotonic() + within
    try:
        return [process.wait(limit - time.monotonic()) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail(f"it hangs: {[process.said.read_text() for process in processes]}")


@pytest.mark.slow
def test_a_signal_to_the_process_that_started_the_others_ends_all(start):
    Path(f"hold-0-{FIRST}").touch()
    run = start([sys.executable, "-m", "lit_align", *FIT, "--trainer.devices=2"])
    wait(lambda: Path(f"call-0-{FIRST}").exists())
    run.send_signal(TERM)
    assert finished([run], GRACE + 2 * SLACK) == [143]
    assert len(messages(run.said.read_text())) == 1
    wait(lambda: not running_in(run.pid))


def running_in(group: int) -> list[str]:
    """The processes of a group that still run; a dead one may wait for somebody to take note of it."""
    lines = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
    return [fields[0] for fields in lines if fields[2] == str(group) and fields[0] != "Z"]


@pytest.mark.slow
def test_two_nodes_that_are_ended_go_on_by_the_same_command(start):
    line = next(line for block in blocks() for line in block.splitlines() if line.startswith("torchrun"))

    def nodes(name: str) -> list[subprocess.Popen[str]]:
        """The documented command on two nodes, which are this machine, with one process each."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            here = line.replace("29500", str(free.getsockname()[1]))
        here = f"exec {here} --config small.yaml --trainer.logger.init_args.name={name}"
        return [start(["bash", "-c", here], NODE=n, FIRST="127.0.0.1", GPUS=1) for n in range(2)]

    assert finished(nodes("whole"), 300) == [0, 0]
    for call in Path().glob("call-*"):
        call.unlink()
    Path(f"hold-1-{FIRST + 1}").touch()
    stopped = nodes("cut")
    wait(lambda: Path(f"call-1-{FIRST + 1}").exists())
    for node in stopped:
        node.send_signal(TERM)
    assert all(finished(stopped, GRACE + 2 * SLACK))
    Path(f"hold-1-{FIRST + 1}").unlink()
    assert finished(nodes("cut"), 300) == [0, 0]
    whole, cut = (Path("logs", name, "version_0") for name in ("whole", "cut"))
    assert [path.name for path in cut.parent.iterdir()] == ["version_0"]
    weights, others = (load_file(run / "adapter/pytorch_lora_weights.safetensors") for run in (whole, cut))
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert (whole / "validation.csv").read_bytes() == (cut / "validation.csv").read_bytes()


SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
command = [part for part in sys.argv[1:] if not part.startswith("--kill-on")]
place = {{"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
         "SLURM_JOB_NAME": "align", "SLURM_STEP_ID": "0", "SLURM_NODELIST": "127.0.0.1"}}
def task(n):
    return subprocess.Popen(command, env=os.environ | place | {{
        "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n), "RANK": str(n)}})
tasks = [task(n) for n in range(2)]
signal.signal(signal.SIGUSR1, lambda *_: [each.send_signal(signal.SIGUSR1) for each in tasks])
open("srun.pid", "w").write(str(os.getpid()))
sys.exit(max(each.wait() for each in tasks))
"""
"""What SLURM does: two tasks, a signal to the step goes to both, and the greatest exit code."""


@pytest.mark.slow
def test_the_documented_job_asks_slurm_to_start_it_again(start):
    script = next(block for block in blocks() if "#SBATCH" in block)
    script = re.sub(r"--trainer.devices \d+", "--trainer.devices 2", script)
    script = re.sub(r"--trainer.num_nodes \d+", "--trainer.num_nodes 1 --config small.yaml", script)
    Path("job.sh").write_text(script)
    Path("bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": '#!/bin/bash\necho "$@" >> asked.txt\n'}.items():
        Path("bin", name).write_text(text)
        Path("bin", name).chmod(0o755)
    path = f"{Path('bin').resolve()}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    Path(f"hold-1-{FIRST}").touch()
    first = start(["bash", "job.sh"], SLURM_JOB_ID=41234, PATH=path)
    wait(lambda: Path(f"call-1-{FIRST}").exists())
    os.kill(int(Path("srun.pid").read_text()), USR1)
    assert finished([first], GRACE + 2 * SLACK) == [138]
    Path(f"hold-1-{FIRST}").unlink()
    assert Path("asked.txt").read_text() == "requeue 41234\n"
    assert not list(Path().rglob("hpc_ckpt*"))  # Lightning's own way
    assert len(messages(first.said.read_text())) == 1
    assert images() == 0
    assert finished([start(["bash", "job.sh"], SLURM_JOB_ID=41234, PATH=path)], 300) == [0]
    assert images() == 24
    assert Path("asked.txt").read_text() == "requeue 41234\n"
    assert [folder.name for folder in Path("logs/ddpo").iterdir()] == ["version_0"]
