"""Between an activity and its units: samples x units, as noise, B and the regressions see it (SPEC 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fbkernels import reference


@dataclass(frozen=True)
class Rows:
    """Which rows of a tensor are whose: dimension ``dim`` holds those of N samples, one behind the other, or with ``strided`` in turns."""

    dim: int = 0
    strided: bool = False

    @property
    def plain(self) -> bool:
        return self.dim == 0 and not self.strided

    def first(self, t: Tensor, n: int) -> Tensor:
        """[N, rows of a sample, ...]"""
        t = t.movedim(self.dim, 0)
        rows: Tensor = t.unflatten(0, (-1, n)).transpose(0, 1) if self.strided else t.unflatten(0, (n, -1 if n else 1))
        return rows

    def back(self, t: Tensor) -> Tensor:
        """The inverse of ``first``."""
        return (t.transpose(0, 1) if self.strided else t).flatten(0, 1).movedim(0, self.dim)


@dataclass(frozen=True)
class Layout:
    """How the units of a point lie in its activity.

    ``shape``: of a row of the activity; ``copies``: rows of a sample, more than one where a model has merged, say, time and batch;
    ``maps``: whether it is [channels, ...], numbered channels-last, None for not known; ``share``: places along each dimension of a map
    that are one unit; ``rows``: which rows are whose.
    """

    shape: tuple[int, ...]
    maps: bool | None
    share: int
    copies: int
    rows: Rows

    @staticmethod
    def of(h: Tensor, n: int, maps: bool | None, share: int, rows: Rows) -> Layout:
        if rows.plain and h.shape[0] == n:
            return Layout(tuple(h.shape[1:]), maps, share, 1, rows)
        size = h.shape[rows.dim]
        shape = (*h.shape[: rows.dim], *h.shape[rows.dim + 1 :])
        return Layout(shape, maps, share, size // n if n else 1, rows)

    @property
    def plain(self) -> bool:
        """Whether the batch comes first, a row for each sample."""
        return self.copies == 1 and self.rows.plain

    @property
    def row_units(self) -> int:
        shares = self.share > 1 and reference.is_map(len(self.shape) + 1, self.maps)
        return math.prod(reference.patches(self.shape, self.share) if shares else self.shape)

    @property
    def units(self) -> int:
        """n_l, the noisy units of a sample; places of a map that share their noise are one."""
        return self.copies * self.row_units

    def units_of(self, h: Tensor, n: int) -> Tensor:
        """[n, units] of an activity of n samples; what places share is their sum."""
        if not self.shape:
            return (h if self.plain else self.rows.first(h, n)).reshape(n, self.copies)
        if self.plain:
            return reference.units(h, self.maps, self.share)
        return reference.units(self.rows.first(h, n).flatten(0, 1), self.maps, self.share).reshape(n, self.units)

    def activity(self, u: Tensor) -> Tensor:
        """The adjoint of ``units_of``, and its inverse where nothing is shared: [n, units] as an activity."""
        n = u.shape[0]
        h = reference.layout(u.reshape(n * self.copies, self.row_units), (n * self.copies, *self.shape), self.maps, self.share)
        return h if self.plain else self.rows.back(h.unflatten(0, (n, self.copies)))

    def scaled(self, h: Tensor, c: Tensor) -> Tensor:
        """An activity of n samples times a number for each, c [n]."""
        if self.plain:
            return h * c.view(-1, *[1] * (h.ndim - 1))
        return self.activity(self.units_of(h, len(c)) * c[:, None])

    def mean(self, g: Tensor) -> Tensor:
        """[n, units] of what places share, a part of it for each: the gradients of their sum."""
        if self.share == 1:
            return g
        ones: Any = torch.ones(self.copies, *self.shape, dtype=g.dtype, device=g.device)
        return g / reference.units(ones, self.maps, self.share).reshape(1, -1)
