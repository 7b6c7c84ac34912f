"""The matching rule: B gets W's update."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fbkernels._check import in_interval
from fbkernels.rules.base import Rule, random_start

if TYPE_CHECKING:
    from fbkernels.training.point import FeedbackPoint


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
    follows = True
    adapts = False  # by no measurement
    perturbs = False

    def __init__(self, decay: float = 0.0) -> None:
        self.decay = in_interval("decay", decay, 0, 1, open_high=True)

    def start(self, normal: Tensor, layerwise: bool) -> Tensor:
        return random_start(normal, layerwise)

    def feedback(self, point: FeedbackPoint) -> Tensor | None:
        if point.weight is not None:
            W = point.weight.detach()
            before = point.state.setdefault("before", W.clone())
            if W.is_meta or not torch.equal(W, before):
                B = point.state["B"]
                change = W - (1 - self.decay) * before
                point.state["B"] = ((1 - self.decay) * B + (change if B.ndim > 2 else change.T).to(B.dtype)).contiguous()
                point.state["before"] = W.clone()
        return super().feedback(point)
