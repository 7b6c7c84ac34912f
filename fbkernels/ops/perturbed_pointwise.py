"""What follows a layer's product, up to its feedback point, of activity and difference (SPEC 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fbkernels import reference as definition
from fbkernels._check import integer, one_of
from fbkernels.ops import _op
from fbkernels.ops._op import Op, dense, expect, given, kernels, maps
from fbkernels.ops.feedback_update import NOTHING, RIDE, Ride, Update, check_ride, plan, ride, ride_outputs
from fbkernels.ops.noise import NoiseKey, check_key, draw, public_key


def perturbed_pointwise(
    z: Tensor,
    dz: Tensor | None,
    *,
    seed: int,
    step: int | Tensor,
    point: int,
    std: float,
    kind: str = "gaussian",
    rows: int | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "identity",
    pool: str = "none",
    pool_first: bool = False,
    kernel_size: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    antithetic: bool = False,
    update: Update | None = None,
    backend: str = "auto",
) -> Perturbed:
    """What follows a layer's convolution or matrix product, activity and difference in one pass (SPEC 1), with B's pending update (SPEC 5):
    ``h = pool(phi(s z + b))``, ``d = pool(phi(s z + b + s dz)) - h + xi``. Without autograd.

    The error behind ``h`` goes back through :func:`feedback`, and ``torch.ops.fbkernels.unpool`` or ``pooled_weight_gradient``.

    Args:
        z: the clean pre-activation, float32, bfloat16 or (triton) float16; any float type with backend "reference": [N, C, H, W] or
            [N, units].
        dz: its difference, of the same dtype, [rows, ...], twice as many rows with ``antithetic``; None: zero, and so d = xi.
        seed, step, point, std, kind: of the noise, as in :func:`noise`.
        rows: perturb the first so many samples; None: all.
        scale, bias: [C] or [units], applied in float32: a bias, or a normalisation. Of dz the scale alone.
        activation: "identity", "relu", "tanh", "sigmoid" or "gelu".
        pool: "none", "max" or "avg" (padding counts); maps only.
        pool_first: pool before phi.
        kernel_size, stride, padding: of the pooling.
        antithetic: d has +xi, then -xi.
        update: B's update and prediction.

    Returns:
        :class:`Perturbed`; d is formed in float32 and rounded to the dtype of z once. Maps are channels-last in memory.

    Raises:
        ValueError, TypeError: naming the argument, its value and what was expected. RuntimeError: the backend cannot be had.
    """
    key, options = public(z, seed, step, point, rows, std, kind, update)
    window = (pool, pool_first, kernel_size, stride, padding)
    h, d, kept, winner, B, parts = op(
        z, dz, bias, activation, *window, *key[:6], scale=scale, antithetic=antithetic, backend=backend, **options
    )
    return Perturbed(h, d, kept, winner, B, total(parts))


class Perturbed(NamedTuple):
    """A layer up to its feedback point.

    Fields:
        h: the activity.
        d: the difference, the perturbed activity less h, [rows, ...], with ``antithetic`` twice as many; empty without rows.
        kept: z behind each h for gelu, whose derivative is not a function of h; else empty.
        winner: uint8, the place ``kernel_width * y + x`` that each window of max-pooling took; else empty.
        B: the new B; empty where none was learned.
        prediction: Xi B, [rows, m]; empty where it was not wanted.
    """

    h: Tensor
    d: Tensor
    kept: Tensor
    winner: Tensor
    B: Tensor
    prediction: Tensor


def public(
    x: Tensor, seed: int, step: int | Tensor, point: int, rows: int | None, std: float, kind: str, update: Update | None
) -> tuple[NoiseKey, dict[str, Any]]:
    """The arguments that the public functions of layers have in common, as ops take them."""
    key = public_key(seed, step, point, len(x) if rows is None else rows, std, kind, x.device)
    return key, {} if update is None else update.arguments()


def total(parts: Tensor) -> Tensor:
    return parts.sum(0) if parts.ndim == 3 else parts


SCHEMA = (
    "perturbed_pointwise(Tensor z, Tensor? dz, Tensor? bias, str activation, str pool, bool pool_first, int[] kernel_size, int[] stride, "
    "int[] padding, Tensor step, int seed, int point, SymInt rows, float std, str kind, *, Tensor? scale=None, bool antithetic=False, "
    f'SymInt offset=0, str backend="auto", {RIDE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)'
)


def check_pair(name: str, sizes: Sequence[int], low: int) -> None:
    if len(sizes) != 2:
        raise ValueError(f"{name} must have two numbers, got {tuple(sizes)}")
    for n in sizes:
        integer(name, n, low)


class Window(NamedTuple):
    """A pooling before or behind the activation; of none the sizes do not count."""

    pool: str
    first: bool
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]

    def size(self, size: Sequence[int]) -> Sequence[int]:
        """The height and width behind it."""
        if self.pool == "none":
            return size
        steps = zip(size, self.kernel_size, self.stride, self.padding, strict=True)
        return [(n + 2 * p - k) // s + 1 for n, k, s, p in steps]

    def check(self, size: Sequence[int]) -> None:
        one_of("pool", self.pool, ("none", "max", "avg"))
        if self.pool == "none":
            return
        check_pair("kernel_size", self.kernel_size, 1)
        check_pair("stride", self.stride, 1)
        check_pair("padding", self.padding, 0)
        for n, k, p in zip(size, self.kernel_size, self.padding, strict=True):
            integer("padding", p, 0, k // 2)
            if k > n + 2 * p:
                raise ValueError(f"kernel_size must not be larger than the padded map, {n + 2 * p}, got {k}")
        if self.pool == "max" and self.kernel_size[0] * self.kernel_size[1] > 256:
            places = tuple(self.kernel_size)
            raise ValueError(f"kernel_size of max-pooling must cover at most 256 places, which a byte can number, got {places}")


UNPOOLED = Window("none", False, (1, 1), (1, 1), (0, 0))


class Call(NamedTuple):
    z: Tensor
    dz: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    activation: str
    window: Window
    key: NoiseKey
    antithetic: bool
    ride: Ride
    backend: str

    @property
    def rows(self) -> int:
        """Of the difference."""
        return self.key.rows * (1 + self.antithetic)


def arguments(
    z: Tensor, dz: Tensor | None, bias: Tensor | None, activation: str, pool: str, pool_first: bool, kernel_size: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], step: Tensor, seed: int, point: int, rows: int, std: float, kind: str, *,
    scale: Tensor | None = None, antithetic: bool = False, offset: int = 0, backend: str = "auto", **update: Any,
) -> Call:  # fmt: skip
    window = UNPOOLED if pool == "none" else Window(pool, pool_first, kernel_size, stride, padding)
    key = NoiseKey(step, seed, point, rows, std, kind, offset)
    return Call(z, dz, scale, bias, activation, window, key, antithetic, Ride(**update) if update else NOTHING, backend)


def outputs(a: Call) -> tuple[Tensor, ...]:
    return *behind(a), *ride_outputs(a.z, a.key, a.ride, a.backend)


def behind(a: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors for h, d, what phi' is read from where h does not do, and the winners."""
    z, pool = a.z, a.window.pool

    def new(rows: int) -> Tensor:
        if z.ndim != 4:
            return z.new_empty(rows, *z.shape[1:])
        size, channels_last = a.window.size(z.shape[2:]), torch.channels_last
        return torch.empty(rows, z.shape[1], *size, dtype=z.dtype, device=z.device, memory_format=channels_last)

    h, none = new(z.shape[0]), z.new_empty
    kept = torch.empty_like(h) if a.activation == "gelu" and pool != "avg" else none(0)
    winner = torch.empty_like(h, dtype=torch.uint8) if pool == "max" else none(0, dtype=torch.uint8)
    return h, new(a.rows) if a.rows else none(0), kept, winner


