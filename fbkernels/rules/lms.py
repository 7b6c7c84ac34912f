"""Least mean squares: the rule of the paper's convnets and autoencoder."""

from __future__ import annotations

from torch import Tensor

from fbkernels._check import positive
from fbkernels.rules.base import Gain, Measurement, Rule, random_start


class LMS(Rule):
    """Stochastic gradient of ``1/2 |B r - lam|^2``: ``k = lr r``, every sample from the same B, a sum and not a mean (SPEC 4).

    ``M = lr R^T R``, ``G = lr w * R``. Stable iff ``lr < 2 / lambda_max(R^T R)``. B starts random, as the authors' does.

    Args:
        lr: > 0, in units of ``1 / |r|^2``.

    Raises:
        ValueError: lr <= 0.
    """

    additive = True

    def __init__(self, lr: float) -> None:
        self.lr = positive("lr", lr)

    def start(self, normal: Tensor, layerwise: bool) -> Tensor:
        return random_start(normal, layerwise)

    def update(self, m: Measurement, state: dict[str, Tensor]) -> tuple[Gain, Tensor]:
        R, Q = m.regressor, self.lr * m.regressor
        return ((R, Q), m.w) if R.shape[-2] < R.shape[-1] else (R.mT @ Q, m.w[:, None] * Q)
