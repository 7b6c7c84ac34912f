"""The noise against ``torch.randn``: ``pytest bench/bench_noise.py --benchmark-json=FILE``.

``speedup`` in ``extra_info`` is the ratio of medians of calls timed in turns, so that a change of clocks or a neighbour meets both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timing import in_turns, repeat

from fbkernels import ops

CALLS = 20
cuda = pytest.param("cuda", 1, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


def prepare(call: Callable[[], torch.Tensor], device: str) -> Callable[[], Any]:
    """``CALLS`` calls; on a GPU as one graph with an output each, so that neither launches nor the cache count."""
    if device == "cpu":
        return repeat(call, CALLS)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for _ in range(CALLS)]
    return lambda: (outputs, graph.replay(), torch.cuda.synchronize())


@pytest.mark.parametrize(("device", "threads"), [("cpu", 1), ("cpu", 2), cuda])
@pytest.mark.parametrize("shape", [(32, 50), (64, 24576)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_noise(benchmark: Any, kind: str, shape: tuple[int, int], device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    step = torch.tensor(0, device=device)
    ours = prepare(lambda: ops.noise(step, 1, 2, *shape, 0.05, kind), device)
    rival = prepare(lambda: torch.randn(shape, device=device), device)
    times = in_turns({"ours": ours, "torch.randn": rival}, 50)
    benchmark.extra_info |= {
        "median_ns": {f"{name}, per element": t / CALLS / (shape[0] * shape[1]) * 1e9 for name, t in times.items()},
        "threads": threads,
        "build": ops.build_info(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    benchmark.pedantic(ours, rounds=20)
