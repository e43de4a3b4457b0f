"""A bank of rewards from a file of its own, for the commands that have no Trainer."""

from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from lit_align.cli.config_files import read
from lit_align.cli.errors import explain
from lit_align.cli.functions import with_functions
from lit_align.cli.given import Given
from lit_align.errors import ConfigError, built, described
from lit_align.rewards import Reward, RewardBank

PLACES = ((), ("rewards",), ("model", "init_args", "rewards"), ("model", "rewards"))
"""Where a file may hold its bank: a file of its own, or a configuration of a run."""


def read_bank(path: str) -> RewardBank:
    """The bank that a YAML file describes, or the one in a configuration.

    Args:
        path: The file: ``rewards`` and ``weights``, ``class_path: RewardBank`` with these, or a configuration
            or an overlay of a run.

    Raises:
        ConfigError: There is none, or it cannot be made.
    """
    file = read(path, "--rewards")
    given = Given([file], [])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rewards", type=RewardBank)
    parser.add_instantiator(built, Reward, subclasses=True)
    try:
        config = parser.parse_object({"rewards": _bank(with_functions(yaml.safe_load(file.text)), path)})
        bank: RewardBank = parser.instantiate_classes(config).rewards
    except ArgumentError as error:
        raise ConfigError(explain(error, given)) from None
    except ConfigError:
        raise
    except Exception as error:  # whatever a module of the user raises when it is imported
        raise ConfigError(f"--rewards {path}: {described(error)}; correct it") from error
    return bank


def _bank(root: Any, path: str) -> dict[str, Any]:
    """The part of a file that is a bank."""
    for place in PLACES:
        found = root
        for name in place:
            found = found.get(name) if isinstance(found, dict) else None
        if not isinstance(found, dict):
            continue
        if str(found.get("class_path", "")).rpartition(".")[2] == "RewardBank":
            return found
        if isinstance(found.get("rewards"), dict) and "weights" in found:
            return {"class_path": "RewardBank", "init_args": found}
    raise ConfigError(
        f"--rewards {path}: it has no bank; give rewards (name: {{class_path: ...}}) and weights "
        "(name: number), or a configuration with model.rewards"
    )
