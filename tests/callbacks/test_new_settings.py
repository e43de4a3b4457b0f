"""A run that goes on with new values of the optimizer."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, LinearLR, LRScheduler, SequentialLR

from lit_align.callbacks import NewSettings
from lit_align.errors import ConfigError


def schedules(optimizer: torch.optim.Optimizer, name: str) -> LRScheduler | None:
    if name == "none":
        return None
    if name == "lambda":
        return LambdaLR(optimizer, lambda step: 1 / (1 + step))
    parts = [LinearLR(optimizer, total_iters=4), LinearLR(optimizer, 1.0, 0.1, total_iters=4)]
    return SequentialLR(optimizer, parts, [3]) if name == "sequence" else ChainedScheduler(parts)


def made(rate: float, name: str) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    return optimizer, schedules(optimizer, name)


def rates(optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return found


def trainer(optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None) -> Any:
    configs = [] if scheduler is None else [SimpleNamespace(scheduler=scheduler)]
    return SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=configs, callbacks=[])


@pytest.mark.parametrize("name", ["none", "lambda", "linear", "sequence"])
def test_a_new_rate_goes_on_as_if_it_had_been_there_from_the_start(name, caplog):
    expected = rates(*made(0.5, name), 6)[2:]
    old = made(1.0, name)
    rates(*old, 2)
    optimizer, scheduler = made(0.5, name)
    callback = NewSettings(["lr"])
    callback.on_fit_start(trainer(optimizer, scheduler), None)
    optimizer.load_state_dict(old[0].state_dict())  # as the Trainer does
    if scheduler is not None:
        scheduler.load_state_dict(old[1].state_dict())
    callback.on_train_start(trainer(optimizer, scheduler), SimpleNamespace(rate_factor=0.25))
    assert "steps are made with 0.25 of the new one" in caplog.text
    assert rates(optimizer, scheduler, 4) == pytest.approx(expected)


def test_other_values_are_set_and_unknown_ones_refused():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], weight_decay=0.5, lr=1.0)
    callback = NewSettings(["weight_decay"])
    callback.on_fit_start(trainer(optimizer, None), None)
    optimizer.param_groups[0]["weight_decay"] = 0.1  # restored
    callback.on_train_start(trainer(optimizer, None), None)
    assert optimizer.param_groups[0] | {"params": []} == optimizer.param_groups[0] | {"params": [], "lr": 1.0}
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    with pytest.raises(ConfigError, match="the optimizer's momentum cannot change"):
        NewSettings(["momentum"]).on_fit_start(trainer(optimizer, None), None)
