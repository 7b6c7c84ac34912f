"""Weight mirror: a layer's answers to noise of its own (SPEC 4, "Layerwise, exact: the local mirror")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fbkernels import ops
from fbkernels._check import integer
from fbkernels.rules.base import Rule

if TYPE_CHECKING:
    from fbkernels.training.point import FeedbackPoint

SETTLED = 0.0025  # |W - B|^2 / |W|^2: 2.9 degrees
MOST, LEAST = 512, 16  # samples a step; by fewer B follows W too slowly: a network of 500 units then takes 30 steps


class WeightMirror(Rule):
    """B learns W from the layer's answers to noise (Akrout et al. 2019), with nothing to tune: ``Z = Xi W^T`` to S samples of Rademacher
    noise of the layer's own fan-in n, ``B <- B + Xi^T (Z - Xi B) / (S + n - 1)``.

    By that E|W - B|^2 falls to (n - 1) / (S + n - 1) a step, to zero, since the answer has no noise. It needs no loss, no batch and no
    second stream. B is zero at the start, and mirrored before its first use until it knows W to three degrees (at most twice the samples
    that theory needs for that). Every process computes the same B from the same counters, and sends nothing. Layerwise only.

    Args:
        samples: S, answers a layer and step. None: as many as cost a twentieth of what the step multiplies otherwise, from 16 to 512: with
            128 images an MLP 784-500-500-10 has 24.

    Raises:
        TypeError, ValueError: samples is no integer >= 1.
    """

    structures = ("layerwise",)
    perturbs = False
    regresses = False
    mirrors = True

    def __init__(self, samples: int | None = None) -> None:
        self.samples = None if samples is None else integer("samples", samples, 1)

    def settle(self, point: FeedbackPoint) -> None:
        B, W = self._pair(point)
        seed, backend = point.network.settings.seed, point.network.settings.backend
        n, left = B[:1].numel(), 1.0
        step = torch.full((), 2**32 - 1, dtype=torch.int64, device=B.device)  # a step that training does not reach
        offset, draws = 0, 4
        S = self.samples or MOST
        needed = 2 * 6 * (n + 1 + S) // S + 8  # e^-6 is SETTLED: twice that
        while left > SETTLED and needed > 0:
            (B,), residual = ops.mirror([B], [W], step, seed, [point.index], S, "rademacher", draws=draws, offset=offset, backend=backend)
            if B.is_meta:  # one turn shows the memory that they all take
                break
            left, offset, needed = float(residual), offset + draws * S, needed - draws
        self._store(point, B)

    def reflect(self, points: Sequence[FeedbackPoint], step: Tensor, rows: int) -> None:
        settings, pairs = points[0].network.settings, [self._pair(point) for point in points]
        paid = 3 * rows // 40  # three products of rows each are the step, two of S each the mirror
        S = self.samples or min(MOST, max(LEAST, paid))
        key = (settings.seed, [point.index for point in points], S, "rademacher")
        new, _ = ops.mirror([B for B, _ in pairs], [W for _, W in pairs], step, *key, backend=settings.backend)
        for point, B in zip(points, new, strict=True):
            self._store(point, B)

    def _pair(self, point: FeedbackPoint) -> tuple[Tensor, Tensor]:
        """B and W, a row for each output."""
        assert point.connection is not None and point.weight is not None
        B, W = point.state["B"], point.weight.detach()
        answers = point.connection.answers
        return answers(B if point.connection.convolution else B.T.contiguous()), answers(W).to(B.dtype)

    def _store(self, point: FeedbackPoint, B: Tensor) -> None:
        assert point.connection is not None and point.weight is not None
        B, before = point.connection.unanswers(B, point.weight.shape), point.state["B"]
        if point.network.static:  # whose memory the new one takes
            before = before.clone()
        point.store(B if point.connection.convolution else B.T)
        point.check(before)
