"""delta = (e B^T) * phi' at the winners of a max-pooling: the error of a layer's units before their activation, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fbkernels.kernels.activation import derivative
from fbkernels.kernels.feedback_update import precision
from fbkernels.ops import tuning


@triton.jit
def feedback_kernel(
    e,  # [samples, m]
    B,  # [units, m]
    kept,  # [samples, out_height, out_width, channels]
    winner,  # like kept
    delta,  # [samples, height, width, channels]
    samples,
    m,
    height,
    width,
    channels,
    out_height,
    out_width,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One place of the map, BM samples by BN channels: the windows that it can have won are few, so they are gathered."""
    columns = tl.cdiv(channels, BN)
    i_p, i_n, i_m = tl.program_id(0) // columns, tl.program_id(0) % columns, tl.program_id(1)
    y, x = i_p // width, i_p % width
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_m, m_n = o_m < samples, o_n < channels
    mask = m_m[:, None] & m_n[None, :]
    p_e = e + i_m.to(tl.int64) * BM * m + tl.arange(0, BM)[:, None] * m
    acc = tl.zeros([BM, BN], tl.float32)
    # window w covers w * stride - padding to w * stride - padding + kernel - 1
    first_y, first_x = tl.maximum(y + padding_y - KH + stride_y, 0) // stride_y, tl.maximum(x + padding_x - KW + stride_x, 0) // stride_x
    last_y, last_x = tl.minimum((y + padding_y) // stride_y, out_height - 1), tl.minimum((x + padding_x) // stride_x, out_width - 1)
    for wy in range(first_y, last_y + 1):
        for wx in range(first_x, last_x + 1):
            unit = (wy * out_width + wx) * channels
            o_h = o_m.to(tl.int64)[:, None] * (out_height * out_width * channels) + unit + o_n[None, :]
            p_B = B + (unit + i_n * BN).to(tl.int64) * m + tl.arange(0, BN)[None, :] * m
            product = tl.zeros([BM, BN], tl.float32)
            for k in range(0, m, BK):
                o_k = k + tl.arange(0, BK)
                b_e = tl.load(p_e + o_k[None, :], mask=m_m[:, None] & (o_k < m)[None, :], other=0.0)
                b_B = tl.load(p_B + o_k[:, None], mask=m_n[None, :] & (o_k < m)[:, None], other=0.0)
                product = tl.dot(b_e, b_B, product, input_precision=PRECISION)
            if kept is not None:
                product *= derivative(tl.load(kept + o_h, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
            if winner is not None:
                place = (y - wy * stride_y + padding_y) * KW + x - wx * stride_x + padding_x
                product = tl.where(tl.load(winner + o_h, mask=mask, other=255).to(tl.int32) == place, product, 0.0)
            acc += product
    o_d = o_m.to(tl.int64)[:, None] * (height * width * channels) + i_p.to(tl.int64) * channels + o_n[None, :]
    tl.store(delta + o_d, acc.to(delta.dtype.element_ty), mask=mask)


@tuning.on_device
def feedback(
    e: Tensor,
    B: Tensor,
    kept: Tensor | None,
    winner: Tensor | None,
    activation: str,
    delta: Tensor,
    kernel_size: Sequence[int] = (1, 1),
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
) -> None:
    """Fill delta, a channels-last map or a matrix: behind a max-pooling with ``winner`` before it."""
    behind = delta if winner is None else winner
    (height, width, channels), (out_height, out_width, _) = (
        (1, 1, *t.shape[1:]) if t.ndim == 2 else (*t.shape[2:], t.shape[1]) for t in (delta, behind)
    )
    m = B.shape[1]
    # many samples to a read of B; at 64 channels by 128 samples gelu spills on sm_80, and tf32x3 at BK = 32 (tests/ops/test_aot.py)
    BM, BN, BK = 128, min(32, max(16, triton.next_power_of_2(channels))), 16
    grid = (height * width * triton.cdiv(channels, BN), triton.cdiv(len(delta), BM))  # the second dimension ends at 65,535
    # what is rounded to 8 or 11 bits needs no more than tf32's 11
    exact = delta.dtype == torch.float32
    feedback_kernel[grid](
        e,
        B,
        kept,
        winner,
        delta,
        len(delta),
        m,
        height,
        width,
        channels,
        out_height,
        out_width,
        *stride,
        *padding,
        KH=kernel_size[0],
        KW=kernel_size[1],
        ACTIVATION=activation,
        PRECISION=precision() if exact else "tf32",
        BM=BM,
        BN=BN,
        BK=BK,
        num_warps=8,
        num_stages=2,
        maxnreg=255,  # else ptxas spills a few for the sake of occupancy
    )
