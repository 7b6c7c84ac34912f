"""The update of B, the joint rules' prediction and the feedback product, against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import launched
from poison import guarded, poisoned
from torch import Tensor

import fbkernels.functional as fn
from fbkernels import _C, ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEP = torch.tensor(3)
EPS = 2.0**-24
F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) and value.device.type != "meta" else value


@st.composite
def updates(draw: Any, units: int = 1500, rows: int = 90) -> dict[str, Any]:
    units, m, rows, predicted = (draw(st.integers(1, high)) for high in (units, 70, rows, rows))
    seed, form, what = (
        draw(st.integers(0, 99)),
        draw(st.sampled_from(["none", "full", "factors"])),
        draw(st.sampled_from(["B", "Xi B", "both"])),
    )
    learns, predicts = what != "Xi B", what != "B"
    R = normal(rows, m, seed=seed)
    return {
        "B": normal(units, m, seed=seed + 1),
        "M": 0.1 * normal(m, m, seed=seed + 2) if learns and form == "full" else None,
        "G": normal(rows, m, seed=seed + 4) if learns and form != "factors" else None,
        "R": R if learns and form == "factors" else None,
        "Q": 0.1 * normal(rows, m, seed=seed + 3) if learns and form == "factors" else None,
        "w": normal(rows, seed=seed + 4) if learns and form == "factors" else None,
        "step": torch.tensor(seed) if learns else None,
        "predicted_step": torch.tensor(seed + 1) if predicts else None,
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
        "point": draw(st.integers(0, 2**32 - 1)),
        "predicted_rows": predicted if predicts else 0,
        "std": 0.3,
        "kind": draw(st.sampled_from(["gaussian", "rademacher"])),
        "offset": draw(st.integers(0, 2**40)),
    }


def double(call: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}


def bounds(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Rounding of the two results: a sum of K products is off by at most K eps sum |a b|; noise itself by 9 eps."""
    B, G = call["B"].double().abs(), call["G"]
    size, terms = B, 1
    largest = call["std"] * math.sqrt(48 * math.log(2))
    if G is not None:
        size, terms = size + largest * G.double().abs().sum(0), terms + len(G) + 9
    if call["M"] is not None:
        size, terms = size + B @ call["M"].double().abs(), terms + B.shape[1]
    if call["R"] is not None:
        inner = largest * call["w"].double().abs() + B @ call["R"].double().abs().mT
        size, terms = size + inner @ call["Q"].double().abs(), terms + B.shape[1] + len(call["R"]) + 9
    prediction = (terms + len(B) + 9) * 2 * EPS * largest * size.sum(0)
    return terms * 2 * EPS * size, prediction


def check_update(call: dict[str, Any], backend: str) -> None:
    given = call if backend == "cpp" else {k: guarded(at(v)) if isinstance(v, Tensor) else v for k, v in call.items()}
    with poisoned():
        new, parts = (t.cpu() for t in ops.feedback_update(**given, backend=backend))
    expected = ops.feedback_update(**double(call), backend="reference")
    got = new, parts.sum(0, keepdim=True) if parts.numel() else parts
    for g, want, bound in zip(got, expected, bounds(call), strict=True):
        assert (g.shape, g.dtype) == (want.shape, torch.float32)
        assert g.numel() == 0 or bool(((g.double() - want).abs() <= bound).all())


