"""The appendix figure: B learned while W stands still, against noise and against width (SPEC 8; PAPER 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from fbkernels.lab.paper.driver import Experiment, Results, Rows, by_method, mnist, seed_count, text
from fbkernels.lab.paper.mlp import MLP
from fbkernels.lab.paper.panels import line, of_layer, panels

SIGMAS = (1e-3, 1e-2, 1e-1)
WIDTHS = (30, 100, 300, 1000)
LENGTHS = {"smoke": (1_000, 250), "short": (20_000, 1_000), "full": (1_000_000, 20_000)}
# what PAPER 3.2 reads off the plots at 1,000,000 steps: angle and relative error of B in layers 1 and 2
PAPER = {f"sigma {sigma:g}": ("1, 0.2", f"0.6, {error}") for sigma, error in zip(SIGMAS, ("0.04", "0.005", "0.04"), strict=True)}
PAPER |= {f"width {n}": (f"{a}, 0.25", f"{e}, 0.01-0.1") for n, a, e in zip(WIDTHS, (1.2, 2, 3.5, 7), (1.5, 2, 3.5, 6), strict=True)}
COLUMNS = {
    "authors_angle": "angle of B r to W r (degrees)",
    "relative_error": "|W - B| / |W|",
    "projected_error": "|(W - B) R| / |W R|",
    "sign_congruence": "signs in agreement",
}


def jobs(scale: str, seeds: Sequence[int], faithful: bool) -> list[MLP]:
    """Warm-up throughout, so that only B learns; joint, our rule, beside the paper's."""
    steps, every = LENGTHS[scale]
    ridge = {"rule": "ridge", "rule_args": {"gamma": 0.1}}
    methods: dict[str, dict[str, Any]] = {f"sigma {sigma:g}": ridge | {"noise_std": sigma} for sigma in SIGMAS}
    methods |= {f"width {n}": ridge | {"sizes": (784, n, 50, 10)} for n in WIDTHS}
    methods |= {"joint": {"rule": "joint", "rule_args": {"lr": 0.2}}} if not faithful else {}
    theirs: dict[str, Any] = {"bias_units": True, "weight_seed": 0} if faithful else {}
    return [MLP(method, seed, steps, every, warmup=steps, **options, **theirs) for seed in seeds for method, options in methods.items()]


def tables(results: Results) -> list[Rows]:
    lines: list[tuple[str, ...]] = []
    for method, runs in by_method(results).items():
        last = [run["records"][-1]["layers"] for run in runs]
        digits = dict.fromkeys(COLUMNS, 2) | {"projected_error": 4}
        cells = (", ".join(text([layers[i][key] for layers in last], digits[key]) for i in range(2)) for key in COLUMNS)
        lines.append((method, *PAPER.get(method, ("-", "-")), *cells))
    step = max(record["step"] for run in results for record in run["records"])
    title = f"W fixed, layers 1 and 2 after {step:,} steps of 32, {seed_count(results)}"
    return [Rows(title, ("method", "paper: angle", "paper: |W - B| / |W|", *COLUMNS.values()), lines)]


def figures(results: Results) -> dict[str, Figure]:
    drawn = {}
    for kind in ("sigma", "width"):
        figure, axes = panels(2, len(COLUMNS), "step")
        for i, (method, runs) in enumerate((m, r) for m, r in by_method(results).items() if m.startswith((kind, "joint"))):
            for layer in range(2):
                for ax, (key, label) in zip(axes[layer], COLUMNS.items(), strict=True):
                    line(ax, method, i, runs, of_layer(layer, key))
                    ax.set(ylabel=f"{label}, layer {layer + 1}", xscale="log", yscale="linear" if key == "sign_congruence" else "log")
        if axes[0][0].lines:
            axes[0][0].legend(fontsize="x-small")
            drawn[f"fixed-w-{kind}"] = figure
    return drawn


FIXED_W = Experiment("B learned while W stands still", 3, jobs, mnist, tables, figures)
