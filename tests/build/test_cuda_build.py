"""What nvcc makes of csrc/*.cu for the GPUs that a wheel is built for: no warning, no spill, registers that leave room for blocks."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from test_build import setup_py  # noqa: F401

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH: nothing compiles the CUDA sources")

ARCHS = ("80", "90")
# registers of a thread; a multiprocessor has 65,536
MOST = {
    "noise_kernel": 40,
    # 3 blocks of 256 threads
    "perturbed_pointwise_kernel": 80,
    "unpool_kernel": 80,
    "perturbed_linear_kernel": 80,
    "feedback_kernel": 80,
    "feedback_update_kernel": 80,
    "mirror_respond_kernel": 80,
    "mirror_learn_kernel": 80,
    # 1 block, which waits for those of the other multiprocessors
    "ridge_gain_kernel": 255,
    "fused_mlp_kernel": 255,
}


def kernel(symbol: str) -> str:
    (name,) = {n for n in MOST if re.search(rf"\d{n}(I|E)", symbol)}  # one without limits has no place here
    return name


def report(setup_py: ModuleType) -> str:  # noqa: F811
    """Of the build that .ci/run has just made, or of one more."""
    if "FBK_NVCC_LOG" in os.environ:
        return Path(os.environ["FBK_NVCC_LOG"]).read_text()
    sources = sorted((Path(__file__).parents[2] / "csrc").glob("*.cu"), key=lambda s: -s.stat().st_size)
    command = ["nvcc", *shlex.split(setup_py.NVCCFLAGS), *setup_py.gencode(";".join(ARCHS))[:-1], "-Xptxas=-v", "-c", "-o", "/dev/null"]

    def compile(source: Path) -> str:
        done = subprocess.run([*command, str(source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    with ThreadPoolExecutor(2) as pool:
        return "".join(pool.map(compile, sources))


def test_registers_spills_and_shared_memory(setup_py: ModuleType) -> None:  # noqa: F811
    _, *parts = re.split(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", report(setup_py))
    seen = set()
    for symbol, arch, text in zip(*[iter(parts)] * 3, strict=True):
        seen.add((kernel(symbol), arch))
        memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        assert set(memory) == {("0", "0", "0")}, (symbol, arch, text)
        used = re.search(r"Used (\d+) registers", text)
        assert used and int(used[1]) <= MOST[kernel(symbol)], (symbol, arch, text)
        assert "smem" not in text, (symbol, arch, text)  # of shared memory the dynamic alone
    assert seen == {(name, arch) for name in MOST for arch in ARCHS}
