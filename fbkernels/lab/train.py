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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fbkernels as fb
from fbkernels._check import in_interval, integer, one_of, positive
from fbkernels.lab import files
from fbkernels.lab.data import NAMES, crop_and_flip, draw_crops, load
from fbkernels.lab.models import MODELS, block_points
from fbkernels.lab.plot import curves
from fbkernels.loss import network_of
from fbkernels.rules import RULES
from fbkernels.training.network import Network

__all__ = [
    "METHODS",
    "RECIPES",
    "Progress",
    "Settings",
    "build",
    "hardware",
    "load_checkpoint",
    "lr_factor",
    "number",
    "recipe",
    "spread",
    "summarise",
    "train",
    "versions",
]

HELD_OUT = 128  # images never trained on, the batch that angles are measured on: the last of the training set, or validation images
SAVE_EVERY = 60.0  # seconds between two checkpoints, at most: what a kill -9 loses
VALIDATION = 5000  # of CIFAR's 50,000 training images

METHODS = (*RULES, "backprop", "fa", "dfa")
OPTIMIZERS: dict[str, tuple[float, Callable[..., torch.optim.Optimizer]]] = {
    "adam": (1e-3, torch.optim.AdamW),  # with weight_decay=0 it is Adam
    "sgd": (0.05, torch.optim.SGD),
    "momentum": (0.05, partial(torch.optim.SGD, momentum=0.9, nesterov=True)),
}
_CIFAR = {"batch_size": 128, "schedule": "cosine", "augment": True, "dtype": "bfloat16"}
_RESIDUAL = {
    **_CIFAR,
    "optimizer": "momentum",
    "lr": 0.1,
    "weight_decay": 5e-4,
    "feedback": "layerwise",
    "rule": "weight-mirror",
    "share": 4,
}
# where a model's settings are not those of Settings; lr and weight_decay go with the optimiser, rule_args with the rule, share with direct
# feedback, augment with CIFAR, bfloat16 with a GPU
RECIPES: dict[str, dict[str, Any]] = {
    "mlp": {},
    "cnn": {},
    "paper_cnn": {
        **_CIFAR,
        "epochs": 60,
        "lr": 1e-4,  # at 3e-4 the loss rises above chance while B is young
        "feedback": "direct",
        "rule": "joint",
        "compare": ("backprop", "dfa"),
    },
    "resnet20": {**_RESIDUAL, "epochs": 100},
    "resnet18": {**_RESIDUAL, "epochs": 60},
    "wrn16_4": {**_RESIDUAL, "epochs": 100},
}


