"""The arrows of the house point one way: who may import whom."""

import ast
from pathlib import Path

import pytest

import lit_align

PACKAGE = Path(lit_align.__file__).parent

ALLOWED = {
    "errors": set(),
    "randomness": set(),
    "evaluation": set(),
    "gaussian": set(),
    "objectives": set(),
    "pool": {"errors"},
    "latents": {"pool"},
    "advantages": {"errors"},
    "pretrained": {"errors"},
    "truncation": {"errors"},
    "samplers": {"gaussian", "errors"},
    "rollout": {"gaussian"},
    "tasks": {"errors", "advantages", "data", "rewards"},
    "pretraining": {"errors", "objectives", "samplers", "backbones", "data"},
    "replay": {"backbones", "gaussian", "randomness", "rollout"},
    "shapes": {"errors"},
    "data": {"errors", "randomness", "shapes"},
    "rewards": {"errors", "pretrained", "shapes"},
    "fusion": {"errors", "gaussian", "backbones"},
    "pareto": set(),
    "baselines": {"errors", "randomness", "gaussian", "fusion", "backbones", "data", "rewards"},
    "sweep": {"errors", "evaluation", "pareto", "baselines"},
    "backbones": {"errors", "gaussian", "samplers", "pretrained", "shapes"},
    "methods": {
        "errors",
        "randomness",
        "evaluation",
        "gaussian",
        "samplers",
        "rollout",
        "replay",
        "advantages",
        "objectives",
        "fusion",
        "sweep",
        "pool",
        "latents",
        "pretraining",
        "tasks",
        "truncation",
        "backbones",
        "rewards",
        "data",
    },
    "callbacks": {"errors", "evaluation", "methods", "data", "shapes", "sweep"},
    "cli": {
        "errors",
        "advantages",
        "samplers",
        "truncation",
        "backbones",
        "rewards",
        "data",
        "methods",
        "callbacks",
    },
    "__main__": {"cli"},
    "__init__": set(),
}
"""For each part of the package, the other parts that it may import."""


def imports(path: Path) -> set[str]:
    """Full names of our own modules that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("lit_align.")}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = parts[0]
    others = {name.split(".")[1] for name in imports(path)} - {own}
    if parts[:2] == ("shapes", "recipe"):  # how the world was made: a user of the package, not a part of it
        assert others <= {"errors", "randomness", "samplers", "rollout", "backbones", "shapes"}
    else:
        assert others <= ALLOWED[own], f"{path.name} imports {others - ALLOWED[own]}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "methods").glob("*.py")), ids=lambda path: path.stem)
def test_methods_do_not_import_methods(path: Path):
    if path.stem != "__init__":
        siblings = {name.split(".")[2] for name in imports(path) if name.startswith("lit_align.methods.")}
        assert siblings <= {"base", "pairs", "joint", "experts"}  # all are bases of methods


def test_no_drawer_for_everything():
    assert not {"utils", "helpers", "common", "misc"} & {path.stem for path in FILES}


def test_nothing_is_unpickled_and_no_remote_code_is_trusted():
    for path in FILES:
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "trust_remote_code=True" not in text, path
        assert "weights_only=False" not in text, path
