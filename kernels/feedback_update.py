"""B <- B (I - M) + Xi^T G, and the joint rules' prediction Xi B, of one tile of B's rows (SPEC 4)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fbkernels.kernels.noise import noise_tile, shared
from fbkernels.ops import tuning


@triton.jit
def update_tile(
    i_u,
    B,  # [units, m]
    new,  # [units, m]
    M,  # [m, m]
    G,  # [learned_rows, m]
    R,  # [learned_rows, m]
    Q,  # [learned_rows, m]
    w,  # [learned_rows]
    parts,  # [tiles, predicted_rows, m]
    learned_step,  # whose noise B learns from
    step,  # whose output is predicted
    seed,
    point,
    std,
    units,
    m,
    learned_rows,
    predicted_rows,
    offset,  # of the predicted rows; B learns from all rows of a batch
    KIND: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
    BU: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BL: tl.constexpr,
):
    """The rows [i_u BU, (i_u + 1) BU) of B: B (I - M) + Xi^T G, or B + (w * Xi - R B^T)^T Q, and their part of Xi B."""
    o_n, o_u = tl.arange(0, BR), tl.arange(0, BU)
    m_u = i_u * BU + o_u < units
    first = tl.zeros([BR], tl.int64) + i_u.to(tl.int64) * BU
    own = i_u.to(tl.int64) * BU * m
    for j in tl.range(0, m, BC, num_stages=1):
        o_m = j + tl.arange(0, BC)
        m_m = o_m < m
        o_B = o_u[:, None] * m + o_m[None, :]
        b_B = tl.load(B + own + o_B, mask=m_u[:, None] & m_m[None, :], other=0.0)  # [BU, BC]
        if new is not None:
            if M is not None:
                b_BM = tl.zeros([BU, BC], tl.float32)
                for k in tl.range(0, m, BL, num_stages=1):
                    o_k = k + tl.arange(0, BL)
                    b_k = tl.load(B + own + o_u[:, None] * m + o_k[None, :], mask=m_u[:, None] & (o_k < m)[None, :], other=0.0)
                    b_M = tl.load(M + o_k[:, None] * m + o_m[None, :], mask=(o_k < m)[:, None] & m_m[None, :], other=0.0)
                    b_BM = tl.dot(b_k, b_M, b_BM, input_precision=PRECISION)
                b_B -= b_BM
            for n in tl.range(0, learned_rows, BR, num_stages=1):
                m_n = n + o_n < learned_rows
                xi = noise_tile((n + o_n).to(tl.int64), first, tl.load(learned_step), seed, point, std, units, KIND, SHARED, BU)  # [BR, BU]
                if R is not None:
                    b_RB = tl.zeros([BR, BU], tl.float32)
                    for k in tl.range(0, m, BL, num_stages=1):
                        o_k = k + tl.arange(0, BL)
                        b_R = tl.load(R + (n + o_n)[:, None] * m + o_k[None, :], mask=m_n[:, None] & (o_k < m)[None, :], other=0.0)
                        b_k = tl.load(B + own + o_u[None, :] * m + o_k[:, None], mask=m_u[None, :] & (o_k < m)[:, None], other=0.0)
                        b_RB = tl.dot(b_R, b_k, b_RB, input_precision=PRECISION)
                    xi = tl.load(w + n + o_n, mask=m_n, other=0.0)[:, None] * xi - b_RB
                    b_G = tl.load(Q + (n + o_n)[:, None] * m + o_m[None, :], mask=m_n[:, None] & m_m[None, :], other=0.0)
                else:
                    b_G = tl.load(G + (n + o_n)[:, None] * m + o_m[None, :], mask=m_n[:, None] & m_m[None, :], other=0.0)
                b_B = tl.dot(tl.trans(xi), b_G, b_B, input_precision=PRECISION)
            b_B = tl.where(m_u[:, None], b_B, 0.0)
            tl.store(new + own + o_B, b_B, mask=m_u[:, None] & m_m[None, :])
        if parts is not None:
            own_parts = i_u.to(tl.int64) * predicted_rows * m
            for n in tl.range(0, predicted_rows, BR, num_stages=1):
                xi = noise_tile((n + o_n).to(tl.int64) + offset, first, tl.load(step), seed, point, std, units, KIND, SHARED, BU)
                b_P = tl.dot(xi, b_B, input_precision=PRECISION)  # [BR, BC]
                tl.store(
                    parts + own_parts + (n + o_n)[:, None] * m + o_m[None, :], b_P, mask=(n + o_n < predicted_rows)[:, None] & m_m[None, :]
                )


@triton.jit(do_not_specialize=["seed", "point", "offset"])
def feedback_update_kernel(
    B,
    new,
    M,
    G,
    R,
    Q,
    w,
    parts,
    learned_step,
    step,
    seed,
    point,
    std,
    units,
    m,
    learned_rows,
    predicted_rows,
    offset,
    KIND: tl.constexpr,
    SHARED_B: tl.constexpr,
    PRECISION_B: tl.constexpr,
    BU: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BL: tl.constexpr,
):
    # fmt: off
    update_tile(
        tl.program_id(0), B, new, M, G, R, Q, w, parts, learned_step, step, seed, point, std, units, m, learned_rows, predicted_rows,
        offset, KIND, SHARED_B, PRECISION_B, BU, BR, BC, BL,
    )
    # fmt: on


class Plan(NamedTuple):
    """B's update as a launch takes it: how many programs do it, what they fill, and the arguments of ``update_tile`` by name."""

    tiles: int
    new: Tensor
    parts: Tensor
    arguments: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """What its time depends on."""
        a = self.arguments
        return self.tiles, a["m"], a["learned_rows"], a["predicted_rows"], a["M"] is None, a["R"] is None


