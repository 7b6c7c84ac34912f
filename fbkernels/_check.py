"""Argument checks. Each returns its value, so a constructor checks and stores in one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import TypeVar

T = TypeVar("T")


def _real(name: str, value: T, expected: str, accept: Callable[[float], bool]) -> T:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    if not (math.isfinite(value) and accept(float(value))):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return value


def positive(name: str, value: T) -> T:
    return _real(name, value, "a finite number > 0", lambda v: v > 0)


def non_negative(name: str, value: T) -> T:
    return _real(name, value, "a finite number >= 0", lambda v: v >= 0)


def in_interval(name: str, value: T, low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> T:
    expected = f"in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
    return _real(name, value, expected, lambda v: (low < v if open_low else low <= v) and (v < high if open_high else v <= high))


def integer(name: str, value: T, low: int, high: int = 2**63 - 1) -> T:
    expected = f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    if not low <= int(value) <= high:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return value


def one_of(name: str, value: T, choices: Iterable[T]) -> T:
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def boolean(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value
