"""The corpus: what people, disks and strangers hand in, by name; each is refused in one sentence, or skipped.

A case makes its file below the folder that it gets, and uses it as a run would. ``SKIPPED`` are images: their
readers pass over them, and count them.
"""

import bz2
import gzip
import json
import lzma
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from lit_align.backbones import LoRA, StableDiffusionBackbone
from lit_align.cli.checkpoint import find
from lit_align.cli.config_files import read
from lit_align.data import (
    CSVPrompts,
    FolderPairs,
    HubImages,
    HubPrompts,
    JSONLPrompts,
    JSONPrompts,
    ParquetPrompts,
    PickaPicFiles,
    TextPrompts,
    TSVPrompts,
)
from lit_align.data.prompts.index import index
from lit_align.latents import LatentCache
from lit_align.pool import Pool
from lit_align.rewards import AestheticScore
from lit_align.shapes import AESTHETIC
from tests.corpus.files import Evil, adapter, chunk, header, image, lora, png

Case = Callable[[Path], Any]


def written(use: Callable[[str], Any], name: str, content: bytes) -> Case:
    """A file with some bytes, used by its path."""

    def case(folder: Path) -> Any:
        (folder / name).write_bytes(content)
        return use(str(folder / name))

    return case


def made(use: Callable[[str], Any], name: str, make: Callable[[Path], Any]) -> Case:
    """A file that is made at its path."""

    def case(folder: Path) -> Any:
        make(folder / name)
        return use(str(folder / name))

    return case


# ---- configurations

CONFIGURATIONS: dict[str, Case] = {
    "binary": written(read, "c.yaml", bytes(range(256))),
    "an image": written(read, "c.yaml", png(8, 8)),
    "UTF-16": written(read, "c.yaml", "model: 1\n".encode("utf-16")),
    "null characters": written(read, "c.yaml", b"model: a\0b\n"),
    "empty": written(read, "c.yaml", b""),
    "comments alone": written(read, "c.yaml", b"# nothing\n"),
    "a list": written(read, "c.yaml", b"- model\n- data\n"),
    "one word": written(read, "c.yaml", b"model"),
    "a tab": written(read, "c.yaml", b"model:\n\tclass_path: DDPOModule\n"),
    "an open quote": written(read, "c.yaml", b'model: "DDPO\ndata: 1\n'),
    "an open bracket": written(read, "c.yaml", b"model: {a: [1, 2\n"),
    "indentation": written(read, "c.yaml", b"model:\n  a: 1\n b: 2\n"),
    "a key twice": written(read, "c.yaml", b"model: 1\nmodel: 2\n"),
    "an unknown alias": written(read, "c.yaml", b"model: *nobody\n"),
    "two documents": written(read, "c.yaml", b"model: 1\n---\nmodel: 2\n"),
    "deep": written(read, "c.yaml", b"model: " + b"[" * 2_000 + b"]" * 2_000),
    "an alias of itself": written(read, "c.yaml", b"model: &a [*a]\n"),
    "a billion laughs": written(
        read,
        "c.yaml",
        b"a0: &a0 [x]\n"
        + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 40)),
    ),
    "a pipe": made(read, "c.yaml", os.mkfifo),
    "a device": lambda _: read("/dev/zero"),
    "a folder": made(read, "c.yaml", Path.mkdir),
    "a link to nothing": made(read, "c.yaml", lambda path: path.symlink_to("nowhere.yaml")),
    "a link to itself": made(read, "c.yaml", lambda path: path.symlink_to(path)),
    "missing": lambda folder: read(str(folder / "none.yaml")),
    "a name too long": lambda folder: read("x" * 5000 + ".yaml"),
    "a null character in the name": lambda folder: read("a\0b.yaml"),
    "300 MB": made(read, "c.yaml", lambda path: os.truncate(path.touch() or path, 300 << 20)),
}

# ---- prompts

PACKED = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("prompts.txt", b"a red circle\n" * 10_000)


def _indexed(path: str) -> Any:
    return index(JSONLPrompts(path))


def _parquet(path: Path, table: pa.Table | None = None) -> bytes:
    parquet.write_table(pa.table({"prompt": ["a red circle"] * 5000}) if table is None else table, path)
    return path.read_bytes()


