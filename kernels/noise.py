"""The noise of SPEC 6, made in registers wherever it is used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fbkernels.ops import tuning


@triton.jit
def box_muller(a, b, std):
    # std * sqrt(-2 ln u) * (cos, sin)(2 pi v), u = (a + 1) / 2^24, v = b / 2^24; the polynomials are those of csrc/noise.h.
    # tl.log and tl.cos cost twice the instructions, and lg2.approx has no digits of ln u near u = 1
    bits = ((a + 1).to(tl.float32) * 5.9604644775390625e-08).to(tl.int32, bitcast=True)
    e = bits - 0x3F3504F3
    f = (bits - (e & -0x800000)).to(tl.float32, bitcast=True) - 1.0
    log = f * 0.08734836429357529 - 0.14307518303394318
    log = f * log + 0.14917974174022675
    log = f * log - 0.16570508480072021
    log = f * log + 0.19962072372436523
    log = f * log - 0.25001755356788635
    log = f * log + 0.33333951234817505
    log = f * log - 0.49999991059303284
    log = (e >> 23).to(tl.float32) * 0.6931471824645996 + (f * f * log + f)
    radius = std * tl.sqrt(-2.0 * log)
    quarter = (b + 0x200000) >> 22
    t = (b - (quarter << 22)).to(tl.float32) * 2.384185791015625e-07
    s = t * t
    sin = s * -0.00460165785625577 + 0.07968003302812576
    sin = s * sin - 0.6459634900093079
    sin = t * (s * sin + 1.5707963705062866)
    cos = s * 0.0009033629903569818 - 0.020859936252236366
    cos = s * cos + 0.2536691725254059
    cos = s * cos - 1.2337005138397217
    cos = s * cos + 1.0
    even = (quarter & 1) == 0
    x = tl.where(even, cos, sin).to(tl.int32, bitcast=True) ^ (((quarter + 1) & 2) << 30)
    y = tl.where(even, sin, cos).to(tl.int32, bitcast=True) ^ ((quarter & 2) << 30)
    return radius * x.to(tl.float32, bitcast=True), radius * y.to(tl.float32, bitcast=True)


@triton.jit
def philox(index, step, point, seed):
    # Philox4x32-10 of counters (low, high of index, step, point)
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, high, zero + step.to(tl.uint32), zero + point.to(tl.uint32))


@triton.jit
def interleave4(w0, w1, w2, w3):
    # [R, C] each -> [R, 4 C], a column of each in turn
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def noise_tile(sample, first, step, seed, point, std, units, KIND: tl.constexpr, SHARED: tl.constexpr, BU: tl.constexpr):
    """Noise of ``BU`` consecutive units from ``first`` [R] of each ``sample`` [R] (int64): float32 [R, BU].

    ``SHARED`` consecutive units have one evaluation of Philox: 4, or for Rademacher noise 128, where ``first`` and BU are multiples of
    it; else 1.
    """
    GAUSSIAN: tl.constexpr = KIND == "gaussian"
    STRIDE: tl.constexpr = 4 if GAUSSIAN else 128  # units that share a counter
    base = sample * ((units + STRIDE - 1) // STRIDE)
    if SHARED == 1:
        u = first[:, None] + tl.arange(0, BU)[None, :]
        w0, w1, w2, w3 = philox(base[:, None] + u // STRIDE, step, point, seed)
        even = (u & 1) == 0
        early = (u & 2) == 0
        if GAUSSIAN:
            x, y = box_muller((tl.where(early, w0, w2) >> 8).to(tl.int32), (tl.where(early, w1, w3) >> 8).to(tl.int32), std)
            xi = tl.where(even, x, y)
        else:
            word = tl.where(early, tl.where(even, w0, w1), tl.where(even, w2, w3))
            xi = tl.where((word >> (u // 4 % 32).to(tl.uint32)) & 1 == 0, std, -std)
    else:
        quad = first[:, None] // SHARED + tl.arange(0, BU // SHARED)[None, :]
        w0, w1, w2, w3 = philox(base[:, None] + quad * SHARED // STRIDE, step, point, seed)
        if GAUSSIAN:
            x0, y0 = box_muller((w0 >> 8).to(tl.int32), (w1 >> 8).to(tl.int32), std)
            x1, y1 = box_muller((w2 >> 8).to(tl.int32), (w3 >> 8).to(tl.int32), std)
            xi = interleave4(x0, y0, x1, y1)
        elif SHARED == 4:
            bit = (quad % 32).to(tl.uint32)
            xi = tl.where(interleave4(w0 >> bit, w1 >> bit, w2 >> bit, w3 >> bit) & 1 == 0, std, -std)
        else:
            # [R, BU / 128, 4 words] -> [R, BU / 128, 32 bits, 4 words]
            word = tl.reshape(interleave4(w0, w1, w2, w3), (sample.shape[0], BU // 128, 1, 4))
            bit = tl.reshape(tl.arange(0, 32), (1, 1, 32, 1)).to(tl.uint32)
            xi = tl.reshape(tl.where((word >> bit) & 1 == 0, std, -std), (sample.shape[0], BU))
    return xi


@triton.jit
def store_difference(
    d,  # [rows, units], with ANTITHETIC [2 rows, units]
    plus,  # [BM, BN] how much the activity of a tile changes without the noise of its point; None: not at all
    minus,  # with ANTITHETIC the same under -xi
    sample,
    unit,
    o_h,
    m_h,
    units,
    rows,
    step,
    seed,
    point,
    std,
    offset,
    ANTITHETIC: tl.constexpr,
    KIND: tl.constexpr,
    SHARED: tl.constexpr,
    BN: tl.constexpr,
):
    """The differences of a tile, with their noise."""
    dtype = d.dtype.element_ty
    xi = noise_tile(sample.to(tl.int64) + offset, unit, tl.load(step), seed, point, std, units, KIND, SHARED, BN)
    m_d = m_h & (sample < rows)[:, None]
    tl.store(d + o_h, (xi if plus is None else plus + xi).to(dtype), mask=m_d)
    if ANTITHETIC:
        tl.store(d + tl.cast(rows, tl.int64) * units + o_h, (-xi if minus is None else minus - xi).to(dtype), mask=m_d)


@triton.jit(do_not_specialize=["seed", "point", "offset"])
def noise_kernel(
    out,  # [samples, units]
    step,  # int64, on the device, so that a CUDA graph can advance it
    seed,
    point,
    std,
    samples,
    units,
    offset,
    KIND: tl.constexpr,
    SHARED: tl.constexpr,
    BN: tl.constexpr,
    BU: tl.constexpr,
):
    i_n, i_u = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    o_u = i_u * BU + tl.arange(0, BU)
    first = tl.zeros_like(o_n) + i_u * BU
    xi = noise_tile(o_n + offset, first, tl.load(step), seed, point, std, units, KIND, SHARED, BU)
    tl.store(out + o_n[:, None] * units + o_u[None, :], xi, mask=(o_n < samples)[:, None] & (o_u < units)[None, :])


@tuning.on_device
def noise(out: torch.Tensor, step: torch.Tensor, seed: int, point: int, std: float, kind: str, offset: int) -> None:
    """Fill ``out`` [samples, units] with the noise of the samples from ``offset`` on."""
    samples, units = out.shape
    BN, BU = 16, 128
    grid = (triton.cdiv(samples, BN), triton.cdiv(units, BU))  # the second dimension of a grid ends at 65,535
    if out.numel():
        noise_kernel[grid](
            out, step, seed, point, std, samples, units, offset, KIND=kind, SHARED=shared(kind, BU), BN=BN, BU=BU, num_warps=4
        )


def shared(kind: str, *multiples: int) -> int:
    """How many consecutive units share one evaluation of Philox in a tile whose first unit and width are ``multiples`` of it."""
    counts = (128, 4, 1) if kind == "rademacher" else (4, 1)
    return next(n for n in counts if all(m % n == 0 for m in multiples))