@dataclass(frozen=True)
class Settings:
    """What a job computes; equal settings give equal numbers. ``recipe`` makes those that suit a model.

    ``rule`` and each of ``compare`` name a method: a rule with the job's ``feedback`` (rivals that do not come with that: with the other),
    "fa" (Fixed, layerwise), "dfa" (Fixed, direct) or "backprop" (the plain model under plain autograd). "joint" is signal "output" in
    direct and "loss" in layerwise. ``rule_args`` are arguments of ``rule`` alone; the rivals have their defaults. "kolen-pollack" makes
    the optimiser decay W by the rule's decay.

    ``validation`` images, the same for every seed, are taken out of the training set and evaluated after each epoch, and the test set is
    read once, after the last; with 0 the test set is evaluated after each epoch. ``points`` "block" is one feedback point for each
    residual block, and ``share`` and ``rank`` are convert's; all are of direct feedback, layerwise rivals have points at each layer and
    share nothing.

    Raises:
        ValueError, TypeError: a value that is not of the form above; the message names it.
    """

    data: str = "digits"
    data_dir: str | None = None
    model: str = "mlp"
    width: float = 1.0  # a factor of the channels and hidden units of the large models
    feedback: str = "layerwise"
    rule: str = "ridge"
    rule_args: Mapping[str, float] = field(default_factory=dict)
    compare: tuple[str, ...] = ("backprop", "fa")
    epochs: int = 20
    batch_size: int = 64
    train_images: int | None = None  # the first so many; None: all that are not held out
    validation: int = 0
    augment: bool = False  # data.crop_and_flip
    optimizer: str = "adam"
    lr: float | None = None  # None: the optimiser's in OPTIMIZERS
    weight_decay: float = 0.0
    schedule: str = "constant"  # or "cosine", see lr_factor
    label_smoothing: float = 0.0
    points: str = "layer"  # or "block"
    share: int | str = 1
    rank: int | None = None
    noise_std: float = 0.05
    noise: str = "gaussian"
    seeds: tuple[int, ...] = (0,)
    every: int = 1
    fraction: float = 1.0
    antithetic: bool = False
    warmup: int | str = "auto"  # steps, or as convert does; rivals without a B to learn start at once
    device: str = "cpu"
    dtype: str = "float32"  # or "bfloat16": autocast
    compile: bool = False  # torch.compile; direct feedback and backprop
    threads: int | None = None  # None: one for mlp, which is too small to share between cores, else torch's own choice

    def __post_init__(self) -> None:
        one_of("data", self.data, NAMES)
        one_of("model", self.model, MODELS)
        if positive("width", self.width) != 1 and self.model in ("mlp", "cnn"):
            raise ValueError(f"width must be 1 with {self.model}, got {self.width}")
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        one_of("schedule", self.schedule, ("constant", "cosine"))
        one_of("points", self.points, ("layer", "block"))
        one_of("dtype", self.dtype, ("float32", "bfloat16"))
        in_interval("label_smoothing", self.label_smoothing, 0, 1, open_high=True)
        in_interval("weight_decay", self.weight_decay, 0, 1)
        integer("validation", self.validation, 0)
        for name, methods in (("rule", (self.rule,)), ("compare", self.compare)):
            for method in methods:
                one_of(name, method, METHODS)
        known = [p for p in inspect.signature(RULES[self.rule]).parameters if p != "signal"] if self.rule in RULES else []
        for name in self.rule_args:
            if name not in known:
                raise ValueError(f"rule_args: {self.rule} has no argument {name!r}, it has {', '.join(known) or 'none'}")
        for name in ("epochs", "batch_size", *(("train_images",) if self.train_images is not None else ())):
            integer(name, getattr(self, name), 1)
        if "kolen-pollack" in self.methods and (self.optimizer == "momentum" or self.schedule != "constant"):
            raise ValueError("kolen-pollack needs a decay of W that is B's in each step: optimizer adam or sgd, schedule constant")
        if self.feedback == "layerwise" and (self.points, self.share) != ("layer", 1):
            raise ValueError(f"points must be 'layer' and share 1 with layerwise feedback, got {self.points!r} and {self.share!r}")
        if self.rank is not None and integer("rank", self.rank, 1) and self.feedback == "layerwise":
            raise ValueError(f"rank must be None with layerwise feedback, got {self.rank}")
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


def recipe(**given: Any) -> Settings:
    """The settings given, and for the rest what suits the model (``RECIPES``), the data and the device.

    Raises:
        ValueError, TypeError: as Settings.
    """
    s = Settings(**{k: v for k, v in given.items() if k in ("data", "model", "device")})
    cifar = s.data in ("cifar10", "cifar100")
    own = Settings(**RECIPES[s.model] | {"share": 1})
    drop = {"augment"} if not cifar else set()
    drop |= {"dtype"} if not s.device.startswith("cuda") else set()
    drop |= {"lr", "weight_decay"} if given.get("optimizer", own.optimizer) != own.optimizer else set()
    drop |= {"share"} if given.get("feedback", own.feedback) == "layerwise" else set()
    drop |= {"rule_args"} if given.get("rule", own.rule) != own.rule else set()
    defaults = {k: v for k, v in RECIPES[s.model].items() if k not in drop}
    return Settings(**{"validation": VALIDATION if cifar else 0, **defaults, **given})


