"""What a run of a method is, and whether it may take what another run wrote."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lit_align.data import MultiTaskDataModule, PairSource, PickaPicDataModule, PromptDataModule, PromptSource
from lit_align.data.prompts.tasks import JointFixedLoader
from lit_align.errors import ConfigError, tell
from lit_align.identity import differences, text_hash, versions, weights_hash
from lit_align.methods.held_out import KNOWN, columns_text, validated_images
from lit_align.methods.sampling import SamplingModule
from lit_align.methods.validation import ValidatedModule
from lit_align.rewards import FunctionReward, RewardBank
from lit_align.rewards.calling import title
from lit_align.samplers import Sampler

READ = 4096
"""Rows of a source that its fingerprint reads: all of a small one, else evenly spaced; and it counts them."""

BASE = ("base", "others", "files")
"""The facts about frozen weights."""

MEASURED = (
    *("sampler", "eval_sampler", "guidance", "seed", "size"),
    *("rewards", "reward_contents", "weights", "held_out", "columns"),
)
"""The facts that decide what is measured of held-out images, besides the model and the data."""


def identity_of(module: SamplingModule, data: Any) -> dict[str, Any]:
    """The facts of a run, as numbers, texts and mappings.

    ``base`` is the hash of the pretrained denoiser, ``others`` that of text encoders and autoencoder, and
    ``files`` those of adapters and models that were loaded besides: all by
    :func:`~lit_align.identity.weights_hash`, which reads evenly spaced values of every tensor. What scores
    images, and which are held out, the module adds.
    """
    sets = module.backbone.weight_sets
    return {
        "method": type(module).__name__,
        "model": sets.model,
        "base": sets.base_hash,
        "others": weights_hash(module.backbone.fixed_parameters()),
        "files": dict(sets.file_hashes),
        "sampler": _sampler(module.sampler),
        "eval_sampler": _sampler(module.eval_sampler),
        "guidance": float(module.sampling.guidance),
        "seed": module.seed,
        "size": list(module.backbone.size),
        "data": _data(data),
        "versions": versions(),
    }


def measurement_of(module: SamplingModule, banks: Sequence[RewardBank], split: str) -> dict[str, Any]:
    """How held-out images were measured, where that is not a fact of the run: a test may have other prompts.

    Args:
        module: The method.
        banks: What scores them; several tasks have one each.
        split: ``validation``, which is that of a fit, ``validate``, or a name that begins with ``test``.
    """
    facts: dict[str, Any] = {"sampler": _sampler(module.eval_sampler), "rewards": {}}
    for number, bank in enumerate(banks, 1):
        place = f"{number}/" if len(banks) > 1 else ""
        said = rewards_of(bank, named=title)
        facts["rewards"] |= {f"{place}{name}": said[name] for name in bank.rewards}  # not those left out
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, KNOWN):
        return facts
    loader: Any = module.trainer.val_dataloaders if split == "validation" else None
    if loader is None:
        loader = data.test_dataloader() if split.startswith("test") else data.val_dataloader()
    parts = loader.loaders.values() if isinstance(loader, JointFixedLoader) else [loader]
    rows = [(part.prompts, int(row)) for part in parts for row in part.rows]
    columns = [columns_text(prompts.source.columns(row)) for prompts, row in rows]
    facts["prompts"] = f"{len(rows)} prompts {text_hash(prompts.prompt(row) for prompts, row in rows)}"
    return facts | ({"columns": text_hash(columns)} if any(columns) else {})


def _sampler(sampler: Sampler) -> dict[str, Any]:
    """Its class, its steps, and a hash of how each moves a state and a prediction, and of its noise."""
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    chain = [str(sampler.timesteps.tolist())]
    for k in range(sampler.num_steps):
        steps = [sampler.step(x, prediction, k) for x, prediction in ((one, zero), (zero, one))]
        chain += [f"{step.mean.item()} {step.std.item()}" for step in steps]
    return {"class": type(sampler).__name__, "steps": sampler.num_steps, "chain": text_hash(chain)}


def rewards_of(
    bank: RewardBank, task: str = "", trained: bool = True, named: Callable[[object], str] | None = None
) -> dict[str, str]:
    """Class and weight of each reward by name; a monitored one has no weight.

    Args:
        bank: The rewards.
        task: Whose they are, where there are several.
        trained: Whether any is trained on.
        named: Names the function of a :class:`FunctionReward` in place of its class.
    """
    kinds = dict(bank.kinds)
    for name, reward in bank.rewards.items():
        if named and isinstance(reward, FunctionReward):
            kinds[name] = named(reward.function)
    weights = {name: f" x {weight:g}" for name, weight in bank.weights.items()} if trained else {}
    found = {name: kind + weights.get(name, "") for name, kind in kinds.items()}
    return {f"{task}/{name}" if task else name: said for name, said in found.items()}


def validated(images: Iterable[tuple[int, str, str]]) -> dict[str, str | None]:
    """How many images are validated, and a hash of their prompts and one of their columns, if they have any.

    Args:
        images: The number, the prompt and the columns of each, of all ranks in any order; none where that is
            not known.
    """
    found = sorted(images)
    prompts, columns = [prompt for _, prompt, _ in found], [text for *_, text in found]
    said = f"{len(found)} images {text_hash(prompts)}" if found else None
    return {"held_out": said} | ({"columns": text_hash(columns)} if any(columns) else {})


def _data(data: Any) -> dict[str, str]:
    """Fingerprints of what is trained and validated on; of foreign data modules nothing is known."""
    if isinstance(data, PickaPicDataModule):
        return {"pairs": _fingerprint(data.pairs)} | _given(data)
    if isinstance(data, PromptDataModule):
        return {"prompts": _fingerprint(data.source)} | _given(data)
    if isinstance(data, MultiTaskDataModule):
        parts = {task: _data(one) for task, one in data.modules.items()}
        return {f"{task} {name}": value for task, own in parts.items() for name, value in own.items()}
    return {}


def _given(data: PickaPicDataModule | PromptDataModule) -> dict[str, str]:
    source = data.validation_source
    return {} if source is None else {"validation prompts": _fingerprint(source)}


def _fingerprint(source: PromptSource | PairSource) -> str:
    count = len(source)
    rows = sorted({row * (count - 1) // max(1, READ - 1) for row in range(READ)}) if count else []
    texts = [source.prompt(row) for row in rows]
    if isinstance(source, PairSource):
        texts += [str(source.label(row)) for row in rows]
    return f"{count} rows {text_hash(texts)}"


def check_files(stamps: Mapping[str, Mapping[str, Any]], now: Mapping[str, Any], accepted: bool) -> None:
    """Refuse adapters and models that were trained over other weights; tell how others were sampled.

    Args:
        stamps: What the files say, by path.
        now: The facts of this run.
        accepted: Take them in any case.

    Raises:
        ConfigError: One was trained over another base.
    """
    for path, facts in stamps.items():
        if facts.get("base") not in (None, now["base"]):
            said = f"{path} was trained over other weights ({facts['base']}) than this model ({now['base']})"
            if not accepted:
                raise ConfigError(
                    f"{said}; give one of this model, or --accept_other_base true to accept it anyway"
                )
            rank_zero_warn(f"{said}, and is accepted anyway")
        kept = {name: facts[name] for name in ("sampler", "guidance", "size") if name in facts}
        if changed := differences(kept, now):
            tell(f"{path} was trained with another {_told(changed)}")


def check_checkpoint(
    saved: Mapping[str, Any], now: Mapping[str, Any], fit: bool, other_base: bool, other_data: bool
) -> None:
    """Refuse a checkpoint of another run, or say what changes where the user accepts that.

    Args:
        saved: The facts in the checkpoint.
        now: Those of this run.
        fit: Whether its run goes on, and is not only measured or drawn from.
        other_base: Accept other frozen weights.
        other_data: Accept other prompts or pairs.

    Raises:
        ConfigError: It is of another method, model or data set.
    """
    changed = differences(saved, now)
    if fit and "method" in changed:
        raise ConfigError(
            f"ckpt_path: the checkpoint is of {saved['method']}, and {now['method']} counts and optimises "
            "differently; resume with its own method, or start from its adapter/ folder (backbone.adapters)"
        )
    kinds: tuple[tuple[str, str, tuple[str, ...], bool], ...] = (
        ("another model", "base", BASE, other_base),
        ("other data", "data", ("data",) if fit else (), other_data),
    )
    for what, option, names, accepted in kinds:
        if found := {name: changed[name] for name in names if name in changed}:
            said = f"ckpt_path: the checkpoint was made with {what} ({_told(found)})"
            if not accepted:
                raise ConfigError(
                    f"{said}; give that of its run, or --accept_other_{option} true to resume anyway"
                )
            rank_zero_warn(said)
    if "versions" in changed:
        old, new = saved["versions"], now["versions"]
        tell(f"the checkpoint was written with {_told(differences(old, new))}")


def measured_otherwise(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """The facts that decide what is measured of held-out images and that are now others, as "old -> new"."""
    changed = differences(saved, now)
    if "seed" not in saved and any("/" in name for name in now.get("rewards", {})):
        changed.pop("rewards", None)  # an earlier edition named those of the first task only
    return {name: changed[name] for name in (*BASE, "data", *MEASURED) if name in changed}


def _told(changed: Mapping[str, str]) -> str:
    return ", ".join(values if name == "data" else f"{name} {values}" for name, values in changed.items())


class IdentifiedModule(ValidatedModule):
    """A module that knows what its run is, and compares only what was measured alike."""

    accept_other_base = False
    """Whether checkpoints and adapters that were trained over other frozen weights are taken all the same."""

    accept_other_data = False
    """Whether a checkpoint of a run on other prompts or pairs is gone on from all the same."""

    changes_told = False
    """Whether the user knows which settings are not the checkpoint's: the command line compares options."""

    _facts: dict[str, Any]
    _validated_with: dict[str, Any]
    """The facts of the run that measured the baseline."""

    def identity(self) -> dict[str, Any]:
        """What this run is, for its checkpoints and adapters; known after :meth:`setup`."""
        return self._facts

    def scored_by(self) -> dict[str, Any]:
        """The facts of a run that say what the reward of an image is, and what computes it."""
        return {"rewards": rewards_of(self.rewards), "reward_contents": self.rewards.contents}

    def identify(self, data: Any, stage: str) -> None:
        """Collect the facts, and compare them with those of loaded files and of this module's last run."""
        self._facts = identity_of(self, data) | self.scored_by()
        check_files(self.backbone.weight_sets.stamps, self._facts, self.accept_other_base)
        if stage in ("fit", "validate"):
            own = validated_images(data, self.trainer.limit_val_batches)  # type: ignore[attr-defined]
            self._facts |= validated(image for rank in self.gather(own) for image in rank)
            self.compare_measurement()

    def check_identity(self, saved: Mapping[str, Any], fit: bool) -> None:
        """Refuse a checkpoint of another run; see :func:`check_checkpoint`."""
        check_checkpoint(saved, self._facts, fit, self.accept_other_base, self.accept_other_data)

    def compare_measurement(self) -> None:
        """Drop a baseline that was measured of other weights, prompts or rewards, or with another sampler."""
        changed = measured_otherwise(self._validated_with, self._facts) if self.baseline else {}
        self._validated_with = self._facts
        if not changed:
            return
        if not self.changes_told:
            told = ", ".join(f"{name} {values}" for name, values in changed.items())
            rank_zero_warn(
                f"held-out images are measured with another {told}: nothing is compared with what was "
                "measured before, and a fit measures the pretrained model anew"
            )
        self.forget_baseline()
