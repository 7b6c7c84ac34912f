"""What the benchmarks share: contenders timed in turns, the machine's roofline, the peak memory of a step."""

from __future__ import annotations

import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def repeat(call: Callable[[], Any], calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            call()

    return run


@functools.cache
def _cache_filler() -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.int8, device="cuda")


def gpu_seconds(run: Callable[[], Any]) -> float:
    """On the current stream, from a cold cache; what is queued while the cache is filled with something else need not be waited for."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _cache_filler().zero_()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def in_turns(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[Callable[[], Any]], float] = seconds
) -> dict[str, float]:
    """Median seconds of each, timed in turns, so that a change of clocks or a neighbour meets all of them."""
    for run in contenders.values():
        run(), run()
    times = [[clock(run) for run in contenders.values()] for _ in range(rounds)]
    return {name: statistics.median(column) for name, column in zip(contenders, zip(*times, strict=True), strict=True)}


def rate(work: float, run: Callable[[], Any]) -> float:
    """1e9 units of work a second, at best."""
    run()
    return work / min(seconds(run) for _ in range(9)) / 1e9


def fastest(times: Mapping[str, float], prefix: str) -> float:
    """The best of the variants of one contender."""
    return min(t for name, t in times.items() if name.startswith(prefix))


@functools.cache
def roofline(threads: int) -> dict[str, float]:
    """The rates that bound every contender here: GEMM in 1e9 multiply-adds a second, copy in 1e9 bytes read or written a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rates = {}
    for dtype in (torch.float32, torch.float64):
        a, b, out = (torch.rand(2048, 2048, dtype=dtype) for _ in range(3))
        rates[f"gemm_{str(dtype)[6:]}_gmac_s"] = rate(2048**3, functools.partial(torch.mm, a, b, out=out))
    source, target = torch.rand(2**26), torch.rand(2**26)
    rates["copy_gb_s"] = rate(2 * 2**28, lambda: target.copy_(source))
    torch.set_num_threads(before)
    return rates


def launches(run: Callable[[], Any]) -> list[str]:
    """The kernels that a call launches on the GPU, after a first call that may compile them."""
    run()
    with torch.profiler.profile() as profile:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in kernels if not name.startswith(("Memcpy", "Memset"))]


@contextmanager
def kept_heap() -> Iterator[None]:
    """glibc keeps freed memory, as with MALLOC_TRIM_THRESHOLD_ set: page faults on fresh tensors are a tenth of a convnet's step."""
    mmap_max, mmap_threshold, trim_threshold = -4, -3, -1
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(mmap_max, 0), mallopt(trim_threshold, -1)
    try:
        yield
    finally:  # where the default's moving thresholds end up once a tensor of 32 MiB has been freed
        mallopt(mmap_max, 65536), mallopt(mmap_threshold, 2**25), mallopt(trim_threshold, 2**26)


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process: VmRSS now, VmHWM at the highest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_memory(build: Callable[[], Callable[[], Any]]) -> int:
    """Bytes that the network, its optimiser and the hungriest of three steps take: high-water mark minus what was there before."""
    before = resident()
    step = build()
    repeat(step, 3)()
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew, past what building took
    repeat(step, 3)()
    return resident("VmHWM") - before
