"""A convolution up to its feedback point in one launch: activity and difference, bias, phi, noise, the update of B, the prediction Xi B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fbkernels.kernels.activation import phi
from fbkernels.kernels.feedback_update import Plan, precision, update_tile
from fbkernels.kernels.noise import shared, store_difference
from fbkernels.ops import tuning


@triton.jit
def patch(
    source,
    o_m,
    total,
    k,
    group,
    height,
    width,
    channels,
    out_height,
    out_width,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    KH: tl.constexpr,
    KW: tl.constexpr,
    GROUPS: tl.constexpr,
    FLAT: tl.constexpr,
    BK: tl.constexpr,
):
    """What the output positions ``o_m`` read of the k-th part of their patches, [BM, BK]."""
    size = out_height * out_width
    group_channels = channels // GROUPS
    sample, position = o_m // size, o_m % size
    top, left = position // out_width * stride_y - padding_y, position % out_width * stride_x - padding_x
    p_x = source + (sample.to(tl.int64) * height * width * channels)[:, None] + group * group_channels  # [BM, 1]
    if FLAT:
        o_k = k * BK + tl.arange(0, BK)
        tap, o_c = o_k // group_channels, o_k % group_channels
        y = top[:, None] + (tap // KW * dilation_y)[None, :]
        x = left[:, None] + (tap % KW * dilation_x)[None, :]
        m_k = tap < KH * KW
    else:
        blocks = tl.cdiv(group_channels, BK)
        tap = k // blocks
        o_c = k % blocks * BK + tl.arange(0, BK)
        y = (top + tap // KW * dilation_y)[:, None]
        x = (left + tap % KW * dilation_x)[:, None]
        m_k = o_c < group_channels
    inside = (o_m < total)[:, None] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return tl.load(p_x + (y * width + x) * channels + o_c[None, :], mask=inside & m_k[None, :], other=0.0)


@triton.jit
def store_activity(h, kept, z, o_m, total, o_n, m_n, outputs, ACTIVATION: tl.constexpr):
    o_h = o_m.to(tl.int64)[:, None] * outputs + o_n[None, :]
    m_h = (o_m < total)[:, None] & m_n[None, :]
    if kept is not None:
        tl.store(kept + o_h, z.to(kept.dtype.element_ty), mask=m_h)
    activity = phi(z, ACTIVATION)
    tl.store(h + o_h, activity.to(h.dtype.element_ty), mask=m_h)
    return activity


@triton.jit
def convolution_tile(
    i_t,
    x,  # [samples, height, width, channels]
    dx,  # [rows, height, width, channels], with ANTITHETIC [2 rows, ...]
    weight,  # [outputs, KH, KW, channels / GROUPS]
    bias,  # [outputs]
    h,  # [samples, out_height, out_width, outputs]
    d,  # [rows, out_height, out_width, outputs], with ANTITHETIC [2 rows, ...]
    kept,  # like h
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
    outputs,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    KH: tl.constexpr,
    KW: tl.constexpr,
    GROUPS: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KIND: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """An implicit GEMM over BM positions and BN output channels; with dx over BM positions of z and of each dz there, which read the
    weight once, or, where the samples are not perturbed, over as many more of z."""
    size = out_height * out_width
    PARTS: tl.constexpr = 1 if dx is None else (3 if ANTITHETIC else 2)
    perturbed = rows if dx is not None else samples
    perturbed_tiles = tl.cdiv(perturbed * size, BM)
    tiles = perturbed_tiles + tl.cdiv((samples - perturbed) * size, PARTS * BM)
    group_channels, group_outputs = channels // GROUPS, outputs // GROUPS
    columns = tl.cdiv(group_outputs, BN)
    # 8 tiles of rows by all columns: what they read stays in L2
    first = i_t // (8 * GROUPS * columns) * 8
    together = tl.minimum(tiles - first, 8)
    i_m, i_n = first + i_t % (8 * GROUPS * columns) % together, i_t % (8 * GROUPS * columns) // together
    group = i_n // columns
    o_n = i_n % columns * BN + tl.arange(0, BN)
    m_n = o_n < group_outputs
    o_n += group * group_outputs
    o_w = o_n.to(tl.int64) * (KH * KW * group_channels)

    differs = i_m < perturbed_tiles
    m, total, source, mirror, ahead = i_m * BM, perturbed * size, x, x, 0
    if dx is not None:
        if differs:
            source = dx
            mirror = dx + tl.cast(rows, tl.int64) * height * width * channels
        else:
            m = total + (i_m - perturbed_tiles) * PARTS * BM
            total = samples * size
            ahead = BM
    o_m = m + tl.arange(0, BM)
    acc = tl.zeros([BM, BN], tl.float32)
    plus = acc
    minus = acc
    for k in range(0, tl.cdiv(KH * KW * group_channels, BK) if FLAT else KH * KW * tl.cdiv(group_channels, BK)):
        if FLAT:  # few channels: a tile of the patch reaches over several places of the kernel
            o_k = k * BK + tl.arange(0, BK)
            m_k = o_k < KH * KW * group_channels
        else:
            blocks = tl.cdiv(group_channels, BK)
            o_c = k % blocks * BK + tl.arange(0, BK)
            m_k = o_c < group_channels
            o_k = k // blocks * group_channels + o_c
        b_w = tl.load(weight + o_w[None, :] + o_k[:, None], mask=m_n[None, :] & m_k[:, None], other=0.0)  # [BK, BN]
        # fmt: off
        b_x = patch(
            x, o_m, total, k, group, height, width, channels, out_height, out_width, stride_y, stride_x, padding_y, padding_x, dilation_y,
            dilation_x, KH, KW, GROUPS, FLAT, BK,
        )
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
        if dx is not None:
            b_x = patch(
                source, o_m + ahead, total, k, group, height, width, channels, out_height, out_width, stride_y, stride_x, padding_y,
                padding_x, dilation_y, dilation_x, KH, KW, GROUPS, FLAT, BK,
            )
            plus = tl.dot(b_x, b_w, plus, input_precision=PRECISION)
            if ANTITHETIC:
                b_x = patch(
                    mirror, o_m + 2 * ahead, total, k, group, height, width, channels, out_height, out_width, stride_y, stride_x,
                    padding_y, padding_x, dilation_y, dilation_x, KH, KW, GROUPS, FLAT, BK,
                )
                minus = tl.dot(b_x, b_w, minus, input_precision=PRECISION)
        # fmt: on

    b_bias = tl.zeros([1, BN], tl.float32)
    if bias is not None:
        b_bias = tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    acc += b_bias
    activity = store_activity(h, kept, acc, o_m, total, o_n, m_n, outputs, ACTIVATION)
    if d is not None:
        if differs & (m < rows * size):
            sample, position = o_m // size, o_m % size
            unit = (position * outputs + group * group_outputs).to(tl.int64) + i_n % columns * BN
            o_h = o_m.to(tl.int64)[:, None] * outputs + o_n[None, :]
            # fmt: off
            store_difference(
                d, None if dx is None else phi(acc + plus, ACTIVATION) - activity,
                None if dx is None or not ANTITHETIC else phi(acc + minus, ACTIVATION) - activity,
                sample, unit, o_h, (o_m < total)[:, None] & m_n[None, :], size * outputs, rows, step, seed, point, std, offset,
                ANTITHETIC, KIND, SHARED, BN,
            )
            # fmt: on
    if dx is not None:
        if not differs:
            store_activity(h, kept, plus + b_bias, o_m + BM, total, o_n, m_n, outputs, ACTIVATION)
            if ANTITHETIC:
                store_activity(h, kept, minus + b_bias, o_m + 2 * BM, total, o_n, m_n, outputs, ACTIVATION)


@triton.jit(do_not_specialize=["seed", "point", "offset"])
def perturbed_conv2d_kernel(
    x,
    dx,
    weight,
    bias,
    h,
    d,
    kept,
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
    outputs,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
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
    GROUPS: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KIND: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SHARED_B: tl.constexpr,
    PRECISION_B: tl.constexpr,
    BU: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BL: tl.constexpr,
):
    # B's tiles first: they are bound by latency and memory, and run beside those of the convolution
    i_t = tl.program_id(0)
    # fmt: off
    if B is not None:
        if i_t < update_tiles:
            update_tile(
                i_t, B, new, M, G, R, Q, w, parts, learned_step, step, seed, point, std, out_height * out_width * outputs, m, learned_rows,
                predicted_rows, offset, KIND, SHARED_B, PRECISION_B, BU, BR, BC, BL,
            )
    if i_t >= update_tiles:
        convolution_tile(
            i_t - update_tiles, x, dx, weight, bias, h, d, kept, step, seed, point, std, offset, samples, rows, height, width,
            channels, out_height, out_width, outputs, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, KH, KW, GROUPS,
            ANTITHETIC, ACTIVATION, KIND, SHARED, PRECISION, FLAT, BM, BN, BK,
        )
    # fmt: on


def configurations(dtype: torch.dtype, parts: int) -> list[dict[str, int]]:
    """Tiles that neither spill nor exceed the shared memory beside those of B's update (tests/ops/test_aot.py), the default first.

    parts: tiles of BM rows that a program has, 1 without dx, 2 with it, 3 with both signs.
    """
    hopper = tuning.capability() >= 90
    if dtype != torch.float32:
        # 128 x 128 numbers spill: their noise and phi beside their sums; wgmma wants 64 rows
        sizes = {1: [(128, 64), (64, 128)], 2: [(64, 64), (64, 128)], 3: [(64, 64), (64, 32)] if hopper else [(32, 128), (64, 32)]}
        tiles = [(*size, 64 if hopper else 32, 8, 4) for size in sizes[parts]]
    elif precision() == "tf32":
        sizes = {1: [(128, 64), (64, 64)], 2: [(64, 64), (64, 32)], 3: [(64, 64), (64, 32)] if hopper else [(64, 32), (32, 64)]}
        tiles = [(*size, 32, 8, 4) for size in sizes[parts]]
    else:
        tiles = [(64, 64, 16, 8, 3) if parts < 3 else (32, 32, 16, 8, 3)]
    names = ("BM", "BN", "BK", "num_warps", "num_stages")
    return [dict(zip(names, tile, strict=True)) for tile in tiles]


@tuning.on_device
def perturbed_conv2d(
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
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
    update: Plan,
    configuration: dict[str, int],
) -> None:
    """Fill h, d and kept, channels-last maps or, of a linear layer, matrices."""
    sizes = [(1, 1, *t.shape[1:]) if t.ndim == 2 else (*t.shape[2:], t.shape[1]) for t in (x, h)]
    (height, width, channels), (out_height, out_width, outputs) = sizes
    kernel = weight.shape[2:] or (1, 1)
    size, tile = out_height * out_width, configuration
    if len(x) * size >= 2**31:
        raise ValueError(f"perturbed_conv2d takes fewer than 2^31 positions of a batch, got {len(x) * size}")
    perturbed, parts = (len(x), 1) if dx is None else (rows, 2 + antithetic)
    tiles = triton.cdiv(perturbed * size, tile["BM"]) + triton.cdiv((len(x) - perturbed) * size, parts * tile["BM"])
    grid = tiles * groups * triton.cdiv(outputs // groups, tile["BN"])
    aligned = (tile["BN"], outputs // groups, outputs) if size > 1 or groups > 1 else (tile["BN"],)
    arguments: dict[str, Any] = update.arguments | {
        "x": x,
        "dx": dx,
        "weight": weight,
        "bias": bias,
        "h": h,
        "d": d,
        "kept": kept,
        "step": step,
        "seed": seed,
        "point": point,
        "std": std,
        "offset": offset,
        "samples": len(x),
        "rows": rows,
        "height": height,
        "width": width,
        "channels": channels,
        "out_height": out_height,
        "out_width": out_width,
        "outputs": outputs,
    }
    for name, pair in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        arguments |= {f"{name}_y": pair[0], f"{name}_x": pair[1]}
    perturbed_conv2d_kernel[(update.tiles + grid,)](
        **arguments,
        update_tiles=update.tiles,
        KH=kernel[0],
        KW=kernel[1],
        GROUPS=groups,
        ANTITHETIC=antithetic,
        ACTIVATION=activation,
        KIND=kind,
        SHARED=shared(kind, *aligned),
        PRECISION="tf32" if precision() == "tf32" else "ieee",
        FLAT=channels // groups < tile["BK"] and kernel[0] * kernel[1] > 1,
        **tile,
        # else ptxas spills a few for the sake of a second program on the SM, which the others fit without
        maxnreg=255 if update.tiles or (x.dtype == torch.float32 and (dx is not None or precision() == "tf32")) else None,
    )
