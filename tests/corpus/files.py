"""Malformed files, made when they are asked for: nothing binary lies in the repository."""

import io
import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save

CANARY = "executed"
"""The folder that :class:`Evil` makes where it is unpickled."""


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder / CANARY),)


def png(
    width: int, height: int, bits: int = 8, kind: int = 2, extra: bytes = b"", rows: int | None = None
) -> bytes:
    """A black PNG of any size, whose file is small: ``kind`` 0 is grey, 2 RGB, 6 RGBA."""
    packer = zlib.compressobj(9)
    count = height if rows is None else rows
    row = b"\0" * (width * {0: 1, 2: 3, 6: 4}[kind] * bits // 8 + 1) if count else b""
    data = b"".join(packer.compress(row) for _ in range(count)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def image(form: str, size: tuple[int, int] = (16, 16), mode: str = "RGB", **options: Any) -> bytes:
    """A file that Pillow writes."""
    file = io.BytesIO()
    Image.new(mode, size).save(file, form, **options)
    return file.getvalue()


def header(content: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    """A file of safetensors with this header, which may claim another length."""
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def lora(rank: int = 2, width: int = 16, **changes: Any) -> dict[str, torch.Tensor]:
    """The tensors of an adapter of the tiny UNet's attention, by diffusers' names."""
    place = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    return {
        f"{place}.lora.down.weight": torch.full((rank, width), 0.1),
        f"{place}.lora.up.weight": torch.full((width, rank), 0.1),
    } | changes


def adapter(tensors: Mapping[str, torch.Tensor], metadata: Any = None) -> bytes:
    """The file of an adapter; ``metadata`` are diffusers' of it."""
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    return save(dict(tensors), {"lora_adapter_metadata": text} if metadata is not None else None)
