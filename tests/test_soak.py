"""What a run of hours needs must stay flat."""

from dataclasses import replace

import pytest

from tests import soak

FLAT = [
    soak.Sample(seconds=10.0 * i, batches=20 * i, cpu=9.0 * i, memory=500 + i % 3, files=12, threads=4)
    for i in range(1, 101)
]


def test_what_is_flat_passes_and_the_warm_up_does_not_count():
    rising = [replace(one, memory=100.0 + i, files=i) for i, one in enumerate(FLAT[:15])]
    assert soak.course(FLAT).faults() == soak.course(rising + FLAT[15:]).faults() == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda i, one: replace(one, memory=one.memory + 0.2 * i), "memory grew by 9.97 MB"),
        (lambda i, one: replace(one, files=one.files + i // 30), "more files"),
        (lambda i, one: replace(one, threads=one.threads + i // 70), "1 more threads"),
        (lambda i, one: replace(one, cpu=one.cpu * (1 + i / 200)), "the speed fell"),
    ],
)
def test_what_grows_is_told(change, fault):
    (told,) = soak.course([change(i, one) for i, one in enumerate(FLAT)]).faults()
    assert told.startswith(fault) or fault in told


@pytest.mark.slow
def test_an_hour_changes_nothing(tmp_path):
    assert soak.main(["--minutes", "60", "--out", str(tmp_path)]) == 0
