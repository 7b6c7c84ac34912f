"""Every op on every backend that has it against the reference in float64: a kernel that is put into an op's table is tested here.

A test file of an op has in CASES the calls to draw for a backend and the check of one, with the bound that it derives.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import emulated
import pytest
import test_feedback
import test_mirror
import test_noise
import test_perturbed_cross_entropy
import test_perturbed_layers
import test_perturbed_pointwise
import test_pooled_weight_gradient
import test_ridge_gain
import torch
from hypothesis import given, settings

from fbkernels import ops

FILES = (
    test_feedback,
    test_mirror,
    test_noise,
    test_perturbed_cross_entropy,
    test_perturbed_layers,
    test_perturbed_pointwise,
    test_pooled_weight_gradient,
    test_ridge_gain,
)
CASES = {name: case for file in FILES for name, case in file.CASES.items()}
EXAMPLES = {"cpp": 150, "triton": 12, "cuda": 40}  # in Triton's interpreter up to 3 s each
FAST = {("perturbed_cross_entropy", "triton"): 150, ("perturbed_pointwise", "triton"): 60, ("feedback_update", "triton"): 50}


@pytest.mark.parametrize(("name", "backend"), [(name, b) for name, backends in ops.table().items() for b in backends if b != "reference"])
def test_the_backend_is_the_reference(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "cpp" and torch.cuda.is_available() and name.startswith("perturbed_"):
        pytest.skip("of tensors on the CPU")
    calls, check = CASES[name]

    @given(calls(backend))
    @settings(max_examples=FAST.get((name, backend), EXAMPLES[backend]), deadline=None)
    def run(call: Any) -> None:
        check(call, backend)

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with emulated.backend() if backend == "cuda" else nullcontext():
        run()
