import pytest
import yaml

from lit_align.data import ShapesPrompts
from lit_align.shapes.world import shape_pairs
from tests.benchmarks.bounds import least_parity, main
from tests.benchmarks.harness.plan import ROOT


def test_the_bounds_of_parity_and_presence():
    metrics = main(["--prompts=4", "--renders=1", "--draws=200"])
    assert set(metrics["presence"]) == {"test", "seen", "unseen_pairs"}
    assert all(0.7 < score < 1 for score in metrics["presence"].values())
    # E[SP^2] is (1 - 1/8) / 16 where all eight colours are drawn evenly; the root is a little less.
    assert least_parity(["a star"], 4000) == pytest.approx((0.875 / 16) ** 0.5, rel=0.05)
    # Without one colour: 7 (1/7 - 1/8)^2 + 1/64 + (1 - 1/7) / 16.
    without = 7 * (1 / 7 - 1 / 8) ** 2 + 1 / 64 + (6 / 7) / 16
    assert least_parity(["a star on a red background"], 4000) == pytest.approx(without**0.5, rel=0.05)


def test_pairs_that_are_tested_as_unseen_are_never_trained_on():
    """They stand in three files, which must agree."""
    single, joint = (
        yaml.safe_load((ROOT / "configs" / "variant" / f"pinterest_{name}.yaml").read_text())["data"][
            "init_args"
        ]
        for name in ("composition", "joint")
    )
    plan = yaml.safe_load((ROOT / "tests/benchmarks/plans/pinterest.yaml").read_text())
    (option,) = plan["also"]["unseen_pairs"]
    tested = yaml.safe_load(option.partition("=")[2])["init_args"]
    for source in (single["source"], joint["tasks"]["composition"]["source"]):
        assert source["init_args"]["kinds"] == tested["kinds"] == ["pair"]
        assert shape_pairs(source["init_args"]["without"]) == shape_pairs(tested["only"])
        both = [len(ShapesPrompts(**arguments)) for arguments in (source["init_args"], tested)]
        assert sum(both) == len(ShapesPrompts(["pair"]))
