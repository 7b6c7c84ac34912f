"""What a forward takes and gives, flat. torch's pytrees take 20 us for the one tensor that it mostly is."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Those among a forward's arguments."""
    if not kwargs and all(isinstance(x, Tensor) for x in args):
        return [*args]
    return [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]


def flatten(tree: Any) -> tuple[list[Any], Any]:
    return ([tree], None) if isinstance(tree, Tensor) else tree_flatten(tree)


def unflatten(leaves: list[Any], spec: Any) -> Any:
    return leaves[0] if spec is None else tree_unflatten(leaves, spec)


def differs(t: Tensor) -> bool:
    """Whether a gradient can reach it: no choice or mask that stands beside logits."""
    return t.is_floating_point() or t.is_complex()
