"""Train networks by learned feedback weights instead of backprop's weight transport (Lansdell, Prakash & Kording, ICLR 2020)."""

from fbkernels import functional, metrics
from fbkernels.convert import convert, flush, points, revert
from fbkernels.fused_mlp import FusedMLP
from fbkernels.loss import PerturbedLoss
from fbkernels.nn import Conv2d, Linear
from fbkernels.ops import backends, build_info
from fbkernels.rules import (
    LMS,
    Fixed,
    Joint,
    KolenPollack,
    Measurement,
    NodePerturbation,
    NormalizedLMS,
    Ridge,
    Rule,
    SignSymmetric,
    SyntheticGradient,
    WeightMirror,
    WeightTransport,
)
from fbkernels.summary import summary
from fbkernels.training.point import FeedbackPoint

__version__ = "0.1.0"

__all__ = [
    "LMS",
    "Conv2d",
    "FeedbackPoint",
    "Fixed",
    "FusedMLP",
    "Joint",
    "KolenPollack",
    "Linear",
    "Measurement",
    "NodePerturbation",
    "NormalizedLMS",
    "PerturbedLoss",
    "Ridge",
    "Rule",
    "SignSymmetric",
    "SyntheticGradient",
    "WeightMirror",
    "WeightTransport",
    "backends",
    "build_info",
    "convert",
    "flush",
    "functional",
    "metrics",
    "points",
    "revert",
    "summary",
]
