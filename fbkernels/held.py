"""What a criterion holds: the generators that it may draw from, and the state that its calls change, which can be lent to them."""

from __future__ import annotations

import collections
import contextlib
import copy
import copyreg
import functools
import operator
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fbkernels.draws import drawn

_LONG = 100  # elements of a container, above which it is not looked into,
_DATA = 100_000  # nor kept as it is
_MOST = 1000  # objects, the nearest first: a trainer may lead to a whole framework
_LARGE = 1_000_000  # elements of a tensor, above which it is not copied, unless a criterion that is a module has it
_INTERNAL = frozenset(vars(nn.Module()))
_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, types.BuiltinFunctionType))
_CLOSED = (Tensor, torch.jit.ScriptModule, torch.optim.Optimizer, torch.utils.data.DataLoader)
_NEVER = frozenset(("torch", "numpy", "fbkernels", *sys.stdlib_module_names))


class Place:
    """Where values have names or indices: an object's attributes, variables, a container."""

    __slots__ = ("before", "lends", "own", "read", "write")

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], object], own: bool) -> None:
        self.read, self.write, self.own = read, write, own
        self.before = read()
        self.lends: list[Any] = []  # the keys of what a call gets a copy of


class Held:
    """What can be reached from a criterion: attributes and slots, containers, arguments of partials, the object of a bound method,
    variables and defaults of functions, and of globals those that code names. It holds for one step, between whose calls nothing changes.

    Objects of torch, numpy, the standard library and of installed packages, but the criterion's own, lead far and are not looked into, nor
    is a converted network. Of a criterion of torch's own, ``plain``, its attributes are all there is.
    """

    def __init__(self, criterion: Any, plain: bool = False) -> None:
        self.generators: list[Any] = []
        self.places: list[Place] = []
        self.watched: list[tuple[str, Any, Tensor, int]] = []  # tensors that are not copied, whose they are, and their versions
        self.unversioned: set[int] = set()  # statistics of a batch norm of torch's, which writes into them and says nothing
        self.seen: dict[int, Any] = {}  # which are kept, so that no identity is used again
        self.globals: dict[int, tuple[dict[str, Any], set[str]]] = {}  # of a module, and which of them code names
        function = criterion.func if isinstance(criterion, functools.partial) else criterion
        self.module = isinstance(function, nn.Module)
        modules = [*function.modules()] if isinstance(function, nn.Module) else []
        self.own = {id(criterion), id(function), *map(id, modules)}
        self.package = _root(getattr(function if isinstance(function, types.FunctionType) else type(function), "__module__", None))
        self.todo: list[Any] = [criterion]
        if plain:
            self.todo = []
            for m in modules:
                self._place(m._buffers, "", True)
                self._place(m.__dict__, "", True)
        for x in self.todo:  # which grows
            if type(x) not in _ATOMS and id(x) not in self.seen and (len(self.seen) < _MOST or id(x) in self.own):
                self.seen[id(x)] = x
                self._visit(x)
        for names in self.globals.values():
            self._add(partial(_variables, *names), partial(_rename, *names), "global")

    @contextlib.contextmanager
    def lent(self, dtype: torch.dtype | None, like: torch.dtype | None = None) -> Iterator[list[Callable[[], object]]]:
        """While it lasts there are copies of tensors, those of the criterion's own in this dtype. Then all is what it was before, and the
        list makes it what the calls inside have made of it, where tensors that were not there have the dtype ``like``."""
        copies: dict[int, tuple[Any, Any]] = {}
        given: list[Any] = []
        changes: list[Callable[[], object]] = []
        try:
            for place in self.places:
                now = place.before
                if place.lends:
                    now = copy.copy(now)
                    for k in place.lends:
                        now[k] = _copy(now[k], dtype if place.own else None, copies)
                    place.write(now)
                given.append(now)
            yield changes
        finally:
            originals = {id(new): old for old, new in copies.values()}
            for old, new in copies.values():
                if isinstance(old, Tensor):
                    changes += [partial(old.copy_, new)] if new._version or id(old) in self.unversioned else []
                elif not isinstance(old, tuple):
                    changes.append(partial(operator.setitem, old, ..., new))
            left = [place.read() for place in self.places[: len(given)]]  # of all before any is put back: two may be of one dict
            for place, now, after in zip(self.places, given, left, strict=False):
                changed = not _same(after, now)
                if changed:
                    changes.append(partial(place.write, self._kept(after, place.before, originals, like)))
                if changed or place.lends:
                    place.write(place.before)
        for name, key, t, version in self.watched:
            if t._version != version:
                raise ValueError(
                    f"criterion writes into {name}.{key}, of {t.numel()} elements, and a step calls it several times, for which it copies "
                    "no Parameter and no tensor so large: hold it as a buffer of a criterion that is an nn.Module, or write to it outside "
                    "of the criterion"
                )

    def _visit(self, x: Any) -> None:
        if isinstance(x, types.FunctionType):
            self._function(x)
        elif isinstance(x, types.MethodType):
            self.todo += [x.__func__, x.__self__]
        elif isinstance(x, functools.partial):
            self.todo.append(x.func)
            self._place(x.keywords, "a partial's", id(x) in self.own)
            arguments = lambda values: x.__setstate__((x.func, values["args"], x.keywords, x.__dict__))  # type: ignore[attr-defined]  # noqa: E731
            self._add(lambda: {"args": x.args}, arguments, "a partial's", id(x) in self.own)
        elif isinstance(x, type):
            if names := self._mine(x.__module__) and _data(x):
                self._add(partial(_variables, vars(x), names), partial(_reattribute, x, names), x.__name__)
        elif isinstance(x, tuple):
            self.todo += x[:_LONG]
        elif drawn(x) is not None:
            self.generators.append(x)
        elif not isinstance(x, _CLOSED) and (id(x) in self.own or not (isinstance(x, nn.Module) and _converted(x))):
            self._object(x)

    def _object(self, x: Any) -> None:
        kind, own = type(x), id(x) in self.own
        if isinstance(x, (dict, list, collections.deque, set)):
            self._place(x, f"a {kind.__name__}", False)
        if isinstance(x, nn.Module):
            if isinstance(x, nn.modules.batchnorm._NormBase) and x.training:
                self.unversioned.update(map(id, x._buffers.values()))
            if own or (x.training and x._buffers):  # a teacher in eval mode is long, and stays
                self._place(x._buffers, kind.__name__, own)
            if own:
                self._place(x._parameters, kind.__name__, own)
            else:
                self._watch(x._parameters.items(), kind.__name__)
            self.todo += [*x._modules.values(), *x._forward_pre_hooks.values(), *x._forward_hooks.values()]
            if not own and _root(kind.__module__) == "torch":
                return
        mine = self._mine(kind.__module__)
        if mine:
            self.todo += [part for c in kind.__mro__ if self._mine(c.__module__) for part in (c, *_functions(c))]
            if slots := copyreg._slotnames(kind):  # type: ignore[attr-defined]
                self._add(partial(_attributes, x, slots), partial(_reattribute, x, slots), kind.__name__, own)
        attributes = getattr(x, "__dict__", None)
        if (mine or own or isinstance(x, (nn.Module, types.SimpleNamespace))) and isinstance(attributes, dict) and attributes is not x:
            self._place(attributes, kind.__name__, own)

    def _function(self, x: types.FunctionType) -> None:
        if not self._mine(x.__module__):
            return
        if x.__dict__:
            self._place(x.__dict__, x.__name__, id(x) in self.own)
        for name, cell in zip(x.__code__.co_freevars, x.__closure__ or (), strict=True):
            if name != "__class__" and id(cell) not in self.seen:
                self.seen[id(cell)] = cell
                names = ["cell_contents"]
                self._add(partial(_attributes, cell, names), partial(_reattribute, cell, names), f"{x.__name__}.{name}")
        if x.__defaults__ or x.__kwdefaults__:
            names = ["__defaults__", "__kwdefaults__"]
            self._add(partial(_attributes, x, names), partial(_reattribute, x, names), x.__name__)
        if self._mine(x.__globals__.get("__name__")):
            self._named(x.__globals__, _names(x.__code__))

    def _named(self, namespace: dict[str, Any], names: frozenset[str]) -> None:
        """A module's variables of these names, and for code that says ``module.variable`` those of modules among them."""
        known = self.globals.setdefault(id(namespace), (namespace, set()))[1]
        new = names - known
        known |= new
        for value in _variables(namespace, new).values():
            if isinstance(value, types.ModuleType):
                if self._mine(value.__name__):
                    self._named(vars(value), names)
            else:
                self.todo += [value, *(f for f in _functions(value) if f.__name__ in names)] if isinstance(value, type) else [value]

    def _place(self, x: Any, name: str, own: bool) -> None:
        if len(x) <= _DATA:
            self._add(partial(dict if isinstance(x, dict) else list, x), partial(fill, x), name, own)

    def _add(self, read: Callable[[], Any], write: Callable[[Any], object], name: str, own: bool = False) -> None:
        place = Place(read, write, own)
        self.places.append(place)
        if not own and len(place.before) > _LONG:
            return
        for k, v in place.before.items() if isinstance(place.before, dict) else enumerate(place.before):
            if type(v) in _ATOMS or k in _INTERNAL:
                continue
            if _lendable(v, own and self.module):
                place.lends.append(k)
            elif isinstance(v, Tensor):
                self._watch([(k, v)], name)
            self.todo.append(v)

    def _watch(self, items: Iterable[tuple[Any, Any]], name: str) -> None:
        self.watched += [(name, k, v, v._version) for k, v in items if isinstance(v, Tensor) and not v.is_inference()]

    def _mine(self, module: Any) -> bool:
        root = _root(module)
        return root not in _NEVER and (root == self.package or not _installed(root))

    def _kept(self, after: Any, before: Any, originals: dict[int, Any], like: torch.dtype | None) -> Any:
        """What a place is to hold: of what was lent the original, and no float64 that only the call was in."""

        def kept(v: Any, old: Any = None) -> Any:
            if id(v) in originals:
                return originals[id(v)]
            if isinstance(v, Tensor) and v.is_floating_point():
                if isinstance(old, Tensor):
                    return v.to(old.dtype) if old.is_floating_point() else v
                return v if like is None or v.dtype != torch.float64 else v.to(like)
            if type(v) is tuple:
                return tuple(map(kept, v))
            if type(v) in (list, dict) and id(v) not in self.seen:  # a new one
                fill(v, {k: kept(part) for k, part in v.items()} if isinstance(v, dict) else [*map(kept, v)])
            return v

        if isinstance(after, dict):
            return {k: kept(v, before.get(k)) for k, v in after.items()}
        return [kept(v, before[i] if i < len(before) else None) for i, v in enumerate(after)]


