"""Online ridge regression by recursive least squares: the rule of the paper's MNIST networks."""

from __future__ import annotations

import torch
from torch import Tensor

from fbkernels import ops, reference
from fbkernels._check import in_interval, positive
from fbkernels.rules.base import Gain, Measurement, Rule


class Ridge(Rule):
    """Recursive least squares of lam = dL xi / sigma^2 on r, with a ridge (SPEC 4).

    A sample at a time: ``k = P r / (beta + r^T P r)``, ``B <- B + (lam - B r) k^T``, ``P <- (P - k (P r)^T) / beta``, ``P_0 = I / gamma``.
    Here a batch at a time, which is the same: ``V <- beta^N V + R^T D R``, ``Q = D R V^-1``, ``M = R^T Q``, ``G = w * Q`` with
    ``D = diag(beta^(N-1), ..., 1)``. With ``beta = 1`` B is exactly ``S V^-1``, ``V = gamma I + sum r r^T``, ``S = sum lam r^T``.

    Args:
        gamma: the ridge, > 0, in units of ``|r|^2``.
        forgetting: beta in (0, 1] per sample. Below 1 the ridge is renewed, ``V >= gamma I``, so that directions which r never excites
            (cross-entropy errors sum to zero) cannot wind up; the renewed part is a prior towards the B at the start of the batch.

    Statistics: V [m, m] in float64, so that 1e8 samples do not drift; factored anew each step.

    Raises:
        ValueError: gamma <= 0 or forgetting outside (0, 1].
    """

    statistics = ("V",)
    additive = True

    def __init__(self, gamma: float = 0.1, forgetting: float = 1.0) -> None:
        self.gamma = positive("gamma", gamma)
        self.forgetting = in_interval("forgetting", forgetting, 0, 1, open_low=True)

    def update(self, m: Measurement, state: dict[str, Tensor]) -> tuple[Gain, Tensor]:
        R = m.regressor
        V = state.get("V")
        if V is None:
            V = (self.gamma * torch.eye(R.shape[-1], dtype=torch.float64, device=R.device)).expand(*R.shape[:-2], -1, -1)
        if m.part is None:
            state["V"], Q, M, G = ops.ridge_gain(R, m.w, V, self.gamma, self.forgetting)
        else:
            positions = R.shape[-2] // m.rows
            before, after = m.first * positions, (m.batch - m.first - m.rows) * positions
            state["V"], Q, M, G = reference.ridge_gain(R, m.w, V, self.gamma, self.forgetting, before, after, m.sum)
        return ((R, Q), m.w) if R.shape[-2] < R.shape[-1] else (M, G)
