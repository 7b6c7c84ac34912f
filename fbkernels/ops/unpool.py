"""The error of max-pooled maps at the winners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fbkernels import reference as definition
from fbkernels.ops import _op
from fbkernels.ops._op import Op, dense, maps

SCHEMA = (
    'unpool(Tensor delta, Tensor winner, SymInt[] size, int[] kernel_size, int[] stride, int[] padding, *, str backend="auto") -> Tensor'
)


def outputs(a: Any) -> Tensor:
    return unpooled(a.delta, a.size)


def unpooled(delta: Tensor, size: Sequence[int]) -> Tensor:
    """An empty tensor for the maps of this size before the pooling."""
    return torch.empty(*delta.shape[:2], *size, dtype=delta.dtype, device=delta.device, memory_format=torch.channels_last)


def reference(a: Any) -> Tensor:
    return dense(definition.unpool(*a[:6]))


def compiled(a: Any) -> Tensor:
    out = outputs(a)
    sizes = (*a.kernel_size, *a.stride, *a.padding)
    _op.C.unpool(maps(dense(a.delta)), maps(dense(a.winner)), maps(out), sizes, torch.get_num_threads())
    return out


op = Op(SCHEMA, outputs, {"reference": reference, "cpp": compiled, "cuda": compiled})  # Triton's feedback does it in its launch
