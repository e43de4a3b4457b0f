"""The sweep of MSDDA over the weights of its objectives, and the baselines that it is compared with."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar
from PIL import Image
from rich.progress import Progress

from lit_align.backbones import REFERENCE, LoRA, StableDiffusionBackbone
from lit_align.callbacks import SweepReport, image_grid
from lit_align.callbacks.grid import uint8
from lit_align.comparison import compare
from lit_align.data import Batch
from lit_align.errors import ConfigError
from lit_align.methods import MSDDAModule
from lit_align.methods.msdda import CoDe, FactorSoup, RewardGradient, Soup, Sweep
from lit_align.methods.msdda.sweep import Measured
from lit_align.randomness import generator
from lit_align.rewards import Brightness, PairwiseDiversity, Redness, RewardBank
from lit_align.samplers import DDIM
from tests.methods.build import draw, make, prompts, randomise, trainer
from tests.methods.test_msdda import BOTH, batch

module = partial(make, MSDDAModule)


def swept(fused: MSDDAModule, folder: Path, *callbacks) -> dict[tuple[str, tuple[float, ...]], Measured]:
    """What a test measures, by method and weights; the experts are random."""
    randomise(fused)
    trainer(folder, 1, *callbacks).test(fused, prompts(), verbose=False)
    assert fused.front is not None
    return {(m.point.method, tuple(w for _, w in m.point.weights)): m for m in fused.front.measured}


def of_test() -> Batch:
    data = prompts()
    data.setup("test")
    return next(iter(data.test_dataloader()))


def mixed(fused: MSDDAModule, **weights: float) -> torch.Tensor:
    """The test images of a mixture of the experts' updates."""
    fused.backbone.weight_sets.mix("by hand", weights)
    return draw(fused, of_test(), "test", "by hand").images


# ---- the sweep


