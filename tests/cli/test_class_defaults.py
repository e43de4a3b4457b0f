"""A class in another's place keeps what was written, and has its own defaults for the rest."""

import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lit_align.cli import main
from lit_align.cli.align import AlignCLI, _has_bar

DDPO = Path(__file__).parents[2] / "configs" / "ddpo.yaml"


def parsed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(DDPO), *arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimisation"]["optimizer"]


@pytest.mark.parametrize("way", ["command", "file"])
def test_a_default_of_the_old_class_does_not_travel(way: str, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit_align"])
    arguments = ["--model.optimisation.optimizer=transformers.Adafactor"]
    if way == "file":
        overlay = {"optimisation": {"optimizer": {"class_path": "transformers.Adafactor"}}}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump({"model": {"init_args": overlay}}))
        arguments = ["--config", str(tmp_path / "own.yaml")]
    options = parsed(capsys, *arguments)["init_args"]
    assert options["eps"] == [1e-30, 1e-3]  # AdamW's is 1e-8
    assert (options["lr"], options["weight_decay"]) == (1e-3, 0.0)  # as configs/ddpo.yaml says
    assert options["beta1"] is None


def test_what_is_written_travels(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit_align"])
    written = "--model.optimisation.optimizer.eps=1e-5"
    options = parsed(capsys, "--model.optimisation.optimizer=torch.optim.Adadelta", written)["init_args"]
    assert (options["eps"], options["rho"], options["lr"]) == (1e-5, 0.9, 1e-3)
    given = "--model.optimisation.optimizer={class_path: torch.optim.Adadelta, init_args: {eps: 1.0e-4}}"
    assert parsed(capsys, given)["init_args"]["eps"] == 1e-4
    assert parsed(capsys, "--model.optimisation.optimizer=torch.optim.Adadelta")["init_args"]["eps"] == 1e-6
    assert parsed(capsys)["init_args"]["eps"] == 1e-8


def test_the_weights_of_another_reward_do_not_travel(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit_align"])
    for class_path in ("PickScore", "HPSv2"):
        options = {"pretrained": "some/pick", "dtype": "bfloat16"} if class_path == "PickScore" else {}
        reward = {"class_path": class_path} | ({"init_args": options} if options else {})
        bank = {"rewards": {"init_args": {"rewards": {"liked": reward}, "weights": {"liked": 1.0}}}}
        (tmp_path / f"{class_path}.yaml").write_text(yaml.safe_dump({"model": {"init_args": bank}}))
    pick, option = ["--config", str(tmp_path / "PickScore.yaml")], "--model.rewards.rewards.liked"
    for arguments, model in (
        ([], "some/pick"),
        ([f"{option}=HPSv2"], "xswu/HPSv2"),
        (["--config", str(tmp_path / "HPSv2.yaml")], "xswu/HPSv2"),
        ([f"{option}=HPSv2", f"{option}.pretrained=some/hps"], "some/hps"),
        ([f"{option}.pretrained=shapes", f"{option}=CLIPScore"], "shapes"),
    ):
        with pytest.raises(SystemExit):
            main(["fit", "--config", str(DDPO), *pick, *arguments, "--print_config"])
        bank = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["rewards"]["init_args"]
        made = bank["rewards"]["liked"]["init_args"]
        assert (made["pretrained"], made.get("dtype", "bfloat16")) == (model, "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--model.backbone.lora.rank=4"],
            "scaled by 16, and not by 4 as in .*shapes_flow.yaml.*lora.alpha 16$",
        ),
        (["--model.backbone.lora.rank=4", "--model.backbone.lora.alpha=16"], None),
        (["--model.backbone.lora=null"], None),
        ([], None),
    ],
)
def test_a_rank_that_leaves_alpha_behind_is_told(arguments, told, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit_align"])
    monkeypatch.setattr(AlignCLI, "before_instantiate_classes", lambda self: sys.exit())
    flow = DDPO.with_name("backbone") / "shapes_flow.yaml"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(SystemExit):
            main(["fit", "--config", str(DDPO), "--config", str(flow), *arguments])
    said = [str(one.message) for one in caught if "alpha stays" in str(one.message)]
    assert bool(said) == bool(told)
    assert not told or re.search(told, said[0])


def test_a_default_that_is_a_member_of_an_enumeration_is_written(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit_align"])
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(DDPO), "--trainer.callbacks+=Timer", "--print_config"])
    (timer,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert timer["init_args"]["interval"] == "step"


def test_a_bar_that_is_given_is_drawn_in_a_job_too():
    trainer = SimpleNamespace(enable_progress_bar=None, callbacks=[])
    assert not _has_bar(trainer)
    trainer.callbacks.append(SimpleNamespace(class_path="lightning.pytorch.callbacks.RichProgressBar"))
    assert _has_bar(trainer)
    trainer.enable_progress_bar = False
    assert not _has_bar(trainer)
