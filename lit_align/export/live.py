"""The model of a run as it was trained, from the run's folder."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jsonargparse import ArgumentError, ArgumentParser

from lit_align.backbones import POLICY, DiffusersBackbone
from lit_align.callbacks.run_config import flat
from lit_align.errors import ConfigError
from lit_align.files import numbered, read_config
from lit_align.identity import ADAPTER, read_stamp

SET = "exported"
"""The weight set that is exported."""

IN_FLOAT32 = {"dtype": "float32", "compile": False, "checkpointing": "none", "offload_text_encoders": False}
"""Options under which a model is compared: half precision would hide what an export loses."""


@dataclass(frozen=True)
class Run:
    """What is known of a run from its folder.

    Attributes:
        folder: The run's.
        weights: Its ``adapter/``, a folder within, or a checkpoint.
        config: Its newest configuration, or that with which the checkpoint was made.
        identity: What the checkpoint says of the run; empty where the weights are none.
        progress: Its counters, and what was measured of it; empty too.
    """

    folder: Path
    weights: Path
    config: dict[str, Any]
    identity: Mapping[str, Any] = field(default_factory=dict)
    progress: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> dict[str, Any]:
        """The options of its method."""
        settings: dict[str, Any] = self.config["model"]["init_args"]
        return settings

    @property
    def backbone(self) -> dict[str, Any]:
        """The options of its backbone."""
        settings: dict[str, Any] = self.model["backbone"]["init_args"]
        return settings

    @property
    def facts(self) -> dict[str, Any]:
        """What the weights say of themselves: the base model's hash, the number of images and the like."""
        if self.progress:
            return {**self.identity, "images": self.progress["images"]}
        return read_stamp(self.weights) or {}

    @property
    def is_soup(self) -> bool:
        """Whether the weights are the soup of experts that the run fuses: an approximation."""
        return any(self.weights.glob(f"*/{ADAPTER}"))

    @property
    def is_policy(self) -> bool:
        """Whether the weights are what validations and tests measure: no expert, nor the soup of experts."""
        return not self.is_soup and self.folder / "adapter" not in self.weights.parents


@dataclass(frozen=True)
class Live:
    """A model in memory, ready to be exported.

    Attributes:
        backbone: With the weight set :attr:`name`.
        runs: Where it comes from, and the weight of each.
        name: The weight set.
        whole: Whether all weights were trained, and no adapter.
    """

    backbone: DiffusersBackbone
    runs: Sequence[tuple[Run, float]]
    name: str
    whole: bool

    @property
    def mixed(self) -> bool:
        """Whether it is a mixture of several runs, or of one with a weight other than 1."""
        return [weight for _, weight in self.runs] != [1.0]


