"""Figure 2: W and B learned together on MNIST, 784-50-20-10 (SPEC 8; PAPER 3.1), and its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from fbkernels.lab.paper.driver import Experiment, Results, Rows, by_method, mnist, seed_count, text
from fbkernels.lab.paper.mlp import MLP, cost
from fbkernels.lab.paper.panels import line, of_layer, panels

SIGMAS = (1e-4, 1e-3, 1e-2, 1e-1)
# steps, and steps between two records
LENGTHS = {"smoke": (1_000, 250), "short": (10_000, 500), "full": (2_000_000, 20_000)}
PAPER = {
    "feedback alignment": "4.28",
    "backprop": "2.65",
}  # final test error in %, of the learned ones on noisy activities; mean of 5 seeds (PAPER 3.1)
PAPER |= dict(zip((f"learned {s:g}" for s in SIGMAS), ("3.51", "3.51", "3.64", "15.92"), strict=True))
LAYER = {
    "relative_error": "|W - B| / |W|",
    "authors_angle": "angle of B r to W r (degrees)",
    "sign_congruence": "signs in agreement",
}
BASELINES: dict[str, dict[str, Any]] = {
    "matching": {"rule": "kolen-pollack", "rule_args": {"decay": 0.0}},
    "Kolen-Pollack": {"rule": "kolen-pollack", "rule_args": {"decay": 1e-6}},
    "weight mirror": {"rule": "weight-mirror"},
    "synthetic gradients": {"rule": "synthetic", "rule_args": {"lr": 5e-4}},
    "sign symmetry": {"rule": "sign-symmetric"},
    "joint": {"rule": "joint", "rule_args": {"lr": 0.2}},
    "node perturbation": {"rule": "node-perturbation"},
    "frozen hidden layers": {"rule": "fixed", "frozen": True},
}


def jobs(scale: str, seeds: Sequence[int], faithful: bool) -> list[MLP]:
    """The paper's lines, then what the library's other rules give."""
    steps, every = LENGTHS[scale]
    # the authors' bias units, and weights that are the same in each run
    theirs: dict[str, Any] = {"bias_units": True, "weight_seed": 0} if faithful else {}
    methods: dict[str, dict[str, Any]] = {}
    for sigma in SIGMAS:
        warmup = min(1_000, steps // 10)
        methods[f"learned {sigma:g}"] = {"rule": "ridge", "rule_args": {"gamma": 0.1}, "noise_std": sigma, "warmup": warmup}
    methods |= {"feedback alignment": {"rule": "fixed"}, "backprop": {"rule": "weight-transport"}}
    methods |= {"matching": BASELINES["matching"]} if faithful else BASELINES
    return [MLP(method, seed, steps, every, **options, **theirs) for seed in seeds for method, options in methods.items()]


def tables(results: Results) -> list[Rows]:
    lines: list[tuple[str, ...]] = []
    for method, runs in by_method(results).items():
        last = [run["records"][-1] for run in runs]
        # the record at which as much had been computed as backprop computes in all
        equal = [run["records"][max(1, round(len(run["records"]) * min(1.0, 3 / cost(run["job"])))) - 1] for run in runs]
        layers = [[record["layers"][i] for record in last] for i in range(len(last[0].get("layers", [])))]
        angles, folded, signs, errors = (
            ", ".join(text([layer[key] for layer in runs_of], digits) for runs_of in layers) or "0"
            for key, digits in (("angle", 0), ("authors_angle", 0), ("sign_congruence", 2), ("relative_error", 2))
        )
        noisy = text([r.get("noisy_test_error") for r in last], 2)
        error, same = text([r["test_error"] for r in last], 2), text([r["test_error"] for r in equal], 2)
        train = text([r.get("train_error") for r in last], 2)
        lines.append((method, PAPER.get(method, "-"), noisy, error, same, train, angles, folded, signs, errors))
    step = max(record["step"] for run in results for record in run["records"])
    title = f"784-50-20-10 on MNIST, {step:,} steps of 32, {seed_count(results)}"
    return [
        Rows(
            title,
            (
                "method",
                "paper, noisy where learned",
                "test error %, noisy",
                "test error %",
                "at backprop's compute",
                "train error %",
                "angle to backprop, layers 1, 2",
                "their angle",
                "sign congruence",
                "relative error of B",
            ),
            lines,
        )
    ]


def figures(results: Results) -> dict[str, Figure]:
    """(A) relative error of B, (B) angle, (C) sign congruence, (D) test error, as in the paper; a row for each layer."""
    figure, axes = panels(2, 4, "step")
    for i, (method, runs) in enumerate(by_method(results).items()):
        for layer in range(2):
            for ax, (key, label) in zip(axes[layer], LAYER.items(), strict=False):
                line(ax, method, i, runs, of_layer(layer, key))
                ax.set_ylabel(f"{label}, layer {layer + 1}")
        line(axes[0][3], method, i, runs, lambda record: record["test_error"])
        line(axes[1][3], method, i, runs, of_layer(0, "angle"))
    axes[0][3].set(ylabel="test error (%)", yscale="log")
    axes[1][3].set_ylabel("angle to backprop (degrees), layer 1")
    for ax in (axes[0][0], axes[1][0]):
        ax.set_yscale("log")
    for ax in (axes[0][2], axes[1][2]):
        ax.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes[0][3].legend(fontsize="x-small")
    return {"fig2": figure}


FIG2 = Experiment("W and B learned together on MNIST", 5, jobs, mnist, tables, figures)
