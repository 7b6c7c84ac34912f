"""The matching rule: B gets W's update."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fbkernels._check import in_interval
from fbkernels.rules.base import Measurement, Rule, random_start

if TYPE_CHECKING:
    from fbkernels.points import FeedbackPoint


class KolenPollack(Rule):
    """B gets the same update as W^T, whatever the optimiser, and both decay (Kolen & Pollack 1994; Akrout et al. 2019).

    ``B <- (1 - decay) B + (dW + decay W_before)^T``, dW what the optimiser did to W since the last step. ``decay`` must be the decay that
    the optimiser applies to W in a step (for SGD its lr * weight_decay): then dW + decay W_before is the update without the decay, and
    W^T - B shrinks by (1 - decay) a step. With decay 0 it is the paper's matching rule: W^T - B is constant. A step in which W stood
    still (warm-up, gradient accumulation, an overflow under AMP) leaves B as well. Exception to the form: no noise, B follows W.
    Layerwise only.

    Statistics: ``before``, the weight at the last update.

    Args:
        decay: in [0, 1), per step.

    Raises:
        ValueError: decay outside [0, 1).
    """

    structures = ("layerwise",)
    statistics = ("before",)
    perturbs = False
    regresses = False

    def __init__(self, decay: float = 0.0) -> None:
        self.decay = in_interval("decay", decay, 0, 1, open_high=True)

    def start(self, normal: Tensor, layerwise: bool) -> Tensor:
        return random_start(normal, layerwise)

    def feedback(self, point: FeedbackPoint) -> Tensor | None:
        if point.weight is not None and "before" not in point._buffers:
            point._buffers["before"] = point.weight.detach().clone()
        return super().feedback(point)

    def learn(self, point: FeedbackPoint, m: Measurement) -> None:
        assert point.weight is not None
        B, before = point._buffers["B"], point._buffers["before"]
        now = point.weight.detach().to(before.dtype)
        keep = 1 - self.decay * (now != before).any()
        change = now - keep * before
        B.mul_(keep).add_(change if B.ndim > 2 else change.T)
        before.copy_(now)
