"""The noise of SPEC 6."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fbkernels import reference as definition
from fbkernels._check import integer, non_negative, one_of
from fbkernels.ops import _op
from fbkernels.ops._op import Op, kernels

KINDS = ("gaussian", "rademacher")


def philox_words(seed: int, step: int | Tensor, point: int, samples: int, units: int) -> Tensor:
    """The 32-bit words behind the noise of one step at one feedback point, int64 [samples, units].

    Unit u of sample n is word ``u % 4`` of ``Philox4x32-10(counter=(low, high, step, point), key=seed)`` with
    ``(low, high) = n * ceil(units / 4) + u // 4``.

    Args:
        seed: the 64-bit key, in [0, 2^64).
        step: the training step, >= 0, as an int or a 0-dim int64 tensor, whose device the result is on; its low 32 bits count.
        point: the index of the feedback point, in [0, 2^32).
        samples, units: the shape, >= 0.

    Raises:
        ValueError, TypeError: naming the argument, its value and what was expected.
    """
    key = public_key(seed, step, point, samples, 0.0, "gaussian")
    check_key(key, units)
    return definition.philox_words(seed, key.step, point, samples, units, key.step.device)


def noise(seed: int, step: int | Tensor, point: int, samples: int, units: int, std: float, kind: str = "gaussian") -> Tensor:
    """The noise of one step at one feedback point, float32 [samples, units], a pure function of its arguments.

    ``"gaussian"``: Box-Muller on the words (a, b) = (0, 1) and (2, 3) of a counter,
    ``std * sqrt(-2 ln u) * (cos 2 pi v, sin 2 pi v)`` with ``u = ((a >> 8) + 1) / 2^24`` and ``v = (b >> 8) / 2^24``.
    ``"rademacher"``: ``std`` or ``-std``; unit u of sample n takes bit ``u // 4 % 32`` of word ``u % 4`` of counter
    ``n * ceil(units / 128) + u // 128``.

    Args:
        seed, step, point, samples, units: as in :func:`philox_words`.
        std: the standard deviation, finite and >= 0.
        kind: ``"gaussian"`` or ``"rademacher"``.

    Raises:
        ValueError, TypeError: naming the argument, its value and what was expected.
    """
    key = public_key(seed, step, point, samples, std, kind)
    check_key(key, units)
    out: Tensor = op(*key[:4], units, std, kind)
    return out


def draw(step: Tensor, seed: int, *args: Any, **kwargs: Any) -> Tensor:
    """The op, with a seed in [0, 2^64)."""
    out: Tensor = op(step, int64(seed), *args, **kwargs)
    return out


class NoiseKey(NamedTuple):
    """Which noise: that of ``rows`` samples from ``offset`` of the whole batch on, at one point in one step."""

    step: Tensor
    seed: int
    point: int
    rows: int
    std: float
    kind: str
    offset: int


def public_key(seed: int, step: int | Tensor, point: int, rows: int, std: float, kind: str, device: torch.device | None = None) -> NoiseKey:
    """The key of a public function's arguments."""
    integer("seed", seed, 0, 2**64 - 1)
    step = step if isinstance(step, Tensor) else torch.tensor(integer("step", step, 0))
    return NoiseKey(step if device is None else step.to(device), int64(seed), point, rows, std, kind, 0)


def int64(seed: int) -> int:
    """The seed as schemas know it."""
    return seed - 2**64 if seed >= 2**63 else seed


def check_key(key: NoiseKey, units: int) -> None:
    step = key.step
    if step.dtype != torch.int64 or step.ndim != 0:
        raise ValueError(f"step must be a 0-dim int64 tensor, got {step.dtype} of shape {tuple(step.shape)}")
    integer("point", key.point, 0, 2**32 - 1)
    integer("samples", key.rows, 0)
    integer("units", units, 0)
    integer("offset", key.offset, 0, max((2**63 - 1) // max(-(-units // 4), 1) - key.rows, 0))
    non_negative("std", key.std)
    one_of("kind", key.kind, KINDS)


SCHEMA = (
    "philox_noise(Tensor step, int seed, int point, SymInt samples, SymInt units, float std, str kind, *, "
    'SymInt offset=0, ScalarType dtype=float, str backend="auto") -> Tensor'
)


class Call(NamedTuple):
    step: Tensor
    seed: int
    point: int
    samples: int
    units: int
    std: float
    kind: str
    offset: int = 0
    dtype: torch.dtype = torch.float32
    backend: str = "auto"


def outputs(a: Call, dtype: torch.dtype | None = None) -> Tensor:
    return a.step.new_empty(a.samples, a.units, dtype=dtype or a.dtype)


def check(a: Call) -> None:
    check_key(NoiseKey(a.step, a.seed, a.point, a.samples, a.std, a.kind, a.offset), a.units)


def reference(a: Call) -> Tensor:
    if a.step.is_meta:  # Philox is 180 calls, for which torch's meta kernels take a millisecond each
        return outputs(a)
    return definition.noise(a.seed, a.step, a.point, a.samples, a.units, a.std, a.kind, a.dtype, a.step.device, a.offset)


def compiled(a: Call) -> Tensor:
    if a.dtype == torch.float64:
        return op.on("reference", a)  # type: ignore[no-any-return]
    out = outputs(a, torch.float32)
    _op.C.noise(out, a.step, a.seed, a.point, a.std, a.kind, a.offset, torch.get_num_threads())
    return out if a.dtype == torch.float32 else out.to(a.dtype)


def triton(a: Call) -> Tensor:
    if a.dtype == torch.float64:
        return reference(a)
    out = outputs(a, torch.float32)
    kernels().noise(out, a.step, a.seed, a.point, a.std, a.kind, a.offset)
    return out.to(a.dtype)


op = Op(SCHEMA, outputs, {"reference": reference, "cpp": compiled, "triton": triton, "cuda": compiled}, check, Call, any_dtype=True)
