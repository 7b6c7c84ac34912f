"""``FusedMLP`` against eager steps of the same network: ``pytest bench/bench_fused_mlp.py --benchmark-json=FILE``.

Rivals: layerwise ridge by hand with each solver, backprop by autograd and by hand, all with one and with two threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fbkernels as fb
from fbkernels.bench.rivals import HandMLP, RidgeMLP, Step, backprop, bare_backprop, mlp
from fbkernels.bench.timing import fastest, in_turns, repeat, roofline

BATCH, CALLS, EXAMPLES = 32, 100, 6400
Batches = Callable[[], tuple[Tensor, Tensor]]
CLASSIFIER = ((784, 50, 20, 10), ("sigmoid", "sigmoid", "identity"))
AUTOENCODER = ((784, 200, 2, 200, 784), ("tanh", "identity", "tanh", "relu"))


def images() -> Tensor:
    """As sparse as MNIST's, of which 19 % of the pixels are not zero."""
    torch.manual_seed(1)
    return torch.rand(EXAMPLES, 784) * (torch.rand(EXAMPLES, 784) < 0.19)


def criterion(loss: str) -> Callable[[Tensor, Tensor], Tensor]:
    if loss == "mse":
        return lambda y, t: F.mse_loss(y, t, reduction="sum") / 2
    return lambda y, t: F.cross_entropy(y, t, reduction="sum")


def on(threads: int, run: Step) -> Step:
    def threaded() -> None:
        torch.set_num_threads(threads)
        run()

    return threaded


def rivals(
    network: tuple, loss: str, x: Tensor, target: Tensor, labels: Tensor, lr: float, std: float, solvers: tuple
) -> tuple[dict[str, Step], list[Tensor]]:
    """``CALLS`` steps each on consecutive batches of an array that is shuffled already, and the weights they train."""
    sizes, activations = network
    weights: list[Tensor] = []

    def batches(t: Tensor) -> Batches:
        places = itertools.cycle(range(0, EXAMPLES, BATCH))
        return lambda: (x[(i := next(places)) : i + BATCH], t[i : i + BATCH])

    def by_hand(step: HandMLP) -> Step:
        weights.extend(step.W)
        take = batches(target)
        return lambda: step(*take())

    contenders = {}
    for threads in (1, 2):
        net = mlp(sizes, activations)
        weights.extend(net.parameters())
        fit = (criterion(loss), batches(labels if loss == "cross_entropy" else target), lr)
        steps = {
            "backprop with torch.optim": backprop(net, *fit),
            "backprop by autograd": bare_backprop(net, *fit),
            "backprop by hand": by_hand(HandMLP(net, activations, loss, BATCH, lr)),
        }
        for solver in solvers:
            steps[f"ridge {solver}"] = by_hand(RidgeMLP(net, activations, loss, BATCH, lr, std, solver))
        contenders |= {f"{name}, {threads} threads": on(threads, repeat(step, CALLS)) for name, step in steps.items()}
    return contenders, weights


def ours(network: tuple, loss: str, x: Tensor, y: Tensor, lr: float, std: float) -> Step:
    sizes, activations = network
    net = fb.FusedMLP(
        sizes, activations=activations, loss=loss, feedback="layerwise", rule=fb.Ridge(), noise_std=std, optimizer="sgd", lr=lr, seed=0
    )
    return lambda: net.fit(x, y, steps=CALLS, batch_size=BATCH)


def compare(benchmark: Any, network: tuple, loss: str, target: Tensor | None, lr: float, std: float, solvers: tuple) -> None:
    x = images()
    labels = torch.randint(10, (EXAMPLES,))
    target = x if target is None else target[labels]
    contenders = {
        f"ours, {threads} threads": on(threads, ours(network, loss, x, labels if loss == "cross_entropy" else target, lr, std))
        for threads in (1, 2)
    }
    eager, weights = rivals(network, loss, x, target, labels, lr, std, solvers)
    times = in_turns(contenders | eager, 15)
    assert all(W.isfinite().all() for W in weights)
    mine = fastest(times, "ours")
    kinds = ("backprop with torch.optim", "backprop by autograd", "backprop by hand", *(f"ridge {solver}" for solver in solvers))
    benchmark.extra_info |= {
        "median_us": {name: t / CALLS * 1e6 for name, t in times.items()},
        "speedup": {kind: fastest(times, kind) / mine for kind in kinds},
        "steps_per_second": CALLS / mine,
        "build": fb.build_info(),
        **{f"{name}_{threads}_threads": rate for threads in (1, 2) for name, rate in roofline(threads).items()},
    }
    benchmark.pedantic(min(contenders.items(), key=lambda item: times[item[0]])[1], rounds=15)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_classifier(benchmark: Any, loss: str) -> None:
    compare(benchmark, CLASSIFIER, loss, torch.eye(10), 4e-4, 0.01, ("solve", "cholesky", "blocked"))


def test_autoencoder(benchmark: Any) -> None:
    compare(benchmark, AUTOENCODER, "mse", None, 1e-6, 0.0189, ("solve", "cholesky", "blocked"))
