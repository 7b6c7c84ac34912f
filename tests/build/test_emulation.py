"""The emulated CUDA of tests/support/emulation says what the hardware would not survive."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
#include "cuda.h"
#include <cstdio>
struct Launch { int* out; int threads; };
__global__ void kernel(Launch p) {
  if (int(threadIdx.x) < p.threads) BARRIER;
  p.out[blockIdx.x] = 1;
}
int main(int, char** arguments) {
  int out[2] = {};
  try {
    fbk::launch(kernel, 2, 64, 0, nullptr, Launch{out, atoi(arguments[1])}, fbk::Span::grid);
    printf("%d", out[0] + out[1]);
  } catch (const std::runtime_error& error) {
    printf("%s", error.what());
  }
}
"""


@pytest.mark.parametrize("barrier", ["__syncthreads()", "__syncwarp()", "cooperative_groups::this_grid().sync()"])
def test_a_barrier_that_some_threads_do_not_reach(barrier: str, tmp_path: Path) -> None:
    (tmp_path / "program.cpp").write_text(PROGRAM)
    flags = ["-std=c++20", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'support' / 'emulation'}", f"-DBARRIER={barrier}"]
    subprocess.run(["g++", *flags, "program.cpp", "-o", "program"], cwd=tmp_path, check=True)
    said = [subprocess.run([tmp_path / "program", n], capture_output=True, text=True, check=True).stdout for n in ("64", "48", "0")]
    assert said == ["2", "CUDA: a barrier that some threads do not reach", "2"]
