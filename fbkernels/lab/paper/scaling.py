"""The paper's third question: how accuracy and angle scale with depth and width (a study of our own)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from fbkernels.lab.paper.driver import Experiment, Results, Rows, by_method, mnist, seed_count, text
from fbkernels.lab.paper.mlp import MLP
from fbkernels.lab.paper.panels import bars, panels

STEPS = {"smoke": 200, "short": 5_000, "full": 100_000}
DEPTHS = (2, 3, 4, 6, 8, 10)  # layers of weights, hidden ones of 64 units
WIDTHS = (30, 100, 300, 1000, 3000)  # of the first hidden layer, as in the paper's appendix; 50 units follow
METHODS: dict[str, dict[str, Any]] = {
    "backprop": {"rule": "weight-transport"},
    "feedback alignment": {"rule": "fixed"},
    "direct feedback alignment": {"rule": "fixed", "feedback": "direct"},
    "ridge, layerwise": {"rule": "ridge"},
    "ridge, direct": {"rule": "ridge", "feedback": "direct"},
    "joint, layerwise": {"rule": "joint"},
    "joint, direct": {"rule": "joint", "rule_args": {"signal": "output"}, "feedback": "direct"},
}


def jobs(scale: str, seeds: Sequence[int], faithful: bool) -> list[MLP]:
    steps, few = STEPS[scale], 2 if scale == "smoke" else None
    networks = {f"depth {d}": [784, *[64] * (d - 1), 10] for d in DEPTHS[:few]}
    networks |= {f"width {n}": [784, n, 50, 10] for n in WIDTHS[:few]}
    return [
        MLP(
            method,
            seed,
            steps,
            steps,
            variant,
            tuple(sizes),
            activations=("tanh",) * (len(sizes) - 2) + ("identity",),
            loss="cross_entropy",
            optimizer="adam",
            lr=1e-3,
            **options,
        )
        for seed in seeds
        for variant, sizes in networks.items()
        for method, options in METHODS.items()
    ]


def _last(runs: Results, variant: str, key: str) -> list[float | None]:
    """The test error, or the angle of the first hidden layer, which is farthest from the output."""
    records = [run["records"][-1] for run in runs if run["job"]["variant"] == variant]
    return [r["test_error"] if key == "test_error" else r["layers"][0]["angle"] if "layers" in r else None for r in records]


def _varied(results: Results) -> list[tuple[str, list[int]]]:
    ran = {run["job"]["variant"] for run in results}
    return [(kind, [v for v in values if f"{kind} {v}" in ran]) for kind, values in (("depth", DEPTHS), ("width", WIDTHS))]


def tables(results: Results) -> list[Rows]:
    step = results[0]["job"]["steps"]
    found = []
    for kind, values in _varied(results):
        for key, label, digits in (("test_error", "test error %", 2), ("angle", "angle of the first hidden layer to backprop", 0)):
            lines: list[tuple[str, ...]] = [
                (method, *(text(_last(runs, f"{kind} {v}", key), digits) for v in values))
                for method, runs in by_method(results).items()
                if key == "test_error" or method != "backprop"
            ]
            title = f"{label}, MNIST, tanh, Adam, {step:,} steps of 32, {seed_count(results)}"
            found.append(Rows(title, ("method", *(f"{kind} {v}" for v in values)), lines))
    return found


def figures(results: Results) -> dict[str, Figure]:
    figure, axes = panels(2, 2, "")
    for row, (kind, values) in zip(axes, _varied(results), strict=True):
        for ax, (key, label) in zip(row, (("test_error", "test error (%)"), ("angle", "angle of layer 1 (degrees)")), strict=True):
            for method, runs in by_method(results).items():
                means, errors = bars([_last(runs, f"{kind} {v}", key) for v in values])
                ax.errorbar(values, means, errors, label=method, marker=".", linewidth=1.2)  # without an angle too: one colour a method
            ax.set(
                xlabel=kind, ylabel=label, xscale="log" if kind == "width" else "linear", yscale="log" if key == "test_error" else "linear"
            )
    axes[0][0].legend(fontsize="x-small")
    return {"scaling": figure}


SCALING = Experiment("accuracy and angle against depth and width", 3, jobs, mnist, tables, figures)
