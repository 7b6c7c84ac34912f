"""Sign symmetry: feedback has the signs of the forward weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fbkernels.rules.weight_transport import WeightTransport

if TYPE_CHECKING:
    from fbkernels.training.point import FeedbackPoint


class SignSymmetric(WeightTransport):
    """``B_l = mean|W| sign(W_(l+1)^T)``: uniform sign-concordant feedback (Liao et al. 2016). Exception to the form, like its parent."""

    def feedback(self, point: FeedbackPoint) -> Tensor | None:
        W = super().feedback(point)
        return None if W is None else W.sign() * W.abs().mean()
