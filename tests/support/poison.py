"""Tensors amid not-a-numbers: what reads or writes beside them, or leaves a part of its output unwritten, shows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

BAND = 64  # elements on each side


def amid(t: Tensor) -> tuple[Tensor, Tensor]:
    """An empty tensor like t with a band of NaN (of integers the largest) around it and within, and its whole memory."""
    fill = float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max
    whole = torch.full((t.numel() + 2 * BAND,), fill, dtype=t.dtype, device=t.device)
    return whole.as_strided(t.shape, t.stride(), BAND), whole


def guarded(t: Tensor | None) -> Tensor | None:
    """The same tensor, dense, amid not-a-numbers."""
    return None if t is None else amid(t)[0].copy_(t)


@contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated in the ``with`` block holds NaN until it is written, and nothing may write beside it."""
    allocated = []

    def poisoning(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poison(*args: Any, **kwargs: Any) -> Tensor:
            t = empty(*args, **kwargs)
            if not t.numel() or t.device.type == "meta":
                return t
            inner, whole = amid(t)
            allocated.append(whole)
            return inner

        return poison

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, poisoning(getattr(owner, name))))
        yield
    for whole in allocated:
        bands = torch.cat((whole[:BAND], whole[-BAND:]))
        assert bool((bands.isnan() if whole.is_floating_point() else bands == torch.iinfo(whole.dtype).max).all()), "written beside"


@contextmanager
def one_warning() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert ["non-finite" in str(w.message) for w in caught] == [True], [str(w.message) for w in caught]
