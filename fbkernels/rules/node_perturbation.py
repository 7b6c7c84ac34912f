"""Pure node perturbation: the noisy target itself is the gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fbkernels.rules.base import Measurement, Rule

if TYPE_CHECKING:
    from fbkernels.training.point import FeedbackPoint


class NodePerturbation(Rule):
    """``dL/dh_l = lam_l = dL xi_l / sigma^2``: unbiased, with variance ``sum_l |g_l|^2`` (SPEC 2). Exception to the form: there is no B,
    and the feedback structure makes no difference."""

    learned = False
    adapts = False
    private = True

    def feedback(self, point: FeedbackPoint) -> None:
        return None

    def gradients(self, point: FeedbackPoint, m: Measurement) -> Tensor:
        xi = point.noise(m.step, m.rows, m.w.dtype, m.first)
        assert point.layout is not None
        return point.layout.scaled(xi, m.w)
