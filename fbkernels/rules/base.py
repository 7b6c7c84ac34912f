"""What a rule sees of a training step, and what it answers: the gains (M, G) of B <- B (I - M) + Xi^T G (SPEC 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fbkernels.training.point import FeedbackPoint
    from fbkernels.training.processes import Part

Gain = Tensor | tuple[Tensor, Tensor] | None


@dataclass
class Measurement:
    """One perturbed step. N samples; S = N x positions regression samples; m regressors; K outputs, or in direct the rank of B."""

    step: Tensor  # int64, 0-d: whose noise this is
    rows: int  # N
    std: float  # sigma
    units: int  # n_tot, the noisy units of all points
    regressor: Tensor  # R [S, m], or [groups, S, m] for a layerwise convolution
    w: Tensor  # [S] dL / sigma^2
    loss_change: Tensor  # [N] dL
    output_change: Tensor  # [N, K] y~ - y
    points: tuple[str, ...] = ()  # the points that ran
    ok: Tensor | None = None  # [N] bool: the samples whose losses are finite; the others are zero above
    # layerwise, by point: error of the layer that reads it, filled by the backward pass, with the loss's scale
    errors: dict[str, Tensor] = field(default_factory=dict)
    scale: Tensor | None = None  # [N] dloss/dL_n, known after the backward pass: 1/N of a mean, an AMP loss scale
    prediction: Tensor | float = 0.0  # joint rules: sum_l Xi_l B_l [N, K] in direct, predicted dL [N] in layerwise
    gains: tuple[Gain, Tensor] | None = None
    targets: dict[str, Tensor] | None = None  # supervised rules: the true dL/dh_l of each point
    part: Part | None = None  # of the batch that these samples are; None: all of it

    @property
    def first(self) -> int:
        """The index of the first sample in the batch of all processes."""
        return 0 if self.part is None else self.part.before

    @property
    def batch(self) -> int:
        """The samples of all processes."""
        return self.rows if self.part is None else self.part.total

    def sum(self, t: Tensor) -> Tensor:
        """Over all processes."""
        return t if self.part is None else self.part.processes.sum(t)

    def gathered(self, names: tuple[str, ...]) -> Measurement:
        """The same step with the samples of all processes; fields beside ``names`` are None."""
        if self.part is None:
            return self
        r = self.regressor.unflatten(-2, (self.rows, -1)).movedim(-3, 0)  # a sample's positions together
        fields = ("regressor", "w", "loss_change", "output_change", "prediction", "ok")
        own = {n: r if n == "regressor" else t.unflatten(0, (self.rows, -1)) for n in fields if isinstance(t := getattr(self, n), Tensor)}
        sent = [n for n in own if n in names]
        whole: dict[str, Any] = dict.fromkeys(own) | dict(zip(sent, self.part.gather(*(own[n] for n in sent)), strict=True))
        for n in sent:
            whole[n] = whole[n].movedim(0, -3).flatten(-3, -2) if n == "regressor" else whole[n].flatten(0, 1)
        return replace(self, rows=self.part.total, part=None, **whole)

    @property
    def handed_on(self) -> tuple[Tensor, ...]:
        """What the next step reads: the step, and the gains."""
        assert self.gains is not None
        M, G = self.gains
        return (self.step, *(M if isinstance(M, tuple) else () if M is None else (M,)), G)

    def at(self, regressor: Tensor) -> Measurement:
        """The same step with a layer's own regressors; every position of a sample is a sample of the regression."""
        positions = regressor.shape[-2] // self.rows
        return replace(self, regressor=regressor, w=self.w.repeat_interleave(positions))

    def per_position(self, s: Tensor) -> Tensor:
        """[N, ...] -> [S, ...]"""
        return s.repeat_interleave(len(self.w) // self.rows, 0)

    @property
    def power(self) -> Tensor:
        """``|r_n|^2`` of each sample, summed over its positions and averaged over groups, at every position: [S]."""
        square = self.regressor.square().sum(-1)
        square = square.mean(0) if square.ndim > 1 else square
        return self.per_position(square.view(self.rows, -1).sum(1))


class Rule:
    """How B is learned.

    A rule of the common form overrides ``update`` alone. ``statistics`` names the tensors that it keeps between steps: ``update`` reads
    and writes them in the dictionary it is given, and they are saved with the network. The exceptions to the form override ``learn``
    (another update of B), ``feedback`` (B is computed, not learned) or ``gradients`` (no B at all) and say so in their docstrings.
    """

    structures: tuple[str, ...] = ("direct", "layerwise")
    statistics: tuple[str, ...] = ()
    learned = True  # has a B of its own
    adapts = True  # B changes
    perturbs = True  # needs the perturbed stream
    predicts = False  # needs the prediction Xi B of this step (joint rules)
    regresses = True  # on regressors r: gets its gains from update
    mirrors = False  # layerwise: B learns from W's answers to noise of its own, see ``reflect``
    supervised = False  # needs the true gradient
    private = False  # gives every point its gradient itself
    follows = False  # reads W
    # Of an update for several processes (a class with another update says it anew):
    exchanged: tuple[str, ...] = ("regressor", "w")  # what it reads of each sample; () where G of a sample depends on that sample alone
    additive = False  # B's update is the sum of those of the parts of a batch, m.sum of what a part alone does not have

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "update" in cls.__dict__:
            cls.exchanged = cls.__dict__.get("exchanged", Rule.exchanged)
            cls.additive = cls.__dict__.get("additive", False)

    def start(self, normal: Tensor, layerwise: bool) -> Tensor:
        """B before the first step, from standard normal numbers of its shape: zero, the ridge's own prior."""
        return torch.zeros_like(normal)

    @property
    def measures(self) -> bool:
        """Whether it needs the loss of each sample and e in ``layerwise``, where the output's gradient is autograd's."""
        return self.private or (self.adapts and self.regresses)

    @property
    def explains(self) -> bool:
        """Whether B predicts what the noise does, so that one can ask for the share that it explains."""
        return self.adapts and self.regresses and self.perturbs

    @property
    def starts_blind(self) -> bool:
        """Whether that B starts at zero: until it has learned, hidden layers get nothing, and then noise."""
        return self.explains and type(self).start is Rule.start

    def effect(self, m: Measurement, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Direct: what the noise did [N, ...], and what B said of it [points, N, ...], from ``Xi_l B_l`` [points, N, m]."""
        return m.loss_change, (prediction * m.regressor).sum(-1)

    def update(self, m: Measurement, state: dict[str, Tensor]) -> tuple[Gain, Tensor]:
        """(M, G) of B <- B (I - M) + Xi^T G, or ((R, Q), w) of M = R^T Q and G = w * Q, which costs less where N < m."""
        raise NotImplementedError(f"{type(self).__name__} does not update B")

    def learn(self, point: FeedbackPoint, m: Measurement) -> None:
        """Apply the update of a step to one point's B."""
        assert m.gains is not None
        point.update(m, *m.gains)

    def feedback(self, point: FeedbackPoint) -> Tensor | None:
        """The point's current B."""
        return point.state.get("B")

    def settle(self, point: FeedbackPoint) -> None:
        """Before a layerwise B is used for the first time."""

    def reflect(self, points: Sequence[FeedbackPoint], step: Tensor, rows: int) -> None:
        """``mirrors``: learn the B of all layers, at the end of a training step's forward, in which each number of their weights met so
        many others."""
        raise NotImplementedError

    def gradients(self, point: FeedbackPoint, m: Measurement) -> Tensor:
        """``private`` rules: dL/dh_l itself, in the layout of the activity."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"


def random_start(normal: Tensor, layerwise: bool) -> Tensor:
    """Random feedback: variance 1 / (3 units) in direct, as U(+-1/sqrt(units)) has, 2 / fan_in of the next layer in
    layerwise, as the authors' code does."""
    if not layerwise:
        return normal / math.sqrt(3 * len(normal))
    fan_in = len(normal) if normal.ndim == 2 else normal[0].numel()
    return normal * math.sqrt(2 / fan_in)
