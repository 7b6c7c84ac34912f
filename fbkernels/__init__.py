"""Train networks by learned feedback weights instead of backprop's weight transport (Lansdell, Prakash & Kording, ICLR 2020)."""

from fbkernels import functional, metrics, rules
from fbkernels._version import version as __version__
from fbkernels.convert import convert, flush, points, revert
from fbkernels.fused_mlp import FusedMLP
from fbkernels.loss import PerturbedLoss
from fbkernels.nn import Conv2d, Linear
from fbkernels.ops import backends, build_info
from fbkernels.rules import *  # noqa: F403  # all rules, named once
from fbkernels.summary import summary
from fbkernels.training.point import FeedbackPoint

__all__ = [
    "Conv2d",
    "FeedbackPoint",
    "FusedMLP",
    "Linear",
    "PerturbedLoss",
    "__version__",
    "backends",
    "build_info",
    "convert",
    "flush",
    "functional",
    "metrics",
    "points",
    "revert",
    "summary",
    *rules.__all__,
]
