"""The contenders of bench/bench_fused_mlp_cuda.py on the CPU, so that they run where a GPU is."""

from __future__ import annotations

import bench_fused_mlp_cuda as bench
import emulated
import pytest
import torch

SMALL = ((784, 12, 10), ("sigmoid", "identity"))


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_contenders(loss: str) -> None:
    x = bench.images()
    target = torch.eye(10)[torch.randint(10, (len(x),))]
    for build in bench.rivals(SMALL, loss, x, target, 1e-3, 0.01, None).values():
        step = build()
        step(), step()
    with emulated.engine():
        losses = bench.ours(SMALL, loss, x, target if loss == "mse" else target.argmax(1), 1e-3, 0.01, 2, calls=3)()
        assert losses.isfinite().all()
        assert bench.floor(SMALL, loss, 2, "cpu")().shape == (bench.CALLS,)
