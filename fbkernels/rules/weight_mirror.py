"""Weight mirror with the noise that is already there (SPEC 4, "Layerwise, exact")."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fbkernels._check import in_interval
from fbkernels.rules.base import Measurement, Rule

if TYPE_CHECKING:
    from fbkernels.points import FeedbackPoint


class WeightMirror(Rule):
    """Regress what the perturbation did to the next layer's pre-activation on what it did to its input (Akrout et al. 2019).

    ``dz = z~ - z = W (p - h) = W dh``, so the local rule ``B^T <- B^T + eta (dz - B^T dh)^T dh`` converges to W. Exception to the
    form: it needs no loss, and regresses on dh instead of xi. ``eta = lr / (power / n + power / S)`` with ``power = sum |dh|^2`` over S
    samples (positions) and n inputs a sample, an estimate of the largest eigenvalue of ``dh^T dh``: lr is the fraction of the gap closed in
    a step where S >> n. Layerwise only.

    Args:
        lr: in (0, 1].

    Raises:
        ValueError: lr outside (0, 1].
    """

    structures = ("layerwise",)
    regresses = False
    mirrors = True

    def __init__(self, lr: float = 0.1) -> None:
        self.lr = in_interval("lr", lr, 0, 1, open_low=True)

    def learn(self, point: FeedbackPoint, m: Measurement) -> None:
        assert point.connection is not None
        B, c = point.state["B"], point.connection
        dh, dz = (t.to(B.dtype) for t in m.changes[point.name])
        finite = torch.isfinite(dh).flatten(1).all(1) & torch.isfinite(dz).flatten(1).all(1)
        dh, dz = (torch.where(finite.view(-1, *[1] * (t.ndim - 1)), t, 0.0) for t in (dh, dz))
        weight = B if c.convolution else B.T
        residual = dz - c.forward(dh, weight, None)
        gradient = m.sum(c.weight_gradient(residual, dh, weight))
        inputs = weight[0].numel()
        samples = dz.numel() // len(weight)
        power = m.sum(dh.square().sum()) * (samples * inputs / dh.numel() * c.groups if c.convolution else 1)
        samples = samples // m.rows * m.batch
        eta = self.lr / (power / inputs + power / samples)
        step = torch.where(torch.isfinite(eta) & torch.isfinite(gradient).all(), eta, 0.0) * torch.nan_to_num(gradient)
        point.state["B"] = (B + (step if c.convolution else step.T)).contiguous()
