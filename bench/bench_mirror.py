"""A step of the local mirror against ``torch.randn`` and two products of torch: ``pytest bench/bench_mirror.py --benchmark-json=FILE``.

``speedup`` in ``extra_info`` is the ratio of medians of calls timed in turns, ``of the products`` our time over that of torch's two
products alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fbkernels import ops
from fbkernels.bench.timing import in_turns

SAMPLES = 512
LAYERS = {f"{m}x{n}": [(m, n)] for m, n in ((16, 27), (16, 144), (64, 576), (512, 4608), (500, 784), (128, 128))}
LAYERS["ResNet-20"] = [(16, 27), *[(16, 144)] * 6, (32, 144), *[(32, 288)] * 5, (64, 288), *[(64, 576)] * 5, (10, 64)]


def learn(B: Tensor, W: Tensor, xi: Tensor) -> Tensor:
    return torch.addmm(B, (xi @ (W - B).T).T, xi, alpha=1 / (SAMPLES + B.shape[1] + 1))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layers", LAYERS)
def test_mirror(benchmark: Any, layers: str, threads: int) -> None:
    torch.set_num_threads(threads)
    sizes = LAYERS[layers]
    B, W, xi = ([torch.randn(rows or m, n) for m, n in sizes] for rows in (0, 0, SAMPLES))
    step, points = torch.tensor(0), list(range(len(sizes)))
    fan_in = [n for _, n in sizes]  # layers with one fan-in share their noise
    contenders = {f"ours, {kind}": lambda kind=kind: ops.mirror(B, W, step, 1, points, SAMPLES, kind) for kind in ops.KINDS}
    contenders |= {
        "ours, rademacher, shared": lambda: ops.mirror(B, W, step, 1, fan_in, SAMPLES, "rademacher"),
        "eager": lambda: [learn(b, w, torch.randn(SAMPLES, b.shape[1])) for b, w in zip(B, W, strict=True)],
        "products alone": lambda: [learn(*given) for given in zip(B, W, xi, strict=True)],
    }
    times = in_turns(contenders, 9 if sizes[0][1] > 1000 else 41)
    benchmark.extra_info |= {
        "median_ms": {name: t * 1e3 for name, t in times.items()},
        "speedup": times["eager"] / times["ours, rademacher"],
        "of the products": times["ours, rademacher"] / times["products alone"],
        "gmac_s": sum(2 * SAMPLES * m * n for m, n in sizes) / times["ours, rademacher"] / 1e9,
        "threads": threads,
        "build": ops.build_info(),
    }
    benchmark.pedantic(contenders["ours, rademacher"], rounds=5)
