"""The CUDA kernels against the reference in float64: on a GPU, or compiled for the CPU, where fibers are their threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from poison import guarded
from test_feedback import check_update, updates
from test_pointwise import calls
from test_pointwise import check as check_pointwise
from torch import Tensor

from fbkernels import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
once = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", autouse=True)
def _cuda() -> Iterator[None]:
    """Without a GPU the emulated build takes the place of fbkernels._C."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            import emulated

            module = emulated.compiled()
            patch.setattr(ops, "_C", module)
            patch.setattr(ops, "_BUILD", module.build_info())
        ops._native.cache_clear()
        yield
    ops._native.cache_clear()


@given(calls())
@settings(once, max_examples=60)
def test_both_streams(call: dict[str, Any]) -> None:
    single = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}
    check_pointwise(single, "cuda")


@given(updates(units=300, rows=150))
@settings(once, max_examples=50)
def test_update_and_prediction(call: dict[str, Any]) -> None:
    check_update({k: guarded(v.to(DEVICE)) if isinstance(v, Tensor) else v for k, v in call.items()}, "cuda")
