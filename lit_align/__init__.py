"""lit_align: align text-to-image diffusion models with rewards and preferences."""

import os
from typing import TYPE_CHECKING, Any

# Before diffusers is imported, which imports onnxruntime where it is installed (extra ocr): its import starts
# telemetry.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from lit_align.methods.objectives import denoising_error, error_margin, logistic_loss

__all__ = ["denoising_error", "error_margin", "logistic_loss"]


def __getattr__(name: str) -> Any:
    """The objectives, imported on demand: torch must not be imported before ``__main__`` has run."""
    if name not in __all__:
        raise AttributeError(f"module 'lit_align' has no attribute {name!r}")
    from lit_align.methods import objectives

    return getattr(objectives, name)
