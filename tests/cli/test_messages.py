"""What people get wrong, and what they are told: one message each, with the place and what was meant."""

import sys
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only

from lit_align.cli import main, run
from lit_align.cli.align import AlignCLI
from lit_align.cli.errors import explain
from lit_align.cli.given import Given
from lit_align.rewards import Reward

ROOT = Path(__file__).parents[2]
DDPO = ROOT / "configs" / "ddpo.yaml"
GUARD = "--trainer.callbacks+=lit_align.callbacks.Guard"
BACKBONES = ROOT / "configs" / "backbone"
REDNESS = ROOT / "configs" / "variant" / "redness.yaml"


class Unwritten(Reward):
    """A reward without a forward."""


@pytest.fixture(autouse=True)
def _nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit_align"])
    monkeypatch.setattr(AlignCLI, "instantiate_classes", lambda self: pytest.fail("this was accepted"))


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message that ends a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exited:
        main(list(arguments))
    assert exited.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    last = message[message.rindex("lit_align: ") :].strip()
    assert "\n" not in last
    return last


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--trainer.max_epoch=3"], ["--trainer.max_epoch:", "did you mean --trainer.max_epochs"]),
        (["--trainr.max_epochs=3"], ["--trainr.max_epochs:", "did you mean --trainer.max_epochs"]),
        (["--model.optimization.micro_batch=4"], ["did you mean --model.optimisation.micro_batch"]),
        (["--model.clip_rnge=1"], ["--model.clip_rnge: DDPOModule has no option", "did you mean clip_range"]),
        (
            ["--model.lr=1e-3"],
            ["DDPOModule has no option lr", "did you mean model.optimisation.optimizer.lr?"],
        ),
        (["--model.optimisation.optimizer.lr=fast"], ["optimizer.lr: 'fast' is not a number"]),
        (["--model.optimisation.micro_batch=many"], ["micro_batch: 'many' is not a whole number"]),
        (
            ["--model.optimisation.optimizer.lrr=1"],
            ["optimizer.lrr: AdamW has no option lrr; did you mean lr?"],
        ),
        (["--model.sampler.etaa=1"], ["--model.sampler.etaa: DDIM has no option etaa; did you mean eta?"]),
        (
            ["--model.optimisation.optimizer=torch.optim.SGD", "--model.optimisation.optimizer.momentun=0.9"],
            ["optimizer.momentun: SGD has no option momentun; did you mean momentum?"],
        ),
        (
            ["--model.backbone.size=512x768"],
            ["size: '512x768' is not a whole number or a list, such as [1, 2]"],
        ),
        (["--model.updates=1.5"], ["--model.updates: '1.5' is not a whole number"]),
        (["--trainer.max_epochs=2.0"], ["--trainer.max_epochs: '2.0' is not a whole number"]),
        (
            [GUARD, "--trainer.callbacks.patience=2.5"],
            ["--trainer.callbacks.patience: '2.5' is not a whole number"],
        ),
        ([GUARD, "--trainer.callbacks.patiance=2"], ["--trainer.callbacks.patiance: Guard", "patience"]),
        (["--seed_everything=-1"], ["seed_everything: -1 is not a seed; give 0 to 4294967295"]),
        (["--trainer.max_epochs=0"], ["trainer.max_epochs: 0 leaves nothing to do for fit; give 1 or more"]),
        (["--trainer.limit_train_batches=0"], ["trainer.limit_train_batches: 0 leaves nothing to do"]),
        (["--trainer.val_check_interval=0"], ["trainer.val_check_interval: 0 is not an interval"]),
        (["--trainer.check_val_every_n_epoch=0"], ["trainer.check_val_every_n_epoch: 0 is not an interval"]),
        (["--trainer.val_check_interval=9"], ["9 is never reached in an epoch", "limit_train_batches 8"]),
        (["--model.rewards.weights.clip=high"], ["--model.rewards.weights.clip: 'high' is not a number"]),
        (["--trainer.max_epochs=three"], ["--trainer.max_epochs: 'three' is not a whole number"]),
        (["--trainer.max_epochs"], ["--trainer.max_epochs: a value is missing"]),
        (["--trainer.precision=fp16"], ["'fp16' is not possible; did you mean bf16"]),
        (["--model.backbone.checkpointing=block"], ["'block' is not possible; did you mean blocks?"]),
        (["--model=DDPOModul"], ["--model: no class DDPOModul is known; did you mean DDPOModule"]),
        (["--model.sampler=DDMI"], ["--model.sampler: no class DDMI is known; did you mean DDIM?"]),
        (["--model.advantages=GroupAdvantage"], ["did you mean GroupAdvantages"]),
        (["--data=PromptDataModul"], ["--data: no class", "did you mean PromptDataModule"]),
        (["--data.source=TextPrompt"], ["did you mean TextPrompts"]),
        (["--data.source=TextPrompts"], ["--data.source: TextPrompts needs path"]),
        (
            ["--data.source", "../my prompts.txt"],
            [
                "--data.source: ../my prompts.txt is a file",
                "--data.source TextPrompts --data.source.path ../my p",
            ],
        ),
        (
            ["--data.validation_source=p.csv"],
            ["give --data.validation_source CSVPrompts --data.validation_s"],
        ),
        (["--model.backbone=some/model"], ["give a model as --model.backbone.pretrained some/model"]),
        (["--trainer.logger=TensorboardLogger"], ["did you mean TensorBoardLogger?"]),
        (["--trainer.callbacks+=lit_align.callbacks.RunFolder"], ["RunFolder is for Python; on the command"]),
        (["--trainer.min_epochs=5"], ["trainer.min_epochs: 5 is more than max_epochs, ", "give at most 3"]),
        (["--trainer.log_every_n_steps=-1"], ["log_every_n_steps: -1 is not an interval; give 1"]),
        (["--trainer.callbacks+=EarlyStoping"], ["did you mean EarlyStopping?"]),
        (["--model.rewards.rewards.x=Nothing"], ["no class Nothing is known; give its import path"]),
        (["--model.rewards.rewards.x=mine.Red"], ["mine.Red cannot be imported; there is no module mine"]),
        (
            ["--model.optimisation.optimizer=nowhere.optim.Adam8bit"],
            [
                "--model.optimisation.optimizer: nowhere.optim.Adam8bit cannot",
                "no module nowhere",
                "pip install",
            ],
        ),
        (["--model.sampling.eval_sampler=nowhere.Fast"], ["eval_sampler: nowhere.Fast cannot be imported"]),
        (["--model.optimisation.optimizer=transformers.Adafactr"], ["did you mean Adafactor?"]),
        (
            ["--model.optimisation={optimizer: {class_path: nowhere.Adam}}"],
            ["--model.optimisation.optimizer: nowhere.Adam cannot be imported"],
        ),
        (
            [
                "--model.optimisation.optimizer=transformers.Adafactor",
                "--model.optimisation.optimizer.eps=1e-8",
            ],
            ["optimizer.eps: 1e-08 is one value", "(1e-30, 0.001) if nothing is given"],
        ),
        (["--model.backbone.lora.rnk=4"], ["LoRA has no option rnk; did you mean rank?"]),
        (["foo"], ["foo: options begin with --"]),
        (["--trainer.accumulate_grad_batches=2"], ["model.optimisation.micro_batch"]),
        (["--trainer.gradient_clip_val=1.0"], ["model.optimisation.clip_norm"]),
        (["--model.sampler=ddim"], ["--model.sampler: no class ddim is known; did you mean DDIM?"]),
        (["--model.optimisation.optimizer=adamw"], ["no class adamw is known; did you mean AdamW?"]),
        (["--trainer.logger=wandb"], ["no class wandb is known; did you mean WandbLogger?"]),
        (["--trainer.max_time=1h"], ["trainer:", "'1h'", "DD:HH:MM:SS"]),
        (["--trainer.limit_val_batches=1.5"], ["trainer:", "1.5 for limit_val_batches"]),
        (["--trainer.logger.save_dir=s3://bucket/x"], ["s3:/bucket/x/ddpo is an address", "mounted one"]),
        (["--trainer.overfit_batches=1"], ["would use other prompts in each epoch", "a file of a few"]),
        (["--trainer.barebones=true"], ["trainer.barebones: true switches off the output"]),
        (
            ["--trainer.callbacks+=EMAWeightAveraging"],
            ["trainer.callbacks: EMAWeightAveraging keeps a copy of all models"],
        ),
        (
            ["--trainer.callbacks+=LearningRateFinder"],
            ["LearningRateFinder trains on the run's prompts before it begins; take it out"],
        ),
        (["--trainer.accelerator=cuda"], ["trainer:", "accelerator"]),
        (["--trainer.strategy=ddpp"], ["trainer:", "ddpp"]),
        (["--trainer.precision=64-true"], ["trainer.precision: 64-true would round"]),
        (["--ckpt_path=nowhere.ckpt"], ["there is no nowhere.ckpt", "'last'"]),
        (["--ckpt_path=last"], ["'last' finds no run under logs/ddpo"]),
        (["--ckpt_path="], ["ckpt_path: it is empty, as by a variable that is not set"]),
        (["--ckpt_path=."], ["is a folder, and not that of a run"]),
        (["--model=AlignPropModule"], [f"start from {DDPO.with_name('alignprop.yaml')}"]),
        (
            [f"--model.rewards.rewards={{it: {__name__}.Unwritten}}"],
            ["--model.rewards.rewards: Unwritten lacks forward, which Reward asks for; write it"],
        ),
        (["--config=nowhere.yaml"], ["--config nowhere.yaml: there is no such file"]),
        ([f"--config={DDPO.with_name('dppo.yaml')}"], [f"did you mean {DDPO.with_name('d')}"]),
        ([f"--config={ROOT / 'configs'}"], ["this is a folder", "ddpo.yaml"]),
    ],
    ids=lambda value: value[-1][-40:] if isinstance(value, list) else "",
)
def test_a_mistake_on_the_command_line(arguments, parts, capsys):
    message = told(capsys, "fit", "--config", str(DDPO), *arguments)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("trainer:\n  max_epoch: 3\n", ["line 2: trainer.max_epoch:", "did you mean trainer.max_epochs"]),
        ("trainr:\n  max_epochs: 3\n", ["line 2: trainr.max_epochs:", "did you mean trainer?"]),
        ("clip_range: 1.0e-3\n", ["line 1: clip_range:", "did you mean model.clip_range?"]),
        (
            "model:\n  init_args:\n    clip_rnge: 1\n",
            ["line 3: model.clip_rnge:", "did you mean clip_range?"],
        ),
        ("model:\n  init_args:\n    lr: 1\n", ["line 3: model.lr:", "model.optimisation.optimizer.lr?"]),
        (
            "model:\n  init_args:\n    optimisation:\n      optimizer:\n        init_args: {lr: fast}\n",
            ["line 5: model.optimisation.optimizer.lr: 'fast' is not a number"],
        ),
        (
            "model:\n  init_args:\n    optimizer:\n      init_args: {lr: fast}\n",
            ["line 4: model.optimizer.lr: 'fast' is not a number"],
        ),
        ("model:\n  init_args:\n    sampler: DDMI\n", ["line 3: model.sampler:", "did you mean DDIM?"]),
        (
            "data:\n  init_args:\n    image_per_prompt: 3\n",
            ["line 3: data.image_per_prompt: PromptDataModule has no option", "images_per_prompt"],
        ),
        ("model:\n  init_args:\n    sampling: {guidance: [1, 2]}\n", ["line 3: model.sampling.guidance"]),
        (
            "data:\n  init_args:\n    source: p.txt\n",
            ["line 3: data.source: p.txt is a file, and not the class"],
        ),
        ("model:\n  backbone:\n    variant: no\n", ["variant: 'False' is not text", "put it in quotes"]),
        (
            "model:\n  init_args:\n    rewards:\n      init_args:\n        rewards: [CLIPScore]\n",
            ["line 5: model.rewards.rewards:", "is not a mapping"],
        ),
        (
            "model:\n  init_args:\n    optimisation:\n      optimizer: {class_path: nowhere.Adam}\n",
            [
                "line 4: model.optimisation.optimizer: nowhere.Adam cannot be imported",
                "no module nowhere",
            ],
        ),
        (
            "model:\n  init_args:\n    rewards:\n      init_args:\n        rewards:\n          mine:\n"
            "            class_path: nowhere.Red\n",
            ["line 7: model.rewards.rewards.mine: nowhere.Red cannot be imported"],
        ),
        (
            "trainer:\n  callbacks+:\n    - class_path: lit_align.callbacks.Guard\n"
            "      init_args: {patience: three}\n",
            ["line 4: trainer.callbacks.patience: 'three' is not a whole number"],
        ),
        (
            "model:\n  init_args:\n    optimisation:\n      optimizer:\n        init_args: {lrr: 1}\n",
            ["line 5: model.optimisation.optimizer.lrr: AdamW has no option lrr; did you mean lr?"],
        ),
        (
            "model:\n  init_args:\n    guidance: 3.0\n    sampling: {guidance: 2.0}\n",
            ["line 3: model.guidance is now model.sampling.guidance, which line 4 gives too; take"],
        ),
        ("model:\n  class_path: AlignPropModule\n", ["start from", "alignprop.yaml"]),
        ("trainer:\n  max_epochs:3\n", ["line 2: trainer:", "a space after the colon"]),
        ("trainer:\n\tmax_epochs: 3\n", ["line 2: a tab"]),
        ("trainer:\n  max_epochs: 3\n devices: 1\n", ["line 3: not valid YAML", "indentation"]),
        ("data:\n  init_args: {path: 'a.txt}\n", ["line 2: not valid YAML"]),
        ("trainer:\n  devices: 1\ntrainer:\n  max_epochs: 2\n", ["line 3: trainer stands in line 1 already"]),
        ("trainer: {devices: 1, devices: 2}\n", ["line 1: devices stands in line 1 already"]),
        ("- a\n", ["has the sections trainer, model and data"]),
        ("", ["has the sections trainer, model and data"]),
        ("\x00", ["not a text file"]),
        (
            "model: {init_args: {rewards: {init_args: {weights: {on: 1}}}}}\n",
            ["line 1: YAML does not read 'on' as a name; put it into quotes"],
        ),
    ],
    ids=range(29),
)
def test_a_mistake_in_a_file(text, parts, capsys):
    Path("mine.yaml").write_text(text)
    message = told(capsys, "fit", "--config", str(DDPO), "--config", "mine.yaml")
    assert "mine.yaml" in message or parts[0] == "start from"
    for part in parts:
        assert part in message


