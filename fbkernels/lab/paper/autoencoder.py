"""Figure 3 and the ablation table: the MNIST autoencoder 784-200-2-200-784 (SPEC 8; PAPER 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from fbkernels.lab.paper.driver import Experiment, Results, Rows, by_method, mnist, seed_count, text
from fbkernels.lab.paper.mlp import MLP
from fbkernels.lab.paper.panels import bars, line, panels

LENGTHS = {"smoke": (500, 250), "short": (5_000, 250), "full": (1_000_000, 5_000)}
# printed by the authors' notebooks: the least test loss per batch of 32 over epochs, its mean over 3 seeds (DAE: 10) and error (PAPER 3.3)
PAPER = {
    "backprop": (609.84, 14.35),
    "backprop, noise": (536.81, 2.06),
    "Adam": (538.25, 1.89),
    "Adam, noise": (522.25, 0.39),
    "feedback alignment": (759.17, 3.29),
    "feedback alignment, noise": (768.17, 2.69),
    "learned": (515.30, 4.11),
    "denoising": (539.82, 4.90),
    "synthetic gradients": (512.73, 4.82),
    "matching": (643.38, 5.38),
    "matching, noise": (625.23, 0.92),
}
NOISY = ("backprop, noise", "Adam, noise", "matching, noise", "denoising")  # theirs were scored with the noise, the others without
FIG3 = ("backprop", "Adam", "feedback alignment", "learned")


def settings(published: bool) -> dict[str, dict[str, Any]]:
    """As published: what the authors' code ran, where learned, synthetic and matching have 50 hidden units in the place of 200, backprop
    and FA an lr that was not searched for, and noise has std 0.1. As described in the paper: 200 units, lr by search, noise of 0.02; but
    for backprop, of which theirs, 3.7e-4, puts out all output units in the first ten steps here."""
    noise = {"activity_noise": 0.1 if published else 0.02}
    lms = {"rule_args": {"lr": 8e-6}}
    small = {"sizes": (784, 50, 2, 50, 784)} if published else {}
    backprop, alignment = {"rule": "weight-transport"}, {"rule": "fixed"}
    matching = {"rule": "kolen-pollack", "rule_args": {"decay": 0.0}, **small}
    return {
        "backprop": {**backprop, "lr": 5e-5 if published else 1e-4},
        "backprop, noise": {**backprop, **noise, "lr": 3.73e-4 if published else 1e-4},
        "Adam": {**backprop, "optimizer": "adam", "lr": 1.411e-4},
        "Adam, noise": {**backprop, **noise, "optimizer": "adam", "lr": 1.411e-4},
        "feedback alignment": {**alignment, "lr": 5e-5 if published else 3.472e-6},
        "feedback alignment, noise": {**alignment, **noise, "lr": 3.472e-6},
        "learned": {"rule": "lms", **lms, **small, "noise_std": 0.018942, "lr": 1e-4},
        "denoising": {**backprop, "input_noise": 0.3, "lr": 1e-4},
        "synthetic gradients": {"rule": "synthetic", **lms, **small, "lr": 1e-4},
        "matching": {**matching, "lr": 1e-4 if published else 1.994e-4},
        "matching, noise": {**matching, **noise, "lr": 1.994e-4},
    }


def jobs(scale: str, seeds: Sequence[int], faithful: bool) -> list[MLP]:
    """The rows of the table, and of our rules "joint" with 200 units."""
    steps, every = LENGTHS[scale]
    common = {"target": "input", "start": "truncated", "activations": ("tanh", "identity", "tanh", "relu")}
    methods = settings(faithful) | ({} if faithful else {"joint": {"rule": "joint", "noise_std": 0.018942, "lr": 1e-4}})
    return [
        MLP(method, seed, steps, every, **{"sizes": (784, 200, 2, 200, 784), **common, **options, "pictures": seed == seeds[0]})
        for seed in seeds
        for method, options in methods.items()
    ]


def tables(results: Results) -> list[Rows]:
    lines: list[tuple[str, ...]] = []
    for method, runs in by_method(results).items():
        key = "noisy_test_loss" if method in NOISY else "test_loss"
        best = [min((r[key] for r in run["records"] if r[key] is not None), default=None) for run in runs]
        clean = [min((r["test_loss"] for r in run["records"] if r["test_loss"] is not None), default=None) for run in runs]
        last = [run["records"][-1]["test_loss"] for run in runs]
        ((mean,), (error,)), (theirs, their_error) = bars([best]), PAPER.get(method, (math.nan, math.nan))
        apart = abs(mean - theirs) / math.hypot(error, their_error)
        layers = [run["records"][-1].get("layers", []) for run in runs]
        angles = ", ".join(text([own[i]["angle"] for own in layers], 0) for i in range(len(layers[0]))) or "0"
        published = f"{theirs:.1f} ± {their_error:.1f}" if theirs == theirs else "-"
        cells = text(best, 1), f"{apart:.1f}" if apart == apart else "-", text(clean, 1), text(last, 1), angles
        lines.append((method, published, *cells))
    step = max(record["step"] for run in results for record in run["records"])
    title = f"MNIST autoencoder, {step:,} steps, {seed_count(results)}; test loss per batch of 32, least over the records"
    columns = ("method", "authors' code, 1,000,000 steps", "ours", "apart, in errors", "without noise", "last, without noise", "angles")
    return [Rows(title, columns, lines)]


def losses(results: Results) -> dict[str, Figure]:
    figure, axes = panels(1, 2, "step")
    for i, (method, runs) in enumerate(by_method(results).items()):
        for ax, key in zip(axes[0], ("train_loss", "test_loss"), strict=True):
            line(ax, method, i, runs, lambda record, key=key: record[key])  # type: ignore[misc]
            ax.set_ylabel(f"{key.replace('_', ' ')} per batch of 32")
    axes[0][1].legend(fontsize="x-small")
    return {"losses": figure}


def figures(results: Results) -> dict[str, Figure]:
    """Losses, the two numbers that each method makes of a digit, and what it makes of them again."""
    drawn = [run for run in results if "latent" in run]
    scatter, axes = panels(1, len(drawn), "")
    for ax, run in zip(axes[0], drawn, strict=True):
        x, y = zip(*run["latent"], strict=True)
        ax.scatter(x, y, c=run["classes"], cmap="tab10", s=3)
        ax.set_title(run["method"])
    pictures = Figure(figsize=(8, 1 + len(drawn)), layout="constrained")
    grid = pictures.subplots(1 + len(drawn), 8)
    for row, (name, images) in zip(grid, [("input", drawn[0]["inputs"]), *((run["method"], run["outputs"]) for run in drawn)], strict=True):
        for ax, image in zip(row, images, strict=True):
            ax.imshow([image[i : i + 28] for i in range(0, 784, 28)], cmap="gray", vmin=0, vmax=255)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", fontsize="small")
    return losses(results) | {"latent": scatter, "reconstructions": pictures}


def fig3_jobs(scale: str, seeds: Sequence[int], faithful: bool) -> list[MLP]:
    return [job for job in jobs(scale, seeds, faithful) if job.method in FIG3]


TABLE = Experiment("MNIST autoencoder, every row of the ablation table", 3, jobs, mnist, tables, losses)
FIGURE = Experiment("MNIST autoencoder, losses, latent space and reconstructions", 3, fig3_jobs, mnist, tables, figures)