def test_a_sweep_measures_every_way_at_every_weight_on_the_same_noise(tiny, tmp_path, monkeypatch):
    strip: dict[str, torch.Tensor] = {}

    def kept(cells, captions, **options):
        strip.update(zip(captions, (cell for (cell,) in cells), strict=True))
        return image_grid(cells, captions, **options)

    monkeypatch.setattr("lit_align.callbacks.sweep.image_grid", kept)
    baselines = [Soup(), FactorSoup(), CoDe(candidates=4, every=2), RewardGradient(growth=0.5)]
    sweep = Sweep(2, [{"bright": 0.2, "red": 0.8}], baselines, images=2)
    fused = module(tiny, sweep=sweep, joint=[{"bright": 0.5, "red": 0.5}])
    before = {name: p.requires_grad for name, p in fused.named_parameters()}
    found = swept(fused, tmp_path, SweepReport())
    assert {name: p.requires_grad for name, p in fused.named_parameters()} == before
    grid = [(1.0, 0.0), (0.5, 0.5), (0.2, 0.8), (0.0, 1.0)]
    wanted = {("base", ()), ("expert", grid[0]), ("expert", grid[3]), ("joint training", grid[1])}
    wanted |= {(name, w) for name in ("MSDDA", "soup", "soup of factors") for w in grid[1:3]}
    wanted |= {(name, w) for name in ("CoDe", "reward gradient") for w in grid}
    assert set(found) == wanted
    rows = {(row["method"], row["weight/bright"]): row for row in fused.front.rows() if "gain" in row}
    base = found["base", ()].metrics
    # Each metric against what the module itself samples.
    own = draw(fused, of_test(), "test", "red")
    scores = fused.score(own.images, of_test()).report
    assert torch.equal(found["expert", grid[3]].metrics["reward/red"], scores["reward/red"])
    assert torch.equal(found["expert", grid[3]].images, own.images[[0, 2]])
    soup = mixed(fused, bright=0.2, red=0.8)
    assert torch.equal(found["soup", grid[2]].images, soup[[0, 2]])
    assert not torch.equal(found["MSDDA", grid[2]].images, soup[[0, 2]])
    assert (base["kl"] == 0).all()
    assert "kl" not in found["CoDe", grid[0]].metrics
    assert (found["MSDDA", grid[1]].metrics["kl"] > 0).all()
    # Search and gradients serve what they are asked for.
    for method in ("CoDe", "reward gradient"):
        assert rows[method, 1.0]["gain"] > 0
        assert rows[method, 0.0]["gain"] > 0
    worths = [
        0.2 * 10 * one["reward/bright"] + 0.8 * 30 * one["reward/red"]
        for one in (base, found["soup", grid[2]].metrics, found["MSDDA", grid[2]].metrics)
    ]
    gain, lead = (compare(one, worths[2], found["base", ()].groups) for one in worths[:2])
    assert rows["MSDDA", 0.2]["gain"] == pytest.approx(gain.difference, abs=1e-5)
    assert rows["MSDDA", 0.2]["gain/se"] == pytest.approx(gain.standard_error, rel=1e-4)
    assert rows["soup", 0.2]["lead"] == pytest.approx(lead.difference, abs=1e-5)
    assert rows["soup", 0.2]["lead/se"] == pytest.approx(lead.standard_error, rel=1e-4)
    volumes = fused.front.hypervolumes()
    assert volumes["base"] == pytest.approx(1.0, abs=1e-5)
    assert volumes["MSDDA"] >= volumes["expert"]
    written = tmp_path / "sweep"
    assert {path.name for path in written.iterdir()} == {"sweep.csv", "sweep.json", "strip.png", "front.png"}
    # A row for each prompt; of captions that all rows have, the last one's image was kept.
    first, last = (f"base: {prompt}" for prompt in fused.front.prompts)
    along = ["expert\nbright 1", "bright 0.5\nred 0.5", "bright 0.2\nred 0.8", "expert\nred 1"]
    assert list(strip) == [first, *along, last]
    assert torch.equal(strip[first], uint8(found["base", ()].images[0]))
    for name, images in zip(along[2:], (found["MSDDA", grid[2]].images, own.images[::2]), strict=True):
        assert torch.equal(strip[name], uint8(images[1]))
    summary = json.loads((written / "sweep.json").read_text())
    assert summary["hypervolume"] == volumes
    assert set(summary["hypervolume_error"]) == set(summary["hypervolume_lead"]) | {"MSDDA"} == set(volumes)
    assert summary["hypervolume_lead"]["base"] == pytest.approx(volumes["MSDDA"] - 1, abs=1e-5)
    assert min(summary["hypervolume_error"].values()) > 0
    assert len(summary["points"]) == len(wanted) == len((written / "sweep.csv").read_text().splitlines()) - 1
    assert not list(tmp_path.glob(".*draft"))


def test_three_objectives_are_swept_on_a_triangle(tiny, tmp_path):
    names = ["bright", "red", "blue"]
    bank = RewardBank(
        {"bright": Brightness(), "red": Redness(), "blue": Brightness()}, dict.fromkeys(names, 1.0)
    )
    options = {"experts": dict.fromkeys(names), "weights": dict.fromkeys(names, 1 / 3), "num_steps": 3}
    options["eval_sampler"] = partial(DDIM, num_steps=2)
    fused = module(tiny, rewards=bank, sweep=Sweep(3, baselines=[]), **options)
    found = swept(fused, tmp_path, SweepReport())
    assert len(found) == 1 + 10
    with fused.evaluating():
        own = draw(fused, of_test(), "test", "blue").images
    assert torch.equal(found["expert", (0.0, 0.0, 1.0)].images, own[::2])
    assert (tmp_path / "sweep" / "front.png").exists()


