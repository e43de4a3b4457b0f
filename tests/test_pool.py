from pathlib import Path

import pytest
import torch

from lit_align.errors import ConfigError
from lit_align.pool import Pool


def samples(rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)[:, None, None].expand(-1, 2, 3)


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_pool_gives_back_each_row_in_any_order(tmp_path: Path, on_disk):
    pool = Pool(tmp_path / "pool" if on_disk else None, "a")
    assert pool.missing([7, 3, 7, 9]) == [7, 3, 9]
    pool.add([7, 3], samples([7, 3]))
    pool.add([9], samples([9]))
    assert len(pool) == 3
    assert pool.missing([9, 1, 3]) == [1]
    assert torch.equal(pool[torch.tensor([9, 3, 9, 7])], samples([9, 3, 9, 7]))
    assert on_disk == any(tmp_path.iterdir())


def test_a_pool_finds_what_others_wrote(tmp_path: Path):
    one, two = Pool(tmp_path, "a"), Pool(tmp_path, "a")
    one.add([1, 2], samples([1, 2]))
    assert two.missing([1, 2, 3]) == [1, 2, 3]
    two.refresh()
    two.add([3], samples([3]))
    later = Pool(tmp_path, "a")
    assert later.missing([1, 2, 3, 4]) == [4]
    assert torch.equal(later[torch.tensor([3, 1])], samples([3, 1]))


def test_a_draft_that_an_interrupt_left_is_no_shard(tmp_path: Path):
    (tmp_path / ".000000001-00000000.safetensors.1234").write_bytes(b"half")
    pool = Pool(tmp_path, "a")
    assert pool.missing([1]) == [1]
    pool.add([1], samples([1]))
    assert len(Pool(tmp_path, "a")) == len(list(tmp_path.glob("*.safetensors"))) == 1


def test_samples_of_another_model_are_refused(tmp_path: Path):
    pool = Pool(tmp_path, "a")
    pool.add([1], samples([1]))
    with pytest.raises(ConfigError, match="drawn by a, not by b"):
        Pool(tmp_path, "b")
    (shard,) = tmp_path.iterdir()
    shard.unlink()
    Pool(tmp_path, "b").add([1], samples([1]))
    with pytest.raises(ConfigError, match=r"deleted or changed .* others now"):
        pool[torch.tensor([1])]


def test_two_runs_may_draw_the_same_rows_at_the_same_time(tmp_path: Path):
    one, two = Pool(tmp_path, "a"), Pool(tmp_path, "a")
    one.add([1, 2], samples([1, 2]))
    two.add([1, 3], samples([1, 3]))
    for pool in (one, two, Pool(tmp_path, "a")):
        pool.refresh()
        assert torch.equal(pool[torch.tensor([1, 2, 3])], samples([1, 2, 3]))


def test_no_row_is_stored_twice(tmp_path: Path):
    pool = Pool(tmp_path, "a")
    pool.add([1], samples([1]))
    with pytest.raises(AssertionError, match="twice"):
        pool.add([2, 1], samples([2, 1]))


def test_a_corrupt_shard_is_named_with_the_remedy(tmp_path: Path):
    (tmp_path / "000000001.safetensors").write_bytes(b"not a shard")
    with pytest.raises(ConfigError, match=r"000000001.safetensors is corrupt.*delete it"):
        Pool(tmp_path, "a")


def test_a_shard_that_is_deleted_under_the_run_is_told_with_the_remedy(tmp_path: Path):
    pool = Pool(tmp_path, "a")
    pool.add([1], samples([1]))
    (shard,) = tmp_path.iterdir()
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(ConfigError, match=r"deleted or changed while the run used it .* --ckpt_path last"):
        pool[torch.tensor([1])]
    shard.unlink()
    with pytest.raises(ConfigError, match=r"deleted or changed while the run used it .* --ckpt_path last"):
        pool[torch.tensor([1])]
