"""Triton kernels; imported as ``fbkernels.kernels``."""