def _damaged(path: Path, start: float, end: float | None = None) -> None:
    """A Parquet file without a part, or with one that is overwritten."""
    data = _parquet(path)
    at = int(start * len(data))
    path.write_bytes(
        data[:at]
        if end is None
        else data[:at] + b"\xff" * int((end - start) * len(data)) + data[int(end * len(data)) :]
    )


PROMPTS: dict[str, Case] = {
    **{
        f"text in {name}": written(TextPrompts, "p.txt", pack(b"a red circle\n" * 10_000))
        for name, pack in PACKED.items()
    },
    "text in a zip": made(TextPrompts, "p.txt", _zip),
    "JSON lines in gzip": written(JSONLPrompts, "p.jsonl", gzip.compress(b'{"prompt": "a"}\n')),
    "text in UTF-16": written(TextPrompts, "p.txt", "a red circle\n".encode("utf-16")),
    "text in Latin-1": written(TextPrompts, "p.txt", "une étoile\n".encode("latin-1")),
    "an empty text": written(TextPrompts, "p.txt", b""),
    "blank lines alone": written(lambda path: index(TextPrompts(path)), "p.txt", b"\n \n\n"),
    "a prompt of megabytes": written(TextPrompts, "p.txt", b"a" * (4 << 20)),
    "a pipe": made(TextPrompts, "p.txt", os.mkfifo),
    "a device": lambda _: TextPrompts("/dev/zero"),
    "a folder without text": lambda folder: TextPrompts(str(folder)),
    "an empty path": lambda _: TextPrompts(""),
    "a path too long": lambda _: TextPrompts("x" * 5000),
    "a null character in the path": lambda _: TextPrompts("a\0b.txt"),
    "nobody's home": lambda _: TextPrompts("~nobody-of-this-name/p.txt"),
    "a pattern without a match": lambda folder: TextPrompts(f"{folder}/*.txt"),
    "CSV without rows": written(CSVPrompts, "p.csv", b"prompt\n"),
    "CSV with an open quote": written(CSVPrompts, "p.csv", b'prompt\n"a red\na blue\n'),
    "CSV with ragged rows": written(CSVPrompts, "p.csv", b"prompt,a\nx,1,2,3\n"),
    "CSV with a column twice": written(CSVPrompts, "p.csv", b"prompt,a,a\nx,1,2\n"),
    "CSV without the column": written(CSVPrompts, "p.csv", b"promt\nx\n"),
    "CSV of bytes": written(CSVPrompts, "p.csv", bytes(range(256))),
    "CSV with a field of megabytes": written(CSVPrompts, "p.csv", b'prompt\n"' + b"a" * (8 << 20) + b'"\n'),
    "TSV with ragged rows": written(TSVPrompts, "p.tsv", b"prompt\ta\nx\t1\t2\n"),
    "JSON lines nested deeply": written(
        JSONLPrompts, "p.jsonl", b'{"prompt": "a", "x": ' + b"[" * 99_999 + b"]" * 99_999 + b"}\n"
    ),
    "JSON lines nested deeply in objects": written(
        JSONLPrompts, "p.jsonl", b'{"prompt": "a", "x": ' + b'{"x":' * 9_999 + b"1" + b"}" * 9_999 + b"}\n"
    ),
    "JSON lines cut short": written(JSONLPrompts, "p.jsonl", b'{"prompt": "a"}\n{"prompt": "b'),
    "JSON lines with a key twice": written(JSONLPrompts, "p.jsonl", b'{"prompt": "a", "prompt": "b"}\n'),
    "JSON lines of numbers": written(JSONLPrompts, "p.jsonl", b"1\n2\n"),
    "JSON lines with prompts of two kinds": written(
        JSONLPrompts, "p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n'
    ),
    "JSON lines with NaN": written(JSONLPrompts, "p.jsonl", b'{"prompt": NaN}\n'),
    "JSON lines with a half character": written(JSONLPrompts, "p.jsonl", b'{"prompt": "\\ud800"}\n'),
    "JSON lines of no prompt": written(_indexed, "p.jsonl", b'{"prompt": null}\n{"prompt": ""}\n'),
    "JSON nested deeply": written(JSONPrompts, "p.json", b"[" * 99_999 + b"]" * 99_999),
    "JSON cut short": written(JSONPrompts, "p.json", b'["a", "b'),
    "JSON of numbers": written(JSONPrompts, "p.json", b"[1, 2]"),
    "Parquet cut short": made(ParquetPrompts, "p.parquet", lambda path: _damaged(path, 0.5)),
    "Parquet without its head": made(ParquetPrompts, "p.parquet", lambda path: _damaged(path, 0.0, 0.3)),
    "Parquet with a damaged footer": made(
        ParquetPrompts, "p.parquet", lambda path: _damaged(path, 0.9, 0.97)
    ),
    "Parquet of text": written(ParquetPrompts, "p.parquet", b"prompt\na\n"),
    "Parquet with numbers": made(
        ParquetPrompts, "p.parquet", lambda path: _parquet(path, pa.table({"prompt": [1]}))
    ),
    "Parquet with lists": made(
        ParquetPrompts, "p.parquet", lambda path: _parquet(path, pa.table({"prompt": [["a"]]}))
    ),
    "Parquet without rows": made(
        ParquetPrompts,
        "p.parquet",
        lambda path: _parquet(path, pa.table({"prompt": pa.array([], pa.string())})),
    ),
    "Parquet with one prompt of megabytes a million times": made(
        ParquetPrompts,
        "p.parquet",
        lambda path: _parquet(
            path,
            pa.table(
                {
                    "prompt": pa.DictionaryArray.from_arrays(
                        pa.array(np.zeros(100, np.int32)), ["a" * (1 << 20)]
                    )
                }
            ),
        ),
    ),
    "a dataset with a script": made(
        HubPrompts,
        "set",
        lambda path: (path.mkdir(), (path / "set.py").write_text("import os\nos.mkdir('executed')\n")),
    ),
    "an empty folder as a dataset": made(HubPrompts, "set", Path.mkdir),
}

