"""The functional interface."""

from __future__ import annotations

import torch
from torch import Tensor

from fbkernels import ops, reference
from fbkernels._check import integer


def _step(step: int | Tensor) -> Tensor:
    return step if isinstance(step, Tensor) else torch.tensor(integer("step", step, 0))


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
    integer("seed", seed, 0, 2**64 - 1)
    step = _step(step)
    ops.check_noise(step, point, samples, units, 0.0, "gaussian", 0)
    return reference.philox_words(seed, step, point, samples, units, step.device)


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
    integer("seed", seed, 0, 2**64 - 1)
    step = _step(step)
    ops.check_noise(step, point, samples, units, std, kind, 0)
    return ops.noise(step, seed, point, samples, units, std, kind)
