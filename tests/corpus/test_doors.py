"""Nothing that comes from outside is executed: through no door does a file make the canary's folder."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_align.cli.run import main
from lit_align.errors import ConfigError
from lit_align.methods import DDPOModule
from lit_align.rewards import CLIPScore, ObjectPresence, StatisticalParity
from lit_align.shapes import CLASSIFIER, CLIP, DETECTOR
from tests.corpus.files import CANARY, Evil, png
from tests.methods.build import make, prompts, trainer


def evil_folder(path: Path) -> Path:
    """What a strategy that shards writes as a checkpoint, with a pickle in its metadata."""
    path.mkdir(parents=True)
    for name in (".metadata", "meta.pt", "0_0.distcp"):
        (path / name).write_bytes(pickle.dumps(Evil(path.parent)))
    return path


def run(*arguments: str) -> Any:
    """A command in this process: its status."""
    with pytest.raises(SystemExit) as ended:
        main(["fit", *arguments])
    return ended.value.code


DDPO = ("--config", "configs/ddpo.yaml")


@pytest.mark.parametrize("door", ["folder", "run", "file"])
def test_a_command_with_a_pickle_for_a_checkpoint(
    door: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """With the overlay of the strategy that would read it; the commands end before anything is loaded."""
    path = {"folder": tmp_path / "a.ckpt", "run": tmp_path / "run", "file": tmp_path / "b.ckpt"}[door]
    if door == "file":
        torch.save({"state_dict": Evil(tmp_path)}, path)
    else:
        evil_folder(path if door == "folder" else path / "checkpoints" / "last.ckpt")
    assert run(*DDPO, "--config", "configs/backbone/fsdp.yaml", "--ckpt_path", str(path)) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("lit_align: ckpt_path: ")
    assert "weights_only" not in told
    assert not list(tmp_path.rglob(CANARY))


def test_a_trainer_of_python_with_a_pickle_for_a_checkpoint(tiny: Path, tmp_path: Path):
    """Lightning would read the folder, and that of the strategy, whatever ``weights_only`` says."""
    folder, file = evil_folder(tmp_path / "a.ckpt"), tmp_path / "b.ckpt"
    torch.save({"state_dict": Evil(tmp_path)}, file)
    (tmp_path / "c.ckpt").write_bytes(b"half of a file")
    for path, told in (
        (folder, "is a folder"),
        (file, "cannot be read"),
        (tmp_path / "c.ckpt", "cannot be read"),
    ):
        for weights_only in (None, False):
            with pytest.raises(ConfigError, match=told):
                trainer(tmp_path, 1).fit(
                    make(DDPOModule, tiny, num_steps=2),
                    prompts(prompts=2, images=2),
                    ckpt_path=path,
                    weights_only=weights_only,
                )
    with pytest.raises(ConfigError, match="no file of this machine"):
        trainer(tmp_path, 1).validate(
            make(DDPOModule, tiny, num_steps=2), prompts(), ckpt_path="http://127.0.0.1:9/a.ckpt"
        )
    assert not list(tmp_path.rglob(CANARY))


@pytest.mark.slow  # it joins a process group
def test_a_sharded_trainer_with_a_pickle_for_a_checkpoint(tiny: Path, tmp_path: Path):
    sharded = Trainer(
        accelerator="cpu",
        strategy=ModelParallelStrategy(1, 1, save_distributed_checkpoint=False),
        devices=1,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(ConfigError, match="is a folder"):
        sharded.fit(make(DDPOModule, tiny), prompts(), ckpt_path=evil_folder(tmp_path / "a.ckpt"))
    assert not list(tmp_path.rglob(CANARY))


@pytest.mark.parametrize(
    ("reward", "source", "file", "changes"),
    [
        (CLIPScore, CLIP, "config.json", {"AutoConfig": "evil.E", "AutoModel": "evil.E"}),
        (ObjectPresence, DETECTOR, "config.json", {"AutoConfig": "evil.E"}),
        (ObjectPresence, DETECTOR, "preprocessor_config.json", {"AutoImageProcessor": "evil.E"}),
        (StatisticalParity, CLASSIFIER, "config.json", {"AutoConfig": "evil.E"}),
        (StatisticalParity, CLASSIFIER, "preprocessor_config.json", {"AutoImageProcessor": "evil.E"}),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_code_beside_a_model_is_not_run_and_not_asked_about(
    reward: Any, source: Path, file: str, changes: dict[str, str], known: bool, tmp_path: Path, monkeypatch
):
    """Transformers asks in the terminal, and waits, where it is not told to refuse."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user is asked"))
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    content = json.loads((folder / file).read_text()) | {"auto_map": changes}
    kind = {"model_type": "unknown"} if file == "config.json" else {"image_processor_type": "Unknown"}
    (folder / file).write_text(json.dumps(content | ({} if known else kind)))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / CANARY)!r})\n\n\nclass E: ...\n")
    try:
        reward(str(folder))
    except ConfigError as error:
        told = str(error)
    else:
        told = "pretrained: it works without that code"
    assert "pretrained" in told
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (bytes(range(256)), "not a text file"),
        (png(8, 8), "not a text file"),
        (b"model: !!python/object/apply:os.mkdir [executed]\n", "c.yaml"),
        (b"a: &a [*a]\n", "an alias"),
    ],
)
def test_a_command_with_a_configuration_that_is_none(
    content: bytes, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "c.yaml").write_bytes(content)
    assert run(*DDPO, "--config", str(tmp_path / "c.yaml")) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("lit_align: ")
    assert told in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert not os.path.exists(CANARY)


@pytest.mark.parametrize(
    "option",
    [
        "--model.optimisation.optimizer.lr=.nan",
        *(
            pytest.param(option, marks=pytest.mark.slow)
            for option in (
                "--model.optimisation.clip_norm=.nan",
                "--model.sampling.guidance=.inf",
                "--model.sampler.eta=.nan",
                "--model.clip_range=.nan",
                "--model.kl_weight=.nan",
                "--model.rewards.weights={clip: .nan}",
                "--data.validation_fraction=.nan",
            )
        ),
    ],
)
def test_a_command_with_a_number_that_is_none(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(tmp_path)
    assert run("--config", str(root / "configs/ddpo.yaml"), option, "--trainer.max_epochs=1") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("lit_align: ")
    assert "nan" in lines[-1] or "inf" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / "logs").exists()
