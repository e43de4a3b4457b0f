"""What another run left is not taken for one's own: other weights, prompts, methods, under the same names."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_align.cli import main
from lit_align.folder import Hold

ROOT = Path(__file__).parents[2]
RUN = Path("logs/ddpo/version_0")
WEIGHTS = Path("model/unet/diffusion_pytorch_model.safetensors")
SIZES = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.accelerator=cpu",
    "--data.prompts_per_batch=2",
    "--data.images_per_prompt=2",
    "--data.validation_prompts=2",
    "--data.validation_images_per_prompt=2",
    "--data.test_prompts=2",
    "--data.test_images_per_prompt=2",
    "--data.eval_batch=4",
    "--data.source=TextPrompts",
    "--data.source.path=prompts.txt",
    "--data.validation_fraction=0.2",
    "--data.test_fraction=0.2",
    "--model.backbone.pretrained=model",
    "--model.sampler.num_steps=3",
    "--model.rewards.rewards={redness: {class_path: Redness}}",
    "--model.rewards.weights={redness: 1.0}",
]
DDPO = [f"--config={ROOT}/configs/ddpo.yaml", *SIZES, "--model.sampler.noisy_steps=2"]
ALIGNPROP = [f"--config={ROOT}/configs/alignprop.yaml", *SIZES, "--model.sampler.noisy_steps=2"]
ALIGNPROP += ["--model.truncation.high=3"]


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts, and a run."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lit_align"])
        shutil.copytree(tiny, "model")
        Path("prompts.txt").write_text("\n".join(f"a star number {number}" for number in range(60)))
        main(["fit", *DDPO])
    return folder


@pytest.fixture(autouse=True)
def _in_a_copy(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit_align"])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that changes nothing."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    after = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert after == before
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_checkpoint_is_not_taken_for_one_of_another_model_of_the_same_name(capsys):
    weights = load_file(WEIGHTS)
    save_file({name: value * 1.5 for name, value in weights.items()}, WEIGHTS, {"format": "pt"})
    told = refused(capsys, "test", *DDPO, "--ckpt_path=last")
    assert "the checkpoint was made with another model (base " in told
    assert "--accept_other_base true" in told
    with pytest.warns(UserWarning, match=r"another model \(base "):
        main(["test", *DDPO, "--ckpt_path=last", "--accept_other_base=true"])
    assert (RUN / "test.json").exists()
    mixed = [f"--model.backbone.adapters={{{RUN}/adapter: 0.5}}"]
    with pytest.warns(UserWarning, match="pretrained model, with the adapters or experts that the config"):
        told = refused(capsys, "test", *DDPO, *mixed)
    assert f"{RUN}/adapter was trained over other weights" in told


def test_a_run_does_not_go_on_with_other_prompts_of_the_same_name(capsys):
    before = json.loads((RUN / "validation.json").read_text())
    best = (RUN / "checkpoints" / "best.ckpt").read_bytes()
    Path("prompts.txt").write_text("\n".join(f"a circle number {number}" for number in range(60)))
    more = ["--trainer.max_epochs=2", "--ckpt_path=last"]
    told = refused(capsys, "fit", *DDPO, *more)
    assert "other data (prompts 60 rows " in told
    assert "--accept_other_data true" in told
    main(["test", *DDPO, "--ckpt_path=last"])  # for which other prompts are what is wanted
    with pytest.warns(UserWarning, match=r"other data \(prompts 60 rows "):
        main(["fit", *DDPO, *more, "--accept_other_data=true"])
    after = json.loads((RUN / "validation.json").read_text())
    assert after["metrics"]["reward"]["before"] != before["metrics"]["reward"]["before"]
    assert (RUN / "checkpoints" / "best_00000004.ckpt").read_bytes() == best


def test_a_checkpoint_from_python_does_not_go_on_with_another_method(capsys):
    """It has no settings that could be compared, and its weights fit."""
    content = torch.load(RUN / "checkpoints" / "last.ckpt", weights_only=True)
    del content["callbacks"]["RunConfig"]
    torch.save(content, "python.ckpt")
    told = refused(capsys, "fit", *ALIGNPROP, "--trainer.max_epochs=2", "--ckpt_path=python.ckpt")
    assert "the checkpoint is of DDPOModule, and AlignPropModule counts and optimises differently" in told


def test_a_complete_run_of_another_method_is_told_as_such(capsys):
    told = refused(capsys, "fit", *ALIGNPROP, f"--ckpt_path={RUN}")
    assert "the checkpoint is of DDPOModule, and the configuration of AlignPropModule" in told


def test_a_run_that_another_process_trains_is_left_alone(capsys):
    """Its curves would be cut, and its checkpoints overwritten."""
    read, told = os.pipe()
    sys.stdout.flush()
    if not (child := os.fork()):
        os.write(told, b"1" if Hold().take(RUN) else b"0")
        signal.pause()
    try:
        assert os.read(read, 1) == b"1"
        said = refused(capsys, "fit", *DDPO, "--trainer.max_epochs=2", "--ckpt_path=last")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert f"{RUN} is the folder of a run that another process is training" in said


def test_files_say_of_which_run_they_are():
    identity = torch.load(RUN / "checkpoints" / "last.ckpt", weights_only=True)["identity"]
    assert identity.keys() == {
        *("method", "model", "base", "others", "files"),
        *("sampler", "eval_sampler", "guidance", "seed", "size", "rewards", "data", "held_out", "versions"),
        "reward_contents",
    }
    assert json.loads((RUN / "validation.json").read_text())["run"] == identity
    assert identity["model"] == "model"
    assert identity["rewards"] == {"redness": "Redness x 1"}
