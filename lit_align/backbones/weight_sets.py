"""Named weight sets of one network: the policy, its reference, an opponent, experts and their mixtures."""

import math
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lit_align.backbones.adapters import Adapters, LoRA, whole
from lit_align.errors import ConfigError, user_path
from lit_align.identity import read_stamp, weights_hash
from lit_align.pretrained import loading
from lit_align.shapes import FLOW_PIPELINE, FLOW_WEIGHTS_HASH, PIPELINE, WEIGHTS_HASH

POLICY = "policy"
"""The weight set that is trained."""

REFERENCE = "reference"
"""The weight set of the pretrained model."""

BUNDLED = {str(PIPELINE): WEIGHTS_HASH, str(FLOW_PIPELINE): FLOW_WEIGHTS_HASH}
"""The folders of the bundled models, and the hashes of their files."""


def _name(config: Mapping[str, Any]) -> str:
    """What a pipeline's model is called: the id on the hub, or the name of its folder."""
    place = str(config.get("_name_or_path") or "")
    if place in BUNDLED:
        return f"shapes {BUNDLED[place]}"
    return Path(place).name if Path(place).exists() else place


class WeightSets(nn.Module):
    """The denoiser of a pipeline and its weight sets by name.

    With LoRA a set is an adapter over shared frozen weights, or a mixture of several, and the reference is
    the network without one. Without LoRA the policy is the network itself and every other set a copy of it.
    A whole model that was loaded is a copy in both cases.

    Which parameters require gradients is decided once, by :meth:`train_only`. Choosing a set for a prediction
    changes what the next forward computes and nothing else.

    Attributes:
        networks: The policy's network, and those of the sets that have their own.
        chosen: The set that :meth:`choose` switched on last.
        model: The pretrained model's name.
        base_hash: Of the pretrained denoiser (see :func:`~lit_align.identity.weights_hash`).
        file_hashes: Of what was loaded besides, adapters and whole models, by set.
        stamps: What those files say of the runs that wrote them, by their paths.
        trained: Whether a fit of a module with these sets has begun.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        part: str,
        lora: LoRA | None,
        adapters: Mapping[str, float],
        prepare: "Callable[[nn.Module, WeightSets], None]",
    ) -> None:
        """Make the policy and its reference, and train the policy.

        Args:
            pipeline: A diffusers pipeline.
            part: Name of its denoiser, ``unet`` or ``transformer``.
            lora: The adapter that is trained, or null to train all weights.
            adapters: Adapters, by folder or file, and their weights: the policy starts as their mixture.
            prepare: Called once with every network that is held here, and with this object.

        Raises:
            ConfigError: An adapter cannot be loaded, or no layer matches ``lora.target_modules``.
        """
        super().__init__()
        self.networks = nn.ModuleDict()
        self.chosen = POLICY
        self._pipeline: Any = pipeline
        self._part = part
        self._prepare = prepare
        self._lora = lora
        self._names = [POLICY, REFERENCE]
        self._start: dict[str, float] = {}
        self.file_hashes: dict[str, str] = {}
        self.stamps: dict[str, dict[str, Any]] = {}
        self.trained = False
        network = getattr(pipeline, part)
        self._network_class: Any = type(network)  # kept, because FSDP replaces it
        self._adapters = Adapters(network, type(pipeline), part)
        self.model = _name(pipeline.config)
        self.base_hash = weights_hash(network.named_parameters())
        if lora is None:
            self._hold(POLICY, network)
            self._hold(REFERENCE, deepcopy(network))
        else:
            self._adapters.mix(REFERENCE, {})
            self._adapters.add(POLICY, lora)
            self._hold(POLICY, network)
        self._start_from(adapters)
        self.train_only([POLICY])

    @property
    def names(self) -> tuple[str, ...]:
        """The names that ``weights=`` accepts."""
        return tuple(self._names)

    def _hold(self, name: str, network: nn.Module) -> None:
        self.networks[name] = network.requires_grad_(False).eval()
        self._prepare(network, self)

    def _start_from(self, adapters: Mapping[str, float]) -> None:
        """Let the policy, and what is copied from it, start from a mixture of frozen adapters."""
        if not adapters:
            return
        if self._lora is None:
            raise ConfigError("adapters: they need lora; give its settings, or take adapters out")
        for number, (path, weight) in enumerate(adapters.items()):
            if not math.isfinite(weight):
                raise ConfigError(f"adapters: the weight of {path} is {weight}; give a finite number")
            self._adapters.load(f"_start{number}", user_path(path))
            self._start[f"_start{number}"] = weight
            self._remember(f"_start{number}", path)
            self.file_hashes[f"_start{number}"] += f" x {weight:g}"
        self._adapters.mix(POLICY, {POLICY: 1.0} | self._start)

    def choose(self, name: str) -> Any:
        """The network with one set switched on; only what the next forward computes is changed."""
        assert name in self._names, f"no weight set {name!r} among {self._names}"
        self.chosen = name
        if name not in self._adapters:
            return self.networks[name]
        self._adapters.choose(name)
        return self.networks[POLICY]

    # ---- making sets

    def add(self, name: str) -> None:
        """Add a frozen set that starts as a copy of the policy; one that is there starts anew."""
        if name not in self._names:
            if self._lora is None:
                self._hold(name, deepcopy(self.networks[POLICY]))
            else:
                self._adapters.add(name, self._lora)
                self._adapters.mix(name, {name: 1.0} | self._start)
            self._names.append(name)
        self.copy(POLICY, name)

    def copy(self, source: str, target: str) -> None:
        """Overwrite the set ``target``, an added one, with the values of ``source``."""
        assert target not in (POLICY, REFERENCE), f"{target!r} is not a set to overwrite"
        with torch.no_grad():
            for old, new in zip(self.parameters_of(target), self.parameters_of(source), strict=True):
                old.copy_(new)

    def follow(self, source: str, target: str, decay: float) -> None:
        """Let an added set follow another: ``target <- decay target + (1 - decay) source``.

        Adapters are averaged factor by factor, as where a moving average is taken of what is trained.
        """
        assert target not in (POLICY, REFERENCE), f"{target!r} is not a set to overwrite"
        assert 0 <= decay <= 1, f"{decay} is not a share"
        with torch.no_grad():
            for old, new in zip(self.parameters_of(target), self.parameters_of(source), strict=True):
                old.lerp_(new.to(old.dtype), 1 - decay)

    def load(self, name: str, folder: Path) -> None:
        """Add a frozen set from an adapter's folder or file, or from a pipeline's folder.

        Raises:
            ConfigError: There is none, or not one for this model, or the name is taken.
        """
        if name in self._names:
            raise ConfigError(f"{folder}: the backbone has weights {name!r} already; give a new backbone")
        if (folder / "model_index.json").is_file():
            self._hold(name, self._load_network(folder))
        elif self._lora is None:
            raise ConfigError(f"{folder} holds an adapter, which needs lora; give its settings")
        else:
            self._adapters.load(name, folder)
        self._names.append(name)
        self._remember(name, str(folder))

    def _remember(self, name: str, path: str) -> None:
        """Keep what tells loaded weights from others, while nothing is sharded."""
        if (stamp := read_stamp(Path(path).expanduser())) is not None:
            self.stamps[path] = stamp
        own = enumerate(self.parameters_of(name))
        self.file_hashes[name] = weights_hash((f"{number:06d}", weights) for number, weights in own)

    def _load_network(self, folder: Path) -> nn.Module:
        dtype = next(self.networks[POLICY].parameters()).dtype
        with loading(str(folder)):
            network: nn.Module = self._network_class.from_pretrained(
                folder, subfolder=self._part, use_safetensors=True, dtype=dtype
            )
        return network

    def mix(self, name: str, weights: Mapping[str, float]) -> None:
        """Make (or replace) the frozen set whose update of the reference is the weighted sum of others'.

        Raises:
            ConfigError: One of them is a whole model.
        """
        self._refuse_whole(weights)
        self._adapters.mix(name, weights)
        if name not in self._names:
            self._names.append(name)

    def average_factors(self, name: str, weights: Mapping[str, float]) -> None:
        """As :meth:`mix`, for an added set, but with the means of the adapters' factors.

        Raises:
            ConfigError: One is a whole model, or ranks, scales and layers differ.
        """
        self._refuse_whole(weights)
        self._adapters.average_factors(name, weights)

    def _refuse_whole(self, names: Collection[str]) -> None:
        if models := [name for name in names if name not in self._adapters]:
            raise ConfigError(
                f"{models[0]} is a whole model, and mixtures are made of adapters; give adapters"
            )

    # ---- training and files

    def train_only(self, names: Collection[str]) -> None:
        """Decide, once and before training, which sets are trained; all others are frozen."""
        self._learners = tuple(names)
        trained = {parameter for name in names for parameter in self.parameters_of(name)}
        for parameter in self.networks.parameters():
            parameter.requires_grad_(parameter in trained)

    def check_frozen(self, *models: nn.Module) -> None:
        """Refuse to train more of some models than :meth:`train_only` said, or nothing.

        Raises:
            ConfigError: ``requires_grad`` was changed since.
        """
        decided = {parameter for name in self._learners for parameter in self.parameters_of(name)}
        trained = {p for model in models for p in model.parameters() if p.requires_grad}
        if decided and (not trained or trained - decided):
            raise ConfigError(
                f"requires_grad: {sum(p.numel() for p in trained):,} weights would be trained, and not the "
                f"{sum(p.numel() for p in decided):,} of {', '.join(self._learners)}, as by module.freeze() "
                "or unfreeze(); call module.freeze() and module.backbone.weight_sets.train_only("
                f"{list(self._learners)}), or build a module with lora null to train all weights"
            )

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """The parameters that belong to one set alone."""
        if name in self._adapters:
            return self._adapters.parameters([name])
        return list(self.networks[name].parameters())

    def save(self, folder: Path | None, name: str = POLICY) -> None:
        """Write a set in the form that diffusers loads: an adapter, or a pipeline folder.

        Args:
            folder: Where; null on a process that only gives its shards. All processes must call.
            name: The set.
        """
        if name in self._adapters:
            self._adapters.save(folder, name)
            return
        network: Any = self.networks[name]
        if isinstance(self.networks[name], FSDPModule):
            parameters = {key: whole(value).cpu() for key, value in network.state_dict().items()}
            network = self._plain_network(parameters)
        if folder is not None:
            self._save_pipeline(folder, network)

    def save_merged(self, folder: Path, name: str = POLICY) -> None:
        """Write a set as a pipeline folder without adapters: their updates are in the weights."""
        if name not in self._adapters:
            self.save(folder, name)
        else:
            self._save_pipeline(folder, self._plain_network(self._adapters.merged(name)))

    def factors(self, name: str = POLICY) -> dict[str, Tensor]:
        """``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight`` of a set that is adapters: it adds ``B A``.

        Raises:
            ConfigError: It is a whole model.
        """
        self._refuse_whole([name])
        return self._adapters.factors(name)[0]

    def _plain_network(self, parameters: Mapping[str, Tensor]) -> Any:
        network = self._network_class.from_config(self.networks[POLICY].config)
        network.load_state_dict(parameters)
        return network.to(next(iter(parameters.values())).dtype)

    def _save_pipeline(self, folder: Path, network: Any) -> None:
        setattr(self._pipeline, self._part, network)
        self._pipeline.save_pretrained(folder)
        setattr(self._pipeline, self._part, self.networks[POLICY])