@given(updates(), st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_update_on_every_instruction_set_and_thread_count(call: dict[str, Any], threads: int) -> None:
    results = []
    parts = torch.empty(-(-len(call["B"]) // 1024) + 1, call["predicted_rows"], call["B"].shape[1])
    for simd in _C.simd_paths():
        for t in (1, threads):
            out = None if call["step"] is None else torch.empty_like(call["B"])
            key = {k: call[k] for k in ("step", "predicted_step", "seed", "point", "std", "kind", "offset")}
            given = {k: call[k] for k in ("B", "M", "G", "R", "Q", "w")}
            _C.feedback_update(**given, out=out, prediction=parts if call["predicted_rows"] else None, **key, threads=t, simd=simd)
            results.append((torch.zeros(0) if out is None else out, parts[0].clone() if call["predicted_rows"] else torch.zeros(0)))
    for i in range(0, len(results), 2):
        assert all(torch.equal(a, b) for a, b in zip(results[i], results[i + 1], strict=True)), "depends on the thread count"
    for got in results[2::2]:
        for g, want, bound in zip(got, results[0], bounds(call), strict=True):
            assert g.numel() == 0 or bool(((g - want).abs() <= 2 * bound).all())


@given(
    st.integers(1, 90),
    st.integers(1, 300),
    st.integers(1, 200),
    st.sampled_from(tuple(reference.ACTIVATIONS)),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_feedback_is_the_reference(n: int, units: int, m: int, activation: str, dtype: torch.dtype, seed: int) -> None:
    e, B, z = normal(n, m, seed=seed), normal(units, m, seed=seed + 1), normal(n, units, seed=seed + 2)
    kept = (z if activation == "gelu" else reference.ACTIVATIONS[activation](z)).to(dtype)
    expected = ops.feedback(e.double(), B.double(), kept.double(), activation, backend="reference")
    # a sum of m products; then phi', at most 1.13, off by 8 eps, and the rounding to the dtype
    bound = 1.13 * (m + 10) * 2 * EPS * (e.abs().double() @ B.abs().double().T)
    bound = bound + (0 if dtype == torch.float32 else 2.0**-8) * expected.abs() + 1e-30
    results = []
    for simd in _C.simd_paths():
        for threads in (1, 3):
            delta = torch.empty_like(kept)
            _C.feedback(e, B, None if activation == "identity" else kept, delta, activation, threads, simd)
            results.append(delta)
            assert bool(((delta.double() - expected).abs() <= bound).all())
        assert torch.equal(results[-1], results[-2]), "depends on the thread count"
    assert torch.equal(ops.feedback(e, B, kept, activation), results[-1])


feedbacks = st.tuples(
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(1, 40),
    st.sampled_from([None, ([2, 2], [2, 2], [0, 0]), ([3, 3], [2, 2], [1, 1]), ([5, 3], [1, 2], [2, 1]), ([2, 3], [3, 1], [1, 0])]),
    st.sampled_from(tuple(reference.ACTIVATIONS)),
    st.sampled_from([torch.contiguous_format, torch.channels_last]),
    st.integers(0, 99),
)


def check_feedback(
    backend: str, dtype: torch.dtype, n: int, channels: int, m: int, window: Any, activation: str, layout: torch.memory_format, seed: int
) -> None:
    size, options, winner = [5, 7], {}, None
    z = normal(n, channels, *size, seed=seed).to(dtype)
    kept, behind = z if activation == "gelu" else reference.ACTIVATIONS[activation](z.float()).to(dtype), size
    if window is not None:
        behind = [(k + 2 * p - w) // s + 1 for k, w, s, p in zip(size, *window, strict=True)]
        options = {"size": size, **dict(zip(("kernel_size", "stride", "padding"), window, strict=True))}
        # kept of the op is z for gelu and empty where phi' is read from h
        h, _, kept, winner, *_ = ops.perturbed_pointwise(
            z.double(), None, None, activation, "max", False, *window, STEP, 1, 0, 0, 0.1, "gaussian", backend="reference"
        )
        kept = (kept if kept.numel() else h).to(dtype)
    e, B = normal(n, m, seed=seed), normal(channels * math.prod(behind), m, seed=seed + 1)
    kept = kept.contiguous(memory_format=layout)
    device = "cpu" if backend == "cpp" else DEVICE
    given = [guarded(t.to(device)) for t in (e, B, kept)]
    won = None if winner is None else guarded(winner.to(device))
    with poisoned():
        delta = ops.feedback(*given, activation, winner=won, **options, backend=backend).cpu()
    exact = {"winner": winner, **options, "backend": "reference"}
    expected = ops.feedback(e.double(), B.double(), kept.double(), activation, **exact)
    # of each of the windows that a place won a sum of m products, phi', at most 1.13, off by 8 eps; then the rounding to the dtype
    sizes = ops.feedback(e.double().abs(), B.double().abs(), torch.ones_like(kept, dtype=F64), "identity", **exact)
    rounded = expected.abs()
    if backend != "triton":  # the others round each window's error, and each sum of the unpooling
        won_by = 0 if winner is None else ops.unpool(torch.ones_like(winner, dtype=F64), winner, size, *window, backend="reference")
        rounded = 1.13 * sizes * (1 + won_by)
    bound = 1.13 * (m + 12) * 2 * EPS * sizes + (0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2) * rounded + 2.0**-25
    assert (delta.shape, delta.dtype) == (expected.shape, dtype) and delta.is_contiguous(memory_format=torch.channels_last)
    assert bool(((delta.double() - expected).abs() <= bound).all())


LARGE = {"cpp": (1500, 90), "triton": (150, 40), "cuda": (300, 150)}  # units and rows
LOW = {"cpp": torch.bfloat16, "triton": torch.float16, "cuda": torch.float32}  # Triton's interpreter truncates to bfloat16
CASES = {
    "feedback_update": (lambda backend: updates(*LARGE[backend]), check_update),
    "feedback": (
        lambda backend: st.tuples(st.sampled_from([torch.float32, LOW[backend]]), feedbacks),
        lambda call, backend: check_feedback(backend, call[0], *call[1]),
    ),
}


def test_feedback_of_maps_numbers_units_channels_last() -> None:
    e, B, h = normal(3, 4), normal(2 * 5 * 6, 4, seed=1), torch.tanh(normal(3, 2, 5, 6, seed=2))
    expected = (e @ B.T).view(3, 5, 6, 2).movedim(-1, 1) * (1 - h * h)
    for kept in (h, h.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(ops.feedback(e, B, kept, "tanh"), expected)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_the_ops(backend: str) -> None:
    B, M, R, G = normal(33, 5), normal(5, 5), normal(4, 5), normal(4, 5)
    step, key = torch.tensor(3), (-1, 2, 6, 0.1, "gaussian")
    op = torch.ops.fbkernels.feedback_update.default
    torch.library.opcheck(op, (B, M, G, None, None, None, step, step, *key), {"backend": backend})
    torch.library.opcheck(op, (B, None, None, R, R, R[:, 0], step, None, *key), {"backend": backend})
    torch.library.opcheck(op, (B.T.contiguous().T, *[None] * 6, step, *key), {"backend": backend})
    kept = normal(4, 3, 11, 1).to(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.fbkernels.feedback.default, (G, B, kept, "tanh"), {"backend": backend})
    torch.library.opcheck(torch.ops.fbkernels.feedback.default, (G, B, normal(33, 4).T, "relu"), {"backend": backend})
    winner = torch.randint(4, kept.shape, dtype=torch.uint8)
    pooled = {"winner": winner, "size": [22, 2], "kernel_size": [2, 2], "stride": [2, 2], "backend": backend}
    torch.library.opcheck(torch.ops.fbkernels.feedback.default, (G, B, kept, "tanh"), pooled)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_compile_to_one_graph(backend: str) -> None:
    B, G, kept, winner = normal(33, 5), normal(4, 5), normal(4, 3, 11, 1), torch.randint(4, (4, 3, 11, 1), dtype=torch.uint8)
    key, window = (STEP, STEP + 1, -1, 2, 6, 0.1, "gaussian"), {"size": [22, 2], "kernel_size": [2, 2], "stride": [2, 2]}

    def both(B: Tensor, G: Tensor) -> tuple[Tensor, ...]:
        new, parts = ops.feedback_update(B + 1, None, G, None, None, None, *key, backend=backend)
        return 2 * new, parts.sum(0), 2 * ops.feedback(G, new, kept, "tanh", winner=winner, **window, backend=backend)

    for got, want in zip(torch.compile(both, fullgraph=True, backend="aot_eager")(B, G), both(B, G), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"M": torch.zeros(4, 4)}, "M must have shape"),
        ({"R": torch.zeros(4, 5)}, "R, Q and w"),
        ({"R": torch.zeros(4, 5), "Q": torch.zeros(4, 5), "w": torch.zeros(4)}, "G must be given, with or without M, or R, Q and w"),
        ({"M": None, "G": None, "R": torch.zeros(4, 5), "Q": torch.zeros(4, 5), "w": torch.zeros(5)}, "w must have shape"),
        ({"G": torch.zeros(4, 6)}, "G must have shape"),
        ({"G": None}, "G must be given"),
        ({"G": None, "M": None, "step": None}, "G, or R, Q and w, or prediction must be given"),
        ({"std": float("nan")}, "std must be"),
        ({"kind": "uniform"}, "kind must be one of"),
    ],
)
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_bad_arguments_are_named(change: dict[str, Any], message: str, backend: str) -> None:
    good = {
        "B": torch.zeros(7, 5),
        "M": torch.zeros(5, 5),
        "G": torch.zeros(4, 5),
        "R": None,
        "Q": None,
        "w": None,
        "step": torch.tensor(1),
    }
    good |= {"predicted_step": None, "seed": 1, "point": 2, "predicted_rows": 0, "std": 0.1, "kind": "gaussian"}
    with pytest.raises(ValueError, match=message):
        ops.feedback_update(**(good | change), backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"e": torch.zeros(3, 5)}, "e must have shape"),
        ({"e": torch.zeros(())}, "e must have shape"),
        ({"e": torch.zeros(4, 5, dtype=torch.int64)}, "e must have dtype"),
        ({"e": torch.zeros(4, 5, device="meta")}, "e must be on"),
        ({"B": torch.zeros(32, 5)}, "B must have shape"),
        ({"B": torch.zeros(36, 6)}, "B must have shape"),
        ({"B": torch.zeros(36, 5, device="meta")}, "B must be on"),
        ({"kept": torch.zeros(4, 36)}, "kept must be|winner must have shape"),
        ({"kept": torch.zeros(36)}, "kept must be"),
        ({"activation": "softplus"}, "activation must be one of"),
        ({"winner": torch.zeros(4, 3, 4, 2, dtype=torch.uint8)}, "winner must have shape"),
        ({"winner": torch.zeros(4, 3, 4, 3)}, "winner must have dtype"),
        ({"winner": torch.zeros(4, 3, 4, 3, dtype=torch.uint8, device="meta")}, "winner must be on"),
        ({"size": [8, 8]}, "size .* does not have the shape of winner"),
        ({"size": [8]}, "size must have two"),
        ({"size": ()}, "size must have two"),
        ({"kernel_size": [0, 2]}, "kernel_size must be"),
        ({"kernel_size": [9, 2]}, "kernel_size must not be larger"),
        ({"stride": [2, 0]}, "stride must be"),
        ({"padding": [2, 0]}, "padding must be"),
    ],
)
def test_bad_arguments_of_feedback_are_named_before_anything_runs(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"e": torch.zeros(4, 5), "B": torch.zeros(36, 5), "kept": torch.zeros(4, 3, 4, 3), "activation": "relu"}
    good |= {"winner": torch.zeros(4, 3, 4, 3, dtype=torch.uint8), "size": [8, 6], "kernel_size": [2, 2], "stride": [2, 2]}
    with launched() as (kernels_run, _), pytest.raises((ValueError, TypeError), match=message):
        ops.feedback(**{k: at(v) for k, v in (good | {"padding": [0, 0]} | change).items()}, backend="triton")
    assert kernels_run == []


