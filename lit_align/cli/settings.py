"""What decides the result of a run, and what may change when it resumes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from lit_align.callbacks.run_config import flat
from lit_align.errors import ConfigError

TRAINER = ("precision", "limit_val_batches")
"""Options of the Trainer that change what is measured."""

NO_RESULT = (
    "checkpointing",
    "compile",
    "attention",
    "decode_batch",
    "prompt_cache",
    "micro_batch",
    "workers",
    "offload_text_encoders",
    "store",
    "latent_cache",
)
"""Options that decide time and memory, and no result; and ``sampling.batch``."""

OF_TRAINING = (
    "prompts_per_batch",
    "images_per_prompt",
    "batches_per_epoch",
    "pairs_per_batch",
)
"""Options of the data that held-out images do not depend on."""

OF_POSITION = ("prompts_per_batch", "images_per_prompt", "pairs_per_batch", "seed")
"""Options of the data that decide which prompts or pairs come next."""

OF_OTHER_STAGES = ("test_prompts", "test_images_per_prompt", "test_split", "test_fraction", "predict_source")
"""Options of test and predict. Not ``test_source``: the validation skips its prompts."""


@dataclass
class Changes:
    """Settings that differ between a configuration and a checkpoint.

    Attributes:
        weights: What is trained, and on what: with other values the checkpoint does not fit.
        optimizer: Those of the optimizer and its schedule, whose state is in the checkpoint.
        measurement: What decides the numbers of held-out images.
        other: Everything else.
    """

    weights: list[str] = field(default_factory=list)
    optimizer: list[str] = field(default_factory=list)
    measurement: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide the result, by dotted name.

    Args:
        config: The configuration of a command, as nested mappings.
    """
    trainer = {name: config["trainer"][name] for name in TRAINER}
    parts = {"seed_everything": config["seed_everything"], "trainer": trainer}
    return flat(parts | {"model": config["model"], "data": config["data"]})


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """The settings that differ, sorted by what they decide."""
    found = Changes()
    for name in dict.fromkeys([*saved, *now]):
        old, new = saved.get(name), now.get(name)
        parts = name.split(".")
        if old == new or (name == "model.backbone.pretrained" and _same_model(old, new)):
            continue
        if _is_weights(parts):
            found.weights.append(name)
        elif "optimizer" in parts or "lr_scheduler" in parts or name == "model.lr":
            found.optimizer.append(name)
        elif _is_measured(parts, now) or _is_scored_otherwise(parts, old, new):
            found.measurement.append(name)
        else:
            found.other.append(name)
    return found


def decides_nothing(name: str) -> bool:
    """Whether an option decides time and memory alone."""
    parts = name.split(".")
    return parts[-1] in NO_RESULT or parts[-2:] == ["sampling", "batch"]


def told(names: list[str], saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The old and the new values of some settings."""
    return ", ".join(f"{name} {_short(saved.get(name))} -> {_short(now.get(name))}" for name in names)


def check(found: Changes, saved: Mapping[str, Any], now: Mapping[str, Any], stage: str) -> None:
    """Refuse changes of settings that a checkpoint does not allow.

    Raises:
        ConfigError: With what to set back.
    """
    if found.weights:
        raise ConfigError(
            f"ckpt_path: the checkpoint belongs to another model ({told(found.weights, saved, now)}); set "
            "this back, or give the config.yaml of its run"
        )
    if stage != "fit":
        return
    check_method(saved, now)
    # Of the optimizer the class, and not its values.
    fixed = [n for n in found.optimizer if "lr_scheduler" in n.split(".") or n.endswith("optimizer")]
    if fixed:
        raise ConfigError(
            f"ckpt_path: the kind of the optimizer and the schedule cannot change when a run resumes "
            f"({told(fixed, saved, now)}); set this back, or start a new run"
        )
    if moved := [name for name in (*found.measurement, *found.other) if _is_position(name, now)]:
        raise ConfigError(
            "ckpt_path: what decides the order of the data cannot change when a run resumes "
            f"({told(moved, saved, now)}); set this back, or start a new run"
        )


def check_method(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with another method.

    Raises:
        ConfigError: It is another.
    """
    if (old := saved.get("model")) != (new := now.get("model")):
        raise ConfigError(
            f"ckpt_path: the checkpoint is of {old}, and the configuration of {new}; give the config.yaml of "
            "its run, or start a new run"
        )


def _is_position(name: str, now: Mapping[str, Any]) -> bool:
    if now.get("data") not in ("PromptDataModule", "MultiTaskDataModule", "PickaPicDataModule"):
        return False
    if name == "seed_everything":
        return now.get("data.seed") is None
    return name.startswith("data.") and name.rpartition(".")[2] in OF_POSITION


def _is_weights(parts: list[str]) -> bool:
    free = (*NO_RESULT, "size", "dtype")
    return parts[:2] == ["model", "backbone"] and not (len(parts) > 2 and parts[2] in free)


def _is_measured(parts: list[str], now: Mapping[str, Any]) -> bool:
    if decides_nothing(".".join(parts)):
        return False
    if parts[-1] == "eval_batch":  # a limit on batches makes it a number of images
        return now.get("trainer.limit_val_batches") is not None
    if parts[0] == "data":
        return not any(part in (*OF_TRAINING, *OF_OTHER_STAGES) for part in parts)
    if parts[0] in ("trainer", "seed_everything"):
        return True
    measured = {"rewards", "sampler", "sampling", "backbone"}
    return bool(measured & set(parts))


def _is_scored_otherwise(parts: list[str], old: Any, new: Any) -> bool:
    """Whether the reward is another number: MSDDA's weights, or a task that begins or ends to be trained."""
    if parts[:2] == ["model", "weights"]:
        return True
    return parts[:2] == ["model", "tasks"] and parts[3:] == ["weight"] and bool(old) != bool(new)


def _same_model(old: Any, new: Any) -> bool:
    """Whether two places hold the same model, as far as names say: a folder that was moved or copied."""
    return bool(old and new) and PurePath(str(old)).name == PurePath(str(new)).name


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
