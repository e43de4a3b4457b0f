import argparse

from tests.benchmarks.two_passes import measure, show


def test_a_cell_measures_real_updates(tiny, capsys):
    """How much it is, is a matter of the machine; that the graph does not grow is tested with the method."""
    options = argparse.Namespace(pretrained=str(tiny), micro_batch=2, device="cpu")
    cell = measure(options, images=4, steps=3)
    assert cell["seconds"] > 0
    assert cell["peak_bytes"] >= 0
    assert cell["chain_bytes"] == (3 + 4) * 4 * 4 * 8 * 8 * 4
    show([cell], 2)
    assert "stored chains" in capsys.readouterr().out
