"""The command line: ``fbkernels train``, ``fbkernels bench``, ``fbkernels reproduce`` and ``fbkernels info``."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

import fbkernels as fb
from fbkernels import ops
from fbkernels._check import integer, one_of
from fbkernels.lab import train as job
from fbkernels.lab.data import NAMES
from fbkernels.lab.models import MODELS
from fbkernels.lab.paper import EXPERIMENTS, SCALES, reproduce

__all__ = ["main"]

COLUMNS = ("method", "seed", "epoch", "loss", "train %", "val %", "test %", "B %", "angle", "s")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(map(int, _names(text)))
    except ValueError:
        seeds = ()
    if len(seeds) == 1 and "," not in text:
        seeds = tuple(range(min(seeds[0], 1001)))
    if not 1 <= len(seeds) <= 1000:
        raise argparse.ArgumentTypeError(f"expected a number of seeds, 1 to 1000, or a list of seeds such as 0,3,7, got {text!r}")
    return seeds


def _warmup(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected auto or a number of steps, got {text!r}")
    return text if text == "auto" else int(text)


def _sizes(text: str) -> tuple[int, ...]:
    sizes = _names(text)
    if len(sizes) < 3 or not all(n.isdecimal() and int(n) for n in sizes) or int(sizes[-1]) < 2:
        raise argparse.ArgumentTypeError(f"expected an input, hidden layers and two or more classes, such as 784,50,20,10, got {text!r}")
    return tuple(map(int, sizes))


def _rule_arg(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fbkernels", description="Train networks by learned feedback weights.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | bench | reproduce | info")
    commands.add_parser("info", help="versions, backends and what the compiled part contains", allow_abbrev=False)
    p = commands.add_parser(
        "bench",
        help="time a network of yours, ours against its rivals",
        allow_abbrev=False,
        description="Time fbkernels against backprop and what else torch can do, on this machine, in turns. Without --op, --layer, --step "
        "or --sweep: --layer and --step. OMP_NUM_THREADS sets the threads.",
    )
    p.add_argument("--op", nargs="*", metavar="NAME", help="ops on the network's hardest layer; default: all of them")
    p.add_argument("--layer", action="store_true", help="that layer's part of a training step")
    p.add_argument("--step", action="store_true", help="a whole training step")
    p.add_argument("--sweep", nargs="*", metavar="AXIS", help="how a step's cost grows with batch, width, classes, depth: minutes")
    network = p.add_mutually_exclusive_group()
    network.add_argument("--model", choices=tuple(MODELS), default="mlp", help="default: mlp")
    network.add_argument("--sizes", type=_sizes, metavar="N,N,...", help="of a tanh network: input, hidden layers, classes")
    p.add_argument("--batch", type=int, default=64, metavar="N", help="default: 64")
    p.add_argument("--device", default="cpu", help="default: cpu")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    # options that are not given stay out of the namespace: --resume compares the others with the run's
    p = commands.add_parser(
        "train",
        help="train a network and its rivals",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Train a network with learned feedback, and rivals on the same seeds, initial weights and batches. Defaults are "
        "the model's recipe.",
    )
    default = job.Settings()

    def recipes(name: str) -> str:
        own = {model: r.get(name, getattr(default, name)) for model, r in job.RECIPES.items()}
        return "default: " + ", ".join(f"{v} ({' '.join(m for m in own if own[m] == v)})" for v in dict.fromkeys(own.values()))

    p.add_argument("--data", choices=NAMES, help="default: digits, which needs no files")
    p.add_argument("--data-dir", metavar="DIR", help="folder with the published files of mnist, cifar10 or cifar100")
    p.add_argument("--model", choices=tuple(MODELS), help=f"default: {default.model}")
    p.add_argument("--width", type=float, metavar="F", help="of the large models: a factor of channels and hidden units")
    p.add_argument("--feedback", choices=("direct", "layerwise"), help="default: the model's")
    p.add_argument(
        "--rule",
        metavar="NAME",
        help=f"{', '.join(job.METHODS)}; default: the model's. joint is joint-output with direct feedback, joint-loss with layerwise; "
        "fa is fixed and layerwise, dfa fixed and direct, backprop the plain model; kolen-pollack also decays W",
    )
    p.add_argument("--rule-arg", dest="rule_args", type=_rule_arg, action="append", metavar="NAME=VALUE", help="such as gamma=0.1")
    p.add_argument("--compare", type=_names, metavar="A,B,...", help="rivals; '' for none")
    p.add_argument("--epochs", type=int, metavar="N", help=recipes("epochs"))
    p.add_argument("--batch-size", type=int, metavar="N", help=recipes("batch_size"))
    p.add_argument("--train-images", type=int, metavar="N", help="the first N; default: all that are not held out")
    p.add_argument(
        "--validation",
        type=int,
        metavar="N",
        help=f"training images held out and evaluated after each epoch, the test set once, after the last; default: {job.VALIDATION} of "
        "CIFAR, else 0, and the test set is evaluated after each epoch",
    )
    p.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="random crops of the padded image, mirrored or not; default: CIFAR but with mlp and cnn",
    )
    p.add_argument("--optimizer", choices=tuple(job.OPTIMIZERS), help=recipes("optimizer"))
    own = ", ".join(f"{lr} with {name}" for name, (lr, _) in job.OPTIMIZERS.items())
    p.add_argument("--lr", type=float, help=f"{recipes('lr')}; None, or with another optimizer: {own}")
    p.add_argument("--weight-decay", type=float, metavar="D", help=recipes("weight_decay"))
    p.add_argument("--schedule", choices=("constant", "cosine"), help="of lr; cosine rises over the first 20th")
    p.add_argument("--label-smoothing", type=float, metavar="E", help="default: 0")
    p.add_argument("--points", choices=("layer", "block"), help="direct feedback to each layer or residual block; default: layer")
    p.add_argument(
        "--share",
        type=lambda text: int(text) if text.isdecimal() else text,
        metavar="S",
        help="direct feedback: S x S units of a map, or 'channel', have one noise and one row of B; default: 4 for ResNets, else 1",
    )
    p.add_argument("--rank", type=int, metavar="R", help="direct feedback: B has R columns, for random sums of the outputs' errors")
    p.add_argument("--noise-std", type=float, metavar="SIGMA", help=f"in units of the activities; default: {default.noise_std}")
    p.add_argument("--noise", choices=("gaussian", "rademacher"), help=f"default: {default.noise}")
    p.add_argument("--seeds", type=_seeds, metavar="K", help="number of seeds, or a list such as 0,3,7; default: 1")
    p.add_argument("--every", type=int, metavar="K", help="perturb each K-th step only")
    p.add_argument("--fraction", type=float, metavar="F", help="perturb the first fraction F of a batch only")
    p.add_argument("--antithetic", action="store_true", help="perturb by +xi and -xi")
    p.add_argument(
        "--warmup",
        type=_warmup,
        metavar="STEPS",
        help="first steps in which only B learns; default: auto, until B explains what it can, where it starts at zero",
    )
    p.add_argument("--device", help=f"default: {default.device}")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of autocast; default: bfloat16 on a GPU, but mlp and cnn")
    p.add_argument("--compile", action="store_true", help="torch.compile; not ridge, lms, nlms and joint in layerwise")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: 1 for mlp, else torch's choice")
    where = p.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, metavar="DIR", help="new or empty folder for the results; default: a new one in runs/")
    where.add_argument("--resume", type=Path, metavar="DIR", help="continue the interrupted run in DIR, bit for bit, with its settings")
    p = commands.add_parser(
        "reproduce",
        help="a figure or table of the paper",
        allow_abbrev=False,
        description="Make a figure or table of the paper, in its own settings. Asked for again, it goes on where it was.",
    )
    p.add_argument("experiment", choices=tuple(EXPERIMENTS), help="; ".join(f"{name}: {e.about}" for name, e in EXPERIMENTS.items()))
    p.add_argument("--scale", choices=SCALES, default="smoke", help="seconds, minutes, or the paper's own length; default: smoke")
    p.add_argument(
        "--seeds", type=_seeds, metavar="K", help="number of seeds, or a list such as 0,3,7; default: 1 with smoke, else the paper's"
    )
    p.add_argument("--methods", type=_names, metavar="A,B,...", help="lines of the table; default: all")
    p.add_argument(
        "--faithful", action="store_true", help="what the authors' code did, quirks included, instead of what the paper describes"
    )
    p.add_argument("--data-dir", metavar="DIR", required=True, help="folder with the published files")
    p.add_argument("--device", default="cpu", help="default: cpu")
    p.add_argument("--processes", type=int, metavar="N", help="trainings side by side; default: as many as there are cores, 1 on a GPU")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: runs/EXPERIMENT-SCALE[-faithful]")
    return parser


def _reproduce(given: dict[str, Any]) -> int:
    name, scale = given["experiment"], given["scale"]
    experiment = EXPERIMENTS[name]
    faithful, device = given["faithful"], given["device"]
    out = given["out"] or Path("runs") / f"{name}-{scale}{'-faithful' * faithful}"
    processes = (1 if device.startswith("cuda") else os.cpu_count() or 1) if given["processes"] is None else given["processes"]
    command = ["fbkernels", "reproduce", name, "--scale", scale, *(["--faithful"] if faithful else []), "--data-dir", "D"]
    if given["methods"]:
        command += ["--methods", ",".join(given["methods"])]
    seeds = given["seeds"] or tuple(range(1 if scale == "smoke" else experiment.seeds))
    command += ["--seeds", str(len(seeds)) if seeds == tuple(range(len(seeds))) else ",".join(map(str, seeds))]
    try:
        tables = reproduce(
            name,
            experiment,
            out,
            scale=scale,
            seeds=seeds,
            faithful=faithful,
            methods=given["methods"],
            data_dir=given["data_dir"],
            device=device,
            processes=integer("processes", processes, 1, 1024),
            command=command,
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    for table in tables:
        Console().print(table.rich())
    print(f"results.json, table.md and the figures are in {out}")
    return 0


def _train(given: dict[str, Any]) -> int:
    out, resume = given.pop("out", None), given.pop("resume", None)
    if "rule_args" in given:
        given["rule_args"] = dict(given["rule_args"])
    state = None
    if resume is not None:
        out = resume
        settings, state = job.load_checkpoint(resume)
        for name, value in given.items():
            was = getattr(settings, name)
            if value != was:
                raise ValueError(f"--resume cannot change {name}: the run in {resume} was started with {was}, got {value}")
    else:
        settings = job.recipe(**given)
        if out is None:
            out = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.data}-{settings.model}-{settings.feedback}-{settings.rule}"

    interrupted = False
    shown: list[dict[str, Any]] = []

    def interrupt(*_: Any) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait for the step

    columns = TextColumn("{task.description}  {task.fields[state]}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("reading data", total=None, state="")

            def log(record: dict[str, Any]) -> None:
                if not shown:
                    bar.console.print(_line(*COLUMNS))
                shown.append(record)
                angles = [p["angle"] for p in record["points"].values() if p["angle"] is not None]
                numbers = (record["train_loss"], record["train_accuracy"], record["val_accuracy"], record["test_accuracy"])
                texts = ("-" if v is None else f"{v:.{d}f}" for v, d in zip(numbers, (3, 2, 2, 2), strict=True))
                angle = f"{sum(angles) / len(angles):.0f}" if angles else "-"
                share = _percent(record["explained"])
                bar.console.print(
                    _line(record["method"], record["seed"], record["epoch"], *texts, share, angle, f"{record['seconds']:.1f}")
                )
                if record["warning"]:
                    bar.console.print(f"{record['method']}: {record['warning']}", highlight=False, markup=False)

            def watch(p: job.Progress) -> bool:
                if p.done % 20 == 0 or p.done == p.total:  # reading numbers waits for the device
                    bar.update(
                        task,
                        completed=p.done,
                        total=p.total,
                        description=f"{p.method}, epoch {p.epoch}/{settings.epochs}" + f", seed {p.seed}" * (len(settings.seeds) > 1),
                        state=f"loss {float(p.loss):.3f}  accuracy {float(p.accuracy):.1f}%  B explains {_share(p)}",
                    )
                return interrupted

            records = job.train(settings, out, checkpoint=state, watch=watch, log=log)
    except KeyboardInterrupt:
        how = f"continue with: fbkernels train --resume {out}" if (out / "checkpoint.pt").is_file() else "nothing was written yet"
        print(f"interrupted; {how}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGINT, before)
    Console().print(_table(job.summarise(records), settings))
    print(f"metrics.jsonl, summary.json, accuracy.png and angle.png are in {out}")
    return 0


def _percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.0f}"


def _share(p: job.Progress) -> str:
    return "-" if p.method == "backprop" else f"{_percent(fb.metrics.explained(p.net)[0])}%"


def _line(*values: Any) -> str:
    return "".join(str(v).ljust(15) if i == 0 else str(v).rjust(8) for i, v in enumerate(values))


def _table(results: dict[str, dict[str, Any]], s: job.Settings) -> Table:
    table = Table(
        title=f"{s.data}, {s.model}, {s.feedback} feedback, epoch {s.epochs}, {len(s.seeds)} seed{'s' * (len(s.seeds) > 1)}",
        caption="angle to backprop's gradient in degrees, for each layer; ± standard error over seeds",
    )
    for head in ("method", "test %", "train loss", "angles", "s/epoch"):
        table.add_column(head, justify="left" if head == "method" else "right", no_wrap=head != "angles")
    for method, r in results.items():
        angles = "  ".join(job.number(a, 0).replace(" ", "") for a in r["angle"].values()) or ("0" if method == "backprop" else "-")
        seconds = f"{r['seconds']['mean']:.2f}"
        table.add_row(method, job.number(r["test_accuracy"]["final"], 2), job.number(r["train_loss"]["final"], 3), angles, seconds)
    return table


def _bench(given: dict[str, Any]) -> int:
    from fbkernels.bench import suite

    batch, device = integer("--batch", given["batch"], 2), given["device"]
    problem = suite.mlp(given["sizes"], batch, device) if given["sizes"] else suite.model(given["model"], batch, device)

    def names(option: str, known: Sequence[str]) -> list[str]:
        values = given[option]
        return [] if values is None else [one_of(f"--{option}", name, known) for name in values or known]

    cases: list[Callable[[], suite.Case]] = [partial(suite.op, name, problem) for name in names("op", suite.op_names(problem))]
    sweeps = names("sweep", tuple(suite.SWEEPS))
    default = not (cases or sweeps or given["layer"] or given["step"])
    cases += [partial(suite.layer, problem)] * (given["layer"] or default) + [partial(suite.step, problem)] * (given["step"] or default)
    cases += [partial(suite.sweep, axis, value, device) for axis in sweeps for value in suite.SWEEPS[axis]]

    console, record = Console(), {**suite.machine(device), "cases": []}
    console.print(record["gpu"] or f"{record['cpu']}, {record['threads']} threads", f"load {record['load'][0]:.2f}", sep=", ")
    for build in cases:
        with Console(stderr=True).status("measuring"), warnings.catch_warnings(action="ignore"):  # of torch, at rivals
            case = build()
            rows = suite.measure(case, device)
        console.print(suite.table(case, rows))
        record["cases"].append({"name": case.name, "baseline": case.baseline, "rows": rows})
    if given["json"]:
        given["json"].write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _info() -> int:
    table = Table("what", "value", show_header=False, box=None)
    for title, rows in (("versions", job.versions()), ("backends", fb.backends()), ("ops", ops.table()), ("build", fb.build_info())):
        table.add_row(f"[bold]{title}")
        for name, value in rows.items():
            table.add_row(f"  {name}", ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
    Console().print(table)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run a command. Exit code: 0, 2 for bad input with one line on stderr, 130 after Ctrl-C (a run leaves a checkpoint)."""
    given = vars(_parser().parse_args(argv))
    command = given.pop("command")
    try:
        return {"train": _train, "bench": _bench, "reproduce": _reproduce}[command](given) if command != "info" else _info()
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"fbkernels {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