# ---- images: the readers skip and count them

SKIPPED: dict[str, bytes] = {
    "no bytes": b"",
    "text": b"not an image",
    "a PNG cut short": png(64, 64)[:60],
    "a PNG without its end": image("PNG", (64, 64))[:-40],
    "a JPEG cut short": image("JPEG", (64, 64))[:300],
    "a WebP cut short": image("WEBP", (64, 64))[:30],
    "a GIF cut short": image("GIF", (64, 64))[:30],
    "a TIFF cut short": image("TIFF", (64, 64))[:100],
    "a BMP cut short": image("BMP", (64, 64))[:100],
    "a PNG of 177 million pixels": png(13_300, 13_300, kind=0, rows=10),
    "a PNG of 400 million pixels": png(20_000, 20_000, kind=0, rows=10),
    "a line of 2 billion pixels": png(2**31 - 1, 1, kind=0, rows=0),
    "a BMP that claims 10^9 pixels": b"BM"
    + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 31623, 31623, 1, 24, 0, 0, 0, 0, 0, 0),
    "a PPM that claims 10^10 pixels": b"P6 100000 100000 255\n" + b"\0" * 100,
    "a GIF that claims 4 billion pixels": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";",
    "a text chunk of 50 MB": png(64, 64, extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * (50 << 20)))),
    "a colour profile of 50 MB": png(
        64, 64, extra=chunk(b"iCCP", b"k\0\0" + zlib.compress(b"a" * (50 << 20)))
    ),
    "a PNG without pixels": png(0, 0),
    "a PNG with a negative size": png(64, 64).replace(
        struct.pack(">II", 64, 64), struct.pack(">II", 2**32 - 1, 64), 1
    ),
    "a PNG of an unknown kind": png(64, 64).replace(
        struct.pack(">BBBBB", 8, 2, 0, 0, 0), struct.pack(">BBBBB", 8, 77, 0, 0, 0), 1
    ),
    "PostScript, which another program would draw": image("EPS"),
    "an icon": image("ICO"),
    "a PDF": b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>",
    "a pickle": pickle.dumps(list(range(10))),
    "floating-point TIFF": image("TIFF", mode="F"),
    "an AVIF head alone": b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B" + b"\0" * 40,
    "a JPEG 2000 head alone": b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 40,
}

