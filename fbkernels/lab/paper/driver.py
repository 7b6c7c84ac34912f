"""Runs the jobs of an experiment side by side, each from where it was, and writes what came out."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import queue
import shlex
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from fbkernels.lab import files
from fbkernels.lab.data import load
from fbkernels.lab.train import hardware, number, spread, versions

SCALES = ("smoke", "short", "full")
SAVE_EVERY = 60.0  # seconds between two checkpoints of a job
Results = list[dict[str, Any]]  # of each job: its fields under "job", its method and seed, and what it returned


class Data(NamedTuple):
    """Images as float32 rows in [0, 1] and classes, on the device."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


class Job(Protocol):
    """One training; a frozen dataclass."""

    @property
    def method(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def steps(self) -> int: ...
    def run(self, data: Any, watch: Watch) -> dict[str, Any]: ...


class Rows(NamedTuple):
    """A table: what it shows, its columns, and a line for each method."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        lines = (self.columns, ("---",) * len(self.columns), *self.rows)
        cells = ((cell.replace("|", r"\|") for cell in line) for line in lines)
        return f"*{self.title}*\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"

    def rich(self) -> Table:
        table = Table(title=self.title)
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass(frozen=True)
class Experiment:
    """What a figure or a table of the paper takes.

    ``jobs(scale, seeds, faithful)``: the trainings. ``read(data_dir, device)``: what they train on. ``tables`` and ``figures`` of the
    results; a figure's key is its file's name.
    """

    about: str
    seeds: int  # of the paper
    jobs: Callable[[str, Sequence[int], bool], Sequence[Job]]
    read: Callable[[str, str], Any]
    tables: Callable[[Results], list[Rows]]
    figures: Callable[[Results], dict[str, Figure]]


def mnist(data_dir: str, device: str) -> Data:
    """The paper's split: the first 55,000 training images, the published test images."""
    data = load("mnist", data_dir)
    x, test_x = (data.to_float(t).flatten(1) for t in (data.train_x[:55_000], data.test_x))
    return Data(*(t.to(device) for t in (x, data.train_y[:55_000], test_x, data.test_y)))


class Interrupted(Exception):
    """A job that has saved its state and stopped."""


class Watch:
    """Through which a job tells how far it is and keeps its state: ``load()``, and ``watch(done, state)`` after each record.

    ``state()`` is called when it is time to save; files are replaced atomically.

    Raises:
        Interrupted: by ``watch(...)``, after saving, where the experiment is to stop.
    """

    def __init__(self, path: Path, job: Any, report: Callable[[int], Any], stopped: Callable[[], bool]) -> None:
        self.path, self.job, self.report, self.stopped, self.saved = path, job, report, stopped, time.monotonic()

    def load(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        state = files.load(self.path)
        if state.get("job") != self.job:
            raise ValueError(f"out: {self.path} is of another experiment, scale or version; name another folder")
        self.report(state["done"])
        return state

    def __call__(self, done: int, state: Callable[[], dict[str, Any]]) -> None:
        self.report(done)
        stopped = self.stopped()
        if stopped or time.monotonic() - self.saved > SAVE_EVERY:
            files.save(self.path, {"done": done, "job": self.job, **state()})
            self.saved = time.monotonic()
        if stopped:
            raise Interrupted


def reproduce(
    name: str,
    experiment: Experiment,
    out: Path,
    *,
    scale: str,
    seeds: Sequence[int],
    faithful: bool,
    methods: Sequence[str] | None,
    data_dir: str,
    device: str,
    processes: int,
    command: Sequence[str],
) -> list[Rows]:
    """Run what is not yet done of an experiment in ``out``, and write results.json, table.md and the figures.

    Each job's own file is there as soon as it has finished, so an interrupted experiment goes on where it was when it is asked for again,
    with more seeds or methods too; the results are of all that the folder has. Jobs that were started with other settings are refused.

    Raises:
        ValueError, OSError: unknown methods, missing data, an ``out`` of another experiment or in which another process is at work, a
            damaged file there, a full disk, a training that was killed.
        KeyboardInterrupt: after all jobs have saved their state.
    """
    jobs = experiment.jobs(scale, seeds, faithful)
    known = list(dict.fromkeys(job.method for job in jobs))
    for method in methods or ():
        if method not in known:
            raise ValueError(f"methods must be of {', '.join(known)}, got {method!r}")
    jobs = [job for job in jobs if methods is None or job.method in methods]
    paths = {job.name: out / "jobs" / f"{job.name}.json" for job in jobs}
    with files.locked(out):
        (out / "jobs").mkdir(exist_ok=True)
        own = {paths[job.name]: _plain(job) for job in jobs}
        for path in (out / "jobs").glob("*.json"):  # of other requests too
            result = _finished(path)
            if result["method"] not in known or result["job"] != own.get(path, result["job"]):
                raise ValueError(f"out: {path} is of another experiment, scale or version; name another folder")
        todo = [job for job in jobs if not paths[job.name].exists()]
        if todo:
            experiment.read(data_dir, "cpu")  # what is missing fails here
            _run(todo, experiment.read, data_dir, device, paths, processes)
        results = sorted(map(_finished, (out / "jobs").glob("*.json")), key=lambda result: (known.index(result["method"]), result["seed"]))
        where = {"hardware": hardware(device) | {"processes": processes, "threads": _threads(processes)}, "versions": versions()}
        raw = {"experiment": name, "scale": scale, "faithful": faithful, "command": shlex.join(command), **where, "results": results}
        files.write(out / "results.json", json.dumps(raw) + "\n")
        tables = experiment.tables(results)
        files.write(out / "table.md", "\n".join(table.markdown() for table in tables))
        for key, figure in experiment.figures(results).items():
            figure.savefig(out / f"{key}.png", dpi=150)
    return tables


def _finished(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        result["method"], result["seed"], result["job"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: remove it, and that training is done again") from error
    return result


def _run(jobs: Sequence[Job], read: Callable[..., Any], data_dir: str, device: str, paths: Mapping[str, Path], processes: int) -> None:
    context = multiprocessing.get_context("spawn")
    messages, stop = context.Queue(), context.Event()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    done = dict.fromkeys((job.name for job in jobs), 0)
    console = Console(stderr=True)
    with (
        ProcessPoolExecutor(min(processes, len(jobs)), context, _start, (messages, stop, processes)) as pool,
        Progress(*columns, console=console, transient=True, speed_estimate_period=600) as bar,
    ):
        task = bar.add_task(f"{len(jobs)} jobs", total=sum(job.steps for job in jobs))
        futures = {pool.submit(_work, job, read, data_dir, device, paths[job.name]): job for job in jobs}
        pending = set(futures)
        try:
            while pending:
                finished, pending = wait(pending, 0.2, FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                while True:
                    try:
                        name, steps = messages.get_nowait()
                    except queue.Empty:
                        break
                    done[name] = steps
                bar.update(task, completed=sum(done.values()), description=f"{len(pending)} of {len(jobs)} jobs left")
        except BaseException as error:
            stop.set()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, Interrupted):
                raise KeyboardInterrupt from None
            if isinstance(error, BrokenProcessPool):
                raise ChildProcessError("a training was killed, for want of memory perhaps; the same command goes on from here") from error
            raise


def _start(messages: Any, stop: Any, processes: int) -> None:
    global _messages, _stop
    _messages, _stop = messages, stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's stop reaches a job between two records
    torch.set_num_threads(_threads(processes))


def _threads(processes: int) -> int:
    """Of each worker."""
    return max(1, (os.cpu_count() or 1) // processes)


def _end_with_parent() -> None:
    """A killed parent's trainings would go on, unseen, while it is asked for again."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_messages: Any = None  # of a worker, which runs many jobs
_stop: Any = None
_data: Any = None


def _work(job: Job, read: Callable[[str, str], Any], data_dir: str, device: str, path: Path) -> None:
    global _data
    if _data is None:
        _data = read(data_dir, device)
    state = path.with_suffix(".pt")
    _messages.put((job.name, 0))
    result = job.run(_data, Watch(state, _plain(job), lambda done: _messages.put((job.name, done)), _stop.is_set))
    record = {"method": job.method, "seed": job.seed, "job": _plain(job), **result}
    files.write(path, json.dumps(record) + "\n")
    state.unlink(missing_ok=True)


def _plain(job: Any) -> Any:
    return json.loads(json.dumps(asdict(job)))


def by_method(results: Results) -> dict[str, Results]:
    groups: dict[str, Results] = {}
    for result in results:
        groups.setdefault(result["method"], []).append(result)
    return groups


def seed_count(results: Results) -> str:
    """How many each method has had."""
    counts = {len({run["seed"] for run in runs}) for runs in by_method(results).values()}
    return f"{min(counts)} to {max(counts)} seeds" if len(counts) > 1 else f"{max(counts)} seed{'s' * (max(counts) > 1)}"


def text(values: Sequence[float | None], digits: int) -> str:
    """Mean, and the standard error where it is known."""
    return number(spread(values), digits)


def short(value: float) -> float | None:
    """Six digits; JSON has no nan."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
