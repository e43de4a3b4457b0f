"""A plan: which configurations are run with which seeds, and what makes two runs of a cell the same."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_align.errors import ConfigError
from lit_align.shapes import FLOW_WEIGHTS_HASH, WEIGHTS_HASH

ROOT = Path(__file__).parents[3]
"""The repository; configurations in a plan are named from here, and commands run here."""

TRAINS = ("fit", "test")
"""Commands of a cell that trains."""

FLOW_BACKBONE = "StableDiffusion3Backbone"
"""The class with which the bundled flow model is loaded."""

GUIDANCES = (1.5, 2.0, 3.0, 5.0)
"""Candidates for the guidance of the pretrained model that training is compared with."""


@dataclass(frozen=True)
class Cell:
    """One run: a configuration and a seed.

    Attributes:
        plan: Name of the plan.
        config: Name of the configuration in the plan.
        seed: For ``--seed_everything``.
        arguments: What decides the result, as given to ``python -m lit_align fit``.
        continues: The cell of which this one is the same run, taken further.
        also: Further tests, by name: what they add to the arguments.
        steps: Commands of ``lit_align``, in order; further tests come after the first.
    """

    plan: str
    config: str
    seed: int
    arguments: tuple[str, ...]
    continues: "Cell | None" = None
    also: Mapping[str, Sequence[str]] = field(default_factory=dict)
    steps: tuple[str, ...] = TRAINS

    @property
    def name(self) -> str:
        """Name of the cell's files."""
        return f"{self.config}_seed{self.seed}"

    @property
    def weights(self) -> str:
        """Hash of the shipped weights, and the flow model's where a file or an option names its backbone."""
        said = json.dumps([self.arguments, _contents(self.arguments)])
        return f"{WEIGHTS_HASH}, {FLOW_WEIGHTS_HASH}" if FLOW_BACKBONE in said else WEIGHTS_HASH

    def fingerprint(self) -> str:
        """Changes when what a configuration says, an override, the seed, a further test or the weights do."""
        parts = [self._named(self.arguments), _contents(self.arguments), self.weights]
        if self.also:
            parts.append({name: [list(added), _contents(added)] for name, added in self.also.items()})
        if self.steps != TRAINS:
            parts.append(self.steps)
        return _hash(parts)

    def stages(self) -> dict[str, str]:
        """What the cell runs, in order, with fingerprints: a test that is added leaves the fit alone."""
        first, *others = self.steps
        added: dict[str, Sequence[str]] = {first: (), **self.also} | dict.fromkeys(others, ())
        given = {stage: [*self.arguments, *more] for stage, more in added.items()}
        return {
            stage: _hash([stage, self._named(args), _contents(args), self.weights])
            for stage, args in given.items()
        }

    def _named(self, arguments: Sequence[str]) -> Sequence[str]:
        """Arguments as they are hashed: the file of a pretrained model is the same wherever it lies."""
        if self.steps == TRAINS:
            return arguments
        return [f"--config={Path(a).name}" if a.startswith("--config=") else a for a in arguments]


