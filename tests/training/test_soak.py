"""bench/soak.py, for a moment; and that what it says of long runs holds."""

import json

import numpy as np
import pytest
import report
import soak
import torch

from fbkernels import reference

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_leak_is_seen_and_noise_is_not() -> None:
    """32 bytes lost a step beside noise of 100 kB, as the allocator makes; the upper end is wrong in one of twenty runs."""
    rng, steps = np.random.default_rng(0), list(range(0, 1_000_000, 2_500))
    below = 0
    for _ in range(400):
        memory = [int(3e8 + noise) for noise in rng.normal(0, 1e5, len(steps))]
        b, upper = soak.slope(steps, memory)
        below += upper < 0
        assert upper < soak.SMALLEST
        leaking = [m + 32 * s for m, s in zip(memory, steps, strict=True)]
        assert abs(soak.slope(steps, leaking)[0] - 32 - b) < 1e-3
    assert 5 <= below <= 38  # 400 / 20, four standard deviations of a binomial


def test_noise_of_many_steps_is_the_noise_of_each() -> None:
    many = soak.noise(3, 5, 4, 1, 6).view(4, soak.BATCH, 6)
    each = [reference.noise(3, 5 + i, 1, soak.BATCH, 6, soak.STD, dtype=torch.float64) for i in range(4)]
    assert torch.equal(many, torch.stack(each))


def test_soak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "SAMPLES", 50)
    results = {name: run(0.05) for name, run in soak.runs(2000).items()}
    for name, r in results.items():
        assert r["counted_steps"] == r["steps"] >= 50, name
        assert (r["skipped"], r["non_finite_losses"], r["finite"]) == (0, 0, True)
        assert r.get("asymmetry", 0.0) == 0
        assert r.get("smallest_eigenvalue", soak.GAMMA) > soak.GAMMA - 1e-6
    # W fixed: float32's rounding of a step's gain is 2^-24, and 2,000 of them add up at random
    assert max(results["FusedMLP, direct ridge, W fixed"]["error_of_B"]) < 2000**0.5 * 2.0**-24
    assert results["FusedMLP, layerwise ridge"]["last_loss"] < 0.5 * results["FusedMLP, layerwise ridge"]["first_loss"]


def test_the_committed_soak_leaked_nothing() -> None:
    record = json.loads((report.RESULTS / "soak.json").read_text())
    assert report.soaked(report.RESULTS / "soak.json") in (report.RESULTS / "README.md").read_text()
    assert f"## {record['versions']['fbkernels']}\n" in (report.RESULTS.parents[1] / "CHANGELOG.md").read_text()
    for name, r in record["results"].items():
        assert r["bytes_per_step_upper"] < soak.SMALLEST, name
        # least squares by the processor's own LAPACK kernels
        assert soak.slope(*r["memory"]) == pytest.approx((r["bytes_per_step"], r["bytes_per_step_upper"]), rel=1e-9)
        assert r["skipped"] == r["non_finite_losses"] == 0
        assert r["steps"] == r["counted_steps"]
