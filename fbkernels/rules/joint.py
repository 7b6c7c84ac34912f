"""One joint regression over the noise of all layers (SPEC 4, "Our rule")."""

from __future__ import annotations

from torch import Tensor

from fbkernels._check import in_interval, one_of
from fbkernels.rules.base import Gain, Measurement, Rule

FLOOR = 0.01  # 784-3000-50-10 overflows within 1,500 steps without (bench/results/scaling-short); the C++ and CUDA engines' joint_floor


def floored_power(m: Measurement) -> Tensor:
    """``|r|^2``, or ``FLOOR`` of its mean over the batch where that is more, of each sample at every position: [S]."""
    power = m.power
    mean = m.sum(power.sum()) / (m.batch * (len(power) // m.rows))
    return power.clamp_min((FLOOR * mean).clamp_min(1e-30))


class Joint(Rule):
    """Regress what the noise of *all* layers did on all of it at once, so that no layer's noise is another layer's error (SPEC 4).

    ``signal="loss"``:   ``s_n = dL_n - sum_l (xi_l[n] B_l) . r_l[n]``, ``G = lr s r / (sigma^2 n_tot |r|^2)``, ``M = 0``.
    ``signal="output"``: ``s_n = (y~_n - y_n) - sum_l xi_l[n] B_l``, ``G = lr s / (sigma^2 n_tot)``, ``M = 0``; direct feedback only.

    B_l converges to the mean Jacobian of the output with respect to layer l; it needs about n_tot samples with "output", n_tot * K with
    "loss". Where a batch has more samples than n_tot, n_tot is replaced by their number, without which the sum would overshoot.
    A sample's ``|r|^2`` counts as no less than a hundredth of the batch's mean, which is SPEC's eps: one that the network has fitted has
    next to no r, and divided by that, its step would throw the predictions for all others off.

    Args:
        lr: mu in (0, 1]; 0.1 to 0.2 where it tracks moving weights.
        signal: "loss" (one scalar a sample) or "output" (K a sample).

    Raises:
        ValueError: lr outside (0, 1], unknown signal.
    """

    predicts = True
    exchanged = ()
    additive = True

    def __init__(self, lr: float = 0.2, signal: str = "loss") -> None:
        self.lr = in_interval("lr", lr, 0, 1, open_low=True)
        self.signal = one_of("signal", signal, ("loss", "output"))
        if signal == "output":
            self.structures = ("direct",)

    def effect(self, m: Measurement, prediction: Tensor) -> tuple[Tensor, Tensor]:
        return (m.output_change, prediction) if self.signal == "output" else super().effect(m, prediction)

    def update(self, m: Measurement, state: dict[str, Tensor]) -> tuple[Gain, Tensor]:
        scale = self.lr / (m.std**2 * max(m.units, m.batch))
        if self.signal == "output":
            return None, scale * (m.output_change - m.prediction)
        prediction = m.prediction
        if isinstance(prediction, Tensor) and prediction.ndim == 2:
            prediction = (prediction * m.regressor).sum(1)
        s = m.per_position(m.loss_change - prediction)
        return None, (scale * s / floored_power(m))[:, None] * m.regressor

    def __repr__(self) -> str:
        return f"Joint(lr={self.lr}, signal={self.signal!r})"
