"""Runs that are killed where it hurts most, and go on: nothing of what they leave may tell."""

import csv
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_align.callbacks import AdapterExport, BatchCheckpoint, BestCheckpoint, Guard, RunFolder, RunSummary
from lit_align.cli import main
from lit_align.cli.align import AlignCLI
from lit_align.methods import AlignmentModule

ROOT = Path(__file__).parents[2]
RUN = Path("logs/ddpo/version_0")
OF_TIME = ("perf/sampling_fraction", "perf/images_per_second")


@pytest.fixture(scope="module")
def arguments(tiny: Path) -> list[str]:
    """Three rollout batches and four validations of DDPO, as small as can be, with two loggers."""
    place = "init_args: {save_dir: logs, name: ddpo}"
    return [
        f"--config={ROOT}/configs/ddpo.yaml",
        "--trainer.max_epochs=3",
        "--trainer.limit_train_batches=1",
        "--trainer.accelerator=cpu",
        f"--trainer.logger=[{{class_path: TensorBoardLogger, {place}}}, {{class_path: CSVLogger, {place}}}]",
        "--data.images_per_prompt=2",
        "--data.prompts_per_batch=2",
        "--data.validation_prompts=2",
        "--data.validation_images_per_prompt=2",
        "--data.test_prompts=2",
        "--data.test_images_per_prompt=2",
        "--data.eval_batch=4",
        f"--model.backbone.pretrained={tiny}",
        "--model.sampler.num_steps=3",
        "--model.sampler.noisy_steps=2",
        "--model.rewards.rewards={brightness: {class_path: Brightness}}",
        "--model.rewards.weights={brightness: 1.0}",
    ]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit_align"])


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    with chdir(folder):
        main(["fit", *arguments])
    return folder / RUN


def kill() -> None:
    """What no program can answer."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, after: bool = False) -> Callable[[], None]:
    """Kill the process when a function is called for the ``number``-th time, or ``after`` that call."""

    def patch() -> None:
        real, calls = getattr(owner, name), []

        def dying(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == number and not after:
                kill()
            result = real(*arguments, **options)
            if len(calls) == number:
                kill()
            return result

        setattr(owner, name, dying)

    return patch


def half_a_checkpoint(number: int) -> Callable[[], None]:
    """Kill the process while it writes its ``number``-th checkpoint."""

    def patch() -> None:
        real, calls = torch.save, []

        def dying(content: Any, file: Any, **options: Any) -> None:
            calls.append(1)
            real(content, file, **options)
            if len(calls) == number:
                file.truncate(file.tell() // 2)
                kill()

        torch.save = dying  # type: ignore[assignment]

    return patch


def killed(patch: Callable[[], None], *arguments: str) -> None:
    """Run a fit in a child of this process, which is killed."""
    sys.stdout.flush()
    if not (child := os.fork()):
        try:
            patch()
            main(["fit", *arguments])
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    # TensorBoard orders event files by the second in which they begin, and then by process.
    time.sleep(1 - time.time() % 1)


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars but those of time, as TensorBoard shows them."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag not in OF_TIME
    }


def table(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{n: v for n, v in row.items() if n not in OF_TIME} for row in csv.DictReader(file)]


def score(checkpoint: Path) -> torch.Tensor:
    """The best score that a checkpoint knows of."""
    states = torch.load(checkpoint, weights_only=True)["callbacks"]
    found: torch.Tensor = next(v["best_model_score"] for k, v in states.items() if "BestCheckpoint" in k)
    return found


def same(one: Any, two: Any) -> bool:
    """Equality to the bit through nested lists and dicts."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(-1e9), two.nan_to_num(-1e9))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


MOMENTS = {
    "in the second checkpoint": half_a_checkpoint(2),
    "before the best is written": at_call(BestCheckpoint, "on_validation_end", 2),
    "between the best and the last": at_call(BatchCheckpoint, "on_validation_end", 3),
    "after the curves, before the checkpoint": at_call(AlignmentModule, "_log_now", 3, after=True),
    "after the last checkpoint": at_call(AdapterExport, "on_train_end", 1),
    "before the last words": at_call(RunSummary, "on_fit_end", 1),
}
IN_SHORT = ("between the best and the last",)
"""Those that the default tests try."""


@pytest.mark.parametrize(
    "moment",
    [pytest.param(m, marks=[] if m in IN_SHORT else [pytest.mark.slow]) for m in MOMENTS],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(moment, arguments, whole, capsys):
    killed(MOMENTS[moment], *arguments)
    main(["fit", *arguments, "--ckpt_path=last"])
    check_like(whole)


def check_like(whole: Path) -> None:
    """The run here has left what the one that nobody killed has."""
    assert [path.name for path in RUN.parent.iterdir()] == ["version_0"]
    assert curves(RUN) == curves(whole)
    assert table(RUN) == table(whole)
    for name in ("last", "best"):
        one, two = (torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True) for run in (whole, RUN))
        for part in ("state_dict", "optimizer_states", "progress", "identity", "global_step"):
            assert same(one[part], two[part]), part
        assert torch.equal(*(score(run / f"checkpoints/{name}.ckpt") for run in (whole, RUN)))
    for name in ("validation.json", "validation.csv", "adapter/pytorch_lora_weights.safetensors"):
        assert (RUN / name).read_bytes() == (whole / name).read_bytes(), name
    names = [{p.name for p in run.rglob("*") if "tfevents" not in p.name} for run in (whole, RUN)]
    assert names[1] - names[0] == {"config-2.yaml"}
    assert names[0] <= names[1]


