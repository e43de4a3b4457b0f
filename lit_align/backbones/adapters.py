"""LoRA adapters over one denoiser: added, loaded from diffusers' files, mixed, and saved again."""

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_align.backbones.adapter_files import find, read, reason
from lit_align.errors import ConfigError, check_positive


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, for which all processes must ask; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass
class LoRA:
    """Low-rank adapters of the denoiser.

    Args:
        rank: Rank of each update ``B A``. 4 in ddpo-pytorch and in TRL's DDPOTrainer.
        alpha: The update is scaled by ``alpha / rank``; null means the rank, so a scale of 1 whatever the
            rank, as in TRL's DDPOTrainer.
        target_modules: Ends of the names of the layers that get an adapter; null for those of the family, as
            diffusers' training scripts have them: of Stable Diffusion all projections of attention.
    """

    rank: int = 4
    alpha: float | None = None
    target_modules: list[str] | None = None

    @classmethod
    def of(cls, given: "LoRA | Mapping[str, Any] | None") -> "LoRA | None":
        """The settings that were given, in Python perhaps as a dict, as in YAML.

        Raises:
            ConfigError: The dict has other settings, or it is something else.
        """
        if given is None or isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"backbone.lora: {given!r} is none; give LoRA(rank=16), or None to train all weights"
            )
        if unknown := set(given) - {known.name for known in fields(cls)}:
            raise ConfigError(
                f"backbone.lora has no {', '.join(sorted(unknown))}; it has rank, alpha and target_modules"
            )
        return cls(**given)

    def on(self, layers: list[str]) -> "LoRA":
        """The same settings, for these layers where they say none."""
        return replace(self, target_modules=layers) if self.target_modules is None else self

    def config(self) -> LoraConfig:
        """These settings as peft has them.

        Raises:
            ConfigError: Rank or alpha is not positive.
        """
        check_positive({"lora.rank": self.rank, "lora.alpha": self.alpha})
        assert self.target_modules is not None, "the backbone fills in those of its family"
        alpha = float(self.rank) if self.alpha is None else self.alpha
        return LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=list(self.target_modules))  # type: ignore[arg-type]


