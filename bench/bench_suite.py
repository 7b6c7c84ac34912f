"""Ops, layers, steps and sweeps, each by all providers of suite.py: ``pytest bench/bench_suite.py --benchmark-json=FILE``.

The benchmark's own time is that of the first provider; ``extra_info`` has a row for each. On a GPU the clock is the GPU's.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from fbkernels.bench import suite, timing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THREADS = torch.get_num_threads()  # before other files change it
OPS = suite.model("paper_cnn", 64, DEVICE)
LAYERS = {"linear": suite.mlp((4096, 2048, 2048, 100), 64, DEVICE), "conv": OPS}
STEPS = {
    "mlp": suite.model("mlp", 32, DEVICE),
    "cnn": suite.model("cnn", 64, DEVICE),
    "paper_cnn": OPS,
    "resnet20": suite.model("resnet20", 64, DEVICE),
}
pytestmark = pytest.mark.benchmark(timer=time.perf_counter if DEVICE == "cpu" else timing.EventClock())


def record(benchmark: Any, cases: dict[str, suite.Case]) -> None:
    torch.set_num_threads(THREADS)
    rows = {name: suite.measure(case, DEVICE) for name, case in cases.items()}
    case = next(iter(cases.values()))
    benchmark.extra_info |= suite.machine(DEVICE)
    benchmark.extra_info["cases"] = [{"name": c.name, "baseline": c.baseline, "rows": rows[n], "at": n} for n, c in cases.items()]
    cold = None if DEVICE == "cpu" else timing.cold
    benchmark.pedantic(next(iter(case.providers.values())).build(), setup=cold, rounds=5, warmup_rounds=1)
    mine = [row for own in rows.values() for row in own if not row["provider"].startswith("BioTorch")]
    assert not [row for row in mine if "failed" in row]


@pytest.mark.parametrize("name", suite.op_names(OPS))
def test_op(benchmark: Any, name: str) -> None:
    record(benchmark, {name: suite.op(name, OPS)})


@pytest.mark.parametrize("name", LAYERS)
def test_layer(benchmark: Any, name: str) -> None:
    record(benchmark, {name: suite.layer(LAYERS[name])})


@pytest.mark.parametrize("name", STEPS)
def test_step(benchmark: Any, name: str) -> None:
    record(benchmark, {name: suite.step(STEPS[name])})


@pytest.mark.parametrize("axis", suite.SWEEPS)
def test_sweep(benchmark: Any, axis: str) -> None:
    record(benchmark, {str(value): suite.sweep(axis, value, DEVICE) for value in suite.SWEEPS[axis]})
