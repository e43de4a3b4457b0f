"""The arrows of the house point one way: who may import whom."""

import ast
import re
from pathlib import Path

import pytest

import lit_align

PACKAGE = Path(lit_align.__file__).parent

ALLOWED = {
    "errors": set(),
    "randomness": set(),
    "comparison": set(),
    "files": {"errors"},
    "folder": {"errors", "files"},
    "identity": set(),
    "gaussian": set(),
    "tokens": set(),
    "pool": {"errors", "files"},
    "latents": {"pool"},
    "advantages": {"errors"},
    "pretrained": {"errors"},
    "samplers": {"gaussian", "errors"},
    "rollout": {"gaussian"},
    "replay": {"backbones", "gaussian", "randomness", "rollout"},
    "shapes": {"errors"},
    "data": {"errors", "randomness", "shapes"},
    "rewards": {"errors", "identity", "pretrained", "shapes", "tokens"},
    "backbones": {"errors", "gaussian", "identity", "samplers", "pretrained", "shapes", "tokens"},
    "methods": {
        "errors",
        "randomness",
        "comparison",
        "folder",
        "gaussian",
        "identity",
        "samplers",
        "rollout",
        "replay",
        "advantages",
        "pool",
        "latents",
        "backbones",
        "rewards",
        "data",
        "shapes",
    },
    "report": {"comparison", "errors", "files"},
    "doctor": {"data", "errors", "methods", "rewards"},
    "callbacks": {
        "backbones",
        "errors",
        "comparison",
        "files",
        "folder",
        "identity",
        "methods",
        "data",
        "report",
        "rewards",
        "shapes",
    },
    "export": {"errors", "backbones", "callbacks", "files", "identity", "shapes"},
    "cli": {
        "errors",
        "export",
        "doctor",
        "advantages",
        "samplers",
        "backbones",
        "rewards",
        "data",
        "methods",
        "callbacks",
        "files",
        "folder",
        "pretrained",
        "report",
    },
    "__main__": {"cli"},
    "__init__": {"methods"},  # names that are imported when they are asked for
}
"""For each part of the package, the other parts that it may import."""

ROOMS = {
    "base",
    "checkpoints",
    "scales",
    "held_out",
    "hooks",
    "skipped",
    "identity",
    "joint",
    "metrics",
    "objectives",
    "optimisation",
    "pairs",
    "pretraining",
    "sampling",
    "strategies",
    "tasks",
    "validation",
}
"""What methods share; everything else in ``methods`` is one method's own."""


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


METHODS = sorted((PACKAGE / "methods").rglob("*.py"))


@pytest.mark.parametrize("path", METHODS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_methods_do_not_import_methods(path: Path):
    own, *_ = path.relative_to(PACKAGE / "methods").with_suffix("").parts
    if own != "__init__":
        siblings = {name.split(".")[2] for name in imports(path) if name.startswith("lit_align.methods.")}
        assert siblings - {own} <= (ROOMS - {"base"} if own in ROOMS - {"joint", "pairs"} else ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_a_page_or_two(path: Path):
    assert len(path.read_text().splitlines()) <= 300


def test_no_drawer_for_everything():
    assert not {"utils", "helpers", "common", "misc"} & {path.stem for path in FILES}


def test_nothing_is_unpickled_and_no_remote_code_is_trusted():
    for path in FILES:
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "from pickle import" not in text.replace("from pickle import UnpicklingError\n", ""), path
        assert "trust_remote_code=True" not in text, path
        assert "weights_only=False" not in text, path


def test_text_is_utf_8_whatever_the_locale():
    for path in FILES:
        assert not re.search(r"read_text\(\)|\.open\((\"[arw]\")?\)", path.read_text("utf-8")), path
