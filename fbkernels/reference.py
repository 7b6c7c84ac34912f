"""The definition of the method in plain torch, for any float dtype. Read it beside SPEC.md; every backend is tested against it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011). Words are int64 tensors that hold 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, so the masked shift still gives the exact high word
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) & _MASK ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) & _MASK ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _counters(seed: int, step: int | Tensor, point: int, samples: int, per_sample: int, device: torch.device | str) -> Tensor:
    """The four words of counters ``(n * per_sample + i, step, point)``, int64 [samples, per_sample, 4]."""
    index = torch.arange(samples * per_sample, device=device)
    step = torch.as_tensor(step, device=device, dtype=torch.int64) & _MASK
    counter = (index & _MASK, index >> 32, step.expand_as(index), torch.full_like(index, point))
    return torch.stack(philox(counter, (seed & _MASK, seed >> 32 & _MASK)), -1).view(samples, per_sample, 4)


def philox_words(seed: int, step: int | Tensor, point: int, samples: int, units: int, device: torch.device | str = "cpu") -> Tensor:
    """The 32-bit words of a step's noise at one feedback point, int64 [samples, units] (SPEC 6).

    Unit u of sample n takes word ``u % 4`` of counter ``(n * ceil(units / 4) + u // 4, step, point)``; the key is the seed.
    """
    return _counters(seed, step, point, samples, -(-units // 4), device).flatten(1)[:, :units]


def noise(
    seed: int,
    step: int | Tensor,
    point: int,
    samples: int,
    units: int,
    std: float,
    kind: str = "gaussian",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Noise with standard deviation ``std``, [samples, units] (SPEC 6).

    Gaussian: Box-Muller on word pairs (0, 1) and (2, 3) with 24-bit uniforms, which float32 holds exactly:
    ``u = ((a >> 8) + 1) / 2^24``, ``v = (b >> 8) / 2^24``, ``std * sqrt(-2 ln u) * (cos 2 pi v, sin 2 pi v)``.
    Rademacher: one bit an element, so 128 units share a counter: unit u of sample n takes bit ``u // 4 % 32`` of word ``u % 4`` of
    counter ``(n * ceil(units / 128) + u // 128, step, point)``; ``std`` where it is 0, ``-std`` where it is 1.
    """
    if kind == "rademacher":
        words = _counters(seed, step, point, samples, -(-units // 128), device)
        bits = words[:, :, None, :] >> torch.arange(32, device=device)[:, None] & 1  # [samples, counters, bit, word]
        return (std * (1 - 2 * bits.flatten(1)[:, :units])).to(dtype)
    words = _counters(seed, step, point, samples, -(-units // 4), device).unflatten(2, (2, 2)) >> 8
    radius = (-2 * ((words[..., 0] + 1) * 2.0**-24).double().log()).sqrt()
    angle = words[..., 1].double() * (2 * math.pi * 2.0**-24)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
    return (std * pairs).flatten(1)[:, :units].to(dtype)