def lr_factor(schedule: str, step: int, steps: int) -> float:
    """What the learning rate is multiplied by in step 0 .. steps - 1: with "cosine" it rises linearly over the first twentieth, then falls
    to 0 as half a cosine."""
    if schedule == "constant":
        return 1.0
    rise = -(-steps // 20)
    return (step + 1) / rise if step < rise else (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


class Progress(NamedTuple):
    """What ``watch`` sees after a step. loss: of the batch; accuracy: in % on the epoch's batches so far; net: what trains."""

    method: str
    seed: int
    epoch: int
    done: int
    total: int
    loss: Tensor
    accuracy: Tensor
    net: nn.Module


class _Images:
    """A data set on the device, standardised per channel by the moments of the images that are trained on."""

    def __init__(self, s: Settings) -> None:
        data = load(s.data, s.data_dir)
        total = len(data.train_y)
        available = total - (s.validation or HELD_OUT)
        if available < 1:
            raise ValueError(f"validation must be less than {total}, the training images of {s.data}, got {s.validation}")
        if s.rank is not None and s.rank > data.classes:
            raise ValueError(f"rank must be at most {data.classes}, the classes of {s.data}, got {s.rank}")
        self.n = available if s.train_images is None else s.train_images
        if not 1 <= self.n <= available:
            raise ValueError(
                f"train_images must be 1 to {available}, all of {s.data} but {total - available} held out "
                f"{'for validation' if s.validation else 'to measure angles'}, got {s.train_images}"
            )
        rows = torch.randperm(total, generator=torch.Generator().manual_seed(0)) if s.validation else torch.arange(total)
        rows, held = rows[:available].sort().values[: self.n], rows[available:]
        self.to_float, self.classes = data.to_float, data.classes
        _, channels, height, width = data.train_x.shape
        self.shape = channels, height, width
        moments = torch.zeros(2, channels, dtype=torch.float64)
        for part in rows.split(1000):
            x = data.to_float(data.train_x[part]).double()
            moments += torch.stack((x.sum((0, 2, 3)), x.square().sum((0, 2, 3))))
        mean, square = moments / (self.n * height * width)
        std = (square - mean.square()).clamp_min(1e-12).sqrt()
        self.mean, self.std = (v.float().view(-1, 1, 1).to(s.device) for v in (mean, std))
        self.format = torch.contiguous_format if s.model == "mlp" else torch.channels_last
        self.augment = s.augment
        self.train, self.held, self.test = (
            (x.to(s.device), y.to(s.device))
            for x, y in ((data.train_x[rows], data.train_y[rows]), (data.train_x[held], data.train_y[held]), (data.test_x, data.test_y))
        )

    def batch(self, split: tuple[Tensor, Tensor], rows: Tensor | slice, crops: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = split[0][rows]
        x = x if crops is None else crop_and_flip(x, crops)
        return ((self.to_float(x) - self.mean) / self.std).contiguous(memory_format=self.format), split[1][rows]

    def epoch(self, seed: int, epoch: int, batch_size: int) -> list[tuple[Tensor, Tensor | None]]:
        """The batches of an epoch, as indices and crops: a function of (seed, epoch) alone."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        device = self.mean.device
        rows = torch.randperm(self.n, generator=generator).to(device).split(batch_size)
        crops = draw_crops(self.n, generator).to(device).split(batch_size) if self.augment else [None] * len(rows)
        return list(zip(rows, crops, strict=True))


def build(
    s: Settings, method: str, seed: int, shape: tuple[int, int, int], classes: int
) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """A method's network, its loss and its optimiser; initial weights depend on the seed alone.

    Raises:
        ValueError: the rule cannot have this feedback structure, or the network no points for each block.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        narrowed = {} if s.width == 1 else {"width": s.width}
        net: nn.Module = MODELS[s.model](shape, classes, **narrowed).to(s.device)
    if s.model != "mlp":
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's own types
    criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=s.label_smoothing)
    lr, optimizer = OPTIMIZERS[s.optimizer]
    lr = s.lr or lr
    decay = s.weight_decay
    if method != "backprop":
        make = RULES["fixed" if method in ("fa", "dfa") else method]
        feedback = {"fa": "layerwise", "dfa": "direct"}.get(method, s.feedback)
        if method == "joint":
            make = partial(make, signal="output" if feedback == "direct" else "loss")
        rule = make(**s.rule_args) if method == s.rule else make()
        if method != s.rule and feedback not in rule.structures:
            (feedback,) = rule.structures
        if s.compile and feedback == "layerwise" and rule.adapts and rule.regresses:
            raise ValueError(f"compile: {method} cannot be compiled in layerwise feedback")
        decay = rule.decay / lr if isinstance(rule, fb.KolenPollack) else decay
        blocks = feedback == "direct" and s.points == "block"
        shapes = feedback == "direct" and not rule.private  # its B
        points = block_points(net) if blocks else None
        if blocks and points is None:
            raise ValueError(f"points must be 'layer' with {s.model}, which has no residual blocks, got 'block'")
        net = fb.convert(
            net,
            feedback=feedback,
            rule=rule,
            noise_std=s.noise_std,
            noise=s.noise,
            seed=seed,
            points=points,
            share=s.share if shapes else 1,
            rank=s.rank if shapes else None,
            every=s.every,
            fraction=s.fraction,
            antithetic=s.antithetic,
            warmup=s.warmup if rule.adapts or s.warmup == "auto" else 0,
        )
        criterion = fb.PerturbedLoss(criterion, net)
    return net, criterion, optimizer(net.parameters(), lr=lr, weight_decay=decay)


def train(
    settings: Settings,
    out: str | os.PathLike[str],
    *,
    checkpoint: dict[str, Any] | None = None,
    watch: Callable[[Progress], bool | None] = lambda _: None,
    log: Callable[[dict[str, Any]], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Run the job, or the rest of it, and write its results into the folder ``out``.

    ``metrics.jsonl``: a line for each method, seed and epoch, as returned: "explained" is ``fb.metrics.explained``, "warning" what
    ``fb.metrics.runaway`` said, of epochs behind the warm-up. ``summary.json``: settings, versions, hardware, results.
    ``accuracy.png``, ``angle.png``: the curves. ``METHOD-SEED.pt``: final weights. ``checkpoint.pt``: where to continue, rewritten after
    each epoch; files are replaced atomically, so there is a valid one at any time.

    Args:
        checkpoint: of ``load_checkpoint(out)``, to continue from.
        watch: called after each step; if it returns True the job saves a checkpoint and raises KeyboardInterrupt.
        log: called with each new record.

    Raises:
        ValueError, OSError: bad settings, missing or foreign data files, an ``out`` that is not empty or that another process writes to,
            before anything is written; a disk that is full, from which the job goes on where its checkpoint is.
        KeyboardInterrupt: watch asked for it.
    """
    folder = Path(out)
    if checkpoint is None:
        _check_empty(folder)
    data = _Images(settings)
    for method in settings.methods:  # what is impossible fails before anything is written
        build(settings, method, 0, data.shape, data.classes)
    threads = torch.get_num_threads()
    with files.locked(folder):
        if checkpoint is None:
            _check_empty(folder)  # another process may have had it since
        torch.set_num_threads(settings.threads or (1 if settings.model == "mlp" else threads))
        try:
            with torch.random.fork_rng([settings.device] if settings.device.startswith("cuda") else []):
                records = _run(settings, data, folder, checkpoint or {"run": 0, "epoch": 0, "step": 0, "records": []}, watch, log)
            summary = {
                "settings": asdict(settings),
                "versions": versions(),
                "hardware": hardware(settings.device),
                "results": summarise(records),
            }
        finally:
            torch.set_num_threads(threads)
        files.write(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        curves(records, folder)
    return records


def _check_empty(folder: Path) -> None:
    # a start that was killed before its first checkpoint leaves a lock and a part of a file
    if folder.exists() and (not folder.is_dir() or any(p.name != files.LOCK and p.suffix != ".tmp" for p in folder.iterdir())):
        raise ValueError(f"out: {folder} is not an empty folder; name another, or continue the run there with --resume {folder}")


def _run(
    settings: Settings,
    data: _Images,
    folder: Path,
    at: dict[str, Any],
    watch: Callable[[Progress], bool | None],
    log: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """The rest of the job from the checkpoint ``at``; returns the records."""
    runs = [(seed, method) for seed in settings.seeds for method in settings.methods]
    steps = -(-data.n // settings.batch_size)
    records: list[dict[str, Any]] = at["records"]
    guess = fb.metrics.constant_guess(nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing), data.train[1])

    def save(run: int, epoch: int, step: int, **state: Any) -> None:
        state |= {"settings": asdict(settings), "records": records, "run": run, "epoch": epoch, "step": step}
        files.save(folder / "checkpoint.pt", state)

    if not (folder / "checkpoint.pt").exists():
        save(0, 0, 0)
    files.write(folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in records))  # drops lines that are newer than the checkpoint
    saved = time.monotonic()
    for run, (seed, method) in list(enumerate(runs))[at["run"] :]:
        net, criterion, optimizer = build(settings, method, seed, data.shape, data.classes)
        base_lr = optimizer.param_groups[0]["lr"]

        def forward(x: Tensor, y: Tensor, net: nn.Module = net, criterion: nn.Module = criterion) -> tuple[Tensor, Tensor]:
            with _autocast(settings):
                logits = net(x)
                return criterion(logits, y), logits.detach()

        if settings.compile:
            torch.compiler.reset()  # Dynamo compiles one function for a few networks only
            forward = torch.compile(forward, fullgraph=True, dynamic=False)
        resumed = run == at["run"] and "net" in at
        if resumed:
            net.load_state_dict(at["net"])
            if at["explained"] is not None:
                network_of(net).state["explained"] = at["explained"].to(settings.device)
            optimizer.load_state_dict(at["optimizer"])
        for epoch in range(at["epoch"] if resumed else 0, settings.epochs):
            inside = resumed and epoch == at["epoch"] and at["step"] > 0
            steady = at["steady"] if inside else not _warming(net)
            first = at["step"] if inside else 0
            totals = at["totals"].to(settings.device) if inside else torch.zeros(3, dtype=torch.float64, device=settings.device)
            seconds, start = at["seconds"] if inside else 0.0, time.perf_counter()
            for step, (rows, crops) in list(enumerate(data.epoch(seed, epoch, settings.batch_size)))[first:]:
                x, y = data.batch(data.train, rows, crops)
                t = epoch * steps + step
                torch.manual_seed(seed * 1_000_003 + t)  # dropout
                for group in optimizer.param_groups:
                    group["lr"] = base_lr * lr_factor(settings.schedule, t, settings.epochs * steps)
                loss, logits = forward(x, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    totals += torch.stack((loss.double() * len(y), (logits.argmax(1) == y).sum(), torch.full_like(loss, len(y))))
                done = (run * settings.epochs + epoch) * steps + step + 1
                accuracy = 100 * totals[1] / totals[2]
                stop = watch(Progress(method, seed, epoch + 1, done, len(runs) * settings.epochs * steps, loss.detach(), accuracy, net))
                if stop or time.monotonic() - saved > SAVE_EVERY:
                    spent = seconds + time.perf_counter() - start
                    save(run, epoch, step + 1, **_state(net, optimizer), totals=totals, seconds=spent, steady=steady)
                    saved = time.monotonic()
                if stop:
                    raise KeyboardInterrupt
            train_loss, correct, _ = (totals / data.n).tolist()  # waits for the device
            seconds += time.perf_counter() - start
            nothing = None, None
            val_loss, val_accuracy = _evaluate(settings, net, data, data.held) if settings.validation else nothing
            read = not settings.validation or epoch + 1 == settings.epochs
            test_loss, test_accuracy = _evaluate(settings, net, data, data.test) if read else nothing
            diverged = not all(map(math.isfinite, (train_loss, val_loss or 0.0, test_loss or 0.0)))
            probe = data.batch(data.held, slice(HELD_OUT))
            torch.manual_seed(seed)
            points = {} if method == "backprop" or diverged else fb.metrics.alignment(net, criterion, *probe)
            share, parts = (None, {}) if method == "backprop" else fb.metrics.explained(net)
            earlier = [r for r in records if (r["method"], r["seed"]) == (method, seed)]
            named = any(r.get("warning") for r in earlier)
            losses = [*(math.nan if r["train_loss"] is None else r["train_loss"] for r in earlier), train_loss]
            record = {
                "method": method,
                "seed": seed,
                "epoch": epoch + 1,
                "train_loss": _number(train_loss),
                "train_accuracy": 100 * correct,
                "val_loss": _number(val_loss),
                "val_accuracy": val_accuracy,
                "test_loss": _number(test_loss),
                "test_accuracy": test_accuracy,
                "explained": _number(share),
                "points": {
                    name: {k: _number(p[k]) for k in ("angle", "update_angle")} | {"explained": _number(parts.get(name))}
                    for name, p in points.items()
                },
                "warning": None if named or not steady else fb.metrics.runaway(net, losses, guess),
                "seconds": seconds,
                "images_per_second": data.n / seconds,
            }
            records.append(record)
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            log(record)
            save(run, epoch + 1, 0, **_state(net, optimizer))
        files.save(folder / f"{method}-{seed}.pt", net.state_dict())
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
    state = files.load(path)
    try:
        stored = {f.name: state["settings"][f.name] for f in fields(Settings)}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or no checkpoint of fbkernels train ({type(error).__name__})") from error
    return Settings(**stored), state


def summarise(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Method -> quantity -> final (last epoch) and best (over epochs) value, each a mean and a standard error over seeds (None for one).

    Angles are final ones, by layer. Where there is no validation set, best is picked on the test set: compare methods by the final value.
    """
    results: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(r["method"] for r in records):
        runs: dict[int, list[dict[str, Any]]] = {}
        for r in records:
            if r["method"] == method:
                runs.setdefault(r["seed"], []).append(r)
        last = [rs[-1] for rs in runs.values()]
        row: dict[str, Any] = {"seeds": list(runs)}
        for key in ("test_accuracy", "val_accuracy", "train_accuracy", "train_loss", "val_loss", "test_loss"):
            best = max if key.endswith("accuracy") else min
            bests = [best((r[key] for r in rs if r[key] is not None), default=None) for rs in runs.values()]
            row[key] = {"final": spread([r[key] for r in last]), "best": spread(bests)}
        for key in ("angle", "update_angle"):
            row[key] = {p: spread([r["points"].get(p, {}).get(key) for r in last]) for p in last[0]["points"]}
        row["explained"] = spread([r.get("explained") for r in last])
        for key in ("seconds", "images_per_second"):
            row[key] = spread([_mean([r[key] for r in rs]) for rs in runs.values()])
        results[method] = row
    return results


def versions() -> dict[str, str]:
    """Of the libraries that a job's numbers depend on."""
    return {"fbkernels": fb.__version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}


def hardware(device: str) -> dict[str, Any]:
    """What a job's times depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def _state(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    network = _network(net)
    explained = None if network is None else network.state.get("explained")
    return {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "explained": explained}


def _warming(net: nn.Module) -> bool:
    """Whether the next step is one in which only B learns."""
    network = _network(net)
    return network is not None and network.holds


def _network(net: nn.Module) -> Network | None:
    """What the points share; None of backprop's plain model."""
    network = getattr(net, "feedback", None)
    return network if isinstance(network, Network) else None


def _autocast(s: Settings) -> torch.autocast:
    return torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=s.dtype == "bfloat16")


def _evaluate(s: Settings, net: nn.Module, data: _Images, split: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Loss and accuracy in % on the validation or the test set."""
    n = len(split[1])
    totals = torch.zeros(2, dtype=torch.float64, device=data.mean.device)
    net.eval()
    with torch.no_grad(), _autocast(s):
        for i in range(0, n, 500):
            x, y = data.batch(split, slice(i, i + 500))
            logits = net(x)
            totals += torch.stack((nn.functional.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) == y).sum()))
    net.train()
    loss, correct = (totals / n).tolist()
    return loss, 100 * correct


def _number(x: float | None) -> float | None:
    """JSON has no nan."""
    return x if x is not None and math.isfinite(x) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """ "mean" and "standard_error" of what is known; None where there is none, or one."""
    known = [v for v in values if v is not None]
    error = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    return {"mean": _mean(values), "standard_error": error}


def number(value: Mapping[str, float | None], digits: int) -> str:
    """A ``spread``, for a table."""
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:.{digits}f}" + ("" if value["standard_error"] is None else f" ± {value['standard_error']:.{digits}f}")