def _copy(v: Any, dtype: torch.dtype | None, copies: dict[int, tuple[Any, Any]]) -> Any:
    if id(v) not in copies:
        new: Any
        if isinstance(v, Tensor):
            new = v.detach().to(dtype if dtype is not None and v.is_floating_point() else v.dtype, copy=True)
        elif isinstance(v, tuple):
            parts = [_copy(part, dtype, copies) if _lendable(part) else part for part in v]
            new = type(v)(*parts) if hasattr(v, "_fields") else tuple(parts)
        else:
            new = v.copy()
        copies[id(v)] = v, new
    return copies[id(v)][1]


def _lendable(v: Any, whole: bool = False) -> bool:
    """Whether a call gets a copy of it: ``whole``, however large. A leaf that requires a gradient is to get it."""
    if isinstance(v, Tensor):
        return (whole or not (isinstance(v, nn.Parameter) or v.numel() > _LARGE)) and not (v.requires_grad and v.is_leaf)
    if isinstance(v, tuple):
        return len(v) <= _LONG and any(map(_lendable, v))
    numpy: Any = sys.modules.get("numpy")
    return numpy is not None and isinstance(v, numpy.ndarray) and v.flags.writeable and v.size <= _LARGE


def _converted(m: nn.Module) -> bool:
    return any(_root(type(part).__module__) == "fbkernels" for part in (m, getattr(m, "feedback", None)))


