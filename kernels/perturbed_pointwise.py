"""What follows a library's convolution in one launch: scale, bias, phi, pooling, noise, of activity and difference, and the update of B."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fbkernels.kernels.activation import phi
from fbkernels.kernels.feedback_update import Plan, update_tile
from fbkernels.kernels.noise import shared, store_difference
from fbkernels.ops import tuning


@triton.jit
def pool_in(best, b_z, inside, POOL: tl.constexpr, INNER: tl.constexpr, ACTIVATION: tl.constexpr):
    # one more place of the windows
    value = phi(b_z, ACTIVATION) if INNER else b_z
    if POOL == "avg":
        best += tl.where(inside, value, 0.0)
    else:
        best = tl.where(inside & ((value > best) | (value != value)), value, best)
    return best


@triton.jit
def behind(best, POOL: tl.constexpr, INNER: tl.constexpr, ACTIVATION: tl.constexpr, PLACES: tl.constexpr):
    if POOL == "avg":
        best = best / PLACES
    return best if INNER else phi(best, ACTIVATION)


@triton.jit
def pointwise_tile(
    i_t,
    z,  # [samples, height, width, channels]
    dz,  # [rows, height, width, channels], with ANTITHETIC [2 rows, ...]
    scale,  # [channels]
    bias,  # [channels]
    h,  # [samples, out_height, out_width, channels]
    d,  # [rows, out_height, out_width, channels], with ANTITHETIC [2 rows, ...]
    kept,  # like h
    winner,  # like h
    step,
    seed,
    point,
    std,
    offset,
    samples,
    rows,
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
    POOL: tl.constexpr,
    POOL_FIRST: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KIND: tl.constexpr,
    SHARED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """BM positions by BN channels behind the pooling, of the first samples the differences too."""
    size = out_height * out_width
    columns = tl.cdiv(channels, BN)
    i_m, i_n = i_t // columns, i_t % columns
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < channels
    mask = (o_m < samples * size)[:, None] & m_n[None, :]
    sample, position = o_m // size, o_m % size
    top, left = position // out_width * stride_y - padding_y, position % out_width * stride_x - padding_x
    o_z = (sample.to(tl.int64) * height * width * channels)[:, None] + o_n[None, :]  # [BM, BN]
    mirror = tl.cast(rows, tl.int64) * height * width * channels
    if scale is not None:
        b_scale = tl.load(scale + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        b_bias = tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]

    MONOTONE: tl.constexpr = ACTIVATION != "gelu"  # else the maximum of phi(z) need not be phi of the maximum of z
    INNER: tl.constexpr = not POOL_FIRST and (POOL == "avg" or (POOL == "max" and not MONOTONE))
    best = tl.full([BM, BN], 0.0 if POOL == "avg" else -float("inf"), tl.float32)
    plus = best
    minus = best
    won = tl.zeros([BM, BN], tl.float32)
    place = tl.full([BM, BN], -1, tl.int32)
    for k in range(0, KH * KW):
        y, x = top + k // KW, left + k % KW
        inside = mask & ((y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None]
        o_k = o_z + ((y * width + x) * channels)[:, None]
        b_z = tl.load(z + o_k, mask=inside, other=0.0).to(tl.float32)
        if scale is not None:
            b_z *= b_scale
        if bias is not None:
            b_z += b_bias
        value = b_z
        if INNER:
            value = phi(b_z, ACTIVATION)
        if POOL == "avg":
            best += tl.where(inside, value, 0.0)
        else:
            # the first place that is inside, later ones if they are larger; not-a-number wins as it does in torch
            better = inside & ((place < 0) | (value > best) | (value != value))
            best = tl.where(better, value, best)
            won = tl.where(better, b_z, won)
            place = tl.where(better, k, place)
        if dz is not None:
            m_d = inside & (sample < rows)[:, None]
            b_dz = tl.load(dz + o_k, mask=m_d, other=0.0).to(tl.float32)
            plus = pool_in(plus, b_z + (b_dz if scale is None else b_dz * b_scale), inside, POOL, INNER, ACTIVATION)
            if ANTITHETIC:
                b_dz = tl.load(dz + mirror + o_k, mask=m_d, other=0.0).to(tl.float32)
                minus = pool_in(minus, b_z + (b_dz if scale is None else b_dz * b_scale), inside, POOL, INNER, ACTIVATION)
    if POOL == "avg":
        won = best / (KH * KW)
    if POOL != "avg" or POOL_FIRST:
        activity = phi(won, ACTIVATION)
    else:
        activity = won

    o_h = o_m.to(tl.int64)[:, None] * channels + o_n[None, :]
    tl.store(h + o_h, activity.to(h.dtype.element_ty), mask=mask)
    if kept is not None:
        tl.store(kept + o_h, won.to(kept.dtype.element_ty), mask=mask)
    if winner is not None:
        tl.store(winner + o_h, place.to(tl.uint8), mask=mask)
    if d is not None:
        if i_m * BM < rows * size:
            unit = (position * channels).to(tl.int64) + i_n * BN
            # fmt: off
            store_difference(
                d, None if dz is None else behind(plus, POOL, INNER, ACTIVATION, KH * KW) - activity,
                None if dz is None or not ANTITHETIC else behind(minus, POOL, INNER, ACTIVATION, KH * KW) - activity,
                sample, unit, o_h, mask, size * channels, rows, step, seed, point, std, offset, ANTITHETIC, KIND, SHARED, BN,
            )
            # fmt: on


@triton.jit(do_not_specialize=["seed", "point", "offset"])
def perturbed_pointwise_kernel(
    z,
    dz,
    scale,
    bias,
    h,
    d,
    kept,
    winner,
    step,
    seed,
    point,
    std,
    offset,
    samples,
    rows,
    height,
    width,
    channels,
    out_height,
    out_width,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    update_tiles,
    B,
    new,
    M,
    G,
    R,
    Q,
    w,
    parts,
    learned_step,
    m,
    learned_rows,
    predicted_rows,
    KH: tl.constexpr,
    KW: tl.constexpr,
    POOL: tl.constexpr,
    POOL_FIRST: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KIND: tl.constexpr,
    SHARED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SHARED_B: tl.constexpr,
    PRECISION_B: tl.constexpr,
    BU: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BL: tl.constexpr,
):
    i_t = tl.program_id(0)
    # fmt: off
    if B is not None:
        if i_t < update_tiles:
            update_tile(
                i_t, B, new, M, G, R, Q, w, parts, learned_step, step, seed, point, std, out_height * out_width * channels, m, learned_rows,
                predicted_rows, offset, KIND, SHARED_B, PRECISION_B, BU, BR, BC, BL,
            )
    if i_t >= update_tiles:
        pointwise_tile(
            i_t - update_tiles, z, dz, scale, bias, h, d, kept, winner, step, seed, point, std, offset, samples, rows, height, width,
            channels, out_height, out_width, stride_y, stride_x, padding_y, padding_x, KH, KW, POOL, POOL_FIRST, ANTITHETIC, ACTIVATION,
            KIND, SHARED, BM, BN,
        )
    # fmt: on


@tuning.on_device
def perturbed_pointwise(
    z: Tensor,
    dz: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    pool: str,
    pool_first: bool,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    step: Tensor,
    seed: int,
    point: int,
    rows: int,
    std: float,
    kind: str,
    offset: int,
    antithetic: bool,
    h: Tensor,
    d: Tensor | None,
    kept: Tensor | None,
    winner: Tensor | None,
    update: Plan,
) -> None:
    """Fill h, d, kept and winner, channels-last maps or matrices."""
    (height, width, channels), (out_height, out_width, _) = (
        (1, 1, *t.shape[1:]) if t.ndim == 2 else (*t.shape[2:], t.shape[1]) for t in (z, h)
    )
    size = out_height * out_width
    BN = min(128, max(16, triton.next_power_of_2(channels)))
    BM = (4096 if dz is None or not antithetic else 2048) // BN  # 16 numbers a thread, of differences of both signs 8
    if len(z) * size >= 2**31:
        raise ValueError(f"perturbed_pointwise takes fewer than 2^31 positions of a batch, got {len(z) * size}")
    tiles = triton.cdiv(len(z) * size, BM) * triton.cdiv(channels, BN)
    perturbed_pointwise_kernel[(update.tiles + tiles,)](
        **update.arguments,
        z=z,
        dz=dz,
        scale=scale,
        bias=bias,
        h=h,
        d=d,
        kept=kept,
        winner=winner,
        step=step,
        seed=seed,
        point=point,
        std=std,
        offset=offset,
        samples=len(z),
        rows=rows,
        height=height,
        width=width,
        channels=channels,
        out_height=out_height,
        out_width=out_width,
        stride_y=stride[0],
        stride_x=stride[1],
        padding_y=padding[0],
        padding_x=padding[1],
        update_tiles=update.tiles,
        KH=kernel_size[0],
        KW=kernel_size[1],
        POOL=pool,
        POOL_FIRST=pool_first,
        ANTITHETIC=antithetic,
        ACTIVATION=activation,
        KIND=kind,
        SHARED=shared(kind, BN, channels) if size > 1 else shared(kind, BN),
        BM=BM,
        BN=BN,
        num_warps=8,
        maxnreg=255 if update.tiles else None,  # as in perturbed_conv2d
    )
