import argparse
import os

from tests.benchmarks.machine import each_alone
from tests.benchmarks.memory import measure, show


def test_a_cell_measures_a_real_micro_batch(tiny, capsys):
    """How much it is, is a matter of the machine; that a prefix holds nothing is tested with the method."""
    options = argparse.Namespace(pretrained=str(tiny), steps=[1, 2], guidance=1.0, images=2, device="cpu")
    cells = [measure(options, 2, checkpointing) for checkpointing in ("none", "prediction")]
    assert all(cell["seconds"] > 0 and cell["peak_bytes"] >= 0 for cell in cells)
    show(cells, images=2)
    assert "checkpointed" in capsys.readouterr().out


def test_every_cell_has_a_process_of_its_own():
    assert len({os.getpid(), *each_alone([os.getpid, os.getpid])}) == 3
