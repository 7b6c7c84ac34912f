"""Triton kernels and their launchers; imported as ``fbkernels.kernels``."""

from fbkernels.kernels.noise import noise

__all__ = ["noise"]
