"""Prompts of several tasks: numbers that no two share, positions that resume, ranks that together are one."""

from typing import Any

import pyarrow as pa
import pytest
import torch

from lit_align.data import Batch, MultiTaskDataModule, PromptDataModule, TablePrompts, TaskPrompts
from lit_align.data.loading import Rank
from lit_align.errors import ConfigError


def prompts(name: str, count: int = 60) -> TablePrompts:
    return TablePrompts(pa.table({"prompt": [f"{name} {i}" for i in range(count)]}), "prompt")


def module(stage: str = "fit", **settings: Any) -> MultiTaskDataModule:
    tasks = {"fair": TaskPrompts(prompts("open"), images_per_prompt=3), "liked": TaskPrompts(prompts("any"))}
    sizes = {"images_per_prompt": 2, "prompts_per_batch": 4, "batches_per_epoch": 3, "seed": 0}
    data = MultiTaskDataModule(tasks, **(sizes | settings))
    data.setup(stage)
    return data


def equal(one: Batch, two: Batch) -> bool:
    same = one.prompts == two.prompts and one.task == two.task
    return same and torch.equal(one.groups, two.groups) and torch.equal(one.index, two.index)


def test_a_batch_is_a_rollout_batch_of_each_task_and_no_number_comes_twice() -> None:
    loader = module().train_dataloader()
    iterations = [*loader, *loader]
    assert len(iterations) == 6
    assert all([batch.task for batch in batches] == ["fair", "liked"] for batches in iterations)
    assert [len(batch) for batch in iterations[0]] == [12, 8]
    assert all(batch.prompts[0].startswith("open") for batch, _ in iterations)
    for part in ("index", "groups"):
        numbers = [torch.unique(getattr(batch, part)) for batches in iterations for batch in batches]
        assert torch.cat(numbers).unique().numel() == sum(map(len, numbers))


def test_one_task_has_the_batches_of_a_plain_module() -> None:
    sizes: dict[str, Any] = {"images_per_prompt": 2, "prompts_per_batch": 4, "seed": 3}
    joint = MultiTaskDataModule({"only": TaskPrompts(prompts("a"))}, **sizes)
    plain = PromptDataModule(prompts("a"), **sizes)
    for data in (joint, plain):
        data.setup("fit")
    for (batch,), wanted in zip(joint.train_dataloader(), plain.train_dataloader(), strict=True):
        assert batch.prompts == wanted.prompts
        assert torch.equal(batch.index, wanted.index)
        assert torch.equal(batch.groups, wanted.groups)


def test_held_out_prompts_that_another_task_trains_on_are_told(recwarn: pytest.WarningsRecorder) -> None:
    shared = TaskPrompts(prompts("open"), validation_source=prompts("any", 8), validation_prompts=5)
    data = MultiTaskDataModule({"fair": shared, "liked": TaskPrompts(prompts("any"))}, prompts_per_batch=4)
    data.setup("fit")
    told = [str(one.message) for one in recwarn if "trains on" in str(one.message)]
    trained = {prompt for _, liked in data.train_dataloader() for prompt in liked.prompts}
    validated = {
        prompt for batch in data.val_dataloader() if batch.task == "fair" for prompt in batch.prompts
    }
    count = len(trained & validated)
    assert 0 < count <= 5
    (text,) = told
    assert text.startswith(f"the task liked trains on {count} validation prompts of the task fair, ")


def test_a_task_may_be_tested_on_sizes_of_its_own() -> None:
    """Many prompts of few images beside few of many, which rewards of sets need."""
    tasks = {
        "liked": TaskPrompts(prompts("any"), test_prompts=4, test_images_per_prompt=1),
        "fair": TaskPrompts(prompts("open"), validation_prompts=3, validation_images_per_prompt=2),
    }
    shares = {"validation_fraction": 0.3, "test_fraction": 0.3}
    sizes = {"validation_prompts": 1, "validation_images_per_prompt": 4}
    data = MultiTaskDataModule(tasks, **shares, **sizes, test_prompts=2, test_images_per_prompt=3)
    data.setup("test")
    batches = list(data.test_dataloader())
    assert [(batch.task, len(batch), len(batch.groups.unique())) for batch in batches] == [
        ("liked", 4, 4),
        ("fair", 6, 2),
    ]
    assert torch.equal(torch.cat([batch.index for batch in batches]), torch.arange(10))
    data.setup("validate")
    assert [(batch.task, len(batch)) for batch in data.val_dataloader()] == [("liked", 4), ("fair", 6)]


def test_validation_numbers_all_images_from_zero() -> None:
    sizes = {"validation_prompts": 3, "validation_fraction": 0.3, "eval_batch": 8}
    batches = list(module("validate", **sizes).val_dataloader())
    assert torch.equal(torch.cat([batch.index for batch in batches]).sort().values, torch.arange(24))
    assert torch.cat([batch.groups for batch in batches]).unique().tolist() == list(range(6))
    assert [batch.task for batch in batches] == ["fair", "fair", "liked", "liked"]


def test_a_position_is_taken_up_again() -> None:
    whole = list(module().train_dataloader()) + list(module().train_dataloader())
    first, again = module().train_dataloader(), module().train_dataloader()
    for seen, _ in zip(first, range(2), strict=False):
        state = first.state_dict()
        assert len(seen) == 2
    again.load_state_dict(state)
    for found, wanted in zip(next(iter(again)), whole[2], strict=True):
        assert equal(found, wanted)
    with pytest.raises(ConfigError, match="other"):
        again.load_state_dict({"other": {}})


def test_two_ranks_share_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = next(iter(module().train_dataloader()))
    ranks = []
    for number in range(2):
        monkeypatch.setattr(Rank, "of", lambda trainer, number=number: Rank(number, 2))
        ranks.append(next(iter(module().train_dataloader())))
    for task, wanted in enumerate(whole):
        index = torch.cat([rank[task].index for rank in ranks])
        assert torch.equal(index.sort().values, wanted.index)
        assert {rank[task].task for rank in ranks} == {wanted.task}


def test_no_task_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.tasks is empty"):
        MultiTaskDataModule({})


def test_a_bad_size_of_one_task_names_the_task() -> None:
    tasks = {"fair": TaskPrompts(prompts("open"), test_images_per_prompt=16)}
    with pytest.raises(ConfigError, match=r"tasks\.fair: data\.test_images_per_prompt is 16: give 1 to 8"):
        MultiTaskDataModule(tasks, eval_batch=8)
