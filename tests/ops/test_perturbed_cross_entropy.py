"""The fused loss: against the definition in float64, with what float32 allows the formula for dL and not a difference of losses."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import fbkernels as fb
import fbkernels.functional as fn
from fbkernels import ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 2.0**-24
BACKENDS = ("reference", "triton", "cpp")
KERNELS = ("triton",) if DEVICE == "cuda" else ("triton", "cpp")
SUM = 16  # units of EPS that exp, expm1, a division and a sum over up to 1,024 classes in halves may lose


def logits(n: int, K: int, size: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(n, K, generator=generator), torch.randint(K, (n,), generator=generator)


def at(t: Tensor, target: Tensor) -> Tensor:
    return t.gather(1, target.clamp_min(0)[:, None])


def loss_error(y: Tensor, target: Tensor) -> Tensor:
    """What float32 may lose of a loss, [N]: exp(y - top) is off by |y - top| roundings, and the difference to the top by one."""
    s, exponent = y.softmax(1), y.amax(1, keepdim=True) - y
    L = F.cross_entropy(y, target, reduction="none")
    return EPS * (SUM * (1 - at(s, target)[:, 0] + L) + (s * exponent).sum(1) + 2 * at(exponent, target)[:, 0])


def e_error(y: Tensor, target: Tensor) -> Tensor:
    """Of e: of a softmax, and at the target of the sum of the others."""
    s, exponent = y.softmax(1), y.amax(1, keepdim=True) - y
    error = EPS * s * (SUM + exponent + (s * exponent).sum(1, keepdim=True))
    error = error.scatter(1, target.clamp_min(0)[:, None], 0.0)
    return error.scatter(1, target.clamp_min(0)[:, None], error.sum(1, keepdim=True))


def change_error(y: Tensor, p: Tensor, target: Tensor) -> Tensor:
    """Of L(p) - L(y) by log1p(sum_k s_k expm1(x_k)), beyond 64 by the difference."""
    s, exponent, d = y.softmax(1), y.amax(1, keepdim=True) - y, p - y
    x = d - at(d, target)
    change = (F.cross_entropy(p, target, reduction="none") - F.cross_entropy(y, target, reduction="none")).abs()
    # x_k rounds by |d_k| + |d_t| + |x_k|, which tells as much as the perturbed softmax weighs it ...
    rounding = (p.softmax(1) * (d.abs() + at(d, target).abs() + x.abs())).sum(1)
    # ... and each of the terms of the sum by what made it, while the logarithm is that much flatter
    less, whole = (s * torch.expm1(x)).sum(1), (s * x.exp()).sum(1)
    terms = s * torch.where((less > -0.5)[:, None], torch.expm1(x).abs(), x.exp())
    near = EPS * (rounding + (terms * (SUM + exponent + (s * exponent).sum(1, keepdim=True))).sum(1) / whole + SUM * change)
    far = loss_error(y, target) + loss_error(p, target) + EPS * change
    return torch.where(x.abs().amax(1) > 64, far, near)


def check(y: Tensor, p: Tensor | None, target: Tensor, antithetic: bool = False, backend: str | None = None) -> None:
    takes = [b for b in KERNELS if b != "cpp" or y.dtype != torch.float16]
    for kernel in takes if backend is None else [backend]:
        check_on(kernel, y, p, target, antithetic)


def check_on(backend: str, y: Tensor, p: Tensor | None, target: Tensor, antithetic: bool) -> None:
    given = [t if t is None else t.to(DEVICE) for t in (y, p, target)]
    got = [t.cpu() for t in fn.perturbed_cross_entropy(*given, antithetic, backend=backend)]
    want = reference.perturbed_cross_entropy(y, p, target, antithetic)
    assert [t.dtype for t in got] == 4 * [torch.float32] + [torch.bool]
    assert [t.shape for t in got] == [t.shape for t in want]
    assert torch.equal(got[4], want[4])
    rows, kept, y = len(want[4]), (target != -100).double(), y.double()
    change = torch.zeros(rows, dtype=torch.float64)
    if p is not None and rows:
        parts = [change_error(y[:rows], part.double(), target[:rows]) for part in p.split(rows)]
        change = torch.stack(parts).mean(0) + EPS * want[2].abs()
    errors = loss_error(y, target) * kept, e_error(y, target) * kept[:, None], change * kept[:rows], EPS * want[3].abs()
    theirs = 4 * 2.0**-53 * (1 + max((float(t.abs().max()) for t in (y, p) if t is not None and t.numel()), default=0.0))
    for g, w, error in zip(got, want, errors, strict=False):
        assert ((g.double() - w).abs() <= error + theirs).all()


@st.composite
def calls(draw: Any) -> tuple[Any, ...]:
    n, K, seed = draw(st.integers(0, 9)), draw(st.integers(1, 130)), draw(st.integers(0, 99))
    y, target = logits(n, K, draw(st.sampled_from([0.1, 3.0, 30.0, 1e4])), seed)
    rows, antithetic = math.ceil(draw(st.floats(0, 1)) * n), draw(st.booleans())
    xi = torch.randn(rows, K, generator=torch.Generator().manual_seed(seed + 1)) * draw(st.sampled_from([1e-4, 0.05, 1.0, 30.0, 1e3]))
    return y, torch.cat((y[:rows] + xi, y[:rows] - xi)) if antithetic else y[:rows] + xi, target, antithetic


CASES = {"perturbed_cross_entropy": (lambda _: calls(), lambda call, backend: check(*call, backend))}


@pytest.mark.parametrize("K", [1, 2, 1000, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes_and_dtypes(K: int, dtype: torch.dtype) -> None:
    y, target = logits(5, 2 * K, 3.0, 0)
    y, target = y.to(dtype)[:, ::2], torch.tensor([0, K - 1, -100, K // 2, K // 3])  # strided
    check(y, y + 0.1 * torch.ones(5, K, dtype=dtype).cumsum(1).sin(), target)
    check(y, None, target)
    check(y[:0], None, target[:0])


def test_tiny_perturbations_keep_their_digits() -> None:
    """At sigma 1e-4 the losses agree in their digits: their difference in float32 is no loss change any more."""
    y, target = logits(64, 10, 3.0, 0)
    p = y + 1e-4 * torch.randn(64, 10)
    check(y, p, target)
    naive = F.cross_entropy(p, target, reduction="none") - F.cross_entropy(y, target, reduction="none")
    want, error = reference.perturbed_cross_entropy(y, p, target, False)[2], change_error(y.double(), p.double(), target)
    assert ((naive.double() - want).abs() > error).double().mean() > 0.5


def test_a_large_gain_or_loss_keeps_its_digits() -> None:
    """A sample that a perturbation of the logits puts right, or wrong: dL near its loss."""
    y = torch.tensor([[0.0, 40.0], [40.0, 0.0], [0.0, 20.0], [0.0, 1e4], [0.0, 60.0]])
    target = torch.zeros(5, dtype=torch.int64)
    check(y, y.flip(1), target)
    check(y, y + torch.tensor([60.0, 0.0]), target)
    check(torch.cat((y, y)), torch.cat((y.flip(1), y)), target.repeat(2), antithetic=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["clean", "perturbed"])
@pytest.mark.parametrize("backend", KERNELS)
def test_samples_that_are_not_finite_teach_nothing(backend: str, bad: float, where: str, antithetic: bool) -> None:
    y, target = logits(6, 5, 1.0, 0)
    p = (y + 0.1).repeat(1 + antithetic, 1)
    (y if where == "clean" else p)[2, 1] = bad
    (y if where == "clean" else p)[4, target[4]] = bad
    losses, e, dL, dy, ok = (
        t.cpu() for t in fn.perturbed_cross_entropy(y.to(DEVICE), p.to(DEVICE), target.to(DEVICE), antithetic, backend=backend)
    )
    want = reference.perturbed_cross_entropy(y, p, target, antithetic)
    assert torch.equal(ok, want[4])
    assert ok[[0, 1, 3, 5]].all() and not ok[4] and (not ok[2] or (antithetic and where == "clean" and bad < 0))
    assert not dL[~ok].any() and not dy[~ok].any()
    for got, expected in zip((losses, e, dL, dy), want, strict=False):
        assert torch.equal(got.isfinite(), expected.isfinite())
        torch.testing.assert_close(got[ok].double(), expected[ok], rtol=1e-5, atol=1e-6)


def test_targets_that_are_no_classes() -> None:
    y, _ = logits(6, 5, 1.0, 0)
    target = torch.tensor([0, 5, -1, -100, 2**62, 7])
    for backend in ("reference", "cpp"):
        with pytest.raises(IndexError, match="target" if backend == "cpp" else None):
            fn.perturbed_cross_entropy(y, y, target, backend=backend)
    losses, e, dL, dy, ok = (t.cpu() for t in fn.perturbed_cross_entropy(y.to(DEVICE), y.to(DEVICE), target.to(DEVICE), backend="triton"))
    assert ok.tolist() == [True, False, False, True, False, False]
    assert torch.equal(losses.isnan(), ~ok) and torch.equal(e.isnan().all(1), ~ok)
    assert losses[3] == 0 and not e[3].any() and not dL.any() and not dy.any()


def test_nothing_is_written_or_read_beyond() -> None:
    """Fewer rows than samples, between guards."""
    y, target = logits(7, 5, 1.0, 0)
    buffer = torch.full((3 + 2 * 3 + 3, 5), float("nan"))
    buffer[3:9] = y[:3].repeat(2, 1) + 0.1 * torch.randn(6, 5)
    check(y, buffer[3:9], target, antithetic=True)


@pytest.mark.parametrize("scale", [1.0, 0.3, float("inf")])
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_scale(backend: str, scale: float) -> None:
    """Of losses, e and dL; infinite where every target is ignored, and then nothing is ok, as in torch."""
    y, target = logits(6, 5, 1.0, 0)
    target[3:] = -100
    p, by = y + 0.1 * torch.randn(6, 5), torch.tensor(scale)
    got = fn.perturbed_cross_entropy(y.to(DEVICE), p.to(DEVICE), target.to(DEVICE), scale=by.to(DEVICE), backend=backend)
    want = reference.perturbed_cross_entropy(y, p, target, False, by)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.cpu().double(), w.double(), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_op(backend: str) -> None:
    y, target = (t.to(DEVICE if backend == "triton" else "cpu") for t in logits(6, 5, 1.0, 0))
    op = torch.ops.fbkernels.perturbed_cross_entropy.default
    torch.library.opcheck(op, (y, None, target, False), {"backend": backend})
    torch.library.opcheck(op, (y, y[:4] + 1, target, True), {"backend": backend, "scale": y[0, 0].clone()})
    torch.library.opcheck(op, (y.T.contiguous().T, y[:0], target, False), {"backend": backend})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(6)}, r"logits must be \[samples, classes\], got shape \(6,\)"),
        ({"logits": torch.zeros(6, 0)}, "logits must be"),
        ({"target": torch.zeros(5, dtype=torch.int64)}, r"target must be int64 of shape \(6,\), got torch.int64 of shape \(5,\)"),
        ({"target": torch.zeros(6, dtype=torch.int32)}, "target must be int64"),
        ({"perturbed": torch.zeros(7, 5)}, r"perturbed must be \[rows, 5\], rows up to 6, got shape \(7, 5\)"),
        ({"perturbed": torch.zeros(6, 4)}, "perturbed must be"),
        ({"perturbed": torch.zeros(5)}, "perturbed must be"),
        ({"perturbed": torch.zeros(5, 5), "antithetic": True}, "perturbed must be .* an even number up to 12"),
        ({"perturbed": None, "antithetic": True}, "perturbed must be given"),
        ({"scale": torch.ones(6)}, "scale must be 0-dim"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    good = {"logits": torch.zeros(6, 5), "perturbed": torch.zeros(6, 5), "target": torch.zeros(6, dtype=torch.int64), "antithetic": False}
    with pytest.raises(ValueError, match=message):
        fn.perturbed_cross_entropy(**(good | change))


# whole steps


def steps(backend: str, rule: fb.Rule, dtype: torch.dtype, criterion: Any, poison: bool, **options: Any) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5)).to(DEVICE, dtype)
    net = fb.convert(model, rule=rule, noise_std=1e-2, backend=backend, **options)
    loss, optimizer = fb.PerturbedLoss(criterion, net), torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for i in range(4):
        generator = torch.Generator().manual_seed(i)
        x, target = torch.randn(9, 4, generator=generator).to(DEVICE, dtype), torch.randint(5, (9,), generator=generator).to(DEVICE)
        target[[1, 7]] = -100
        if poison and i == 3:  # the weights of both are lost after that step, and B is not
            x[2] = float("nan")
        optimizer.zero_grad()
        losses.append(loss(net(x), target))
        losses[-1].sum().backward()
        optimizer.step()
    return net, losses


RULES = {"ridge": fb.Ridge(), "joint loss": fb.Joint(signal="loss"), "joint output": fb.Joint(signal="output"), "fixed": fb.Fixed()}
CRITERIA = {
    "mean": nn.CrossEntropyLoss(),
    "sum": functools.partial(F.cross_entropy, reduction="sum"),
    "none": nn.CrossEntropyLoss(reduction="none"),
}


OPTIONS: list[dict[str, Any]] = [{}, {"fraction": 0.5}, {"antithetic": True, "fraction": 0.5}, {"every": 2}]


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*non-finite")
@pytest.mark.parametrize(
    ("rule", "options", "criterion", "poison"),
    # in Triton's interpreter, so criterion and poison take turns, with each rule and with each of the options
    [(r, o, list(CRITERIA)[(i + j) % 3], (i + j) % 2 == 1) for i, r in enumerate(RULES) for j, o in enumerate(OPTIONS)],
    ids=str,
)
def test_training_is_that_of_the_reference(
    rule: str, options: dict[str, Any], criterion: str, poison: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    run = ops.perturbed_cross_entropy
    monkeypatch.setattr(ops, "perturbed_cross_entropy", lambda *a, **k: calls.append(1) or run(*a, **k))
    given = RULES[rule], CRITERIA[criterion], poison
    (fused, fused_losses), (plain, plain_losses), (exact, exact_losses) = (
        steps(backend, copy.deepcopy(given[0]), dtype, given[1], poison, **options)
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    )
    assert len(calls) == 4
    assert int(fused.feedback.skipped) == int(plain.feedback.skipped) == int(poison)
    pairs = [*zip(fused_losses, plain_losses, exact_losses, strict=True)]
    for name, B in fb.points(exact).items():
        pairs.append((fb.points(fused)[name].B, fb.points(plain)[name].B, B.B))
    for got, theirs, want in pairs:
        if want.isfinite().all():
            # the generic path has its losses from float64, so that is what rounds alone
            error, scale = (theirs.double() - want).abs().max(), want.abs().max()
            assert (got.double() - want).abs().max() <= 2 * error + 64 * EPS * scale
        else:
            assert torch.equal(got.isfinite(), want.isfinite())
