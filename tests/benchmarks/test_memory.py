import argparse
from functools import partial

from tests.benchmarks.machine import each_alone
from tests.benchmarks.memory import measure, show


def test_a_cell_measures_a_real_micro_batch(tiny, capsys):
    """How much it is, is a matter of the machine; that a prefix holds nothing is tested with the method."""
    options = argparse.Namespace(pretrained=str(tiny), steps=[1, 2], guidance=1.0, images=2, device="cpu")
    cells = each_alone(partial(measure, options, 2, checkpointing) for checkpointing in (False, True))
    assert all(cell["seconds"] > 0 and cell["peak_bytes"] >= 0 for cell in cells)
    show(cells, images=2)
    assert "checkpointed" in capsys.readouterr().out
