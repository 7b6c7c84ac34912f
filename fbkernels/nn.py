"""Drop-in layers with a fused activation and a feedback point at the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fbkernels._check import one_of
from fbkernels.reference import ACTIVATIONS
from fbkernels.stream.synchronised import synchronised
from fbkernels.training.point import FeedbackPoint
from fbkernels.training.processes import several


class SyncBatchNorm(_BatchNorm):
    """``nn.SyncBatchNorm`` in a converted network: torch's own is a custom autograd.Function, which sees one stream, and on a GPU alone."""

    process_group: Any

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"SyncBatchNorm needs at least 2 dimensions, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not several(self.process_group):
            return super().forward(input)
        self._check_input_dim(input)
        momentum = self.momentum
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if momentum is None else momentum
        group = self.process_group or torch.distributed.group.WORLD
        return synchronised(input, self.running_mean, self.running_var, self.weight, self.bias, momentum or 0.0, self.eps, group)


class _Layer(nn.Module):
    activation: str
    feedback: FeedbackPoint

    def _finish(self, z: Tensor) -> Tensor:
        h: Tensor = self.feedback(ACTIVATIONS[self.activation](z))
        return h

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class Linear(_Layer, nn.Linear):
    """``point(phi(x W^T + b))``: ``nn.Linear``, its activation, and a feedback point; any leading dimensions.

    Args:
        activation: "identity", "relu", "tanh", "sigmoid" or "gelu"; the others are those of ``nn.Linear``.

    Raises:
        ValueError: unknown activation.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, activation: str = "identity", **kwargs: Any) -> None:
        one_of("activation", activation, ACTIVATIONS)
        super().__init__(in_features, out_features, bias, **kwargs)
        self.activation, self.feedback = activation, FeedbackPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self._finish(nn.Linear.forward(self, x))


class Conv2d(_Layer, nn.Conv2d):
    """``point(phi(conv(x)))``: ``nn.Conv2d`` with its stride, dilation, groups and padding modes, its activation, and a feedback point.

    Args:
        activation: "identity", "relu", "tanh", "sigmoid" or "gelu"; the others are those of ``nn.Conv2d``.

    Raises:
        ValueError: unknown activation.
    """

    def __init__(self, *args: Any, activation: str = "identity", **kwargs: Any) -> None:
        one_of("activation", activation, ACTIVATIONS)
        super().__init__(*args, **kwargs)
        self.activation, self.feedback = activation, FeedbackPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self._finish(nn.Conv2d.forward(self, x))