def _hash(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _contents(arguments: Sequence[str]) -> list[Any]:
    files = [ROOT / a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    return [yaml.safe_load(file.read_text()) for file in files]


@dataclass(frozen=True)
class SideBySide:
    """Single-task configurations and a joint one, all on the same tasks.

    Attributes:
        test: The further test that has the metrics; a configuration without it has them in its own test.
        metrics: For each single-task configuration the metric that is its task's.
        joint: The configuration that is trained on all tasks.
    """

    test: str
    metrics: dict[str, str]
    joint: str


@dataclass(frozen=True)
class Plan:
    """What a plan's YAML says.

    Attributes:
        name: Names the results; the file's name if not given.
        configs: For each name its configuration files in order; ``--option=value`` among them overrides.
        seeds: Every configuration runs once with each.
        overrides: ``--option=value`` for all cells.
        budget: ``option: value`` for all cells: how long a run is.
        continues: Configurations that are another one's run taken further, ``{longer: shorter}``: where the
            shorter run is there, it is copied and resumed.
        also: ``{name: [--option=value, ...]}``: every cell is tested once more with these.
        leaves_out: ``{configuration: [names]}``: further tests that it does not have.
        towards: ``{configuration: {metric: {test: bound}}}``: the report says which share of the way from the
            pretrained model's score to the bound it went, in the own ``test`` and further ones.
        side_by_side: What is reported of all configurations in one table; see :class:`SideBySide`.
        compare: Pairs of configurations; the second is reported against the first, image by image.
        guidances: Candidates for the best guidance of the pretrained model; with none, the pretrained model
            is not measured for itself.
        because: Why there are no candidates.
    """

    name: str
    configs: dict[str, list[str]]
    seeds: list[int]
    overrides: list[str]
    budget: dict[str, Any]
    continues: dict[str, str]
    also: dict[str, list[str]]
    compare: list[list[str]]
    leaves_out: dict[str, list[str]]
    towards: dict[str, dict[str, dict[str, float]]]
    side_by_side: SideBySide | None
    guidances: list[float]
    because: str

    def cells(self) -> list[Cell]:
        """All cells, configuration by configuration."""
        return [cell for config in self.configs for cell in self.cells_of(config)]

    def cells_of(self, config: str) -> list[Cell]:
        """The cells of one configuration, in the order of the seeds."""
        return [self._cell(config, seed) for seed in self.seeds]

    def _cell(self, config: str, seed: int) -> Cell:
        own = [entry if entry.startswith("--") else f"--config={entry}" for entry in self.configs[config]]
        budget = [f"--{name}={text(value)}" for name, value in self.budget.items()]
        arguments = (*own, *self.overrides, *budget, f"--seed_everything={seed}")
        shorter = self.continues.get(config)
        before = self._cell(shorter, seed) if shorter else None
        also = {n: given for n, given in self.also.items() if n not in self.leaves_out.get(config, [])}
        return Cell(self.name, config, seed, arguments, before, also)


def text(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def load_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        ConfigError: It has an unknown key, lacks configs or seeds, names a file that does not exist, or a
            further test has no usable name or options.
    """
    content = yaml.safe_load(path.read_text())
    known = {
        "name": path.stem,
        "configs": {},
        "seeds": [],
        "overrides": [],
        "budget": {},
        "continues": {},
        "also": {},
        "compare": [],
        "leaves_out": {},
        "towards": {},
        "side_by_side": None,
        "guidances": list(GUIDANCES),
        "because": "",
    }
    if unknown := sorted(set(content) - set(known)):
        raise ConfigError(f"{path}: unknown {', '.join(unknown)}; a plan has {', '.join(known)}")
    given = known | content
    table = given["side_by_side"]
    if table is not None and set(table) != (keys := {"test", "metrics", "joint"}):
        raise ConfigError(f"{path}: side_by_side has {sorted(table)}; give {', '.join(sorted(keys))}")
    plan = Plan(**given | {"side_by_side": SideBySide(**table) if table else None})
    if not plan.configs or not plan.seeds:
        raise ConfigError(f"{path}: give configs (name: list of files) and seeds (a list)")
    _check_guidances(path, plan)
    _check_names(path, plan)
    _check_options(path, plan)
    return plan


def _check_guidances(path: Path, plan: Plan) -> None:
    given = plan.guidances if isinstance(plan.guidances, list) else [None]
    if any(isinstance(one, bool) or not isinstance(one, int | float) for one in given):
        raise ConfigError(f"{path}: guidances: {plan.guidances} is no list of numbers, as in [1.5, 2, 3, 5]")
    if not plan.guidances and not plan.because:
        raise ConfigError(f"{path}: guidances: [] leaves out the pretrained model; say why under because")


def _check_options(path: Path, plan: Plan) -> None:
    """Refuse options that are none, and files that are not there."""
    options_of = {"overrides": plan.overrides}
    options_of |= {f"also.{name}": options for name, options in plan.also.items()}
    for place, options in options_of.items():
        if not isinstance(options, list):
            raise ConfigError(f"{path}: {place}: {options!r} is no list; give [--option=value, ...]")
        if wrong := [option for option in options if not option.startswith("--") or "=" not in option]:
            raise ConfigError(f"{path}: {place}: {wrong[0]!r} is not of the form --option=value")
    files = [entry for entries in plan.configs.values() for entry in entries if not entry.startswith("--")]
    options = [option for options in options_of.values() for option in options]
    files += [option.removeprefix("--config=") for option in options if option.startswith("--config=")]
    if missing := [file for file in files if not (ROOT / file).is_file()]:
        raise ConfigError(f"{path}: there is no {missing[0]} in {ROOT}")


def _check_names(path: Path, plan: Plan) -> None:
    """Refuse names of configurations and further tests that are not there."""
    named = {name for pair in [*plan.compare, *plan.continues.items()] for name in pair}
    named |= {*plan.leaves_out, *plan.towards}
    if plan.side_by_side:
        named |= {*plan.side_by_side.metrics, plan.side_by_side.joint}
    if strangers := sorted(named - set(plan.configs)):
        raise ConfigError(f"{path}: there is no {strangers[0]} in configs: {', '.join(plan.configs)}")
    tests = {name for names in plan.leaves_out.values() for name in names}
    tests |= {test for bounds in plan.towards.values() for one in bounds.values() for test in one} - {"test"}
    if asked := plan.side_by_side:
        tests.add(asked.test)
        if lacking := [name for name in asked.metrics if asked.test in plan.leaves_out.get(name, [])]:
            raise ConfigError(f"{path}: side_by_side: {lacking[0]} leaves out {asked.test}; let it have that")
    if strangers := sorted(tests - set(plan.also)):
        raise ConfigError(f"{path}: there is no {strangers[0]} in also: {', '.join(plan.also)}")
    taken = ("fit", "test", "validation")
    if bad := [name for name in plan.also if name in taken or not re.fullmatch(r"[A-Za-z0-9_-]+", name)]:
        raise ConfigError(f"{path}: also: {bad[0]!r} cannot name a further test; use letters, not {taken}")