def check_shape(a: Call) -> None:
    """What outputs() relies on."""
    if a.z.ndim not in (2, 4) or (a.z.ndim == 2 and a.window.pool != "none"):
        shape = tuple(a.z.shape)
        raise ValueError(f"z must be [samples, channels, height, width], or [samples, units] without pooling, got shape {shape}")
    if not 0 <= a.key.rows <= a.z.shape[0]:
        integer("rows", a.key.rows, 0, a.z.shape[0])
    if min(a.window.stride) < 1:
        raise ValueError(f"stride must be >= 1, got {tuple(a.window.stride)}")


def check(a: Call) -> None:
    check_shape(a)
    one_of("activation", a.activation, definition.ACTIVATIONS)
    a.window.check(a.z.shape[2:])
    units = a.z.shape[1] * math.prod(a.window.size(a.z.shape[2:]))
    check_key(a.key, units)
    expect("step", a.key.step, a.z, dtype=torch.int64)
    expect("dz", a.dz, a.z, a.rows, *a.z.shape[1:], dtype=a.z.dtype)
    expect("scale", a.scale, a.z, a.z.shape[1])
    expect("bias", a.bias, a.z, a.z.shape[1])
    check_ride(a.z, units, a.ride)


def reference(a: Call) -> tuple[Tensor, ...]:
    z, dz, scale, bias, activation, window, key, antithetic, update, backend = a
    exact, size = torch.promote_types(z.dtype, torch.float32), (z.shape[1], *window.size(z.shape[2:]))
    xi = draw(*key[:4], math.prod(size), key.std, key.kind, offset=key.offset, dtype=exact, backend=backend)
    xi = definition.layout(xi, (key.rows, *size))
    h, d, kept, winner = definition.perturbed_pointwise(z, dz, xi, antithetic, bias, activation, *window, scale)
    # an op may not return its input
    h, kept = (dense(t).clone() if t.data_ptr() == z.data_ptr() else dense(t) for t in (h, kept))
    return h, dense(d) if a.rows else z.new_empty(0), kept, dense(winner), *ride(z, key, update, backend)


def native(a: Call) -> tuple[Tensor | None, ...]:
    """The tensors as kernels read them: z, dz, scale, bias."""
    scale, bias = (None if t is None else t.float().contiguous() for t in (a.scale, a.bias))
    return dense(a.z), None if a.dz is None else dense(a.dz), scale, bias


def compiled(a: Call) -> tuple[Tensor, ...]:
    check_shape(a)
    out = behind(a)
    z, dz, scale, bias = native(a)
    z, dz, *into = (None if t is None else maps(t) for t in (z, dz, *given(*out)))
    w, k = a.window, a.key
    how = (a.activation, w.pool, w.first, (*w.kernel_size, *w.stride, *w.padding))
    key = (k.step, k.seed, k.point, k.std, k.kind, k.rows, a.antithetic, k.offset)
    _op.C.perturbed_pointwise(z, dz, scale, bias, *into, *how, *key, torch.get_num_threads())
    return *out, *ride(a.z, k, a.ride, a.backend)


def triton(a: Call) -> tuple[Tensor, ...]:
    out, update = behind(a), plan(a.z, a.key.rows, a.key.kind, a.ride)
    kernels().perturbed_pointwise(*native(a), a.activation, *a.window, *a.key, a.antithetic, *given(*out), update)
    return *out, update.new, update.parts


op = Op(SCHEMA, outputs, {"reference": reference, "cpp": compiled, "triton": triton, "cuda": compiled}, check, arguments)
