"""What draws random numbers: generators, whose states can be lent, and calls that draw in another dtype than they were written for."""

from __future__ import annotations

import contextlib
import marshal
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten


def shared_generators() -> list[Any]:
    """Python's, numpy's and torch's own."""
    numpy: Any = sys.modules.get("numpy")
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [random._inst, *([numpy.random.mtrand._rand] if numpy else []), torch.default_generator, *cuda]


def drawn(x: Any) -> Callable[[], object] | None:
    """What lets a generator draw once more what it will draw from now on; None of what is no generator."""
    if isinstance(x, random.Random) and not isinstance(x, random.SystemRandom):
        return partial(x.setstate, x.getstate())
    if isinstance(x, torch.Generator):
        return partial(x.set_state, x.get_state())
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(x, numpy.random.RandomState):
        return partial(x.set_state, x.get_state(legacy=False))
    bits = x.bit_generator if isinstance(x, numpy.random.Generator) else x
    if isinstance(bits, numpy.random.BitGenerator):
        return partial(setattr, bits, "state", bits.state)
    return None


@contextlib.contextmanager
def drawn_again(states: Iterable[Any], generators: Iterable[Any]) -> Iterator[None]:
    """The generators draw from those states on, of ``drawn``, and are then what they were."""
    now = [drawn(g) for g in generators]
    try:
        for back in states:
            back()
        yield
    finally:
        for back in now:
            assert back is not None
            back()


def state_of(again: Any) -> Any:
    """The state that ``drawn`` keeps, as a value to compare."""
    value = again.args[-1]
    if isinstance(value, Tensor):
        return value.numpy().tobytes()
    return value if isinstance(value, tuple) else marshal.dumps(value)  # which is never read


class Draws(TorchDispatchMode):
    """The dtypes of each random call inside; or, given those of another run, each call draws in them, and so the same numbers.

    A normal number of float64 takes more of a generator than one of float32, so what is written for float32 and runs in float64 would
    draw others. The results have the dtype that was asked for.
    """

    def __init__(self, like: Draws | None = None) -> None:
        super().__init__()
        self.dtypes: list[list[torch.dtype]] = []  # of a call: those of its floating-point tensors, and one that it was given by name
        self.like = None if like is None else iter(like.dtypes)

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        values, spec = tree_flatten((args, kwargs))
        at = [i for i, v in enumerate(values) if _dtype(v) is not None]
        asked = [dtype for v in values if (dtype := _dtype(v)) is not None]
        self.dtypes.append(asked)
        drawn = None if self.like is None else next(self.like, None)
        if drawn is None or drawn == asked or len(drawn) != len(asked):
            return func(*args, **kwargs)
        if func is torch.ops.aten.native_dropout.default:  # its input is no random number, and keeps its digits
            scale, mask = func(torch.ones_like(args[0], dtype=drawn[0]), *args[1:])
            return args[0] * scale, mask
        lent = {i: values[i].to(dtype) if isinstance(values[i], Tensor) else dtype for i, dtype in zip(at, drawn, strict=True)}
        new_args, new_kwargs = tree_unflatten([lent.get(i, v) for i, v in enumerate(values)], spec)
        out = func(*new_args, **new_kwargs)
        for old, new, argument in zip(args, new_args, func._schema.arguments, strict=False):
            if argument.is_write:
                old.copy_(new)
                out = old if out is new else out
        return out.to(asked[-1]) if isinstance(out, Tensor) and out.is_floating_point() else out


def _dtype(x: Any) -> torch.dtype | None:
    dtype = x.dtype if isinstance(x, Tensor) else x
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None
