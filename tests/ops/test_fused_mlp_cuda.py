"""The CUDA engine of FusedMLP by itself; test_fused_mlp.py compares its results with the modules' and the C++ engine's."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import emulated
import pytest
import torch
from test_fused_mlp import EPS, METHODS, distance, learned, make, names
from torch import Tensor

import fbkernels as fb
from fbkernels import _C, fused_mlp

ON_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def engine() -> Any:
    with emulated.engine():
        yield


def start(sizes: tuple[int, ...], samples: int, blocks: int = 0, **options: Any) -> tuple[fb.FusedMLP, Tensor, Tensor]:
    net, *data = emulated.moved(*make(sizes, samples, **options))
    net._blocks = blocks
    return net, *data


@pytest.mark.parametrize("batch", [9, 32])
@pytest.mark.parametrize(("rule", "feedback"), METHODS, ids=names)
def test_neither_blocks_nor_the_order_of_threads_change_a_bit(
    rule: fb.Rule, feedback: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks, warps and lanes take their turns between two barriers in any order: one that is missing would show."""
    results = []
    rule = fb.LMS(1e-4) if isinstance(rule, fb.LMS) else rule  # stable at this size
    for blocks, order in ((1, 1), (2, 2), (3, 3), (4, 4), (4, 5)):
        monkeypatch.setenv("FBK_EMULATED_ORDER", str(order))
        monkeypatch.setenv("FBK_EMULATED_CAPABILITY", "9" if order == 5 else "8")  # a cluster, and a grid
        net, x, y = start((37, 29, 18, 33), 60, blocks, classes=False, rule=rule, feedback=feedback, optimizer="adam", lr=1e-4)
        results.append(learned(net, net.fit(x, y, steps=4, batch_size=batch)))
    assert all(a.isfinite().all() for a in results[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("rule", "batch"), [(fb.Ridge(1.0, 0.95), 9), (fb.Ridge(1.0), 70)], ids=names)
@pytest.mark.parametrize("feedback", ["layerwise", "direct"])
def test_regressions_that_all_blocks_share(rule: fb.Ridge, batch: int, feedback: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 64 regressors that keep V; the C++ engine's results, and the same bits for any number of blocks and order."""
    options: dict[str, Any] = {"classes": False, "rule": rule, "feedback": feedback, "lr": 1e-5, "noise_std": 0.1}
    net, x, y = make((20, 12, 80, 66), 90, **options)
    with mock.patch.object(fused_mlp, "_C", _C):
        expected = learned(net, net.fit(x, y, steps=4, batch_size=batch))
    results = []
    for blocks, order in ((1, 1), (3, 2), (4, 3)):
        monkeypatch.setenv("FBK_EMULATED_ORDER", str(order))
        cuda, *data = start((20, 12, 80, 66), 90, blocks, **options)
        results.append(learned(cuda, cuda.fit(*data, steps=4, batch_size=batch)))
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))
        for V, exact in zip(cuda._V, net._V, strict=True):
            assert distance(V.cpu(), exact) < 1e-4  # float32 regressors
    for mine, theirs in zip(results[0], expected, strict=True):
        assert distance(mine.cpu(), theirs) < 4 * 2 * len(net.weights) * EPS / net.noise_std  # a rounding a layer and step, of the noise


