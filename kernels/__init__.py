"""Triton kernels and their launchers; imported as ``fbkernels.kernels``."""

from fbkernels.kernels.feedback import feedback
from fbkernels.kernels.feedback_update import feedback_update, plan, precision
from fbkernels.kernels.mirror import mirror
from fbkernels.kernels.noise import noise
from fbkernels.kernels.perturbed_conv2d import configurations, perturbed_conv2d
from fbkernels.kernels.perturbed_cross_entropy import perturbed_cross_entropy
from fbkernels.kernels.perturbed_pointwise import perturbed_pointwise
from fbkernels.kernels.ridge_gain import ridge_gain

__all__ = [
    "configurations",
    "feedback",
    "feedback_update",
    "mirror",
    "noise",
    "perturbed_conv2d",
    "perturbed_cross_entropy",
    "perturbed_pointwise",
    "plan",
    "precision",
    "ridge_gain",
]
