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
from test_ridge_gain import agrees, batch
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


@given(st.integers(1, 90), st.integers(1, 120), st.sampled_from([1.0, 0.99, 0.8]), st.integers(0, 20), st.integers(0, 99))
@settings(once, max_examples=12)
def test_gains(n: int, m: int, forgetting: float, batches: int, seed: int) -> None:
    R, w, V = (t.to(DEVICE) for t in batch(n, m, seed, batches))
    agrees(ops.ridge_gain(R, w, V, 0.1, forgetting, backend="cuda"), R, w, V, forgetting)


# one block; blocks together; moments in slices
@pytest.mark.parametrize(("n", "m"), [(64, 128), (64, 129), (70, 300), (2000, 50), (700, 130), (64, 1000)])
def test_gains_by_many_blocks(n: int, m: int) -> None:
    R, w, V = (t.to(DEVICE) for t in batch(n, m, 0, 4))
    agrees(ops.ridge_gain(R, w, V, 0.1, 0.99, backend="cuda"), R, w, V, 0.99)


@pytest.mark.parametrize("m", [20, 150])
def test_gains_of_groups(m: int) -> None:
    R, w, V = (t.to(DEVICE) for t in batch(21, m, 0, 4))
    groups = torch.stack((R, 2 * R.roll(1, 1), R.flip(1)))
    for given_R, given_V in ((groups, V.expand(3, m, m)), (groups.mT.contiguous().mT, V.expand(3, m, m).clone())):
        agrees(ops.ridge_gain(given_R, w, given_V, 0.1, 0.9, backend="cuda"), given_R, w, given_V, 0.9)
