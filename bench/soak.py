"""Whether long training leaks or drifts: ``python bench/soak.py [--minutes M]``. Writes results/soak.json.

A million steps of ``FusedMLP`` with W fixed, whose B is then compared with the ridge solution of all that it has seen, by float64 and
in one go; a million with W trained; and converted networks, each for M minutes.

``bytes_per_step``: the slope of resident memory over steps, by least squares through the means of ten blocks of samples in the second
half of the run, and the upper end of its one-sided 95 % interval (Student's t, 8 degrees of freedom). glibc's smallest allocation takes
``SMALLEST`` bytes, so with an upper end below that no allocation is lost each step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fbkernels as fb
from fbkernels import reference
from fbkernels.lab.train import hardware, versions

SMALLEST = 32
SAMPLES = 400  # of memory in a run
T8 = 1.860  # one-sided 95 % quantile of Student's t with 8 degrees of freedom
SIZES, BATCH, GAMMA, STD = (12, 8, 6, 4), 8, 0.1, 0.05


def resident() -> int:
    """Bytes, of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def slope(steps: list[int], memory: list[int]) -> tuple[float, float]:
    """Of memory over steps, and the upper end of its interval; see the head of this file."""
    first = len(steps) // 2
    x, y = (np.array([block.mean() for block in np.array_split(np.array(v[first:], float), 10)]) for v in (steps, memory))
    x -= x.mean()
    b = float(x @ y / (x @ x))
    error = math.sqrt(float(((y - y.mean() - b * x) ** 2).sum()) / 8 / float(x @ x))
    return b, b + T8 * error


def data() -> tuple[Tensor, Tensor]:
    """Classes of a random linear map of random inputs, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, SIZES[0], generator=generator)
    return x, (x @ torch.randn(SIZES[0], SIZES[-1], generator=generator)).argmax(1)


def statistics(tensors: list[Tensor]) -> dict[str, float]:
    """The largest asymmetry, relative to the norm, and the smallest eigenvalue of the ridge's symmetric matrices."""
    if not tensors:
        return {}
    return {
        "asymmetry": max(float((V - V.mT).norm() / V.norm()) for V in tensors),
        "smallest_eigenvalue": min(float(torch.linalg.eigvalsh(V).min()) for V in tensors),
    }


def watched(steps: int | None, minutes: float, advance: Callable[[int], float], chunk: int) -> dict[str, Any]:
    """Take steps by the chunk, so many or for so long, and look at memory SAMPLES times. ``advance`` returns the mean loss."""
    at, memory, done, bad, looked, first, begin = list[int](), list[int](), 0, 0, 0.0, math.nan, time.monotonic()
    while True:
        loss = advance(chunk)
        first = loss if not done else first
        bad += not math.isfinite(loss)
        done += chunk
        share = done / steps if steps else (time.monotonic() - begin) / (60 * minutes)
        if share * SAMPLES >= looked + 1 or share >= 1:
            looked = share * SAMPLES
            at.append(done)
            memory.append(resident())
        if share >= 1:
            break
    b, upper = slope(at, memory)
    return {
        "steps": done,
        "seconds": time.monotonic() - begin,
        "memory": [at, memory],
        "bytes_per_step": b,
        "bytes_per_step_upper": upper,
        "first_loss": first,
        "last_loss": loss,
        "non_finite_losses": bad,
    }