PAIRS = b"prompt,image_0,image_1,label_0\n"
OUTSIDE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a name with dots": ("../secret.png", lambda _: None),
    "a name with dots inside": ("a/../../secret.png", lambda _: None),
    "an absolute name": ("/etc/hostname", lambda _: None),
    "a device": ("/dev/zero", lambda _: None),
    "a link that leads out": (
        "link.png",
        lambda folder: (folder / "link.png").symlink_to(folder.parent / "secret.png"),
    ),
    "a folder that leads out": ("up/secret.png", lambda folder: (folder / "up").symlink_to(folder.parent)),
    "a link to itself": ("link.png", lambda folder: (folder / "link.png").symlink_to(folder / "link.png")),
    "a pipe": ("pipe.png", lambda folder: os.mkfifo(folder / "pipe.png")),
    "a folder": ("inner", lambda folder: (folder / "inner").mkdir()),
    "the folder itself": (".", lambda _: None),
    "no name": ("", lambda _: None),
    "a name too long": ("x" * 5000, lambda _: None),
    "a missing file": ("none.png", lambda _: None),
    "a file of 200 MB": (
        "big.png",
        lambda folder: os.truncate((folder / "big.png").touch() or folder / "big.png", 200 << 20),
    ),
}
"""Names in a table of pairs, and what is made in its folder."""


def table(folder: Path, name: str, make: Callable[[Path], Any], row: int) -> FolderPairs:
    """A table of two pairs, of which the first image of one row has this name."""
    inner = folder / "table"
    inner.mkdir()
    (folder / "secret.png").write_bytes(png(8, 8))
    (inner / "good.png").write_bytes(png(8, 8))
    make(inner)
    names = [name if row == number else "good.png" for number in range(2)]
    rows = [f"prompt {number},{first},good.png,1\n".encode() for number, first in enumerate(names)]
    (inner / "pairs.csv").write_bytes(PAIRS + b"".join(rows))
    return FolderPairs(str(inner / "pairs.csv"))


# ---- tables and shards of pairs, captioned images


def _pick(path: Path, damage: tuple[float, float] | None = None, **changes: Any) -> None:
    columns: dict[str, Any] = {
        "caption": ["a", "b"],
        "jpg_0": [png(8, 8)] * 2,
        "jpg_1": [png(8, 8)] * 2,
        "label_0": [1.0, 0.0],
        "has_label": [True, True],
    }
    kept = {name: value for name, value in (columns | changes).items() if value is not None}
    parquet.write_table(pa.table(kept), path)
    if damage:
        data = path.read_bytes()
        path.write_bytes(data[: int(damage[0] * len(data))] + data[int(damage[1] * len(data)) :])


def _set(path: Path, content: bytes, name: str = "a.png") -> None:
    path.mkdir()
    (path / name).write_bytes(content)
    (path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}) + "\n")


TABLES: dict[str, Case] = {
    **{
        f"the first image is {name}": lambda folder, given=given: table(folder, *given, 0)
        for name, given in OUTSIDE.items()
    },
    "a table of another kind": written(FolderPairs, "p.txt", b"a\n"),
    "a table without labels": written(FolderPairs, "p.csv", b"prompt,image_0,image_1\na,b,c\n"),
    "a label of 2": written(FolderPairs, "p.csv", PAIRS + b"a,b,c,2\n"),
    "a label of text": written(FolderPairs, "p.csv", PAIRS + b"a,b,c,yes\n"),
    "an infinite label": written(FolderPairs, "p.csv", PAIRS + b"a,b,c,inf\n"),
    "a shard cut short": made(PickaPicFiles, "s.parquet", lambda path: _pick(path, damage=(0.6, 1))),
    "a shard without its middle": made(
        PickaPicFiles, "s.parquet", lambda path: _pick(path, damage=(0.85, 0.9))
    ),
    "a shard of text": written(PickaPicFiles, "s.parquet", b"caption\n"),
    "a shard without a column": made(PickaPicFiles, "s.parquet", lambda path: _pick(path, jpg_1=None)),
    "a shard with names for images": made(
        PickaPicFiles, "s.parquet", lambda path: _pick(path, jpg_1=["a", "b"])
    ),
    "a shard with a label of 7": made(
        PickaPicFiles, "s.parquet", lambda path: _pick(path, label_0=[7.0, 0.0])
    ),
    "a shard with labels of text": made(
        PickaPicFiles, "s.parquet", lambda path: _pick(path, label_0=["a", "b"])
    ),
    "a shard with a caption of megabytes": made(
        PickaPicFiles, "s.parquet", lambda path: _pick(path, caption=["a" * (1 << 20), "b"])
    ),
    "captioned images without an image column": made(
        lambda path: HubImages(path, 8),
        "set",
        lambda path: (path.mkdir(), (path / "a.csv").write_text("image,text\n1,a\n")),
    ),
    "a captioned image that is none": made(
        lambda path: HubImages(path, 8).image(0), "set", lambda path: _set(path, b"text")
    ),
    "captioned images without captions": made(
        lambda path: HubImages(path, 8, text="caption"), "set", lambda path: _set(path, png(8, 8))
    ),
}

