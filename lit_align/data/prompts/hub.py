"""Prompts of the Hugging Face hub."""

from lit_align.data.files import fingerprint
from lit_align.data.hub import load_hub
from lit_align.data.prompts.sources import TablePrompts


class HubPrompts(TablePrompts):
    """A dataset of the Hugging Face hub, or a local folder that ``datasets`` reads; memory-mapped.

    Args:
        name: The hub id or the folder.
        split: Which of the dataset's own splits to read; slices such as ``train[:1000]`` work.
        column: The column with the prompts.
        keep: The other columns that travel with the prompts; all of them if not given.
        subset: Which of the dataset's configurations to read, where it has several.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        column: str = "prompt",
        keep: list[str] | None = None,
        subset: str | None = None,
    ) -> None:
        rows = load_hub(name, split, subset)
        super().__init__(rows.data.table, column, f"dataset {name} ({split})", keep, fingerprint(rows, split))
