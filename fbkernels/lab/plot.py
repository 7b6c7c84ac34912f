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
    """Draw ``accuracy.png`` and ``angle.png`` into out, against epoch: accuracy in %, on the validation images where there are any, and
    degrees, a panel for each layer.

    All methods share each picture; a line is the mean over seeds, its band the standard error.

    Args:
        records: the lines of ``metrics.jsonl``.
    """
    methods = list(dict.fromkeys(r["method"] for r in records))
    figure = Figure(figsize=(6, 4), layout="constrained")
    split = "validation" if any(r.get("val_accuracy") is not None for r in records) else "test"
    key = f"{split.removesuffix('idation')}_accuracy"
    axes = figure.add_subplot(xlabel="epoch", ylabel=f"{split} accuracy (%)")
    for i, method in enumerate(methods):
        _line(axes, method, f"C{i}", [(r["seed"], r["epoch"], r[key]) for r in records if r["method"] == method])
    axes.legend()
    figure.savefig(out / "accuracy.png", dpi=150)

    points = list(dict.fromkeys(name for r in records for name in r["points"]))
    columns, rows = min(max(len(points), 1), 6), max(-(-len(points) // 6), 1)
    figure = Figure(figsize=(1 + 3 * columns, 0.5 + 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes in panels[len(points) :]:
        axes.set_axis_off()
    for axes, point in zip(panels, points, strict=False):
        for i, method in enumerate(methods):
            own = [r for r in records if r["method"] == method and point in r["points"]]
            _line(axes, method, f"C{i}", [(r["seed"], r["epoch"], r["points"][point]["angle"]) for r in own])
        axes.axhline(90, color="gray", linewidth=0.8, linestyle=":")
        axes.set(title=point, xlabel="epoch", ylim=(0, None))
    panels[0].set_ylabel("angle to backprop (degrees)")
    if points:
        panels[len(points) - 1].legend()
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
