"""A linear layer up to its feedback point, activity and difference (SPEC 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fbkernels.ops import _op, tuning
from fbkernels.ops._op import Op, given
from fbkernels.ops.feedback_update import NOTHING, RIDE, Ride, Update, ride
from fbkernels.ops.noise import NoiseKey
from fbkernels.ops.perturbed_conv2d import LINEAR, Call, check_layer, fused, product
from fbkernels.ops.perturbed_pointwise import UNPOOLED, Perturbed, behind, check_shape, public, total
from fbkernels.ops.perturbed_pointwise import Call as Pointwise
from fbkernels.ops.perturbed_pointwise import op as pointwise


def perturbed_linear(
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seed: int,
    step: int | Tensor,
    point: int,
    std: float,
    kind: str = "gaussian",
    rows: int | None = None,
    activation: str = "identity",
    antithetic: bool = False,
    update: Update | None = None,
    backend: str = "auto",
) -> Perturbed:
    """A linear layer up to its feedback point, activity and difference, with B's pending update (SPEC 1, 5): ``z = x W^T + b``,
    ``dz = dx W^T``, ``h = phi(z)``, ``d = phi(z + dz) - phi(z) + xi``. One launch on the triton backend. Without autograd.

    Args:
        x: [N, in], float32, bfloat16 or (triton) float16; any float type with backend "reference".
        dx: the difference of the input, [rows, in], with ``antithetic`` [2 rows, in]; None: zero, and so d = xi.
        weight: [out, in]; bias: [out].
        seed, step, point, std, kind: of the noise, as in :func:`noise`.
        rows: perturb the first so many samples; None: all.
        activation: "identity", "relu", "tanh", "sigmoid" or "gelu".
        antithetic: d has +xi, then -xi.
        update: B's update and prediction.

    Returns:
        :class:`Perturbed`; sums, z + dz and d in float32, h and d then rounded to the dtype of x (float32 products in tf32 where
        ``torch.backends.cuda.matmul.allow_tf32``).

    Raises:
        ValueError, TypeError: naming the argument, its value and what was expected. RuntimeError: the backend cannot be had.
    """
    key, options = public(x, seed, step, point, rows, std, kind, update)
    h, d, kept, B, parts = op(x, dx, weight, bias, activation, *key[:6], antithetic=antithetic, backend=backend, **options)
    return Perturbed(h, d, kept, h.new_empty(0, dtype=torch.uint8), B, total(parts))


SCHEMA = (
    "perturbed_linear(Tensor x, Tensor? dx, Tensor weight, Tensor? bias, str activation, Tensor step, int seed, int point, SymInt rows, "
    f'float std, str kind, *, bool antithetic=False, SymInt offset=0, str backend="auto", {RIDE}) '
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def arguments(
    x: Tensor, dx: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str, step: Tensor, seed: int, point: int, rows: int,
    std: float, kind: str, *, antithetic: bool = False, offset: int = 0, backend: str = "auto", **update: Any,
) -> Call:  # fmt: skip
    key = NoiseKey(step, seed, point, rows, std, kind, offset)
    return Call(x, dx, weight, bias, LINEAR, activation, UNPOOLED, key, antithetic, Ride(**update) if update else NOTHING, backend)


def outputs(a: Call) -> tuple[Tensor, ...]:
    return without_winner(pointwise.outputs(a.behind(product(a))))


def without_winner(out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return *out[:3], *out[4:]


def check(a: Call) -> None:
    check_x(a)
    check_layer(a)


def check_x(a: Call) -> None:
    if a.x.ndim != 2:
        raise ValueError(f"x must be [samples, units], got shape {tuple(a.x.shape)}")


def products(a: Call) -> Pointwise:
    x, dx, weight, bias = a[:4]
    if dx is None:
        return a.behind(linear(x, weight, bias))
    if weight.numel() < 2**18:
        return a.behind(linear(x, weight, bias), linear(dx, weight))
    # a weight larger than the cache is read once for both: 8.5 against 10.1 ms at 4096 x 2048, 64 samples
    z, dz = linear(torch.cat((x, dx)), weight).split((len(x), len(dx)))
    return a.behind(z, dz, bias)


def reference(a: Call) -> tuple[Tensor, ...]:
    return without_winner(pointwise.on("reference", products(a)))


def library(a: Call) -> tuple[Tensor, ...]:
    return pointwise.compute(products(a))  # type: ignore[no-any-return]


def cpp(a: Call) -> tuple[Tensor, ...]:
    check_x(a)
    return without_winner(library(a))


def triton(a: Call) -> tuple[Tensor, ...]:
    return without_winner(fused("perturbed_linear", a, library))


def cuda(a: Call) -> tuple[Tensor, ...]:
    check_x(a)
    check_shape(a.behind(product(a)))

    def kernel() -> tuple[Tensor, ...]:
        out, k = behind(a.behind(product(a))), a.key
        tensors = (None if t is None else t.contiguous() for t in a[:4])
        key = (k.step, k.seed, k.point, k.std, k.kind, k.rows, a.antithetic, k.offset)
        _op.C.perturbed_linear(*tensors, *given(*out[:3]), a.activation, *key)
        return *out, *ride(a.x, k, a.ride, a.backend)

    run = {"kernel": kernel, "library": lambda: library(a)}
    shapes = (*a.x.shape, *a.weight.shape, 0 if a.dx is None else len(a.dx))
    chosen = tuning.fastest("perturbed_linear_cuda", (a.activation, a.key.kind, *shapes), tuple(run), lambda name: run[name]())
    return without_winner(run[chosen]())


op = Op(SCHEMA, outputs, {"reference": reference, "cpp": cpp, "triton": triton, "cuda": cuda}, check, arguments)