def test_a_target_further_than_the_experts_moves_the_mixtures_and_not_the_experts(tiny, tmp_path):
    """At beta / 2 the product has each expert to the power 2, the reference to -1; the soup goes as far."""
    fused = module(tiny, target_beta=0.025, sweep=Sweep(2, baselines=[Soup()]))
    found = swept(fused, tmp_path)
    assert {method for method, weights in found if weights == (0.0, 1.0)} == {"expert", "MSDDA", "soup"}
    assert all(fused.front.ends[name] == [] for name in ("MSDDA", "soup", "joint training"))
    expert = draw(fused, of_test(), "test", "red").images
    soup = mixed(fused, bright=1.0, red=1.0)
    assert torch.equal(found["soup", (0.0, 1.0)].images, mixed(fused, red=2.0)[::2])
    assert torch.equal(found["expert", (0.0, 1.0)].images, expert[::2])
    assert not torch.equal(found["MSDDA", (0.0, 1.0)].images, expert[::2])
    assert torch.equal(found["soup", (0.5, 0.5)].images, soup[::2])
    fused.export(tmp_path / "adapter")  # at the configured weights, .5 and .5: as far as the product
    fused.backbone.weight_sets.load("read", tmp_path / "adapter")
    torch.testing.assert_close(draw(fused, of_test(), "test", "read").images, soup, atol=1e-5, rtol=0)


def test_where_one_expert_has_another_strength_only_the_other_end_is_an_expert(tiny, tmp_path):
    fused = module(tiny, num_steps=2, betas={"red": 0.1}, sweep=Sweep(2, baselines=[Soup(), FactorSoup()]))
    swept(fused, tmp_path)
    bright, red = ((("bright", float(i)), ("red", float(1 - i))) for i in (1, 0))
    assert fused.front.ends == {"MSDDA": [bright], "soup": [bright], "soup of factors": [bright, red]} | {
        "joint training": [bright]
    }
    for method in ("MSDDA", "soup", "soup of factors"):
        points = fused.front.methods()[method]
        assert len(points) == 3
        assert {one.point.weights for one in points} >= {bright, red}


def test_the_kl_of_a_point_is_that_of_its_own_samplers(tiny, tmp_path):
    samplers = {"red": partial(DDIM, num_steps=2, eta=0.5)}
    fused = module(tiny, num_steps=2, samplers=samplers, sweep=Sweep(2, baselines=[]))
    found, cond = swept(fused, tmp_path), fused.backbone.encode(of_test().prompts)
    for method, weights in (("expert", (0.0, 1.0)), ("MSDDA", (0.5, 0.5))):
        fused.weights = dict(zip(BOTH, weights, strict=True))
        with torch.no_grad():
            kl = fused.distance(of_test(), cond, draw(fused, of_test(), "test").trajectory)["kl"]
        torch.testing.assert_close(found[method, weights].metrics["kl"], kl)


def test_one_random_expert_is_called_so(tiny, tmp_path):
    fused = module(tiny, num_steps=2, one_expert_per_step=True, sweep=Sweep(2, baselines=[]))
    assert {method for method, _ in swept(fused, tmp_path)} == {"base", "expert", "one random expert"}


@pytest.mark.slow
def test_a_sweep_of_two_processes_is_that_of_one(tiny, tmp_path):
    found = []
    for devices in (1, 2):
        fused, folder = module(tiny, sweep=Sweep(2, baselines=[Soup()], images=3)), tmp_path / str(devices)
        randomise(fused)
        trainer(folder, 1, SweepReport(), devices=devices).test(fused, prompts(), verbose=False)
        (summary,) = folder.glob("**/sweep.json")
        strip = np.asarray(Image.open(summary.with_name("strip.png")))
        found.append((json.loads(summary.read_text()), strip))
    (one, strip_one), (two, strip_two) = found
    assert one["images"] == two["images"] == 8
    for before, after in zip(one["points"], two["points"], strict=True):
        assert before.keys() == after.keys()
        for name in before.keys() - {"seconds"}:
            assert before[name] == pytest.approx(after[name], abs=1e-4), name
    assert one["hypervolume_error"] == pytest.approx(two["hypervolume_error"], abs=1e-3)
    assert strip_one.shape == strip_two.shape
    assert np.abs(strip_one.astype(int) - strip_two).max() <= 2


