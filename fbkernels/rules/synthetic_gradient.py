"""Linear synthetic gradients: the same regression with the true gradient as its target."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fbkernels.rules.base import Gain, Measurement
from fbkernels.rules.lms import LMS

if TYPE_CHECKING:
    from fbkernels.training.point import FeedbackPoint


class SyntheticGradient(LMS):
    """LMS on the true gradient: ``B <- B + lr (lam - B r) r^T`` summed over the batch, lam = dL/dh_l by backprop.

    What a perfect perturbation would teach; costs a second forward and backward pass, with dropout masks of its own. Exception to the
    form: the target replaces Xi * w. B starts random, as with LMS.

    Args:
        lr: > 0, in units of ``1 / |r|^2``.

    Raises:
        ValueError: lr <= 0.
    """

    perturbs = False
    supervised = True
    additive = True

    def update(self, m: Measurement, state: dict[str, Tensor]) -> tuple[Gain, Tensor]:
        Q = self.lr * m.regressor
        return m.regressor.mT @ Q, Q

    def learn(self, point: FeedbackPoint, m: Measurement) -> None:
        assert m.gains is not None and m.targets is not None
        if point.name not in m.targets:  # a layer that the forward has skipped
            return
        # a skipped sample has G = 0, and 0 times a non-finite target is not 0
        point.update(m, *m.gains, target=torch.nan_to_num(m.targets[point.name], nan=0.0, posinf=0.0, neginf=0.0))
