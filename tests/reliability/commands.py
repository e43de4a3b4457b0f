"""Small runs of every method, through the configurations that are shipped."""

from pathlib import Path

from diffusers import PNDMScheduler

from tests.pipelines import SCHEDULE, make_pipeline

ROOT = Path(__file__).parents[2]

RUNS = "logs/run"
"""Where a command writes its runs, below the folder where it is started."""

EPOCHS, BATCHES = 3, 2
"""Of a run: six rollout batches and four validations."""

LOGGERS = ", ".join(
    f"{{class_path: {name}, init_args: {{save_dir: logs, name: run}}}}"
    for name in ("TensorBoardLogger", "CSVLogger")
)

SMALL = [
    f"--trainer.logger=[{LOGGERS}]",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--model.sampler.num_steps=3",
    "--model.sampler.noisy_steps=2",
    "--model.rewards.rewards={bright: {class_path: Brightness}, red: {class_path: Redness}}",
    "--model.rewards.weights={bright: 10.0, red: 30.0}",
    "--model.optimisation.lr_scheduler=torch.optim.lr_scheduler.LinearLR",
    "--model.optimisation.lr_scheduler.init_args.total_iters=12",
    "--data.validation_prompts=2",
    "--data.validation_images_per_prompt=2",
    "--data.eval_batch=4",
]
SAMPLED = ["--data.prompts_per_batch=4"]
GROUPED = [*SAMPLED, "--data.images_per_prompt=2"]
PAIRS = ["--data.pairs_per_batch=4", "--data.resolution=16"]

METHODS = {
    "ddpo": [*GROUPED, "--model.advantages=PerPromptAdvantages", "--model.kl_target=1e-3"],
    "alignprop": [*SAMPLED, "--model.truncation.high=2"],
    "prdp": GROUPED,
    "nft": [
        *GROUPED,
        "--model.backbone.lora={rank: 4}",
        "--model.old_policy={flat: 1, rate: 0.2}",
        "--model.timesteps=2",
    ],
    "spin": [*PAIRS, "--model.iterations=2", "--model.steps=3"],
    "msdda": [
        *GROUPED,
        "--model.updates=2",
        "--model.experts={bright: null, red: null}",
        "--model.weights={bright: 0.5, red: 0.5}",
        "--model.sweep=null",
    ],
    "dpo": PAIRS,
    "sft": [*PAIRS, "--data.latent_cache=logs/latents"],
}
"""What makes each method's run small, and its state as rich as can be."""


def tiny_model(folder: Path) -> Path:
    """The folder of a model with random weights that draws 16 x 16 pixels; made where it is not there."""
    if not (folder / "model_index.json").exists():
        make_pipeline(PNDMScheduler(**SCHEDULE, skip_prk_steps=True)).save_pretrained(folder)
    return folder


def fit(method: str, model: Path, ranks: int = 1, epochs: int = EPOCHS, batches: int = BATCHES) -> list[str]:
    """Arguments of a small fit.

    Args:
        method: One of :data:`METHODS`.
        model: Folder of the model.
        ranks: Processes.
        epochs: Each ends with a validation.
        batches: Rollout batches, or batches of pairs, in an epoch.
    """
    sizes = [f"--trainer.max_epochs={epochs}", f"--trainer.limit_train_batches={batches}"]
    if PAIRS[0] in METHODS[method]:
        sizes.append(f"--data.batches_per_epoch={batches}")
    return [
        "fit",
        f"--config={ROOT}/configs/{method}.yaml",
        f"--model.backbone.pretrained={model}",
        *SMALL,
        *METHODS[method],
        *sizes,
        f"--trainer.devices={ranks}",
    ]
