"""A convolution up to its feedback point, activity and difference (SPEC 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fbkernels import reference as definition
from fbkernels._check import integer, one_of
from fbkernels.ops import tuning
from fbkernels.ops._op import Op, dense, expect, given, kernels
from fbkernels.ops.feedback_update import NOTHING, RIDE, Ride, Update, check_ride, plan
from fbkernels.ops.noise import NoiseKey, check_key
from fbkernels.ops.perturbed_pointwise import UNPOOLED, Perturbed, Window, behind, check_pair, public, total
from fbkernels.ops.perturbed_pointwise import Call as Pointwise
from fbkernels.ops.perturbed_pointwise import op as pointwise


def perturbed_conv2d(
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    *,
    seed: int,
    step: int | Tensor,
    point: int,
    std: float,
    kind: str = "gaussian",
    rows: int | None = None,
    activation: str = "identity",
    pool: str = "none",
    pool_first: bool = False,
    kernel_size: tuple[int, int] = (1, 1),
    pool_stride: tuple[int, int] = (1, 1),
    pool_padding: tuple[int, int] = (0, 0),
    antithetic: bool = False,
    update: Update | None = None,
    backend: str = "auto",
) -> Perturbed:
    """A convolution up to its feedback point, activity and difference, with B's pending update (SPEC 1, 5): ``z = conv(x) + b``,
    ``dz = conv(dx)``, ``h = pool(phi(z))``, ``d = pool(phi(z + dz)) - pool(phi(z)) + xi``. Without autograd.

    On the triton backend without pooling it is one launch, an implicit GEMM over channels-last maps, or the library's convolution and
    one launch of :func:`perturbed_pointwise`, whichever was faster on this GPU for these shapes; with pooling always the latter.

    Args:
        x: [N, C, H, W]; dx: the difference of the input, [rows, C, H, W], with ``antithetic`` [2 rows, ...]; None: zero.
        weight: [out, C / groups, KH, KW]; bias: [out]; stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``.
        pool, pool_first, kernel_size, pool_stride, pool_padding: as in :func:`perturbed_pointwise`.
        The others: as in :func:`perturbed_linear`.

    Returns:
        :class:`Perturbed`, maps channels-last in memory; B's units are numbered channels-last.

    Raises:
        ValueError, TypeError: naming the argument, its value and what was expected. RuntimeError: the backend cannot be had.
    """
    key, options = public(x, seed, step, point, rows, std, kind, update)
    layer, window = (stride, padding, dilation, groups), (pool, pool_first, kernel_size, pool_stride, pool_padding)
    h, d, kept, winner, B, parts = op(
        x, dx, weight, bias, *layer, activation, *window, *key[:6], antithetic=antithetic, backend=backend, **options
    )
    return Perturbed(h, d, kept, winner, B, total(parts))


SCHEMA = (
    "perturbed_conv2d(Tensor x, Tensor? dx, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, "
    "str activation, str pool, bool pool_first, int[] kernel_size, int[] pool_stride, int[] pool_padding, Tensor step, int seed, "
    f'int point, SymInt rows, float std, str kind, *, bool antithetic=False, SymInt offset=0, str backend="auto", {RIDE}) '
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class Layer(NamedTuple):
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


LINEAR = Layer((1, 1), (0, 0), (1, 1), 1)  # as a convolution of maps of one place


class Call(NamedTuple):
    x: Tensor
    dx: Tensor | None
    weight: Tensor
    bias: Tensor | None
    layer: Layer
    activation: str
    window: Window
    key: NoiseKey
    antithetic: bool
    ride: Ride
    backend: str

    def behind(self, z: Tensor, dz: Tensor | None = None, bias: Tensor | None = None) -> Pointwise:
        """What follows the product; ``bias`` where z has none yet."""
        return Pointwise(z, dz, None, bias, *self[5:])


def arguments(
    x: Tensor, dx: Tensor | None, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, activation: str, pool: str, pool_first: bool, kernel_size: Sequence[int],
    pool_stride: Sequence[int], pool_padding: Sequence[int], step: Tensor, seed: int, point: int, rows: int, std: float, kind: str, *,
    antithetic: bool = False, offset: int = 0, backend: str = "auto", **update: Any,
) -> Call:  # fmt: skip
    window = UNPOOLED if pool == "none" else Window(pool, pool_first, kernel_size, pool_stride, pool_padding)
    key, layer = NoiseKey(step, seed, point, rows, std, kind, offset), Layer(stride, padding, dilation, groups)
    return Call(x, dx, weight, bias, layer, activation, window, key, antithetic, Ride(**update) if update else NOTHING, backend)


def outputs(a: Call) -> tuple[Tensor, ...]:
    return pointwise.outputs(a.behind(product(a)))  # type: ignore[no-any-return]


def product(a: Call) -> Tensor:
    """A tensor like that of the product, without its memory."""
    size = definition.conv_size(a.x.shape[2:], a.weight, *a.layer[:3]) if a.x.ndim == 4 else ()
    return a.x.new_empty(1).expand(a.x.shape[0], a.weight.shape[0], *size)


def check(a: Call) -> None:
    if a.x.ndim != 4:
        raise ValueError(f"x must be [samples, channels, height, width], got shape {tuple(a.x.shape)}")
    check_layer(a)


def check_layer(a: Call) -> None:
    """Of a convolution, or of a linear layer as one."""
    x, weight, layer, key = a.x, a.weight, a.layer, a.key
    one_of("activation", a.activation, definition.ACTIVATIONS)
    integer("rows", key.rows, 0, len(x))
    integer("groups", layer.groups, 1)
    for name, pair, low in (("stride", layer.stride, 1), ("padding", layer.padding, 0), ("dilation", layer.dilation, 1)):
        check_pair(name, pair, low)
    if weight.ndim != x.ndim or weight.shape[1] * layer.groups != x.shape[1] or weight.shape[0] % layer.groups or weight.dtype != x.dtype:
        expected = f"{x.ndim} dimensions, {x.shape[1]} / {layer.groups} input channels and dtype {x.dtype}"
        raise ValueError(f"weight must have {expected}, got shape {tuple(weight.shape)} and {weight.dtype}")
    size = product(a).shape[2:]
    if any(n < 1 for n in size):
        raise ValueError(f"weight must not be larger than the padded map, got shape {tuple(weight.shape)} for {tuple(x.shape)}")
    expect("weight", weight, x, *weight.shape)
    expect("bias", a.bias, x, weight.shape[0])
    expect("dx", a.dx, x, key.rows * (1 + a.antithetic), *x.shape[1:], dtype=x.dtype)
    a.window.check(size)
    units = weight.shape[0] * math.prod(a.window.size(size))
    check_key(key, units)
    expect("step", key.step, x, dtype=torch.int64)
    check_ride(x, units, a.ride)


def products(a: Call) -> Pointwise:
    """The library's convolutions."""
    x, weight = dense(a.x), dense(a.weight)
    convolve = torch.nn.functional.conv2d
    return a.behind(convolve(x, weight, a.bias, *a.layer), None if a.dx is None else convolve(a.dx, weight, None, *a.layer))


