"""The CUDA kernels of the operators against the reference in float64: on a GPU, or where there is none on the CPU, emulated."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import emulated
import pytest
import torch
from test_perturbed_layers import example
from test_ridge_gain import agrees, batch, check_ill_conditioned
from torch import Tensor, nn

import fbkernels as fb
from fbkernels import ops
from fbkernels.ops import _op, tuning

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@pytest.fixture(scope="module", autouse=True)
def _cuda() -> Iterator[None]:
    with emulated.backend(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield


SIZES = [(64, 100), (64, 129), (70, 300), (2000, 50), (700, 130)]  # one block; blocks together; their sums in slices


@pytest.mark.parametrize("blocks", [1, 2, 7, 40])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_gains_by_many_blocks(n: int, m: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if ON_GPU and blocks > 1:
        pytest.skip("a GPU has the multiprocessors it has")
    monkeypatch.setenv("FBK_EMULATED_SMS", str(blocks))
    R, w, V = (t.to(DEVICE) for t in batch(n, m, 0, 4))
    agrees(ops.ridge_gain(R, w, V, 0.1, 0.99, backend="cuda"), R, w, V, 0.99)


def test_gains_of_many_regressors() -> None:
    R, w, V = (t.to(DEVICE) for t in batch(64, 1000, 0, 4))
    agrees(ops.ridge_gain(R, w, V, 0.1, 1.0, backend="cuda"), R, w, V, 1.0)


@pytest.mark.parametrize("m", [20, 150])
def test_gains_of_groups(m: int) -> None:
    R, w, V = (t.to(DEVICE) for t in batch(21, m, 0, 4))
    groups = torch.stack((R, 2 * R.roll(1, 1), R.flip(1)))
    for given_R, given_V in ((groups, V.expand(3, m, m)), (groups.mT.contiguous().mT, V.expand(3, m, m).clone())):
        agrees(ops.ridge_gain(given_R, w, given_V, 0.1, 0.9, backend="cuda"), given_R, w, given_V, 0.9)


@pytest.mark.parametrize("m", [10, 100, 128, 300])
@pytest.mark.parametrize("decay", [0, 3])
def test_ill_conditioned_statistics(m: int, decay: float) -> None:
    def gain(R: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        n, (out, scratch) = 32, (V.new_empty(m, m, device=DEVICE), V.new_empty(3 * 32 + 2 * m, m, device=DEVICE))
        single = [torch.empty(k, m, device=DEVICE) for k in (n, m, n)]
        _op.C.ridge_gain(R.to(DEVICE), torch.ones(n, device=DEVICE), V.to(DEVICE), out, *single, scratch, 0.1, 1.0)
        Q = scratch[n : 2 * n].cpu()  # before it rounds to float32
        assert torch.equal(Q.float(), single[0].cpu())
        return out.cpu(), Q

    check_ill_conditioned(m, decay, torch.float32, gain)


@pytest.mark.parametrize("m", [5, 64, 150])
@pytest.mark.parametrize(("last", "coupled"), [(0.0, 0.0), *itertools.product((-1.0, -1e-6, float("nan"), float("-inf")), (0.0, 0.5))])
def test_statistics_that_are_none_give_no_finite_gain(m: int, last: float, coupled: float) -> None:
    """One pivot of m is not positive, the last: on a GPU nothing may raise, and no gain may look right."""
    V = torch.eye(m, dtype=torch.float64)
    V[-1, :-1] = V[:-1, -1] = coupled
    V[-1, -1] = last + coupled**2 * (m - 1)
    R, w = torch.zeros(7, m), torch.ones(7)
    _, *gains = ops.ridge_gain(R.to(DEVICE), w.to(DEVICE), V.to(DEVICE), 0.1, 1.0, backend="cuda")
    assert not any(t.isfinite().any() for t in gains)


@pytest.mark.parametrize("place", [0, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_regressors_that_are_not_finite_give_no_finite_gain(bad: float, place: int) -> None:
    R, w, V = batch(7, 5, 0, 1)
    R[3, place] = bad
    _, *gains = ops.ridge_gain(R.to(DEVICE), w.to(DEVICE), V.to(DEVICE), 0.1, 1.0, backend="cuda")
    assert not any(t.isfinite().any() for t in gains)


def test_samples_do_not_drift() -> None:
    """The recursion over 500 samples a batch against one solve over all of it, B relative to its size."""
    generator = torch.Generator().manual_seed(0)
    n, m, batches = 500, 10, 200
    B, V = torch.zeros(3, m, dtype=torch.float64), 0.1 * torch.eye(m, dtype=torch.float64)
    gram, moment = V.clone(), torch.zeros(3, m, dtype=torch.float64)
    for _ in range(batches):
        R, lam = torch.randn(n, m, generator=generator), torch.randn(n, 3, generator=generator).double()
        given = R.to(DEVICE), torch.ones(n, device=DEVICE), V.to(DEVICE), 0.1, 1.0
        V, Q, M, _ = (t.cpu() for t in ops.ridge_gain(*given, backend="cuda"))
        B = B - B @ M.double() + lam.T @ Q.double()
        gram, moment = gram + R.double().T @ R.double(), moment + lam.T @ R.double()
    exact = torch.linalg.solve(gram, moment.T).T
    # gains round to float32 in each batch, independently
    assert float((B - exact).norm()) <= batches**0.5 * 4 * 2.0**-24 * float(exact.norm())


def everything() -> list[Tensor]:
    """What each kernel makes, of sizes over several tiles and chunks."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE)  # noqa: E731
    step, key = torch.tensor(5, device=DEVICE), (1, 2)
    x, dx, W, b, B = normal(70, 99), normal(45, 99), normal(131, 99), normal(131), normal(131, 77)
    update = {"B": B, "M": normal(77, 77), "G": normal(70, 77), "learned_step": step, "predicts": True}
    factors = {"B": B, "R": normal(70, 77), "Q": normal(70, 77), "w": normal(70), "learned_step": step}
    out = []
    for kind, riding in (("gaussian", update), ("rademacher", factors)):
        out += ops.perturbed_linear(x, dx, W, b, "gelu", step, *key, 45, 0.3, kind, backend="cuda", **riding)
    window = ("max", False, [3, 2], [2, 1], [1, 0])
    h, *_, winner, _, _ = ops.perturbed_pointwise(
        normal(5, 7, 9, 8), None, None, "tanh", *window, step, *key, 3, 0.3, "gaussian", antithetic=True, backend="cuda"
    )
    back = {"winner": winner, "size": [9, 8], "kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 0]}
    out += [h, winner, ops.feedback(normal(5, 40), normal(h[0].numel(), 40), h, "tanh", **back, backend="cuda")]
    layers = [[normal(m, n) for m, n in ((70, 99), (5, 130), (131, 7))] for _ in range(2)]
    new, residual = ops.mirror(*layers, step, 1, [2, 3, 2], 70, "gaussian", backend="cuda")
    out += [*new, residual]
    for n, m in SIZES:
        R, w, V = (t.to(DEVICE) for t in batch(n, m, 0, 1))
        out += ops.ridge_gain(R, w, V, 0.1, 0.99, backend="cuda")
    return out


def test_the_order_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, warps and lanes take their turns between two barriers in any order: one that is missing would show."""
    monkeypatch.setattr(tuning, "fastest", lambda *given: given[2][0])
    expected = everything()
    for order in (1, 2, 3):
        monkeypatch.setenv("FBK_EMULATED_ORDER", str(order))
        assert all(torch.equal(a, b) for a, b in zip(everything(), expected, strict=True))


def trained(rule: fb.Rule, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """A convolutional network after three steps."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.Tanh(), nn.AvgPool2d(2))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(20, 19), nn.GELU(), nn.Linear(19, 5)).to(DEVICE, dtype)
    net = fb.convert(model, rule=rule, noise_std=0.1, antithetic=True, backend=backend)
    criterion, optimizer = fb.PerturbedLoss(nn.CrossEntropyLoss(), net), torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        loss = criterion(net(torch.randn(9, 2, 14, 14).to(DEVICE, dtype)), torch.randint(5, (9,)).to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {k: v.double() for k, v in net.state_dict().items() if v.is_floating_point()}


@pytest.mark.parametrize("rule", [fb.Ridge(1.0), fb.LMS(1e-3), fb.Joint(signal="output"), fb.Joint(signal="loss")], ids=str)
@pytest.mark.usefixtures("one_thread")  # which sets the number back
def test_a_network_trains(rule: fb.Rule) -> None:
    """Rounding takes it from float64 as far as it takes torch in float32."""
    torch.set_num_threads(2)  # with one, a bias is off by 4.3 ulp, more than the bound
    exact, single, ours = (
        trained(copy.deepcopy(rule), dtype, backend)
        for dtype, backend in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "cuda"))
    )
    assert exact.keys() == ours.keys()
    for key, want in exact.items():
        error, limit = (float((states[key] - want).norm()) for states in (ours, single))
        assert error <= 2 * limit + 2.0**-22 * float(want.norm()), key


