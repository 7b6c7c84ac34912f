"""The kinds of layers: how one reads an activity, forward and back, and as a regression (SPEC 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def several(v: Any, n: int) -> tuple[int, ...]:
    """A size of n dimensions, given as torch takes it: one number or one for each."""
    return (v,) * n if isinstance(v, int) else tuple(v) * (n if len(v) == 1 else 1)


@dataclass(frozen=True)
class Connection:
    """How a layer reads a point: a linear map or a convolution.

    As a regression its B is a matrix: channels x outputs for a linear map, [groups, channels, outputs * kernel positions] for a
    convolution, where the regressors are the patches of delta and every position is a sample.
    """

    convolution: bool
    channels: int
    kernel: tuple[int, ...] = (1, 1)
    size: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = (0, 0)

    @staticmethod
    def of(name: str, weight: Tensor, x: Tensor, *given: Any, **named: Any) -> tuple[Connection, tuple[int, ...]]:
        """The connection that ``F.<name>`` makes, and what to pad by hand: an even kernel with padding='same'."""
        if name == "linear":
            return Connection(False, weight.shape[1]), ()
        transposed, n = name.startswith("conv_transpose"), weight.ndim - 2
        order = ("stride", "padding", "output_padding", "groups", "dilation") if transposed else ("stride", "padding", "dilation", "groups")
        args = dict(zip(order, given, strict=False)) | named
        kernel, size, by_hand = tuple(weight.shape[2:]), tuple(x.shape[-n:]), (0,) * (2 * n)
        dilation, padding = several(args.get("dilation", 1), n), args.get("padding", 0)
        if padding == "valid":
            padding = 0
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            padding = tuple(t // 2 for t in total)
            by_hand = tuple(v for t in reversed(total) for v in (0, t % 2))
            size = tuple(s + t % 2 for s, t in zip(size, total, strict=True))
        channels = weight.shape[0] if transposed else x.shape[-n - 1]
        shape = (several(args.get("stride", 1), n), several(padding, n), dilation, args.get("groups", 1))
        return Connection(True, channels, kernel, size, *shape, transposed, several(args.get("output_padding", 0), n)), by_hand

    def size_behind(self, weight: Tensor) -> list[int]:
        """The size of the map that a convolution computes, none of a linear map."""
        if not self.convolution:
            return []
        spatial = zip(self.size, weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return [(n + 2 * p - t * (k - 1) - 1) // s + 1 for n, k, s, p, t in spatial]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.convolution:
            return F.linear(x, weight, bias)
        n = len(self.kernel)
        if self.transposed:
            return _TRANSPOSED[n](x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return _CONVOLUTIONS[n](x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, delta: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """The error below, through ``weight``: here B, in the layout of the layer's weight."""
        if self.convolution:
            return self._backward(delta, x, weight, 0)
        gradient: Tensor = delta @ weight
        return gradient

    def weight_gradient(self, delta: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if self.convolution:
            return self._backward(delta, x, weight, 1)
        gradient: Tensor = delta.flatten(0, -2).T @ x.flatten(0, -2)
        return gradient

    def _backward(self, delta: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
        mask = [which == 0, which == 1, False]
        stride = self.stride
        if which == 1 and math.prod(self.kernel) == 1 and max(stride) > 1 and not self.transposed and not any(self.padding):
            # torch 2.11 to 2.13 on a CPU writes outside a strided 1x1 gradient of 2 to 7 channels, channels-last
            every: Any = (..., *(slice(None, None, s) for s in stride))
            x, stride = x[every], (1,) * len(stride)
        shape = (stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)
        gradient: Tensor = torch.ops.aten.convolution_backward(delta, x, weight, None, *shape, mask)[which]
        return gradient

    def patches(self, delta: Tensor) -> Tensor:
        """The patch of delta around each input position of a convolution, [n, outputs * kernel positions, ...]."""
        n, outputs = delta.shape[:2]
        k = math.prod(self.kernel)
        one_hot = (
            torch.eye(k, dtype=delta.dtype, device=delta.device).view(1, k, *self.kernel).repeat(outputs, *[1] * (len(self.kernel) + 1))
        )
        x = delta.new_empty(n, outputs * k, *self.size)
        shape = (self.kernel, self.size, self.stride, self.padding, self.dilation, outputs, False, self.output_padding)
        return Connection(True, outputs * k, *shape)._backward(delta, x, one_hot, 0)

    def samples(self, x: Tensor) -> Tensor:
        """What the layer reads, or its regressors, as rows: [samples, channels], of a convolution [groups, samples, channels / groups]."""
        if not self.convolution:
            return x.flatten(0, -2)
        return x.reshape(len(x), self.groups, x.shape[1] // self.groups, -1).permute(1, 0, 3, 2).flatten(1, 2)

    def matrix(self, B: Tensor) -> Tensor:
        if not self.convolution:
            return B
        return B.reshape(self.groups, -1, B.shape[1], math.prod(self.kernel)).transpose(1, 2).flatten(2)

    def unmatrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        if not self.convolution:
            return matrix
        return matrix.view(self.groups, shape[1], -1, *self.kernel).transpose(1, 2).reshape(shape)

    def answers(self, weight: Tensor) -> Tensor:
        """A weight as [outputs, fan-in ...]: what each output answers to noise in its fan-in. Of all but transposed layers it is that."""
        if not self.transposed:
            return weight
        rows: Tensor = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return rows

    def unanswers(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of ``answers``."""
        if not self.transposed:
            return rows
        weight: Tensor = rows.unflatten(0, (self.groups, -1)).transpose(1, 2).reshape(shape)
        return weight
