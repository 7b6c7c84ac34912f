"""Triton kernels and their launchers; imported as ``fbkernels.kernels``."""

from fbkernels.kernels.noise import noise
from fbkernels.kernels.ridge_gain import ridge_gain

__all__ = ["noise", "ridge_gain"]
