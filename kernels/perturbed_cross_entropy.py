"""The cross-entropy of both streams in one launch, the loss change without cancellation."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fbkernels.ops import tuning


@triton.jit
def expm1(x):
    # the first omitted term of the series at 1/2 is 1e-8 of the sum
    p = x * 2.48015873015873e-05 + 1.98412698412698e-04
    p = x * p + 1.38888888888889e-03
    p = x * p + 8.33333333333333e-03
    p = x * p + 4.16666666666667e-02
    p = x * p + 1.66666666666667e-01
    p = x * p + 0.5
    p = x * (x * p) + x
    return tl.where(tl.abs(x) < 0.5, p, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    # Kahan: the rounding of u = 1 + x cancels between log u and u - 1
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def cross_entropy(b_y, m_t):
    """Of logits [BK], -inf beyond K: softmax, the sum of it over all but the target, where m_t is true, and the loss."""
    top = tl.max(b_y, 0)
    gap = top - tl.sum(tl.where(m_t, b_y, 0.0), 0)
    b_s = tl.exp(b_y - top)
    z = tl.sum(b_s, 0)
    others = tl.sum(tl.where(m_t, 0.0, b_s), 0)
    # where the target is the top, 1 + others would swallow a small loss
    return b_s / z, others / z, tl.where(gap == 0.0, log1p(others), tl.log(z) + gap)


@triton.jit
def loss_change(b_y, b_p, b_s, loss, m_k, m_t):
    """L(p) - L(y) = log sum_k s_k exp(x_k), x_k = (p - y)_k - (p - y)_t."""
    b_d = b_p - b_y
    b_x = tl.where(m_k, b_d - tl.sum(tl.where(m_t, b_d, 0.0), 0), 0.0)
    less = tl.sum(b_s * expm1(b_x), 0)
    small = tl.where(less > -0.5, log1p(less), tl.log(tl.sum(b_s * tl.exp(b_x), 0)))
    # where exp would overflow, the difference is no small one of the losses
    _, _, moved = cross_entropy(tl.where(m_k, b_p, -float("inf")), m_t)
    return tl.where(tl.max(tl.abs(b_x), 0) > 64.0, moved - loss, small)


@triton.jit
def perturbed_cross_entropy_kernel(
    logits,  # [samples, K]
    perturbed,  # [rows, K], antithetic [2 rows, K]
    target,  # [samples] int64
    scale,  # float32, of losses, e and dL
    losses,  # [samples]
    e,  # [samples, K]
    dL,  # [rows]
    dy,  # [rows, K]
    ok,  # [rows] bool
    rows,
    K,
    PERTURBED: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    SCALED: tl.constexpr,
    BK: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    m_p = o_k < tl.where(i_n < rows, K, 0)  # a scalar in & is no mask to the interpreter of Triton 3.9
    t = tl.load(target + i_n)
    ignored = t == -100
    keep = tl.where(ignored, 0.0, 1.0)
    if SCALED:
        keep *= tl.load(scale)
    # no class: nothing is read there, and the loss is NaN
    keep = tl.where(ignored | ((t >= 0) & (t < K)), keep, float("nan"))
    m_t = o_k == t

    b_y = tl.load(logits + i_n * K + o_k, mask=m_k, other=-float("inf")).to(tl.float32)  # [BK]
    b_s, others, loss = cross_entropy(b_y, m_t)
    b_e = tl.where(m_t, -others, b_s) * keep
    clean = tl.where(ignored, 0.0, loss) * keep
    tl.store(losses + i_n, clean)
    tl.store(e + i_n * K + o_k, b_e, mask=m_k)

    change = 0.0
    b_dy = tl.zeros([BK], tl.float32)
    if PERTURBED:
        b_p = tl.load(perturbed + i_n * K + o_k, mask=m_p, other=0.0).to(tl.float32)  # [BK]
        change = loss_change(b_y, b_p, b_s, loss, m_k, m_t)
        b_dy = b_p - b_y
        if ANTITHETIC:
            b_m = tl.load(perturbed + (i_n + rows) * K + o_k, mask=m_p, other=0.0).to(tl.float32)  # [BK]
            change = (change - loss_change(b_y, b_m, b_s, loss, m_k, m_t)) / 2
            b_dy = (b_p - b_m) / 2
        change *= keep
    good = finite(clean) & finite(change) & (tl.min((~m_k | (finite(b_e) & finite(b_dy))).to(tl.int32), 0) != 0)
    tl.store(dL + i_n, tl.where(good, change, 0.0), mask=i_n < rows)
    tl.store(dy + i_n * K + o_k, tl.where(good, b_dy, 0.0), mask=m_p)
    tl.store(ok + i_n, good, mask=i_n < rows)


@tuning.on_device
def perturbed_cross_entropy(
    logits: Tensor, perturbed: Tensor | None, target: Tensor, antithetic: bool, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, e, dL, dy and ok of ``fbkernels.reference.perturbed_cross_entropy``, in float32."""
    samples, K = logits.shape
    rows = samples if perturbed is None else len(perturbed) // (1 + antithetic)
    new = functools.partial(logits.new_empty, dtype=torch.float32)
    out = new(samples), new(samples, K), new(rows), new(rows, K), logits.new_empty(rows, dtype=torch.bool)
    BK = triton.next_power_of_2(K)
    if samples:
        perturbed_cross_entropy_kernel[(samples,)](
            logits.contiguous(),
            None if perturbed is None else perturbed.contiguous(),
            target.contiguous(),
            scale,
            *out,
            rows,
            K,
            PERTURBED=perturbed is not None,
            ANTITHETIC=antithetic,
            SCALED=scale is not None,
            BK=BK,
            num_warps=min(max(BK // 256, 1), 16),
        )
    return out
