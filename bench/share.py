"""What sharing noise and B over patches costs and gains: ``python bench/share.py --data-dir D``.

A convnet (conv3x3 32-64-64 with ReLU and 2x2 max-pooling, fc 128) is trained by backprop on CIFAR-10 for a while and then kept; B learns by
Joint on the outputs. The angle between learned and true gradients on 256 held-out training images, by layer, as samples pass. The best that
a B of this form can do (the least-squares map from e, fitted on the same images) is its floor. Writes results/share.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fbkernels as fb
from fbkernels import reference
from fbkernels.data import load

SHARES: tuple[int | str, ...] = (1, 2, 4, "channel")
BATCH, NOISE_STD = 64, 0.05


def network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10))


def batches(x: Tensor, y: Tensor, steps: int) -> Any:
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,))
        yield x[rows], y[rows]


def floor(net: nn.Module, share: int | str, x: Tensor, y: Tensor) -> list[float]:
    """The angle that is left with the best B, by layer."""
    net = copy.deepcopy(fb.revert(net)).double()
    hidden: list[Tensor] = []

    def keep(module: nn.Module, args: Any, h: Tensor) -> None:
        h.retain_grad()
        hidden.append(h)

    for i in (2, 5, 8, 11):
        net[i].register_forward_hook(keep)
    z = net(x.double())
    nn.functional.cross_entropy(z, y, reduction="sum").backward()
    e = z.detach().softmax(1) - nn.functional.one_hot(y, 10)
    angles = []
    for h in hidden:
        s = 1 if h.ndim == 2 else 10**6 if share == "channel" else int(share)
        t = reference.units(h.grad, share=s)
        size = reference.units(torch.ones_like(h[:1]), share=s)
        g = reference.layout(e @ (torch.linalg.pinv(e) @ t) / size, h.shape, share=s)
        angles.append(math.degrees(math.acos(min(1.0, float((g * h.grad).sum() / (g.norm() * h.grad.norm()))))))
    return angles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 200, 600])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "share.json")
    args = parser.parse_args()
    cifar = load("cifar10", args.data_dir)
    x, test_x = (cifar.to_float(t) for t in (cifar.train_x[:20_000], cifar.train_x[-256:]))
    y, test_y = cifar.train_y[:20_000], cifar.train_y[-256:]
    torch.manual_seed(0)
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for a, b in batches(x, y, 300):
        optimizer.zero_grad()
        criterion(model(a), b).backward()
        optimizer.step()

    results: dict[str, Any] = {}
    table = Table(title="angle of layers 1 to 4, degrees")
    for column in ("share", "noisy units", "B, MiB", *(f"{BATCH * n:,} samples" for n in args.steps), "floor"):
        table.add_column(column, justify="right")
    for share in SHARES:
        torch.manual_seed(1)
        net = fb.convert(model, rule=fb.Joint(0.2, "output"), share=share, noise_std=NOISE_STD, warmup=10**9)
        perturbed, angles, done = fb.PerturbedLoss(criterion, net), {}, 0
        for steps in args.steps:
            for a, b in batches(x, y, steps - done):
                perturbed(net(a), b).backward()
            done = steps
            angles[steps * BATCH] = [row["angle"] for row in fb.metrics.alignment(net, criterion, test_x, test_y).values()]
        summary = fb.summary(net)
        best = floor(net, share, test_x, test_y)
        units, memory = sum(p.units for p in summary), sum(p.bytes for p in summary)
        results[str(share)] = {"noisy_units": units, "B_bytes": memory, "angles": angles, "floor": best}
        text = lambda row: " ".join(f"{a:.0f}" for a in row)  # noqa: E731
        table.add_row(str(share), f"{units:,}", f"{memory / 2**20:.2f}", *map(text, angles.values()), text(best))
    Console().print(table)
    settings = {"batch_size": BATCH, "noise_std": NOISE_STD, "rule": "Joint(0.2, 'output')", "backprop_steps": 300}
    args.out.write_text(
        json.dumps({"settings": settings, "torch": torch.__version__, "build": fb.build_info(), "results": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
