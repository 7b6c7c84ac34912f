"""The two places where autograd is told what to do: the output's error to every point, and a layer's error through B."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fbkernels.reference import Connection, layout


class Deliver(torch.autograd.Function):
    """Per-sample losses whose backward hands c e to the logits and c e B_l^T to each h_l, c the loss's own weight of a sample (SPEC 3).

    ``feedback`` holds a B_l [units, outputs] for each activity, or with ``given`` the gradients dL/dh_l themselves.
    """

    @staticmethod
    def forward(
        ctx: Any,
        losses: Tensor,
        e: Tensor,
        feedback: tuple[Tensor, ...],
        channels_first: tuple[bool | None, ...],
        given: bool,
        record: Callable[[Tensor], None] | None,
        anchor: Tensor | None,
        logits: Tensor,
        *activities: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(e, *feedback)
        ctx.given, ctx.record, ctx.channels_first = given, record, channels_first
        ctx.like = [(h.shape, h.dtype) for h in (logits, *activities)]
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # once_differentiable asks c alone, which is a constant here
            raise RuntimeError("learned feedback cannot be differentiated twice: leave out create_graph=True")
        e, *feedback = ctx.saved_tensors
        if ctx.record is not None:
            ctx.record(c)
        (shape, dtype), *like = ctx.like
        ce = c.to(e.dtype)[:, None] * e
        grads = [ce.view(shape).to(dtype)]
        for F, first, (shape, dtype) in zip(feedback, ctx.channels_first, like, strict=True):
            g = F * c.to(F.dtype).view(-1, *[1] * (F.ndim - 1)) if ctx.given else layout(ce.to(F.dtype) @ F.T, shape, first)
            grads.append(g.to(dtype))
        return None, None, None, None, None, None, None, *grads


class Transport(torch.autograd.Function):
    """A layer that reads a point: forward through its weight, error back through B (SPEC 3, ``layerwise``)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, B: Tensor, connection: Connection, name: str, errors: dict[str, Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x, weight, B)
        ctx.connection, ctx.name, ctx.errors = connection, name, errors
        return connection.forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> Any:
        x, weight, B = ctx.saved_tensors
        connection = ctx.connection
        ctx.errors[ctx.name] = delta
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        x_like = x.to(delta.dtype)  # autocast ran the forward in a lower precision than the weight's
        grad_x = connection.input_gradient(delta, B.to(delta.dtype), x_like).to(x.dtype) if need_x else None
        grad_weight = connection.weight_gradient(delta, x_like, weight.to(delta.dtype)).to(weight.dtype) if need_weight else None
        outputs = 1 if connection.convolution else delta.ndim - 1
        grad_bias = delta.sum([d for d in range(delta.ndim) if d != outputs]).to(weight.dtype) if need_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None, None
