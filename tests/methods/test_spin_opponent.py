"""The opponent of SPIN: what its pool holds, and how a fit goes on after an interrupt."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_align.callbacks import BatchCheckpoint
from lit_align.methods import SPINModule
from lit_align.methods.spin import opponent
from lit_align.methods.spin.opponent import OPPONENT
from lit_align.randomness import generator
from lit_align.rollout import rollout
from tests.methods.build import assert_same, fit, make
from tests.methods.recorders import Killed
from tests.methods.test_spin import BATCH, Players

module = partial(make, SPINModule)


def test_the_pool_holds_the_opponents_images_of_the_coming_pairs_alone(tiny, tmp_path):
    aligned = module(tiny, steps=[3, 2])
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "mine.txt").touch()
    recorder = fit(aligned, tmp_path, 5)
    assert (tmp_path / "pool" / "mine.txt").exists()
    (folder,) = (tmp_path / "pool").glob("[!m]*")  # the first iteration's went with it
    assert aligned.pool is not None
    assert aligned.pool.source == folder.name
    (path,) = folder.iterdir()
    with safe_open(path, "pt") as shard:
        assert shard.metadata() == {"source": folder.name}
        assert shard.get_slice("samples").get_shape() == [2 * BATCH, *aligned.backbone.latent_shape]
        held = shard.get_tensor("index").tolist()
    assert sorted(held) == sorted(row for rows in recorder.index[3:] for row in rows)
    hashes = [aligned._opponent_hash()]  # another seed, and other pairs, have another pool
    aligned.seed += 1
    hashes.append(aligned._opponent_hash())
    aligned.trainer.datamodule.source.label = lambda row: 1.0
    hashes.append(aligned._opponent_hash())
    assert len(set(hashes)) == 3


def test_the_opponents_images_are_a_function_of_pair_and_iteration(tiny):
    assert module(tiny, guidance=3.0).opponent_guidance == 3.0  # if it is not given
    aligned, prompts = module(tiny, opponent_guidance=2.0, seed=3), ["a star", "two red circles"]
    with torch.no_grad():
        aligned.iteration = 1
        first, alone = aligned._play([5, 9], prompts), aligned._play([9], prompts[1:])
        aligned.iteration = 2
        second = aligned._play([5, 9], prompts)
        draw = [generator(aligned.seed, "opponent 2", 5)]
        noise = torch.randn(aligned.backbone.latent_shape, generator=draw[0])
        cond = aligned.backbone.encode(prompts[:1])
        policy = aligned.backbone.policy(aligned.sampler, cond, 2.0, OPPONENT)
        expected = rollout(policy, noise[None], aligned.sampler.num_steps, draw).states[-1]
    torch.testing.assert_close(alone, first[1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(second[:1], expected, rtol=0, atol=1e-5)
    assert (first - second).flatten(1).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("changed", [{"eta": 0.5}, {"opponent_guidance": 2.0}, "pretrained model"], ids=str)
def test_another_way_to_draw_or_pretrained_model_makes_another_pool(tiny, tmp_path, changed):
    fit(module(tiny), tmp_path / "run")
    if changed == "pretrained model":
        (file,) = Path(shutil.copytree(tiny, tmp_path / "other"), "unet").glob("*.safetensors")
        weights = load_file(file)
        save_file(weights | {"conv_in.bias": weights["conv_in.bias"] + 0.1}, file, {"format": "pt"})
        other = module(tmp_path / "other")
    else:
        other = module(tiny, **changed)
    fit(other, tmp_path / "run")
    assert len(list((tmp_path / "run" / "pool").iterdir())) == 2


def test_a_fast_dev_run_leaves_no_files(tiny, tmp_path):
    recorder = fit(module(tiny), tmp_path, 2, fast_dev_run=True)
    assert len(recorder.logged) == 1
    assert not list(tmp_path.iterdir())


# ---- interrupts


def last_of(folder: Path) -> Path:
    (last,) = folder.rglob("last.ckpt")
    return last


def test_an_interrupted_pool_goes_on_without_loss_or_duplicates(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(opponent, "SHARD", 5)
    play, drawn = SPINModule._play, list[int]()

    def counting(self: SPINModule, rows: list[int], prompts: list[str]) -> Tensor:
        if len(drawn) == 10 and not (tmp_path / "again").exists():
            raise RuntimeError("killed")
        drawn.extend(rows)
        return play(self, rows, prompts)

    monkeypatch.setattr(SPINModule, "_play", counting)
    with pytest.raises(RuntimeError, match="killed"):
        fit(module(tiny, steps=4), tmp_path / "run", 4)
    (folder,) = (tmp_path / "run" / "pool").iterdir()
    assert len(list(folder.glob("*.safetensors"))) == 2
    (tmp_path / "again").touch()
    resumed, whole = module(tiny, steps=4), module(tiny, steps=4)
    fit(resumed, tmp_path / "run", 4)
    assert len(drawn) == len(set(drawn)) == 4 * BATCH
    assert list((tmp_path / "run" / "pool").iterdir()) == [folder]
    fit(whole, tmp_path / "whole", 4)
    assert resumed.pool is not None
    assert whole.pool is not None
    index = torch.tensor(sorted(drawn[: 4 * BATCH]))
    torch.testing.assert_close(resumed.pool[index], whole.pool[index], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("crash", "exact", "place"),
    [(3, False, (1, 2)), pytest.param(4, True, (2, 1), marks=pytest.mark.slow)],
    ids=["at-the-start-of-the-second", "exact-in-the-second"],
)
def test_a_resumed_iteration_equals_the_uninterrupted_one_bit_for_bit(tiny, tmp_path, crash, exact, place):
    options: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": None}
    sinking = partial(torch.optim.lr_scheduler.LinearLR, total_iters=3)
    whole, cut, resumed = (
        module(tiny, rates=[1e-2, 5e-3], exact=exact, steps=[2, 2], lr_scheduler=sinking) for _ in range(3)
    )
    one, killed, rest = Players(), Players(crash), Players()
    fit(whole, tmp_path / "whole", 2, recorder=one, **options)
    with pytest.raises(Killed):
        fit(cut, tmp_path / "cut", 2, BatchCheckpoint(), recorder=killed, **options)
    last = last_of(tmp_path / "cut")
    assert tuple(torch.load(last, weights_only=True)["spin"].values()) == place
    fit(resumed, tmp_path / "cut", 2, recorder=rest, ckpt_path=last, **options)
    assert_same(list(whole.parameters()), list(resumed.parameters()))
    assert one.index == killed.index + rest.index
    losses = [[metrics["train/loss"] for metrics in recorder.logged] for recorder in (one, killed, rest)]
    assert losses[0] == losses[1] + losses[2]
    states = [each.optimizers().state.values() for each in (whole, resumed)]
    for before, after in zip(*states, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert resumed.images == whole.images == 4 * BATCH * 2
    assert_same(one.pools[crash - 1 :], rest.pools)


def test_a_run_resumed_after_its_last_update_has_nothing_left_to_do(tiny, tmp_path):
    fit(module(tiny, iterations=1, steps=2), tmp_path, 4, BatchCheckpoint())
    finished = module(tiny, iterations=1, steps=2)
    recorder = fit(finished, tmp_path, 4, ckpt_path=last_of(tmp_path), max_epochs=3)
    assert recorder.logged == []
    assert finished.batches == 2


def test_a_run_may_be_resumed_with_fewer_iterations_or_other_epochs(tiny, tmp_path):
    fit(module(tiny, steps=2), tmp_path, 3, BatchCheckpoint())
    last, fewer, longer = last_of(tmp_path), module(tiny, iterations=1, steps=2), module(tiny, steps=[2, 9])
    assert fit(fewer, tmp_path, 6, ckpt_path=last).logged == []  # beyond its last iteration
    fit(longer, tmp_path, 2, ckpt_path=last, max_epochs=2)  # has all the images it needs
    assert longer.batches == 5
