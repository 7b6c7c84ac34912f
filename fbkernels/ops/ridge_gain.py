"""A batch of recursive least squares (SPEC 4)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fbkernels import reference as definition
from fbkernels._check import in_interval, positive
from fbkernels.ops import _op
from fbkernels.ops._op import Op, kernels


def ridge_gain(R: Tensor, w: Tensor, V: Tensor, gamma: float, forgetting: float = 1.0, *, backend: str = "auto") -> RidgeGain:
    """A batch of recursive least squares (SPEC 4): ``V <- beta^N V + (1 - beta^N) gamma I + R^T D R`` with
    ``D = diag(beta^(N-1), ..., 1)``, then ``Q = D R V^-1``, ``M = R^T Q``, ``G = w * Q``.

    Args:
        R: regressors, [N, m], or [groups, N, m] with V [groups, m, m].
        w: ``dL / sigma^2``, [N].
        V: the statistics so far, float64 [m, m]; ``gamma I`` at the start.
        gamma: the ridge, > 0, in units of ``|r|^2``.
        forgetting: beta in (0, 1] per sample.

    Returns:
        The new V (float64), and Q, M, G in the dtype of R; the solve is in float64.

    Raises:
        ValueError: naming the argument and what was expected. RuntimeError: the backend cannot be had; V is not positive definite.
            With backend "triton" no such V raises, because a look at it would synchronise: Q, M and G are NaN or infinite throughout.
    """
    return RidgeGain(*op(R, w, V, gamma, forgetting, backend=backend))


class RidgeGain(NamedTuple):
    """What :func:`ridge_gain` returns."""

    V: Tensor
    Q: Tensor
    M: Tensor
    G: Tensor


SCHEMA = (
    'ridge_gain(Tensor R, Tensor w, Tensor V, float gamma, float forgetting, *, str backend="auto") -> (Tensor, Tensor, Tensor, Tensor)'
)


def outputs(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = a.R.new_empty
    return a.V.new_empty(a.V.shape), new(a.R.shape), new(a.V.shape), new(a.R.shape)


def check(a: Any) -> None:
    if a.R.ndim not in (2, 3):
        raise ValueError(f"R must be [samples, regressors] or [groups, samples, regressors], got shape {tuple(a.R.shape)}")
    *groups, samples, m = a.R.shape
    if a.w.shape != (samples,):
        raise ValueError(f"w must have shape ({samples},), got {tuple(a.w.shape)}")
    if a.V.dtype != torch.float64:
        raise ValueError(f"V has the wrong dtype: expected torch.float64, got {a.V.dtype}")
    if a.V.shape != (*groups, m, m):
        raise ValueError(f"V must have shape {(*groups, m, m)}, got {tuple(a.V.shape)}")
    positive("gamma", a.gamma)
    in_interval("forgetting", a.forgetting, 0, 1, open_low=True)


def reference(a: Any) -> tuple[Tensor, ...]:
    V, *gains = definition.ridge_gain(*a[:5])
    return V, *(t.contiguous() for t in gains)


def compiled(a: Any) -> tuple[Tensor, ...]:
    R, w, V, gamma, forgetting, _ = a
    if R.dtype != torch.float32 or R.ndim < 2:
        return op.on("reference", a)  # type: ignore[no-any-return]
    *groups, n, m = R.shape
    new = R.new_empty
    # not outputs(): C says that V does not fit before it would be read
    out = V.new_empty(*groups, m, m), new(*groups, n, m), new(*groups, m, m), new(*groups, n, m)
    scratch = V.new_empty(*groups, 3 * n + 2 * m, m)
    _op.C.ridge_gain(R.contiguous(), w.float().contiguous(), V.contiguous(), *out, scratch, gamma, forgetting)
    return out


def cpp(a: Any) -> tuple[Tensor, ...]:
    # above 256, LAPACK is faster
    return compiled(a) if a.R.ndim == 2 and a.R.shape[1] <= 256 else op.on("reference", a)


def triton(a: Any) -> tuple[Tensor, ...]:
    V, *gains = kernels().ridge_gain(*a[:5])
    return V, *(t.contiguous() for t in gains)


op = Op(SCHEMA, outputs, {"reference": reference, "cpp": cpp, "triton": triton, "cuda": compiled}, check)
