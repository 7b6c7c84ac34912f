"""The weight gradient behind a max-pool against torch's of the dense error: ``pytest bench/bench_conv_gradient.py --benchmark-json=FILE``.

The rival gets the unpooled error for nothing. ``speedup`` is the ratio of medians of calls timed in turns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fbkernels import ops, reference
from fbkernels.bench.timing import in_turns

# inputs, outputs, size, kernel, pool kernel, pool stride
LAYERS = {
    "conv1": (3, 96, 32, 5, 3, 2),
    "conv2": (96, 128, 16, 5, 3, 2),
    "conv3": (128, 256, 8, 5, 3, 2),
    "conv2-3x3": (96, 128, 16, 3, 3, 2),
    "conv2-1x1": (96, 128, 16, 1, 3, 2),
    "conv2-7x7": (96, 128, 16, 7, 3, 2),
    "conv2-pool2": (96, 128, 16, 5, 2, 2),
    "conv2-pool3": (96, 128, 16, 5, 3, 3),
    "conv2-pool3-stride1": (96, 128, 16, 5, 3, 1),
    "conv1-3x3-pool2": (3, 32, 32, 3, 2, 2),
    "mnist-conv2": (32, 64, 14, 5, 2, 2),
    "vgg": (64, 128, 56, 3, 2, 2),
}
SAMPLES = 64


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layer", LAYERS)
def test_conv_gradient(benchmark: Any, layer: str, threads: int) -> None:
    inputs, outputs, size, kernel, pool, pool_stride = LAYERS[layer]
    torch.set_num_threads(threads)
    channels_last = {"memory_format": torch.channels_last}
    x = torch.randn(SAMPLES, inputs, size, size).contiguous(**channels_last)
    weight = torch.randn(outputs, inputs, kernel, kernel).contiguous(**channels_last)
    padding = (kernel // 2, kernel // 2)
    pool_padding = (pool // 2, pool // 2) if pool % 2 and pool_stride < pool else (0, 0)
    z = F.conv2d(x, weight, None, 1, padding)
    pooled, flat = F.max_pool2d(z, pool, pool_stride, pool_padding, return_indices=True)
    corner = torch.arange(pooled.shape[2]) * pool_stride - pool_padding[0]
    winner = ((flat // size - corner[:, None]) * pool + flat % size - corner).to(torch.uint8).contiguous(**channels_last)
    delta = torch.randn(pooled.shape).contiguous(**channels_last)
    dense = reference.unpool(delta, winner, (size, size), (pool, pool), (pool_stride, pool_stride), pool_padding).contiguous(
        **channels_last
    )
    geometry = ((1, 1), padding, (1, 1), (pool, pool), (pool_stride, pool_stride), pool_padding)

    def ours() -> Any:
        return ops.pooled_weight_gradient(delta, winner, x, weight, *geometry)

    def rival() -> Any:
        return torch.ops.aten.convolution_backward(
            dense, x, weight, [outputs], (1, 1), padding, (1, 1), False, (0, 0), 1, (False, True, True)
        )

    times = in_turns({"ours": ours, "oneDNN": rival}, 15)
    benchmark.extra_info |= {
        "median_ms": {name: t * 1e3 for name, t in times.items()},
        "threads": threads,
        "build": ops.build_info(),
    }
    benchmark.pedantic(ours, rounds=5)
