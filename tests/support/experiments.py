"""Small experiments. Their functions go to other processes by name, which a test module of pytest has only in this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fbkernels.lab.paper import driver, fig2
from fbkernels.lab.paper.driver import Data, Watch
from fbkernels.lab.paper.mlp import MLP


def images(data_dir: str = "", device: str = "cpu") -> Data:
    generator = torch.Generator().manual_seed(0)
    x, test_x = (torch.rand(n, 784, generator=generator) for n in (96, 64))
    y, test_y = (torch.randint(10, (n,), generator=generator) for n in (96, 64))
    return Data(x, y, test_x, test_y)


def watch(path: Path, stop_at: int | None = None) -> Watch:
    done = [0]
    return Watch(path, {}, lambda steps: done.__setitem__(0, steps), lambda: done[0] == stop_at)


def few(scale: str, seeds: range, faithful: bool) -> list[MLP]:
    methods = ("backprop", "feedback alignment")
    return [MLP(m, seed, 8, 4, rule=r) for seed in seeds for m, r in zip(methods, ("weight-transport", "fixed"), strict=True)]


def fail(data_dir: str, device: str) -> Tensor:
    return torch.zeros(3)


def die(data_dir: str, device: str) -> Data:
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return images()


def often(data_dir: str, device: str) -> Data:
    """A worker calls this: from then on it saves after every record, and takes its time."""
    driver.SAVE_EVERY = 0.0
    call = Watch.__call__

    def slow(self: Watch, *args: object) -> None:
        time.sleep(0.02)
        call(self, *args)  # type: ignore[arg-type]

    Watch.__call__ = slow  # type: ignore[method-assign]
    return images()


def longer(scale: str, seeds: range, faithful: bool) -> list[MLP]:
    return [replace(kind, steps=200) for kind in few(scale, seeds, faithful)]


def ask(out: str) -> None:
    """What ``fbkernels reproduce`` does, with small data."""
    experiment = driver.Experiment("", 1, longer, often, fig2.tables, fig2.figures)  # type: ignore[arg-type]
    given = {"scale": "smoke", "seeds": (0,), "faithful": False, "methods": None, "data_dir": "", "device": "cpu", "processes": 2}
    driver.reproduce("fig2", experiment, Path(out), **given, command=[])
