"""The gradients of a convolution's weight and bias from the error behind its max-pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fbkernels import reference as definition
from fbkernels.ops import _op
from fbkernels.ops._op import Op, dense, maps

SCHEMA = (
    "pooled_weight_gradient(Tensor delta, Tensor winner, Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, "
    'int[] kernel_size, int[] pool_stride, int[] pool_padding, *, str backend="auto") -> (Tensor, Tensor)'
)


def outputs(a: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    weight = torch.empty_like(a.weight, dtype=dtype)
    return weight, weight.new_empty(weight.shape[0])


def reference(a: Any) -> tuple[Tensor, Tensor]:
    weight, bias = definition.pooled_weight_gradient(*a[:10])
    return outputs(a)[0].copy_(weight), bias.to(a.weight.dtype)


def cpp(a: Any) -> tuple[Tensor, Tensor]:
    weight, bias = outputs(a, torch.float32)
    delta, winner, x = (maps(dense(t)) for t in (a.delta.float(), a.winner, a.x))
    geometry, sizes = (*a.stride, *a.padding, *a.dilation), (*a.kernel_size, *a.pool_stride, *a.pool_padding)
    _op.C.pooled_weight_gradient(delta, winner, x, weight, bias, geometry, sizes, torch.get_num_threads())
    return weight.to(a.weight.dtype), bias.to(a.weight.dtype)


op = Op(SCHEMA, outputs, {"reference": reference, "cpp": cpp})