def reference(a: Call) -> tuple[Tensor, ...]:
    return pointwise.on("reference", products(a))  # type: ignore[no-any-return]


def library(a: Call) -> tuple[Tensor, ...]:
    return pointwise.compute(products(a))  # type: ignore[no-any-return]


def triton(a: Call) -> tuple[Tensor, ...]:
    return library(a) if a.window.pool != "none" else fused("perturbed_conv2d", a, library)


def fused(name: str, a: Call, library: Callable[[Call], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """One launch of Triton, or the library's layer and one launch of what follows it: what is faster on this GPU."""
    update, out = plan(a.x, a.key.rows, a.key.kind, a.ride), behind(a.behind(product(a)))
    tensors = (dense(a.x), None if a.dx is None else dense(a.dx), dense(a.weight), None if a.bias is None else a.bias.contiguous())

    def run(configuration: dict[str, int] | str) -> tuple[Tensor, ...]:
        if isinstance(configuration, str):
            return library(a)
        kernels().perturbed_conv2d(*tensors, *a.layer, a.activation, *a.key, a.antithetic, *given(*out[:3]), update, configuration)
        return *out, update.new, update.parts

    candidates = [*kernels().configurations(a.x.dtype, 1 if a.dx is None else 2 + a.antithetic), "library"]
    sizes = (*a.layer.stride, *a.layer.padding, *a.layer.dilation, a.layer.groups)
    shapes = (*a.x.shape, *a.weight.shape, *sizes, 0 if a.dx is None else len(a.dx), *update.shape)
    return run(tuning.fastest(name, (str(a.x.dtype), a.activation, a.key.kind, kernels().precision(), *shapes), candidates, run))


op = Op(SCHEMA, outputs, {"reference": reference, "cpp": library, "triton": triton, "cuda": library}, check, arguments)
