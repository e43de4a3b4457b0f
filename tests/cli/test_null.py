"""A null on the command line, at any depth, as in a file."""

import sys
from functools import reduce
from pathlib import Path

import pytest
import yaml

from lit_align.cli import main

DDPO = Path(__file__).parents[2] / "configs" / "ddpo.yaml"


@pytest.mark.parametrize(
    ("option", "place"),
    [
        ("--model.kl_target=null", "kl_target"),
        ("--model.sampler.noisy_steps=null", "sampler.init_args.noisy_steps"),
        ("--model.sampler.init_args.noisy_steps=null", "sampler.init_args.noisy_steps"),
        ("--model.backbone.lora=null", "backbone.init_args.lora"),
        ("--model.backbone.lora.target_modules=null", "backbone.init_args.lora.target_modules"),
        ("--model.backbone.lora={rank: 8, target_modules: null}", "backbone.init_args.lora.target_modules"),
        ("--model.optimisation.lr_scheduler=null", "optimisation.lr_scheduler"),
    ],
)
def test_a_null_is_no_text(option: str, place: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lit_align"])
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(DDPO), option, "--print_config"])
    options = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert reduce(lambda found, name: found[name], place.split("."), options) is None


def test_sections_with_nothing_below_them_are_not_there(tmp_path: Path, capsys, monkeypatch) -> None:
    """All of each is commented out; options that no command takes from a file are passed over too."""
    monkeypatch.setattr(sys, "argv", ["lit_align"])
    empty = tmp_path / "empty.yaml"
    sections = {"data": {"init_args": None}, "model": {"init_args": {"sampling": None, "optimisation": None}}}
    decided = {"verbose": True, "return_predictions": False}
    empty.write_text(yaml.safe_dump({"trainer": None} | sections | decided))
    printed = []
    for more in ([], [f"--config={empty}"]):
        with pytest.raises(SystemExit):
            main(["fit", f"--config={DDPO}", *more, "--print_config"])
        printed.append(yaml.safe_load(capsys.readouterr().out))
    assert printed[0] == printed[1]
