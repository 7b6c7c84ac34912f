"""What sharing noise and B over patches costs and gains: ``python bench/share.py --data-dir D``.

A convnet (conv3x3 32-64-64 with ReLU and 2x2 max-pooling, fc 128) on the first training images of CIFAR-10, Joint on the outputs, SGD with
momentum; accuracy on the last 5,000 training images, angles on 256 of them. Writes results/share.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fbkernels as fb
from fbkernels.data import load

SHARES: tuple[int | str, ...] = (1, 2, 4, "channel")


def network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10))


def run(share: int | str | None, seed: int, data: tuple[torch.Tensor, ...], epochs: int) -> dict[str, Any]:
    """share None: backprop."""
    x, y, test_x, test_y = data
    torch.manual_seed(seed)
    model = network()
    net = model if share is None else fb.convert(model, rule=fb.Joint(0.2, "output"), share=share, seed=seed)
    criterion: Any = nn.CrossEntropyLoss() if share is None else fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // 64))
    history = []
    for _ in range(epochs):
        net.train()
        for rows in torch.randperm(len(x))[: len(x) // 64 * 64].view(-1, 64):
            loss = criterion(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            accuracy = 100 * float((net(test_x).argmax(1) == test_y).float().mean())
        aligned = {} if share is None else fb.metrics.alignment(net, nn.CrossEntropyLoss(), test_x[:256], test_y[:256])
        angles = [row["angle"] for row in aligned.values()]
        history.append({"accuracy": accuracy, "angles": angles})
    points = [] if share is None else fb.summary(net)
    return {"seed": seed, "history": history, "noisy_units": sum(p.units for p in points), "B_bytes": sum(p.bytes for p in points)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "share.json")
    args = parser.parse_args()
    cifar = load("cifar10", args.data_dir)
    x, test_x = (cifar.to_float(t) for t in (cifar.train_x[: args.images], cifar.train_x[-5000:]))
    data = (x, cifar.train_y[: args.images], test_x, cifar.train_y[-5000:])
    console, results = Console(), {}
    table = Table(title=f"{args.images:,} images, {args.epochs} epochs, {args.seeds} seeds, validation")
    for column in ("share", "noisy units", "B, MiB", "accuracy %", "angle of layer 1, 2, ..."):
        table.add_column(column, justify="right")
    for share in (None, *SHARES):
        name = "backprop" if share is None else str(share)
        with console.status(name):
            runs = results[name] = [run(share, seed, data, args.epochs) for seed in range(args.seeds)]
        last = [r["history"][-1] for r in runs]
        angles = ", ".join(f"{statistics.mean(a):.0f}" for a in zip(*(h["angles"] for h in last), strict=True))
        units, memory = (f"{runs[0]['noisy_units']:,}", f"{runs[0]['B_bytes'] / 2**20:.2f}") if share is not None else ("-", "-")
        table.add_row(name, units, memory, f"{statistics.mean(h['accuracy'] for h in last):.1f}", angles)
        console.print(name, last)
    console.print(table)
    settings = {"images": args.images, "epochs": args.epochs, "seeds": args.seeds, "batch_size": 64, "lr": 0.02, "noise_std": 0.05}
    record = {
        "settings": settings,
        "torch": torch.__version__,
        "build": fb.build_info(),
        "threads": torch.get_num_threads(),
        "results": results,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
