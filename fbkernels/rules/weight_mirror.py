"""Weight mirror: a layer's answers to noise of its own (SPEC 4, "Layerwise, exact: the local mirror")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fbkernels import ops, reference
from fbkernels._check import integer
from fbkernels.rules.base import Rule

if TYPE_CHECKING:
    from fbkernels.training.point import FeedbackPoint

PATTERNS = 512  # shown at a time, before the first step
MOST, LEAST = 512, 16  # samples a step; by fewer B follows W too slowly: a network of 500 units then takes 30 steps


class WeightMirror(Rule):
    """B learns W from the layer's answers to noise (Akrout et al. 2019), with nothing to tune: ``Z = Xi W^T`` to S samples of Rademacher
    noise of the layer's own fan-in n, ``B <- B + Xi^T (Z - Xi B) / (S + n - 1)``.

    By that E|W - B|^2 falls to (n - 1) / (S + n - 1) a step, to zero, since the answer has no noise. It needs no loss, no batch and no
    second stream. Before B is used first, the layer answers a complete set of orthogonal noise, the P patterns of +-1 of a power of two P
    >= n, and ``B = Z^T Xi / P`` is W to rounding; independent ones need 6 n to come within three degrees. Every process computes the same B
    from the same counters, and sends nothing. Layerwise only.

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

    def feedback(self, point: FeedbackPoint) -> Tensor | None:
        B = point.state.get("B")
        if B is not None and B.ndim == 2 and not B.T.is_contiguous():  # a linear layer's from a checkpoint: it is to lie as W does
            point.state["B"] = B = B.T.contiguous().T
        return B

    def settle(self, point: FeedbackPoint) -> None:
        """``B = Z^T Xi / P`` of the answers Z to P orthogonal patterns, the least power of two >= n: W, to rounding."""
        B, W = self._pair(point)
        new, W = torch.zeros_like(B).flatten(1), W.flatten(1)
        n, last = W.shape[1], torch.full((), 2**32 - 1, dtype=torch.int64, device=B.device)  # a step that training does not reach
        signs = ops.noise(last, point.network.settings.seed, point.index, 1, n, 1.0, "rademacher", dtype=B.dtype)[0]
        count = 1 << (n - 1).bit_length()
        rows = min(PATTERNS, count)
        answers = W.new_empty(len(W), rows)  # autocast leaves products alone that are written somewhere
        for first in range(0, count, rows):
            xi = reference.patterns(signs, first, rows)
            new.addmm_(torch.mm(W, xi.T, out=answers), xi, alpha=1 / count)
            if B.is_meta:  # one turn shows the memory that they all take
                break
        self._store(point, new.view(B.shape))

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
        B, W = self.feedback(point), point.weight.detach()
        assert B is not None
        answers = point.connection.answers
        return answers(B if point.connection.convolution else B.T), answers(W).to(B.dtype)

    def _store(self, point: FeedbackPoint, B: Tensor) -> None:
        assert point.connection is not None and point.weight is not None
        B, before = point.connection.unanswers(B, point.weight.shape), point.state["B"]
        if point.network.static:  # whose memory the new one takes
            before = before.clone()
        point.store(B if point.connection.convolution else B.T)
        point.check(before)
