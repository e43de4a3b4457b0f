"""The device of a command that has no Trainer."""

import torch

from lit_align.backbones.adapter_files import reason
from lit_align.errors import ConfigError


def device_of(name: str | None, command: str) -> torch.device:
    """The device that the user gives under ``--device``; if none, the first GPU, or the CPU where none is.

    Raises:
        ConfigError: It is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"{command}: --device {name} cannot be used ({reason(error)}); give cpu") from None
    return device
