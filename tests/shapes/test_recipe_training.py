"""What the stages of the recipe share, and the captions that lie."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lit_align.shapes.recipe.images import frame, frame_half, numpy_rng
from lit_align.shapes.recipe.lies import confuse
from lit_align.shapes.recipe.quality import draw
from lit_align.shapes.recipe.training import CHECKPOINT, Batches, Budget, Stage, fit
from lit_align.shapes.recipe.vae import CHANNELS, Components
from lit_align.shapes.world import in_grammar, judge, parse


class Line(Stage):
    """A single weight that moves by its learning rate."""

    def __init__(self, steps: int, cooling: float) -> None:
        super().__init__(nn.Linear(1, 1), 1.0, Budget(60.0, steps), decay=0.9, warmup=1, cooling=cooling)
        self.rates: list[float] = []
        self.seen: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.seen += batch.tolist()
        loss: Tensor = self.model(torch.ones(1, 1)).sum()
        return loss


def test_the_rate_falls_in_the_last_share_of_the_budget_only(tmp_path: Path) -> None:
    fit(stage := Line(10, cooling=0.5), Batches(4, 2, 0), tmp_path, "32-true")
    assert stage.rates[:6] == [1.0] * 6
    assert stage.rates[6:10] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert stage.rates[10:] == [0.0]


def test_an_interrupted_stage_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(whole := Line(10, 1.0), Batches(40, 2, 0), tmp_path / "whole", "32-true")

    class Interrupted(Line):
        def on_train_batch_end(self, outputs: object, batch: Tensor, batch_idx: int) -> None:
            super().on_train_batch_end(outputs, batch, batch_idx)
            if self.global_step == 4:
                folder.mkdir(parents=True, exist_ok=True)
                self.trainer.save_checkpoint(folder / CHECKPOINT)
                raise KeyError("the plug is pulled")

    folder = tmp_path / "parts"
    with pytest.raises(KeyError):
        fit(Interrupted(10, 1.0), Batches(40, 2, 0), folder, "32-true")
    fit(rest := Line(10, 1.0), Batches(40, 2, 0), folder, "32-true")
    assert rest.rates == whole.rates[4:]
    assert not (folder / CHECKPOINT).exists()


def test_batches_remember_their_place() -> None:
    batches = Batches(10, 3, seed=1)
    drawn = list(islice(batches, 8))
    assert len({number for batch in drawn[:3] for number in batch.tolist()}) == 9
    resumed = Batches(10, 3, seed=1)
    resumed.load_state_dict({"drawn": 4})
    assert all(torch.equal(a, b) for a, b in zip(islice(resumed, 4), drawn[4:], strict=True))


def test_components_are_standardised_and_the_largest_ones() -> None:
    images = draw(64, 3, "components")[1] * 2 - 1
    components = Components(images)
    codes = components(images)
    assert codes.shape == (64, CHANNELS, 8, 8)
    flat = codes.movedim(1, 0).flatten(1)
    assert torch.allclose(torch.cov(flat), torch.eye(CHANNELS), atol=1e-2)
    patches = torch.nn.functional.pixel_unshuffle(images, 8).movedim(1, 0).flatten(1)
    unexplained = (
        patches - torch.linalg.lstsq(flat.T, (patches - patches.mean(1, keepdim=True)).T)[0].T @ flat
    )
    assert unexplained.var(1).sum() < 0.03 * patches.var(1).sum()


def test_a_frame_changes_no_verdict() -> None:
    captions, images = draw(100, 7, "frames")
    framed = frame(images)
    assert all(judge(image, caption).score == 1 for image, caption in zip(framed, captions, strict=True))
    halves = frame_half(images, torch.Generator().manual_seed(0))
    bare = [torch.equal(half, image) for half, image in zip(halves, images, strict=True)]
    assert 35 <= sum(bare) <= 65
    assert torch.equal(halves, torch.where(torch.tensor(bare)[:, None, None, None], images, framed))


def test_confused_captions_are_captions_and_wrong() -> None:
    captions, images = draw(100, 6, "lies")
    rng = numpy_rng(0, "test")
    assert [confuse(caption, 0.0, rng) for caption in captions] == captions
    wrong = [confuse(caption, 1.0, rng) for caption in captions]
    assert all(in_grammar(caption) for caption in wrong)
    # Of two groups whose shapes are partners, each may be read as the other.
    single = [number for number, caption in enumerate(captions) if len(parse(caption).groups) == 1]
    assert not any(judge(images[number], wrong[number]).facts["shapes"] for number in single)
    half = [confuse(caption, 0.5, rng) for caption in captions]
    kept = [parse(a).groups[0].shape == parse(b).groups[0].shape for a, b in zip(captions, half, strict=True)]
    assert 30 <= sum(kept) <= 70
