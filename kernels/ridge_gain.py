"""The gains of the ridge rule: statistics and solve in float64, without a look at them from the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fbkernels.ops import tuning

WHOLE, BLOCK = 128, 64  # rows that one launch inverts: at most, and of a larger matrix


@triton.jit
def sweep_kernel(
    A,  # [groups, m, m] float64, symmetric; of each the block [size, size] at (first, first)
    out,  # [groups, size, size]
    m,
    first,
    size,
    BM: tl.constexpr,
):
    # sweeps every pivot of a symmetric positive definite block, which leaves minus its inverse; the root of a pivot that is not
    # positive is NaN or divides by 0, and spreads
    i_g = tl.program_id(0).to(tl.int64)
    o_m = tl.arange(0, BM)
    m_mm = (o_m < size)[:, None] & (o_m < size)[None, :]
    b_a = tl.load(A + i_g * m * m + (first + o_m)[:, None] * m + (first + o_m)[None, :], mask=m_mm, other=0.0)  # [BM, BM]
    for k in range(size):
        m_k = o_m == k
        b_k = tl.sum(tl.where(m_k[:, None], b_a, 0.0), 0)  # [BM]
        root = tl.sqrt(tl.sum(tl.where(m_k, b_k, 0.0)))
        b_u = tl.where(m_k, -1.0, b_k) / root
        # row and column k become b_k / pivot, and the pivot -1 / pivot
        b_a = tl.where(m_k[:, None] | m_k[None, :], 0.0, b_a) - b_u[:, None] * b_u[None, :]
    tl.store(out + i_g * size * size + o_m[:, None] * size + o_m[None, :], -b_a, mask=m_mm)


def block_inverse(A: Tensor, first: int, size: int) -> Tensor:
    """The inverse of the diagonal block of ``size`` <= 128 rows of each A [groups, m, m], float64."""
    out = A.new_empty(len(A), size, size)
    BM = max(triton.next_power_of_2(size), 16)
    sweep_kernel[(len(A),)](A, out, A.shape[-1], first, size, BM=BM, num_warps={16: 1, 32: 4, 64: 8, 128: 16}[BM])
    return out


def inverse(V: Tensor) -> Tensor:
    """The inverse of each symmetric positive definite V [groups, m, m], float64, by the sweep operator; NaN where V is none."""
    m = V.shape[-1]
    if m <= WHOLE:
        return block_inverse(V, 0, m)
    A = V.clone()
    for first in range(0, m, BLOCK):
        K = slice(first, min(first + BLOCK, m))
        P, C = block_inverse(A, first, K.stop - first), A[:, :, K].clone()
        T = C @ P
        A.baddbmm_(T, C.mT, alpha=-1)
        A[:, :, K], A[:, K], A[:, K, K] = T, T.mT, -P
    return A.neg_()


@tuning.on_device
def ridge_gain(R: Tensor, w: Tensor, V: Tensor, gamma: float, forgetting: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """V, Q, M, G of ``fbkernels.reference.ridge_gain``; nothing synchronises, so a CUDA graph can hold it."""
    samples, m = R.shape[-2:]
    exact = R.double().view(-1, samples, m)
    weighted = exact
    if forgetting < 1:
        weighted = exact * (forgetting ** torch.arange(samples - 1, -1, -1, dtype=torch.float64, device=R.device))[:, None]
    keep = forgetting**samples
    new = torch.baddbmm(V.view(-1, m, m), exact.mT, weighted, beta=keep)
    new.diagonal(dim1=1, dim2=2).add_((1 - keep) * gamma)
    P = inverse(new)
    Q = weighted @ P
    if m > WHOLE:  # in blocks Q is off by up to a hundred times what a Cholesky solve loses, and then by as little
        Q = torch.baddbmm(Q, torch.baddbmm(weighted, Q, new, alpha=-1), P)
    M, G = exact.mT @ Q, w.double()[:, None] * Q
    return new.view(V.shape), Q.to(R.dtype).view(R.shape), M.to(R.dtype).view(V.shape), G.to(R.dtype).view(R.shape)
