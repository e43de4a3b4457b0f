import argparse

from tests.benchmarks.memory import measure, show


def test_a_cell_measures_a_real_micro_batch(tiny, capsys):
    """How much it is, is a matter of the machine; that a prefix holds nothing is tested with the method."""
    options = argparse.Namespace(pretrained=str(tiny), steps=[1, 2], guidance=1.0, images=2, device="cpu")
    cells = [measure(options, 2, checkpointing) for checkpointing in (False, True)]
    # No bound on the peak: in a process that has run other tests it may even fall (the command measures in
    # processes of their own).
    assert all(cell["seconds"] > 0 and cell["peak_bytes"] is not None for cell in cells)
    show(cells, images=2)
    assert "checkpointed" in capsys.readouterr().out