def test_a_process_that_is_numbered_and_alone(capsys, monkeypatch):
    """As by a variable that is left of another program: it would write no curves and end in a traceback."""
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    monkeypatch.setattr(run, "SECOND", 0.0)
    assert "says that this is process 3 of several (RANK, " in told(capsys, "fit", "--config", str(DDPO))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_command_that_would_do_nothing(stage, capsys):
    option = f"limit_{stage.removesuffix('idate')}_batches"
    message = told(capsys, stage, "--config", str(DDPO), f"--trainer.{option}=0")
    assert f"trainer.{option}: 0 leaves nothing to do for {stage}" in message


def test_a_misspelt_truncation_is_met_with_the_nearest(capsys):
    alignprop = f"--config={DDPO.with_name('alignprop.yaml')}"
    assert "did you mean LowVariance" in told(capsys, "fit", alignprop, "--model.truncation=LowVarianz")


@pytest.mark.parametrize(
    ("method", "overlay", "other"),
    [
        ("ddpo", "variant/draft_k", "configs/alignprop.yaml"),
        ("nft", "variant/flow_grpo", "configs/ddpo.yaml"),
        ("nft", "backbone/sd15", f"configs/ddpo.yaml; nft.yaml takes {BACKBONES / 'sd15_any.yaml'}"),
        ("dpo", "backbone/sd15", f"configs/ddpo.yaml; dpo.yaml takes {BACKBONES / 'sd15_pairs.yaml'}"),
    ],
)
def test_an_overlay_for_another_configuration(method, overlay, other, capsys):
    files = [ROOT / "configs" / f"{method}.yaml", ROOT / "configs" / f"{overlay}.yaml"]
    message = told(capsys, "fit", *(f"--config={file}" for file in files))
    assert f"{overlay}.yaml, line " in message
    assert message.endswith(f"; this is an overlay for {other}")


