"""The mode under which a converted network's forward runs: plain tensors, and beside each the difference of the second stream."""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fbkernels._compile import skipped
from fbkernels.draws import drawn_again
from fbkernels.stream import kinds
from fbkernels.stream.chain import Chain, Waiting
from fbkernels.stream.custom import declared
from fbkernels.stream.differences import HANDLERS, general, generators_for
from fbkernels.stream.kinds import in_place, kind_of, name_of, same

# what stands beside a tensor, as its attribute ``_fb``: the step's token, the difference (None: none yet), the chain that it is in with the
# number of calls that ran, the functions put off that it stands for, and the tensor that has taken its place
Mark = tuple[int, "Tensor | None", "tuple[Chain, int] | None", "Waiting | None", "Tensor | None"]


_TOKENS = itertools.count(1)


class Site(Protocol):
    """What a step does where a layer or a point is."""

    samples: int  # of the batch
    antithetic: bool  # each difference has both signs
    constant: bool  # parameters are constants: warm-up
    random: frozenset[Any]  # functions that draw random numbers
    credits: bool  # differences go where gradients do, and not behind detach()
    rows_first: bool  # the plain model's maps are not channels-last as those of blocks are
    fuses: tuple[torch.dtype, ...]  # dtypes of the layers whose chains run in one launch

    def rows(self, h: Tensor, d: Tensor | None = None) -> Tensor:
        """Of a clean activity the rows that have a difference, in its order; ``d`` has their shape."""

    def partial(self) -> bool:
        """Whether these are not all."""

    def sides(self, h: Tensor, d: Tensor) -> list[Tensor]:
        """The whole batch of a clean activity with its difference, once for each sign."""

    def joined(self, sides: Sequence[Tensor], like: Tensor | None) -> Tensor:
        """Of results for each side the rows that have a difference, in the shape of ``like`` where that is known."""

    def written(self, h: Tensor) -> None:
        """What follows a point is about to write into its activity."""

    def layer(self, mode: Streams, kind: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layer | None:
        """What is known of the layer that runs; None where it has no point and no feedback weights."""

    def point(self, mode: Streams, chain: Chain, h: Tensor, d: Tensor | None, waiting: Waiting | None) -> tuple[Tensor, Tensor, Any]:
        """The activity of a point, what goes on behind it, and its difference."""


Layer = tuple["Chain | None", "tuple[Tensor, Tensor | None] | None"]  # the chain that it begins; its result where feedback weights make it


class Alone(torch.autograd.Function):
    """The identity, and no view, which would keep what it is a view of."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Streams(TorchFunctionMode):
    """Runs each torch call of the model as ever, and forms the difference d = p - h of its result (SPEC 1).

    Linear functions act on d; others give f(h + d) - f(h), without autograd. User code sees plain tensors only.
    """

    def __init__(self, site: Site, buffers: frozenset[int]) -> None:
        super().__init__()
        self.site, self.buffers = site, buffers  # buffers: the identities of tensors that live longer than the step
        self.token = 0 if torch.compiler.is_compiling() else next(_TOKENS)  # tells the marks of one forward from those of another
        self.replaced: list[Tensor] = []  # tensors that have another in their place
        self.waiting: list[tuple[Any, Waiting]] = []  # tensors that stand for functions put off, by weak reference
        self.grad = torch.is_grad_enabled()
        self.sources = False  # layerwise: where a point's noise is to go in is followed too

    # what stands beside a tensor

    def mark(self, t: Any) -> Mark | None:
        mark: Mark | None = getattr(t, "_fb", None)
        return mark if mark is not None and mark[0] == self.token else None

    def d(self, t: Any) -> Tensor | None:
        mark = self.mark(t)
        return None if mark is None else mark[1]

    def before(self, t: Any) -> Tensor | None:
        """The activity that was cut there."""
        before = getattr(t, "_fb_before", None)
        return before[1] if before is not None and before[0] == self.token else None

    def put(self, t: Tensor, d: Tensor | None, chain: Any = None, waiting: Any = None, instead: Any = None) -> Tensor:
        t._fb = (self.token, d, chain, waiting, instead)  # type: ignore[attr-defined]
        return t

    def current(self, t: Any) -> Any:
        """The tensor that has taken the place of this one, where an in-place call or a put-off function made it."""
        mark = self.mark(t) if isinstance(t, Tensor) else None
        return t if mark is None or mark[4] is None else mark[4]

    def moved(self, h: Tensor, d: Tensor | None) -> Tensor:
        """The perturbed activity h + d, for functions that are not linear."""
        h = self.site.rows(h.detach(), d)
        if d is None:
            return h
        return (h + d).to(torch.bool) if h.dtype == torch.bool else h + d

    def bare(self, t: Any) -> Any:
        """An activity as autograd may keep it: alone, as its difference lasts as long as the tensor does that it stands beside."""
        keeps = isinstance(t, Tensor) and self.d(t) is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return t if not keeps else Alone.apply(t) if t.requires_grad else t.detach()

    def plain(self, t: Tensor) -> Tensor:
        """An activity in the plain model's memory format, in whose order random numbers are drawn: a block's maps are channels-last."""
        last = self.site.rows_first and t.ndim == 4 and self.mark(t) is not None and not t.is_contiguous()
        return t.contiguous() if last and t.is_contiguous(memory_format=torch.channels_last) else t

    def belongs(self, t: Tensor) -> bool:
        """Whether a tensor lives longer than a step: a buffer or parameter, which has clean values and no difference."""
        if self.mark(t) is not None:  # and Dynamo of torch 2.11 knows no identity of what a trace makes
            return False
        if id(t) in self.buffers or (t.is_leaf and t.requires_grad):
            return True
        base = None if torch.compiler.is_compiling() or not t._is_view() else t._base
        return base is not None and (id(base) in self.buffers or (base.is_leaf and base.requires_grad))

    # a call

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kind = kind_of(func)
        if kind == "metadata":
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        if not args and "input" in kwargs:
            args, kwargs = kinds.by_position(func, args, kwargs)
        if kind == "made":
            return func(*_map(args, self.plain), **kwargs) if self.site.rows_first else func(*args, **kwargs)
        if self.replaced:
            args, kwargs = _map(args, self.current), _map(kwargs, self.current)
        if kind == "gradient":
            return self._gradient(func, args, kwargs)
        marked = self._marked(args, [])
        if kwargs:
            marked = self._marked(tuple(kwargs.values()), marked)
        if not marked:
            return func(*args, **kwargs)
        first = marked[0][1]
        if first[3] is not None or (len(marked) > 1 and any(m[3] is not None for _, m in marked)):
            if len(marked) == 1 and args and args[0] is marked[0][0] and _next(first, func):
                done, result = self._extend(args[0], first, func, args, kwargs)
                if done:
                    return result
            for t, m in marked:
                if m[3] is not None:
                    self.realise(t)
            args, kwargs = _map(args, self.current), _map(kwargs, self.current)
            marked = self._marked((*args, *kwargs.values()), [])
            first = marked[0][1]
        if kind == "look":
            return func(*args, **kwargs)
        before = self.before(args[0]) if args else None
        if before is not None and in_place(name_of(func), args, kwargs):
            self.site.written(before)

        name = name_of(func) if self.site.rows_first and args and marked[0][0] is args[0] else ""
        # torch's backward of a group norm crashes on channels-last maps that need no gradient, and draws follow the memory format
        if name in ("view", "group_norm", "bernoulli") and (x := self.plain(args[0])) is not args[0]:
            d = self.d(args[0])
            self.put(x, None if d is None else d.contiguous(), first[2])
            args, marked = (x, *args[1:]), [(x, self.mark(x))]  # type: ignore[list-item]
        layer: Layer | None = None
        if kind == "layer" and args and marked[0][0] is args[0]:
            layer = self.site.layer(self, kinds.LAYERS[name_of(func)], func, args, kwargs)
        chain = first[2] if layer is None and args and marked[0][0] is args[0] and _next(first, func) else None
        if layer is not None and layer[0] is not None and layer[1] is None:
            stand_in = self._wait(layer[0], 0, func, args, kwargs)
            if stand_in is not None:
                return stand_in
        elif chain is not None:
            stand_in = self._wait(chain[0], chain[1] + 1, func, args, kwargs)
            if stand_in is not None:
                return stand_in

        if layer is not None and layer[1] is not None:
            out, d = layer[1]
        else:
            if self.site.constant:
                args, kwargs = _map(args, self._constant), _map(kwargs, self._constant)
            out, d = self._both(kind, func, args, kwargs, marked)
        if torch.compiler.is_compiling():  # where what an in-place call gives is another, and a part of a tuple takes no mark
            if isinstance(out, Tensor):
                out = args[0] if in_place(name_of(func), args, kwargs) else out
            elif type(out) in (tuple, list):
                out = [o.view_as(o) if isinstance(o, Tensor) else o for o in out]
        if self.sources and isinstance(out, Tensor) and args and isinstance(args[0], Tensor):
            self._follow(func, out, args, kwargs)
        if layer is not None and layer[0] is not None:
            return self._go_on(layer[0], 0, out, d, args)
        if chain is not None and isinstance(out, Tensor):
            return self._go_on(chain[0], chain[1] + 1, out, d, args)
        return self._tag(func, out, d, args)

    def _marked(self, values: Any, found: list[tuple[Tensor, Mark]]) -> list[tuple[Tensor, Mark]]:
        token = self.token
        for a in values:
            if isinstance(a, Tensor):
                mark = getattr(a, "_fb", None)
                if mark is not None and mark[0] == token:
                    found.append((a, mark))
            elif isinstance(a, (list, tuple)) and a and not isinstance(a[0], (int, str)):
                self._marked(a, found)
            elif isinstance(a, dict):
                self._marked(tuple(a.values()), found)
        return found

    def _constant(self, t: Any) -> Any:
        return t.detach() if isinstance(t, Tensor) and t.requires_grad and self.mark(t) is None else t

    def _both(
        self, kind: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], marked: list[tuple[Tensor, Mark]]
    ) -> tuple[Any, Any]:
        """The clean result and its difference, of several results a list of them."""
        if all(m[1] is None for _, m in marked):
            return func(*args, **kwargs), None
        if self._uncredited():
            kept = self.d(args[0]) if in_place(name_of(func), args, kwargs) else None
            return func(*args, **kwargs), kept
        handler = HANDLERS.get(kind)
        if handler is not None:
            result = handler(self, func, args, kwargs, len(marked) == 1 and len(args) > 0 and args[0] is marked[0][0])
            if result is not None:
                return result
        return general(self, func, args, kwargs)

    def _uncredited(self) -> bool:
        """Under torch.no_grad, behind which backprop gives no credit."""
        return self.site.credits and self.grad and not torch.is_grad_enabled()

    def _tag(self, func: Any, out: Any, d: Any, args: tuple[Any, ...]) -> Any:
        if isinstance(out, Tensor):
            if d is not None or out.is_floating_point() or out.is_complex():
                written = len(args) > 0 and out is args[0]
                if not (written and self.belongs(out)):
                    self.put(out, d)
                    if written:
                        self._whole(out)
        elif isinstance(out, (list, tuple)):
            for o, e in zip(out, d if isinstance(d, (list, tuple)) else [None] * len(out), strict=True):
                if isinstance(o, Tensor) and (e is not None or o.is_floating_point()):  # what sort chooses is the noisy stream's own
                    self.put(o, e)
                elif isinstance(o, (list, tuple)):
                    self._tag(func, o, e, ())
        elif out is None and name_of(func) == "__setitem__" and (d is not None or not self.belongs(args[0])):
            self.put(args[0], d)
            self._whole(args[0])
        return out

    def _whole(self, view: Tensor) -> None:
        """A view was written: what it is a view of depends on the network's input too."""
        base = None if torch.compiler.is_compiling() or not view._is_view() else view._base
        if base is not None and self.mark(base) is None:
            self.put(base, None)

    def custom(self, cls: Any, plain: Any, args: Any, kwargs: Any) -> Any:
        """A custom autograd.Function: J d as its backward says, or f(h + d) - f(h) as of any function."""
        args, kwargs = _map(args, self.current), _map(kwargs, self.current)
        marked = self._marked((*args, *kwargs.values()), [])
        for t, mark in marked:
            if mark[3] is not None:
                self.realise(t)
        args, kwargs = _map(args, self.current), _map(kwargs, self.current)
        with torch._C.DisableTorchFunction():
            if cls.__name__ == "BackwardHookFunction":  # the identity: torch's own, of full backward hooks
                out = plain(*args, **kwargs)
                for t, o in zip(args, out if isinstance(out, tuple) else (out,), strict=False):
                    if (own := self.mark(t)) is not None:
                        chain = own[2]
                        self.put(o, own[1], (chain[0], chain[1] + 1) if chain is not None and _next(own, cls) else chain)
                return out
            # torch.utils.checkpoint keeps, for its second run, activities with what stands beside them
            if not marked or cls.__module__ == "torch.utils.checkpoint":
                return plain(*args, **kwargs)
            if all(mark[1] is None for _, mark in marked) or self._uncredited():
                return self._tag(cls, plain(*args, **kwargs), None, ())
            out, d = self._declared(cls, plain, args, kwargs, marked) or general(self, plain, args, kwargs, cls)
        return self._tag(cls, out, d, ())

    def _declared(self, cls: Any, plain: Any, args: Any, kwargs: Any, marked: list[tuple[Tensor, Mark]]) -> tuple[Any, Any] | None:
        site = self.site
        moving = {id(t): (t, m[1]) for t, m in marked if m[1] is not None and t.is_floating_point()}
        if not (site.credits and moving):
            return None
        at, ds = zip(*moving.values(), strict=True)
        whole = [site.sides(torch.zeros_like(t), d) for t, d in zip(at, ds, strict=True)]  # a row of another's has no difference
        generators = generators_for([*at]) if cls in site.random else []
        sides = []
        for directions in zip(*whole, strict=True):
            with drawn_again((), generators):
                side = declared(plain, args, kwargs, at, directions)
            if side is None:
                return None
            sides.append(side)
        out = plain(*_map(args, self.bare), **_map(kwargs, self.bare))
        partial = site.partial()
        moved = [None if parts[0] is None else site.joined(parts, None) if partial else parts[0] for parts in zip(*sides, strict=True)]
        return out, _beside(out, iter(moved))

    def _follow(self, func: Any, out: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Layerwise: rearrangements keep the point that a layer will read, and how its noise comes there."""
        source, name = getattr(args[0], "_fb_source", None), name_of(func)
        if source is None or source[0] != self.token:
            return
        if name in kinds.DROPOUTS:  # the noise goes in behind the mask
            out._fb_source = source  # type: ignore[attr-defined]
        if name not in kinds.REARRANGEMENTS:
            return
        rest, n = args[1:], len(args[0])

        def again(t: Tensor) -> Tensor:
            shape = rest[0] if rest and isinstance(rest[0], (tuple, list)) else rest
            fits = name not in ("view", "reshape") or shape[0] != n
            given = rest if fits else ((len(t), *shape[1:]),)  # not all rows have noise
            result: Tensor = (Tensor.reshape if name == "view" else func)(t, *given, **kwargs)  # the noise of a map lies channels-last
            return result

        out._fb_source = (self.token, source[1], (*source[2], (name, again)))  # type: ignore[attr-defined]

    def _gradient(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A hook on a point's activity belongs to what lies before the cut, which gets the learned gradient."""
        t = args[0]
        if (mark := self.mark(t)) is not None and mark[3] is not None:
            t = self.realise(t)
        before = self.before(t)
        if before is not None and before.requires_grad and not t.requires_grad:
            if name_of(func) == "retain_grad":
                own = weakref.ref(t)  # which holds the tensor before it, and that its hooks
                before.register_hook(lambda g: None if own() is None else setattr(own(), "grad", g))
                return None
            t = before
        return func(t, *args[1:], **kwargs)

    # chains: a layer and what follows it up to its point

    def _go_on(self, chain: Chain, ran: int, out: Tensor, d: Tensor | None, args: tuple[Any, ...]) -> Tensor:
        """Behind call number ``ran`` of a chain: its point, where it was the last."""
        if ran < len(chain.calls) or chain.explicit:
            return self.put(out, d, (chain, ran))
        return self.end(chain, out, d, None, any(a is out for a in args[:1]))

    def end(self, chain: Chain, x: Tensor, d: Tensor | None, waiting: Waiting | None, in_place: bool) -> Tensor:
        """A point: x is its activity, or with ``waiting`` whatever stands for it."""
        h = x
        h, cut, d = self.site.point(self, chain, h, d, waiting)
        if cut is h:
            cut = h.view_as(h)
        self.put(cut, d)
        if h.requires_grad:
            cut._fb_before = (self.token, h)  # type: ignore[attr-defined]
        if self.sources:
            cut._fb_source = (self.token, chain.point, ())  # type: ignore[attr-defined]
        if in_place:
            self.replaced.append(self.put(x, d, instead=cut))
        return cut

    def pass_point(self, name: str, maps: bool | None, h: Tensor) -> Tensor:
        """A point that the model has itself runs on h."""
        h = self.current(h)
        mark = self.mark(h)
        if mark is None:
            return h
        chain = mark[2][0] if mark[2] is not None and mark[2][0].point == name and mark[2][1] == len(mark[2][0].calls) else None
        if mark[3] is not None and chain is None:
            h = self.realise(h)
            mark = self.mark(h)
            assert mark is not None
        if chain is None:
            chain = Chain("", name, (), (), maps, explicit=True)
        with contextlib.nullcontext() if torch.compiler.is_compiling() else torch._C.DisableTorchFunction():
            return self.end(chain, h, mark[1], mark[3], False)

    # functions put off until their point, to run in one launch

    def _wait(self, chain: Chain, ran: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Put a call off where the rest of its chain runs as one."""
        if not chain.fuses[ran]:
            return None
        waiting = Waiting.begin(self, chain, ran, func, args, kwargs)
        if waiting is None:
            return None
        return self._stand_in(waiting, args[0], in_place(name_of(func), args, kwargs))

    def _stand_in(self, waiting: Waiting, x: Tensor, written: bool) -> Tensor:
        if waiting.ran == len(waiting.chain.calls) and not waiting.chain.explicit:
            return self.end(waiting.chain, x, self.d(x), waiting, written)
        if written:
            return self.put(x, None, (waiting.chain, waiting.ran), waiting)
        t = waiting.stand_in()
        if not torch.compiler.is_compiling():
            self.waiting.append((weakref.ref(t), waiting))
        return self.put(t, None, (waiting.chain, waiting.ran), waiting)

    def _extend(self, t: Tensor, mark: Mark, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        waiting = mark[3]
        assert waiting is not None
        longer = waiting.extend(func, args[1:], kwargs)
        if longer is None:
            return False, None
        return True, self._stand_in(longer, t, in_place(name_of(func), args, kwargs))

    def realise(self, t: Tensor) -> Tensor:
        """Run what was put off, call by call, since something else reads it."""
        mark = self.mark(t)
        assert mark is not None and mark[3] is not None
        with mark[3].as_then():
            out, d = self.run(mark[3])
        y = self.put(out, d, (mark[3].chain, mark[3].ran))
        self.replaced.append(self.put(t, None, instead=y))
        return y

    def run(self, waiting: Waiting) -> tuple[Tensor, Tensor | None]:
        """Put-off calls, one by one."""
        y, d = waiting.source, waiting.d
        for func, args, kwargs in waiting.calls:
            if self.site.constant:
                args, kwargs = _map(args, self._constant), _map(kwargs, self._constant)
            self.put(y, d)
            mark = self.mark(y)
            assert mark is not None
            y, d = self._both(kind_of(func), func, (y, *args), kwargs, [(y, mark)])
        return y, d

    def finish(self) -> list[tuple[str, Tensor]]:
        """Give the tensors that somebody has kept their values: a module's own attribute, a hook's list. They have no graph."""
        kept = []
        for reference, waiting in self.waiting:
            t = reference()
            if t is not None:
                mark = self.mark(t)
                y = mark[4] if mark is not None and mark[4] is not None else waiting.clean()
                t.data = y.detach()
                kept.append((waiting.chain.layer or waiting.chain.point, t))
        self.waiting = []
        return kept

    def close(self) -> None:
        """Part the tensors that have another in their place from those, which refer to them: through a graph without a backward pass no
        collector sees that nobody else does."""
        if not torch.compiler.is_compiling():
            for t in self.replaced:
                del t._fb  # type: ignore[attr-defined]
        self.replaced = []


def _next(mark: Mark, func: Any) -> bool:
    """Whether its chain goes on with func. No static method: Dynamo cannot guard one that it reads from an instance."""
    chain = mark[2]
    return chain is not None and chain[1] < len(chain[0].calls) and same(chain[0].calls[chain[1]], func)


class _Modes(threading.local):
    """The modes of a thread that custom functions go through."""

    def __init__(self) -> None:
        self.stack: list[Any] = []


_MODES = _Modes()
_HOME = torch.autograd.function._SingleLevelFunction  # which Function.apply leads to, also where a model has kept that before


class Shown:
    """While it lasts, the custom autograd.Functions of this thread go through the mode too: torch shows them to none."""

    def __init__(self, mode: Any) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        if "apply" not in _HOME.__dict__:  # once and for all: a class that changes loses what Python knows of its subclasses
            _HOME.apply = classmethod(_apply)  # type: ignore[attr-defined]
        _MODES.stack.append(self.mode)

    def __exit__(self, *_: Any) -> None:
        _MODES.stack.pop()


def shown(mode: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if torch.compiler.is_compiling() else Shown(mode)


@skipped  # no more than torch's own, which it stands in for
def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    plain = super(_HOME, cls).apply
    if not _MODES.stack or cls.__module__.startswith("fbkernels."):
        return plain(*args, **kwargs)
    return _MODES.stack[-1].custom(cls, plain, args, kwargs)


def _beside(out: Any, moved: Iterator[Any]) -> Any:
    """The differences in the form of what they belong to."""
    if isinstance(out, Tensor):
        return next(moved)
    return [_beside(o, moved) for o in out] if isinstance(out, (list, tuple)) else None


def _map(tree: Any, f: Callable[[Any], Any]) -> Any:
    """f of each tensor in arguments."""
    if isinstance(tree, Tensor):
        return f(tree)
    if type(tree) in (list, tuple):
        return type(tree)([_map(x, f) for x in tree])
    if type(tree) is dict:
        return {k: _map(v, f) for k, v in tree.items()}
    return tree
