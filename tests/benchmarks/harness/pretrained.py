"""The pretrained models that a plan's configurations start from, measured for themselves, with guidance too.

A pretrained model is known by what decides its images and scores: model, sampler, prompts and rewards.
Configurations that share these, of any plan, share its cells: ``<out>/pretrained/<key>.yaml`` is what was
measured, and beside it lie the results.
"""

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

from lit_align.cli import main as lit_align
from lit_align.errors import ConfigError
from lit_align.files import write
from tests.benchmarks.harness.plan import ROOT, Cell, Plan
from tests.benchmarks.harness.record import stored

FOLDER = "pretrained"
"""Of the results and the runs."""

TUNING_SEED = 11
"""Seed of the validations by which a guidance is chosen; plans report other seeds."""

BATCH = 64
"""Images sampled at once, which changes no result."""

TRAINER = ("accelerator", "devices", "precision")
"""What is taken of the Trainer's options."""

TRAINING = {
    "images_per_prompt",
    "prompts_per_batch",
    "batches_per_epoch",
    "pairs_per_batch",
    "view",
    "resolution",
    "latent_cache",
    "workers",
    "eval_batch",
    "seed",
    "predict_source",
}
"""Options of data modules that change no held-out prompt."""

CHANGES_NOTHING = {"lora", "checkpointing", "compile", "attention", "decode_batch", "prompt_cache"}
"""Options of backbones that change no image of the pretrained model."""


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model as configurations measure it.

    Attributes:
        key: Short hash of the configuration.
        configuration: YAML for ``validate`` and ``test``.
        path: Where that lies.
    """

    key: str
    configuration: str
    path: Path

    def cell(self, guidance: float, seed: int, tunes: bool = False) -> Cell:
        """Its validation with a guidance and, unless that only ``tunes``, its test."""
        inside = self.path.is_relative_to(ROOT)
        place = self.path.relative_to(ROOT) if inside else self.path
        options = (f"--model.init_args.sampling.guidance={guidance:g}", f"--seed_everything={seed}")
        steps = ("validate",) if tunes else ("validate", "test")
        config = f"{self.key}_guidance{guidance:g}{'_tuning' if tunes else ''}"
        return Cell(FOLDER, config, seed, (f"--config={place}", *options), steps=steps)

    def of_sets(self) -> bool:
        """Whether a trained reward scores sets of images, of which none is the best for itself."""
        bank = yaml.safe_load(self.configuration)["model"]["init_args"]["rewards"]["init_args"]
        trained = [bank["rewards"][name] for name, weight in bank["weights"].items() if weight]
        own = [getattr(resolve_name(one["class_path"]), "scope", "sample") for one in trained]
        scopes = [a.get("init_args", {}).get("scope", scope) for a, scope in zip(trained, own, strict=True)]
        return any(scope != "sample" for scope in scopes)

    def tuning(self, plan: Plan) -> list[Cell]:
        """The validations by which a plan chooses the guidance."""
        return [self.cell(guidance, TUNING_SEED, tunes=True) for guidance in plan.guidances]

    def tuned(self, plan: Plan, out: Path) -> dict[float, dict[str, dict[str, float]]]:
        """What the validations with each guidance measured; empty until all have."""
        results = [stored(cell, out) for cell in self.tuning(plan)]
        found = zip(plan.guidances, results, strict=True)
        return {g: one["validation"] for g, one in found if one} if all(results) else {}

    def cells(self, plan: Plan, out: Path) -> list[Cell]:
        """All that is reported of it: without guidance and with the best one, with every seed."""
        best = best_guidance(self.tuned(plan, out))
        guidances = dict.fromkeys([1.0] if best is None else [1.0, best])
        return [self.cell(guidance, seed) for guidance in guidances for seed in plan.seeds]


def best_guidance(tuned: Mapping[float, Mapping[str, Mapping[str, float]]]) -> float | None:
    """The one with the highest truth on the validation split, where that is known, else trained reward."""
    if not tuned:
        return None
    name = "truth" if all("truth" in metrics for metrics in tuned.values()) else "reward"
    known = {g: mean for g, metrics in tuned.items() if (mean := metrics[name]["mean"]) is not None}
    return max(known, key=known.__getitem__) if known else None


def pretrained_of(plan: Plan, out: Path) -> dict[str, Pretrained]:
    """For each configuration the model that it starts from; their files are written.

    Configurations with several tasks have none: each task has rewards and prompts of its own.
    """
    found = {}
    for config in plan.configs if plan.guidances else ():
        *arguments, _ = plan.cells_of(config)[0].arguments  # the last is the seed
        if (content := configuration(arguments)) is None:
            continue
        text = yaml.safe_dump(content, sort_keys=False, width=120)
        key = hashlib.sha256(text.encode()).hexdigest()[:8]
        found[config] = Pretrained(key, text, out.absolute() / FOLDER / f"{key}.yaml")
    for one in distinct(found.values()):
        if not one.path.exists():
            write(one.path, one.configuration)
    return found


def distinct(models: Iterable[Pretrained]) -> list[Pretrained]:
    """Each once."""
    return list({model.key: model for model in models}.values())


def configuration(arguments: Sequence[str]) -> dict[str, Any] | None:
    """What measures the pretrained model of a configuration; None if it has several tasks."""
    given = settings(arguments)
    model, data = given["model"]["init_args"], given["data"]
    if model.get("rewards") is None:
        return None
    backbone = model["backbone"]
    kept = {name: value for name, value in backbone["init_args"].items() if name not in CHANGES_NOTHING}
    lora = {"lora": {"rank": 1}}  # adds nothing before training, and needs no second copy of the model
    sampling = {name: model["sampling"][name] for name in ("seed", "eval_sampler")} | {"batch": BATCH}
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "logs", "name": FOLDER}}
    prompts = {name: value for name, value in data["init_args"].items() if name not in TRAINING}
    return {
        "trainer": {name: given["trainer"][name] for name in TRAINER} | {"logger": logger},
        "model": {
            "class_path": "lit_align.methods.AlignmentModule",
            "init_args": {
                "backbone": backbone | {"init_args": kept | lora},
                "sampler": model["sampler"],
                "rewards": _mixed(model["rewards"], model.get("weights")),
                "sampling": sampling,
            },
        },
        "data": data | {"init_args": prompts},
    }


def _mixed(bank: dict[str, Any], weights: Mapping[str, float] | None) -> dict[str, Any]:
    """The rewards of a configuration; MSDDA has weights of its objectives beside the bank's."""
    if weights is None:
        return bank
    options = bank["init_args"]
    mixed = {name: scale * weights.get(name, 0.0) for name, scale in options["weights"].items()}
    return bank | {"init_args": options | {"weights": mixed}}


def settings(arguments: Sequence[str]) -> dict[str, Any]:
    """All values of a configuration, with the defaults: what ``--print_config`` shows.

    Raises:
        ConfigError: The configuration is none.
    """
    marker = "--config="
    here = [f"{marker}{ROOT / a.removeprefix(marker)}" if a.startswith(marker) else a for a in arguments]
    shown = io.StringIO()
    try:
        with redirect_stdout(shown):
            lit_align(["fit", *here, "--print_config"])
    except SystemExit as ended:
        if isinstance(ended.code, int) and ended.code > 128:  # a signal has ended it
            raise
        if ended.code:
            raise ConfigError(f"{' '.join(arguments)} cannot be read; the reason stands above") from None
    found: dict[str, Any] = yaml.safe_load(shown.getvalue())
    return found
