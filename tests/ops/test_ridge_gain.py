"""A batch of recursive least squares, against the reference's solve by LAPACK."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fbkernels import _C, ops, reference

BACKENDS = ("reference", "cpp", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of what Triton computes
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


def agrees(got: tuple[Tensor, ...], R: Tensor, w: Tensor, V: Tensor, forgetting: float) -> None:
    """Against the reference. A solve is off by m eps times the condition number, at most trace(V) / gamma; then each result rounds."""
    expected = reference.ridge_gain(R.double(), w, V, 0.1, forgetting)
    trace = float(expected[0].diagonal(dim1=-2, dim2=-1).sum(-1).max())
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=8 * (R.shape[-2] + 2) * EPS64 * trace)
    for g, want in zip(got[1:], expected[1:], strict=True):
        assert g.dtype == R.dtype and g.is_contiguous()
        rounding = torch.finfo(R.dtype).eps / 2 + 8 * sum(R.shape[-2:]) * EPS64 * trace / 0.1
        assert float((g.double() - want).abs().max()) <= rounding * float(want.abs().max())


def check(call: tuple[int, int, float, int, int], backend: str) -> None:
    n, m, forgetting, batches, seed = call
    R, w, V = (t.to("cpu" if backend == "cpp" else DEVICE) for t in batch(n, m, seed, batches))
    agrees(ops.ridge_gain(R, w, V, 0.1, forgetting, backend=backend), R, w, V, forgetting)


sizes = st.tuples(st.integers(1, 90), st.integers(1, 120), st.sampled_from([1.0, 0.99, 0.8]), st.integers(0, 20), st.integers(0, 99))
CASES = {"ridge_gain": (lambda _: sizes, check)}


@pytest.mark.parametrize("m", [129, 300, 1000])
def test_more_regressors_than_a_block(m: int) -> None:
    R, w, V = (t.to(DEVICE) for t in batch(64, m, 0, 4))
    agrees(ops.ridge_gain(R, w, V, 0.1, 0.99, backend="triton"), R, w, V, 0.99)


@pytest.mark.parametrize("m", [20, 150])
def test_groups_and_views(m: int) -> None:
    R, w, V = (t.to(DEVICE) for t in batch(21, m, 0, 4))
    groups = torch.stack((R, 2 * R.roll(1, 1), R.flip(1)))
    for given_R, given_V in ((groups, V.expand(3, m, m)), (groups.mT.contiguous().mT, V.expand(3, m, m).clone()), (R.bfloat16(), V.T)):
        agrees(ops.ridge_gain(given_R, w, given_V, 0.1, 0.9, backend="triton"), given_R, w, given_V, 0.9)


def check_ill_conditioned(m: int, decay: float, dtype: torch.dtype, gain: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Trace 1e6 over gamma 0.1: what ``gain`` makes of 32 regressors of ``dtype`` and V, the new V and Q in float64, is off by at most
    twice what torch's own inverse is off."""
    generator = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))[0]
    rows = torch.randn(4 * m + 32, m, generator=generator, dtype=torch.float64) * torch.logspace(0, -decay, m, dtype=torch.float64) @ turn
    rows = rows - rows.mean(1, keepdim=True)
    V, R = rows[32:].mT @ rows[32:], rows[:32].to(dtype)
    V, Q = gain(R, 1e6 / V.trace() * V + 0.1 * torch.eye(m, dtype=torch.float64))
    R, torchs = R.double(), torch.cholesky_inverse(torch.linalg.cholesky(V))
    long = V.numpy().astype(np.longdouble)
    exact = R.numpy() @ torchs.numpy().astype(np.longdouble)
    for _ in range(4):
        exact = exact + (R.numpy() - exact @ long) @ torchs.numpy()
    error, theirs = (float(abs(q.numpy() - exact).max()) for q in (Q, R @ torchs))
    assert error <= 2 * theirs