def test_the_bar_of_a_sweep_moves_inside_the_trainers(tiny, tmp_path, monkeypatch):
    drawn: list[float] = []
    refresh = Progress.refresh

    def monitored(self: Progress) -> None:
        drawn.extend(task.completed for task in self.tasks if task.description == "Sweep")
        refresh(self)

    monkeypatch.setattr(Progress, "refresh", monitored)
    monkeypatch.setattr("lit_align.methods.base.SECONDS_PER_FRAME", 0.0)
    fused = module(tiny, num_steps=2, sweep=Sweep(2, baselines=[], images=0))
    randomise(fused)
    run = trainer(tmp_path, 1, SweepReport(), RichProgressBar(), enable_progress_bar=True)
    run.test(fused, prompts(), verbose=False)
    assert {1.0, 2.0, 3.0, 4.0} <= set(drawn)  # the base, both experts, and between them
    assert not list(tmp_path.glob("**/strip.png"))  # no images were asked for
    assert list(tmp_path.glob("**/sweep.csv"))


def test_sweeps_that_cannot_be_told_apart_or_made_are_refused():
    with pytest.raises(ConfigError, match="two are called 'CoDe'"):
        Sweep(2, baselines=[CoDe(4, 5), CoDe(20, 5)])
    assert len(Sweep(2, baselines=[CoDe(4, 5), CoDe(20, 5, name="CoDe, 20")]).baselines) == 2
    with pytest.raises(ConfigError, match="grid"):
        Sweep(0)
    with pytest.raises(ConfigError, match="images: -1"):
        Sweep(2, images=-1)


# ---- the baselines


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_objectives_are_scored_outside_autocast(tiny, dtype):
    """As everywhere else: what search and gradients follow must not change with the precision."""
    seen = []

    class Seen(Brightness):
        def forward(self, images, prompts, groups=None, columns=None):
            seen.append((torch.is_autocast_enabled("cpu"), images.dtype))
            return super().forward(images, prompts, groups, columns)

    fused = module(tiny)
    fused.rewards = RewardBank({"bright": Seen()}, {"bright": 10.0})
    seen.clear()  # the bank tried it
    with torch.autocast("cpu", torch.bfloat16):
        scores = fused.objective("bright", torch.full((4, 3, 8, 8), 0.5, dtype=dtype), batch())
    assert seen == [(False, torch.float32)]
    torch.testing.assert_close(scores, torch.full((4,), 5.0))


def test_guidance_by_gradients_predicts_once_a_step(tiny, monkeypatch):
    fused, calls = module(tiny), []
    predict = StableDiffusionBackbone.predict
    monkeypatch.setattr(
        StableDiffusionBackbone,
        "predict",
        lambda self, *given, **named: calls.append(1) or predict(self, *given, **named),
    )
    noise, _ = fused.draw_noise(torch.arange(4), "test")
    cond = fused.backbone.encode(batch().prompts)
    guided = RewardGradient(growth=0.5, temperature=2.0).policy(
        fused, dict.fromkeys(BOTH, 0.5), batch(), cond
    )
    with torch.no_grad():
        step = guided(noise, 1)
    assert len(calls) == 1
    # The same from one gradient at a time.
    base, x = fused.expert(REFERENCE, cond), noise.clone().requires_grad_()
    found = base(x, 1)
    shift = torch.zeros_like(noise)
    for name in BOTH:
        images = fused.backbone.decode(base.predict_x0(x, base.predict(x, 1), 1))
        (gradient,) = torch.autograd.grad(fused.objective(name, images, batch()).sum(), x)
        shift += 0.5 * gradient / gradient.norm(dim=1, keepdim=True) / 2.0
    torch.testing.assert_close(step.mean, found.mean + 0.5 * found.std.square() * shift)


def test_a_candidate_without_a_score_is_not_chosen(tiny, monkeypatch):
    """NaN counts as the largest elsewhere, and the search would follow what cannot be judged."""
    fused, chosen, least, seen = module(tiny), [], -math.inf, list[float]()
    cond = fused.backbone.encode(batch(1).prompts)

    def unsure(self: MSDDAModule, name: str, images: torch.Tensor, batch: Batch) -> torch.Tensor:
        scores = images.mean((1, 2, 3))
        seen.extend(scores.tolist())
        return torch.where(scores < least, torch.nan, scores)

    monkeypatch.setattr(MSDDAModule, "objective", unsure)
    for _ in range(2):
        seen.clear()
        with torch.no_grad():
            search = CoDe(candidates=6, every=1).policy(fused, {"bright": 1.0}, batch(1), cond)
            chosen.append(search(fused.draw_noise(torch.tensor([7]), "test")[0], 0).mean)
        assert len(seen) == 6
        least = sorted(seen)[3]  # of the second search three candidates have no score
    assert torch.equal(*chosen)


