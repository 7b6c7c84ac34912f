"""A batch of recursive least squares, against the reference's solve by LAPACK."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fbkernels import _C, ops, reference

EPS32, EPS64 = 2.0**-24, 2.0**-53


def batch(n: int, m: int, seed: int, batches: int) -> tuple[Tensor, Tensor, Tensor]:
    """Regressors that sum to zero, as cross-entropy errors do, w, and statistics of some batches."""
    generator = torch.Generator().manual_seed(seed)
    R = torch.randn(n, m, generator=generator)
    R = R - R.mean(1, keepdim=True)
    past = torch.randn(batches * 32, m, generator=generator, dtype=torch.float64)
    return R, torch.randn(n, generator=generator), 0.1 * torch.eye(m, dtype=torch.float64) + past.T @ past


def call(R: Tensor, w: Tensor, V: Tensor, gamma: float, forgetting: float, simd: str) -> tuple[Tensor, ...]:
    n, m = R.shape
    out = V.new_empty(m, m), R.new_empty(n, m), R.new_empty(m, m), R.new_empty(n, m)
    _C.ridge_gain(R, w, V, *out, V.new_empty(3 * n + 2 * m, m), gamma, forgetting, simd)
    return out


@given(st.integers(1, 90), st.integers(1, 120), st.sampled_from([1.0, 0.99, 0.8]), st.integers(0, 20), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_gains_are_the_reference(n: int, m: int, forgetting: float, batches: int, seed: int) -> None:
    R, w, V = batch(n, m, seed, batches)
    expected = reference.ridge_gain(R.double(), w, V, 0.1, forgetting)
    # a solve is off by m eps times the condition number, at most trace(V) / gamma; then each result rounds to float32
    condition = float(expected[0].trace()) / 0.1
    for simd in _C.simd_paths():
        got = call(R, w, V, 0.1, forgetting, simd)
        torch.testing.assert_close(got[0], expected[0], rtol=0, atol=8 * (n + 2) * EPS64 * float(expected[0].trace()))
        for g, want in zip(got[1:], expected[1:], strict=True):
            scale = float(want.abs().max())
            assert float((g.double() - want).abs().max()) <= (EPS32 + 8 * (m + n) * EPS64 * condition) * scale
    assert all(torch.equal(a, b) for a, b in zip(ops.ridge_gain(R, w, V, 0.1, forgetting), got, strict=True))


def test_a_million_samples_do_not_drift() -> None:
    """The recursion against one solve over all of it, B relative to its size."""
    generator = torch.Generator().manual_seed(0)
    n, m, B, V = 500, 10, torch.zeros(3, 10, dtype=torch.float64), 0.1 * torch.eye(10, dtype=torch.float64)
    gram, moment = V.clone(), torch.zeros(3, 10, dtype=torch.float64)
    for _ in range(2000):
        R, lam = torch.randn(n, m, generator=generator), torch.randn(n, 3, generator=generator).double()
        V, Q, M, _ = ops.ridge_gain(R, torch.ones(n), V, 0.1, 1.0)
        B = B - B @ M.double() + lam.T @ Q.double()
        gram, moment = gram + R.double().T @ R.double(), moment + lam.T @ R.double()
    exact = torch.linalg.solve(gram, moment.T).T
    # gains round to float32 in each of 2,000 batches, independently
    assert float((B - exact).norm()) <= 2000**0.5 * 4 * EPS32 * float(exact.norm())


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_the_op(backend: str) -> None:
    R, w, V = batch(7, 5, 0, 1)
    op = torch.ops.fbkernels.ridge_gain.default
    torch.library.opcheck(op, (R, w, V, 0.1, 0.9), {"backend": backend})
    torch.library.opcheck(op, (R.T.contiguous().T, w, V, 0.1, 1.0), {"backend": backend})
    groups = torch.randn(2, 7, 5), w, V.expand(2, 5, 5), 0.1, 0.9
    torch.library.opcheck(op, groups, {"backend": backend})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.ones(6)}, "w must have shape"),
        ({"V": torch.eye(5)}, "V has the wrong dtype"),
        ({"V": torch.eye(6).double()}, "V must have shape"),
        ({"gamma": 0.0}, "gamma must be"),
        ({"forgetting": 1.5}, "forgetting must be"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    R, w, V = batch(7, 5, 0, 1)
    with pytest.raises(ValueError, match=message):
        ops.ridge_gain(**({"R": R, "w": w, "V": V, "gamma": 0.1, "forgetting": 0.9} | change))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(
    "V", [-torch.eye(5, dtype=torch.float64), torch.full((5, 5), float("nan"), dtype=torch.float64)], ids=["negative", "nan"]
)
def test_statistics_that_are_none_are_refused(V: Tensor, backend: str) -> None:
    with pytest.raises(RuntimeError, match=r"not positive.definite|not positive-definite|input is not"):
        ops.ridge_gain(torch.zeros(7, 5), torch.ones(7), V, 0.1, 1.0, backend=backend)
