"""The counting of memory: closed forms, and that checkpointing and adapters need less."""

from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_align.doctor.memory import Live
from tests.benchmarks import memory_table
from tests.benchmarks.memory_table import METHODS, counted, estimate, total


def test_live_storages_are_added_and_freed():
    with FakeTensorMode():
        weight = torch.zeros(10**6)
        live = Live([weight])
    with FakeTensorMode(), live:
        a = torch.zeros(1000)
        b = (a + 1).view(10, 100)  # a view takes nothing
        del a
        c = b * 2
        assert live.now == 8000
        assert live.peak == 8000
        del b, c
        d = torch.zeros(500)
    assert live.now == d.numel() * 4
    assert live.peak == 8000
    with live:
        weight.view(10, -1).t()
    assert live.now == d.numel() * 4


def test_an_estimate_is_the_sum_of_its_parts():
    parts: dict[str, Any] = {"parameters": 1000, "trained": 1000, "activations": 7, "lora": False}
    assert estimate(parts, 2, 8) == 1000 * (4 + 4 + 8) + 7
    adapter = parts | {"trained": 10, "lora": True}
    assert estimate(adapter, 2, 2) == 990 * 2 + 10 * (4 + 4 + 2) + 7
    spin, dpo = (total("sd15", METHODS[name], parts, 8) for name in ("SPIN", "DPO, SFT"))
    assert spin - dpo == 4 * 1000  # the opponent
    experts = total("sd15", METHODS["MSDDA, two experts"], parts, 8)
    assert experts - dpo == 1000 * (4 + 4 + 8) + 4 * 1000
    assert total("sd15", METHODS["SPIN"], adapter, 8) == total("sd15", METHODS["DPO, SFT"], adapter, 8)


@pytest.mark.slow
def test_checkpointing_and_adapters_need_less_and_rows_add_up():
    none, blocks = (counted("small", True, kind, half=False)["activations"] for kind in (False, True))
    assert blocks < 0.6 * none
    assert none < counted("small", False, False, half=False)["activations"]
    four = counted("small", True, False, half=False, rows=4)["activations"]
    assert four == pytest.approx(2 * none, rel=0.05)


@pytest.mark.slow
def test_the_counting_is_near_a_measured_peak(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))
    parts = counted("small", False, False, half=False)
    (seen,) = memory_table.each_alone([partial(memory_table.measured, "small", False, False, 2)])
    assert estimate(parts, 4, 8) == pytest.approx(seen["peak"], rel=0.25)
