"""The difference of each kind of function: d of the result from h and d of the arguments, without autograd (SPEC 1).

A handler runs the clean call itself, since one that writes in place has to be looked at first, and answers (result, difference), or None
where the call is not of the form that it covers: then ``general`` takes it. ``alone``: the first argument is the only activity.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from fbkernels.draws import Draws, drawn, drawn_again
from fbkernels.stream.kinds import in_place, name_of
from fbkernels.stream.synchronised import normalised

if TYPE_CHECKING:
    from fbkernels.stream.mode import Streams

Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]
Result: TypeAlias = tuple[Any, Any] | None


def linear(mode: Streams, func: Any, args: Args, kwargs: Kwargs, alone: bool) -> Result:
    name = name_of(func)
    if name in ("view_as", "reshape_as", "expand_as", "type_as"):
        if mode.d(args[0]) is None or mode.site.partial():
            return None
    elif not alone:
        return None
    d = mode.d(args[0])
    with torch.no_grad():
        e = func(d, *(_fit(name, args, d) if mode.site.partial() else args[1:]), **kwargs)  # before an in-place form changes the shape
    out = func(*args, **kwargs)
    if isinstance(e, (tuple, list)):
        if len(e) != len(out):
            raise ValueError(f"{name} splits the batch, which fraction and antithetic cannot follow: use fraction=1 and antithetic=False")
        return out, list(e)
    return out, e


def cut(mode: Streams, func: Any, args: Args, kwargs: Kwargs, alone: bool) -> Result:
    """Behind it there is no difference: backprop gives no credit there."""
    return (func(*args, **kwargs), None) if mode.site.credits else linear(mode, func, args, kwargs, alone)


def _fit(name: str, args: Args, d: Any) -> Args:
    """``x.view(len(x), -1)`` where not all rows have a difference."""
    x, rest = args[0], args[1:]
    if name not in ("view", "reshape", "expand") or not rest:
        return rest
    shape = rest[0] if isinstance(rest[0], (tuple, list)) else rest
    return ((len(d), *shape[1:]),) if shape[0] == len(x) else rest


def layer(mode: Streams, func: Any, args: Args, kwargs: Kwargs, alone: bool) -> Result:
    if not alone:
        return None
    out = func(mode.bare(args[0]), *args[1:], **kwargs)
    return out, weighted(func, mode.d(args[0]), args, kwargs)


def weighted(func: Any, d: Tensor | None, args: Args, kwargs: Kwargs) -> Tensor:
    """W d of a layer, without its bias."""
    with torch.no_grad():
        if "bias" in kwargs:
            kwargs = {**kwargs, "bias": None}
        elif len(args) > 2:
            args = (*args[:2], None, *args[3:])
        result: Tensor = func(d, *args[1:], **kwargs)
        return result


def elementwise(mode: Streams, func: Any, args: Args, kwargs: Kwargs, alone: bool) -> Result:
    """f(h + d) - f(h), formed in float32 where the activity has less."""
    if not alone or kwargs.get("return_indices"):
        return None
    x, name = args[0], name_of(func)
    written = in_place(name, args, kwargs)
    low = x.dtype in (torch.bfloat16, torch.float16)
    if written and (low or mode.belongs(x) or _is_view(x)):
        return None
    if low:
        with torch.no_grad(), _exact(x):
            h = mode.site.rows(x.detach(), mode.d(x)).float()
            given, named = _map((args[1:], kwargs), lambda t, _: t.float() if t.is_floating_point() else t, None)
            d = func(h + mode.d(x), *given, **named) - func(h, *given, **named)  # type: ignore[operator]
        out = func(mode.bare(x), *args[1:], **kwargs)
        return out, d.to(out.dtype)
    with torch.no_grad():
        p = func(mode.moved(x, mode.d(x)), *args[1:], **kwargs)
    out = func(x if written else mode.bare(x), *args[1:], **kwargs)
    if not isinstance(out, Tensor):
        return None if not written else (out, None)
    with torch.no_grad():
        return out, p.sub_(mode.site.rows(out.detach(), p))


def add(mode: Streams, func: Any, args: Args, kwargs: Kwargs, alone: bool) -> Result:
    return _sum(mode, func, args, kwargs, 1)


def subtract(mode: Streams, func: Any, args: Args, kwargs: Kwargs, alone: bool) -> Result:
    return _sum(mode, func, args, kwargs, -1)


def _sum(mode: Streams, func: Any, args: Args, kwargs: Kwargs, sign: int) -> Result:
    if len(args) != 2 or not kwargs.keys() <= {"alpha"} or not all(_float(t) for t in args if isinstance(t, Tensor)):
        return None
    a, b = mode.d(args[0]), mode.d(args[1])
    out = func(*args, **kwargs)
    with torch.no_grad():
        alpha = sign * kwargs.get("alpha", 1)
        if a is None:
            d = b * alpha if alpha != 1 else b.clone()  # type: ignore[union-attr]
        else:
            d = a.clone() if b is None else torch.add(a, b, alpha=alpha)
        return out, _grown(mode, d, out)


def _grown(mode: Streams, d: Tensor, out: Tensor) -> Tensor:
    """The difference where the other summand has made the result larger."""
    rows = out.shape if not mode.site.partial() else (len(d), *out.shape[1:])
    return d if d.shape == rows else d.expand(rows).clone()


def multiply(mode: Streams, func: Any, args: Args, kwargs: Kwargs, alone: bool) -> Result:
    if len(args) != 2 or kwargs:
        return None
    (a, b), (da, db) = args, map(mode.d, args)
    out = func(mode.bare(a), mode.bare(b))
    with torch.no_grad():
        if db is None:
            return out, _grown(mode, da * _beside(mode, b, a), out)
        if da is None:
            return out, _grown(mode, _beside(mode, a, b) * db, out)
        a, b = mode.site.rows(a.detach()), mode.site.rows(b.detach())
        return out, torch.addcmul(da * (b + db), a, db)


def _beside(mode: Streams, t: Any, x: Tensor) -> Any:
    """A factor beside an activity, of its rows where it has one for each sample of the batch."""
    if not isinstance(t, Tensor):
        return t
    per_sample = mode.site.partial() and (mode.mark(t) is not None or (t.ndim == x.ndim and 1 < len(t) == len(x)))
    return mode.site.rows(t.detach()) if per_sample else t.detach()


def divide(mode: Streams, func: Any, args: Args, kwargs: Kwargs, alone: bool) -> Result:
    if len(args) != 2 or kwargs or not alone:
        return None
    out = func(*args)
    with torch.no_grad():
        return out, _grown(mode, mode.d(args[0]) / _beside(mode, args[1], args[0]), out)


def matmul(mode: Streams, func: Any, args: Args, kwargs: Kwargs, alone: bool) -> Result:
    if len(args) != 2 or kwargs or (mode.site.partial() and not alone):
        return None
    a, b = args
    da, db = mode.d(a), mode.d(b)
    out = func(mode.bare(a), mode.bare(b))
    with torch.no_grad():
        if db is None:
            return out, func(da, b)
        return out, func(a, db) if da is None else func(da, b + db) + func(a, db)


def cat(mode: Streams, func: Any, args: Args, kwargs: Kwargs, alone: bool) -> Result:
    if not args or not isinstance(args[0], (list, tuple)) or "out" in kwargs or mode.site.partial():
        return None
    out = func(*args, **kwargs)
    with torch.no_grad():
        parts = [torch.zeros_like(t, memory_format=torch.contiguous_format) if mode.d(t) is None else mode.d(t) for t in args[0]]
        return out, func(parts, *args[1:], **kwargs)


def dropout(mode: Streams, func: Any, args: Args, kwargs: Kwargs, alone: bool) -> Result:
    """One mask for both: torch multiplies with the same numbers, so the clean result is what it was."""
    given = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
    x, written = given["input"], given.get("inplace", False)
    if not given.get("training", given.get("train", True)):
        return func(*args, **kwargs), mode.d(x).clone()  # type: ignore[union-attr]
    if mode.belongs(x):
        return None
    rest = {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs
    with torch.no_grad():
        mask = func(torch.ones_like(mode.plain(x)), *args[1:3], **{k: v for k, v in rest.items() if k != "input"})
        d = mode.d(x) * mode.site.rows(mask)  # type: ignore[operator]
    return (x.mul_(mask) if written else x * mask), d


def pad(mode: Streams, func: Any, args: Args, kwargs: Kwargs, alone: bool) -> Result:
    if not alone:
        return None
    out = func(*args, **kwargs)
    given = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
    how = given.get("mode", "constant")
    with torch.no_grad():
        d = mode.d(given["input"])
        return out, func(d, given["pad"]) if how == "constant" else func(d, given["pad"], mode=how)


def batch_norm(mode: Streams, func: Any, args: Args, kwargs: Kwargs, alone: bool) -> Result:
    """gain / std * d, with the statistics of the clean stream."""
    if not alone:
        return None
    given = (
        dict(zip(("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"), args, strict=False)) | kwargs
    )
    x, weight, training, eps = given["input"], given.get("weight"), given.get("training", False), given.get("eps", 1e-5)
    var = None if training else given["running_var"].clone()
    out = func(mode.bare(args[0]), *args[1:], **kwargs)
    with torch.no_grad():
        exact = torch.promote_types(x.dtype, torch.float32)
        if var is None:
            var = torch.var(x.detach().to(exact), [k for k in range(x.ndim) if k != 1], correction=0)
        gain = (var.to(exact) + eps).rsqrt_()
        if weight is not None:
            gain = gain * weight.detach()
        return out, (mode.d(x) * gain.view(-1, *[1] * (x.ndim - 2))).to(out.dtype)


def synchronised_norm(mode: Streams, func: Any, args: Args, kwargs: Kwargs, alone: bool) -> Result:
    """The same with the statistics of all processes."""
    out, gain = normalised(mode.bare(args[0]), *args[1:], **kwargs)
    with torch.no_grad():
        d = mode.d(args[0])
        return out, (d * gain.detach().view(-1, *[1] * (out.ndim - 2))).to(out.dtype)  # type: ignore[operator]


def general(mode: Streams, func: Any, args: Args, kwargs: Kwargs, key: Any = None) -> tuple[Any, Any]:
    """f(h + d) - f(h) of any function, its random numbers drawn twice alike; what lives longer than the step is written once, clean.
    ``key``: what it is known by where it draws."""
    name = name_of(func)
    written = in_place(name, args, kwargs)
    target = (kwargs.get("out") if kwargs.get("out") is not None else args[0]) if written else None
    own = isinstance(target, Tensor) and mode.belongs(target)
    if own or (name.startswith("bernoulli") and torch.compiler.is_compiling()):  # a trace draws once
        return func(*args, **kwargs), None
    site, given = mode.site, [t for t in _leaves((args, kwargs)) if isinstance(t, Tensor)]
    low = any(t.dtype in (torch.bfloat16, torch.float16) for t in given)
    random = site.random is not None and (key or func) in site.random if not torch.compiler.is_compiling() else False
    # random numbers, or what else has a row for each sample: they are those of the whole batch, which runs once for each sign
    whole = site.partial() and (
        random or any(mode.mark(t) is None and not isinstance(t, Parameter) and site.samples in t.shape for t in given)
    )

    def other(t: Tensor, sign: int | None) -> Tensor:
        d = mode.d(t)
        h = t.detach().float() if low and t.is_floating_point() else t.detach()  # before d comes in, which is less than a digit of bfloat16
        if mode.mark(t) is None or (whole and (d is None or sign is None)):
            p = h
        elif sign is None:
            p = site.rows(h, d)
        else:
            p = site.sides(h, d)[sign] if whole and d is not None else mode.moved(h, d)
        tracing = torch.compiler.is_compiling()
        kept = t is target or (not tracing and id(t) in mode.buffers)  # which the noisy side must not write
        return p.clone() if kept and (tracing or (t.layout == torch.strided and p.data_ptr() == t.data_ptr())) else p

    alone: dict[int, Tensor] = {}  # attention asks whether query and key are one

    def bare(t: Tensor, _: None) -> Tensor:
        if torch.compiler.is_compiling():
            return t
        if id(t) not in alone:
            alone[id(t)] = mode.bare(t)
        return alone[id(t)]

    signs = range(1 + site.antithetic) if whole else (0,)
    with torch.no_grad():
        calls = [(_map(args, other, sign), _map(kwargs, other, sign)) for sign in (*signs, *[None] * low)]
    generators = generators_for(given) if random else []
    states, draws = [drawn(g) for g in generators], Draws()
    with draws if random else contextlib.nullcontext():
        out = func(*args, **kwargs) if written else func(*_map(args, bare, None), **_map(kwargs, bare, None))
    result = args[0] if name == "__setitem__" else out
    tensors = _leaves(result)
    if not any(isinstance(t, Tensor) for t in tensors):
        return out, None
    results = []
    with torch.no_grad(), _exact(tensors[0] if low else None):
        for pargs, pkwargs in calls:
            with drawn_again(states, generators), Draws(draws) if random else contextlib.nullcontext():
                try:
                    r = func(*pargs, **pkwargs)
                except RuntimeError as e:
                    if not site.partial() or isinstance(e, torch.OutOfMemoryError):
                        raise
                    raise ValueError(
                        f"{name} takes what has a row for each sample and is no activity, which fraction and antithetic cannot follow: use "
                        "fraction=1 and antithetic=False"
                    ) from e
            results.append(pargs[0] if name == "__setitem__" else r)
        moved, base = results[: len(signs)], results[-1] if low else result
        if whole:
            shape = result.shape if isinstance(result, Tensor) else None
            like = [mode.d(t) for t in given if t.shape == shape and mode.d(t) is not None]
            moved = [_joined(mode, moved, *like[:1])]
            base = _joined(mode, [base] * len(signs), *like[:1]) if low else base
        d = _difference(mode, moved[0], base, result, low)
        if written and isinstance(target, Tensor) and isinstance(d, Tensor) and _is_view(target):
            d = _through(mode, target, d)
    return out, d


def _joined(mode: Streams, sides: Any, like: Tensor | None = None) -> Any:
    """Of results for each sign the rows that have a difference, in the shape of ``like``."""
    if isinstance(sides[0], Tensor):
        return mode.site.joined(sides, like)
    return [_joined(mode, parts) for parts in zip(*sides, strict=True)] if isinstance(sides[0], (list, tuple)) else sides[0]


def _difference(mode: Streams, p: Any, h: Any, out: Any, low: bool) -> Any:
    if isinstance(out, Tensor):
        h = h if low else mode.site.rows(h.detach(), p)
        if p.shape != h.shape:
            raise ValueError(
                f"the model chooses by the values of its activities, {tuple(h.shape)} of the clean ones and {tuple(p.shape)} of the noisy: "
                "let noise begin behind that, with points=[...], or take feedback='layerwise' and WeightMirror(), which has no noisy ones"
            )
        if out.dtype == torch.bool:
            return p.to(torch.int8) - h.to(torch.int8)
        return (p - h).to(out.dtype)
    if isinstance(out, (list, tuple)):
        return [_difference(mode, a, b, c, low) for a, b, c in zip(p, h, out, strict=True)]
    return None


def _through(mode: Streams, view: Tensor, d: Tensor) -> Tensor:
    """A view was written: what it is a view of has that difference too."""
    old = mode.d(view)
    if old is not None and old.shape == d.shape and _is_view(old):
        return old.copy_(d)
    base, part = view._base, mode.site.partial()
    if base is None:
        return d
    whole, offset = mode.d(base), view.storage_offset() - base.storage_offset()
    if part and not (base.is_contiguous() and len(view) == len(base) and view.stride(0) == base.stride(0) and offset < base.stride(0)):
        if whole is not None:
            return d
        raise ValueError(
            f"fraction and antithetic cannot follow what is written into a view of shape {tuple(view.shape)} of another of shape "
            f"{tuple(base.shape)}, where not each row is a sample's: use fraction=1 and antithetic=False, or torch.cat"
        )
    if whole is None or whole.stride() != base.stride():
        fresh = d.new_zeros(len(d), *base.shape[1:]) if part else torch.zeros_like(base, requires_grad=False)
        whole = fresh if whole is None else fresh.copy_(whole)
        mode.put(base, whole)
    return whole.as_strided(d.shape, view.stride(), offset + whole.storage_offset()).copy_(d)


@contextlib.contextmanager
def _exact(x: Tensor | None) -> Iterator[None]:
    if x is None:
        yield
        return
    with torch.autocast(x.device.type, enabled=False):
        yield


def generators_for(given: list[Tensor]) -> list[torch.Generator]:
    """That a function of these may draw from."""
    cuda = next((t.device for t in given if t.is_cuda), None)
    if cuda is None:
        return [torch.default_generator]
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph cannot hold a function that draws random numbers, dropout apart: take it out of the model")
    return [torch.default_generator, torch.cuda.default_generators[cuda.index or 0]]


def _is_view(t: Tensor) -> bool:
    return False if torch.compiler.is_compiling() else t._is_view()


def _float(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _map(tree: Any, f: Any, flag: int | None) -> Any:
    if isinstance(tree, Tensor):
        return f(tree, flag)
    if type(tree) in (list, tuple):
        return type(tree)([_map(x, f, flag) for x in tree])
    if type(tree) is dict:
        return {k: _map(v, f, flag) for k, v in tree.items()}
    return tree


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)) and not isinstance(tree, torch.Size):
        return [x for t in tree for x in _leaves(t)]
    return [tree]


HANDLERS = {
    f.__name__: f
    for f in (linear, cut, layer, elementwise, add, subtract, multiply, divide, matmul, cat, dropout, pad, batch_norm, synchronised_norm)
}
