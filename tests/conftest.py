"""What all tests share. Libraries are imported inside: the process that only hands tests out needs none."""

import gc
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Memory that was freed is used again: to give it back and to ask for it anew took a sixth of the time of
# tests that draw larger images. The processes that run the tests start with this.
for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
    os.environ.setdefault(name, str(1 << 30))
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Files outlive a loss of power, which no test can cause: to wait for the disk took a twentieth of the time.
os.fsync = lambda descriptor: None  # type: ignore[assignment]
gc.disable()  # until all is imported, which stays: looking for garbage would take a fifth of the time


def pytest_pycollect_makemodule() -> None:
    # Before any test module imports rich: typing would remember rich's Optional[Union[float, int]] and hand
    # it to Lightning, whose hints say int first: the command line reads `limit_train_batches=1` as an epoch.
    import lightning  # noqa: F401


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(3000)  # Python's 700 would take 3 % of the time, with models that are nearly all small
    gc.enable()


@pytest.fixture(autouse=True)
def _no_seed_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line leaves its seed in the environment, where a module without one looks for it."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny pipeline with Stable Diffusion 1's scheduler."""
    from diffusers import PNDMScheduler

    from tests.pipelines import SCHEDULE, make_pipeline

    folder = tmp_path_factory.mktemp("tiny")
    scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True)
    make_pipeline(scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_attentive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but adapters move it further: for tests of how far."""
    from diffusers import PNDMScheduler

    from tests.pipelines import SCHEDULE, make_pipeline

    folder = tmp_path_factory.mktemp("tiny_attentive")
    make_pipeline(PNDMScheduler(**SCHEDULE, skip_prk_steps=True), attentive=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny pipeline that predicts v, as Stable Diffusion 2.1 does, with another latent size."""
    from diffusers import DDIMScheduler

    from tests.pipelines import SCHEDULE, make_pipeline

    folder = tmp_path_factory.mktemp("tiny_v")
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type="v_prediction")
    make_pipeline(scheduler, sample_size=16, attentive=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Stable Diffusion XL with its own scheduler."""
    from tests.pipelines import CARRIED, make_xl_pipeline

    folder = tmp_path_factory.mktemp("tiny_xl")
    make_xl_pipeline().save_pretrained(folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | CARRIED))
    return folder


@pytest.fixture(scope="session")
def flow_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny flow model, by its name in ``tests/backbones/flow_models.py``."""
    from tests.backbones.flow_models import MODELS

    @cache
    def saved(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        MODELS[name]().save_pretrained(folder)
        return folder

    return saved


@pytest.fixture(scope="session")
def single_xl(tiny_xl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as one file in the layout of the original."""
    from tests.backbones.original_layout import save_original

    file = tmp_path_factory.mktemp("single_xl") / "model.safetensors"
    save_original(tiny_xl, file)
    return file
