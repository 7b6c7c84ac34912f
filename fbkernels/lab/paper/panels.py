"""Lines over seeds, in panels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fbkernels.lab.paper.driver import Results
from fbkernels.lab.train import spread


def panels(rows: int, columns: int, xlabel: str) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(0.5 + 3.5 * columns, 0.5 + 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).tolist()
    for ax in axes[-1]:
        ax.set_xlabel(xlabel)
    return figure, axes


def line(ax: Axes, label: str, index: int, runs: Results, value: Callable[[dict[str, Any]], float | None]) -> None:
    """One method against step: the mean over seeds, in a band of its standard error; nothing where it has no such value."""
    steps = [record["step"] for record in runs[0]["records"]]
    values = np.array([[np.nan if (v := value(record)) is None else v for record in run["records"]] for run in runs], float)
    if np.isnan(values).all():
        return
    color, style = f"C{index % 10}", ("-", "--", ":")[index // 10]
    mean = values.mean(0)
    ax.plot(steps, mean, style, color=color, label=label, linewidth=1.2)
    if len(runs) > 1:
        error = values.std(0, ddof=1) / len(runs) ** 0.5
        ax.fill_between(steps, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)


def of_layer(layer: int, key: str) -> Callable[[dict[str, Any]], float | None]:
    """A hidden layer's number in a record, None for what has no B."""
    return lambda record: record["layers"][layer][key] if "layers" in record else None


def bars(values: Sequence[Sequence[float | None]]) -> tuple[list[float], list[float]]:
    """Means and standard errors for ``errorbar``, which are nan where there are none."""
    found = [spread(v) for v in values]
    mean, error = ([math.nan if (v := s[key]) is None else v for s in found] for key in ("mean", "standard_error"))
    return mean, error
