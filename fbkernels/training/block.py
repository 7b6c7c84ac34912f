"""A chain in one launch: the layer, its norm, activation and pooling, the noise, and B's pending update (SPEC 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fbkernels import ops
from fbkernels.layout import Layout
from fbkernels.stream.chain import Waiting, connect, outside
from fbkernels.training.autograd import Behind, Block, Epilogue

if TYPE_CHECKING:
    from fbkernels.training.point import FeedbackPoint
    from fbkernels.training.step import Step


def run_block(step: Step, point: FeedbackPoint, waiting: Waiting, predicts: bool) -> tuple[Tensor, Tensor | None] | None:
    """The activity at a point and its difference; None where the launch does not cover what waits."""
    network, settings, x, dx = step.network, step.network.settings, waiting.source, waiting.d
    if (settings.share > 1 and x.ndim == 4) or x.shape[0] != step.samples:
        return None
    layer = weight = bias = gain = offset = norm = None
    constant = (lambda t: t.detach() if isinstance(t, Tensor) else t) if step.constant else (lambda t: t)
    if waiting.layer:
        func, args, kwargs = waiting.calls[0]
        weight, bias, layer, _ = connect(func, x, args, kwargs)
        weight, bias = constant(weight), constant(bias)
    named = {part[0]: part[1:] for part in waiting.parts}
    (norm,) = named.pop("norm", (None,))
    activation = named.get("activation", ("identity",))[0]
    epilogue = Epilogue(activation, next(iter(named), "") == "pool", *named.get("pool", Epilogue.no_pool))
    rows = step.perturbed_rows if step.perturbing and not step.again else 0
    dx = dx if rows else None
    if layer is not None and waiting.autocast is not None:
        low = lambda t: None if t is None else t.to(waiting.autocast)  # noqa: E731
        x, weight, bias, dx = x.to(waiting.autocast), low(weight), low(bias), low(dx)
    if norm is not None:
        gain, offset = (None if t is None else constant(t).float() for t in (norm.weight, norm.bias))
    key = (network.step, settings.seed, point.index, rows, settings.noise_std, settings.noise)
    chosen = ops.choose(settings.backend, network.step.device)
    size: Sequence[int] = x.shape[2:]
    if layer is not None and weight is not None and layer.convolution:
        if not weight.is_contiguous() or x.is_contiguous():  # else x is what a block before made of it
            step.rows_first = weight.is_contiguous()
        x, weight = x.contiguous(memory_format=torch.channels_last), weight.contiguous(memory_format=torch.channels_last)
        size = layer.size_behind(weight)
    behind = Behind(epilogue.derivative, chosen, size, epilogue.window)
    options: dict[str, Any] = {"antithetic": step.antithetic, "offset": step.offset, "backend": chosen}
    if not step.again:
        options |= point.riding(predicts)
    with outside(waiting.hooks):
        h, d, kept, winner, new, prediction = Block.apply(x, weight, bias, dx, gain, offset, norm, layer, epilogue, key, options, behind)
    if step.again:
        return h, None
    step.visit(point, h)
    point.lay(Layout.of(h, step.samples, h.ndim == 4, settings.share, step.rows_of(point.name)))
    if new.numel():
        point.pending, before = None, point.state["B"]
        point.store(new)
        point.check(before)
    if prediction.numel():
        step.predictions[point.name] = prediction
    # Dynamo traces no backward pass that leaves something behind
    unpools = epilogue.pool == "max" and chosen == "triton" and not torch.compiler.is_compiling()
    kept = kept if kept.numel() else h.detach()
    behind.version = 0 if torch.compiler.is_compiling() else kept._version
    step.blocks[point.name] = (behind, kept, winner if unpools else None)
    return h, d if rows else None
