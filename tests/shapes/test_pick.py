"""Shapes-Pick: Pick-a-Pic's form, an annotator who errs as documented, and files that can be resumed."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from lit_align.errors import ConfigError
from lit_align.shapes import PIPELINE
from lit_align.shapes.recipe import pick
from lit_align.shapes.recipe.preferences import (
    TEMPERATURE,
    TIE_BELOW,
    TIE_SHARE,
    counted_rng,
    prefer,
    show,
)
from lit_align.shapes.recipe.quality import draw
from lit_align.shapes.world import judge, parse, utility

# The cards of yuvalkirstain/pickapic_v1 and pickapic_v2.
CARD = {
    "are_different": "bool",
    "best_image_uid": "string",
    "caption": "string",
    "created_at": "timestamp[ns]",
    "has_label": "bool",
    "image_0_uid": "string",
    "image_0_url": "string",
    "image_1_uid": "string",
    "image_1_url": "string",
    "jpg_0": "binary",
    "jpg_1": "binary",
    "label_0": "double",
    "label_1": "double",
    "model_0": "string",
    "model_1": "string",
    "ranking_id": "int64",
    "user_id": "int64",
    "num_example_per_prompt": "int64",
    "__index_level_0__": "int64",
}


@pytest.fixture(scope="module", autouse=True)
def _small_files() -> object:
    """Files of two prompts: three files hold 30 pairs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pick, "BLOCK", 2)
        patch.setattr(pick, "SHARD", 2)
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pick")
    pick.make_pick(folder, 30, 3, PIPELINE)
    return folder


def files(out: Path) -> list[Path]:
    return sorted((out / "pick").iterdir())


@pytest.mark.slow
def test_the_columns_are_those_of_pick_a_pic(out: Path) -> None:
    tables = [parquet.read_table(file) for file in files(out)]
    assert [len(table) for table in tables] == [12, 12, 6]
    for table in tables:
        assert {field.name: str(field.type) for field in table.schema} == CARD
        assert table.column_names == list(CARD)


@pytest.mark.slow
def test_the_values_agree_with_each_other(out: Path) -> None:
    rows = pa.concat_tables([parquet.read_table(file) for file in files(out)]).to_pylist()
    assert [row["ranking_id"] for row in rows] == list(range(30))
    for row in rows:
        label = {row["image_0_uid"]: 1.0, row["image_1_uid"]: 0.0}.get(row["best_image_uid"], 0.5)
        assert (row["label_0"], row["label_1"]) == (label, 1 - label)
        assert row["has_label"] == (row["best_image_uid"] != "none")
        assert row["are_different"] == (row["model_0"] != row["model_1"])
        assert str(parse(row["caption"])) == row["caption"]
    images = {row[f"image_{i}_uid"]: row[f"jpg_{i}"] for row in rows for i in (0, 1)}
    assert len(images) == len(set(images.values())) == 20
    assert all(Image.open(io.BytesIO(jpg)).size == (64, 64) for jpg in images.values())


@pytest.mark.slow
def test_what_was_made_is_kept_and_the_rest_is_made_the_same(out: Path) -> None:
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files(out)}
    lost = files(out)[1]
    lost.unlink()
    pick.make_pick(out, 30, 3, PIPELINE)
    assert {file: file.read_bytes() for file in files(out)} == {
        file: old for file, (old, _) in before.items()
    }
    kept = [file for file in files(out) if file.stat().st_mtime_ns == before[file][1]]
    assert kept == [file for file in files(out) if file != lost]


@pytest.mark.slow
def test_other_data_in_the_folder_is_refused(out: Path) -> None:
    with pytest.raises(ConfigError, match="another seed"):
        pick.make_pick(out, 30, 4, PIPELINE)
    with pytest.raises(ConfigError, match="at least 1"):
        pick.make_pick(out, 0, 3, PIPELINE)


def test_models_have_their_shares() -> None:
    drawn = [model for number in range(1000) for model in pick.draw_models(counted_rng(0, "models", number))]
    assert sum(pick.MODELS.values()) == pytest.approx(1)
    for model, share in pick.MODELS.items():
        assert drawn.count(model) / len(drawn) == pytest.approx(share, abs=0.03)  # 4 standard errors


def test_ties_and_errors_come_at_their_rates() -> None:
    rng = np.random.default_rng(0)
    for difference in (0.0, TIE_BELOW / 2, -TEMPERATURE, 2 * TEMPERATURE):
        labels = np.array([prefer(1 + difference, 1.0, rng) for _ in range(800)])
        ties = TIE_SHARE * (abs(difference) < TIE_BELOW)
        assert (labels == 0.5).mean() == pytest.approx(ties, abs=0.07)
        share = 1 / (1 + np.exp(-difference / TEMPERATURE))
        assert labels[labels != 0.5].mean() == pytest.approx(share, abs=0.1)


def test_a_image_keeps_its_verdict_when_it_is_stored() -> None:
    captions, images = draw(100, 9, "pick")
    for number, (caption, image) in enumerate(zip(captions, images, strict=True)):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        shown = show(pixels, caption, "renderer", (0, number, 0))
        stored = np.asarray(Image.open(io.BytesIO(shown.jpg)))
        assert judge(stored, caption).facts == judge(pixels, caption).facts
        assert shown.utility == utility(stored, caption)
