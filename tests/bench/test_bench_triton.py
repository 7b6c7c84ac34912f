"""The GPU's benchmarks, small and on the CPU, so that they run where a GPU is: each contender does the same work as its rival."""

from __future__ import annotations

import bench_triton as bench
import pytest
import torch
from torch import nn

from fbkernels.bench.timing import launches


@pytest.mark.parametrize(("model", "size"), [("cnn", 32), ("resnet18", 8)])
def test_steps(model: str, size: int) -> None:
    losses = {}
    for name, build in bench.steps(model, 2, size, "cpu", "eager").items():
        step = build()
        losses[name] = [float(step()), float(step())]
    # the same network on the same images, in bf16; every contender learns
    expected = losses["backprop"][0]
    assert all(first == pytest.approx(expected, rel=2.0**-8) and second != first for first, second in losses.values()), losses


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_updates(kind: str) -> None:
    runs = {name: build() for name, build in bench.updates(96, 5, kind, 7, "cpu").items()}
    dense, factors, copy = (runs[name]() for name in ("ours", "ours, factors", "copy"))
    torch.testing.assert_close(dense[0], factors[0])
    assert runs["ours, M = 0"]()[0].shape == runs["eager"]().shape == copy.shape == (96, 7)


@pytest.mark.parametrize("name", bench.LAYERS)
def test_layers(name: str) -> None:
    runs = {n: build() for n, build in bench.layers(name, 2, "cpu", torch.float32, 0.0, "eager").items()}
    assert runs.pop("product alone")().shape[0] == 4
    expected = runs.pop("compiled, apart")()
    for name, run in runs.items():
        h, second = run()
        for got, want in zip((h, h + second if "ours" in name else second), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize(("layer", "shape"), [(nn.Linear(9, 20), (9,)), (nn.Conv2d(3, 5, 3, padding=1), (3, 6, 5))])
def test_one_launch(layer: nn.Conv2d | nn.Linear, shape: tuple[int, ...], learns: bool, device: str) -> None:
    x, dx = torch.randn(2, 4, *shape, device=device)
    if len(shape) == 3:
        x, dx = (t.contiguous(memory_format=torch.channels_last) for t in (x, dx))
    layer = layer.to(device, memory_format=torch.channels_last).requires_grad_(False)
    tile = {"BM": 16, "BN": 32, "BK": 16, "num_warps": 4, "num_stages": 2}
    h, d = bench.one_launch(layer, x, dx, 0.0, learns, tile)()
    for got, given in ((h, x), (h + d, x + dx)):
        torch.testing.assert_close(got, torch.relu(layer(given)), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what a CPU launches on a GPU: nothing")
def test_pieces() -> None:
    for run in bench.pieces(2, 4, 3, 5, "cpu").values():
        assert launches(run) == []
