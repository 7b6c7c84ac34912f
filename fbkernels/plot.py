"""The curves of a training job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["curves"]


def curves(records: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw ``accuracy.png`` (test accuracy in % against epoch) and ``angle.png`` (degrees against epoch, a panel for each layer) into out.

    All methods share each picture; a line is the mean over seeds, its band the standard error.

    Args:
        records: the lines of ``metrics.jsonl``.
    """
    methods = list(dict.fromkeys(r["method"] for r in records))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="test accuracy (%)")
    for i, method in enumerate(methods):
        _line(axes, method, f"C{i}", [(r["seed"], r["epoch"], r["test_accuracy"]) for r in records if r["method"] == method])
    axes.legend()
    figure.savefig(out / "accuracy.png", dpi=150)

    points = list(dict.fromkeys(name for r in records for name in r["points"]))
    figure = Figure(figsize=(1 + 3 * max(len(points), 1), 3.5), layout="constrained")
    panels = figure.subplots(1, max(len(points), 1), sharey=True, squeeze=False)[0]
    for axes, point in zip(panels, points, strict=False):
        for i, method in enumerate(methods):
            rows = [(r["seed"], r["epoch"], r["points"][point]["angle"]) for r in records if r["method"] == method and r["points"]]
            _line(axes, method, f"C{i}", rows)
        axes.axhline(90, color="gray", linewidth=0.8, linestyle=":")
        axes.set(title=point, xlabel="epoch", ylim=(0, None))
    panels[0].set_ylabel("angle to backprop (degrees)")
    if points:
        panels[-1].legend()
    figure.savefig(out / "angle.png", dpi=150)


def _line(axes: Axes, label: str, color: str, rows: list[tuple[int, int, float | None]]) -> None:
    """One method: (seed, epoch, value) rows to a mean and its standard error against epoch."""
    if not rows:
        return
    axes.locator_params("x", integer=True)
    epochs = sorted({epoch for _, epoch, _ in rows})
    values = [np.array([np.nan if v is None else v for _, e, v in rows if e == epoch], float) for epoch in epochs]
    mean = np.array([v.mean() for v in values])
    axes.plot(epochs, mean, color=color, label=label, marker=".")
    error = np.array([v.std(ddof=1) / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in values])
    axes.fill_between(epochs, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