def test_a_search_goes_on_with_the_candidate_whose_clean_image_is_the_best(tiny):
    """By hand: a candidate is a state of the next step, and only every so many steps are searched."""
    seen: list[torch.Tensor] = []

    class Seen(Brightness):
        def forward(self, images, prompts, groups=None, columns=None):
            seen.append(images)
            return super().forward(images, prompts)

    bank = RewardBank({"bright": Seen(), "red": Redness()}, {"bright": 10.0, "red": 30.0})
    fused = module(tiny, rewards=bank, seed=3)
    seen.clear()  # the bank tried it
    cond, noise = fused.backbone.encode(batch().prompts), fused.draw_noise(torch.arange(4), "test")[0]
    base = fused.expert(REFERENCE, cond)
    with torch.no_grad():
        search = CoDe(candidates=8, every=2).policy(fused, {"bright": 0.2, "red": 0.8}, batch(), cond)
        found = search(noise, 0)
        draws = [generator(fused.seed, "candidates", i) for i in batch().index.tolist()]
        drawn = [base(noise, 0).rsample(draws) for _ in range(8)]
        clean = [fused.backbone.decode(base.predict_x0(x, base.predict(x, 1), 1)) for x in drawn]
        assert all(map(torch.equal, seen, clean))
        scores = [10 * 0.2 * Brightness()(one, []) + 30 * 0.8 * Redness()(one, []) for one in clean]
        best = torch.stack(scores).argmax(0).tolist()
        assert torch.equal(found.mean, torch.stack([drawn[n][i] for i, n in enumerate(best)]))
        assert not found.std.any()
        assert search(noise, 1).std.all()  # no search


class Longer(Brightness):
    """How bright an image is, times by how much its prompt is longer than 12 letters."""

    def forward(self, images, prompts, groups=None, columns=None):
        return super().forward(images, prompts) * torch.tensor([len(prompt) - 12.0 for prompt in prompts])


@pytest.mark.parametrize("baseline", [CoDe(candidates=8), RewardGradient(growth=0.5)])
def test_a_part_of_the_images_is_served_as_in_the_whole(tiny, baseline):
    bank = RewardBank({"bright": Longer()}, {"bright": 10.0})
    fused = module(tiny, rewards=bank, experts={"bright": None}, weights={"bright": 1.0})
    numbers, rows = torch.arange(2), torch.tensor([1])
    some = Batch(["a dog", "a dog and a cat"], numbers, index=numbers)
    cond, noise = fused.backbone.encode(some.prompts), fused.draw_noise(numbers, "test")[0]
    with torch.no_grad():
        whole, part = (baseline.policy(fused, {"bright": 1.0}, some, cond) for _ in range(2))
        torch.testing.assert_close(part[rows](noise[rows], 0).mean, whole(noise, 0).mean[rows])


def test_rewards_of_sets_are_no_objectives_of_candidates(tiny):
    bank = RewardBank(
        {"bright": Brightness(), "varied": PairwiseDiversity("shapes")}, {"bright": 1.0, "varied": 1.0}
    )
    options = {"weights": {"bright": 1.0}, "experts": {"bright": None, "varied": None}}
    with pytest.raises(ConfigError, match=r"varied is a reward of sets.*take CoDe out"):
        module(tiny, rewards=bank, sweep=Sweep(2, baselines=[CoDe()]), **options)


def test_adapters_whose_factors_cannot_be_averaged_are_refused_before_anything_runs(tiny, tmp_path):
    StableDiffusionBackbone(str(tiny), lora=LoRA(2, 2.0)).weight_sets.save(tmp_path / "other")
    experts = {"bright": None, "red": str(tmp_path / "other")}
    with pytest.raises(ConfigError, match="ranks"):
        module(tiny, experts=experts, sweep=Sweep(2, [], [FactorSoup()]))
