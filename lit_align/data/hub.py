"""Datasets of the Hugging Face hub, and folders in the forms of ``datasets``."""

from pathlib import Path
from typing import Any

from lit_align.errors import ConfigError, first_line

SAVED = ("dataset_dict.json", "state.json")
"""What ``save_to_disk`` of ``datasets`` writes into a folder: of several splits, or of one."""


def load_hub(name: str, split: str) -> Any:
    """A split of a dataset of the Hugging Face hub, or of a folder that ``datasets`` reads or has saved.

    Raises:
        ConfigError: It cannot be reached or read.
    """
    import datasets

    try:
        if not any((Path(name) / file).is_file() for file in SAVED):
            return datasets.load_dataset(name, split=split)
        saved = datasets.load_from_disk(name)
        splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
        if split not in splits:
            raise ValueError(f"it has only {', '.join(splits)}")
        return splits[split]
    except Exception as error:  # its builders raise whatever the files lead them to
        raise ConfigError(
            f"cannot load split '{split}' of dataset '{name}' ({first_line(error)}): "
            "check the name, or download it and give a local file or folder"
        ) from error
