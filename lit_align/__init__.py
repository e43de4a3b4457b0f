"""lit_align: align text-to-image diffusion models with rewards and preferences."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_align.methods.objectives import denoising_error, error_margin, logistic_loss

__all__ = ["denoising_error", "error_margin", "logistic_loss"]


def __getattr__(name: str) -> Any:
    """The objectives, imported when they are asked for: torch must not come before ``__main__`` has run."""
    if name not in __all__:
        raise AttributeError(f"module 'lit_align' has no attribute {name!r}")
    from lit_align.methods import objectives

    return getattr(objectives, name)
