"""What a smaller B costs and gains: ``python bench/share.py --data-dir D``.

A convnet (conv3x3 32-64-64 with ReLU and 2x2 max-pooling, fc 128) is trained by backprop for a while and then kept; B learns by Joint. The
angle between learned and true gradients on 256 held-out training images, by layer, as samples pass. The best that a B of this form can do
(the least-squares map from e, fitted on the same images, of 100 classes on 4,096 of those trained on) is its floor. *share*: noise and B
over patches, on CIFAR-10. *rank*: B of low rank, on CIFAR-100, with the time of a step. Writes results/share.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fbkernels as fb
from fbkernels import reference
from fbkernels.bench.timing import in_turns
from fbkernels.lab.data import load
from fbkernels.loss import network_of

OUTPUT, LOSS = {"lr": 0.2, "signal": "output"}, {"lr": 0.2, "signal": "loss"}
CASES: dict[str, list[tuple[int | str | None, dict[str, Any]]]] = {
    "share": [(1, OUTPUT), (2, OUTPUT), (4, OUTPUT), ("channel", OUTPUT)],
    "rank": [(None, OUTPUT), (50, OUTPUT), (20, OUTPUT), (10, OUTPUT), (None, LOSS), (20, LOSS)],
}
DATA = {"share": "cifar10", "rank": "cifar100"}
BATCH, NOISE_STD = 64, 0.05


def network(classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, classes))


def batches(x: Tensor, y: Tensor, steps: int) -> Any:
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,))
        yield x[rows], y[rows]


def gradients(net: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """e and dL/dh of each hidden layer, by backprop in float64."""
    net = fb.revert(net).double()
    hidden: list[Tensor] = []

    def keep(module: nn.Module, args: Any, h: Tensor) -> None:
        h.retain_grad()
        hidden.append(h)

    for i in (2, 5, 8, 11):
        net[i].register_forward_hook(keep)
    errors, grads = [], []
    for a, b in zip(x.split(256), y.split(256), strict=True):
        hidden.clear()
        z = net(a.double())
        nn.functional.cross_entropy(z, b, reduction="sum").backward()
        errors.append(z.detach().softmax(1) - nn.functional.one_hot(b, z.shape[1]))
        grads.append([h.grad for h in hidden])
    return torch.cat(errors), [torch.cat(layer) for layer in zip(*grads, strict=True)]


def floor(net: nn.Module, fit: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> list[float]:
    """The angle on ``test`` that is left with the best B, by layer; the least-squares map, of ``fit``."""
    net = copy.deepcopy(net)
    share, basis = network_of(net).settings.share, next(iter(fb.points(net).values())).basis
    (e, ts), (r, gs) = gradients(net, *fit), gradients(net, *test)
    if basis is not None:
        e, r = e @ basis, r @ basis
    angles = []
    for t, g in zip(ts, gs, strict=True):
        s = 1 if g.ndim == 2 else share
        size = reference.units(torch.ones_like(g[:1]), share=s)
        best = reference.layout(r @ (torch.linalg.pinv(e) @ reference.units(t, share=s)) / size, g.shape, share=s)
        angles.append(math.degrees(math.acos(min(1.0, float((best * g).sum() / (best.norm() * g.norm()))))))
    return angles


def trained(classes: int, x: Tensor, y: Tensor) -> nn.Sequential:
    torch.manual_seed(0)
    model, criterion = network(classes), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for a, b in batches(x, y, 300):
        optimizer.zero_grad()
        criterion(model(a), b).backward()
        optimizer.step()
    return model


def measure(what: str, args: argparse.Namespace) -> dict[str, Any]:
    cifar = load(DATA[what], args.data_dir)
    x, test_x = (cifar.to_float(t) for t in (cifar.train_x[:20_000], cifar.train_x[-256:]))
    y, test_y = cifar.train_y[:20_000], cifar.train_y[-256:]
    fit = (x[:4096], y[:4096]) if what == "rank" else (test_x, test_y)
    model, criterion, rows, timed = trained(cifar.classes, x, y), nn.CrossEntropyLoss(), [], {}
    for value, joint in CASES[what]:
        torch.manual_seed(1)
        net = fb.convert(model, rule=fb.Joint(**joint), noise_std=NOISE_STD, warmup=10**9, **{what: value})
        perturbed, angles, done = fb.PerturbedLoss(criterion, net), {}, 0
        for steps in args.steps:
            for a, b in batches(x, y, steps - done):
                perturbed(net(a), b).backward()
            done = steps
            angles[steps * BATCH] = [row["angle"] for row in fb.metrics.alignment(net, criterion, test_x, test_y).values()]
        summary = fb.summary(net)
        units, memory = sum(p.units for p in summary), sum(p.bytes for p in summary)
        row = {what: value, "signal": joint["signal"], "noisy_units": units, "B_bytes": memory, "angles": angles}
        rows.append(row | {"floor": floor(net, fit, (test_x, test_y))})
        timed[str(len(timed))] = lambda net=net, loss=perturbed: loss(net(x[:BATCH]), y[:BATCH]).backward()
        print(json.dumps(rows[-1]), flush=True)
    if what == "rank":  # processor time, which a neighbour disturbs less than the clock on the wall
        for row, t in zip(rows, in_turns(timed, 40, processor_seconds).values(), strict=True):
            row["step_cpu_seconds"] = t
    settings = {
        "data": DATA[what],
        "batch_size": BATCH,
        "noise_std": NOISE_STD,
        "lr": 0.2,
        "backprop_steps": 300,
        "threads": torch.get_num_threads(),
    }
    return {"settings": settings, "torch": torch.__version__, "build": fb.build_info(), "rows": rows}


def processor_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*CASES], help="and keep the rest of the file")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 200, 600])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "share.json")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for what in [args.only] if args.only else CASES:
        results[what] = measure(what, args)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
