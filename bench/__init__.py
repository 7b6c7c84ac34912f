"""Throughput; imported as ``fbkernels.bench``."""
