"""Custom autograd.Functions. Their backward is their word on what an error does: a reversal, a straight-through estimator, a spike with a
surrogate gradient. So the difference follows it, and not what they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

Run = Callable[..., Any]


def declared(run: Run, args: Any, kwargs: Any, at: Sequence[Tensor], ds: Sequence[Tensor]) -> list[Tensor | None] | None:
    """J d of each tensor that the function gives, J^T being its backward, d of the arguments ``at``; None of one that no gradient comes
    back from. None where the backward cannot be differentiated, as it is ``once_differentiable`` or leaves torch."""
    try:
        with torch.enable_grad():
            outs, xs, where = _apart(run, args, kwargs, at)
            vs = [torch.zeros_like(o, requires_grad=True) for o in outs]
            back = torch.autograd.grad(outs, xs, [v.clone() for v in vs], create_graph=True, allow_unused=True) if outs else ()
            given = [(g, d) for g, d in zip(back, ds, strict=False) if g is not None]
            if not all(g.requires_grad for g, _ in given):
                return None
            gs, directions = zip(*given, strict=True) if given else ((), ())
            moved = torch.autograd.grad(gs, vs, directions, allow_unused=True) if given else [None] * len(vs)
            if given and all(m is None for m in moved):
                return None
    except RuntimeError:
        return None
    found = iter(moved)
    return [next(found) if own else None for own in where]


def contradicts(run: Run, args: Any, kwargs: Any, at: Sequence[Tensor]) -> bool:
    """Whether the backward is not, to a third, that of what the function computes."""
    with torch.enable_grad():
        outs, xs, where = _apart(run, args, kwargs, at)
        if not outs:
            return False
        us = [torch.randn_like(x) * 1e-2 * (1 + x.detach().abs().mean()) for x in xs]
        ends = [
            [o for o, own in zip(_tensors(run(*_put(args, at, moved), **_put(kwargs, at, moved))), where, strict=True) if own]
            for moved in ([x.detach() + s * u for x, u in zip(xs, us, strict=True)] for s in (1, -1))
        ]
        vs = [(p.detach() - m.detach()) / 2 for p, m in zip(*ends, strict=True)]
        if not any(v.any() for v in vs):
            vs = [torch.randn_like(o) for o in outs]
        back = torch.autograd.grad(outs, xs, vs, allow_unused=True)
    computed = sum(float((v * (p - m) / 2).sum()) for v, p, m in zip(vs, *ends, strict=True))
    said = sum(float((g * u).sum()) for g, u in zip(back, us, strict=True) if g is not None)
    return abs(computed - said) > (abs(computed) + abs(said)) / 3


def _apart(run: Run, args: Any, kwargs: Any, at: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[bool]]:
    """A run in a graph of its own: what of it a gradient comes back from, its arguments, and which of its tensors those are."""
    xs = [t.detach().clone().requires_grad_() for t in at]
    own = [x.clone() for x in xs]  # which it may write
    results = _tensors(run(*_put(args, at, own), **_put(kwargs, at, own)))
    return [o for o in results if o.requires_grad], xs, [o.requires_grad for o in results]


def _put(tree: Any, at: Sequence[Tensor], own: Sequence[Tensor]) -> Any:
    instead = {id(t): o for t, o in zip(at, own, strict=True)}
    return tree_map_only(Tensor, lambda t: instead.get(id(t), t.detach()), tree)


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in tree_leaves(out) if isinstance(t, Tensor)]
