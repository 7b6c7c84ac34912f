"""The places where autograd is told what to do: the output's error to every point, a block behind its point, a layer's error through B."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fbkernels import ops, reference
from fbkernels.reference import Connection, layout


class Deliver(torch.autograd.Function):
    """Per-sample losses whose backward hands c e to the logits and c e B_l^T to each h_l, c the loss's own weight of a sample (SPEC 3).

    ``feedback`` holds a B_l [units, outputs] for each activity, or with ``given`` the gradients dL/dh_l themselves. A fused block has an
    epilogue, its activation and what the derivative is read from, and gets ``(c e B_l^T) * phi'``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        losses: Tensor,
        e: Tensor,
        feedback: tuple[Tensor, ...],
        epilogues: tuple[tuple[str, Tensor] | None, ...],
        channels_first: tuple[bool | None, ...],
        given: bool,
        record: Callable[[Tensor], None] | None,
        anchor: Tensor | None,
        logits: Tensor,
        *activities: Tensor,
    ) -> Tensor:
        kept = [epilogue[1] for epilogue in epilogues if epilogue is not None]
        ctx.save_for_backward(e, *feedback, *kept)
        ctx.fused = [None if epilogue is None else epilogue[0] for epilogue in epilogues]
        ctx.given, ctx.record, ctx.channels_first = given, record, channels_first
        ctx.like = [(h.shape, h.dtype) for h in (logits, *activities)]
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # once_differentiable asks c alone, which is a constant here
            raise RuntimeError("learned feedback cannot be differentiated twice: leave out create_graph=True")
        e, *rest = ctx.saved_tensors
        feedback, kept = rest[: len(ctx.fused)], iter(rest[len(ctx.fused) :])
        if ctx.record is not None:
            ctx.record(c)
        (shape, dtype), *like = ctx.like
        ce = c.to(e.dtype)[:, None] * e
        grads = [ce.view(shape).to(dtype)]
        for F, fused, first, (shape, dtype) in zip(feedback, ctx.fused, ctx.channels_first, like, strict=True):
            if fused is not None:
                grads.append(ops.feedback(ce, F, next(kept), fused))
                continue
            g = F * c.to(F.dtype).view(-1, *[1] * (F.ndim - 1)) if ctx.given else layout(ce.to(F.dtype) @ F.T, shape, first)
            grads.append(g.to(dtype))
        return None, None, None, None, None, None, None, None, *grads


@dataclass(frozen=True)
class Epilogue:
    """What stands between a layer and its point: phi and a pooling, in either order."""

    activation: str
    pool_first: bool
    pool: str
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    no_pool: ClassVar[tuple[Any, ...]] = ("none", (1, 1), (1, 1), (0, 0))

    @property
    def window(self) -> tuple[tuple[int, int], ...]:
        return self.kernel_size, self.stride, self.padding

    @property
    def derivative(self) -> str:
        """The phi whose derivative the error at the point is multiplied with; average-pooling spreads the error before that."""
        return "identity" if self.pool == "avg" else self.activation

    def exact(self, z: Tensor) -> Tensor:
        return reference.pointwise(z, None, self.activation, self.pool, self.pool_first, *self.window)[0]


def sparse_gradient(layer: Connection, weight: Tensor) -> bool:
    """Whether the weight gradient is faster from the winners of a max-pooling than from the whole map (bench/bench_conv_gradient.py).

    1.6 to 4.7 times as fast as oneDNN where it is used; 0.7 to 0.8 times at 3x3 over 3 channels, at 1x1 no faster.
    """
    kernel = math.prod(layer.kernel)
    return layer.groups == 1 and kernel > 1 and kernel * weight.shape[1] >= 75


class Block(torch.autograd.Function):
    """A layer of ``direct`` feedback, or the tensor x where there is none, up to its point: activation, pooling, noise (SPEC 1).

    The edge behind h belongs to ``Deliver`` alone, and carries the error before the activation, at the winners of a max-pooling.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        perturbed: Tensor | None,
        layer: Connection | None,
        epilogue: Epilogue,
        key: tuple[Any, ...],
        antithetic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, q = x, perturbed
        if layer is not None and weight is not None:
            W = weight
            if layer.convolution:
                x, W = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
            if perturbed is not None and not layer.convolution and W.numel() >= 2**18:
                # a weight larger than the cache is read once for both streams: 8.5 against 10.1 ms at 4096 x 2048, 64 samples
                z, q = layer.forward(torch.cat((x, perturbed)), W, bias).split((len(x), len(perturbed)))
            else:
                z = layer.forward(x, W, bias)
                q = None if perturbed is None else layer.forward(perturbed, W, bias)
        e = epilogue
        h, p, kept, winner = ops.perturbed_pointwise(
            z, q, None, e.activation, e.pool, e.pool_first, *e.window, *key, antithetic=antithetic, backend="cpp"
        )
        # no gradient crosses a point: of W its layout alone counts
        ctx.layer, ctx.epilogue, ctx.size, ctx.like = (
            layer,
            epilogue,
            z.shape[2:],
            None if weight is None else torch.empty_like(weight, device="meta"),
        )
        ctx.save_for_backward(x if layer is not None else None, winner if e.pool == "max" else None, z if e.pool == "avg" else None)
        ctx.mark_non_differentiable(p, kept)
        ctx.set_materialize_grads(False)
        return h, p, kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor | None, *_: Any) -> Any:
        x, winner, z = ctx.saved_tensors
        layer, epilogue = ctx.layer, ctx.epilogue
        if delta is None:
            return (None,) * 8
        if epilogue.pool == "max":
            if layer is not None and layer.convolution and sparse_gradient(layer, ctx.like):
                like = torch.empty_strided(ctx.like.shape, ctx.like.stride(), dtype=x.dtype)
                grads = ops.pooled_weight_gradient(
                    delta, winner, x, like, layer.stride, layer.padding, layer.dilation, *epilogue.window, backend="cpp"
                )
                needed = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[1:3], strict=True)]
                return None, *needed, *(None,) * 5
            delta = ops.unpool(delta, winner, ctx.size, *epilogue.window, backend="cpp")
        elif epilogue.pool == "avg":
            with torch.enable_grad():
                z.requires_grad_()
                (delta,) = torch.autograd.grad(epilogue.exact(z), z, delta)
        if layer is None:
            return delta, *(None,) * 7
        like = torch.empty_strided(ctx.like.shape, ctx.like.stride(), dtype=delta.dtype)
        grad_weight = layer.weight_gradient(delta, x, like) if ctx.needs_input_grad[1] else None
        grad_bias = delta.sum([d for d in range(delta.ndim) if d != 1]) if ctx.needs_input_grad[2] else None
        return None, grad_weight, grad_bias, *(None,) * 5


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
