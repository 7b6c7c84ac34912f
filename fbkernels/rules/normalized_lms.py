"""Normalised least mean squares."""

from __future__ import annotations

import torch
from torch import Tensor

from fbkernels._check import in_interval
from fbkernels.rules.base import Gain, Measurement, Rule


class NormalizedLMS(Rule):
    """Normalised LMS, a sample after the other: ``k = lr r / (eps + |r|^2)``, ``B <- B + (lam - B r) k^T`` (SPEC 4).

    A batch at once, by the triangular system of its prior errors: ``T = (I + tril(R K^T, -1))^-1``, ``Q = T^T K``, ``M = R^T Q``,
    ``G = w * Q``; so the result does not depend on how the samples are batched, and is stable for 0 < lr < 2.

    Args:
        lr: in (0, 2), without unit.

    Raises:
        ValueError: lr outside (0, 2).
    """

    block = 256  # the triangular system's size; blocks are composed

    def __init__(self, lr: float) -> None:
        self.lr = in_interval("lr", lr, 0, 2, open_low=True, open_high=True)

    def update(self, m: Measurement, state: dict[str, Tensor]) -> tuple[Gain, Tensor]:
        keep: Tensor | None = None  # product of the blocks' (I - M)
        gains: list[Tensor] = []
        for R in m.regressor.split(self.block, -2):
            K = self.lr * R / R.square().sum(-1, keepdim=True).clamp_min(1e-30)
            lower = torch.tril(R @ K.mT, -1)  # [j, i]: what sample i's step adds to the error of the later sample j
            Q = torch.linalg.solve_triangular(lower.mT, K, upper=True, unitriangular=True)
            step = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device) - R.mT @ Q
            gains = [g @ step for g in gains] + [Q]
            keep = step if keep is None else keep @ step
        assert keep is not None
        eye = torch.eye(keep.shape[-1], dtype=keep.dtype, device=keep.device)
        return eye - keep, m.w[:, None] * torch.cat(gains, -2)