def test_a_class_of_another_kind_is_met_with_those_that_fit(capsys):
    ddpo, pairs = f"--config={DDPO}", f"--config={BACKBONES / 'sd15_pairs.yaml'}"
    advantages = "DDIM is not possible here; it may be BatchAdvantages, GroupAdvantages, PerPromptAdvantages"
    assert told(capsys, "fit", ddpo, "--model.advantages=DDIM").endswith(advantages)
    message = told(capsys, "fit", ddpo, pairs)
    assert "line 32: data.source: PickaPicFiles is not possible here; it may be " in message
    assert "TextPrompts" in message
    assert "PromptSource" not in message  # abstract
    message = told(capsys, "fit", ddpo, "--data=TextPrompts")
    assert message.endswith("TextPrompts is not possible here; it is a class of lit_align.data")


def test_an_option_before_a_file_that_overrules_it_is_told(capsys):
    Path("later.yaml").write_text(
        "trainer: {max_epochs: 9, devices: 1}\nmodel: {init_args: {updates: 1, kl_target: 1.0e-3}}\n"
    )
    options = [
        "--trainer.max_epochs",
        "2",
        "--model.updates=1",
        "--model.kl_target=1e-3",
        "--trainer.devices=1",
    ]
    with pytest.warns(
        UserWarning, match=r"max_epochs 2 stands before --config later.yaml, whose 9 wins"
    ) as told_of:
        told(capsys, "fit", "--config", str(DDPO), *options, "--config=later.yaml", "--trainer.devices=0")
    assert len([one for one in told_of if "stands before" in str(one.message)]) == 1


