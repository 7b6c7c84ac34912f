"""A whole training step of the paper's CIFAR-100 convnet: ``pytest bench/bench_cnn.py --benchmark-json=FILE``.

Rivals: backprop as the network is written, in both layouts, and with its relus after the pools; the careful eager learned-feedback step.
``python bench/bench_cnn.py NAME`` prints the peak memory of one of them, alone in its process.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fbkernels as fb
from fbkernels.bench.rivals import LearnedFeedbackCNN, Step, backprop, cnn
from fbkernels.bench.timing import in_turns, kept_heap, peak_memory, rate, roofline

BATCH, STD = 64, 0.05
LR = 1e-4  # 0.01 diverges within ten steps of the per-layer ridge from B = 0; no time depends on it
CHANNELS_LAST = torch.channels_last


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(BATCH, 3, 32, 32).contiguous(memory_format=CHANNELS_LAST), torch.randint(100, (BATCH,))


def network(pool_first: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return cnn(pool_first).to(memory_format=CHANNELS_LAST)


def ours(rule: fb.Rule) -> Step:
    x, y = batch()
    net = fb.convert(network(), feedback="direct", rule=rule, noise_std=STD, warmup=0)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    return backprop(net, criterion, lambda: (x, y), LR, fused=True)


def plain(*, pool_first: bool = False, channels_last: bool = True) -> Step:
    x, y = batch()
    net = network(pool_first)
    if not channels_last:
        net, x = net.to(memory_format=torch.contiguous_format), x.contiguous()
    return backprop(net, nn.CrossEntropyLoss(), lambda: (x, y), LR, fused=True)


CONTENDERS: dict[str, Callable[[], Step]] = {
    "ours ridge": lambda: ours(fb.Ridge()),
    "ours joint": lambda: ours(fb.Joint(signal="output")),
    "backprop": plain,
    "backprop nchw": lambda: plain(channels_last=False),
    "backprop pool first": lambda: plain(pool_first=True),
    "eager ridge": lambda: LearnedFeedbackCNN(network(), *batch(), "ridge", STD, LR),
    "eager joint": lambda: LearnedFeedbackCNN(network(), *batch(), "joint", STD, LR),
}


def multiply_adds() -> tuple[float, float]:
    """1e9 multiply-adds of a backprop step and of a learned-feedback step (SPEC 1: the first layer once, no input gradients)."""
    layers = [32**2 * 75 * 96, 16**2 * 2400 * 128, 8**2 * 3200 * 256, 4096 * 2048, 2048 * 2048, 2048 * 100]
    units = 24576 + 8192 + 4096 + 2048 + 2048
    feedback = units * 100 * (2 * BATCH + 100)  # e B^T, Xi^T G, B (I - M)
    steps = BATCH * (3 * sum(layers) - layers[0])
    return steps / 1e9, (steps + feedback) / 1e9


def convolution_rate() -> float:
    """1e9 multiply-adds a second of oneDNN's convolution on the largest layer."""
    x, w = (torch.rand(s).contiguous(memory_format=CHANNELS_LAST) for s in ((BATCH, 96, 16, 16), (128, 96, 5, 5)))
    with torch.no_grad():
        return rate(BATCH * 16**2 * 2400 * 128, lambda: F.conv2d(x, w, padding=2))


@pytest.mark.parametrize("heap", ["default", "kept"])
def test_step(benchmark: Any, heap: str) -> None:
    torch.set_num_threads(2)
    steps = {name: build() for name, build in CONTENDERS.items()}
    with kept_heap() if heap == "kept" else contextlib.nullcontext():
        convolution = convolution_rate()
        times = in_turns(steps, 15)
        assert all(step().isfinite() for step in steps.values())
        benchmark.pedantic(steps["ours ridge"], rounds=5)
    gmac = dict(zip(("backprop", "learned_feedback"), multiply_adds(), strict=True))
    as_written = min(times["backprop"], times["backprop nchw"])
    benchmark.extra_info |= {
        "median_ms": {name: t * 1e3 for name, t in times.items()},
        "time_over_backprop": {name: t / as_written for name, t in times.items()},
        "speedup_over_eager": {rule: times[f"eager {rule}"] / times[f"ours {rule}"] for rule in ("ridge", "joint")},
        "gmac": gmac,
        "convolution_gmac_s": convolution,
        "ms_at_convolution_rate": {name: g / convolution * 1e3 for name, g in gmac.items()},
        "heap": heap,
        "threads": torch.get_num_threads(),
        "build": fb.build_info(),
        **roofline(2),
    }


def test_memory(benchmark: Any) -> None:
    peak = {}

    def measure() -> None:
        for name in CONTENDERS:
            peak[name] = json.loads(subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True).stdout)

    benchmark.pedantic(measure, rounds=1)
    B, statistics = 4 * (24576 + 8192 + 4096 + 2048 + 2048) * 100, 8 * 100**2
    benchmark.extra_info |= {
        "peak_mib": {name: p / 2**20 for name, p in peak.items()},
        "limit_mib": (min(peak["backprop"], peak["backprop nchw"]) + B + statistics) / 2**20,
    }


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(peak_memory(CONTENDERS[sys.argv[1]]))
