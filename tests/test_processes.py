"""Two and four processes with a part of the batch each against one with all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parallel
import pytest
import torch
from torch import Tensor

import fbkernels as fb


def farthest(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference, in units of the largest entry of its tensor."""
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], t) for k, t in want.items() if not t.is_floating_point())
    real = [(got[k].double(), t.double()) for k, t in want.items() if t.is_floating_point()]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)) for a, b in real)