def fused(steps: int, feedback: str, frozen: bool) -> dict[str, Any]:
    x, y = data()
    options: dict[str, Any] = {"loss": "cross_entropy", "rule": fb.Ridge(GAMMA), "noise_std": STD, "lr": 1e-3, "seed": 1}
    net = fb.FusedMLP(SIZES, activations="tanh", feedback=feedback, warmup=steps if frozen else 0, **options)
    chunk = max(steps // (4 * SAMPLES), 1)
    out = watched(steps, 0, lambda n: float(net.fit(x, y, steps=n, batch_size=BATCH).mean()), chunk)
    out |= {"counted_steps": net.step, "skipped": net.skipped, "finite": all(t.isfinite().all() for t in (*net.weights, *net.B))}
    out |= statistics([t for name, t in net.state_dict().items() if name.startswith(("V.", "P."))])
    return out | ({"error_of_B": against_offline(net, x, y, out["steps"])} if frozen else {"angles": angles(net.alignment(x, y))})


def against_offline(net: fb.FusedMLP, x: Tensor, y: Tensor, steps: int) -> list[float]:
    """``|(B - S V^-1) V^(1/2)| / |S V^(-1/2)|`` of each layer, where ``V = gamma I + sum e e^T``, ``S = sum lam e^T`` in float64.

    V^(1/2), as errors of cross-entropy sum to zero, and what B is along the direction that none of them has does not count (SPEC 7).
    """
    model = net.to_module().double()
    layers = [model[i : i + 2] for i in range(0, len(model), 2)]
    x = x.double()
    with torch.no_grad():
        e = model(x).softmax(1) - nn.functional.one_hot(y, SIZES[-1])
        clean = nn.functional.cross_entropy(model(x), y, reduction="none")
        V = GAMMA * torch.eye(SIZES[-1], dtype=torch.float64)
        S = [torch.zeros(n, SIZES[-1], dtype=torch.float64) for n in SIZES[1:-1]]
        for first in range(0, steps, 1000):
            count = min(1000, steps - first)
            rows = net._rows(first, count, BATCH, len(x)).flatten()
            p, xis = x[rows], []
            for index, layer in enumerate(layers):
                p = layer(p)
                if index < len(S):
                    xis.append(noise(net.seed, first, count, index, p.shape[1]))
                    p = p + xis[-1]
            w = (nn.functional.cross_entropy(p, y[rows], reduction="none") - clean[rows]) / STD**2
            V += e[rows].mT @ e[rows]
            for s, xi in zip(S, xis, strict=True):
                s += (w[:, None] * xi).mT @ e[rows]
    root = torch.linalg.cholesky(V)
    best = [torch.linalg.solve(V, s.mT).mT for s in S]
    return [float(((B - b) @ root).norm() / (b @ root).norm()) for B, b in zip(net.B, best, strict=True)]


def noise(seed: int, first: int, count: int, point: int, units: int) -> Tensor:
    """The noise of many steps at once, which reference.noise gives one by one (SPEC 6)."""
    quads = -(-units // 4)
    index = torch.arange(BATCH * quads).repeat(count)
    step = torch.arange(first, first + count).repeat_interleave(BATCH * quads)
    zero = torch.zeros_like(index)
    words = torch.stack(reference.philox((index, zero, step, zero + point), (seed, 0)), -1).view(-1, 2, 2) >> 8
    radius, angle = (-2 * ((words[..., 0] + 1) * 2.0**-24).double().log()).sqrt(), words[..., 1].double() * (2 * math.pi * 2.0**-24)
    xi = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).view(count * BATCH, 4 * quads)[:, :units]
    return STD * xi


def angles(rows: dict[str, dict[str, float]]) -> list[float]:
    return [row["angle"] for row in rows.values()]


def modules(minutes: float, feedback: str, rule: fb.Rule) -> dict[str, Any]:
    x, y = data()
    torch.manual_seed(0)
    layers = [m for a, b in itertools.pairwise(SIZES) for m in (nn.Linear(a, b), nn.Tanh())]
    net = fb.convert(nn.Sequential(*layers[:-1]), feedback=feedback, rule=rule, noise_std=STD, seed=1, warmup=0)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    generator = torch.Generator().manual_seed(1)

    def advance(steps: int) -> float:
        total = torch.zeros(())
        for _ in range(steps):
            rows = torch.randint(len(x), (BATCH,), generator=generator)
            loss = criterion(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return float(total) / steps

    out = watched(None, minutes, advance, 5)
    fb.flush(net)
    state = {k: v for k, v in net.state_dict().items() if v.is_floating_point()}
    out |= {"counted_steps": int(net.feedback.step), "skipped": int(net.feedback.skipped)}
    out |= {"finite": all(bool(t.isfinite().all()) for t in state.values()), "angles": angles(fb.metrics.alignment(net, criterion, x, y))}
    return out | statistics([t for k, t in state.items() if k.endswith(".V")])


def runs(steps: int) -> dict[str, Callable[[float], dict[str, Any]]]:
    """By name; the argument is minutes, of a converted network."""
    return {
        "FusedMLP, direct ridge, W fixed": lambda _: fused(steps, "direct", frozen=True),
        "FusedMLP, layerwise ridge": lambda _: fused(steps, "layerwise", frozen=False),
        "converted, direct joint": lambda minutes: modules(minutes, "direct", fb.Joint()),
        "converted, layerwise ridge": lambda minutes: modules(minutes, "layerwise", fb.Ridge(GAMMA)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000, help="of FusedMLP; default: a million")
    parser.add_argument("--minutes", type=float, default=4, help="for each converted network; default: 4")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    args = parser.parse_args()
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    results = {}
    for name, run in runs(args.steps).items():
        results[name] = run(args.minutes)
        print(name, {k: v for k, v in results[name].items() if k != "memory"}, flush=True)
    settings = {"sizes": SIZES, "batch_size": BATCH, "noise_std": STD, "gamma": GAMMA, "steps": args.steps, "minutes": args.minutes}
    record = {"settings": settings, "versions": versions(), "hardware": hardware("cpu"), "results": results}
    args.out.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
