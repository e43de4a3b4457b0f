"""What a prompt set costs at 10^5, 10^6 and 10^7 prompts: to index it once, to start on it, at every step.

    python -m tests.benchmarks.prompts [--sizes 100000 1000000 10000000] [--form parquet] [--out FILE.json]

Makes the prompts in shards of 10^6 rows in a temporary folder, which also holds the cache and is deleted at
the end; a tenth of the rows repeat an earlier prompt and one in a thousand is empty. For each size two
processes run after one another:

*first start*: seconds to read the files (copy them into the cache as Arrow) and to index them,
and how much private memory was added at most meanwhile.

*later start*: the files are put out of the page cache where the system allows it. Seconds from making the
source to the first rollout batch of 16 prompts, the import of ``datasets`` included; private memory that was
added by then and after the steps; the median time of a step, of the first and of the last tenth of 2,000.

Private memory is ``Anonymous`` of ``/proc/self/smaps_rollup``. Mapped files do not count, as they would in
``Private_Dirty`` until what was just written to them has reached the disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import pyarrow as pa
from pyarrow import parquet
from rich.console import Console
from rich.table import Table

from lit_align.data import JSONLPrompts, ParquetPrompts, PromptDataModule, PromptSource, TextPrompts

SHARD, STEPS = 1_000_000, 2_000
SOURCES: dict[str, type[PromptSource]] = {
    "parquet": ParquetPrompts,
    "jsonl": JSONLPrompts,
    "text": TextPrompts,
}
STYLES = ("oil painting", "photograph, golden hour", "concept art, highly detailed", "watercolour on paper")


def prompt(row: int) -> str:
    """The prompt of a row."""
    if row % 1000 == 999:
        return ""
    number = row // 2 if row % 10 == 8 else row  # rows that end in 8 repeat the row of half their number
    things = f"a portrait of traveller {number:,} with {number * 7919 % 1000003} lanterns"
    return f"{things} on the bridge of a sunken city, {STYLES[number % 4]}, by artist {number % 977}"


def write_files(folder: Path, size: int, form: str) -> None:
    """The prompts of one size, in shards."""
    for start in range(0, size, SHARD):
        rows = range(start, min(start + SHARD, size))
        prompts, file = [prompt(row) for row in rows], folder / f"{start:010d}"
        if form == "parquet":
            table = pa.table({"prompt": prompts, "row": list(rows)})
            parquet.write_table(table, file.with_suffix(".parquet"))
        elif form == "jsonl":
            lines = (
                json.dumps({"prompt": text, "row": row}) for row, text in zip(rows, prompts, strict=True)
            )
            file.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")
        else:
            file.with_suffix(".txt").write_text("\n".join(prompts) + "\n")


def private_mb() -> float:
    """Private memory of this process, MB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (kilobytes,) = (int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
    return kilobytes / 1000 * 1.024


@contextmanager
def monitored() -> Iterator[list[float]]:
    """Collects the private memory of this process, many times a second."""
    seen, done = [private_mb()], threading.Event()

    def monitor() -> None:
        while not done.wait(0.05):
            seen.append(private_mb())

    thread = threading.Thread(target=monitor)
    thread.start()
    yield seen
    done.set()
    thread.join()


def first_start(source: type[PromptSource], path: str) -> dict[str, float]:
    """Read the files into the cache and index them."""
    before = private_mb()
    with monitored() as reading:
        start, cpu = perf_counter(), process_time()
        prompts: Any = source(path)
        metrics = {"read_s": perf_counter() - start, "read_cpu_s": process_time() - cpu}
    with monitored() as indexing:
        start, cpu = perf_counter(), process_time()
        data = PromptDataModule(prompts)
        data.prepare_data()
        data.setup("fit")
        metrics |= {"index_s": perf_counter() - start, "index_cpu_s": process_time() - cpu}
    return metrics | {"read_peak_mb": max(reading) - before, "index_peak_mb": max(indexing) - indexing[0]}


def later_start(source: type[PromptSource], path: str) -> dict[str, float]:
    """Start on what the first start left behind, and take steps."""
    before, start, cpu = private_mb(), perf_counter(), process_time()
    prompts: Any = source(path)
    data = PromptDataModule(prompts, images_per_prompt=1, prompts_per_batch=16)
    data.setup("fit")
    loader = data.train_dataloader()
    batches = iter(loader)
    seen = list(next(batches).prompts)
    metrics = {"start_s": perf_counter() - start, "start_cpu_s": process_time() - cpu}
    metrics |= {"start_mb": private_mb() - before, "training": len(loader) * 16.0}
    times = []
    for _ in range(STEPS):
        begin = perf_counter()
        seen += next(batches).prompts
        times.append(1000 * (perf_counter() - begin))
    assert len(set(seen)) == len(seen), "a prompt came twice in one pass"
    tenth = STEPS // 10
    metrics |= {"first_steps_ms": median(times[:tenth]), "last_steps_ms": median(times[-tenth:])}
    return metrics | {"end_mb": private_mb() - before}


def forget(folder: Path) -> None:
    """Put files out of the page cache, so that the next process reads them from the disk."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def measure(size: int, form: str) -> dict[str, float]:
    """Both starts at one size, each in a process of its own."""
    metrics: dict[str, float] = {"prompts": size}
    with tempfile.TemporaryDirectory(prefix="prompts-") as folder:
        files, cache = Path(folder, "files"), Path(folder, "cache")
        files.mkdir()
        write_files(files, size, form)
        metrics["files_mb"] = sum(file.stat().st_size for file in files.iterdir()) / 1e6
        for phase in ("first", "later"):
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.prompts",
                f"--phase={phase}",
                f"--path={files}",
            ]
            environment = {**os.environ, "HF_DATASETS_CACHE": str(cache)}
            done = subprocess.run(
                [*command, f"--form={form}"], env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            metrics |= json.loads(done.stdout.splitlines()[-1])
            forget(Path(folder))
        metrics["cache_mb"] = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file()) / 1e6
    return metrics


def show(results: list[dict[str, float]]) -> None:
    """Print the table."""
    table = Table(title="Prompt sets: first start, later starts, steps of 16 prompts")
    table.add_column("")
    for metrics in results:
        table.add_column(f"{metrics['prompts']:,.0f}", justify="right")
    for name in list(results[0])[1:]:
        table.add_row(name, *(f"{metrics[name]:,.2f}" for metrics in results))
    Console().print(table)


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--form", choices=SOURCES, default="parquet")
    parser.add_argument("--out", type=Path, help="write the metrics there as JSON, too")
    parser.add_argument("--phase", choices=["first", "later"], help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        start = first_start if options.phase == "first" else later_start
        print(json.dumps(start(SOURCES[options.form], options.path)))
        return
    results = [measure(size, options.form) for size in options.sizes]
    show(results)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
