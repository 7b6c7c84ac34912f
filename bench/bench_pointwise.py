"""One feedback point: relu, max-pooling and noise, of activity and difference or of both streams, then the update of its B.

``pytest bench/bench_pointwise.py --benchmark-json=FILE``
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fbkernels import ops
from fbkernels.bench.rivals import Pointwise, Step
from fbkernels.bench.timing import fastest, in_turns, roofline

BATCH, CHANNELS, OUTPUTS, STD = 64, 96, 100, 0.05
UNITS = 16 * 16 * CHANNELS


def ours(z: Tensor, dz: Tensor, B: Tensor, R: Tensor, Q: Tensor, w: Tensor) -> Step:
    step = torch.tensor(0)
    window = ("relu", "max", False, [3, 3], [2, 2], [1, 1])

    def run() -> tuple[Tensor, ...]:
        nonlocal B
        out = ops.perturbed_pointwise(z, dz, None, *window, step, 0, 0, BATCH, STD, "gaussian")
        B, _ = ops.feedback_update(B, None, None, R, Q, w, step, None, 0, 0, 0, STD, "gaussian")
        return out

    return run


@pytest.mark.parametrize("threads", [1, 2])
def test_pointwise(benchmark: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    z, dz = (torch.randn(BATCH, CHANNELS, 32, 32).contiguous(memory_format=torch.channels_last) for _ in range(2))
    R = torch.randn(BATCH, OUTPUTS)
    Q = torch.linalg.solve(torch.eye(OUTPUTS) + R.T @ R, R.T).T
    problem = (torch.randn(UNITS, OUTPUTS), R, Q, torch.randn(BATCH))
    mine = ours(z, dz, *problem)
    rivals = {f"eager, {form}": Pointwise(z, z + dz, *problem, STD, form == "low rank") for form in ("dense", "low rank")}
    times = in_turns({"ours": mine, **rivals}, 50)
    # z and dz, h and d, a byte a pooled unit for where its maximum was, B in and out
    moved = 4 * (2 * z.numel() + 2 * BATCH * UNITS + 2 * UNITS * OUTPUTS) + BATCH * UNITS
    benchmark.extra_info |= {
        "median_ms": {name: t * 1e3 for name, t in times.items()},
        "speedup": fastest(times, "eager") / times["ours"],
        "gb_s": moved / times["ours"] / 1e9,
        "gmac": 2 * UNITS * OUTPUTS * BATCH / 1e9,
        "threads": threads,
        "build": ops.build_info(),
        **roofline(threads),
    }
    benchmark.pedantic(mine, rounds=20)
