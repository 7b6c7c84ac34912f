"""What a call runs: launches of Triton, and the operators of torch that compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# allocate, or look at the same memory
STILL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "view", "_unsafe_view", "expand"}
STILL |= {
    "permute",
    "t",
    "transpose",
    "slice",
    "select",
    "as_strided",
    "unsqueeze",
    "squeeze",
    "split",
    "split_with_sizes",
    "unbind",
    "lift_fresh",
}


class Computed(TorchDispatchMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name not in STILL:
            self.names.append(name)
        return func(*args, **kwargs or {})


@contextmanager
def launched() -> Iterator[tuple[list[str], list[str]]]:
    """The names of the kernels and of the operators that run in the ``with`` block, in order."""
    from fbkernels.kernels.noise import noise_kernel

    kernels_run: list[str] = []
    kind = type(noise_kernel)
    run = kind.run

    def count(fn: Any, *args: Any, **kwargs: Any) -> Any:
        kernels_run.append(fn.__name__)
        with _disable_current_modes():
            return run(fn, *args, **kwargs)

    computed: list[str] = []
    with mock.patch.object(kind, "run", count), Computed(computed):
        yield kernels_run, computed
