"""What a forward takes and gives, flat. torch's pytrees take 20 us for the one tensor that it mostly is."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._pytree import (
    GetAttrKey,
    register_pytree_node,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
)

# where a tensor is among a forward's arguments: the parameter that takes it, by position and by name, and the way to it from there
Where = tuple[int, str, tuple[Any, ...]]


def tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Those among a forward's arguments."""
    if not kwargs and all(isinstance(x, Tensor) for x in args):
        return [*args]
    return [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]


def copied(tree: Any) -> Any:
    """With tensors and containers of its own, which a forward may write and no graph outlives."""
    return tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), tree)


def known_to_torch(tree: Any) -> None:
    """torch's pytrees take a dataclass for one leaf until it is registered, as libraries do with theirs."""
    for leaf in tree_leaves(tree):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            cls, names = type(leaf), [f.name for f in dataclasses.fields(leaf)]
            flat, keyed = functools.partial(_parts, names), functools.partial(_keyed, names)
            register_pytree_node(cls, flat, functools.partial(_whole, cls, names), flatten_with_keys_fn=keyed)
            known_to_torch(flat(leaf)[0])


def _parts(names: list[str], x: Any) -> tuple[list[Any], None]:
    return [getattr(x, k) for k in names], None


def _keyed(names: list[str], x: Any) -> tuple[list[tuple[Any, Any]], None]:
    return [(GetAttrKey(k), getattr(x, k)) for k in names], None


def _whole(cls: type, names: list[str], values: Iterable[Any], _: Any) -> Any:
    new: Any = object.__new__(cls)
    for k, v in zip(names, values, strict=True):
        object.__setattr__(new, k, v)  # frozen ones too
    return new


def flatten(tree: Any) -> tuple[list[Any], Any]:
    return ([tree], None) if isinstance(tree, Tensor) else tree_flatten(tree)


def unflatten(leaves: list[Any], spec: Any) -> Any:
    return leaves[0] if spec is None else tree_unflatten(leaves, spec)


def where(x: Tensor, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Where:
    names = [p.name for p in inspect.signature(forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    way: Any = next(way for way, found in tree_flatten_with_path((args, kwargs))[0] if found is x)
    given, first, *rest = way
    if given.idx == 0:
        return first.idx, names[first.idx] if first.idx < len(names) else "", tuple(rest)
    return names.index(first.key) if first.key in names else sys.maxsize, first.key, tuple(rest)


def at(place: Where, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that is there; None where there is none."""
    position, name, path = place
    try:
        value = args[position] if position < len(args) else kwargs[name]
        for key in path:
            value = key.get(value)
    except (LookupError, TypeError, AttributeError):
        return None
    return value if isinstance(value, Tensor) and value.ndim else None


def differs(t: Tensor) -> bool:
    """Whether a gradient can reach it: no choice or mask that stands beside logits."""
    return t.is_floating_point() or t.is_complex()