def test_a_reward_that_is_named_by_its_file(capsys, monkeypatch):
    Path("mine.py").write_text("")
    monkeypatch.syspath_prepend(".")
    message = told(capsys, "fit", "--config", str(DDPO), "--model.rewards.rewards.x=mine.py")
    assert "mine.py is a file; give the import path of a class in it, such as mine.CLASS" in message


def test_an_overlay_without_a_configuration_before_it(capsys):
    meant = f"--config configs/ddpo.yaml --config {REDNESS}"
    assert f"is an overlay: give a configuration before it, as in {meant}" in told(
        capsys, "fit", "--config", str(REDNESS)
    )
    message = told(capsys, "fit", "--config", str(REDNESS), "--config", str(DDPO))
    assert f"comes after the configuration: --config {DDPO} --config {REDNESS}" in message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["fit"], "no configuration: give one, as in --config configs/ddpo.yaml"),
        (["fit", "--confg", "x.yaml"], "--confg: there is no such option; did you mean --config?"),
        (["ft", "--config", str(DDPO)], "there is no command ft; did you mean fit?"),
        (["exprt", "logs"], "there is no command exprt; did you mean export or report?"),
        (["--config", str(DDPO), "fit"], "--config: options stand after the command, fit"),
        (["--rewards", "bank.yaml", "serve"], "--rewards: options stand after the command, serve"),
        (["--print_config"], "--print_config: there is no command; give one first"),
    ],
)
def test_a_command_without_a_configuration(arguments, part, capsys):
    assert part in told(capsys, *arguments)


def test_commands_are_known_however_python_lists_them():
    for listed in ("fit, test", "'fit', 'test'"):
        said = explain(ValueError(f"invalid choice: 'ft' (choose from {listed})"), Given((), ["ft"]))
        assert said == "there is no command ft; did you mean fit?"


def test_a_mistake_in_a_section_for_a_command_is_told_as_such(capsys):
    Path("sections.yaml").write_text("fit: {trainer: {max_epochs: many}}\n")
    message = told(capsys, "--config", "sections.yaml", "fit")
    assert "max_epochs" in message
    assert "after the command" not in message