class Adapters:
    r"""Named weight sets of one denoiser, each a sum of adapters over its shared, frozen weights.

    A set is ``{adapter: weight}``: what it adds to a layer is :math:`\sum_i w_i s_i B_i A_i`, with :math:`s`
    the adapters' own scales ``alpha / rank``. So a mixture is linear in the updates, which peft's
    ``combination_type="linear"`` is not: that one averages the factors. The empty set is the denoiser itself.

    Adapters are kept in float32 whatever the denoiser's dtype: an update of Adam is lost in bfloat16.

    Args:
        denoiser: A diffusers model with the mixin of adapters, such as a UNet.
        pipeline_class: The pipeline class of the denoiser, which knows its files.
        part: The denoiser's name in the pipeline, ``unet`` or ``transformer``.
    """

    def __init__(self, denoiser: nn.Module, pipeline_class: Any, part: str) -> None:
        self.denoiser: Any = denoiser
        self._pipeline_class = pipeline_class
        self._part = part
        self._sets: dict[str, dict[str, float]] = {}
        self._scales: dict[BaseTunerLayer, dict[str, float]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._sets

    def add(self, name: str, lora: LoRA) -> None:
        """Inject an adapter whose update is 0, as a set of its own.

        Raises:
            ConfigError: No layer has such a name.
        """
        config = lora.config()
        try:
            with self._injecting(name):
                self.denoiser.add_adapter(config, adapter_name=name)
        except ValueError as error:
            raise ConfigError(
                f"lora.target_modules {lora.target_modules} match no layer of the {self._part}; "
                "give ends of layer names, such as [to_q, to_k, to_v, to_out.0]"
            ) from error

    def load(self, name: str, path: Path) -> None:
        """Load an adapter of any rank, as a set of its own.

        Args:
            name: Of the set.
            path: A .safetensors file of diffusers, PEFT, kohya or an older program, or its folder.

        Raises:
            ConfigError: There is none, or it is not one for this denoiser.
        """
        file = find(path)
        try:
            layers = read(file, self._pipeline_class, self._part, self.denoiser.config)
            self._check_fit(layers)
            with self._injecting(name):
                named = {f"{self._part}.{key}": value for key, value in layers.items()}
                self.denoiser.load_lora_adapter(named, prefix=self._part, adapter_name=name)
            # Set again, because peft rounded the values to the denoiser's dtype.
            loaded = set_peft_model_state_dict(self.denoiser, layers, adapter_name=name)
            if loaded.unexpected_keys:
                raise ValueError(f"the model has no place for {loaded.unexpected_keys[0]}")
        except Exception as error:  # whatever a wrong file makes of the conversion of names
            raise ConfigError(
                f"the adapter in {path} does not fit this model: {reason(error)}; give another, or copy it "
                "again"
            ) from error

    def _check_fit(self, layers: Mapping[str, Tensor]) -> None:
        """Refuse factors for layers that are not there, or are of other sizes.

        Raises:
            ValueError: There are some.
        """
        there = dict(self.denoiser.named_modules())
        for key, factor in layers.items():
            place, _, kind = key.partition(".lora_")
            if place not in there:
                raise ValueError(f"it is for another network: this {self._part} has no {place}")
            own, side = getattr(there[place], "weight", None), 1 if kind.startswith("A") else 0
            if own is not None and (factor.ndim != own.ndim or factor.shape[side] != own.shape[side]):
                raise ValueError(
                    f"it is for another base model: its {key} has the shape {tuple(factor.shape)}, and "
                    f"the weights of this {self._part}'s {place} have {tuple(own.shape)}"
                )

    @contextmanager
    def _injecting(self, name: str) -> Iterator[None]:
        """Undo that peft trains a new adapter, puts it in training mode and gives it the base's dtype."""
        trained = {p for p in self.denoiser.parameters() if p.requires_grad}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            yield
        for parameter in self.denoiser.parameters():
            parameter.requires_grad_(parameter in trained)
        self.denoiser.eval()
        for parameter in self.parameters([name]):
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        # Kept, because peft's own set_adapter walks all modules and flips requires_grad at every switch.
        for layer in self.denoiser.modules():
            if isinstance(layer, BaseTunerLayer) and name in layer.scaling:
                self._scales.setdefault(layer, {})[name] = layer.scaling[name]
        self._sets[name] = {name: 1.0}

    def mix(self, name: str, weights: Mapping[str, float]) -> None:
        """Make (or replace) the set that is the weighted sum of other sets; weights of 0 add nothing."""
        mixture: dict[str, float] = {}
        for source, weight in weights.items():
            for adapter, share in self._sets[source].items():
                mixture[adapter] = mixture.get(adapter, 0.0) + weight * share
        self._sets[name] = {adapter: weight for adapter, weight in mixture.items() if weight != 0}

    def parameters(self, names: Collection[str]) -> list[nn.Parameter]:
        """The parameters of some adapters, in the denoiser's order."""
        own = [f".lora_{factor}.{name}." for name in names for factor in "AB"]
        return [p for n, p in self.denoiser.named_parameters() if any(part in n for part in own)]

    def choose(self, name: str) -> None:
        """Switch a set on; only what the next forward computes is changed."""
        chosen = self._sets[name]
        for layer, scales in self._scales.items():
            layer._disable_adapters = not chosen
            layer._active_adapter = list(chosen)
            for adapter, weight in chosen.items():
                if adapter in scales:  # adapters may cover different layers
                    layer.scaling[adapter] = weight * scales[adapter]

    def average_factors(self, name: str, weights: Mapping[str, float]) -> None:
        """Overwrite the adapter ``name`` with the weighted means of the factors ``B`` and ``A`` of others.

        What public rewarded soups do. Not linear in the updates: each ``B_i`` also meets every other ``A_j``.

        Raises:
            ConfigError: The adapters do not share ranks, scales and layers.
        """
        shares = {adapter: weight for adapter, weight in weights.items() if weight != 0}
        sources = [self.parameters([adapter]) for adapter in shares]
        own = self.parameters([name])
        shapes = [[p.shape for p in source] for source in (own, *sources)]
        scales = [
            {layer: by_name.get(adapter) for layer, by_name in self._scales.items()}
            for adapter in (name, *shares)
        ]
        if any(shape != shapes[0] for shape in shapes) or any(scale != scales[0] for scale in scales):
            raise ConfigError(
                "factors of adapters can only be averaged where ranks, scales and layers agree; use the "
                "mixture that is linear in the updates"
            )
        with torch.no_grad():
            for target, *factors in zip(own, *sources, strict=True):
                terms = [share * factor for share, factor in zip(shares.values(), factors, strict=True)]
                target.copy_(torch.stack(terms).sum(0))

    def save(self, folder: Path | None, name: str) -> None:
        """Write a set as one adapter that diffusers loads; a mixture has its factors side by side.

        All processes must call this where the denoiser is sharded; those without a folder write nothing.
        """
        layers, config = self.factors(name)
        if folder is None:
            return
        # Renamed are only the layers of attention, and diffusers reads a file by the style of its first name.
        renamed = convert_state_dict_to_diffusers(layers)
        settings: dict[str, Any] = {
            f"{self._part}_lora_layers": layers if any(".lora_A." in key for key in renamed) else renamed,
            f"{self._part}_lora_adapter_metadata": {
                key: sorted(value) if isinstance(value, set) else value  # sets have another order each time
                for key, value in config.to_dict().items()
            },
        }
        self._pipeline_class.save_lora_weights(folder, **settings)

    def factors(self, name: str) -> tuple[dict[str, Tensor], LoraConfig]:
        """The factors of a set under PEFT's names, and their settings, in which ``alpha`` is the rank.

        The strength is in ``B``, since programs that know no settings would apply another.
        """
        chosen = self._sets[name]
        layers, config = self._concatenated(chosen)
        if chosen == {name: 1.0} and not self.denoiser.peft_config[name].rank_pattern:
            own = self.denoiser.peft_config[name]
            config = LoraConfig(r=own.r, lora_alpha=own.r, target_modules=own.target_modules)
        return layers, config

    def merged(self, name: str) -> dict[str, Tensor]:
        """The weights of the denoiser with a set's update in them, under the names that it had without."""
        self.choose(name)
        updates = {}
        with torch.no_grad():
            for layer in self._scales:
                names = [one for one in self._sets[name] if one in layer.scaling]
                updates[layer] = sum(layer.get_delta_weight(one) for one in names)
            paths = {path: layer for path, layer in self.denoiser.named_modules() if layer in updates}
            found = {}
            for key, value in self.denoiser.state_dict().items():
                path = key.removesuffix(".base_layer.weight")
                if ".lora_" not in key:
                    plain = key.replace(".base_layer.", ".")
                    found[plain] = value + updates[paths[path]] if path in paths else value
        return found

    def _concatenated(self, chosen: Mapping[str, float]) -> tuple[dict[str, Tensor], LoraConfig]:
        """One adapter with the same update: ``[w_1 s_1 B_1, w_2 s_2 B_2] [A_1; A_2]``."""
        assert chosen, "the model without adapters has nothing to save"
        paths = {layer: path for path, layer in self.denoiser.named_modules() if layer in self._scales}
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for layer, path in paths.items():
            scales = self._scales[layer]
            if there := [adapter for adapter in chosen if adapter in scales]:
                down = [whole(layer.lora_A[name].weight.detach()) for name in there]
                up = [
                    chosen[name] * scales[name] * whole(layer.lora_B[name].weight.detach()) for name in there
                ]
                factors[path] = torch.cat(down), torch.cat(up, dim=1)
        rank = max(len(down) for down, _ in factors.values())
        filled: dict[str, Tensor] = {}
        for path, (a, b) in factors.items():
            missing = rank - len(a)  # of a layer that not all of them cover: zeros
            filled[f"{path}.lora_A.weight"] = torch.cat([a, a.new_zeros(missing, *a.shape[1:])])
            filled[f"{path}.lora_B.weight"] = torch.cat([b, b.new_zeros(len(b), missing, *b.shape[2:])], 1)
        return filled, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(factors))
