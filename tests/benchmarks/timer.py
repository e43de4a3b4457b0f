"""A callback that times what a method does in a fit, and its bare calls between the rollout batches."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning import Callback, Trainer

from lit_align.backbones import POLICY
from lit_align.data import Batch
from lit_align.methods import MSDDAModule
from tests.benchmarks.calls import Calls, Kind, Part, bare_call, parts
from tests.benchmarks.machine import disk_bytes, machine, now, peak_bytes, reset_peak

OTHER = "between the parts"
FILES = {"last.ckpt": "checkpoints/last.ckpt", "adapter": "adapter"}


class FloorTimer(Callback):
    """Times the parts of every rollout batch of a fit, and their floors between the rollout batches.

    Args:
        out: JSON file for what was measured.
        sizes: Batch sizes to try for the floor.
        cpu_time: Count the CPU seconds of the process instead of the clock's.
    """

    def __init__(self, out: str, sizes: list[int], cpu_time: bool = False) -> None:
        self.out, self.sizes, self.cpu_time = Path(out), sizes, cpu_time
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.spent: Counter[str] = Counter()  # in the parts of the rollout batch in progress
        self.floors: dict[tuple[Calls, int], list[float]] = defaultdict(list)
        self.seen: dict[str, Counter[str]] = defaultdict(Counter)
        self.peak = {"before the fit": 0, "rollout batch": 0, "bare calls": 0}
        self.fastest: dict[Kind, int] = {}
        self.parts: tuple[Part, ...] = ()
        self.current: str | None = None
        self.started = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 0:
            self.parts = parts(pl_module, batch)
            self._monitor(pl_module)
            reset_peak()
            self.peak["before the fit"] = peak_bytes()
        else:
            self._end(pl_module, batch_idx)
            with trainer.precision_plugin.forward_context():
                self._floor(pl_module, batch.prompts)
        self.seen.clear()
        self.spent.clear()
        self.current = OTHER
        reset_peak()
        self.started = self._now(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._end(pl_module, trainer.fit_loop.total_batch_idx + 1)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        sizes = {name: disk_bytes(folder / path) for name, path in FILES.items()}
        self.out.write_text(json.dumps(self._report(pl_module) | {"bytes": sizes}, indent=2))

    def _now(self, module: Any) -> float:
        return now(module, self.cpu_time)

    def _monitor(self, module: Any) -> None:
        """Put a clock around each part, and counters on the models."""
        for part in self.parts:
            setattr(module, part.method, self._timed(module, part.name, getattr(module, part.method)))

        def count(decoder: bool, model: Any, inputs: tuple[Any, ...]) -> None:
            kind = "gradient" if torch.is_grad_enabled() else "forward"
            if decoder:
                kind = "decode gradient" if inputs[0].requires_grad else "decode"
            if self.current:  # not in the bare calls themselves
                self.seen[self.current][kind] += len(inputs[0])

        for network in module.backbone.weight_sets.networks.values():
            network.register_forward_pre_hook(partial(count, False))
        module.backbone.vae.decoder.register_forward_pre_hook(partial(count, True))

    def _timed(self, module: Any, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            self.current, started = name, self._now(module)
            result = method(*arguments, **named)
            self.spent[name] += self._now(module) - started
            self.current = OTHER
            return result

        return timed

    def _end(self, module: Any, ended: int) -> None:
        """Close a rollout batch; the first only warms up, and comes before any floor."""
        self.current = None
        self.spent["rollout batch"] = self._now(module) - self.started
        for name in self._names():
            self.seconds[name].append(self.spent[name])
        self.peak["rollout batch"] = max(self.peak["rollout batch"], peak_bytes())
        if ended == 1:
            self.seconds.clear()

    def _floor(self, module: Any, prompts: list[str]) -> None:
        """Time all calls once at our batch sizes, and once at the fastest ones."""
        calls = [call for part in self.parts for call in part.calls]
        if not self.fastest:
            for kind in dict.fromkeys(call.kind for call in calls):
                self.fastest[kind] = self._find_fastest(module, kind, prompts)
        reset_peak()
        self._time(module, [(call, call.size) for call in calls], prompts)
        self.peak["bare calls"] = max(self.peak["bare calls"], peak_bytes())
        self._time(
            module, [(c, self.fastest[c.kind]) for c in calls if c.size != self.fastest[c.kind]], prompts
        )

    def _time(self, module: Any, wanted: Sequence[tuple[Calls, int]], prompts: list[str]) -> None:
        for call, size in wanted:
            run = bare_call(module, call.kind, size, prompts, _trained(module))
            repeats = math.ceil(call.rows / size)
            started = self._now(module)
            for _ in range(repeats):
                run()
            self.floors[call, size].append((self._now(module) - started) * call.rows / (repeats * size))

    def _find_fastest(self, module: Any, kind: Kind, prompts: list[str]) -> int:
        """The size with the least time per row: the best of two turns, after one to warm up."""
        runs = {size: bare_call(module, kind, size, prompts, _trained(module)) for size in self.sizes}
        turns: dict[int, list[float]] = defaultdict(list)
        for _ in range(3):
            for size, run in runs.items():
                started = self._now(module)
                run()
                turns[size].append((self._now(module) - started) / size)
        return min(turns, key=lambda size: min(turns[size][1:]))

    def _report(self, module: Any) -> dict[str, Any]:
        whole = median(self.seconds["rollout batch"])
        rows = [self._row(part) for part in self.parts]
        rest = [c - sum(p) for c, *p in zip(*(self.seconds[n] for n in self._names()), strict=True)]
        rows.append({"part": "Lightning, logs, files", "calls": [], "seconds": median(rest), "floor": 0.0})
        floor = sum(row["floor"] for row in rows)
        rewards = sum(row["seconds"] for row in rows if row["part"] == "rewards")
        return {
            "method": type(module).__name__,
            "machine": machine(module) | {"clock": "CPU time" if self.cpu_time else "wall"},
            "parts": rows,
            "rollout batch": {"seconds": whole, "floor": floor, "ratio": whole / floor},
            "without_rewards": {"seconds": whole - rewards, "ratio": (whole - rewards) / floor},
            "rewards_share": rewards / whole,
            "other_calls": self._unclaimed(),
            "rounds": {name: self.seconds[name] for name in self._names()},
            "fastest": self.fastest,
            "peak_bytes": self.peak,
        }

    def _unclaimed(self) -> dict[str, int]:
        """Rows that the rollout batch evaluated and its floor does not contain."""
        claimed = {(part.name, call.kind) for part in self.parts for call in part.calls}
        rows = {(name, kind): n for name, kinds in self.seen.items() for kind, n in kinds.items()}
        return {f"{name}, {kind}": n for (name, kind), n in rows.items() if (name, kind) not in claimed}

    def _names(self) -> list[str]:
        return ["rollout batch", *(part.name for part in self.parts)]

    def _row(self, part: Part) -> dict[str, Any]:
        calls, floor = [], 0.0
        for call in part.calls:
            times = {size: median(t) for (c, size), t in self.floors.items() if c == call}
            floor += min(times.values())
            calls.append(vars(call) | {"seen": self.seen[part.name][call.kind], "seconds_by_size": times})
        seconds = median(self.seconds[part.name])
        return {"part": part.name, "calls": calls, "seconds": seconds, "floor": floor}


def _trained(module: Any) -> str:
    """The weight set of the bare calls: one that is trained."""
    return module.trained[0] if isinstance(module, MSDDAModule) else POLICY
