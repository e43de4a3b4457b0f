"""Finding pretrained weights and failing with a sentence when they cannot be had."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, TypeVar
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import ImageProcessingMixin, PreTrainedTokenizerBase

from lit_align.errors import ConfigError, first_line, user_path

SHAPES = "shapes"

Dtype = Literal["float32", "bfloat16", "float16"]
"""Precision of a frozen model's weights; half of it halves the memory."""

Model = TypeVar("Model", bound=nn.Module)

_LOADED: WeakValueDictionary[Any, nn.Module] = WeakValueDictionary()


def shared(make: Callable[..., Model], *arguments: Any) -> Model:
    """The frozen module ``make(*arguments)``: loaded once, whoever asks for it.

    A module that was moved to a device, or changed in precision, since it was loaded is its holders' own.
    """
    held: Any = _LOADED.get((make, arguments))
    if held is None or _state(held) != held.as_loaded:
        held = make(*arguments)
        held.as_loaded = _state(held)
        _LOADED[make, arguments] = held
    return held


def _state(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    first = next(module.parameters())
    return first.device, first.dtype


def resolve(pretrained: str, shapes: Path) -> str:
    """Turn what the user wrote under ``pretrained`` into something that ``from_pretrained`` takes.

    Args:
        pretrained: ``"shapes"`` for the weights that ship with the package, a folder, or an id on the Hugging
            Face hub.
        shapes: The shipped folder that ``"shapes"`` stands for here.

    Returns:
        A folder that exists, or a hub id.

    Raises:
        ConfigError: The value is written as a path and there is no such folder, or the shipped weights are
            missing.
    """
    if pretrained == SHAPES:
        if not shapes.is_dir():
            raise ConfigError(
                f"pretrained: shapes needs the shipped weights in {shapes}, which is missing; "
                "reinstall lit_align."
            )
        return str(shapes)
    folder = user_path(pretrained)
    if folder.is_dir():
        return str(folder)
    if pretrained.startswith((".", "~", "/")) or pretrained.count("/") != 1:
        raise ConfigError(
            f"pretrained: {pretrained!r} is not a folder; give a folder that exists (the working directory "
            f"is {Path.cwd()}), an id on the Hugging Face hub (owner/name), or 'shapes' for the weights that "
            "ship with lit_align."
        )
    return pretrained


@contextmanager
def loading(pretrained: str) -> Iterator[None]:
    """Turn what can go wrong while the model called ``pretrained`` is read into a :class:`ConfigError`.

    The files come from outside, and libraries raise whatever wrong ones lead them to.
    """
    try:
        yield
    except ConfigError:
        raise
    except SafetensorError as error:
        raise ConfigError(
            f"pretrained: the weights of {pretrained!r} are corrupt ({error}); "
            "delete them and download them again."
        ) from error
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, KeyError | TypeError | AttributeError | IndexError):  # no sentence
            reason = f"{type(error).__name__}: {reason}"
        if isinstance(error, ImportError):  # as where DETR's backbone comes from timm
            reason = f"a package is missing: {' '.join(str(error).split()).rstrip('.')}"
        if pretrained == SHAPES:
            remedy = "reinstall lit_align, whose weights they are"
        elif user_path(pretrained).is_dir():
            remedy = (
                "check that the folder holds the whole model: its configuration, fitting safetensors weights "
                "and its tokenizer"
            )
        else:
            remedy = (
                f"it is no folder in {Path.cwd()}, so the hub was asked: check the path, or the id and the "
                "network, and for a gated model accept its licence on its page and log in (hf auth "
                f"login); without a network, download it elsewhere (hf download {pretrained} --local-dir "
                "FOLDER) and give the folder"
            )
        raise ConfigError(f"pretrained: cannot load {pretrained!r} ({reason}); {remedy}.") from error


def load_part(kind: Any, pretrained: str, shapes: Path) -> Any:
    """A configuration, a tokenizer or a processor: what a class of transformers reads of a model's folder.

    Raises:
        ConfigError: It cannot be loaded.
    """
    with loading(pretrained):
        # Where trust_remote_code is left out, transformers asks the user in the terminal.
        return kind.from_pretrained(resolve(pretrained, shapes), trust_remote_code=False)


def load_whole(
    load: Callable[..., tuple[Any, dict[str, Any]]],
    pretrained: str,
    shapes: Path,
    what: str,
    dtype: Dtype = "float32",
) -> Any:
    """Load a transformers model from safetensors.

    Args:
        load: ``from_pretrained`` of its class.
        pretrained: What the user wrote.
        shapes: The shipped folder that ``"shapes"`` stands for here.
        what: What it should be, for the message: "CLIP model".
        dtype: Precision of the weights.

    Returns:
        The model.

    Raises:
        ConfigError: It cannot be loaded, or the file lacks weights, which would be random, or some are no
            numbers.
    """
    with loading(pretrained):
        model, info = load(
            resolve(pretrained, shapes),
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    if missing := info["missing_keys"]:
        raise ConfigError(
            f"pretrained: {pretrained!r} is not a complete {what}: {len(missing)} weights are missing, such "
            f"as {min(missing)}; give a folder or hub id that was saved from a transformers {what}."
        )
    if broken := not_finite(dict(model.named_parameters())):
        raise ConfigError(
            f"pretrained: {broken} of {pretrained!r} holds numbers that are not finite; download it again."
        )
    return model


def has_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has a vocabulary: where its files are missing transformers makes one without."""
    return len(tokenizer) > len(tokenizer.all_special_ids)


def misfit(tokenizer: PreTrainedTokenizerBase, encoder: Any) -> str | None:
    """Why a text encoder cannot read the tokens of a tokenizer, or None: it has rows for fewer."""
    words, rows = len(tokenizer), encoder.get_input_embeddings().num_embeddings
    return f"{words} tokens, of which the text encoder knows {rows}" if words > rows else None


def processor_config(pretrained: str, shapes: Path) -> dict[str, Any]:
    """What a model's folder says about preparing images; empty where it says nothing."""
    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(resolve(pretrained, shapes))
    except OSError:
        return {}
    return dict(config)


def not_finite(tensors: Mapping[str, Any]) -> str | None:
    """The name of the first tensor with a number that is not finite, or None."""
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
            values = tensor.detach().float() if tensor.itemsize == 1 else tensor.detach()
            if not all(end.isfinite() for end in values.aminmax()):  # 20 times as fast as isfinite of all
                return name
    return None


def unsound(tensors: Mapping[str, Any]) -> str | None:
    """Why the tensors of a file cannot be used, or None.

    A pickled tensor may claim any shape over a storage of a few bytes, and take the memory when it is copied.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            return f"{name} is not a tensor"
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            return f"{name} is larger than what the file holds"
    broken = not_finite(tensors)
    return f"{broken} holds numbers that are not finite" if broken else None


def why_not_read(error: BaseException) -> str:
    """The first line of what was raised on a file of tensors; torch's proposes to run what is in it."""
    if isinstance(error, UnpicklingError):
        return "it holds more than tensors"
    return first_line(error)