def _root(module: Any) -> str:
    return str(module or "").partition(".")[0]


@functools.cache
def _installed(root: str) -> bool:
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


@functools.lru_cache(1024)
def _names(code: types.CodeType) -> frozenset[str]:
    """Global names, and those of attributes, that it and the functions in it say."""
    return frozenset(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))


@functools.lru_cache(1024)
def _functions(c: type) -> tuple[types.FunctionType, ...]:
    found = (getattr(v, "__func__", None) or getattr(v, "fget", None) or v for v in vars(c).values())
    return tuple(f for f in found if isinstance(f, types.FunctionType))


@functools.lru_cache(1024)
def _data(c: type) -> frozenset[str]:
    """The names of a class's own variables."""
    return frozenset(k for k, v in vars(c).items() if not (k.startswith("__") or k == "_abc_impl" or hasattr(type(v), "__get__")))


def _variables(namespace: Any, names: Iterable[str]) -> dict[str, Any]:
    return {k: namespace[k] for k in names if k in namespace}


def _rename(namespace: dict[str, Any], names: Iterable[str], values: dict[str, Any]) -> None:
    for k in names:
        if k in values:
            namespace[k] = values[k]
        else:
            namespace.pop(k, None)


def _attributes(x: Any, names: Iterable[str]) -> dict[str, Any]:
    found = {}
    for k in names:
        with contextlib.suppress(AttributeError, ValueError):  # a slot or a cell without a value
            found[k] = getattr(x, k)
    return found


def _reattribute(x: Any, names: Iterable[str], values: dict[str, Any]) -> None:
    write = type.__setattr__ if isinstance(x, type) else object.__setattr__
    for k in names:
        if k in values:
            write(x, k, values[k])
        else:
            with contextlib.suppress(AttributeError):
                (type if isinstance(x, type) else object).__delattr__(x, k)


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b)) and (not isinstance(a, dict) or all(map(operator.is_, a.values(), b.values())))


def fill(x: Any, values: Any) -> None:
    """Give a dict these items, a list, deque or set these elements."""
    if not _same(x, values):
        x.clear()
        (x.extend if isinstance(x, (list, collections.deque)) else x.update)(values)
