"""A chain: a layer and the calls up to its point. Where nobody else reads between them, they run in one launch at the last call."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fbkernels.layers import Connection
from fbkernels.reference import pair
from fbkernels.stream.kinds import in_place, name_of

if TYPE_CHECKING:
    from fbkernels.stream.mode import Streams


@dataclass(frozen=True, eq=False)
class Chain:
    """``calls``: the functions behind the layer, the last of them right before the point. ``fuses[i]``: whether call i, 0 being the layer,
    and all behind it may run as one."""

    layer: str
    point: str
    calls: tuple[Any, ...]
    fuses: tuple[bool, ...]
    maps: bool | None  # whether the layer is a convolution, whose units are numbered channels-last; None: not known
    explicit: bool = False  # the model has the point itself, which runs as a call of its own


@dataclass(eq=False)
class Norm:
    """The arguments of ``F.batch_norm``."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    def fits(self, dtype: torch.dtype, channels: int, values: int) -> bool:
        """Whether a block runs it behind a layer with so many values a channel; the rest is torch's to run or to refuse."""
        given = [t for t in (self.running_mean, self.running_var, self.weight, self.bias) if t is not None]
        known = values > 1 if self.training else self.running_mean is not None and self.running_var is not None
        dtypes = {t.dtype for t in given}
        return known and all(t.shape == (channels,) for t in given) and (dtypes <= {torch.float32} or dtypes == {dtype})

    def statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the variance that z is normalised with, float32 [channels]; the running ones are updated."""
        mean, var = running = self.running_mean, self.running_var
        if not self.training:
            assert mean is not None and var is not None
            return mean.float(), var.float()
        if z.is_cuda:
            return torch.batch_norm_update_stats(z, mean, var, self.momentum)
        mean, var = _moments(z)
        n = z.numel() // z.shape[1]
        for t, new in zip(running, (mean, var * (n / (n - 1))), strict=True):
            if t is not None:
                t.copy_(t.float().lerp(new, self.momentum))
        return mean, var


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel in one pass, float32.

    torch adds up channels-last maps in float32. With the places of a row as channels of their own the sums are short and keep their digits:
    64 maps of 32x32 have 34 times smaller an error of the variance, in the same time.
    """
    rows = z.movedim(1, -1).flatten(2).flatten(0, -2) if z.ndim == 4 else z
    none = z.new_zeros(rows.shape[1], dtype=torch.float32)  # in whose dtype the result is
    means, variances = (t.view(-1, z.shape[1]) for t in torch.batch_norm_update_stats(rows[:, :, None, None], none, none, 0.0))
    between, mean = torch.var_mean(means, 0, correction=0)
    return mean, variances.mean(0) + between


def part_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """("norm", Norm), ("activation", kind) or ("pool", kind, kernel_size, stride, padding) of a call that a block covers; None: no such."""
    if func is F.batch_norm:
        return "norm", Norm(*args, **kwargs)
    name = name_of(func).removesuffix("_")
    if name in ("relu", "tanh", "sigmoid") or (name == "gelu" and not args and kwargs.get("approximate", "none") == "none"):
        return "activation", name
    if name not in ("max_pool2d", "avg_pool2d"):
        return None
    own = ("dilation", "ceil_mode", "return_indices") if name == "max_pool2d" else ("ceil_mode", "count_include_pad", "divisor_override")
    given = dict(zip(("kernel_size", "stride", "padding", *own), args, strict=False)) | kwargs
    plain = {"dilation": (1, 1), "ceil_mode": False, "return_indices": False, "count_include_pad": True, "divisor_override": None}
    if any((pair(given[k]) if k == "dilation" else given[k]) != plain[k] for k in own if k in given):
        return None
    kernel = pair(given["kernel_size"])
    if name == "max_pool2d" and kernel[0] * kernel[1] > 256:  # a winner's place is a byte
        return None
    return "pool", name[:3], kernel, pair(given.get("stride") or kernel), pair(given.get("padding", 0))