@pytest.mark.parametrize("change", [{}, {"dx": None}, {"B": None, "M": None, "G": None, "learned_step": None, "predicts": False}], ids=len)
def test_the_ops(change: dict[str, Any]) -> None:
    torch.library.opcheck(torch.ops.fbkernels.perturbed_linear.default, (), example("linear", **change) | {"backend": "cuda"})
    torch.library.opcheck(torch.ops.fbkernels.perturbed_conv2d.default, (), example("conv2d") | {"backend": "cuda"})
    R, w, V = (t.to(DEVICE) for t in batch(7, 5, 0, 1))
    torch.library.opcheck(
        torch.ops.fbkernels.mirror.default, ([R], [2 * R], torch.tensor(1, device=DEVICE), 1, [2], 9, "rademacher"), {"backend": "cuda"}
    )
    torch.library.opcheck(torch.ops.fbkernels.ridge_gain.default, (R[None], w, V[None], 0.1, 0.9), {"backend": "cuda"})
    torch.library.opcheck(torch.ops.fbkernels.feedback.default, (R, R, R[:, :1].expand(7, 7), "tanh"), {"backend": "cuda"})


def test_only_float32_by_name() -> None:
    given = example("linear", torch.bfloat16, B=None, M=None, G=None, learned_step=None, predicts=False)
    with pytest.raises(TypeError, match=r"backend 'cuda' takes float32, got torch\.bfloat16"):
        ops.perturbed_linear(**given, backend="cuda")
    d, x = torch.zeros(2, 3, 4, 4, device=DEVICE), torch.zeros(2, 5, 10, 10, device=DEVICE)
    window = ([1, 1], [1, 1], [1, 1], [2, 2], [2, 2], [0, 0])
    with pytest.raises(RuntimeError, match="backend 'cuda' has no kernel for pooled_weight_gradient"):
        ops.pooled_weight_gradient(d, d.byte(), x, torch.zeros(3, 5, 5, 5), *window, backend="cuda")
    assert fb.backends()["cuda"].startswith("available")
