"""Throughput and the paper's experiments; imported as ``fbkernels.bench``."""
