"""The choice among configurations: timed once on each GPU, then remembered, so that the next run computes the same."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
ROUNDS = 10
_known: dict[tuple[int, str, tuple[Any, ...]], Any] = {}


def on_device(launch: Callable[..., T]) -> Callable[..., T]:
    """A launcher on the device of its first argument, a tensor or an update: Triton launches on the current one."""

    @functools.wraps(launch)
    def run(first: Any, *args: Any, **kwargs: Any) -> T:
        device = first.device if isinstance(first, torch.Tensor) else first.new.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return launch(first, *args, **kwargs)

    return run


@functools.cache
def capability() -> int:
    """The architecture that configurations are chosen for: 80, 90, ..."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return 10 * major + minor


def fastest(kernel: str, key: tuple[Any, ...], candidates: Sequence[T], run: Callable[[T], Any]) -> T:
    """The recorded choice for this GPU, ``kernel`` and ``key``; where there is none, the candidate with the least median time.

    A choice is recorded for the process and in ``~/.cache/fbkernels/<GPU>-triton<version>.json`` (``torch<version>`` without Triton), or
    the file that ``FBK_TUNING`` names.
    Without a GPU, in Triton's interpreter and while a CUDA graph is captured nothing can be timed: the first candidate, not recorded.

    Args:
        key: what the time depends on: shapes, dtypes, flags; hashable.
        candidates: values that JSON can hold, the safest first.
        run: launches a candidate on the current stream, over a dozen times each: what it updates in place must be a copy. A candidate that
            raises, as for want of shared memory, is left out.

    Raises:
        Exception: the last candidate's, where each raised.
    """
    if len(candidates) == 1 or not torch.cuda.is_initialized():
        return candidates[0]
    place = (torch.cuda.current_device(), kernel, key)
    if place not in _known:
        name = f"{torch.cuda.get_device_name()}, {kernel}, {', '.join(map(str, key))}"
        recorded = _load().get(name)
        chosen = [c for c in candidates if json.loads(json.dumps(c)) == recorded]
        if not chosen:
            if torch.cuda.is_current_stream_capturing() or os.environ.get("TRITON_INTERPRET") == "1":
                return candidates[0]
            chosen = [_time(candidates, run)]
            _save(name, chosen[0])
        _known[place] = chosen[0]
    choice: T = _known[place]
    return choice


def _time(candidates: Sequence[T], run: Callable[[T], Any]) -> T:
    able, failure = [], None
    for candidate in candidates:
        try:
            for _ in range(3):
                run(candidate)
            torch.cuda.synchronize()
            able.append(candidate)
        except Exception as error:
            failure = error
    if failure is not None and not able:
        raise failure
    times: list[list[float]] = [[] for _ in able]
    for _ in range(ROUNDS):
        torch.cuda._sleep(2_000_000)  # a millisecond, in which all is queued: launches do not count
        events = []
        for candidate in able:
            events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            events[-1][0].record()
            run(candidate)
            events[-1][1].record()
        torch.cuda.synchronize()
        for column, (start, end) in zip(times, events, strict=True):
            column.append(start.elapsed_time(end))
    return able[min(range(len(able)), key=lambda i: statistics.median(times[i]))]


def _file() -> Path:
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name())
    try:
        from triton import __version__ as triton
    except ImportError:
        compiler = f"torch{torch.__version__}"
    else:
        compiler = f"triton{triton}"
    return Path(os.environ.get("FBK_TUNING") or Path.home() / ".cache" / "fbkernels" / f"{gpu}-{compiler}.json")


def _load() -> dict[str, Any]:
    try:
        table = json.loads(_file().read_text())
    except (OSError, ValueError):  # none yet, or cut short by another program: what is in it gets timed again
        return {}
    return table if isinstance(table, dict) else {}


def _save(name: str, choice: Any) -> None:
    file = _file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as part:
            json.dump(dict(sorted({**_load(), name: choice}.items())), part, indent=1)
        os.replace(part.name, file)
    except OSError as error:
        warnings.warn(f"the choice for {name} lasts for this process only: {error}", stacklevel=3)
