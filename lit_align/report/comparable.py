"""What was not measured alike in several runs, and which of their curves cannot be compared."""

from collections.abc import Mapping, Sequence

from lit_align.report.run import Run, names_of


def differences(runs: Sequence[Run]) -> list[str]:
    """A line for each thing that differs; of the curves, where the tests do not have the same difference.

    And for each run whose held-out images were measured otherwise before.
    """
    names = names_of(runs)
    begun = [
        f"{name}: its curves begin after {run.since} images; held-out images were measured otherwise before"
        for name, run in zip(names, runs, strict=True)
        if run.since
    ]
    if len(runs) < 2:
        return begun
    tables = _differing(
        names,
        [{"split": run.split, "measured images": str(run.count)} | run.measured for run in runs],
    )
    curves = _differing(names, [run.validated for run in runs])
    unknown = [
        f"{name} does not say how it was measured"
        for name, run in zip(names, runs, strict=True)
        if not run.measured
    ]
    more = [f"{fact} of the curves: {told}" for fact, told in curves.items() if tables.get(fact) != told]
    return [f"{fact}: {told}" for fact, told in tables.items()] + more + begun + unknown


def incomparable(runs: Sequence[Run]) -> set[str]:
    """The curves, by tag, that measure another thing in each run.

    Rewards of another class or weight are other numbers; the KL is a sum over the noisy steps of a sampler.
    """
    found: set[str] = set()
    for fact in _differing(names_of(runs), [run.validated for run in runs]):
        if fact == "trained rewards":
            found.add("val/reward")
        elif fact == "sampler":
            found.add("val/kl")
        elif fact.startswith("reward/"):
            found |= {f"val/{fact}"} | ({"val/truth"} if fact == "reward/truth" else set())
    return found


def _differing(names: Sequence[str], facts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The facts that runs do not share, with their values; of what a run does not say nothing is known."""
    found = {}
    for fact in dict.fromkeys(fact for one in facts for fact in one):
        values: dict[str, list[str]] = {}
        for name, one in zip(names, facts, strict=True):
            if fact in one:
                values.setdefault(one[fact], []).append(name)
        if len(values) > 1:
            found[fact] = "; ".join(f"{value} ({', '.join(having)})" for value, having in values.items())
    return found
