from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fbkernels import _C, reference

SIMD = _C.simd_paths()
OP = torch.ops.fbkernels.pooled_weight_gradient


def problem(
    samples: int = 2,
    inputs: int = 3,
    outputs: int = 4,
    size: tuple[int, int] = (8, 9),
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    kernel_size: tuple[int, int] = (3, 3),
    pool_stride: tuple[int, int] = (2, 2),
    pool_padding: tuple[int, int] = (1, 1),
    zeros: float = 0.1,
) -> dict[str, Any]:
    """The arguments of the op: winners of the max-pool of a random map, a part of the errors zero as behind a relu."""
    spatial = zip(size, kernel, stride, padding, dilation, strict=True)
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in spatial]
    pooled, flat = F.max_pool2d(torch.randn(samples, outputs, *out), kernel_size, pool_stride, pool_padding, return_indices=True)
    corner = [torch.arange(n) * s - p for n, s, p in zip(pooled.shape[2:], pool_stride, pool_padding, strict=True)]
    index = (flat // out[1] - corner[0][:, None]) * kernel_size[1] + flat % out[1] - corner[1]
    delta = torch.randn(pooled.shape) * (torch.rand(pooled.shape) >= zeros)
    return {
        "delta": delta.contiguous(memory_format=torch.channels_last),
        "winner": index.to(torch.uint8).contiguous(memory_format=torch.channels_last),
        "x": torch.randn(samples, inputs, *size).contiguous(memory_format=torch.channels_last),
        "weight": torch.randn(outputs, inputs, *kernel).contiguous(memory_format=torch.channels_last),
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "kernel_size": kernel_size,
        "pool_stride": pool_stride,
        "pool_padding": pool_padding,
    }


def raw(p: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the compiled part: maps channels-last, weights to be written."""
    maps = {name: p[name].permute(0, 2, 3, 1) for name in ("delta", "winner", "x")}
    outputs = {"weight_gradient": torch.full_like(p["weight"], math.nan), "bias_gradient": torch.full((len(p["weight"]),), math.nan)}
    sizes = (*p["kernel_size"], *p["pool_stride"], *p["pool_padding"])
    return maps | outputs | {"geometry": (*p["stride"], *p["padding"], *p["dilation"]), "sizes": sizes}


def native(p: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    arguments = raw(p)
    _C.pooled_weight_gradient(**arguments, **options)
    return arguments["weight_gradient"], arguments["bias_gradient"]


def double(p: dict[str, Any]) -> dict[str, Any]:
    return p | {name: p[name].double() for name in ("delta", "x", "weight")}


def assert_rounding(got: tuple[Tensor, Tensor], p: dict[str, Any]) -> None:
    """|error| <= (K + 1) eps / 2 sum |terms| for a sum of K products in any order; K rounds once more where products are not fused."""
    expected = reference.pooled_weight_gradient(**double(p))
    magnitude = reference.pooled_weight_gradient(**double(p) | {"delta": p["delta"].double().abs(), "x": p["x"].double().abs()})
    terms = p["delta"][:, 0].numel()
    for g, e, m in zip(got, expected, magnitude, strict=True):
        assert bool(((g.double() - e).abs() <= (terms + 1) * 2.0**-24 * m).all())


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    kernel, dilation, stride = draw(st.tuples(st.integers(1, 8), st.integers(1, 8))), draw(pairs), draw(pairs)
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    kernel_size, pool_stride = draw(pairs), draw(pairs)
    pool_padding = tuple(draw(st.integers(0, k // 2)) for k in kernel_size)
    spans = [d * (k - 1) + (pk - 1) * s + 1 for d, k, pk, s in zip(dilation, kernel, kernel_size, stride, strict=True)]
    least = [max(1, span - 2 * p) for span, p in zip(spans, padding, strict=True)]  # where the pool has a window
    size = tuple(draw(st.integers(n, n + 14)) for n in least)
    channels = st.integers(1, 40)
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    return problem(
        draw(st.integers(1, 5)), draw(channels), draw(channels), size, kernel, stride, padding, dilation,
        kernel_size, pool_stride, pool_padding, draw(st.sampled_from((0.0, 0.5, 1.0))),
    )  # fmt: skip


CASES = {"pooled_weight_gradient": (lambda _: problems(), lambda p, backend: assert_rounding(OP(**p, backend=backend), p))}


@given(problems(), st.booleans(), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_is_the_reference_to_rounding(p: dict[str, Any], channels_last: bool, threads: int) -> None:
    p["weight"] = p["weight"].contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for simd in SIMD:
        got = native(p, threads=threads, simd=simd)
        assert_rounding(got, p)
        half = p | {"x": p["x"].bfloat16()}
        single = native(half | {"x": half["x"].float()}, simd=simd)
        assert all(torch.equal(a, b) for a, b in zip(native(half, simd=simd), single, strict=True))


PAPER = {
    "conv1": {"inputs": 3, "outputs": 96, "size": (32, 32)},
    "conv2": {"inputs": 96, "outputs": 128, "size": (16, 16)},
    "conv3": {"inputs": 128, "outputs": 256, "size": (8, 8)},
    "bands": {"inputs": 40, "outputs": 33, "size": (70, 90)},
}


@pytest.mark.parametrize("layer", PAPER)
@pytest.mark.parametrize("simd", SIMD)
def test_layers_of_the_paper(layer: str, simd: str) -> None:
    p = problem(8, kernel=(5, 5), padding=(2, 2), **PAPER[layer])
    got, expected = native(p, simd=simd), reference.pooled_weight_gradient(**double(p))
    for g, e in zip(got, expected, strict=True):
        # K independent roundings of partial sums that grow like a random walk: 2^-24 sqrt(K / 6) of the norm
        assert (g - e).norm() <= 2.0**-24 * math.sqrt(p["delta"][:, 0].numel()) * e.norm()
    for threads in (2, 3, 7, 64):
        assert all(torch.equal(a, b) for a, b in zip(native(p, simd=simd, threads=threads), got, strict=True))


@pytest.mark.parametrize("kernel", [(1, 1), (7, 7), (11, 3), (1, 60), (60, 1)])
@pytest.mark.parametrize("inputs", [1, 16, 17])
def test_any_kernel(kernel: tuple[int, int], inputs: int) -> None:
    p = problem(2, inputs, 18, (61, 64), kernel, padding=(kernel[0] // 2, kernel[1] // 2))
    for simd in SIMD:
        assert_rounding(native(p, simd=simd), p)


def test_windows_that_overhang_as_with_padding_same() -> None:
    p = problem(size=(8, 8), pool_padding=(1, 1))
    p |= {"pool_padding": (0, 0), "winner": torch.zeros_like(p["winner"])}
    p["winner"][:, :, -1, -1] = 4
    for simd in SIMD:
        assert_rounding(native(p, simd=simd), p)


@pytest.mark.parametrize("value", [0, 8, 9, 255])
def test_a_winner_outside_is_an_error_unless_its_error_is_zero(value: int) -> None:
    p = problem()
    corner = 0 if value == 0 else -1
    p["winner"][1, 2, corner, corner] = value
    p["delta"][1, 2, corner, corner] = 1.0
    for simd in SIMD:
        with pytest.raises(ValueError, match="winner must not lie outside"):
            native(p, simd=simd)
    p["delta"][1, 2, corner, corner] = 0.0
    inside = p | {"winner": p["winner"].clone()}
    inside["winner"][1, 2, corner, corner] = 4
    for simd in SIMD:
        assert_rounding(native(p, simd=simd), inside)


def test_without_samples_the_gradients_are_zero() -> None:
    p = problem()
    p |= {name: p[name][:0] for name in ("delta", "winner", "x")}
    for simd in SIMD:
        gradient, bias = native(p, simd=simd)
        assert gradient.count_nonzero() == bias.count_nonzero() == 0


def test_nan_is_not_lost() -> None:
    p = problem(zeros=0.0)
    p["delta"][0, 1, 0, 0] = math.nan
    for simd in SIMD:
        gradient, bias = native(p, simd=simd)
        assert gradient[1].isnan().any() and bias[1].isnan()
        assert gradient[[0, 2, 3]].isfinite().all() and bias[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_op(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    p = problem(inputs=5)
    p |= {name: p[name].to(dtype) for name in ("delta", "x", "weight")}
    p |= {name: p[name].contiguous(memory_format=memory_format) for name in ("delta", "winner", "x", "weight")}
    torch.library.opcheck(OP.default, tuple(p.values()))
    gradient, bias = OP(**p)
    assert gradient.stride() == p["weight"].stride()
    if dtype == torch.float64:
        expected = reference.pooled_weight_gradient(**p)
        assert torch.equal(gradient, expected[0]) and torch.equal(bias, expected[1])
    else:
        assert_rounding((gradient, bias), p)


def test_reference_is_autograds() -> None:
    p = double(problem(zeros=0.0))
    weight, bias = p["weight"].requires_grad_(), torch.zeros(4, dtype=torch.float64, requires_grad=True)
    z = F.conv2d(p["x"], weight, bias, p["stride"], p["padding"], p["dilation"])
    pooled, flat = F.max_pool2d(z, 3, 2, 1, return_indices=True)
    rows, columns = torch.arange(pooled.shape[2])[:, None] * 2 - 1, torch.arange(pooled.shape[3]) * 2 - 1
    p["winner"] = ((flat // z.shape[3] - rows) * 3 + flat % z.shape[3] - columns).to(torch.uint8)
    expected = torch.autograd.grad(pooled, (weight, bias), p["delta"])
    torch.testing.assert_close(reference.pooled_weight_gradient(**p | {"weight": weight.detach()}), expected, rtol=1e-12, atol=1e-12)


BYTES = {"dtype": torch.uint8}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": 3}, TypeError, "expected a torch.Tensor"),
        ({"delta": torch.zeros(2, 4, 5, 4).double()}, ValueError, "delta has the wrong dtype"),
        ({"delta": torch.zeros(2, 4, 4, 5).mT}, ValueError, "delta must be contiguous"),
        ({"delta": torch.zeros(2, 20, 4)}, ValueError, "delta and x must be"),
        ({"delta": torch.zeros(3, 4, 5, 4)}, ValueError, r"delta must have shape \[2, 4, 5, 4\], got \[3, 4, 5, 4\]"),
        ({"delta": torch.zeros(2, 6, 5, 4), "winner": torch.zeros(2, 6, 5, 4, **BYTES)}, ValueError, "must not have windows outside"),
        ({"delta": torch.zeros(2, 0, 5, 4), "winner": torch.zeros(2, 0, 5, 4, **BYTES)}, ValueError, "the size of delta"),
        ({"winner": torch.zeros(2, 4, 5, 4, dtype=torch.int32)}, ValueError, "winner has the wrong dtype"),
        ({"winner": torch.zeros(2, 4, 5, 3, **BYTES)}, ValueError, "winner must have shape"),
        ({"x": torch.zeros(2, 8, 3, 9).mT}, ValueError, "x must be contiguous"),
        ({"x": torch.zeros(2, 8, 9, 3, dtype=torch.float16)}, ValueError, "x must be float32 or bfloat16"),
        ({"x": torch.zeros(2, 8, 9)}, ValueError, "delta and x must be"),
        ({"weight_gradient": torch.zeros(4, 2, 3, 3)}, ValueError, "groups are not supported"),
        ({"weight_gradient": torch.zeros(4, 3, 6, 3)[:, :, ::2]}, ValueError, "weight_gradient must be contiguous"),
        ({"weight_gradient": torch.zeros(4, 3, 3, 3).half()}, ValueError, "weight_gradient has the wrong dtype"),
        ({"weight_gradient": torch.zeros(4, 3, 11, 3)}, ValueError, "weight_gradient must not be larger"),
        ({"bias_gradient": torch.zeros(3)}, ValueError, "bias_gradient must have shape"),
        ({"geometry": (0, 1, 1, 1, 1, 1)}, ValueError, r"stride must be in \[1, 32768\], got 0"),
        ({"geometry": (1, 2**62, 1, 1, 1, 1)}, ValueError, "stride must be"),
        ({"geometry": (1, 1, -1, 1, 1, 1)}, ValueError, "padding must be"),
        ({"geometry": (1, 1, 1, 1, 1, 0)}, ValueError, "dilation must be"),
        ({"geometry": (1,)}, TypeError, "incompatible function arguments"),
        ({"sizes": (0, 3, 2, 2, 0, 1)}, ValueError, "kernel_size must be"),
        ({"sizes": (17, 16, 2, 2, 1, 1)}, ValueError, "at most 256 places"),
        ({"sizes": (3, 3, 0, 1, 1, 1)}, ValueError, "the pool's stride must be"),
        ({"sizes": (3, 3, 2, 2, 2, 1)}, ValueError, r"the pool's padding must be in \[0, 1\], got 2"),
        ({"threads": 0}, ValueError, "threads must be"),
        ({"simd": "mmx"}, ValueError, "simd must be"),
    ],
)
def test_the_compiled_part_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _C.pooled_weight_gradient(**raw(problem()) | change)


def test_mixed_precision() -> None:
    p = problem()
    p |= {"delta": p["delta"].bfloat16(), "x": p["x"].bfloat16()}
    got = OP(**p)
    assert all(t.dtype == torch.float32 for t in got)
    assert_rounding(got, p)
