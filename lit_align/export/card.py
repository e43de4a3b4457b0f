"""The model card: what a model is, how it was trained, what it scored, and how it is used."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lit_align.callbacks.files import finite
from lit_align.callbacks.summary import compared, read_report
from lit_align.export.forms import Exported
from lit_align.export.live import Live, Run
from lit_align.export.snippet import is_hub_id, snippet

SOUP = (
    "these weights are the soup of the run's experts, linear in their updates: an approximation of the fused "
    "policy that the run measured"
)
"""Of a run that fuses experts while it samples, which no adapter can."""


def card(live: Live, made: Sequence[Exported], title: str, images: Sequence[str]) -> str:
    """The text of ``README.md``.

    Args:
        live: The model.
        made: Its exports.
        title: The model's name.
        images: Files beside it to show.
    """
    runs = [run for run, _ in live.runs]
    base = str(runs[0].backbone["pretrained"])
    parts = [f"---\n{yaml.safe_dump(_front(runs, base, live.whole), sort_keys=False)}---\n\n# {title}"]
    parts.append(f"Trained from `{base}` with lit_align.")
    if live.mixed:
        shares = ", ".join(f"{weight:g} x {run.folder.name}" for run, weight in live.runs)
        parts.append(f"A mixture of adapters, linear in their updates: {shares}.")
    for run in runs:
        of = f" of {run.folder.name}" if live.mixed else ""
        parts.append(_part(run))
        parts.append(_training(run, of))
        parts.append(_figures(run, of))
    parts += [f"![held-out images]({name})" for name in images]
    parts.append("## Use\n\n" + "\n\n".join(_use(one, live) for one in made))
    rows = "\n".join(f"| {one.form} | `{one.path.name}` | {one.difference:.3g} |" for one in made)
    parts.append(
        "Each was loaded in diffusers and compared with the model that was trained: largest difference of a "
        f"pixel, of a range of 1.\n\n| form | file | difference |\n|---|---|---|\n{rows}"
    )
    parts.append(f"The licence of `{base}` applies to what is derived from it.")
    return "\n\n".join(part for part in parts if part) + "\n"


def is_card(file: Path, name: str) -> bool:
    """Whether a file is a card that :func:`card` has written of a model of this name."""
    text = file.read_text("utf-8", "replace") if file.is_file() else ""
    return (
        text.startswith("---\nlibrary_name: diffusers")
        and f"\n# {name}\n" in text
        and " with lit_align." in text
    )


def _part(run: Run) -> str:
    """What the weights are of a run that fuses experts."""
    if run.is_soup:
        return f"{SOUP.capitalize()}."
    return "" if run.is_policy else f"These weights are the run's expert {run.weights.name}."


def _front(runs: Sequence[Run], base: str, whole: bool) -> dict[str, Any]:
    methods = sorted(
        {_last(run.config["model"]["class_path"]).removesuffix("Module").lower() for run in runs}
    )
    tags = ["text-to-image", "diffusers", "lit_align", *methods, *([] if whole else ["lora"])]
    known = {"base_model": base} if is_hub_id(base) else {}  # the hub refuses what is none of its ids
    return {"library_name": "diffusers", "pipeline_tag": "text-to-image", **known, "tags": tags}


def _last(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def _training(run: Run, of: str) -> str:
    """Method, rewards, prompts and sampling of a run, as a table."""
    model, data = run.model, run.config.get("data", {}).get("init_args", {})
    rows = {
        "method": _last(run.config["model"]["class_path"]),
        "images": run.facts.get("images"),
        "rewards": ", ".join(_rewards(model)) or None,
        "prompts": _described(data.get("source") or data.get("tasks")),
        "sampler": _described(model.get("sampler")),
        "guidance": model.get("sampling", {}).get("guidance"),
        "size": run.backbone.get("size") or "the model's own",
        "adapter": _described({"class_path": "LoRA", "init_args": run.backbone["lora"]})
        if run.backbone.get("lora")
        else "none: all weights were trained",
        "optimizer": _described(model.get("optimisation", {}).get("optimizer")),
        "seed": run.config.get("seed_everything"),
    }
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    return f"## Training{of}\n\n| | |\n|---|---|\n{lines}"


def _rewards(model: Mapping[str, Any]) -> list[str]:
    banks = [model.get("rewards")] + [task.get("rewards") for task in (model.get("tasks") or {}).values()]
    found = []
    for bank in banks:
        options = (bank or {}).get("init_args", {})
        for name, reward in (options.get("rewards") or {}).items():
            weight = (options.get("weights") or {}).get(name)
            told = f"weight {weight:g}" if weight is not None else "monitored"
            function = (reward.get("init_args") or {}).get("function")  # of a FunctionReward
            found.append(f"{name} ({function or _last(reward['class_path'])}, {told})")
    return found


def _described(value: Any) -> str | None:
    """A class and its options, on a line."""
    if not isinstance(value, Mapping):
        return None
    if "class_path" not in value:
        return ", ".join(filter(None, (_described(one) for one in value.values()))) or None
    options = {n: v for n, v in (value.get("init_args") or {}).items() if v is not None}
    inner = ", ".join(f"{name} {_described(v) or v}" for name, v in options.items())
    return _last(value["class_path"]) + (f" ({inner})" if inner else "")


def _figures(run: Run, of: str) -> str:
    """The metrics before and after, if they were measured of these very weights."""
    tables, images = [], run.facts.get("images")
    if own := _own_figures(run):
        tables.append(_table("validation", images, own))
    files = [
        file for split in ("validation", "validate", "test") for file in run.folder.glob(f"{split}*.json")
    ]
    for file in sorted(files):
        report = read_report(file)
        again = own and report.get("split") == "validation"
        if run.is_policy and images is not None and report.get("images") == images and not again:
            tables.append(_table(report["split"], images, report.get("metrics", {})))
    shown = [table for table in tables if table]
    return f"## Metrics{of}\n\n" + "\n\n".join(shown) if shown else ""


def _own_figures(run: Run) -> dict[str, Any]:
    """The metrics in a checkpoint itself; none if its weights were updated after the newest validation."""
    progress = run.progress
    if (progress.get("measured_at") or {}).get("images") != progress.get("images") or not progress:
        return {}
    found = compared(progress["baseline"], progress["latest"], progress["prompt_groups"])
    return {name: finite(asdict(comparison)) for name, comparison in found.items()}


def _table(split: str, images: int | None, metrics: Mapping[str, Any]) -> str:
    lines = [
        f"| {name} | {found['before']:.4f} | {found['after']:.4f} | {found['difference']:+.4f} |"
        for name, found in metrics.items()
        if None not in (found.get("before"), found.get("after"), found.get("difference"))
    ]
    if not lines:
        return ""
    pairs = max(found.get("num_pairs") or 0 for found in metrics.values())
    head = f"{split}, {images} images trained on, {pairs} pairs of images"
    return f"{head}\n\n| metric | before | after | change |\n|---|---|---|---|\n" + "\n".join(lines)


def _use(one: Exported, live: Live) -> str:
    if one.form == "kohya":
        return f"`{one.path.name}` goes into the LoRA folder of A1111, Forge or ComfyUI, at strength 1."
    return f"```python\n{snippet(live, one.form)}\n```"
