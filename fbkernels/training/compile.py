"""What Dynamo cannot trace: the placement is found beside the trace, from the shapes of what goes in."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._guards import CompileContext

from fbkernels._compile import constant
from fbkernels.untouched import untouched

if TYPE_CHECKING:
    from fbkernels.training.network import Network

_NETWORKS: weakref.WeakValueDictionary[int, Network] = weakref.WeakValueDictionary()
_KNOWN: dict[int, tuple[Any, bool]] = {}  # of a network, in which trace
_keys = 0


def register(network: Network) -> int:
    """A number by which a trace names its network."""
    global _keys
    _keys += 1
    _NETWORKS[_keys] = network
    return _keys


def described(tree: Any) -> Any:
    """The arguments of a forward, as constants of a trace."""
    if isinstance(tree, Tensor):
        # a range makes a constant of a size that the trace would leave open, as it does where an earlier network took another one
        return ("tensor", tuple([len(range(n)) for n in tree.shape]), tree.dtype, tree.device)
    if isinstance(tree, (list, tuple)):
        return ("list" if isinstance(tree, list) else "tuple", tuple([described(x) for x in tree]))
    if isinstance(tree, dict):
        return ("dict", tuple([(k, described(v)) for k, v in tree.items()]))
    return ("other", tree)


def _made(description: Any) -> Any:
    kind, *rest = description
    if kind == "tensor":
        shape, dtype, device = rest
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape, dtype=dtype, device=device)
        return torch.zeros(shape, dtype=dtype, device=device)
    if kind == "dict":
        return {k: _made(v) for k, v in rest[0]}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_made(x) for x in rest[0])
    return rest[0]


@constant
def known(key: int) -> bool:
    """Whether the placement was there when the trace began: then sizes may stay open. Dynamo may trace again, and expects the same way."""
    network, trace = _NETWORKS[key], CompileContext.current_compile_id()
    if _KNOWN.get(key, (None, False))[0] != trace:
        _KNOWN[key] = trace, network.placement is not None and not (network.stale or network.unplaced)
    return _KNOWN[key][1]


@constant
def placed(key: int, args: Any, kwargs: Any) -> bool:
    """Find the placement of a network that has none, with inputs of these shapes."""
    network = _NETWORKS[key]
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = False
    try:
        with torch.random.fork_rng([]):
            given = _made(args), _made(kwargs)
        root = network.root[0]
        with torch.enable_grad():
            network.placement, network.stale = network.find(root, *given), False
        if network.settings.rule.mirrors:  # whose B settles before its first use
            with torch.enable_grad(), untouched(root, given, network.runs):
                network.run(network.begin(root, *given), root, *given)
    finally:
        torch.compiler._is_compiling_flag = before
    return True
