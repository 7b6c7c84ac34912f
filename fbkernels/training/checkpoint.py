"""torch.utils.checkpoint runs a part of the model again in the backward pass: that run needs the mode too, and belongs to its own step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fbkernels.stream.mode import Streams, shown
from fbkernels.training.step import Step, second_run

_NAME = "_checkpoint_without_reentrant_generator"  # torch 2.11 to 2.13


def checkpointed(mode: Streams, step: Step) -> contextlib.AbstractContextManager[None]:
    """While it lasts, what ``torch.utils.checkpoint`` is given to run will run under the mode again."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else given(lambda fn: _again(fn, mode, step))


@contextlib.contextmanager
def given(wrap: Callable[[Any], Any]) -> Iterator[None]:
    """While it lasts, ``torch.utils.checkpoint`` runs ``wrap(fn)`` in the place of fn."""
    import torch.utils.checkpoint as home

    before: Any = getattr(home, _NAME)

    def generator(fn: Any, *args: Any, **kwargs: Any) -> Any:
        return before(wrap(fn), *args, **kwargs)

    setattr(home, _NAME, generator)
    try:
        yield
    finally:
        setattr(home, _NAME, before)


def _again(fn: Any, mode: Streams, step: Step) -> Any:
    ran = dict(step.ran)
    network = step.network

    def run(*args: Any, **kwargs: Any) -> Any:
        if network.running and network.running[0] is mode:  # the forward itself has not ended
            return fn(*args, **kwargs)
        running, network.running = network.running, (mode,)
        try:
            with second_run(step, ran), shown(mode), mode:
                return fn(*args, **kwargs)
        finally:
            network.running = running
            mode.close()

    return run
