"""The places where autograd is told what to do: the output's error to every point, a block behind its point, a layer's error through B."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fbkernels import ops, reference
from fbkernels.layers import Connection
from fbkernels.layout import Layout
from fbkernels.stream.chain import Norm


class Sent:
    """What PerturbedLoss sends to the outputs; their hooks hold it, where the step would never die."""

    def __init__(self) -> None:
        self.taken = False  # the outputs, by a PerturbedLoss
        self.gradients: list[Tensor] = []  # direct: the last that a backward pass gave them


def once() -> None:
    """Refuse a second derivative: once_differentiable asks c alone, which is a constant here."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "learned feedback cannot be differentiated twice: leave out create_graph=True, and with it the penalty or the residual of a "
            "gradient"
        )


class Deliver(torch.autograd.Function):
    """Losses whose backward hands c e to the outputs and c r B_l^T to each h_l, c the weight of a loss in what is differentiated (SPEC 3).

    losses [N], or one for each row of the first output; e: dL/doutput in the shape of each output; r [N, m] is e of all outputs side by
    side, or with ``basis`` C [outputs, m] e C. ``feedback`` holds a B_l [units, m] for each activity; or with ``given`` the gradients
    dL/dh_l themselves. ``weighted``: given c the gradients of all that the losses depend on, where
    c e is not all. A fused block gets ``(c r B_l^T) * phi'``. ``layouts``: of the outputs and the activities.
    """

    @staticmethod
    def forward(
        ctx: Any,
        losses: Tensor,
        e: tuple[Tensor, ...],
        basis: Tensor | None,
        feedback: tuple[Tensor, ...],
        blocks: tuple[tuple[Behind, Tensor, Tensor | None] | None, ...],
        layouts: tuple[Layout, ...],
        given: bool,
        record: Callable[[Tensor], None] | None,
        sent: Sent | None,
        anchor: Tensor | None,
        weighted: Any,
        *ends: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(basis, *e, *feedback, *(t for block in blocks if block is not None for t in block[1:]))
        ctx.behind = [None if block is None else block[0] for block in blocks]
        ctx.outputs, ctx.given, ctx.record, ctx.sent, ctx.layouts = len(e), given, record, sent, layouts
        ctx.like = [(h.shape, h.dtype) for h in ends]
        ctx.weighted = weighted
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Any:
        once()
        basis, *rest = ctx.saved_tensors
        e, rest = rest[: ctx.outputs], rest[ctx.outputs :]
        feedback, kept = rest[: len(ctx.behind)], iter(rest[len(ctx.behind) :])
        grads, sides = [], []
        exact = None if ctx.weighted is None else ctx.weighted(c)
        if exact is not None and ctx.weighted.coupled and ctx.record is not None and bool((c != c[:1]).any()):
            raise RuntimeError(
                "losses that depend on the outputs of other samples need equal weights where B learns from errors of layers: average "
                "them, or use feedback='direct'"
            )
        for i, (t, layout, (shape, dtype)) in enumerate(zip(e, ctx.layouts, ctx.like, strict=False)):
            if exact is not None:
                n = c.shape[0] if layout.plain or c.shape[0] != t.shape[0] else c.shape[0] // layout.copies
                side = layout.units_of(exact[i], n)
                grads.append(exact[i].view(shape).to(dtype))
            elif layout.plain or c.shape[0] != t.shape[0]:
                n = c.shape[0]
                side = c.to(t.dtype)[:, None] * layout.units_of(t, n)
                grads.append(layout.activity(side).view(shape).to(dtype))
            else:
                ce = c.to(t.dtype).view(-1, *[1] * (t.ndim - 1)) * t
                side = layout.units_of(ce, len(ce) // layout.copies)
                grads.append(ce.view(shape).to(dtype))
            sides.append(side)
        ce = sides[0] if len(sides) == 1 else torch.cat(sides, 1)
        if ctx.record is not None:
            ctx.record(c)
        if ctx.sent is not None:
            ctx.sent.gradients = [*grads]
        cr = ce if basis is None else ce @ basis.to(ce.dtype)
        layouts = ctx.layouts[ctx.outputs :]
        like = ctx.like[ctx.outputs : len(ctx.layouts)]
        for F, behind, layout, (shape, dtype) in zip(feedback, ctx.behind, layouts, like, strict=True):
            if behind is not None:
                grads.append(behind.deliver(cr, F, next(kept), next(kept)))
            elif ctx.given:
                n = F.shape[layout.rows.dim] // layout.copies
                own = c if len(c) == n else ctx.layouts[0].rows.first(c, n).reshape(n, -1).mean(1)
                grads.append(layout.scaled(F, own.to(F.dtype)).view(shape).to(dtype))
            else:
                grads.append(layout.activity(layout.mean(cr.to(F.dtype) @ F.T)).view(shape).to(dtype))
        beside = [] if exact is None else exact[ctx.outputs :]
        return *(None,) * 11, *grads, *(g.to(dtype) for g, (_, dtype) in zip(beside, ctx.like[len(ctx.layouts) :], strict=True))


class Reach(torch.autograd.Function):
    """The output, with the activities behind it in the graph: DistributedDataParallel looks there for parameters without a use, and
    no path leads across a point."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *activities: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.none = (None,) * len(activities)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        return g, *ctx.none


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
    def window(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return self.kernel_size, self.stride, self.padding

    @property
    def derivative(self) -> str:
        """The phi whose derivative the error at the point is multiplied with; average-pooling spreads the error before that."""
        return "identity" if self.pool == "avg" else self.activation

    def exact(self, z: Tensor) -> Tensor:
        return reference.pointwise(z, None, self.activation, self.pool, self.pool_first, *self.window)[0]


@dataclass
class Behind:
    """A fused block, as ``Deliver`` sees it."""

    activation: str
    backend: str
    size: Sequence[int] = ()  # of the map before a max-pooling
    window: tuple[tuple[int, int], ...] = ()
    version: int = 0  # of what phi' is read from
    delta: Tensor | None = None  # the error there; autograd wants a gradient of the activity to have its shape

    def deliver(self, cr: Tensor, B: Tensor, kept: Tensor, winner: Tensor | None) -> Tensor:
        """``(c r B^T) * phi'``, with ``winner`` before the max-pooling."""
        delta: Tensor
        if winner is None:
            delta = ops.feedback(cr, B, kept, self.activation, backend=self.backend)
            return delta
        window = dict(zip(("kernel_size", "stride", "padding"), self.window, strict=True))
        self.delta = ops.feedback(cr, B, kept, self.activation, winner=winner, size=self.size, **window, backend=self.backend)
        return kept.new_zeros(()).expand(kept.shape)


def sparse_gradient(layer: Connection, weight: Tensor) -> bool:
    """Whether the weight gradient is faster from the winners of a max-pooling than from the whole map (bench/bench_conv_gradient.py).

    1.6 to 4.7 times as fast as oneDNN where it is used; 0.7 to 0.8 times at 3x3 over 3 channels, at 1x1 no faster.
    """
    kernel = math.prod(layer.kernel)
    return layer.groups == 1 and kernel > 1 and kernel * weight.shape[1] >= 75


class Block(torch.autograd.Function):
    """A layer of ``direct`` feedback, or the tensor x where there is none, up to its point: norm, activation, pooling, noise (SPEC 1).

    ``dx``, and d of what it returns, is the difference to the perturbed activity. A batch norm with weight ``gain`` and bias ``offset`` is
    ``scale z + shift``, and ``scale dz`` of the difference, with ``scale = gain / std`` and
    ``shift = offset - mean scale`` of the clean one, in float32: torch's form on the CPU. Where ``|mean| >> std`` the shift's rounding is
    that of z: the error is at most twice that of ``(z - mean) scale``, torch's form on a GPU.

    The edge behind h belongs to ``Deliver`` alone, and carries the error before the activation, at the winners of a max-pooling.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        dx: Tensor | None,
        gain: Tensor | None,
        offset: Tensor | None,
        norm: Norm | None,
        layer: Connection | None,
        epilogue: Epilogue,
        key: tuple[Any, ...],
        options: dict[str, Any],
        behind: Behind,
    ) -> tuple[Tensor, ...]:
        e, z, dz = epilogue, x, dx
        how = (e.activation, e.pool, e.pool_first, *e.window)
        affine: tuple[Tensor | None, ...] = ()
        if layer is None or weight is None or e.pool == "avg" or norm is not None:  # the gradients of average-pooling and norm need z
            if layer is not None and weight is not None:
                z, dz = layer.forward(x, weight, bias), None if dx is None else layer.forward(dx, weight, None)
            scale = shift = None
            if norm is not None:
                mean, var = norm.statistics(z)
                rstd = (var + norm.eps).rsqrt()
                scale = rstd if gain is None else gain * rstd
                shift = -mean * scale if offset is None else offset - mean * scale
                affine = (gain, mean, var, rstd, scale, shift)
            h, d, kept, winner, new, parts = ops.perturbed_pointwise(z, dz, shift, *how, *key, scale=scale, **options)
        elif layer.convolution:
            shape = (layer.stride, layer.padding, layer.dilation, layer.groups)
            h, d, kept, winner, new, parts = ops.perturbed_conv2d(x, dx, weight, bias, *shape, *how, *key, **options)
        else:
            h, d, kept, new, parts = ops.perturbed_linear(x, dx, weight, bias, e.activation, *key, **options)
            winner = h.new_empty(0)
        # no gradient crosses a point: of W its layout alone counts
        ctx.layer, ctx.epilogue, ctx.behind = layer, epilogue, behind
        ctx.norm = None if norm is None else (norm.training, norm.eps)
        ctx.like = None if weight is None else torch.empty_like(weight, device="meta")
        kept_z = z if e.pool == "avg" or norm is not None else None
        ctx.save_for_backward(x if layer is not None else None, winner if e.pool == "max" else None, kept_z, *affine)
        ctx.mark_non_differentiable(d, kept, winner, new, parts)
        ctx.set_materialize_grads(False)
        return h, d, kept, winner, new, parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor | None, *_: Any) -> Any:
        x, winner, z, *affine = ctx.saved_tensors
        layer, epilogue, norm = ctx.layer, ctx.epilogue, ctx.norm
        if delta is None:
            return (None,) * 12
        if ctx.behind.delta is not None:
            delta, ctx.behind.delta = ctx.behind.delta, None
        elif epilogue.pool == "max":
            backend = ctx.behind.backend
            if backend == "cpp" and norm is None and layer is not None and layer.convolution and sparse_gradient(layer, ctx.like):
                like = torch.empty_strided(ctx.like.shape, ctx.like.stride(), dtype=x.dtype)
                grads = ops.pooled_weight_gradient(
                    delta, winner, x, like, layer.stride, layer.padding, layer.dilation, *epilogue.window, backend="cpp"
                )
                needed = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[1:3], strict=True)]
                return None, *needed, *(None,) * 9
            delta = ops.unpool(delta, winner, ctx.behind.size, *epilogue.window, backend="auto" if backend == "triton" else backend)
        elif epilogue.pool == "avg":
            with torch.enable_grad():
                y = z
                if norm is not None:
                    scale, shift = (t.view(-1, 1, 1) for t in affine[4:])
                    y = torch.addcmul(shift, z, scale).to(z.dtype)
                y.requires_grad_()
                (delta,) = torch.autograd.grad(epilogue.exact(y), y, delta)
        if layer is None:
            return delta, *(None,) * 11
        grad_gain = grad_offset = grad_weight = grad_bias = None
        _, need_weight, need_bias, _, need_gain, need_offset = ctx.needs_input_grad[:6]
        if norm is not None:
            gain, mean, var, rstd = affine[:4]
            mask = [need_weight or need_bias, need_gain, need_offset]
            delta, grad_gain, grad_offset = torch.ops.aten.native_batch_norm_backward(delta, z, gain, mean, var, mean, rstd, *norm, mask)
        if need_weight:
            like = torch.empty_strided(ctx.like.shape, ctx.like.stride(), dtype=delta.dtype, device=delta.device)
            grad_weight = layer.weight_gradient(delta, x, like)
        if need_bias:
            grad_bias = delta.sum([d for d in range(delta.ndim) if d != 1])
        return None, grad_weight, grad_bias, None, grad_gain, grad_offset, *(None,) * 6


class Transport(torch.autograd.Function):
    """A layer that reads a point: forward through its weight, error back through B (SPEC 3, ``layerwise``)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        B: Tensor,
        connection: Connection,
        point: str,
        errors: dict[str, Tensor] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, B)
        ctx.connection, ctx.point, ctx.errors = connection, point, errors
        return connection.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:
        once()
        x, weight, B = ctx.saved_tensors
        connection = ctx.connection
        if ctx.errors is not None:
            ctx.errors[ctx.point] = delta
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        x_like = x.to(delta.dtype)  # autocast ran the forward in a lower precision than the weight's
        grad_x = connection.input_gradient(delta, B.to(delta.dtype), x_like).to(x.dtype) if need_x else None
        grad_weight = connection.weight_gradient(delta, x_like, weight.to(delta.dtype)).to(weight.dtype) if need_weight else None
        outputs = delta.ndim - 1 - len(connection.kernel) if connection.convolution else delta.ndim - 1
        grad_bias = delta.sum([d for d in range(delta.ndim) if d != outputs]).to(weight.dtype) if need_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None, None
