"""A forward whose traces are put back where they lie, so that whoever else holds what it wrote sees no change: all but those of objects
three deep in one another."""

from __future__ import annotations

import collections
import contextlib
import copy
import copyreg
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fbkernels.draws import drawn, shared_generators
from fbkernels.held import fill
from fbkernels.stream.chain import outside

_DEPTH = 2  # plain objects in one another: a trainer that a module knows leads to the data
_WALKED_ALONE = ("_parameters", "_modules")  # a layer that the first call makes stays, and fully_shard exchanges parameters itself
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, types.FunctionType, types.MethodType)


@contextlib.contextmanager
def untouched(net: nn.Module, inputs: Any, ours: Callable[[Any], bool]) -> Iterator[None]:
    """A forward inside leaves parameters, gradients, buffers, random numbers and what modules and inputs keep as they were. Of forward
    hooks, which may keep what they see, only ``ours`` run."""
    undo = _undo(net, inputs)
    for m in net.modules():
        if hooks := m._forward_hooks:
            undo.append(partial(setattr, m, "_forward_hooks", hooks))
            m._forward_hooks = collections.OrderedDict((k, h) for k, h in hooks.items() if ours(h))
        if _lazy(m) and isinstance(reset := getattr(m, "reset_running_stats", None), types.MethodType):
            undo.append(reset)
    for p in net.parameters():
        undo += [partial(setattr, p, "grad", p.grad), *([] if p.grad is None else _tensor(p.grad))]
    undo += [state for g in shared_generators() if (state := drawn(g)) is not None]
    devices = list({t.device.index or 0 for t in net.parameters() if t.is_cuda})
    with torch.random.fork_rng(devices), outside(None):  # nor do the user's hooks on saved tensors see it
        try:
            yield
        finally:
            for back in undo:
                back()


def _undo(*roots: Any) -> list[Callable[[], object]]:
    undo: list[Callable[[], object]] = []
    seen: dict[int, Any] = {}  # which are kept, so that no identity is used again
    todo: list[tuple[Any, int]] = [(x, _DEPTH) for x in roots]
    while todo:
        x, depth = todo.pop()
        if id(x) in seen or isinstance(x, _ATOMS):
            continue
        values: list[Any] = []
        if isinstance(x, Tensor):
            seen[id(x)] = x
            undo += _tensor(x)
            continue
        if (state := drawn(x) or _array(x)) is not None:
            seen[id(x)] = x
            undo.append(state)
            continue
        if isinstance(x, tuple):
            values += x
        elif isinstance(x, (list, collections.deque, set)):
            undo.append(partial(fill, x, [*x]))
            values += x
            if isinstance(x, list):
                undo += _spare(x, [*enumerate(x)])
        elif isinstance(x, dict):
            undo.append(partial(fill, x, dict(x)))
            values += x.values()
            undo += _spare(x, [*x.items()])
        attributes = getattr(x, "__dict__", None)
        slots = copyreg._slotnames(type(x)) if _own(x) else []  # type: ignore[attr-defined]
        if isinstance(x, nn.Module):
            if type(x).__module__.startswith("fbkernels.training") or _lazy(x):
                continue
            depth = _DEPTH
            values += (v for name in _WALKED_ALONE for v in x.__dict__[name].values())
        elif not (slots or (isinstance(attributes, dict) and (_own(x) or isinstance(x, torch.optim.Optimizer)))):
            attributes = None
        elif depth == 0:
            continue
        else:
            depth -= 1
        seen[id(x)] = x
        if attributes is not None and attributes is not x:
            undo.append(partial(fill, attributes, dict(attributes)))
            values += (v for k, v in attributes.items() if k not in _WALKED_ALONE)
            undo += _spare(attributes, [*attributes.items()])
        for k in slots:
            if hasattr(x, k):
                undo.append(partial(object.__setattr__, x, k, getattr(x, k)))
                values.append(getattr(x, k))
        todo += ((v, depth) for v in values)
    return undo


def _own(x: Any) -> bool:
    """Whether it is an object of the user's."""
    return not type(x).__module__.startswith(("torch.", "fbkernels.training"))


def _lazy(m: nn.Module) -> bool:
    """Whether its first call makes its parameters, which are to stay."""
    return any(t is not None and is_lazy(t) for t in (*m._parameters.values(), *m._buffers.values()))


def _tensor(t: Tensor) -> list[Callable[[], None]]:
    if t.is_meta or t.is_inference() or t.layout is not torch.strided or 0 in t.stride() or is_traceable_wrapper_subclass(t):
        return []
    own, value, bare = t.data, t.detach().clone(), not t.requires_grad  # own: of no version that a graph could miss

    def back() -> None:
        if bare and t.requires_grad and not t._is_view():
            t.detach_().requires_grad_(False)
        if (t.data_ptr(), t.shape, t.stride(), t.dtype) != (own.data_ptr(), own.shape, own.stride(), own.dtype):
            t.data = own
        if not bool(((own == value) | ((own != own) & (value != value))).all()):  # what cannot be written has not been
            own.copy_(value)

    return [back]


def _array(x: Any) -> Callable[[], object] | None:
    numpy: Any = sys.modules.get("numpy")
    return partial(numpy.copyto, x, x.copy()) if numpy and isinstance(x, numpy.ndarray) and x.flags.writeable else None


def _spare(x: Any, items: list[tuple[Any, Any]]) -> list[Callable[[], object]]:
    """Let copies of iterators be advanced; what is drawn from one that cannot be copied, or that draws from another, is kept for later."""
    undo: list[Callable[[], object]] = []
    for k, v in items:
        if isinstance(v, Iterator) and not hasattr(v, "__dict__"):
            try:
                if any(isinstance(part, Iterator) for group in v.__reduce__()[1:] if isinstance(group, tuple) for part in group):
                    raise TypeError
                x[k] = copy.copy(v)
            except TypeError:
                x[k], later = itertools.tee(v)
                undo.append(partial(x.__setitem__, k, later))
    return undo
