from pathlib import Path

from tests.benchmarks.fused import main


def test_the_benchmark_of_fusing_measures_all_three(tiny: Path):
    sizes = ["--objectives=3", "--images=2", "--rounds=1", "--steps=2", "--rank=2"]
    metrics = main([*sizes, f"--pretrained={tiny}", "--cpu_time"])
    assert set(metrics["ratio"]) == {"one", "fused", "one random"}
    assert metrics["ratio"]["fused"] > 1.5
