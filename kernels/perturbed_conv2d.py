"""A convolution up to its feedback point in one launch: both streams, bias, phi, noise, the update of B, the prediction Xi B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fbkernels.kernels.activation import phi
from fbkernels.kernels.feedback_update import Plan, precision, update_tile
from fbkernels.kernels.noise import shared, store_perturbed
from fbkernels.ops import tuning


@triton.jit
def convolution_tile(
    i_t,
    x,  # [samples, height, width, channels]
    p,  # [perturbed_rows, height, width, channels]
    weight,  # [outputs, KH, KW, channels / GROUPS]
    bias,  # [outputs]
    h,  # [samples, out_height, out_width, outputs]
    perturbed,  # [perturbed_rows, out_height, out_width, outputs]
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
    """An implicit GEMM over BM positions of one stream and BN output channels. Tiles of both streams run side by side, so that the
    second finds the weight in L2; the matrix instructions read as much as those of a tile twice as high for both."""
    size = out_height * out_width
    clean_tiles = tl.cdiv(samples * size, BM)
    tiles = clean_tiles
    if p is not None:
        perturbed_rows = 2 * rows if ANTITHETIC else rows
        tiles += tl.cdiv(perturbed_rows * size, BM)
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

    clean = i_m < clean_tiles
    source, total = x, samples * size
    if p is not None:
        if not clean:
            i_m -= clean_tiles
            source = p
            total = perturbed_rows * size
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < total
    sample, position = o_m // size, o_m % size
    top, left = position // out_width * stride_y - padding_y, position % out_width * stride_x - padding_x
    p_x = source + (sample.to(tl.int64) * height * width * channels)[:, None] + group * group_channels  # [BM, 1]
    o_w = o_n.to(tl.int64) * (KH * KW * group_channels)

    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, tl.cdiv(KH * KW * group_channels, BK) if FLAT else KH * KW * tl.cdiv(group_channels, BK)):
        if FLAT:  # few channels: a tile of the patch reaches over several places of the kernel
            o_k = k * BK + tl.arange(0, BK)
            tap, o_c = o_k // group_channels, o_k % group_channels
            y = top[:, None] + (tap // KW * dilation_y)[None, :]
            x_ = left[:, None] + (tap % KW * dilation_x)[None, :]
            m_k = tap < KH * KW
        else:
            blocks = tl.cdiv(group_channels, BK)
            tap = k // blocks
            o_c = k % blocks * BK + tl.arange(0, BK)
            y = (top + tap // KW * dilation_y)[:, None]
            x_ = (left + tap % KW * dilation_x)[:, None]
            m_k = o_c < group_channels
            o_k = tap * group_channels + o_c
        inside = m_m[:, None] & (y >= 0) & (y < height) & (x_ >= 0) & (x_ < width)
        b_x = tl.load(p_x + (y * width + x_) * channels + o_c[None, :], mask=inside & m_k[None, :], other=0.0)  # [BM, BK]
        b_w = tl.load(weight + o_w[None, :] + o_k[:, None], mask=m_n[None, :] & m_k[:, None], other=0.0)  # [BK, BN]
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)

    if bias is not None:
        acc += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_h = o_m.to(tl.int64)[:, None] * outputs + o_n[None, :]
    m_h = m_m[:, None] & m_n[None, :]
    if kept is not None:
        if clean:
            tl.store(kept + o_h, acc.to(kept.dtype.element_ty), mask=m_h)
    acc = phi(acc, ACTIVATION)
    if clean:
        tl.store(h + o_h, acc.to(h.dtype.element_ty), mask=m_h)
    if perturbed is not None:
        unit = (position * outputs + group * group_outputs).to(tl.int64) + i_n % columns * BN
        # fmt: off
        store_perturbed(
            perturbed, acc, clean, sample, unit, o_h, m_h, size * outputs, rows, step, seed, point, std, offset, p is None, ANTITHETIC,
            KIND, SHARED, BN,
        )
        # fmt: on


@triton.jit(do_not_specialize=["seed", "point", "offset"])
def perturbed_conv2d_kernel(
    x,
    p,
    weight,
    bias,
    h,
    perturbed,
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
            i_t - update_tiles, x, p, weight, bias, h, perturbed, kept, step, seed, point, std, offset, samples, rows, height, width,
            channels, out_height, out_width, outputs, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, KH, KW, GROUPS,
            ANTITHETIC, ACTIVATION, KIND, SHARED, PRECISION, FLAT, BM, BN, BK,
        )
    # fmt: on


def configurations(dtype: torch.dtype) -> list[dict[str, int]]:
    """Tiles that neither spill nor exceed the shared memory beside those of B's update (tests/ops/test_aot.py), the default first."""
    if dtype != torch.float32:
        # 128 x 128 spills: its noise and phi beside its sums
        BK = 64 if tuning.capability() >= 90 else 32
        tiles = [(128, 64, BK, 8, 4), (64, 128, BK, 8, 4)]
    else:
        tiles = [(128, 64, 32, 8, 4), (64, 64, 32, 8, 4)] if precision() == "tf32" else [(64, 64, 16, 8, 3)]
    names = ("BM", "BN", "BK", "num_warps", "num_stages")
    return [dict(zip(names, tile, strict=True)) for tile in tiles]


@tuning.on_device
def perturbed_conv2d(
    x: Tensor,
    p: Tensor | None,
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
    perturbed: Tensor | None,
    kept: Tensor | None,
    update: Plan,
    configuration: dict[str, int],
) -> None:
    """Fill h, perturbed and kept, channels-last maps or, of a linear layer, matrices."""
    sizes = [(1, 1, *t.shape[1:]) if t.ndim == 2 else (*t.shape[2:], t.shape[1]) for t in (x, h)]
    (height, width, channels), (out_height, out_width, outputs) = sizes
    kernel = weight.shape[2:] or (1, 1)
    size, tile = out_height * out_width, configuration
    streams = [len(x), 0 if p is None else len(p)]
    if max(streams) * size >= 2**31:
        raise ValueError(f"perturbed_conv2d takes fewer than 2^31 positions of a batch, got {max(streams) * size}")
    grid = sum(triton.cdiv(n * size, tile["BM"]) for n in streams) * groups * triton.cdiv(outputs // groups, tile["BN"])
    aligned = (tile["BN"], outputs // groups, outputs) if size > 1 or groups > 1 else (tile["BN"],)
    arguments: dict[str, Any] = update.arguments | {
        "x": x,
        "p": p,
        "weight": weight,
        "bias": bias,
        "h": h,
        "perturbed": perturbed,
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
        maxnreg=255 if update.tiles or (x.dtype == torch.float32 and precision() == "tf32") else None,
    )
