"""Datasets of the Hugging Face hub, and folders in the forms of ``datasets``."""

import re
from pathlib import Path
from typing import Any

from lit_align.errors import ConfigError, first_line

SAVED = ("dataset_dict.json", "state.json")
"""What ``save_to_disk`` of ``datasets`` writes into a folder: of several splits, or of one."""


def load_hub(name: str, split: str, subset: str | None) -> Any:
    """A split of a dataset of the Hugging Face hub, or of a folder that ``datasets`` reads or has saved.

    Args:
        name: The hub id or the folder.
        split: Its name in the dataset.
        subset: The dataset's configuration; None where it has one.

    Raises:
        ConfigError: It cannot be reached or read.
    """
    import datasets

    try:
        if not any((Path(name) / file).is_file() for file in SAVED):
            return datasets.load_dataset(name, subset, split=split)
        if subset is not None:
            raise ValueError("save_to_disk has left no subsets in it")
        saved = datasets.load_from_disk(name)
        splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
        if split not in splits:
            raise ValueError(f"it has only {', '.join(splits)}")
        return splits[split]
    except Exception as error:  # its builders raise whatever the files lead them to
        names = re.search(r"available configs: (\[.*\])", str(error))
        if subset is None and names:
            raise ConfigError(
                f"dataset '{name}' has several subsets: set subset to one of {names[1]}"
            ) from None
        raise ConfigError(
            f"cannot load split '{split}' of dataset '{name}' ({first_line(error)}): "
            "check the name, or download it and give a local file or folder"
        ) from error
