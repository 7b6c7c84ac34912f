"""Triton kernels and their launchers; imported as ``fbkernels.kernels``."""

from fbkernels.kernels.noise import noise
from fbkernels.kernels.perturbed_cross_entropy import perturbed_cross_entropy
from fbkernels.kernels.ridge_gain import ridge_gain

__all__ = ["noise", "perturbed_cross_entropy", "ridge_gain"]
