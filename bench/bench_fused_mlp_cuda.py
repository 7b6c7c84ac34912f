"""``FusedMLP`` on a GPU: ``pytest bench/bench_fused_mlp_cuda.py --benchmark-json=FILE``.

Rivals: backprop compiled with "reduce-overhead", backprop by hand in a CUDA graph, both fed from one buffer as graphs need it, and the
layerwise ridge by hand in eager torch. Beside ours stands the same launch on a network of one unit a layer, whose steps are phases and
barriers alone: the floor for that number of blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fbkernels as fb
from fbkernels.bench.bench_fused_mlp import AUTOENCODER, BATCH, CLASSIFIER, EXAMPLES, criterion, images
from fbkernels.bench.rivals import HandMLP, RidgeMLP, Step, mlp
from fbkernels.bench.timing import in_turns, launches, repeat, seconds

CALLS, BLOCKS = 200, (1, 2, 4, 8, 16, 32, 64, 128)


def ours(network: tuple, loss: str, x: Tensor, y: Tensor, lr: float, std: float, blocks: int = 0, calls: int = CALLS) -> Step:
    sizes, activations = network
    net = fb.FusedMLP(sizes, activations=activations, loss=loss, rule=fb.Ridge(), noise_std=std, lr=lr, device=x.device)
    net._blocks = blocks
    return lambda: net.fit(x, y, steps=calls, batch_size=min(BATCH, len(x)))


def floor(network: tuple, loss: str, blocks: int, device: str) -> Step:
    sizes, activations = network
    data = torch.zeros(1, 1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    return ours(((1,) * len(sizes), activations), loss, *data, 1e-6, 0.01, blocks)


def rivals(
    network: tuple, loss: str, x: Tensor, target: Tensor, lr: float, std: float, compiler: dict[str, Any] | None
) -> dict[str, Callable[[], Step]]:
    """Builders of steps on consecutive batches of an array that is shuffled already; ``compiler``: of torch.compile, None for the CPU."""
    sizes, activations = network

    def batches() -> Callable[[], tuple[Tensor, Tensor]]:
        places = itertools.cycle(range(0, EXAMPLES, BATCH))
        return lambda: (x[(i := next(places)) : i + BATCH], target[i : i + BATCH])

    def buffered(step: Callable[[Tensor, Tensor], Any]) -> Step:
        take = batches()
        inputs = [t.clone() for t in take()]

        def run() -> None:
            torch._foreach_copy_(inputs, take())
            step(*inputs)

        return run

    def compiled() -> Step:
        net = mlp(sizes, activations).to(x.device)
        parameters = list(net.parameters())

        def step(x: Tensor, y: Tensor) -> None:
            gradients = torch.autograd.grad(criterion(loss)(net(x), y), parameters)
            with torch.no_grad():
                torch._foreach_add_(parameters, gradients, alpha=-lr)

        return buffered(step if compiler is None else torch.compile(step, **compiler))

    def graph() -> Step:
        with x.device:
            by_hand = HandMLP(mlp(sizes, activations), activations, loss, BATCH, lr)
        if not x.is_cuda:
            return buffered(by_hand)
        take = batches()
        inputs = [t.clone() for t in take()]
        for _ in range(3):
            by_hand(*inputs)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            by_hand(*inputs)
        return lambda: (torch._foreach_copy_(inputs, take()), captured.replay())

    def ridge(solver: str) -> Step:
        with x.device:
            by_hand = RidgeMLP(mlp(sizes, activations), activations, loss, BATCH, lr, std, solver)
        take = batches()
        return lambda: by_hand(*take())

    return {
        "backprop, compiled": compiled,
        "backprop by hand, CUDA graph": graph,
        "ridge solve, eager": lambda: ridge("solve"),
        "ridge cholesky, eager": lambda: ridge("cholesky"),
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("network", "loss", "lr", "std"),
    [(CLASSIFIER, "mse", 4e-4, 0.01), (AUTOENCODER, "mse", 1e-6, 0.0189)],
    ids=["classifier", "autoencoder"],
)
def test_step(benchmark: Any, network: tuple, loss: str, lr: float, std: float) -> None:
    x = images().cuda()
    target = x if network is AUTOENCODER else torch.eye(10, device="cuda")[torch.randint(10, (EXAMPLES,), device="cuda")]
    clock = lambda run: seconds(lambda: (run(), torch.cuda.synchronize()))  # noqa: E731
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    sweep = [n for n in BLOCKS if n <= processors] + [processors]
    runs = {"ours": ours(network, loss, x, target, lr, std)}
    runs |= {f"ours, {n} blocks": ours(network, loss, x, target, lr, std, n) for n in sweep}
    runs |= {f"floor, {n} blocks": floor(network, loss, n, "cuda") for n in sweep}
    failed = {}
    for name, build in rivals(network, loss, x, target, lr, std, {"mode": "reduce-overhead", "fullgraph": True}).items():
        try:
            step = build()
            step()
            runs[name] = repeat(step, CALLS)
        except Exception as error:  # a rival that this torch cannot run is reported, not fatal
            failed[name] = str(error)[:300]
    times = in_turns(runs, 1 if benchmark.disabled else 9, clock)
    assert sum("fused_mlp_kernel" in name for name in launches(runs["ours"])) == 1  # for all the steps of a call
    benchmark.extra_info |= {
        "us_a_step": {name: t / CALLS * 1e6 for name, t in times.items()},
        "times_ours": {name: t / times["ours"] for name, t in times.items()},
        "steps_per_second": CALLS / times["ours"],
        "failed": failed,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "build": fb.build_info(),
    }
    benchmark.pedantic(lambda: (runs["ours"](), torch.cuda.synchronize()), rounds=5)