def connect(func: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None, Connection, Any]:
    """Weight, bias and connection of ``F.linear`` or ``F.conv2d``, and what to pad by hand."""
    given = dict(zip(("weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False)) | kwargs
    weight, bias = given.pop("weight"), given.pop("bias", None)
    return weight, bias, *Connection.of(name_of(func), weight, x, **given)


def untraced(part: tuple[Any, ...]) -> bool:
    """Whether Dynamo cannot trace a block with this part: the backward of average-pooling differentiates it."""
    return part[:2] == ("pool", "avg") and torch.compiler.is_compiling()


Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # function, arguments but the first, keywords


@dataclass(frozen=True, eq=False)
class Waiting:
    """Calls of a chain that are put off: number ``first`` to ``ran``, on ``source``, whose difference is d."""

    chain: Chain
    first: int
    ran: int
    source: Tensor
    d: Tensor | None
    calls: tuple[Call, ...]
    parts: tuple[tuple[Any, ...], ...]  # of the calls but the layer
    grad: bool  # whether autograd was on
    hooks: Any  # those on saved tensors: of torch.utils.checkpoint
    autocast: torch.dtype | None  # what autocast runs the layer in
    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def begin(mode: Streams, chain: Chain, ran: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Waiting | None:
        x, rest, fuses = args[0], args[1:], mode.site.fuses
        if x.dtype not in fuses:
            return None
        made = (torch.is_grad_enabled(), saved_hooks())
        if ran == 0:
            name, device = name_of(func), x.device.type
            if x.requires_grad or x.ndim != (2 if name == "linear" else 4):
                return None
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            weight, _, layer, by_hand = connect(func, x, rest, kwargs)
            size = layer.size_behind(weight)
            # what torch refuses it refuses at once, before a norm counts the batch
            refused = weight.shape[1] * layer.groups != x.shape[1] or any(n < 1 for n in size)
            if refused or any(by_hand) or (weight.dtype != x.dtype and autocast is None):
                return None
            shape = (x.shape[0], weight.shape[0], *size)
            return Waiting(chain, 0, 0, mode.bare(x), mode.d(x), ((func, rest, kwargs),), (), *made, autocast, shape, autocast or x.dtype)
        part = part_of(func, rest, kwargs)
        if part is None or part[0] == "norm" or x.ndim not in (2, 4) or (x.ndim == 4 and chain.maps is False):
            return None
        if in_place(name_of(func), args, kwargs) or (x.ndim == 2 and part[0] == "pool") or untraced(part):
            return None
        shape = _behind(tuple(x.shape), part)
        return Waiting(chain, ran, ran, mode.bare(x), mode.d(x), ((func, rest, kwargs),), (part,), *made, None, shape, x.dtype)

    def extend(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Waiting | None:
        """With one call more; None where the launch does not cover it."""
        part = part_of(func, args, kwargs)
        if part is None or any(part[0] == p[0] for p in self.parts) or (len(self.shape) == 2 and part[0] == "pool"):
            return None
        if part[0] == "norm":  # right behind a layer, and not in a graph of Dynamo's, which traces no running statistics written in a block
            values = self.shape[0] * math.prod(self.shape[2:])
            if self.parts or torch.compiler.is_compiling() or not part[1].fits(self.dtype, self.shape[1], values):
                return None
        if untraced(part):
            return None
        call = (func, args, {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs)
        return replace(self, ran=self.ran + 1, calls=(*self.calls, call), parts=(*self.parts, part), shape=_behind(self.shape, part))

    @property
    def layer(self) -> bool:
        """Whether the layer itself is put off."""
        return self.first == 0

    def stand_in(self) -> Tensor:
        """A tensor of the result's shape without its values. In a compiled step the calls themselves run, and the compiler drops them."""
        if torch.compiler.is_compiling():
            return self.clean()
        t = torch.empty((), dtype=self.dtype, device=self.source.device).expand(self.shape)
        return t.requires_grad_() if self.grad else t  # not before expand, which would make a node

    @contextlib.contextmanager
    def as_then(self) -> Iterator[None]:
        """With autograd, and checkpointing, as when the calls were made."""
        with torch.set_grad_enabled(self.grad), outside(self.hooks):
            yield

    def clean(self) -> Tensor:
        """The clean result; running statistics have had the batch already."""
        y = self.source
        with torch.no_grad():
            for func, args, kwargs in self.calls:
                if func is F.batch_norm:
                    norm = Norm(*args, **kwargs)
                    running = (None, None) if norm.training else (norm.running_mean, norm.running_var)
                    y = func(y, *running, norm.weight, norm.bias, norm.training, 0.0, norm.eps)
                else:
                    y = func(y, *args, **kwargs)
        return y


def _behind(shape: tuple[int, ...], part: tuple[Any, ...]) -> tuple[int, ...]:
    if part[0] != "pool":
        return shape
    windows = zip(shape[2:], *part[2:], strict=True)
    return (*shape[:2], *((n + 2 * p - k) // s + 1 for n, k, s, p in windows))


def saved_hooks() -> Any:
    """What takes the tensors that autograd saves now."""
    hooks = None if torch.compiler.is_compiling() else torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def outside(then: Any) -> Any:
    """What was put off before a checkpointed function began, or in one that has ended, is none that its second run repeats."""
    # one that hands back what a node itself has made keeps both for ever
    return contextlib.nullcontext() if saved_hooks() is then else torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _same)


def _same(t: Tensor) -> Tensor:
    return t


def fusible(names: Sequence[str], alone: Sequence[bool]) -> tuple[bool, ...]:
    """Of the calls of a chain, the layer first: whether each and all behind it may run as one. ``alone[i]``: nobody else reads call i."""
    fuses = [False] * len(names)
    kinds: set[str] = set()
    for i in reversed(range(len(names))):
        name = names[i].removesuffix("_")
        kind = {"batch_norm": "norm", "max_pool2d": "pool", "avg_pool2d": "pool", "linear": "layer", "conv2d": "layer"}.get(name)
        kind = "activation" if name in ("relu", "tanh", "sigmoid", "gelu") else kind
        if kind is None or kind in kinds or not all(alone[i:]) or (kind == "norm" and i != 1):
            break
        kinds.add(kind)
        fuses[i] = True
    return tuple(fuses)
