"""Backpropagation: feedback is the forward weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fbkernels.rules.base import Rule

if TYPE_CHECKING:
    from fbkernels.training.point import FeedbackPoint


class WeightTransport(Rule):
    """``B_l = W_(l+1)^T``, always: backprop through the same plumbing, equal to ``loss.backward()`` of the plain network to rounding.

    Exception to the form: B is the weight itself (a convolution's has its shape), not learned. Layerwise only.
    """

    structures = ("layerwise",)
    follows = True
    learned = False
    adapts = False
    perturbs = False

    def feedback(self, point: FeedbackPoint) -> Tensor | None:
        W = None if point.weight is None else point.weight.detach()
        return W if W is None or W.ndim > 2 else W.T
