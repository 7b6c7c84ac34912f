"""Batch norm with the statistics of several processes, as a function that both streams know."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


class Sum(torch.autograd.Function):
    """Over the processes of a group, forward and back."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        t = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(t, group=group)
        return t

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return Sum.apply(g, ctx.group), None


def synchronised(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: Any,
) -> Tensor:
    """Batch norm with the mean and variance of the batch of all processes; the running ones are updated."""
    args = (x, running_mean, running_var, weight, bias, momentum, eps, group)
    if has_torch_function_unary(x):
        result: Tensor = handle_torch_function(synchronised, (x,), *args)
        return result
    return normalised(*args)[0]


def normalised(
    z: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: Any,
) -> tuple[Tensor, Tensor]:
    """The result, and gain / std of each channel."""
    x = z.to(torch.promote_types(z.dtype, torch.float32))
    others, column = [d for d in range(x.ndim) if d != 1], (-1, *[1] * (x.ndim - 2))
    mean, n = Sum.apply(torch.cat((x.sum(others), x.new_tensor([x.numel() / x.shape[1]]))), group).tensor_split([-1])
    mean = mean / n
    centred = x - mean.view(column)
    var = Sum.apply(centred.square().sum(others), group) / n
    with torch.no_grad():
        for t, new in zip((running_mean, running_var), (mean, var * (n / (n - 1))), strict=True):
            if t is not None:
                t.copy_(t.to(new.dtype).lerp(new, momentum))
    gain = (var + eps).rsqrt()
    gain = gain if weight is None else weight * gain
    y = centred * gain.view(column)
    return (y if bias is None else y + bias.view(column)).to(z.dtype), gain
