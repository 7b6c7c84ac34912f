"""The paper's figures and tables: ``fbkernels reproduce``."""
