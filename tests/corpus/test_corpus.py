"""Every malformed input of the corpus: one sentence that names what is wrong, or a skip that is counted."""

import os
import resource
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from lit_align.data.images import UnreadableImage, decode
from lit_align.data.preferences.loader import PairLoader
from lit_align.errors import ConfigError
from tests.corpus import cases
from tests.corpus.files import CANARY

SECONDS = 10
"""CPU time that a case may take; most take a hundredth of one."""

LONGEST = 700
"""Characters of a message."""


def check(case: cases.Case, folder: Path) -> str:
    """Use an input: it must be refused in a sentence; returns that."""
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError) as refused:
            case(folder)
    assert time.process_time() - started < SECONDS
    told = str(refused.value)
    assert 20 < len(told) < LONGEST
    assert "\n" not in told
    assert "weights_only" not in told
    assert "trust_remote_code" not in told
    assert not (folder / CANARY).exists()
    assert not Path(CANARY).exists()
    return told


GROUPS = {
    "configuration": cases.CONFIGURATIONS,
    "prompts": cases.PROMPTS,
    "table": cases.TABLES,
    "shard": cases.SHARDS,
    "checkpoint": cases.CHECKPOINTS,
    "head": cases.HEADS,
}
ALL = [
    pytest.param(case, id=f"{group}: {name}")
    for group, found in GROUPS.items()
    for name, case in found.items()
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.mark.parametrize("case", ALL)
def test_an_input_is_refused_in_one_sentence(case: cases.Case, tmp_path: Path):
    check(case, tmp_path)


@pytest.mark.parametrize("name", cases.SKIPPED)
def test_an_image_is_skipped_with_a_reason(name: str):
    started = time.process_time()
    with pytest.raises(UnreadableImage) as skipped:
        decode(cases.SKIPPED[name], 8)
    assert time.process_time() - started < SECONDS
    assert 3 < len(str(skipped.value)) < 200
    assert "\n" not in str(skipped.value)


@pytest.mark.parametrize("name", cases.OUTSIDE)
def test_an_image_of_a_later_row_is_skipped_and_counted(name: str, tmp_path: Path):
    source = cases.table(tmp_path, *cases.OUTSIDE[name], 1)
    loader = PairLoader(source, [np.arange(2)], "winners", 2, 1, resolution=8)
    with pytest.warns(UserWarning, match="is skipped") as told:
        (batch,) = loader
    assert batch.index.tolist() == [0, 0]  # the other row in its place
    assert list(loader.unreadable) == [1]
    assert sum("row 1" in str(one.message) for one in told) == 1


@pytest.fixture(scope="module")
def models(tiny: Path) -> dict[str, cases.Case]:
    of = {f"adapter: {name}": case for name, case in cases.adapters(tiny).items()}
    return of | {f"pipeline: {name}": case for name, case in cases.pipelines(tiny).items()}


MODELS = [f"adapter: {name}" for name in cases.adapters(Path())]
MODELS += [f"pipeline: {name}" for name in cases.pipelines(Path())]


@pytest.mark.parametrize("name", MODELS)
def test_files_of_models_are_refused_in_one_sentence(
    name: str, models: dict[str, cases.Case], tmp_path: Path
):
    check(models[name], tmp_path)


def test_the_corpus_has_hundreds():
    assert len(ALL) + len(cases.SKIPPED) + len(cases.OUTSIDE) + len(MODELS) >= 240


# ---- memory


HUNGRY: dict[str, cases.Case] = {
    "image: 177 million pixels": lambda _: _skip(cases.SKIPPED["a PNG of 177 million pixels"]),
    "image: a text chunk": lambda _: _skip(cases.SKIPPED["a text chunk of 50 MB"]),
    **{
        f"{group}: {name}": GROUPS[group][name]
        for group, name in (
            ("configuration", "a billion laughs"),
            ("configuration", "a device"),
            ("prompts", "a device"),
            ("prompts", "JSON lines nested deeply"),
            ("table", "the first image is a device"),
            ("shard", "a header of 2^60 bytes"),
            ("shard", "a shape that overflows"),
            ("head", "a tensor of a terabyte in four bytes"),
        )
    },
}


def _skip(data: bytes) -> None:
    try:
        decode(data, 8)
    except UnreadableImage as error:
        raise ConfigError(str(error)) from error


@pytest.mark.parametrize("name", HUNGRY)
def test_no_input_takes_more_than_memory_of_its_size(name: str, tmp_path: Path):
    """In a copy of this process that may not take more than 300 MB on top: 3 where it had to, or died."""
    if not (child := os.fork()):
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
            HUNGRY[name](tmp_path)
        except ConfigError:
            os._exit(0)
        except BaseException:
            os._exit(3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
