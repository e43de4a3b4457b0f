"""Named weight sets of one network: the policy, its reference, an opponent, experts and their mixtures."""

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lit_align.backbones.adapters import Adapters, LoRA, whole
from lit_align.errors import ConfigError
from lit_align.pretrained import loading

POLICY = "policy"
"""The weight set that is trained."""

REFERENCE = "reference"
"""The weight set of the pretrained model."""


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
        network = getattr(pipeline, part)
        self._network_class: Any = type(network)  # kept, because FSDP replaces it
        self._adapters = Adapters(network, type(pipeline), part)
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
            self._adapters.load(f"_start{number}", Path(path).expanduser())
            self._start[f"_start{number}"] = weight
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
        """Add a frozen set that starts as a copy of the policy."""
        assert name not in self._names, f"the weight set {name!r} exists already"
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
        assert 0 <= decay <= 1, f"{decay} is no share"
        with torch.no_grad():
            for old, new in zip(self.parameters_of(target), self.parameters_of(source), strict=True):
                old.lerp_(new.to(old.dtype), 1 - decay)

    def load(self, name: str, folder: Path) -> None:
        """Add a frozen set from an adapter's folder or file, or from a pipeline's folder.

        Raises:
            ConfigError: There is none, or not one for this model.
        """
        assert name not in self._names, f"the weight set {name!r} exists already"
        if (folder / "model_index.json").is_file():
            self._hold(name, self._load_network(folder))
        elif self._lora is None:
            raise ConfigError(f"{folder} holds an adapter, which needs lora; give its settings")
        else:
            self._adapters.load(name, folder)
        self._names.append(name)

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
        trained = {parameter for name in names for parameter in self.parameters_of(name)}
        for parameter in self.networks.parameters():
            parameter.requires_grad_(parameter in trained)

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
            network = self._network_class.from_config(network.config)
            network.load_state_dict(parameters)
        if folder is None:
            return
        setattr(self._pipeline, self._part, network)
        self._pipeline.save_pretrained(folder)
        setattr(self._pipeline, self._part, self.networks[POLICY])
