"""Runs whose reward is on a server: the same numbers, and the server works while images are sampled."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_align.advantages import GroupAdvantages
from lit_align.methods import DDPOModule, NFTModule, PRDPModule
from lit_align.methods.tasks import Task
from lit_align.rewards import Brightness, RemoteReward, Reward, RewardBank
from lit_align.rewards.serving import answer
from tests.methods.build import draw, fit, held_out, make, task_prompts, trained
from tests.rewards.servers import answering, serving


@pytest.mark.parametrize("method", [DDPOModule, PRDPModule, NFTModule])
def test_training_is_the_same_bit_for_bit(method: Any, tiny: Path, tmp_path: Path) -> None:
    weights, rewards = [], []
    with serving(RewardBank({"light": Brightness()}, {"light": 1.0})) as url:
        for number, reward in enumerate((Brightness(), RemoteReward(url, "light", batch=3))):
            module = make(method, tiny, reward=reward, batch=2)
            fit(module, tmp_path / str(number))
            weights.append(trained(module))
            rewards.append(module.collected["reward"])
    assert torch.equal(*rewards)
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    assert any(weight.any() for weight in weights[0])


class Log(Reward):
    """Notes when its images come."""

    scope = "sample"

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def ahead(self, images: Any, prompts: Any, columns: Any) -> None:
        self.told.append(("ahead", len(prompts)))

    def forward(self, images, prompts):  # type: ignore[no-untyped-def, override]
        self.told.append(("score", len(prompts)))
        return images.mean((1, 2, 3))


def test_images_that_are_scored_are_told_of_chunk_by_chunk(tiny: Path, tmp_path: Path) -> None:
    log = Log()
    module = make(DDPOModule, tiny, rewards=RewardBank({"log": log}, {"log": 1.0}), batch=6)
    log.told.clear()  # the trial of the bank
    fit(module, tmp_path, limit_val_batches=1, num_sanity_val_steps=0)
    validation, training = [("ahead", 6), ("ahead", 2), ("score", 8)], [("ahead", 6)] * 2
    expected = [*validation, *training, ("ahead", 4), ("score", 16), *validation]
    assert log.told == expected
    log.told.clear()
    module.generate(["a circle"] * 3)
    assert log.told == []


def test_each_task_asks_its_own_server(tiny: Path, tmp_path: Path) -> None:
    logs = {"a": Log(), "b": Log()}
    tasks = {
        name: Task(RewardBank({"log": log}, {"log": 1.0}), GroupAdvantages()) for name, log in logs.items()
    }
    module = make(DDPOModule, tiny, tasks=tasks, batch=8)
    for log in logs.values():
        log.told.clear()
    fit(module, tmp_path, data=task_prompts("a", "b"))
    assert [log.told for log in logs.values()] == [[("ahead", 8), ("score", 8)]] * 2


@pytest.mark.slow  # it measures time, of which a busy machine has less
def test_a_reward_as_slow_as_sampling_costs_little(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen chunks: what is left is the last one's, a sixteenth, and the overhead."""
    chunk, bank = 0.25, RewardBank({"light": Brightness()}, {"light": 1.0})
    lock = threading.Lock()

    def slow(path: str, body: Any) -> Any:
        if path == "/rewards":
            return {"rewards": ["light"]}
        with lock:  # one after the other, as a model does
            time.sleep(chunk)
            return {"scores": answer(bank, body, torch.device("cpu"))}

    def seconds(reward: Reward) -> float:
        module = make(DDPOModule, tiny, reward=reward, batch=1)
        decode = module.backbone.decode
        monkeypatch.setattr(
            module.backbone, "decode", lambda latents: (time.sleep(chunk), decode(latents))[1]
        )
        batch = held_out(module)
        batch = batch[torch.arange(16) % len(batch)]
        began = time.perf_counter()
        module.score(draw(module, batch).images, batch)
        return time.perf_counter() - began

    with answering(slow) as url:
        alone, together = seconds(Brightness()), seconds(RemoteReward(url, "light", batch=1))
    assert together < 1.15 * alone
