"""The local mirror's step against the reference in float64, and against what theory says of its speed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import launched
from poison import guarded, poisoned
from torch import Tensor, nn

import fbkernels.functional as fn
from fbkernels import _C, ops, reference

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
EPS = 2.0**-24
KINDS = ("gaussian", "rademacher")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def steps(draw: Any, layers: int = 4, outputs: int = 150, units: int = 600, samples: int = 150) -> dict[str, Any]:
    sizes = draw(st.lists(st.tuples(st.integers(1, outputs), st.integers(1, units), st.integers(0, 2)), min_size=1, max_size=layers))
    sizes += draw(st.sampled_from([[], [(7, *sizes[0][1:])]]))  # a layer that shares its noise
    seed = draw(st.integers(0, 99))
    return {
        "B": [normal(m, n, seed=seed + i) for i, (m, n, _) in enumerate(sizes)],
        "W": [normal(m, n, seed=seed + 50 + i) for i, (m, n, _) in enumerate(sizes)],
        "step": torch.tensor(seed),
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
        "points": [draw(st.sampled_from([0, 5, 2**32 - 1])) if p else 7 for *_, p in sizes],
        "samples": draw(st.integers(1, samples)),
        "kind": draw(st.sampled_from(KINDS)),
        "offset": draw(st.integers(0, 2**40)),
    }


def noise(call: dict[str, Any], i: int) -> Tensor:
    key = call["seed"], call["step"].cpu(), call["points"][i], call["samples"], call["B"][i][0].numel(), 1.0, call["kind"]
    return reference.noise(*key, torch.float64, offset=call["offset"])


def check(call: dict[str, Any], backend: str) -> None:
    """A sum of K products is off by at most K eps sum |a b|, the noise itself by 9 eps; tensor cores take factors of 11 bits."""
    if backend != "cpp":
        call = call | {k: [guarded(t.to(DEVICE)) for t in call[k]] for k in ("B", "W")} | {"step": call["step"].to(DEVICE)}
    with poisoned():
        new, residual = ops.mirror(**call, backend=backend)
    S, rounding = call["samples"], 2.0**-10 if ON_GPU and backend == "triton" else 0
    assert (residual.shape, residual.dtype) == ((len(new),), torch.float32)
    for i, (b, w) in enumerate(zip(call["B"], call["W"], strict=True)):
        old, W, xi = b.double().cpu(), w.double().cpu(), noise(call, i)
        n, rate = W.shape[1], reference.mirror_rate(S, W.shape[1], call["kind"])
        unexplained, wrong = (W - old) @ xi.T, (2 * EPS * (S + n + 22) + rounding) * ((W - old).abs() @ xi.abs().T)
        exact, want = reference.mirror(old, W, xi, call["kind"])
        squares = (2 * wrong * unexplained.abs() + wrong**2).sum() / (S * W.square().sum())
        bound = 4 * EPS * exact.abs() + 2 * rate * wrong @ xi.abs()
        assert (new[i].shape, new[i].dtype) == (b.shape, torch.float32)
        assert bool(((new[i].double().cpu() - exact).abs() <= bound).all())
        assert abs(float(residual[i]) - float(want)) <= squares + 2 * EPS * (S + n + 10) * float(want)


SIZES = {"cpp": {}, "triton": {"layers": 2, "outputs": 80, "units": 300, "samples": 100}, "cuda": {"layers": 2, "units": 300}}
CASES = {"mirror": (lambda backend: steps(**SIZES[backend]), check)}


@given(steps(outputs=400), st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_every_instruction_set_and_thread_count(call: dict[str, Any], threads: int) -> None:
    results: dict[str, list[Tensor]] = {}
    key = {k: call[k] for k in ("B", "W", "step", "seed", "points", "samples", "kind", "offset")}
    for simd in _C.simd_paths():
        for t in (1, threads):
            out, residual = [torch.empty_like(b) for b in call["B"]], torch.empty(len(call["B"]))
            _C.mirror(**key, out=out, residual=residual, scratch=None, threads=t, simd=simd)
            both = [*out, residual]
            assert all(torch.equal(a, b) for a, b in zip(results.setdefault(simd, both), both, strict=True)), "depends on the thread count"
    for got in results.values():
        for a, b in zip(got, results["portable"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # check has the bounds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("samples", "units"), [(40, 12), (16, 16), (9, 60), (1, 3), (64, 1)])
def test_a_step_is_the_one_of_fastest_decay(kind: str, samples: int, units: int) -> None:
    """Over many steps from one B, E|W - B|^2 falls as derived; and it would fall by less, were the step longer or shorter."""
    B, W = torch.zeros(8, units), normal(8, units)
    size, fourth, repeats = float(W.square().sum()), 3 if kind == "gaussian" else 1, 1500
    change = torch.stack([fn.mirror(B, W, seed=1, step=s, point=0, samples=samples, kind=kind).B for s in range(repeats)]).double()
    left = (W - change).square().sum((1, 2)) / size
    expected = 1 - samples / (samples + units + fourth - 2)
    assert abs(float(left.mean()) - expected) <= 4 * float(left.std()) / repeats**0.5 + 1e-6
    # |D - f U|^2 = |D|^2 - 2 f D.U + f^2 |U|^2 is least in f where D.U = |U|^2
    slope = (W * change).sum((1, 2)) - change.square().sum((1, 2))
    assert abs(float(slope.mean())) <= 4 * float(slope.std()) / repeats**0.5 + 1e-6 * size


@pytest.mark.parametrize("kind", KINDS)
def test_the_residual_is_the_distance_squared(kind: str) -> None:
    B, W = normal(20, 3, 5, seed=1), normal(20, 3, 5, seed=2)
    step = {"seed": 1, "point": 0, "samples": 64, "kind": kind}
    for scale in (1.0, 1e-3):
        near = W + scale * (B - W)
        seen = torch.stack([fn.mirror(near, W, step=s, **step).residual for s in range(200)]).double()
        expected = float((W - near).square().sum() / W.square().sum())
        assert abs(float(seen.mean()) - expected) <= 4 * float(seen.std()) / 200**0.5
    assert float(fn.mirror(W, W, step=0, **step).residual) == 0
    nothing = torch.zeros_like(W)
    assert float(fn.mirror(nothing, nothing, step=0, **step).residual) == 0
    assert float(fn.mirror(W, nothing, step=0, **step).residual) > 1e30


def test_it_settles_on_the_weights_of_every_layer() -> None:
    layers = [nn.Linear(30, 7), nn.Conv1d(6, 9, 4, groups=3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv3d(2, 5, 2), nn.ConvTranspose2d(4, 6, 3)]
    W = [layer.weight.detach() for layer in layers]
    B = [torch.zeros_like(w) for w in W]
    for step in range(15):
        B, residual = fn.mirror_all(B, W, seed=3, step=step, points=range(5), samples=64)
    assert bool((residual < 1e-4).all())
    for b, w in zip(B, W, strict=True):
        assert b.shape == w.shape and float((b - w).norm()) < 0.01 * float(w.norm())


@pytest.mark.parametrize("n", [1, 2, 3, 16, 37, 64])
def test_patterns_are_orthogonal(n: int) -> None:
    signs, count = (
        noise(
            {"seed": 5, "step": torch.tensor(0), "points": [1], "samples": 1, "B": [torch.zeros(1, n)], "kind": "rademacher", "offset": 0},
            0,
        )[0],
        1 << (n - 1).bit_length(),
    )
    xi = torch.cat([reference.patterns(signs, first, min(8, count)) for first in range(0, count, 8)])
    assert xi.shape == (count, n) and bool((xi.abs() == 1).all())
    assert torch.equal(xi.T @ xi, count * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_with_one_point_and_fan_in_share_their_noise(kind: str) -> None:
    B, W = normal(90, 40), normal(90, 40, seed=1)
    step: dict[str, Any] = {"seed": 1, "step": 2, "samples": 70, "kind": kind}
    together = fn.mirror(B, W, point=3, **step)
    parts = fn.mirror_all([B[:30], normal(3, 20), B[30:]], [W[:30], normal(3, 20, seed=1), W[30:]], points=[3, 3, 3], **step)
    assert torch.equal(torch.cat((parts.B[0], parts.B[2])), together.B)
    assert not torch.equal(fn.mirror(B, W, point=4, **step).B, together.B)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_units_are_numbered_in_the_weights_logical_order(backend: str) -> None:
    B, W = normal(6, 4, 3, 3).to(DEVICE), normal(6, 4, 3, 3, seed=1).to(DEVICE)
    step: dict[str, Any] = {"seed": 1, "step": torch.tensor(2, device=DEVICE), "point": 3, "samples": 30, "backend": backend}
    plain = fn.mirror(B, W, **step)
    last = fn.mirror(B.to(memory_format=torch.channels_last), W.to(memory_format=torch.channels_last), **step)
    assert torch.equal(plain.B, last.B) and last.B.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain.B, fn.mirror(B.flatten(1), W.flatten(1), **step).B.view(B.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    B, W = normal(5, 9).to(dtype), normal(5, 9, seed=1).to(dtype)
    step: dict[str, Any] = {"seed": 1, "step": 2, "point": 3, "samples": 30}
    got, want = fn.mirror(B, W, **step), fn.mirror(B.double(), W.double(), backend="reference", **step)
    assert got.B.dtype == dtype and got.residual.dtype == torch.float32
    torch.testing.assert_close(got.B.double(), want.B, rtol=0, atol=4 * torch.finfo(dtype).eps * float(want.B.abs().max()))
    with pytest.raises(TypeError, match=r"takes float32, bfloat16, got torch\.float64"):
        fn.mirror(B.double(), W.double(), backend="cpp", **step)


def test_what_is_given_stays() -> None:
    B, W = normal(5, 9), normal(5, 9, seed=1)
    new = fn.mirror(B, W, seed=1, step=2, point=3).B
    assert torch.equal(B, normal(5, 9)) and torch.equal(W, normal(5, 9, seed=1)) and new.data_ptr() not in (B.data_ptr(), W.data_ptr())


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_the_op(backend: str) -> None:
    B, W = [normal(5, 3, 2), normal(4, 7)], [normal(5, 3, 2, seed=1), normal(4, 7, seed=1)]
    op = torch.ops.fbkernels.mirror.default
    torch.library.opcheck(op, (B, W, torch.tensor(3), -1, [0, 2], 12, "gaussian"), {"backend": backend})
    maps = [[t.to(memory_format=torch.channels_last)] for t in (normal(5, 3, 2, 2), normal(5, 3, 2, 2, seed=1))]
    torch.library.opcheck(op, (*maps, torch.tensor(3), 1, [2], 12, "rademacher"), {"backend": backend, "offset": 5})


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_compile_to_one_graph(backend: str) -> None:
    B, W = [normal(5, 6), normal(4, 7)], [normal(5, 6, seed=1), normal(4, 7, seed=1)]

    def call(B: list[Tensor], step: Tensor) -> tuple[Tensor, ...]:
        new, residual = fn.mirror_all([b + 1 for b in B], W, seed=2**64 - 1, step=step, points=[0, 1], samples=8, backend=backend)
        return 2 * new[0], 2 * new[1], residual

    for got, want in zip(
        torch.compile(call, fullgraph=True, backend="aot_eager")(B, torch.tensor(3)), call(B, torch.tensor(3)), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": []}, "B, W and points must be of one length, got 0, 1 and 1"),
        ({"points": [0, 1]}, "B, W and points must be of one length, got 1, 1 and 2"),
        ({"B": [torch.zeros(5)]}, r"B must be \[outputs, inputs, ...\] and not empty, got shape \(5,\)"),
        ({"B": [torch.zeros(5, 0)]}, "B must be .* and not empty"),
        ({"B": [torch.zeros(7, 5, dtype=torch.int64)]}, "B must have dtype|takes float32, .* got torch.int64"),
        ({"W": [torch.zeros(5, 7)]}, r"W must have shape \(7, 5\), got \(5, 7\)"),
        ({"W": [torch.zeros(7, 5, device="meta")]}, "W must be on|cannot take tensors on meta"),
        ({"W": [torch.zeros(7, 5, dtype=torch.bool)]}, "W must have dtype|takes float32, .* got torch.bool"),
        ({"step": torch.tensor(1.0)}, "step must be"),
        ({"points": [-1]}, "point must be"),
        ({"samples": 0}, "samples must be"),
        ({"samples": 2**20 + 1}, "samples must be"),
        ({"offset": -1}, "offset must be"),
        ({"kind": "uniform"}, "kind must be one of"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_bad_arguments_are_named_before_anything_runs(change: dict[str, Any], message: str, backend: str) -> None:
    good: dict[str, Any] = {"B": [torch.zeros(7, 5)], "W": [torch.ones(7, 5)], "step": torch.tensor(1), "seed": 1, "points": [2]}
    good |= {"samples": 8, "kind": "gaussian", "offset": 0}
    with launched() as (kernels_run, _), pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        ops.mirror(**(good | change), backend=backend)
    assert not kernels_run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": []}, "B, W, out and points must be of one length"),
        ({"W": [torch.zeros(7, 6)]}, "W must have shape"),
        ({"out": [torch.zeros(5, 7).T]}, "out must be contiguous"),
        ({"B": [torch.zeros(7, 5, 1)]}, "B must be"),
        ({"residual": torch.zeros(2)}, "residual must have shape"),
        ({"residual": torch.zeros(1, dtype=torch.float64)}, "residual has the wrong dtype"),
        ({"samples": 0}, "samples must be"),
        ({"samples": 2**20 + 1}, "samples must be"),
        ({"threads": 0}, "threads must be"),
        ({"points": [2**32]}, "point must be"),
    ],
)
def test_the_compiled_part_checks_too(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"B": [torch.zeros(7, 5)], "W": [torch.ones(7, 5)], "out": [torch.empty(7, 5)], "residual": torch.empty(1)}
    good |= {"scratch": None, "step": torch.tensor(1), "seed": 1, "points": [2], "samples": 8, "kind": "gaussian"}
    with pytest.raises(ValueError, match=message):
        _C.mirror(**(good | change))
    with pytest.raises(ValueError, match="out must be neither B nor W"):
        _C.mirror(**(good | {"out": good["B"]}))


def test_the_seed_is_a_key_of_64_bits() -> None:
    with pytest.raises(ValueError, match="seed must be"):
        fn.mirror(normal(2, 3), normal(2, 3), seed=2**64, step=0, point=0)
    assert math.isfinite(float(fn.mirror(normal(2, 3), normal(2, 3), seed=2**64 - 1, step=0, point=0).residual))