def plan(
    B: Tensor | None,
    M: Tensor | None,
    G: Tensor | None,
    R: Tensor | None,
    Q: Tensor | None,
    w: Tensor | None,
    learned_step: Tensor | None,
    predicted_rows: int,
    kind: str,
    like: Tensor,
) -> Plan:
    """Allocate the new B (none where ``learned_step`` is None) and the partial predictions (none where no rows are predicted)."""
    new, parts = like.new_empty(0, dtype=torch.float32), like.new_empty(0, dtype=torch.float32)
    BU = 64
    tiles, m, learned = 0, 1, 0
    if B is not None:
        tiles, m = triton.cdiv(len(B), BU), B.shape[1]
        if learned_step is not None:
            target = G if w is None else w
            new, learned = torch.empty_like(B), 0 if target is None else len(target)
        if predicted_rows:
            parts = B.new_empty(tiles, predicted_rows, m)
    arguments = {
        "B": B,
        "new": new if new.numel() else None,
        "M": M,
        "G": G,
        "R": R,
        "Q": Q,
        "w": w,
        "parts": parts if parts.numel() else None,
        "learned_step": learned_step,
        "m": m,
        "learned_rows": learned,
        "predicted_rows": predicted_rows,
        "SHARED_B": shared(kind, BU),
        "PRECISION_B": precision(),
        "BU": BU,
        "BR": 16,
        # a wider tile makes the noise fewer times, but tf32x3 spills there beside a convolution
        "BC": min(max(16, triton.next_power_of_2(m)), 128 if precision() == "tf32" else 64),
        "BL": 16,
    }
    return Plan(tiles, new, parts, arguments)


@tuning.on_device
def feedback_update(update: Plan, step: Tensor | None, seed: int, point: int, units: int, std: float, kind: str, offset: int) -> None:
    """The update in a launch of its own; ``step`` is the predicted one."""
    if update.tiles:
        # without maxnreg ptxas spills a few for the sake of occupancy
        key = {"step": step, "seed": seed, "point": point, "std": std, "units": units, "offset": offset, "KIND": kind}
        feedback_update_kernel[(update.tiles,)](**update.arguments, **key, num_warps=8, maxnreg=255)


def precision() -> str:
    """Of float32 products: what ``torch.backends.cuda.matmul.allow_tf32`` allows; tf32x3 keeps float32's digits on tensor cores."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
