"""The table of the rounds that two sides did in turns, and what differs between the sides."""

from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.peers.turns import Work

SIDES = ("ours", "trl")
SAME = ("torch", "diffusers", "transformers", "peft")
"""Libraries that must be the same on both sides: they do most of the work."""

DIFFERENCES = {
    "ddpo": (
        "TRL samples through its copy of the diffusers pipeline: a progress bar, the schedule looked up and "
        "a log-probability at every step; ours has a step's coefficients in a table, and stores the mean.",
        "TRL replays one step of a batch at a time; ours any (image, step) pairs, as many at once.",
        "TRL's loss needs log-probabilities of both policies; ours the difference of two Gaussians.",
        "Ours measures the KL of each round on the first image of each prompt (more denoiser rows without "
        "gradient, see the table); TRL takes half the squared difference of log-probabilities as it goes.",
        "Ours writes TensorBoard logs and a checkpoint from which a run goes on to the bit; TRL saves the "
        "state of accelerate and logs nothing, since its default has no tracker.",
        "Both compute in float32: TRL's default, fp16, is for GPUs.",
        "LoRA factors start as Gaussians in TRL, and as PEFT's default in ours; alpha is the rank in both.",
    ),
    "alignprop": (
        "Both recompute each differentiated prediction in the backward pass. TRL runs the steps before the "
        "window under gradient, too, and then detaches them; ours runs them without.",
        "Ours recomputes the decoder, too; TRL keeps its activations.",
        "TRL computes a log-probability at every step, which nothing uses.",
        "Ours writes TensorBoard logs and a whole checkpoint; TRL saves the state of accelerate and logs "
        "nothing.",
        "Both compute in float32: TRL's default, fp16, is for GPUs.",
        "LoRA factors start as Gaussians in TRL, and as PEFT's default in ours; alpha is the rank in both.",
    ),
}


def summary(told: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds but the first, of each side and of the ratios ours / TRL of each round."""
    rounds = {side: told[side]["rounds"][1:] for side in SIDES}
    found: dict[str, Any] = {}
    for name in ("seconds", "peak_bytes", "resident_bytes"):
        values = {side: [one[name] for one in rounds[side]] for side in SIDES}
        ratios = [a / b for a, b in zip(*values.values(), strict=True)]
        found[name] = {side: median(values[side]) for side in SIDES} | {"ratio": median(ratios)}
        found[name] |= {"lowest": min(ratios), "highest": max(ratios)}
    kinds = sorted({kind for side in SIDES for one in rounds[side] for kind in one["rows"]})
    found["rows"] = {k: {side: rounds[side][0]["rows"].get(k, 0) for side in SIDES} for k in kinds}
    found["first_reward"] = {side: told[side]["rounds"][0]["reward"] for side in SIDES}
    found["trained"] = {side: told[side]["trained"] for side in SIDES}
    return found


def warnings_of(told: dict[str, dict[str, Any]]) -> list[str]:
    """What makes the comparison unfair."""
    ours, trl = (told[side]["versions"] for side in SIDES)
    found = [
        f"{name} is {ours.get(name)} here and {trl.get(name)} there"
        for name in SAME
        if ours.get(name) != trl.get(name)
    ]
    if told["ours"]["trained"] != told["trl"]["trained"]:
        found.append(f"ours trains {told['ours']['trained']} numbers, TRL {told['trl']['trained']}")
    found += [f"{side} runs {told[side]['threads']} threads" for side in SIDES if told[side]["threads"] != 1]
    return found


def show(work: Work, told: dict[str, dict[str, Any]], console: Console) -> None:
    """Print the table of a method, and what differs."""
    found = summary(told)
    table = Table(title=f"{work.method}: a round of {work.images} images, medians of {work.rounds}")
    for header in ("", "ours", "TRL", "ours / TRL", "lowest to highest"):
        table.add_column(header, justify="right" if header else "left")
    lines = {"CPU seconds": ("seconds", 1.0), "peak memory, MB": ("peak_bytes", 1e6)}
    lines["memory before a round, MB"] = ("resident_bytes", 1e6)
    for title, (name, unit) in lines.items():
        one = found[name]
        table.add_row(
            title,
            *(f"{one[side] / unit:,.2f}" for side in SIDES),
            f"{one['ratio']:.3f}",
            f"{one['lowest']:.3f} to {one['highest']:.3f}",
        )
    table.add_section()
    for kind, rows in found["rows"].items():
        ratio = f"{rows['ours'] / rows['trl']:.3f}" if rows["trl"] else ""
        table.add_row(f"rows: {kind}", *(f"{rows[side]:,}" for side in SIDES), ratio, "")
    table.add_row("trained numbers", *(f"{found['trained'][side]:,}" for side in SIDES), "", "")
    table.add_row("first mean reward", *(f"{found['first_reward'][side]:.4f}" for side in SIDES), "", "")
    console.print(table)
    for side in SIDES:
        given = ", ".join(f"{name} {number}" for name, number in told[side]["versions"].items())
        console.print(f"{side:<5} {given}", soft_wrap=True, highlight=False)
    for warning in warnings_of(told):
        console.print(f"unfair: {warning}", soft_wrap=True, highlight=False)
    for line in DIFFERENCES[work.method]:
        console.print(f"- {line}", soft_wrap=True, highlight=False)
