"""A step of the local mirror of all layers (SPEC 4): B + rate D Xi^T Xi with D = W - B, and Xi made in registers, twice."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fbkernels.kernels.noise import noise_tile, shared
from fbkernels.ops import tuning

# What of a layer does not change from step to step: a row of the table, int64
OUTPUTS, UNITS, POINT, RESPONDING, LEARNING, RESPONSES, COLUMNS = (tl.constexpr(i) for i in range(7))
LAYERS = 32  # of a launch, which takes their addresses as arguments: a table of them would have to be copied to the GPU in each step
BS = 64


@triton.jit
def own_layer(table, column: tl.constexpr, BT: tl.constexpr):
    """Of the table whose ``column`` says where each layer's programs begin: this program's layer, and its number there."""
    starts = tl.load(table + tl.arange(0, BT) * COLUMNS + column)
    i = tl.sum((starts <= tl.program_id(0)).to(tl.int32), 0) - 1
    return i, tl.program_id(0) - tl.load(table + i * COLUMNS + column).to(tl.int32)


@triton.jit
def choose(tensors, i):
    address = tensors[0].to(tl.int64)
    for j in tl.static_range(1, len(tensors)):
        address = tl.where(i == j, tensors[j].to(tl.int64), address)
    return address.to(tl.pointer_type(tl.float32))


@triton.jit(do_not_specialize=["seed", "offset"])
def mirror_respond_kernel(
    B,  # of each layer [outputs, units]
    W,
    table,
    responses,  # of each layer [samples, outputs], Xi D^T
    parts,  # [programs, 2], |D Xi^T|^2 and, where the samples are the first, |W|^2
    step,
    seed,
    samples,
    offset,
    KIND: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
):
    layer, i = own_layer(table, RESPONDING, len(B))
    B, W, row = choose(B, layer), choose(W, layer), table + layer * COLUMNS
    outputs, units, point = tl.load(row + OUTPUTS).to(tl.int32), tl.load(row + UNITS).to(tl.int32), tl.load(row + POINT)
    tiles = (samples + BS - 1) // BS
    first = i // tiles * BM
    B, W = B + first.to(tl.int64) * units, W + first.to(tl.int64) * units
    o_m, o_s, o_k = tl.arange(0, BM), i % tiles * BS + tl.arange(0, BS), tl.arange(0, BK)
    m_m, m_s = first + o_m < outputs, o_s < samples
    sample = o_s.to(tl.int64) + offset
    b_R = tl.zeros([BS, BM], tl.float32)
    weight = tl.zeros([BM], tl.float32)
    for k in tl.range(0, units, BK, num_stages=1):
        at, mask = o_m[:, None] * units + (k + o_k)[None, :], m_m[:, None] & (k + o_k < units)[None, :]
        b_W = tl.load(W + at, mask=mask, other=0.0)  # [BM, BK]
        b_D = b_W - tl.load(B + at, mask=mask, other=0.0)
        weight += tl.sum(b_W * b_W, 1)
        xi = noise_tile(sample, tl.zeros_like(sample) + k, tl.load(step), seed, point, 1.0, units, KIND, SHARED, BK)  # [BS, BK]
        b_R = tl.dot(xi, tl.trans(b_D), b_R, input_precision=PRECISION)
    b_R = tl.where(m_s[:, None], b_R, 0.0)
    at = tl.load(row + RESPONSES) + o_s.to(tl.int64)[:, None] * outputs + (first + o_m)[None, :]
    tl.store(responses + at, b_R, mask=m_s[:, None] & m_m[None, :])
    own = parts + 2 * tl.program_id(0)
    tl.store(own, tl.sum(tl.sum(b_R * b_R, 1), 0))
    tl.store(own + 1, tl.where(i % tiles == 0, tl.sum(weight, 0), 0.0))


@triton.jit(do_not_specialize=["seed", "offset"])
def mirror_learn_kernel(
    B,
    new,  # likewise
    table,
    responses,
    parts,
    residual,  # [layers]
    step,
    seed,
    samples,
    offset,
    KIND: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
):
    layer, i = own_layer(table, LEARNING, len(B))
    B, new, row = choose(B, layer), choose(new, layer), table + layer * COLUMNS
    outputs, units, point = tl.load(row + OUTPUTS).to(tl.int32), tl.load(row + UNITS).to(tl.int32), tl.load(row + POINT)
    tiles = (units + BK - 1) // BK
    first, unit = i // tiles * BM, i % tiles * BK
    B, new = B + first.to(tl.int64) * units, new + first.to(tl.int64) * units
    o_m, o_s, o_k = tl.arange(0, BM), tl.arange(0, BS), unit + tl.arange(0, BK)
    m_m = first + o_m < outputs
    own = responses + tl.load(row + RESPONSES) + first
    b_U = tl.zeros([BK, BM], tl.float32)
    for s in tl.range(0, samples, BS, num_stages=1):
        m_s = s + o_s < samples
        b_R = tl.load(own + o_s[:, None] * outputs + o_m[None, :], mask=m_s[:, None] & m_m[None, :], other=0.0)  # [BS, BM]
        own += BS * outputs
        sample = (s + o_s).to(tl.int64) + offset
        xi = noise_tile(sample, tl.zeros_like(sample) + unit, tl.load(step), seed, point, 1.0, units, KIND, SHARED, BK)  # [BS, BK]
        b_U = tl.dot(tl.trans(xi), b_R, b_U, input_precision=PRECISION)
    at, mask = o_m[None, :] * units + o_k[:, None], m_m[None, :] & (o_k < units)[:, None]
    rate = 1.0 / tl.maximum(tl.cast(samples + units + (1 if KIND == "gaussian" else -1), tl.float32), 1.0)
    tl.store(new + at, tl.load(B + at, mask=mask, other=0.0) + rate * b_U, mask=mask)
    if i == 0:
        begin, end = tl.load(row + RESPONDING), tl.load(row + COLUMNS + RESPONDING)
        unexplained = tl.zeros([128], tl.float32)
        weight = tl.zeros([128], tl.float32)
        for p in range(begin, end, 128):
            o_p = p + tl.arange(0, 128)
            unexplained += tl.load(parts + 2 * o_p, mask=o_p < end, other=0.0)
            weight += tl.load(parts + 2 * o_p + 1, mask=o_p < end, other=0.0)
        size = tl.maximum(tl.cast(samples, tl.float32) * tl.sum(weight, 0), 1.1754943508222875e-38)
        tl.store(residual + layer, tl.sum(unexplained, 0) / size)


@functools.lru_cache
def plan(shapes: tuple[tuple[int, int], ...], points: tuple[int, ...], samples: int, kind: str, device: torch.device) -> tuple[Any, ...]:
    """The tiles of both kernels, the table, of a power of two of rows and an end, how many programs each has, and numbers of responses."""
    # Rademacher: as many units as share a Philox; ptxas spills with more outputs than these
    BK, few = (128, 32) if kind == "rademacher" else (64, 64)
    rows, responding, learning, responses = [], 0, 0, 0
    for (outputs, units), point in zip(shapes, points, strict=True):
        rows.append([outputs, units, point, responding, learning, responses])
        responding += triton.cdiv(outputs, few) * triton.cdiv(samples, BS)
        learning += triton.cdiv(outputs, 64) * triton.cdiv(units, BK)
        responses += outputs * samples
    rows += [[0, 0, 0, responding, learning, 0]] * (triton.next_power_of_2(len(rows)) + 1 - len(rows))
    # What tf32 rounds is W - B: the rounding shrinks with it, and B still gets all digits of W.
    common: dict[str, Any] = {"KIND": kind, "SHARED": shared(kind, BK), "PRECISION": "tf32", "BS": BS, "BK": BK, "num_warps": 8}
    return common | {"BM": few}, common | {"BM": 64}, torch.tensor(rows, device=device), responding, learning, responses


@tuning.on_device
def mirror(
    residual: Tensor,
    B: Sequence[Tensor],
    W: Sequence[Tensor],
    new: Sequence[Tensor],
    step: Tensor,
    seed: int,
    points: Sequence[int],
    samples: int,
    kind: str,
    offset: int,
) -> None:
    """Fill ``new`` and ``residual``, in two launches for all layers (of each 32), for a row learns from all of its responses."""
    for first in range(0, len(B), LAYERS):
        chunk = slice(first, first + LAYERS)
        shapes = tuple((b.shape[0], b.shape[1]) for b in B[chunk])
        respond, learn, table, responding, learning, responses = plan(shapes, tuple(points[chunk]), samples, kind, residual.device)
        b, w, out = (tuple(t[chunk]) + (t[0],) * (len(table) - 1 - len(shapes)) for t in (B, W, new))
        held, parts = residual.new_empty(responses), residual.new_empty(2 * responding)
        key = {"step": step, "seed": seed, "samples": samples, "offset": offset}
        mirror_respond_kernel[(responding,)](b, w, table, held, parts, **key, **respond)
        mirror_learn_kernel[(learning,)](b, out, table, held, parts, residual[chunk], **key, **learn)
