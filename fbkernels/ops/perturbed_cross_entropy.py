"""Per-sample cross-entropies and what a perturbation of the logits did (SPEC 2)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fbkernels import reference as definition
from fbkernels.ops import _op
from fbkernels.ops._op import Op, kernels


def perturbed_cross_entropy(
    logits: Tensor,
    perturbed: Tensor | None,
    target: Tensor,
    antithetic: bool = False,
    *,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> PerturbedCrossEntropy:
    """Per-sample cross-entropies, ``e = softmax(y) - onehot``, and what a perturbation of the logits did to loss and output (SPEC 2).

    ``dL = L(y~) - L(y)``, antithetic ``(L(y+) - L(y-)) / 2``; ``dy`` the same of the logits. Backend "triton" does it in one launch in
    float32, with ``d = y~ - y``, ``s = softmax(y)`` and target t as ``dL = log1p(sum_k s_k expm1(d_k - d_t))``, which keeps its digits
    where the two losses agree in theirs; "cpp" and "reference" in float64 from the definition.

    Args:
        logits: y, [N, K].
        perturbed: y~ of the first samples, [rows, K], or +xi then -xi, [2 rows, K]; None: none, rows = N and dL = dy = 0. With "cpp" it
            may be float64 beside float32 logits.
        target: class indices, int64 [N]; -100 is ignored: loss, e and dL are 0.
        antithetic: whether ``perturbed`` holds both signs.
        scale: 0-dim, of losses, e and dL: what makes a mean of them the mean over the targets that count.

    Returns:
        losses [N], e [N, K], dL [rows], dy [rows, K] in float32 (float64 of float64), and ok [rows], bool: whether all of the sample is
        finite. Where not, dL and dy are 0.

    Raises:
        ValueError: naming the argument and what was expected. IndexError: a target is no class; with backend "triton", where a look
            would synchronise, its loss and e are NaN instead. RuntimeError: the backend cannot be had.
    """
    return PerturbedCrossEntropy(*op(logits, perturbed, target, antithetic, scale=scale, backend=backend))


class PerturbedCrossEntropy(NamedTuple):
    """What :func:`perturbed_cross_entropy` returns."""

    losses: Tensor
    e: Tensor
    dL: Tensor
    dy: Tensor
    ok: Tensor


SCHEMA = (
    "perturbed_cross_entropy(Tensor logits, Tensor? perturbed, Tensor target, bool antithetic, *, Tensor? scale=None, "
    'str backend="auto") -> (Tensor, Tensor, Tensor, Tensor, Tensor)'
)


def outputs(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    samples, K = a.logits.shape
    rows = samples if a.perturbed is None else a.perturbed.shape[0] // (1 + a.antithetic)
    new = functools.partial(a.logits.new_empty, dtype=torch.promote_types(a.logits.dtype, torch.float32))
    return new(samples), new(samples, K), new(rows), new(rows, K), a.logits.new_empty(rows, dtype=torch.bool)


def check(a: Any) -> None:
    logits, perturbed, target, antithetic, scale, _ = a
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"logits must be [samples, classes], got shape {tuple(logits.shape)}")
    samples, K = logits.shape
    if target.dtype != torch.int64 or target.shape != (samples,):
        raise ValueError(f"target must be int64 of shape ({samples},), got {target.dtype} of shape {tuple(target.shape)}")
    if perturbed is None and antithetic:
        raise ValueError("perturbed must be given where antithetic is True, got None")
    parts = 1 + antithetic
    if perturbed is not None and (
        perturbed.ndim != 2 or perturbed.shape[1] != K or len(perturbed) % parts or len(perturbed) > parts * samples
    ):
        rows = f"an even number up to {2 * samples}" if antithetic else f"up to {samples}"
        raise ValueError(f"perturbed must be [rows, {K}], rows {rows}, got shape {tuple(perturbed.shape)}")
    if scale is not None and scale.ndim:
        raise ValueError(f"scale must be 0-dim, got shape {tuple(scale.shape)}")


def reference(a: Any) -> tuple[Tensor, ...]:
    *exact, ok = definition.perturbed_cross_entropy(*a[:5])
    return *(t.to(torch.promote_types(a.logits.dtype, torch.float32)) for t in exact), ok


def cpp(a: Any) -> tuple[Tensor, ...]:
    check(a)
    out, scale = outputs(a), 1.0 if a.scale is None else float(a.scale)
    y, p = (t if t is None else t.to(torch.float64).contiguous() for t in (a.logits, a.perturbed))
    _op.C.perturbed_cross_entropy(y, p, a.target.contiguous(), a.antithetic, scale, *out, torch.get_num_threads())
    return out


def triton(a: Any) -> tuple[Tensor, ...]:
    scale = None if a.scale is None else a.scale.float()
    return kernels().perturbed_cross_entropy(*a[:4], scale)  # type: ignore[no-any-return]


op = Op(SCHEMA, outputs, {"reference": reference, "cpp": cpp, "triton": triton}, check)
