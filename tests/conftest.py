from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # a worker a core: more threads than that wait for each other, four times as long in small networks

import numpy
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    if importlib.util.find_spec("triton") and version("triton").startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        raise RuntimeError("the interpreter of Triton 3.6 needs an older numpy: pip install 'numpy<2.4'")


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton's kernels run: on a GPU, or in the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def _at_once() -> None:
    """Networks learn from their first step on, where a test does not ask for a warm-up: most look at the first few steps."""
    import fbkernels  # behind what the environment has to say

    fbkernels.convert.__kwdefaults__["warmup"] = 0


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _traces() -> None:
    """Dynamo skips a function for good once eight networks of one class were traced: what a test sees must not hang on those before it."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small networks, which more threads only delay."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
