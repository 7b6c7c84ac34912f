"""The compiled part and torch share one pool of threads, and Python runs on while it computes."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

import fbkernels as fb

POOL = """
import os
import torch
import torch.nn as nn
import fbkernels as fb

torch.set_num_threads(2)
a = torch.randn(1000, 1000)
a @ a, a.exp(), nn.functional.conv2d(torch.randn(8, 3, 32, 32, requires_grad=True), torch.randn(9, 3, 3, 3)).sum().backward()
before = len(os.listdir("/proc/self/task"))
model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1568, 9))
net = fb.convert(model, rule=fb.Joint(signal="output"))
criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
for _ in range(3):
    criterion(net(torch.randn(64, 3, 32, 32)), torch.zeros(64, dtype=torch.int64)).backward()
fb.FusedMLP((300, 200, 100)).fit(torch.randn(64, 300), torch.randn(64, 100), steps=20, batch_size=64)
after = len(os.listdir("/proc/self/task"))
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libiomp" in line or "libomp" in line}
print(before, after, len(runtimes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_there_is_one_pool_of_threads() -> None:
    run = subprocess.run([sys.executable, "-P", "-c", POOL], capture_output=True, text=True, check=True)
    before, after, runtimes = map(int, run.stdout.split())
    assert after == before, "the compiled part started threads of its own"
    assert runtimes == 1, "two OpenMP runtimes: the threads of one spin while the other's work"


def test_python_runs_while_the_compiled_part_computes() -> None:
    net = fb.FusedMLP((500, 300, 100), activations="relu", rule=fb.Fixed(), lr=1e-6)
    x, y = torch.randn(256, 500), torch.randn(256, 100)
    worker = threading.Thread(target=lambda: net.fit(x, y, steps=300, batch_size=256))
    worker.start()
    turns = 0
    while worker.is_alive():
        turns += 1
    # under a lock that is held for the 50 ms between two looks for Ctrl-C it would be a few
    assert turns > 1000
    assert net.step == 300


def test_a_network_for_each_thread() -> None:
    """Custom functions go through the mode of their own thread, and those of a thread without one are torch's own."""
    errors = list[BaseException]()

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: object, g: torch.Tensor) -> torch.Tensor:
            return 2 * g

    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Double.apply(super().forward(x))

    def work(seed: int) -> None:
        try:
            net = fb.convert(torch.nn.Sequential(Doubled(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4)), seed=seed)
            criterion = fb.PerturbedLoss(torch.nn.CrossEntropyLoss(), net)
            for _ in range(20):
                criterion(net(torch.randn(5, 8)), torch.arange(5) % 4).backward()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    x = torch.randn(3, requires_grad=True)
    y = Double.apply(x)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((3,), 2.0))
    assert torch.equal(torch.compile(lambda x: Double.apply(x), fullgraph=True, backend="aot_eager")(x), y)