def test_functional() -> None:
    B, M, R, G, xi = normal(7, 5), normal(5, 5, seed=1), normal(4, 5, seed=2), normal(4, 5, seed=3), fn.noise(3, 4, 5, 4, 7, 0.1)
    key: dict[str, Any] = {"seed": 3, "step": 4, "point": 5, "std": 0.1}
    torch.testing.assert_close(fn.feedback_update(B, M, G, **key), B - B @ M + xi.T @ G)
    torch.testing.assert_close(fn.feedback_update(B, (R, G), R[:, 0], **key), B - B @ R.T @ G + xi.T @ (R[:, :1] * G))
    torch.testing.assert_close(fn.feedback_update(B, None, G, **key, backend="reference"), B + xi.T @ G)
    h = torch.tanh(normal(4, 7, seed=5))
    torch.testing.assert_close(fn.feedback(G, B, h, "tanh"), G @ B.T * (1 - h * h))
    V, Q, gain, scaled = fn.ridge_gain(R, torch.arange(4.0), 0.1 * torch.eye(5, dtype=F64), 0.1)
    torch.testing.assert_close(V, 0.1 * torch.eye(5, dtype=F64) + R.double().T @ R.double())
    torch.testing.assert_close(Q.double(), torch.linalg.solve(V, R.double().T).T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gain, R.T @ Q, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaled, torch.arange(4.0)[:, None] * Q)