def read_run(path: Path) -> Run:
    """The run that a path belongs to.

    Args:
        path: A run's folder, its ``adapter/`` or a folder within, or a checkpoint of it.

    Raises:
        ConfigError: There is no such run, or it was not started from the command line.
    """
    if not path.exists():
        raise ConfigError(f"export: there is no {path}; give the folder of a run")
    folder = next((one for one in (path, *path.parents) if (one / "config.yaml").is_file()), None)
    if folder is None:
        raise ConfigError(
            f"export: {path} is not in a folder with a config.yaml, which names the model of a run; from "
            "Python use backbone.weight_sets.save and save_merged"
        )
    weights = path / "adapter" if path == folder else path
    if not weights.exists():
        raise ConfigError(f"export: {folder} has no adapter/ yet; give a checkpoint of it")
    configs = [_read_config(file) for file in reversed(numbered(folder / "config.yaml"))]
    if weights.suffix != ".ckpt":
        return Run(folder, weights, configs[0])
    saved = _read(weights)
    try:
        progress, identity = dict(saved["progress"]), dict(saved.get("identity", {}))
        settings = dict(saved.get("callbacks", {}).get("RunConfig", {}).get("settings", {}))
        int(progress["images"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _no_checkpoint(weights) from None
    config = next((one for one in configs if _flat(one) == _of_model(settings)), configs[0])
    return Run(folder, weights, config, identity, progress)


def _read_config(file: Path) -> dict[str, Any]:
    """A configuration that says what the model is."""
    config: Any = read_config(file)
    try:
        dict(config["model"]["init_args"]["backbone"]["init_args"])["pretrained"]
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"export: {file} does not say what the model is; put back what the run wrote"
        ) from None
    return dict(config)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return _of_model(flat({name: config[name] for name in ("model", "data") if name in config}))


def _of_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's settings by dotted name those that a model card tells."""
    return {name: value for name, value in settings.items() if name.partition(".")[0] in ("model", "data")}


def _read(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds; its tensors stay on disk until they are used."""
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch raises whatever the bytes lead to
        raise _no_checkpoint(checkpoint) from None
    if not isinstance(content, dict):
        raise _no_checkpoint(checkpoint)
    return content


def _no_checkpoint(path: Path) -> ConfigError:
    return ConfigError(f"export: {path} is not a checkpoint of lit_align, or not whole")


def mixture_of(runs: Sequence[Run], weights: Sequence[float], device: str = "cpu") -> Live:
    """The model of one run, or the mixture of several, linear in the updates.

    Raises:
        ConfigError: They have different base models, or one cannot be mixed, or a weight is none.
    """
    first = runs[0]
    if not all(map(math.isfinite, weights)) or not any(weights):
        said = " ".join(f"{weight:g}" for weight in weights)
        raise ConfigError(f"export: --weights {said} make no mixture; give numbers, of which one is not 0")
    for run in runs[1:]:
        if run.backbone["pretrained"] != first.backbone["pretrained"]:
            raise ConfigError(
                f"export: {run.folder} has the base model {run.backbone['pretrained']}, and {first.folder} "
                f"has {first.backbone['pretrained']}; mix adapters of one model"
            )
    whole = any(run.backbone.get("lora") is None for run in runs)
    sources = list(zip(runs, weights, strict=True))
    mixed = [*weights] != [1.0]
    if whole and mixed:
        raise ConfigError("export: a run that trained all weights is a whole model; mixtures are of adapters")
    if any(run.weights.suffix == ".ckpt" for run in runs):
        if mixed:
            raise ConfigError("export: mixtures are made of the adapter/ folders of runs, not of checkpoints")
        backbone = _build(first, {}).to(device)
        _check_base(backbone, runs)
        _take(backbone, first.weights)
        return Live(backbone, sources, POLICY, whole)
    if whole:
        _check_pipeline(first)
        backbone = _build(first, {"pretrained": str(first.weights), "config": None, "variant": None})
        return Live(backbone.to(device), sources, POLICY, whole)
    backbone = _build(first, {"adapters": None})
    _check_base(backbone, runs)
    for number, run in enumerate(runs):
        backbone.weight_sets.load(f"run{number}", run.weights)
    backbone.weight_sets.mix(SET, {f"run{number}": weight for number, weight in enumerate(weights)})
    return Live(backbone.to(device), sources, SET, whole)


def _check_pipeline(run: Run) -> None:
    """Refuse the folder of experts that are whole models, of which there is no soup.

    Raises:
        ConfigError: With the expert that can be given.
    """
    if (inner := next(run.weights.glob(f"*/{DiffusionPipeline.config_name}"), None)) is not None:
        raise ConfigError(
            f"export: {run.weights} holds experts that are whole models, which cannot be one: give one of "
            f"them, such as {inner.parent}"
        )


def _check_base(backbone: DiffusersBackbone, runs: Sequence[Run]) -> None:
    """Refuse a base model that has other weights than the one under a run.

    Raises:
        ConfigError: It has.
    """
    now = backbone.weight_sets.base_hash
    for run in runs:
        if (then := run.facts.get("base")) not in (None, now):
            raise ConfigError(
                f"export: {run.weights} was trained over other weights ({then}) than those now in "
                f"{run.backbone['pretrained']} ({now}); put the old ones back"
            )


def _build(run: Run, changes: Mapping[str, Any]) -> Any:
    options = run.backbone | {k: v for k, v in IN_FLOAT32.items() if k in run.backbone} | dict(changes)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DiffusersBackbone, "backbone")
    given = {"class_path": run.model["backbone"]["class_path"], "init_args": options}
    try:
        config = parser.parse_object({"backbone": given})
    except ArgumentError:
        raise ConfigError(
            f"export: the backbone of {run.folder}, {given['class_path']}, cannot be made; run the command "
            "where its module is, with the version of lit_align that trained it"
        ) from None
    return parser.instantiate(config).backbone


def _take(backbone: DiffusersBackbone, checkpoint: Path) -> None:
    """Give the policy the weights of a checkpoint."""
    state = _read(checkpoint).get("state_dict", {})
    own = set(backbone.weight_sets.parameters_of(POLICY))
    for name, parameter in backbone.named_parameters():
        if parameter in own:
            saved = state.get(f"backbone.{name}")
            if saved is None or saved.shape != parameter.shape:
                raise ConfigError(
                    f"export: {checkpoint} does not hold the policy's {name}; export the adapter/ of its "
                    "run, or that of an expert in there"
                )
            parameter.data.copy_(saved)
