"""Feedback alignment: B stays random."""

from __future__ import annotations

import torch
from torch import Tensor

from fbkernels.rules.base import Rule, random_start


class Fixed(Rule):
    """``B`` never changes: feedback alignment with ``layerwise`` (Lillicrap et al. 2016), direct feedback alignment with ``direct``
    (Nokland 2016). No perturbed stream."""

    perturbs = False
    adapts = False

    def start(self, shape: tuple[int, ...], layerwise: bool, generator: torch.Generator) -> Tensor:
        return random_start(shape, layerwise, generator)
