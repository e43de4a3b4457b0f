"""Runs that are killed where it hurts most, and go on: nothing of what they leave may tell."""

import csv
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_align.callbacks import AdapterExport, BatchCheckpoint, BestCheckpoint, RunSummary
from lit_align.cli import main
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
    folder, here = tmp_path_factory.mktemp("whole"), Path.cwd()
    os.chdir(folder)
    main(["fit", *arguments])
    os.chdir(here)
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
SLOW = ("before the best is written", "after the curves, before the checkpoint")


@pytest.mark.parametrize(
    "moment",
    [pytest.param(m, marks=[pytest.mark.slow] if m in SLOW else []) for m in MOMENTS],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(moment, arguments, whole, capsys):
    killed(MOMENTS[moment], *arguments)
    main(["fit", *arguments, "--ckpt_path=last"])
    assert [path.name for path in RUN.parent.iterdir()] == ["version_0"]
    assert curves(RUN) == curves(whole)
    assert table(RUN) == table(whole)
    for name in ("last", "best"):
        one, two = (torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True) for run in (whole, RUN))
        for part in ("state_dict", "optimizer_states", "progress", "identity", "global_step"):
            assert same(one[part], two[part]), part
        scores = [
            next(v["best_model_score"] for k, v in state["callbacks"].items() if "Best" in k)
            for state in (one, two)
        ]
        assert torch.equal(*scores)
    for name in ("validation.json", "validation.csv", "adapter/pytorch_lora_weights.safetensors"):
        assert (RUN / name).read_bytes() == (whole / name).read_bytes(), name
    names = [{p.name for p in run.rglob("*") if "tfevents" not in p.name} for run in (whole, RUN)]
    assert names[1] - names[0] == {"config-2.yaml"}
    assert names[0] <= names[1]
