"""A warm-up, in which B alone learns: gradients are zero, and torch's optimisers take no step of them.

They are zero and not None, since code of users' reads them. But Adam would count the step, for which no later one is corrected, and weight
decay would move parameters that stand still.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from fbkernels.training.network import Network

_STANDING: weakref.WeakSet[Network] = weakref.WeakSet()
_LEFT_OUT: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[tuple[Tensor, Tensor]]] = weakref.WeakKeyDictionary()


class Zeros(torch.autograd.Function):
    """The loss, with a gradient of zero for each parameter."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, *(torch.zeros_like(p) for p in ctx.parameters)


def stand(network: Network, still: bool) -> None:
    """Whether the gradients of a network's parameters are those of a warm-up."""
    if still:
        _STANDING.add(network)
    else:
        _STANDING.discard(network)


def _leave_out(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before each step of any optimiser. A gradient that is not zero is from elsewhere: a penalty on the weights."""
    if not _STANDING:
        return
    still = {id(p) for network in _STANDING for p in network.root[0].parameters()}
    _LEFT_OUT[optimizer] = []
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if id(p) in still and p.grad is not None and not bool(p.grad.any()):
            _LEFT_OUT[optimizer].append((p, p.grad))
            p.grad = None


def _put_back(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for p, gradient in _LEFT_OUT.pop(optimizer, ()):
        p.grad = gradient


register_optimizer_step_pre_hook(_leave_out)
register_optimizer_step_post_hook(_put_back)
