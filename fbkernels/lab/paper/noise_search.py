"""The paper's fifth question: what the noise, the regression and their settings do (a study of our own), and its random search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from fbkernels.lab.paper.driver import Experiment, Results, Rows, by_method, mnist, seed_count, text
from fbkernels.lab.paper.mlp import MLP
from fbkernels.lab.paper.panels import bars, panels

STEPS = {"smoke": 200, "short": 5_000, "full": 500_000}
DRAWS = {"smoke": 2, "short": 20, "full": 20}
# log-uniform, the authors' for the autoencoder (PAPER 3.3)
SPACE = {"noise_std": (1e-4, 1e-1), "lr": (1e-6, 1e-3), "B_lr": (1e-6, 1e-3)}
RIDGE: dict[str, Any] = {"rule": "ridge", "rule_args": {"gamma": 0.1}, "noise_std": 0.01}
DIRECT: dict[str, Any] = {"feedback": "direct", "noise_std": 0.01}


def settings() -> dict[str, dict[str, dict[str, Any]]]:
    """Method -> value -> how it is trained: one setting at a time."""
    return {
        "sigma": {f"{v:g}": RIDGE | {"noise_std": v} for v in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)},
        "gamma": {f"{v:g}": RIDGE | {"rule_args": {"gamma": v}} for v in (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)},
        "forgetting": {f"{v:g}": RIDGE | {"rule_args": {"gamma": 0.1, "forgetting": v}} for v in (0.9, 0.99, 0.999, 0.9999, 1.0)},
        "every": {f"{v}": RIDGE | {"perturb": {"every": v}} for v in (1, 2, 4, 8)},
        "fraction": {f"{v:g}": RIDGE | {"perturb": {"fraction": v}} for v in (1.0, 0.5, 0.25, 0.125)},
        **{
            f"joint, {signal}": {
                f"{mu:g}": DIRECT | {"rule": "joint", "rule_args": {"lr": mu, "signal": signal}} for mu in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
            }
            for signal in ("output", "loss")
        },
        **{
            f"without residual, {signal}": {
                f"{mu:g}": DIRECT | {"rule": "without-residual", "rule_args": {"lr": mu, "signal": signal}} for mu in (0.05, 0.2, 1.0)
            }
            for signal in ("output", "loss")
        },
    }


def draws(number: int) -> list[dict[str, float]]:
    """Optuna's random search, whose draws do not depend on what came out, so that they may be tried side by side."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ValueError("noise-search needs optuna: pip install 'fbkernels[reproduce]'") from error

    space: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.FloatDistribution(low, high, log=True) for name, (low, high) in SPACE.items()
    }
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [study.ask(space).params for _ in range(number)]


def jobs(scale: str, seeds: Sequence[int], faithful: bool) -> list[MLP]:
    """One setting at a time on the classifier, each seed; the random search on the autoencoder, one seed a draw."""
    steps = STEPS[scale]
    sweeps = [
        MLP(method, seed, steps, max(steps // 20, 100), value, **options)
        for seed in seeds
        for method, values in settings().items()
        for value, options in values.items()
    ]
    searched = [
        MLP(
            "search",
            seeds[0],
            steps,
            max(steps // 20, 100),
            f"draw {i}",
            (784, 200, 2, 200, 784),
            ("tanh", "identity", "tanh", "relu"),
            target="input",
            start="truncated",
            rule="lms",
            rule_args={"lr": draw["B_lr"]},
            noise_std=draw["noise_std"],
            lr=draw["lr"],
        )
        for i, draw in enumerate(draws(DRAWS[scale]))
    ]
    return sweeps + searched


def _sweeps(results: Results) -> dict[str, dict[str, Results]]:
    """Method -> value, rising -> runs; the random search left out."""
    found: dict[str, dict[str, Results]] = {}
    for method, runs in by_method([run for run in results if run["method"] != "search"]).items():
        for run in sorted(runs, key=lambda run: float(run["job"]["variant"])):
            found.setdefault(method, {}).setdefault(run["job"]["variant"], []).append(run)
    return found


def _searched(results: Results) -> list[tuple[float, float, float, float]]:
    """Least test loss, sigma, lr of W and lr of B of each draw, the best first; a draw that diverged has none and comes last."""
    rows = []
    for run in (run for run in results if run["method"] == "search"):
        job = run["job"]
        loss = min((r["test_loss"] for r in run["records"] if r["test_loss"] is not None), default=float("inf"))
        rows.append((loss, job["noise_std"], job["lr"], job["rule_args"]["lr"]))
    return sorted(rows)


def _of_layer(runs: Results, layer: int) -> list[float | None]:
    return [run["records"][-1].get("layers", [{}, {}])[layer].get("angle") for run in runs]


def tables(results: Results) -> list[Rows]:
    steps, lines = results[0]["job"]["steps"], list[tuple[str, ...]]()
    for method, values in _sweeps(results).items():
        for value, runs in values.items():
            error = text([run["records"][-1]["test_error"] for run in runs], 2)
            lines.append((method, value, error, *(text(_of_layer(runs, layer), 0) for layer in (0, 1))))
    title = f"784-50-20-10 on MNIST, {steps:,} steps of 32, {seed_count(results)}, one setting at a time"
    found = [Rows(title, ("setting", "value", "test error %", "angle, layer 1", "angle, layer 2"), lines)]
    if searched := _searched(results):
        rows: list[tuple[str, ...]] = [(f"{loss:.1f}", *(f"{v:.2g}" for v in rest)) for loss, *rest in searched]
        title = f"random search, autoencoder, LMS, {steps:,} steps: least test loss per batch of 32"
        found.append(Rows(title, ("test loss", "sigma", "lr of W", "lr of B"), rows))
    return found


def figures(results: Results) -> dict[str, Figure]:
    drawn, sweeps = {}, _sweeps(results)
    if sweeps:
        figure, axes = panels(2, len(sweeps), "")
        for i, (method, values) in enumerate(sweeps.items()):
            x = [float(v) for v in values]
            for row, label, of in (
                (0, "test error (%)", lambda runs: [run["records"][-1]["test_error"] for run in runs]),
                (1, "angle of layer 1 (degrees)", lambda runs: _of_layer(runs, 0)),
            ):
                means, errors = bars([of(runs) for runs in values.values()])
                axes[row][i].errorbar(x, means, errors, marker=".")
                axes[row][i].set(xscale="log", xlabel=method, ylabel=label)
        drawn["settings"] = figure
    if searched := [row for row in _searched(results) if row[0] < float("inf")]:
        figure, axes = panels(1, 3, "")
        for ax, index, label in zip(axes[0], (1, 2, 3), ("sigma", "lr of W", "lr of B"), strict=True):
            ax.scatter([row[index] for row in searched], [row[0] for row in searched], s=12)
            ax.set(xscale="log", yscale="log", xlabel=label, ylabel="test loss per batch of 32")
        drawn["search"] = figure
    return drawn


NOISE_SEARCH = Experiment("noise, ridge and joint settings, and the random search", 3, jobs, mnist, tables, figures)