@pytest.mark.parametrize("m", [10, 100, 128, 300])
@pytest.mark.parametrize("decay", [0, 3])
def test_ill_conditioned_statistics(m: int, decay: float) -> None:
    from fbkernels import kernels

    def gain(R: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        V, Q, _, _ = kernels.ridge_gain(R.to(DEVICE), torch.ones(32, device=DEVICE), V.to(DEVICE), 0.1, 1.0)
        return V.cpu(), Q.cpu()

    check_ill_conditioned(m, decay, torch.float64, gain)


def test_the_host_does_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values, at which a look raises: the launches are what a CUDA graph may hold."""

    class Launches:
        count = 0

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **__: setattr(self, "count", self.count + 1)

    launches = Launches()
    module = sys.modules["fbkernels.kernels.ridge_gain"]
    monkeypatch.setattr(module, "sweep_kernel", launches)
    for m in (10, 300):
        R, w, V = (t.to("meta") for t in batch(32, m, 0, 1))
        assert all(t.is_meta for t in module.ridge_gain(R, w, V, 0.1, 0.9))
    assert launches.count == 1 + 5


@pytest.mark.parametrize(("backend", "batches"), [("cpp", 2000), ("triton", 200)])
def test_samples_do_not_drift(backend: str, batches: int) -> None:
    """The recursion over 500 samples a batch against one solve over all of it, B relative to its size."""
    generator = torch.Generator().manual_seed(0)
    n, m, B, V = 500, 10, torch.zeros(3, 10, dtype=torch.float64), 0.1 * torch.eye(10, dtype=torch.float64)
    gram, moment = V.clone(), torch.zeros(3, 10, dtype=torch.float64)
    device = DEVICE if backend == "triton" else "cpu"
    for _ in range(batches):
        R, lam = torch.randn(n, m, generator=generator), torch.randn(n, 3, generator=generator).double()
        V, Q, M, _ = (t.cpu() for t in ops.ridge_gain(R.to(device), torch.ones(n, device=device), V.to(device), 0.1, 1.0, backend=backend))
        B = B - B @ M.double() + lam.T @ Q.double()
        gram, moment = gram + R.double().T @ R.double(), moment + lam.T @ R.double()
    exact = torch.linalg.solve(gram, moment.T).T
    # gains round to float32 in each batch, independently
    assert float((B - exact).norm()) <= batches**0.5 * 4 * EPS32 * float(exact.norm())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_op(backend: str) -> None:
    device = DEVICE if backend == "triton" else "cpu"
    R, w, V = (t.to(device) for t in batch(7, 5, 0, 1))
    op = torch.ops.fbkernels.ridge_gain.default
    torch.library.opcheck(op, (R, w, V, 0.1, 0.9), {"backend": backend})
    torch.library.opcheck(op, (R.T.contiguous().T, w, V, 0.1, 1.0), {"backend": backend})
    groups = torch.randn(2, 7, 5, device=device), w, V.expand(2, 5, 5), 0.1, 0.9
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
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments_are_named(change: dict[str, object], message: str, backend: str) -> None:
    R, w, V = batch(7, 5, 0, 1)
    call = {"R": R, "w": w, "V": V, "gamma": 0.1, "forgetting": 0.9, "backend": backend} | change
    with pytest.raises(ValueError, match=message):
        ops.ridge_gain(**{k: v.to(DEVICE) if backend == "triton" and isinstance(v, Tensor) else v for k, v in call.items()})


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(
    "V", [-torch.eye(5, dtype=torch.float64), torch.full((5, 5), float("nan"), dtype=torch.float64)], ids=["negative", "nan"]
)
def test_statistics_that_are_none_are_refused(V: Tensor, backend: str) -> None:
    with pytest.raises(RuntimeError, match=r"not positive.definite|not positive-definite|input is not"):
        ops.ridge_gain(torch.zeros(7, 5), torch.ones(7), V, 0.1, 1.0, backend=backend)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("m", [5, 150])
@pytest.mark.parametrize(("last", "coupled"), [(0.0, 0.0), *itertools.product((-1.0, -1e-6, float("nan"), float("-inf")), (0.0, 0.5))])
def test_statistics_that_are_none_give_no_finite_gain(m: int, last: float, coupled: float) -> None:
    """One pivot of m is not positive, the last: on a GPU nothing may raise, and no gain may look right."""
    V = torch.eye(m, dtype=torch.float64)
    V[-1, :-1] = V[:-1, -1] = coupled
    V[-1, -1] = last + coupled**2 * (m - 1)
    R, w = torch.zeros(7, m), torch.ones(7)
    _, *gains = ops.ridge_gain(R.to(DEVICE), w.to(DEVICE), V.to(DEVICE), 0.1, 1.0, backend="triton")
    assert not any(t.isfinite().any() for t in gains)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_regressors_that_are_not_finite_give_no_finite_gain(bad: float) -> None:
    R, w, V = batch(7, 5, 0, 1)
    R[3, 2] = bad
    _, *gains = ops.ridge_gain(R.to(DEVICE), w.to(DEVICE), V.to(DEVICE), 0.1, 1.0, backend="triton")
    assert not any(t.isfinite().any() for t in gains)
