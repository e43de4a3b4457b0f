"""The guard: held-out images show when the trained reward is exploited."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_align.callbacks.adapter import AdapterExport
from lit_align.callbacks.checkpoints import flush, take_back, write_whole
from lit_align.callbacks.files import writes
from lit_align.callbacks.summary import RunSummary
from lit_align.callbacks.trouble import FEWEST, TRAINED, Change, bounds, changed, since, trains, validations
from lit_align.errors import ConfigError
from lit_align.folder import run_folder
from lit_align.methods import AlignmentModule

Action = Literal["warn", "stop", "lower_rate", "rollback"]

KEPT = "guard_"
"""Beginning of the names of its files."""


class Guard(Callback):
    """Compares each validation with the best one so far, and acts when held-out images have become worse.

    The best validation is the one with the highest held-out reward: one that nothing is trained on. If it has
    too few scores of that reward to be compared with, the next one with more takes its place. Trouble is a
    change since then that chance does not explain (see :mod:`lit_align.callbacks.trouble`):

    - a held-out reward has fallen;
    - the trained reward has risen in vain: ``patience`` validations in a row found it higher, and the
      held-out reward not;
    - diversity has fallen by more than a tenth;
    - saturation or fine texture has moved by more than half of its spread over images;
    - ``kl``, or ``drift``, is above ``max_distance``.

    While the held-out reward rises there is no trouble. After a warning or a lower rate, there is trouble
    again only when the value has certainly moved further.

    The weights of the best validation lie in ``checkpoints/guard_<images>.ckpt``. Where it stands among the
    callbacks matters: before those of :func:`~lit_align.callbacks.default_callbacks`.

    Args:
        action: ``warn`` warns. ``stop`` ends the run. ``lower_rate`` multiplies the learning rate by
            ``factor``. ``rollback`` restores the weights and the optimizer's state of the best validation
            and lowers the rate; counters continue: images, draws, prompts, schedules.
        factor: On the learning rate; with ``kl_target``, on the step that it aims at.
        reward: Name of the held-out reward that decides which validation is best. If not given, ``truth``
            where that is one, else the first.
        false_alarms: Probability of an alarm in a whole run in which no held-out reward changes. A rise in
            vain is tested with it in each validation, since it takes several in a row.
        max_distance: Largest mean ``kl``, in nats per image, or ``drift``. There is no default: shipped runs
            that gain truth end between 2 and 281 nats, and runs that lost half of it at 50 to 348. Below
            float32 both include rounding, about 0.01 nats for each noisy step and 1024 latent elements.
        patience: Validations after which a reward has risen in vain; that of Lightning's ``EarlyStopping``.

    Raises:
        ConfigError: A value cannot work.
    """

    def __init__(
        self,
        action: Action = "warn",
        factor: float = 0.5,
        reward: str | None = None,
        false_alarms: float = 0.01,
        max_distance: float | None = None,
        patience: int = 3,
    ) -> None:
        if action not in (known := get_args(Action)):
            raise ConfigError(f"Guard: action {action!r} is none of {', '.join(known)}")
        for name, value in {"factor": factor, "false_alarms": false_alarms}.items():
            if not 0 < value < 1:
                raise ConfigError(f"Guard: {name} {value} must be between 0 and 1")
        if max_distance is not None and not max_distance > 0:
            raise ConfigError(f"Guard: max_distance {max_distance} must be positive")
        if not patience >= 1:
            raise ConfigError(f"Guard: patience {patience} must be at least 1 validation")
        self.action = action
        self.factor = factor
        self.reward = reward
        self.false_alarms = false_alarms
        self.max_distance = max_distance
        self.patience = patience
        self._rewards: list[str] = []  # the one that decides comes first
        self._best: dict[str, Tensor] = {}
        self._best_images = 0
        self._acted: dict[str, Tensor] = {}  # what was measured when it last acted, since the best
        self._pretrained: dict[str, float] = {}
        self._in_vain = 0
        self._stopped = False
        self._tidy = False

    # ---- before the run

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        write_whole(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Check that the run has what the guard needs.

        Raises:
            ConfigError: There is no held-out reward or no validation, or the action cannot be taken.
        """
        self._rewards = self._decided_by(pl_module.held_out)
        if not trainer.enable_validation:
            raise ConfigError("Guard: the run has no validation; raise trainer.limit_val_batches above 0")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        before = callbacks[: callbacks.index(self)]
        if late := [one for one in before if isinstance(one, AdapterExport | RunSummary)]:
            raise ConfigError(
                f"Guard: it comes after {type(late[0]).__name__}, which would write weights that a rollback "
                "discards; give [Guard(...), *default_callbacks()]"
            )
        if self.action == "rollback" and not pl_module.goes_back:
            raise ConfigError(
                f"Guard: {type(pl_module).__name__} cannot go back to earlier weights; set action to "
                "lower_rate or stop"
            )
        rates = [group.get("lr") for one in trainer.optimizers for group in one.param_groups]
        if self.action in ("lower_rate", "rollback") and None in rates:
            raise ConfigError(
                "Guard: the optimizer has no learning rate to lower; give it one (lr), or set action to stop"
            )

    def _decided_by(self, held_out: tuple[str, ...]) -> list[str]:
        if not held_out:
            raise ConfigError(
                "Guard: all rewards are trained on, so nothing shows when they are exploited; add one "
                "without a weight to rewards"
            )
        names = {name.removeprefix("reward/"): name for name in held_out}
        truths = [name for name in names if name.rpartition("/")[2] == "truth"]
        wanted = self.reward or [*truths, *names][0]
        if wanted not in names:
            raise ConfigError(f"Guard: reward {wanted!r} is not held out; give one of {', '.join(names)}")
        return [names[wanted], *(name for name in held_out if name != names[wanted])]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Resume: a run that the guard has stopped stays stopped; look for the best checkpoint."""
        self._tidy = True
        if self._stopped and self.action == "stop":
            trainer.should_stop = True
            rank_zero_warn("guard: this run was stopped; to resume it, change action or remove the guard")
        there = trainer.strategy.broadcast(self._file(trainer).exists())
        if self._best and not there and self.action == "rollback":
            rank_zero_warn(f"guard: {self._file(trainer)} is missing; the next validation counts as the best")
            self._best = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._remove_older(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._remove_older(trainer)

    # ---- after each validation

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        now = pl_module.latest
        self._forget_other_measurements(pl_module)
        if not self._best and trains(now, self._rewards) and self.patience > (there := validations(trainer)):
            rank_zero_warn(
                f"guard: patience {self.patience} is more than the validations of this fit ({there}), so a "
                "reward that rises in vain is not noticed; lower it, or set trainer.val_check_interval"
            )
        changes = self._changes(trainer, now, pl_module.prompt_groups) if self._best else []
        better = (
            not changes or changes[0].difference > 0 or self._has_more_scores(now, pl_module.prompt_groups)
        )
        # The same on all ranks, whatever their processors make of the last bit.
        better, changes = trainer.strategy.broadcast((better, changes))
        changes = self._counted(changes, better)
        troubles = [one for one in changes if one.certain]
        if better:
            self._keep(trainer, pl_module)
        elif troubles:
            self._act(trainer, pl_module, troubles)
        self._log(trainer, pl_module, changes, acts=bool(troubles and not better))

    def _forget_other_measurements(self, module: AlignmentModule) -> None:
        """Compare nothing with what was measured with other prompts, rewards or guidance."""
        pretrained = {n: float(values.double().nan_to_num().sum()) for n, values in module.baseline.items()}
        if pretrained != self._pretrained:
            self._best, self._acted, self._pretrained = {}, {}, pretrained
            if (prompts := len(module.prompt_groups.unique())) < FEWEST:
                rank_zero_warn(
                    f"guard: {prompts} held-out prompts are too few to be certain, so it will not act; raise "
                    f"data.validation_prompts to {FEWEST} or more"
                )

    def _changes(self, trainer: Trainer, now: dict[str, Tensor], groups: Tensor) -> list[Change]:
        """The changes since the best validation; what was acted on must have become worse since to count."""
        watched = bounds(
            self._best, self._rewards, validations(trainer), self.false_alarms, self.max_distance
        )
        found = []
        for bound in watched:
            change = changed(bound, since(self._best, bound.name), now[bound.name], groups)
            if change.certain and self._acted:
                again = replace(bound, side=int(math.copysign(1, change.difference)), slack=0.0)
                worse = changed(again, self._acted[bound.name], now[bound.name], groups)
                change = replace(change, evidence=min(change.evidence, worse.evidence))
            found.append(change)
        return found

    def _counted(self, changes: list[Change], better: bool) -> list[Change]:
        """The changes; a rise of the trained reward is trouble only when it was in vain for long enough."""
        risen = any(one.certain for one in changes if one.name == TRAINED)
        self._in_vain = self._in_vain + 1 if risen and not better else 0
        so_far = self._in_vain / self.patience
        return [replace(one, evidence=so_far) if one.name == TRAINED else one for one in changes]

    def _has_more_scores(self, now: dict[str, Tensor], groups: Tensor) -> bool:
        """Whether the best validation has too few scores to be compared with, and this one has more."""
        deciding = self._rewards[0]
        before, after = (len(groups[one[deciding].isfinite()].unique()) for one in (self._best, now))
        return before < min(FEWEST, after)

    def _keep(self, trainer: Trainer, module: AlignmentModule) -> None:
        """Take the newest validation as the best, and write its weights."""
        self._best, self._best_images, self._acted = dict(module.latest), module.images, {}
        self._tidy = True
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            flush(trainer)
            trainer.save_checkpoint(self._file(trainer), False)  # not weights alone

    def _act(self, trainer: Trainer, module: AlignmentModule, troubles: list[Change]) -> None:
        self._acted = dict(module.latest)
        done = f"nothing is changed; its weights are in {self._file(trainer)}"
        if self.action == "stop":
            self._stopped = trainer.should_stop = True
            done = f"the run stops; its weights are in {self._file(trainer)}"
        if self.action == "rollback":
            self._go_back(trainer, module)
        if self.action in ("lower_rate", "rollback"):
            module.rate_factor *= self.factor
            done = f"the learning rate is {module.rate_factor:g} of what it was configured"
            if self.action == "rollback":
                done = f"its weights are restored, and {done}"
        told = ", ".join(map(self._described, troubles))
        self._in_vain = 0
        rank_zero_warn(
            f"guard: after {module.images} images {told} since the best validation, at {self._best_images} "
            f"images: {done}"
        )

    def _described(self, trouble: Change) -> str:
        if trouble.name != TRAINED:
            return str(trouble)
        return f"{trouble} and {self._rewards[0]} did not, for {self._in_vain} validations,"

    def _go_back(self, trainer: Trainer, module: AlignmentModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        take_back(trainer, self._file(trainer))
        # So that no file says of these weights what was measured of others.
        module.taken_back, self._acted = self._best, {}

    def _log(self, trainer: Trainer, module: AlignmentModule, changes: list[Change], acts: bool) -> None:
        logged = {f"guard/change/{one.name}": one.difference for one in changes}
        logged |= {f"guard/evidence/{one.name}": one.evidence for one in changes}
        logged |= {"guard/best_images": float(self._best_images), "guard/acts": float(acts)}
        logged["guard/rate_factor"] = module.rate_factor
        for logger in trainer.loggers:
            logger.log_metrics({n: v for n, v in logged.items() if math.isfinite(v)}, module.images)

    # ---- files

    def _file(self, trainer: Trainer) -> Path:
        return run_folder(trainer) / "checkpoints" / f"{KEPT}{self._best_images:08d}.ckpt"

    def _remove_older(self, trainer: Trainer) -> None:
        """Remove the files of earlier best validations, once the newest checkpoint knows of the new one."""
        if self._tidy and writes(trainer):
            for path in self._file(trainer).parent.glob(f"{KEPT}*.ckpt"):
                if path != self._file(trainer):
                    path.unlink()
        self._tidy = False

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self._best,
            "best_images": self._best_images,
            "acted": self._acted,
            "in_vain": self._in_vain,
            "pretrained": self._pretrained,
            "stopped": self._stopped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best, self._best_images = state_dict["best"], state_dict["best_images"]
        self._acted, self._pretrained = state_dict["acted"], state_dict["pretrained"]
        self._stopped, self._in_vain = state_dict["stopped"], state_dict.get("in_vain", 0)
