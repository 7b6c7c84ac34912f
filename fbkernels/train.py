"""The training job of ``fbkernels train``: one rule and its rivals, on the same seeds, initial weights and batches.

Everything random is a function of (seed, epoch, step), so an interrupted job continues bit for bit (on a CPU with as many threads).
"""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fbkernels as fb
from fbkernels._check import integer, one_of, positive
from fbkernels.data import NAMES, Dataset, load
from fbkernels.models import MODELS
from fbkernels.plot import curves

__all__ = ["METHODS", "Progress", "Settings", "build", "load_checkpoint", "summarise", "train", "versions"]

HELD_OUT = 128  # the last images of the training set: never trained on, the batch that angles are measured on

RULES: dict[str, Callable[..., fb.Rule]] = {
    "ridge": fb.Ridge,
    "lms": partial(fb.LMS, lr=0.005),
    "nlms": partial(fb.NormalizedLMS, lr=0.005),
    "joint": fb.Joint,
    "joint-loss": partial(fb.Joint, signal="loss"),
    "joint-output": partial(fb.Joint, signal="output"),
    "weight-mirror": fb.WeightMirror,
    "fixed": fb.Fixed,
    "kolen-pollack": partial(fb.KolenPollack, decay=1e-3),
    "synthetic": partial(fb.SyntheticGradient, lr=0.005),
    "sign-symmetric": fb.SignSymmetric,
    "weight-transport": fb.WeightTransport,
    "node-perturbation": fb.NodePerturbation,
}
METHODS = (*RULES, "backprop", "fa", "dfa")
OPTIMIZERS: dict[str, tuple[float, Callable[..., torch.optim.Optimizer]]] = {
    "adam": (1e-3, torch.optim.AdamW),  # with weight_decay=0 it is Adam
    "sgd": (0.05, torch.optim.SGD),
}


@dataclass(frozen=True)
class Settings:
    """What a job computes; equal settings give equal numbers.

    ``rule`` and each of ``compare`` name a method: a rule with the job's ``feedback``, "fa" (Fixed, layerwise), "dfa" (Fixed, direct)
    or "backprop" (the plain model under plain autograd). "joint" is signal "output" in direct and "loss" in layerwise. ``rule_args``
    are arguments of ``rule`` alone; the rivals have their defaults. "kolen-pollack" makes the optimiser decay W by the rule's decay.

    Raises:
        ValueError, TypeError: a value that is not of the form above; the message names it.
    """

    data: str = "digits"
    data_dir: str | None = None
    model: str = "mlp"
    feedback: str = "layerwise"
    rule: str = "ridge"
    rule_args: Mapping[str, float] = field(default_factory=dict)
    compare: tuple[str, ...] = ("backprop", "fa")
    epochs: int = 20
    batch_size: int = 64
    train_images: int | None = None  # the first so many; None: all but the held-out batch
    optimizer: str = "adam"
    lr: float | None = None  # None: the optimiser's in OPTIMIZERS
    noise_std: float = 0.05
    noise: str = "gaussian"
    seeds: tuple[int, ...] = (0,)
    every: int = 1
    fraction: float = 1.0
    antithetic: bool = False
    warmup: int = 0  # steps; rivals without a B to learn start at once
    device: str = "cpu"
    threads: int | None = None  # None: one for mlp, which is too small to share between cores, else torch's own choice

    def __post_init__(self) -> None:
        one_of("data", self.data, NAMES)
        one_of("model", self.model, MODELS)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        for name, methods in (("rule", (self.rule,)), ("compare", self.compare)):
            for method in methods:
                one_of(name, method, METHODS)
        known = [p for p in inspect.signature(RULES[self.rule]).parameters if p != "signal"] if self.rule in RULES else []
        for name in self.rule_args:
            if name not in known:
                raise ValueError(f"rule_args: {self.rule} has no argument {name!r}, it has {', '.join(known) or 'none'}")
        for name in ("epochs", "batch_size", *(("train_images",) if self.train_images is not None else ())):
            integer(name, getattr(self, name), 1)
        if self.threads is not None:
            integer("threads", self.threads, 1, 4096)
        if self.lr is not None:
            positive("lr", self.lr)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one, got {self.seeds}")
        for seed in self.seeds:
            integer("seeds", seed, 0, 2**40)
        try:
            torch.zeros(1, device=self.device).item()
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {self.device!r} cannot be used: {str(error).splitlines()[0]}") from error

    @property
    def methods(self) -> tuple[str, ...]:
        """The job's rule first, then its rivals."""
        return tuple(dict.fromkeys((self.rule, *self.compare)))


