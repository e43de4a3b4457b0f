"""Clock, memory and description of the machine that a benchmark runs on."""

import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

CLEAR_PEAK = Path("/proc/self/clear_refs")


def now(module: Any, cpu_time: bool = False) -> float:
    """Seconds, when the device has done all its work: of the clock, or CPU time of all threads."""
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.process_time() if cpu_time else time.perf_counter()


def reset_peak() -> None:
    """Forget the highest memory so far, where the system can: on CUDA, and on Linux."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR_PEAK.exists():
        CLEAR_PEAK.write_text("5")


def peak_bytes() -> int:
    """Highest memory since :func:`reset_peak`: of the GPU's tensors, or resident of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if CLEAR_PEAK.exists():
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def peak_above(before: int) -> int:
    """Highest memory since :func:`reset_peak`, above ``before``; the kernel's count is some pages late."""
    return max(0, peak_bytes() - before)


def each_alone(calls: Iterable[Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
    """What the calls return, each made in a process of its own: an allocator keeps what it once had."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        return [processes.submit(call).result() for call in calls]


def disk_bytes(path: Path) -> int:
    """Size of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())


def machine(module: Any) -> dict[str, Any]:
    """What the metrics depend on, besides the code."""
    device = (
        torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else platform.processor()
    )
    return {
        "device": device or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
    }
