"""Feedback alignment: B stays random."""

from __future__ import annotations

from torch import Tensor

from fbkernels.rules.base import Rule, random_start


class Fixed(Rule):
    """``B`` never changes: feedback alignment with ``layerwise`` (Lillicrap et al. 2016), direct feedback alignment with ``direct``
    (Nokland 2016). No perturbed stream."""

    perturbs = False
    adapts = False

    def start(self, normal: Tensor, layerwise: bool) -> Tensor:
        return random_start(normal, layerwise)
