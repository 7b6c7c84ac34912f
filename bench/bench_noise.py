"""The noise against ``torch.randn``: ``pytest bench/bench_noise.py --benchmark-json=FILE``.

``speedup`` in ``extra_info`` is the ratio of medians of calls timed in turns, so that a change of clocks or a neighbour meets both.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fbkernels import ops
from fbkernels.bench.timing import in_turns, repeat

CALLS = 20


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(32, 50), (64, 24576)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_noise(benchmark: Any, kind: str, shape: tuple[int, int], threads: int) -> None:
    torch.set_num_threads(threads)
    step = torch.tensor(0)
    ours = repeat(lambda: ops.noise(step, 1, 2, *shape, 0.05, kind), CALLS)
    rival = repeat(lambda: torch.randn(shape), CALLS)
    times = in_turns({"ours": ours, "torch.randn": rival}, 50)
    benchmark.extra_info |= {
        "median_ns": {f"{name}, per element": t / CALLS / (shape[0] * shape[1]) * 1e9 for name, t in times.items()},
        "threads": threads,
        "build": ops.build_info(),
    }
    benchmark.pedantic(ours, rounds=20)