class Progress(NamedTuple):
    """What ``watch`` sees after a step. loss: of the batch; accuracy: in % on the epoch's batches so far; angle: degrees, the mean over
    the layers at the end of the epoch before."""

    method: str
    seed: int
    epoch: int
    done: int
    total: int
    loss: Tensor
    accuracy: Tensor
    angle: float | None


class _Images:
    """A data set on the device, standardised per channel by the moments of the images that are trained on."""

    def __init__(self, s: Settings) -> None:
        self.set: Dataset = load(s.data, s.data_dir)
        available = len(self.set.train_y) - HELD_OUT
        self.n = available if s.train_images is None else s.train_images
        if not 1 <= self.n <= available:
            raise ValueError(
                f"train_images must be 1 to {available}, all of {s.data} but {HELD_OUT} held out to measure angles, got {s.train_images}"
            )
        _, channels, height, width = self.set.train_x.shape
        self.shape = channels, height, width
        moments = torch.zeros(2, channels, dtype=torch.float64)
        for part in self.set.train_x[: self.n].split(1000):
            x = self.set.to_float(part).double()
            moments += torch.stack((x.sum((0, 2, 3)), x.square().sum((0, 2, 3))))
        mean, square = moments / (self.n * height * width)
        std = (square - mean.square()).clamp_min(1e-12).sqrt()
        self.mean, self.std = (v.float().view(-1, 1, 1).to(s.device) for v in (mean, std))
        self.train = self.set.train_x.to(s.device), self.set.train_y.to(s.device)
        self.test = self.set.test_x.to(s.device), self.set.test_y.to(s.device)

    def batch(self, split: tuple[Tensor, Tensor], rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        return (self.set.to_float(split[0][rows]) - self.mean) / self.std, split[1][rows]

    def held_out(self) -> tuple[Tensor, Tensor]:
        return self.batch(self.train, slice(-HELD_OUT, None))

    def order(self, seed: int, epoch: int, batch_size: int) -> list[Tensor]:
        """The batches of an epoch, as indices: a function of (seed, epoch) alone."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return list(torch.randperm(self.n, generator=generator).to(self.mean.device).split(batch_size))


def build(
    s: Settings, method: str, seed: int, shape: tuple[int, int, int], classes: int
) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """A method's network, its loss and its optimiser; initial weights depend on the seed alone.

    Raises:
        ValueError: the rule cannot have this feedback structure.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: nn.Module = MODELS[s.model](shape, classes).to(s.device)
    criterion: nn.Module = nn.CrossEntropyLoss()
    lr, optimizer = OPTIMIZERS[s.optimizer]
    lr = s.lr or lr
    decay = 0.0
    if method != "backprop":
        make = RULES["fixed" if method in ("fa", "dfa") else method]
        feedback = {"fa": "layerwise", "dfa": "direct"}.get(method, s.feedback)
        if method == "joint":
            make = partial(make, signal="output" if feedback == "direct" else "loss")
        rule = make(**s.rule_args) if method == s.rule else make()
        decay = rule.decay if isinstance(rule, fb.KolenPollack) else 0.0
        net = fb.convert(
            net,
            feedback=feedback,
            rule=rule,
            noise_std=s.noise_std,
            noise=s.noise,
            seed=seed,
            every=s.every,
            fraction=s.fraction,
            antithetic=s.antithetic,
            warmup=s.warmup if rule.adapts else 0,
        )
        criterion = fb.PerturbedLoss(criterion, net)
    return net, criterion, optimizer(net.parameters(), lr=lr, weight_decay=decay / lr)


def train(
    settings: Settings,
    out: str | os.PathLike[str],
    *,
    checkpoint: dict[str, Any] | None = None,
    watch: Callable[[Progress], bool | None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Run the job, or the rest of it, and write its results into the folder ``out``.

    ``metrics.jsonl``: a line for each method, seed and epoch, as returned. ``summary.json``: settings, versions, hardware, results.
    ``accuracy.png``, ``angle.png``: the curves. ``METHOD-SEED.pt``: final weights. ``checkpoint.pt``: where to continue, rewritten after
    each epoch; files are replaced atomically, so there is a valid one at any time.

    Args:
        checkpoint: of ``load_checkpoint(out)``, to continue from.
        watch: called after each step; if it returns True the job saves a checkpoint and raises KeyboardInterrupt.

    Raises:
        ValueError, OSError: bad settings, missing or foreign data files, an ``out`` that is not empty; before anything is written.
        KeyboardInterrupt: watch asked for it.
    """
    folder = Path(out)
    if checkpoint is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out: {folder} is not an empty folder; name another, or continue the run there with --resume {folder}")
    data = _Images(settings)
    for method in settings.methods:  # what is impossible fails before anything is written
        build(settings, method, 0, data.shape, data.set.classes)
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads or (1 if settings.model == "mlp" else threads))
    try:
        records = _run(settings, data, folder, checkpoint or {"run": 0, "epoch": 0, "step": 0, "records": []}, watch)
        summary = {"settings": asdict(settings), "versions": versions(), "hardware": _hardware(settings), "results": summarise(records)}
    finally:
        torch.set_num_threads(threads)
    _write(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    curves(records, folder)
    return records


def _run(
    settings: Settings, data: _Images, folder: Path, at: dict[str, Any], watch: Callable[[Progress], bool | None]
) -> list[dict[str, Any]]:
    """The rest of the job from the checkpoint ``at``; returns the records."""
    runs = [(seed, method) for seed in settings.seeds for method in settings.methods]
    steps = -(-data.n // settings.batch_size)
    records: list[dict[str, Any]] = at["records"]
    _write(folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in records))  # drops lines that are newer than the checkpoint

    def save(run: int, epoch: int, step: int, **state: Any) -> None:
        state |= {"settings": asdict(settings), "records": records, "run": run, "epoch": epoch, "step": step}
        _save(folder / "checkpoint.pt", state)

    if not (folder / "checkpoint.pt").exists():
        save(0, 0, 0)
    for run, (seed, method) in list(enumerate(runs))[at["run"] :]:
        net, criterion, optimizer = build(settings, method, seed, data.shape, data.set.classes)
        resumed = run == at["run"] and "net" in at
        if resumed:
            net.load_state_dict(at["net"])
            optimizer.load_state_dict(at["optimizer"])
        angle = None
        for epoch in range(at["epoch"] if resumed else 0, settings.epochs):
            inside = resumed and epoch == at["epoch"]
            first = at["step"] if inside else 0
            totals = at["totals"].to(settings.device) if inside else torch.zeros(3, dtype=torch.float64, device=settings.device)
            seconds, start = at["seconds"] if inside else 0.0, time.perf_counter()
            for step, rows in list(enumerate(data.order(seed, epoch, settings.batch_size)))[first:]:
                x, y = data.batch(data.train, rows)
                logits = net(x)
                loss = criterion(logits, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    totals += torch.stack((loss.double() * len(y), (logits.argmax(1) == y).sum(), torch.full_like(loss, len(y))))
                done = (run * settings.epochs + epoch) * steps + step + 1
                accuracy = 100 * totals[1] / totals[2]
                if watch(Progress(method, seed, epoch + 1, done, len(runs) * settings.epochs * steps, loss.detach(), accuracy, angle)):
                    seconds += time.perf_counter() - start
                    save(run, epoch, step + 1, net=net.state_dict(), optimizer=optimizer.state_dict(), totals=totals, seconds=seconds)
                    raise KeyboardInterrupt
            train_loss, correct, _ = (totals / data.n).tolist()  # waits for the device
            seconds += time.perf_counter() - start
            test_loss, test_accuracy = _evaluate(net, data)
            diverged = not math.isfinite(train_loss + test_loss)
            points = {} if method == "backprop" or diverged else fb.metrics.alignment(net, criterion, *data.held_out())
            record = {
                "method": method,
                "seed": seed,
                "epoch": epoch + 1,
                "train_loss": _number(train_loss),
                "train_accuracy": 100 * correct,
                "test_loss": _number(test_loss),
                "test_accuracy": test_accuracy,
                "points": {name: {k: _number(p[k]) for k in ("angle", "update_angle")} for name, p in points.items()},
                "seconds": seconds,
                "images_per_second": data.n / seconds,
            }
            angle = _mean([p["angle"] for p in record["points"].values()])
            records.append(record)
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            totals = torch.zeros_like(totals)
            save(run, epoch + 1, 0, net=net.state_dict(), optimizer=optimizer.state_dict(), totals=totals, seconds=0.0)
        _save(folder / f"{method}-{seed}.pt", net.state_dict())
    save(len(runs), 0, 0)
    return records


def load_checkpoint(folder: str | os.PathLike[str]) -> tuple[Settings, dict[str, Any]]:
    """The settings and the state of the job in a folder; executes no code from the file.

    Raises:
        ValueError: there is no checkpoint, or it is damaged or of another program.
    """
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"{folder} has no checkpoint.pt to resume from")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        stored = {f.name: state["settings"][f.name] for f in fields(Settings)}
    except Exception as error:  # torch.load has no exception of its own for damaged files
        raise ValueError(f"{path} is not a checkpoint of fbkernels train ({type(error).__name__})") from error
    return Settings(**stored), state


def summarise(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Method -> quantity -> final (last epoch) and best (over epochs) value, each a mean and a standard error over seeds (None for one).

    Angles are final ones, by layer. The best epoch is picked on the test set: compare methods by the final one.
    """
    results: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(r["method"] for r in records):
        runs: dict[int, list[dict[str, Any]]] = {}
        for r in records:
            if r["method"] == method:
                runs.setdefault(r["seed"], []).append(r)
        last = [rs[-1] for rs in runs.values()]
        row: dict[str, Any] = {"seeds": list(runs)}
        for key, best in (("test_accuracy", max), ("train_accuracy", max), ("train_loss", min), ("test_loss", min)):
            bests = [best((r[key] for r in rs if r[key] is not None), default=None) for rs in runs.values()]
            row[key] = {"final": _spread([r[key] for r in last]), "best": _spread(bests)}
        for key in ("angle", "update_angle"):
            row[key] = {p: _spread([r["points"].get(p, {}).get(key) for r in last]) for p in last[0]["points"]}
        for key in ("seconds", "images_per_second"):
            row[key] = _spread([_mean([r[key] for r in rs]) for rs in runs.values()])
        results[method] = row
    return results


def versions() -> dict[str, str]:
    """Of the libraries that a job's numbers depend on."""
    return {"fbkernels": fb.__version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}


def _hardware(s: Settings) -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    device = torch.cuda.get_device_name(s.device) if s.device.startswith("cuda") else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": device}


def _evaluate(net: nn.Module, data: _Images) -> tuple[float, float]:
    """Loss and accuracy in % on the test set."""
    n = len(data.test[1])
    totals = torch.zeros(2, dtype=torch.float64, device=data.mean.device)
    net.eval()
    with torch.no_grad():
        for i in range(0, n, 500):
            x, y = data.batch(data.test, slice(i, i + 500))
            logits = net(x)
            totals += torch.stack((nn.functional.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) == y).sum()))
    net.train()
    loss, correct = (totals / n).tolist()
    return loss, 100 * correct


def _number(x: float) -> float | None:
    """JSON has no nan."""
    return x if math.isfinite(x) else None


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def _spread(values: list[float | None]) -> dict[str, float | None]:
    known = [v for v in values if v is not None]
    error = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    return {"mean": _mean(values), "standard_error": error}


def _save(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