@pytest.fixture(scope="module")
def guarded(arguments: list[str]) -> list[str]:
    """The same with a guard that goes back whenever the held-out reward has not risen."""
    guard = "{class_path: Guard, init_args: {action: rollback, max_distance: 1.0e-9}}"
    return [
        *arguments,
        f"--trainer.callbacks+={guard}",
        "--trainer.max_epochs=5",
        "--data.validation_prompts=8",
        "--model.rewards.rewards={brightness: {class_path: Brightness}, redness: {class_path: Redness}}",
    ]


@pytest.fixture(scope="module")
def guarded_whole(guarded: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with a guard that nobody killed; it has gone back, and found a better validation too."""
    folder = tmp_path_factory.mktemp("guarded")
    with chdir(folder):
        main(["fit", *guarded])
    acts = [value for _, value in curves(folder / RUN)["guard/acts"]]
    assert 0 < sum(acts) < len(acts) - 1
    return folder / RUN


GUARDED = {
    "before the guard's file": at_call(Guard, "_keep", 2),
    "between the guard's file and the last": at_call(Guard, "_keep", 2, after=True),
    "after going back": at_call(Guard, "_go_back", 1, after=True),
    "after older files went": at_call(Guard, "_remove_older", 4, after=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", GUARDED)
def test_a_killed_guard_acts_at_the_same_batch(moment, guarded, guarded_whole, capsys):
    killed(GUARDED[moment], *guarded)
    main(["fit", *guarded, "--ckpt_path=last"])
    check_like(guarded_whole)
    states = [
        torch.load(run / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["Guard"]
        for run in (guarded_whole, RUN)
    ]
    assert same(*states)


def test_a_run_that_is_killed_while_it_loads_is_not_taken_for_an_older_one(arguments, whole, capsys):
    shutil.copytree(whole, RUN)
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    killed(at_call(AlignCLI, "instantiate_classes", 1), *arguments)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", *arguments, "--trainer.max_epochs=4", "--ckpt_path=last"])
    told = capsys.readouterr().err
    assert "the newest run, logs/ddpo/version_1, has no whole checkpoint yet" in told
    assert f"--ckpt_path {RUN}" in told
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before


def test_a_best_checkpoint_that_is_newer_than_the_one_in_use_stays(whole, tmp_path):
    """It would be overwritten by a worse one, where a kill came between the two writes."""
    shutil.copytree(whole, RUN)
    best = RUN / "checkpoints" / "best.ckpt"
    content = torch.load(best, weights_only=True)
    name = next(name for name in content["callbacks"] if "BestCheckpoint" in name)
    older = dict(content["callbacks"][name])
    content["callbacks"][name]["best_model_score"] = older["best_model_score"] + 1
    torch.save(content, best)
    callback = BestCheckpoint()
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[RunFolder(RUN), callback])
    callback.setup(trainer, None, "fit")
    callback.load_state_dict(older)
    callback.on_train_start(trainer, SimpleNamespace(images=8, baseline={"reward": torch.zeros(1)}))
    assert torch.equal(callback.best_model_score, older["best_model_score"] + 1)
    assert not callback.check_monitor_top_k(trainer, older["best_model_score"] + 0.5)
    assert callback.check_monitor_top_k(trainer, older["best_model_score"] + 1.5)


@pytest.mark.slow
def test_a_folder_that_is_deleted_under_the_run_gets_the_newest_state(arguments, monkeypatch):
    update, calls = AlignmentModule.update, []

    def deleting(self: AlignmentModule, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            shutil.rmtree(RUN)
        return update(self, *given)

    monkeypatch.setattr(AlignmentModule, "update", deleting)
    with pytest.warns(UserWarning, match="was deleted while the run writes there"):
        main(["fit", *arguments])
    assert torch.load(RUN / "checkpoints" / "last.ckpt", weights_only=True)["progress"]["images"] == 12
    assert [step for step, _ in curves(RUN)["val/reward"]][-1] == 12
    assert table(RUN)[-1]["step"] == "12"
    assert (RUN / "adapter").is_dir()


@pytest.mark.slow
def test_a_disk_that_fills_at_any_moment_ends_the_run_with_a_sentence(arguments, capsys):
    """No file may grow beyond so many bytes: the images, the curves and the checkpoints meet it in turn."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (1_000, 20_000, 60_000, 100_000, 140_000):
        shutil.rmtree("logs", ignore_errors=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            with pytest.raises(SystemExit) as ended:
                main(["fit", *arguments])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        told = capsys.readouterr().err
        assert ended.value.code == 2
        assert "cannot be written (File too large)" in told
        assert "Traceback" not in told
        for checkpoint in Path("logs").rglob("*.ckpt"):
            torch.load(checkpoint, weights_only=True)
        assert not list(Path("logs").rglob(".*.draft"))
