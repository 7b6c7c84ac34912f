"""The output's error at a layer's units, through B (SPEC 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fbkernels import reference as definition
from fbkernels._check import one_of
from fbkernels.ops import _op
from fbkernels.ops._op import Op, dense, expect, kernels, maps
from fbkernels.ops.perturbed_pointwise import Window, check_pair
from fbkernels.ops.unpool import op as unpool
from fbkernels.ops.unpool import unpooled


def feedback(
    e: Tensor,
    B: Tensor,
    kept: Tensor,
    activation: str = "identity",
    *,
    winner: Tensor | None = None,
    size: tuple[int, int] | None = None,
    kernel_size: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    backend: str = "auto",
) -> Tensor:
    """``delta = (e B^T) * phi'``: the error of a layer's units before their activation (SPEC 3, ``direct``), and before a max-pooling.

    Args:
        e: the output's error, [N, outputs].
        B: [units, outputs]; a convolution's units are numbered channels-last.
        kept: what phi' is read from, h = phi(z), or z for gelu: [N, units] or [N, C, H, W] with C H W units.
        activation: as in :func:`perturbed_pointwise`.
        winner, size, kernel_size, stride, padding: of a max-pooling, its winners and the map's size before it: the error goes to the
            winners, a winner of two windows gets their sum. Without ``winner`` there is none.

    Returns:
        delta in the shape, ``[N, C, *size]`` before a pooling, and dtype of ``kept``; sums in float32 (float32 products in tf32 where
        ``torch.backends.cuda.matmul.allow_tf32``, and where delta has fewer digits anyway).

    Raises:
        ValueError: shapes, devices or an activation that do not fit. RuntimeError: the backend cannot be had.
    """
    window = (size or (), kernel_size, stride, padding)
    named = dict(zip(("size", "kernel_size", "stride", "padding"), window, strict=True))
    delta: Tensor = op(e, B, kept, activation, winner=winner, **named, backend=backend)
    return delta


SCHEMA = (
    "feedback(Tensor e, Tensor B, Tensor kept, str activation, *, Tensor? winner=None, SymInt[] size=[], int[] kernel_size=[1, 1], "
    'int[] stride=[1, 1], int[] padding=[0, 0], str backend="auto") -> Tensor'
)


def outputs(a: Any) -> Tensor:
    if a.winner is not None:
        return unpooled(a.kept, a.size)
    return torch.empty_like(a.kept, memory_format=torch.channels_last if a.kept.ndim == 4 else torch.contiguous_format)


def check_kept(a: Any) -> None:
    if a.kept.ndim not in (2, 4):
        shape = tuple(a.kept.shape)
        raise ValueError(f"kept must be an activity [samples, units] or [samples, channels, height, width], got shape {shape}")


def check(a: Any) -> None:
    check_kept(a)
    one_of("activation", a.activation, definition.ACTIVATIONS)
    kept, winner = a.kept, a.winner
    units, m = kept[0].numel() if len(kept) else len(a.B), a.e.shape[-1] if a.e.ndim else 0
    expect("e", a.e, kept, len(kept), m)
    expect("B", a.B, kept, units, m)
    expect("winner", winner, kept, *kept.shape, dtype=torch.uint8)
    if winner is None:
        return
    if kept.ndim != 4:
        raise ValueError(f"kept must be [samples, channels, height, width] where there is a winner, got shape {tuple(kept.shape)}")
    check_pair("size", a.size, 1)
    window = Window("max", False, a.kernel_size, a.stride, a.padding)
    window.check(a.size)
    if tuple(winner.shape[2:]) != tuple(window.size(a.size)):
        raise ValueError(f"size {tuple(a.size)} pooled does not have the shape of winner, {tuple(winner.shape)}")


def reference(a: Any) -> Tensor:
    delta = definition.layout(a.e.to(a.B.dtype) @ a.B.T, a.kept.shape)
    delta = (delta * definition.derivative(a.kept, a.activation)).to(a.kept.dtype)
    return dense(delta if a.winner is None else definition.unpool(delta, a.winner, a.size, a.kernel_size, a.stride, a.padding))


def compiled(a: Any) -> Tensor:
    if a.B.dtype != torch.float32:
        return op.on("reference", a)  # type: ignore[no-any-return]
    check_kept(a)
    kept = dense(a.kept)
    delta = torch.empty_like(kept)
    read, out = None if a.activation == "identity" else maps(kept).flatten(1), maps(delta).flatten(1)
    _op.C.feedback(a.e.float().contiguous(), a.B.contiguous(), read, out, a.activation, torch.get_num_threads())
    if a.winner is None:
        return delta
    return unpool.compute(unpool.arguments(delta, a.winner, *a[5:]))  # type: ignore[no-any-return]


def triton(a: Any) -> Tensor:
    if a.B.dtype != torch.float32:
        return reference(a)
    delta = outputs(a)
    kept, winner = None if a.activation == "identity" else dense(a.kept), None if a.winner is None else dense(a.winner)
    window = (a.kernel_size, a.stride, a.padding)
    kernels().feedback(a.e.float().contiguous(), a.B.contiguous(), kept, winner, a.activation, delta, *window)
    return delta


op = Op(SCHEMA, outputs, {"reference": reference, "cpp": compiled, "triton": triton, "cuda": compiled}, check, by=2)