# ---- pools of samples, and caches of latents


def _shard(path: Path, metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> None:
    save_file(
        {"index": torch.arange(2), "samples": torch.zeros(2, 3)} | tensors,
        path,
        {"source": "a"} if metadata is None else metadata,
    )


def _pool(path: str) -> Any:
    pool = Pool(Path(path).parent, "a")
    return pool[torch.tensor([0])]


def _lost(path: Path, then: Callable[[Path], Any]) -> Any:
    _shard(path)
    pool = Pool(path.parent, "a")
    then(path)
    return pool[torch.tensor([0])]


NAME = "000000000-0.safetensors"
SHARDS: dict[str, Case] = {
    "empty": written(_pool, NAME, b""),
    "text": written(_pool, NAME, b"not a shard at all"),
    "a pickle": made(_pool, NAME, lambda path: torch.save({"x": Evil(path.parent)}, path)),
    "cut short": made(_pool, NAME, lambda path: (_shard(path), path.write_bytes(path.read_bytes()[:-10]))),
    "a header of 2^60 bytes": written(_pool, NAME, header(b"{}", 2**60)),
    "a header that is no JSON": written(_pool, NAME, header(b"{index}")),
    "a tensor beyond the end": written(
        _pool, NAME, header(b'{"index":{"dtype":"I64","shape":[99],"data_offsets":[0,792]}}')
    ),
    "a shape that overflows": written(
        _pool, NAME, header(b'{"index":{"dtype":"I64","shape":[4294967296,4294967296],"data_offsets":[0,0]}}')
    ),
    "no metadata": made(
        _pool, NAME, lambda path: save_file({"index": torch.arange(2), "samples": torch.zeros(2, 3)}, path)
    ),
    "no source": made(_pool, NAME, lambda path: _shard(path, {"other": "b"})),
    "another model's": made(_pool, NAME, lambda path: _shard(path, {"source": "b"})),
    "no samples": made(
        _pool, NAME, lambda path: save_file({"index": torch.arange(2)}, path, {"source": "a"})
    ),
    "more rows than samples": made(_pool, NAME, lambda path: _shard(path, index=torch.arange(5))),
    "rows that are not numbers of rows": made(_pool, NAME, lambda path: _shard(path, index=torch.rand(2))),
    "samples of two shapes": made(
        _pool,
        NAME,
        lambda path: (
            _shard(path),
            _shard(
                path.with_name("000000009-0.safetensors"),
                index=torch.tensor([8, 9]),
                samples=torch.zeros(2, 4),
            ),
        ),
    ),
    "a folder of that name": made(_pool, NAME, Path.mkdir),
    "a link to nothing": made(_pool, NAME, lambda path: path.symlink_to("nowhere")),
    "deleted while the run used it": lambda folder: _lost(folder / NAME, Path.unlink),
    "cut short while the run used it": lambda folder: _lost(
        folder / NAME, lambda path: path.write_bytes(path.read_bytes()[:50])
    ),
    "replaced while the run used it": lambda folder: _lost(
        folder / NAME, lambda path: _shard(path, index=torch.tensor([5, 6]))
    ),
    "a folder that cannot be made": made(
        lambda path: Pool(Path(path) / "pool", "a").add([0], torch.zeros(1, 2)), "file", Path.touch
    ),
    "a cache of latents cut short": made(
        lambda path: LatentCache(Path(path).parent.parent, "key"),
        f"key/{NAME}",
        lambda path: (path.parent.mkdir(), path.write_bytes(header(b"{}", 50))),
    ),
}

# ---- checkpoints


def _found(path: str) -> Any:
    return find(path, Path(path).parent)


def _saved(path: Path, **changes: Any) -> None:
    loop = {
        "epoch_progress": {"current": {"processed": 1}},
        "epoch_loop.batch_progress": {"is_last_batch": True},
    }
    content: dict[str, Any] = {
        "loops": {"fit_loop": loop},
        "progress": {"images": 8},
        "global_step": 2,
        "state_dict": {"w": torch.zeros(999)},
    }
    torch.save({name: value for name, value in (content | changes).items() if value is not None}, path)


def _cut(path: Path, keep: float) -> None:
    _saved(path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


CHECKPOINTS: dict[str, Case] = {
    **{
        f"cut at {keep:.0%}": made(_found, "a.ckpt", lambda path, keep=keep: _cut(path, keep))
        for keep in (0.0, 0.05, 0.5, 0.99)
    },
    "text": written(_found, "a.ckpt", b"epoch 5"),
    "an image": written(_found, "a.ckpt", png(8, 8)),
    "a pickle in torch's file": made(
        _found, "a.ckpt", lambda path: _saved(path, state_dict=Evil(path.parent))
    ),
    "a plain pickle": made(_found, "a.ckpt", lambda path: path.write_bytes(pickle.dumps(Evil(path.parent)))),
    "a folder with a pickle": made(
        _found,
        "a.ckpt",
        lambda path: (path.mkdir(), (path / ".metadata").write_bytes(pickle.dumps(Evil(path.parent)))),
    ),
    "a run whose checkpoint is such a folder": made(
        _found,
        "run",
        lambda path: (
            (path / "checkpoints" / "last.ckpt").mkdir(parents=True),
            (path / "checkpoints" / "last.ckpt" / ".metadata").write_bytes(pickle.dumps(Evil(path.parent))),
        ),
    ),
    "last, of such a run": made(
        lambda path: find("last", Path(path)),
        "runs",
        lambda path: (
            (path / "version_0" / "checkpoints" / "last.ckpt").mkdir(parents=True),
            (path / "version_0" / "checkpoints" / "last.ckpt" / ".metadata").write_bytes(
                pickle.dumps(Evil(path.parent))
            ),
        ),
    ),
    "a zip of something else": made(_found, "a.ckpt", _zip),
    "weights alone": made(_found, "a.ckpt", lambda path: torch.save({"w": torch.zeros(2)}, path)),
    "a tensor": made(_found, "a.ckpt", lambda path: torch.save(torch.zeros(2), path)),
    "a list": made(_found, "a.ckpt", lambda path: torch.save([1, 2], path)),
    "no progress": made(_found, "a.ckpt", lambda path: _saved(path, progress=None)),
    "images of text": made(_found, "a.ckpt", lambda path: _saved(path, progress={"images": "many"})),
    "loops of text": made(_found, "a.ckpt", lambda path: _saved(path, loops="none")),
    "a pipe": made(_found, "a.ckpt", os.mkfifo),
    "a device": lambda _: _found("/dev/zero"),
    "safetensors": made(_found, "a.ckpt", lambda path: save_file({"w": torch.zeros(2)}, path)),
    "missing": lambda folder: _found(str(folder / "none.ckpt")),
    "a name too long": lambda folder: _found("x" * 5000),
    "a URL": lambda _: _found("http://127.0.0.1:9/a.ckpt"),
}

# ---- adapters, reward heads and the parts of pipelines


def adapters(tiny: Path) -> dict[str, Case]:
    """Adapters for the tiny pipeline in a folder."""

    def use(path: str) -> Any:
        return StableDiffusionBackbone(str(tiny), lora=LoRA(), adapters={path: 1.0})

    def of(tensors: dict[str, torch.Tensor], metadata: Any = None) -> Case:
        return written(use, "a.safetensors", adapter(tensors, metadata))

    whole = adapter(lora())
    layer = next(iter(lora()))
    return {
        "empty": written(use, "a.safetensors", b""),
        "text": written(use, "a.safetensors", b"not an adapter at all"),
        "cut short": written(use, "a.safetensors", whole[:-40]),
        "cut in the header": written(use, "a.safetensors", whole[:40]),
        "a header of 2^60 bytes": written(use, "a.safetensors", header(b"{}", 2**60)),
        "a header that is no JSON": written(use, "a.safetensors", header(b"{{{{")),
        "a header of a list": written(use, "a.safetensors", header(b"[1, 2] ")),
        "a number type that is unknown": written(
            use,
            "a.safetensors",
            header(b'{"a":{"dtype":"F7","shape":[1],"data_offsets":[0,4]}}', data=b"1234"),
        ),
        "tensors that overlap": written(
            use,
            "a.safetensors",
            header(
                b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
                data=b"1234",
            ),
        ),
        "offsets that go back": written(
            use,
            "a.safetensors",
            header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', data=b"1234"),
        ),
        "a shape that overflows": written(
            use,
            "a.safetensors",
            header(
                b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', data=b"1234"
            ),
        ),
        "a pickle": made(use, "a.safetensors", lambda path: torch.save({"x": Evil(path.parent)}, path)),
        "a pickle as a .bin": made(
            lambda path: use(str(Path(path).parent)),
            "pytorch_lora_weights.bin",
            lambda path: torch.save({"x": Evil(path.parent)}, path),
        ),
        "a folder of that name": made(use, "a.safetensors", Path.mkdir),
        "an empty folder": made(use, "adapter", Path.mkdir),
        "no tensors": of({}),
        "NaN": of(lora(**{layer: torch.full((2, 16), torch.nan)})),
        "infinity": of(lora(**{layer: torch.full((2, 16), torch.inf)})),
        "another model's width": of(lora(width=320)),
        "another model's names": of(
            {
                "unet.nowhere.lora.down.weight": torch.zeros(2, 8),
                "unet.nowhere.lora.up.weight": torch.zeros(8, 2),
            }
        ),
        "half of a layer": of({layer: torch.zeros(2, 16)}),
        "a text encoder's": of({"text_encoder.layer.lora.down.weight": torch.zeros(2, 8)}),
        "no matrix": of(lora(**{layer: torch.zeros(16)})),
        "metadata that are no JSON": of(lora(), "{rank"),
        "metadata of a list": of(lora(), [1, 2]),
        "metadata with a rank of 10^9": of(
            lora(), {"unet.r": 10**9, "unet.lora_alpha": 4, "unet.target_modules": ["to_q"]}
        ),
        "metadata with a rank of text": of(lora(), {"unet.r": "large", "unet.target_modules": ["to_q"]}),
        "metadata with an endless alpha": of(
            lora(), {"unet.r": 2, "unet.lora_alpha": float("inf"), "unet.target_modules": ["to_q"]}
        ),
        "metadata of a DoRA": of(
            lora(),
            {"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": True, "unet.target_modules": ["to_q"]},
        ),
    }


def _head(**changes: Any) -> Case:
    def make(path: Path) -> None:
        torch.save({"weight": torch.zeros(1, 64), "bias": torch.zeros(1)} | changes, path)

    return made(lambda path: AestheticScore(path, "shapes"), "head.pt", make)


HEADS: dict[str, Case] = {
    "a pickle": made(
        lambda path: AestheticScore(path, "shapes"),
        "head.pt",
        lambda path: torch.save({"weight": Evil(path.parent)}, path),
    ),
    "a pickle as safetensors": made(
        lambda path: AestheticScore(path, "shapes"),
        "head.safetensors",
        lambda path: torch.save({"weight": Evil(path.parent)}, path),
    ),
    "a whole module": made(
        lambda path: AestheticScore(path, "shapes"),
        "head.pt",
        lambda path: torch.save(torch.nn.Linear(2, 1), path),
    ),
    "text": written(lambda path: AestheticScore(path, "shapes"), "head.pt", b"a head"),
    "cut short": made(
        lambda path: AestheticScore(path, "shapes"),
        "head.safetensors",
        lambda path: path.write_bytes(Path(AESTHETIC).read_bytes()[:-9]),
    ),
    "NaN": _head(weight=torch.full((1, 64), torch.nan)),
    "whole numbers": _head(weight=torch.zeros(1, 64, dtype=torch.int64)),
    "another width": _head(weight=torch.zeros(1, 63)),
    "no matrix": _head(weight=torch.zeros(64)),
    "two scores": _head(weight=torch.zeros(2, 64), bias=torch.zeros(2)),
    "a tensor of a terabyte in four bytes": _head(weight=torch.zeros(1).expand(2**19, 2**19)),
}


def pipelines(tiny: Path) -> dict[str, Case]:
    """Copies of the tiny pipeline with one file that is wrong."""

    def changed(file: str, change: Callable[[Path], Any]) -> Case:
        def case(folder: Path) -> Any:
            copy = folder / "pipeline"
            shutil.copytree(tiny, copy)
            change(copy / file)
            return StableDiffusionBackbone(str(copy), lora=LoRA())

        return case

    def json_of(**changes: Any) -> Callable[[Path], Any]:
        return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    unet, weights = "unet/config.json", "unet/diffusion_pytorch_model.safetensors"

    def evil(path: Path) -> Any:
        """Code beside a file, which makes a folder where it is run."""
        mark = path.parents[2] / "executed"
        return path.with_name("evil.py").write_text(f"import os; os.mkdir({str(mark)!r})")

    return {
        "no index": changed("model_index.json", Path.unlink),
        "an index that is no JSON": changed("model_index.json", lambda path: path.write_text("{")),
        "an index of a list": changed("model_index.json", lambda path: path.write_text("[]")),
        "an index of another pipeline": changed("model_index.json", json_of(_class_name="FluxPipeline")),
        "an index with a pipeline's own code": changed(
            "model_index.json", json_of(_class_name=["pipeline", "Evil"])
        ),
        "an index that names a part's own code": changed(
            "model_index.json",
            lambda path: (json_of(unet=["evil", "Evil"])(path), evil(path.parent / "unet" / "x")),
        ),
        "an index that names a module": changed("model_index.json", json_of(unet=["antigravity", "Evil"])),
        "an index without a part": changed("model_index.json", json_of(vae=[None, None])),
        "an index of numbers": changed("model_index.json", json_of(unet=5)),
        "no configuration": changed(unet, Path.unlink),
        "a configuration that is no JSON": changed(unet, lambda path: path.write_bytes(bytes(range(256)))),
        "a configuration of a list": changed(unet, lambda path: path.write_text("[]")),
        "a configuration with text for numbers": changed(unet, json_of(block_out_channels="many")),
        "a configuration of 10^9 channels": changed(unet, json_of(block_out_channels=[10**9, 10**9])),
        "a configuration with no channels": changed(unet, json_of(block_out_channels=[0, 0])),
        "a configuration with negative sizes": changed(unet, json_of(cross_attention_dim=-5)),
        "a text encoder of 10^9 units": changed("text_encoder/config.json", json_of(hidden_size=10**9)),
        "a text encoder of an unknown kind": changed(
            "text_encoder/config.json",
            json_of(model_type="unknown", auto_map={"AutoModel": "evil.Evil"}, hidden_size=5),
        ),
        "no weights": changed(weights, Path.unlink),
        "empty weights": changed(weights, lambda path: path.write_bytes(b"")),
        "weights cut short": changed(weights, lambda path: path.write_bytes(path.read_bytes()[:-99])),
        "weights with a header of 2^60 bytes": changed(
            weights, lambda path: path.write_bytes(header(b"{}", 2**60))
        ),
        "weights with a header that is no JSON": changed(
            weights, lambda path: path.write_bytes(header(b"[{]"))
        ),
        "weights of another model": changed(weights, lambda path: save_file({"a": torch.zeros(2)}, path)),
        "pickled weights": changed(weights, lambda path: torch.save({"x": Evil(path.parents[2])}, path)),
        "pickled weights as a .bin": changed(
            weights,
            lambda path: (path.unlink(), torch.save({"x": Evil(path.parents[2])}, path.with_suffix(".bin"))),
        ),
        "a vocabulary that is no JSON": changed(
            "tokenizer/tokenizer.json", lambda path: path.write_text("{{")
        ),
        "a schedule of text": changed("scheduler/scheduler_config.json", json_of(beta_schedule="none")),
    }
