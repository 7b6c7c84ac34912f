"""What the benchmarks share: contenders timed in turns, the machine's roofline, the peak memory of a step."""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler says on stderr when it starts and stops


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


def cold() -> None:
    """Fill the GPU's cache with something else."""
    _cache_filler().zero_()


def gpu_seconds(run: Callable[[], Any]) -> float:
    """On the current stream, from a cold cache; what is queued while the cache is filled with something else need not be waited for."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cold()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class EventClock:
    """The GPU's own time, for ``pytest.mark.benchmark(timer=)``: what passed on the stream between each odd call and the even one after."""

    def __init__(self) -> None:
        self.total, self.start = 0.0, None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self.start is None:
            self.start = event
        else:
            event.synchronize()
            self.total += self.start.elapsed_time(event) / 1e3
            self.start = None
        return self.total


def in_turns(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[Callable[[], Any]], float] = seconds
) -> dict[str, float]:
    """Median seconds of each, timed in turns, so that a change of clocks or a neighbour meets all of them."""
    for run in contenders.values():
        run(), run()
    times = [[clock(run) for run in contenders.values()] for _ in range(rounds)]
    return {name: statistics.median(column) for name, column in zip(contenders, zip(*times, strict=True), strict=True)}


def rate(work: float, run: Callable[[], Any], clock: Callable[[Callable[[], Any]], float] = seconds) -> float:
    """1e9 units of work a second, at best."""
    run()
    return work / min(clock(run) for _ in range(9)) / 1e9


def fastest(times: Mapping[str, float], prefix: str) -> float:
    """The best of the variants of one contender."""
    return min(t for name, t in times.items() if name.startswith(prefix))


@functools.cache
def roofline(threads: int, device: str = "cpu") -> dict[str, float]:
    """The rates that bound every contender here: GEMM in 1e9 multiply-adds a second, copy in 1e9 bytes read or written a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rates, clock, n = {}, seconds, 2048
    if device.startswith("cuda"):
        clock, n = gpu_seconds, 8192
    for dtype in (torch.float32, torch.float64):
        a, b, out = (torch.rand(n, n, dtype=dtype, device=device) for _ in range(3))
        rates[f"gemm_{str(dtype)[6:]}_gmac_s"] = rate(n**3, functools.partial(torch.mm, a, b, out=out), clock)
    source, target = torch.rand(2, 2**26, device=device)
    rates["copy_gb_s"] = rate(2 * 2**28, lambda: target.copy_(source), clock)
    torch.set_num_threads(before)
    return rates


def allocated(build: Callable[[], Callable[[], Any]], device: str) -> tuple[Callable[[], Any], int]:
    """A run, built and warm, and the bytes of torch's allocator that it and the hungriest moment of a call hold.

    What libraries and our own compiled code take for themselves is not among them: ``peak_memory`` sees that, in a process of its own.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        run = build()
        repeat(run, 3)()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run(), torch.cuda.synchronize()
        return run, torch.cuda.max_memory_allocated() - before
    gc.collect()  # or what earlier runs left would be given back in this one
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run = build()
        repeat(run, 3)()
        with torch.profiler.record_function("measured"):
            run()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    start = next(e.start_ns() for e in events if e.name() == "measured")
    held = list(itertools.accumulate((e.nbytes() for e in events if e.name() == "[memory]"), initial=0))
    return run, max(held[sum(e.name() == "[memory]" and e.start_ns() < start for e in events) :])


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
