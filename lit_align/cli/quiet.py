"""A start that says only what a user can act on."""

import io
import logging
import sys
import threading
import warnings

import diffusers
import transformers
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
from lightning.fabric.utilities.warnings import PossibleUserWarning

from lit_align.errors import LOG

NOISE = (
    "Found .* module.* in eval mode",  # the models are in evaluation mode on purpose
    ".*treespec, LeafSpec",  # Lightning's, about its own code
    "Checkpoint directory .* exists and is not empty",  # of a run that goes on
    "Experiment logs directory .* exists and is not empty",  # the same; nothing is deleted, see keep_metrics
    "Be aware that when using `ckpt_path`",  # callbacks that a checkpoint has and this run has not
    ".*lr_scheduler.step.* before .*optimizer.step",  # an update that was skipped
)


class Lines(logging.Handler):
    """Prints what :func:`~lit_align.errors.tell` says, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"lit_align: {record.getMessage()}", flush=True)


def quiet() -> None:
    """Silence what other libraries say about themselves, and give our own lines and warnings a short form."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a letter that it cannot show ends no run
    if not any(isinstance(handler, Lines) for handler in LOG.handlers):
        LOG.addHandler(Lines())
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # who sets one wants its table
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()  # of downloads
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    for category in (PossibleUserWarning, DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.formatwarning = _short
    threading.excepthook = _in_thread


def _in_thread(failed: threading.ExceptHookArgs) -> None:
    """The thread that writes TensorBoard's file hands its error to the run, which says it in a sentence."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def _short(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    where = "lit_align" if issubclass(category, UserWarning) else f"{filename}:{lineno}: {category.__name__}"
    return f"{where}: {message}\n"
