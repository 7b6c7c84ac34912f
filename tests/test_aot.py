"""Every Triton kernel and configuration, compiled for GPUs that need not be here.

``python tests/test_aot.py WORD...`` prints what was read of the launches whose names have these words.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from aot import SHARED, compile_all
from filelock import FileLock

from fbkernels import kernels

STEP = torch.tensor(0)
KINDS = ("gaussian", "rademacher")


def noise(kind: str, samples: int, units: int, offset: int = 0) -> None:
    kernels.noise(torch.empty(samples, units), STEP, 2**63 - 1, 2, 0.1, kind, offset)


def cross_entropy(K: int, dtype: torch.dtype, rows: int, antithetic: bool = False) -> None:
    y, perturbed = torch.empty(64, K, dtype=dtype), torch.empty(rows * (1 + antithetic), K, dtype=dtype)
    kernels.perturbed_cross_entropy(y, perturbed if rows else None, torch.empty(64, dtype=torch.int64), antithetic, torch.ones(()))


def ridge_gain(m: int) -> None:
    kernels.ridge_gain(torch.empty(64, m), torch.empty(64), torch.empty(m, m, dtype=torch.float64), 0.1, 0.99)


# name: a call of a launcher on the CPU, whose launches are compiled and not run
LAUNCHES = {
    f"noise {kind}, {samples} x {units}, offset {offset}": partial(noise, kind, samples, units, offset)
    for kind in KINDS
    for samples, units, offset in ((64, 1024, 0), (33, 1027, 2**33))
}
LAUNCHES |= {
    f"cross-entropy of {K} classes, {dtype}, {rows} rows, antithetic {antithetic}": partial(cross_entropy, K, dtype, rows, antithetic)
    for K in (1, 10, 100, 1000)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, antithetic in ((0, False), (64, False), (31, True))
}
LAUNCHES |= {f"ridge gains of {m} regressors": partial(ridge_gain, m) for m in (1, 10, 20, 50, 100, 128, 300)}


@triton.jit
def spilling_kernel(a, b, out, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    tile = o[:, None] * SIZE + o[None, :]
    tl.store(out + tile, tl.dot(tl.load(a + tile), tl.load(b + tile)))


def spilling() -> None:
    spilling_kernel[(1,)](*(torch.empty(128, 128, dtype=torch.bfloat16) for _ in range(3)), SIZE=128, num_warps=4, maxnreg=96)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Compiled in a process without the interpreter, once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    file = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "aot"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            file.write_text(subprocess.run([sys.executable, __file__], env=env, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return [json.loads(line) for line in file.read_text().splitlines()]


def of(rows: list[dict[str, Any]], name: str, sm: int) -> list[dict[str, Any]]:
    mine = [row for row in rows if (row["name"], row["sm"]) == (name, sm)]
    assert mine and not any("error" in row for row in mine), mine
    return mine


@pytest.mark.parametrize("sm", SHARED)
@pytest.mark.parametrize("name", LAUNCHES)
def test_fits_and_uses_the_tensor_cores(rows: list[dict[str, Any]], name: str, sm: int) -> None:
    for row in of(rows, name, sm):
        assert (row["spills"], row["stack"]) == (0, 0), row
        assert row["shared"] <= SHARED[sm], row
        assert row["mma"] >= row["dots"], row
        assert sm < 90 or row["dots_past_wgmma"] == 0, row


@pytest.mark.parametrize("sm", SHARED)
def test_what_is_read_is_there(rows: list[dict[str, Any]], sm: int) -> None:
    (row,) = of(rows, "spilling", sm)
    assert (row["constants"], row["warps"], row["dots"], row["dots_past_wgmma"]) == ({"SIZE": 128}, 4, 1, int(sm < 90))
    # 128 sums a thread in 96 registers
    assert row["registers"] == 96 and row["spills"] > 0 and row["stack"] > 0
    assert row["shared"] == 2 * 2 * 128**2
    # m16n8k16 in each of four warps, m64n128k16
    assert (row["wgmma"], row["mma"]) == {80: (0, 256), 90: (16, 16)}[sm]


@pytest.mark.parametrize("sm", SHARED)
@pytest.mark.parametrize("kind", KINDS)
def test_noise_costs_tens_of_instructions(rows: list[dict[str, Any]], kind: str, sm: int) -> None:
    (row,) = of(rows, f"noise {kind}, 64 x 1024, offset 0", sm)
    numbers = row["constants"]["BN"] * row["constants"]["BU"] / (32 * row["warps"])
    # Philox: ten rounds of two wide products, two three-operand xors, two key increments. Box-Muller, a pair: polynomials of 8, 4 and 4,
    # 12 to reduce and convert each of the arguments of log and cosine, 6 of a root, 10 of quarter turns and signs. A sign: shift, test,
    # select. Then a number's store and mask, and a thread's addresses and exchange of words.
    philox, pair, sign, store, thread = 60, 16 + 2 * 12 + 6 + 10, 3, 2, 80
    bound = {"gaussian": philox / 4 + pair / 2 + store + thread / numbers, "rademacher": (philox + thread) / numbers + sign + store}
    assert row["instructions"] / numbers <= bound[kind], row


if __name__ == "__main__":
    chosen = {name: launch for name, launch in {**LAUNCHES, "spilling": spilling}.items() if all(word in name for word in sys.argv[1:])}
    for row in compile_all(chosen):
        print(json.dumps(row), flush=True)
