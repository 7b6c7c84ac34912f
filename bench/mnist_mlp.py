"""The paper's MNIST experiment by ``FusedMLP``: ``python bench/mnist_mlp.py --data-dir D [--steps 100000] [--seeds 1] [--device cuda]``.

784-50-20-10, sigmoid, sigmoid, linear; 1/2 squared error summed over batches of 32; SGD, lr 4e-4; layerwise ridge, gamma 0.1, warm-up of
1,000 steps; the first 55,000 training images to learn from, the published test set, on clean outputs, to be judged by (SPEC 8). Writes
results/mnist_mlp.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fbkernels as fb
from fbkernels.data import load

SIGMAS = (1e-4, 1e-3, 1e-2, 0.05, 1e-1)
PUBLISHED = {"ridge 0.0001": 3.51, "ridge 0.001": 3.51, "ridge 0.01": 3.64, "feedback alignment": 4.28, "backprop": 2.65}


def methods() -> dict[str, dict[str, Any]]:
    learned = {f"ridge {sigma:g}": {"rule": fb.Ridge(0.1), "noise_std": sigma, "warmup": 1000} for sigma in SIGMAS}
    return learned | {"feedback alignment": {"rule": fb.Fixed()}, "backprop": {"rule": fb.WeightTransport()}}


def run(options: dict[str, Any], seed: int, data: dict[str, torch.Tensor], steps: int) -> dict[str, Any]:
    net = fb.FusedMLP((784, 50, 20, 10), activations="sigmoid", lr=4e-4, seed=seed, device=data["x"].device, **options)
    start = time.perf_counter()
    losses = net.fit(data["x"], data["y"], steps=steps, batch_size=32)
    seconds = time.perf_counter() - start
    angles = [row["angle"] for row in net.alignment(data["test_x"][:1000], data["test_y"][:1000]).values()]
    return {
        "seed": seed,
        "seconds": seconds,
        "steps_per_second": steps / seconds,
        "train_loss": float(losses[-1000:].mean()) / 32,
        "test_error": 100 * (1 - net.evaluate(data["test_x"], data["test_y"])["accuracy"]),
        "angles": angles,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mnist_mlp.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    mnist = load("mnist", args.data_dir)
    x, test_x = (mnist.to_float(t).flatten(1) for t in (mnist.train_x[:55_000], mnist.test_x))
    data = {"x": x, "y": mnist.train_y[:55_000], "test_x": test_x, "test_y": mnist.test_y}
    data = {name: t.to(args.device) for name, t in data.items()}

    console = Console()
    where = f"{args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    table = Table(title=f"{args.steps:,} steps, {where}, {args.seeds} seeds")
    for column in ("method", "seconds", "steps/s", "test error %", "published %", "angle of layer 1, 2"):
        table.add_column(column, justify="left" if column == "method" else "right")
    results = {}
    for name, options in methods().items():
        with console.status(name):
            runs = results[name] = [run(options, seed, data, args.steps) for seed in range(args.seeds)]
        mean = {key: statistics.mean(r[key] for r in runs) for key in ("seconds", "steps_per_second", "test_error")}
        spread = f" ± {statistics.stdev(r['test_error'] for r in runs) / len(runs) ** 0.5:.2f}" if len(runs) > 1 else ""
        angles = ", ".join(f"{statistics.mean(layer):.0f}" for layer in zip(*(r["angles"] for r in runs), strict=True))
        published = f"{PUBLISHED[name]:.2f}" if name in PUBLISHED else "-"
        table.add_row(
            name, f"{mean['seconds']:.1f}", f"{mean['steps_per_second']:,.0f}", f"{mean['test_error']:.2f}{spread}", published, angles
        )
    console.print(table)
    hardware = {"processor": platform.processor() or platform.machine(), "where": where}
    settings = {"steps": args.steps, "seeds": args.seeds, "batch_size": 32, "lr": 4e-4, "gamma": 0.1, "warmup": 1000}
    record = {"settings": settings, "hardware": hardware, "torch": torch.__version__, "build": fb.build_info(), "results": results}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