@pytest.mark.skipif(ON_GPU, reason="a GPU has the shared memory it has")
@pytest.mark.parametrize("limit", [3500, 9000, 14000, 232448])
def test_what_fits_into_shared_memory_changes_no_bit(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for bytes_ in (limit, 49152):
        monkeypatch.setenv("FBK_EMULATED_SHARED", str(bytes_))
        net, x, y = start((20, 16, 12, 10), 60, 2, loss="cross_entropy", optimizer="momentum", lr=1e-3)
        results.append(learned(net, net.fit(x, y, steps=5, batch_size=16)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("cuts", [[20], [1] * 20, [7, 0, 13]])
@pytest.mark.parametrize("sizes", [(9, 8, 4, 3), (9, 8, 40, 33)], ids=["V", "P"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_cutting_a_run_changes_no_bit(sizes: tuple[int, ...], cuts: list[int], optimizer: str) -> None:
    results = []
    for parts in ([20], cuts):
        net, x, y = start(sizes, 23, 3, optimizer=optimizer, warmup=5)
        results.append(learned(net, torch.cat([net.fit(x, y, steps=n, batch_size=6) for n in parts])))
        assert net.step == 20
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_checkpoint_goes_from_one_engine_to_the_other() -> None:
    for options in ({}, {"optimizer": "adam"}, {"feedback": "direct"}):
        net, x, y = make((9, 8, 40, 33), 40, lr=1e-3, **options)
        cuda, *data = emulated.moved(net, x, y)
        cuda.fit(*data, steps=6, batch_size=8)
        state = {name: t.cpu() if isinstance(t, Tensor) else t for name, t in cuda.state_dict().items()}
        assert not any(name == "counters.0" and len(t) != 2 for name, t in state.items())
        net.load_state_dict(state)
        assert net.step == 6
        assert all(
            torch.equal(a, b.cpu()) for a, b in zip((*net.weights, *net.B, *net._V), (*cuda.weights, *cuda.B, *cuda._V), strict=True)
        )


@pytest.mark.parametrize("feedback", ["layerwise", "direct"])
def test_a_thousand_steps_are_those_of_the_cpp_engine(feedback: str) -> None:
    """To float32: both deviate from the modules in float64 as float32 modules do, which test_fused_mlp.py measures over fewer steps."""
    net, x, y = make((24, 16, 10, 5), 64, loss="cross_entropy", feedback=feedback, lr=1e-3, warmup=20)
    cuda, *data = emulated.moved(net, x, y)
    cuda.fit(*data, steps=1000, batch_size=16)
    with mock.patch.object(fused_mlp, "_C", _C):
        losses = net.fit(x, y, steps=1000, batch_size=16)
    assert losses[-50:].mean() < 0.9 * losses[:50].mean()
    for mine, theirs in zip((*cuda.weights, *cuda.B), (*net.weights, *net.B), strict=True):
        # each step's outputs differ by a rounding a layer in units of the noise, and what it did to the steps before adds like noise
        assert distance(mine.cpu(), theirs) < math.sqrt(1000) * 2 * len(net.weights) * EPS / net.noise_std


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize(("rule", "feedback"), [m for m in METHODS if m[0].perturbs], ids=names)
def test_samples_that_are_not_finite(rule: fb.Rule, feedback: str, loss: str, bad: float) -> None:
    for batch, sizes in ((10, (9, 8, 4, 3)), (6, (9, 8, 10, 12))):
        net, x, y = start(sizes, 20, 2, rule=rule, feedback=feedback, loss=loss, warmup=100)
        x[5] = bad
        with pytest.warns(UserWarning, match="non-finite"):
            losses = net.fit(x, y, steps=10, batch_size=batch)
        assert net.skipped == int((~losses.isfinite()).sum()) > 0
        assert all(t.isfinite().all() for t in (*net.B, *net._V))


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_ridge_beyond_float64_raises(blocks: int) -> None:
    for outputs, batch in ((33, 6), (12, 32)):
        net, x, y = start((9, 8, 40, outputs), 64, blocks, classes=False, warmup=3, rule=fb.Ridge(1.0), noise_std=0.5)
        net.fit(x, y, steps=2, batch_size=batch)
        before = [B.clone() for B in net.B]
        if net._inverted:
            y *= 1e8
        else:
            net._V[1].copy_(-1e9 * torch.eye(outputs, dtype=torch.float64))
        with pytest.raises(RuntimeError, match=r"step 2 is beyond float64.*gamma"):
            net.fit(x, y, steps=5, batch_size=batch)
        assert net.step == 3
        assert all(torch.equal(B, b) for B, b in zip(net.B, before, strict=True))


def test_inputs_need_not_be_aligned() -> None:
    results = []
    for shift in (0, 1):
        net, x, y = start((12, 8, 4), 23, 2)
        padded = torch.zeros(x.numel() + shift, device=x.device)
        padded[shift:] = x.flatten()
        results.append(learned(net, net.fit(padded[shift:].view(x.shape), y, steps=4, batch_size=6)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(ON_GPU, reason="a GPU has more multiprocessors")
def test_a_launch_that_cannot_be_raises() -> None:
    net, x, y = start((9, 8, 4, 3), 23, 5)
    with pytest.raises(RuntimeError, match="CUDA: invalid launch"):
        net.fit(x, y, steps=1, batch_size=6)
    net._blocks = 4
    net.fit(x, y, steps=1, batch_size=6)
    assert net.step == 1


@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
def test_training_is_on_the_current_stream() -> None:
    net, x, y = start((9, 8, 4, 3), 23)
    twin, *_ = emulated.moved(net)
    x2 = torch.empty_like(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)
        x2.copy_(x)
        losses = net.fit(x2, y, steps=5, batch_size=6)
    stream.synchronize()
    assert torch.equal(losses, twin.fit(x, y, steps=5, batch_size=6))
