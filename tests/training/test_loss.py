"""PerturbedLoss: its value, the gradients it hands out, scaling, compilation, and what must not slip past it."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import one_warning
from torch import Tensor, nn

import fbkernels as fb
from fbkernels.training.network import Network

K = 5


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6), nn.Sigmoid(), nn.Linear(6, K))


def cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, K)
    )


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, K))


def data(make: Any = mlp, n: int = 8, steps: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    shape = (n, 1, 6, 6) if make is cnn else (n, 4)
    return [(torch.randn(shape, generator=generator), torch.randint(K, (n,), generator=generator)) for _ in range(steps)]


def state(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def learned(net: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in state(net).items() if ".feedback." in k}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in net.parameters()]


# the value and backprop's gradients

X, Y = data()[0]
W = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0])
SOFT = torch.softmax(torch.linspace(-2, 2, 8 * K).view(8, K).sin(), 1)
IGNORED = torch.where(torch.arange(8) % 3 == 0, -100, Y)
CRITERIA: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "cross entropy": (nn.CrossEntropyLoss(), Y),
    "class weights": (nn.CrossEntropyLoss(W), Y),
    "ignore_index": (nn.CrossEntropyLoss(), IGNORED),
    "ignore_index, class weights": (nn.CrossEntropyLoss(W, ignore_index=2), Y),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), Y),
    "label smoothing, class weights, ignored": (nn.CrossEntropyLoss(W, label_smoothing=0.2), IGNORED),
    "soft targets": (nn.CrossEntropyLoss(), SOFT),
    "soft targets, class weights, label smoothing": (nn.CrossEntropyLoss(W, label_smoothing=0.1), SOFT),
    "mse": (nn.MSELoss(), SOFT),
    "smooth l1": (nn.SmoothL1Loss(), SOFT),
    "bce": (nn.BCEWithLogitsLoss(), SOFT),
    "bce, weights": (nn.BCEWithLogitsLoss(weight=W + 1, pos_weight=W), SOFT),
    "multi margin": (nn.MultiMarginLoss(weight=W + 1), Y),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", CRITERIA)
def test_value_and_backprop_of_any_criterion(name: str, reduction: str) -> None:
    criterion, target = CRITERIA[name]
    criterion = copy.deepcopy(criterion)
    criterion.reduction = reduction
    model = mlp().double()
    net = fb.convert(model, feedback="layerwise", rule=fb.WeightTransport())
    target = target.double() if target.is_floating_point() else target
    ours = fb.PerturbedLoss(criterion, net)
    expected = criterion.double()(model(X.double()), target)
    value = ours(net(X.double()), target)
    assert value.shape == expected.shape
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-15)
    weights = torch.arange(1.0, 1 + expected.numel()).double().view(expected.shape)
    want = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    got = torch.autograd.grad((value * weights).sum(), list(net.parameters()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-14)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]] = {
    "function": (F.cross_entropy, F.cross_entropy, Y),
    "function mse": (F.mse_loss, F.mse_loss, SOFT),
    "partial": (
        functools.partial(F.cross_entropy, weight=W, ignore_index=1),
        functools.partial(F.cross_entropy, weight=W, ignore_index=1),
        Y,
    ),
    "partial sum": (functools.partial(F.cross_entropy, reduction="sum"), functools.partial(F.cross_entropy, reduction="sum"), Y),
    "per-sample lambda": (lambda o, t: (o - t).square().sum(1) / 2, lambda o, t: (o - t).square().sum(1) / 2, SOFT),
    "captured class weights": (
        lambda o, t: F.cross_entropy(o, t, weight=W, reduction="none"),
        lambda o, t: F.cross_entropy(o, t, weight=W, reduction="none"),
        Y,
    ),
    "negative log likelihood": (
        lambda o, t: F.nll_loss(o.log_softmax(1), t, reduction="none"),
        lambda o, t: F.nll_loss(o.log_softmax(1), t, reduction="none"),
        Y,
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_backprop_of_functions(name: str) -> None:
    criterion, plain, target = FUNCTIONS[name]
    model = mlp()
    net = fb.convert(model, feedback="layerwise", rule=fb.WeightTransport())
    expected, value = plain(model(X), target), fb.PerturbedLoss(criterion, net)(net(X), target)
    # the class weights are float32 and the logits are rounded to float32 once: a handful of roundings
    torch.testing.assert_close(value, expected, rtol=16 * 2.0**-23, atol=1e-7)
    want = torch.autograd.grad(expected.sum(), list(model.parameters()))
    for g, w in zip(torch.autograd.grad(value.sum(), list(net.parameters())), want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=64 * 2.0**-23 * float(w.abs().max()) + 1e-9)


@pytest.mark.parametrize("criterion", [nn.KLDivLoss(reduction="batchmean"), nn.KLDivLoss(reduction="mean")], ids=lambda c: c.reduction)
def test_batchmean(criterion: nn.KLDivLoss) -> None:
    model = nn.Sequential(*mlp(), nn.LogSoftmax(1))
    net = fb.convert(model)
    torch.testing.assert_close(fb.PerturbedLoss(criterion, net)(net(X), SOFT), criterion(model(X), SOFT))


def test_segmentation() -> None:
    """One loss a position: a sample's loss is their sum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()
    x, y = torch.randn(4, 1, 5, 5).double(), torch.randint(3, (4, 3, 3))
    y[0, 0, 0] = -100
    for criterion in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]).double())):
        net = fb.convert(model, feedback="layerwise", rule=fb.WeightTransport())
        expected, value = criterion(model(x), y), fb.PerturbedLoss(criterion, net)(net(x), y)
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-15)
        want = torch.autograd.grad(expected, list(model.parameters()))
        for g, w in zip(torch.autograd.grad(value, list(net.parameters())), want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-14)
        direct = fb.convert(model)
        fb.PerturbedLoss(criterion, direct)(direct(x), y).backward()
        assert tuple(fb.points(direct)["0"].B.shape) == (4 * 9, 3 * 9)


class Changing(nn.Module):
    """A criterion that keeps something of each call, in every way that Python has."""

    def __init__(self) -> None:
        super().__init__()
        self.reduction = "mean"
        self.calls, self.seen, self.shift = 0, [], torch.ones(K)  # a plain tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("center", torch.zeros(K))
        self.cross_entropy = nn.CrossEntropyLoss(weight=torch.ones(K), reduction="none")

    def forward(self, out: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        self.last = len(out)
        self.count.add_(1)
        self.scale.mul_(0.9)
        self.center = 0.5 * self.center + out.detach().mean(0)
        losses = self.calls * self.scale * self.cross_entropy(out - self.center * self.shift, target)
        return losses.mean() if self.reduction == "mean" else losses


@pytest.mark.parametrize(
    ("feedback", "rule"),
    [("direct", fb.Joint()), ("direct", fb.SyntheticGradient(0.1)), ("layerwise", fb.LMS(0.1)), ("layerwise", fb.Fixed())],
    ids=str,
)
def test_a_criterion_that_changes_changes_once_a_step(feedback: str, rule: fb.Rule) -> None:
    plain, own = Changing(), Changing()
    net = fb.convert(mlp(), feedback=feedback, rule=rule)
    ours, seen = fb.PerturbedLoss(own, net), own.seen
    for k in range(3):
        plain.cross_entropy.label_smoothing = own.cross_entropy.label_smoothing = 0.1 * k
        plain.shift[0] = own.shift[0] = k
        expected, value = plain(mlp()(X), Y), ours(net(X), Y)
        torch.testing.assert_close(value, expected)
        fb.metrics.alignment(net, ours, X, Y)
    assert own.seen is seen
    assert (own.calls, own.seen, own.last, own.reduction) == (plain.calls, plain.seen, plain.last, "mean")
    for (name, t), (_, want) in zip(own.state_dict().items(), plain.state_dict().items(), strict=True):
        assert t.dtype == want.dtype, name
        torch.testing.assert_close(t, want)


class Counter:
    """What a trainer of one's own keeps: numbers, tensors, containers in one another, generators."""

    def __init__(self) -> None:
        self.calls, self.center, self.seen = 0, torch.zeros(K), [{"last": torch.zeros(K)}]
        self.rng, self.numpy, self.torch = random.Random(3), np.random.default_rng(3), torch.Generator().manual_seed(3)
        self.array = np.zeros(2)

    def __call__(self, out: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        self.array += 1
        self.center.mul_(0.9).add_(out.detach().mean(0))
        self.seen[0]["last"] = self.center + self.calls
        drawn = self.rng.random() + self.numpy.random() + torch.rand((), generator=self.torch)
        return F.cross_entropy(out - self.center, y, reduction="none") * (drawn + 0.01 * self.calls + self.array[0])

    def kept(self) -> list[Any]:
        states = self.rng.getstate()[1], self.numpy.bit_generator.state["state"]["state"], self.torch.get_state()
        return [self.calls, self.center, self.seen[0]["last"], self.array.tolist(), *states]


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner: Counter) -> None:
        self.inner = inner

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        return self.inner(out, y)


class Holding(nn.Module):
    def __init__(self, inner: Counter) -> None:
        super().__init__()
        self.parts = [{"part": inner}]

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return self.parts[0]["part"](out, y)


HELD = Counter()


def by_name(out: Tensor, y: Tensor) -> Tensor:
    return HELD(out, y)


def through_a_default(out: Tensor, y: Tensor, inner: Any = None) -> Tensor:
    return inner(out, y)


def closure(inner: Counter) -> Any:
    calls, center = 0, torch.zeros(K)

    def criterion(out: Tensor, y: Tensor) -> Tensor:
        nonlocal calls, center
        calls += 1
        center = center + out.detach().mean(0)
        return inner(out - center, y) + calls

    return criterion


def defaulted(inner: Counter) -> Any:
    function = types.FunctionType(through_a_default.__code__, globals(), "defaulted", (inner,))
    function.__module__ = __name__
    return function


def named(inner: Counter) -> Any:
    globals()["HELD"] = inner
    return by_name


def aliased(inner: Counter) -> Any:
    attributes = vars(inner)
    return lambda out, y: (attributes, inner(out, y))[1]


HOLDERS = [
    aliased,
    lambda inner: Slotted(inner).loss,
    Holding,
    named,
    closure,
    defaulted,
    lambda inner: functools.partial(lambda inner, out, y: inner(out, y), inner),
]


@pytest.mark.parametrize("holder", HOLDERS, ids=["its dict", "slots", "dicts", "a global", "a closure", "a default", "a partial"])
@pytest.mark.parametrize(
    ("feedback", "rule"), [("direct", fb.Joint()), ("direct", fb.SyntheticGradient(0.1)), ("layerwise", fb.LMS(0.1))], ids=repr
)
def test_what_a_criterion_reaches_changes_and_draws_once_a_step(feedback: str, rule: fb.Rule, holder: Any) -> None:
    inner, own = Counter(), Counter()
    plain, x = holder(inner), X.double()
    expected = [plain(mlp().double()(x), Y) for _ in range(3)]
    net = fb.convert(mlp().double(), feedback=feedback, rule=rule, noise_std=1e-6)
    ours = fb.PerturbedLoss(holder(own), net)
    for want in expected:
        losses = ours(net(x), Y)
        torch.testing.assert_close(losses, want)
        losses.mean().backward()
        if feedback == "direct" and rule.perturbs:
            assert net.feedback.points["0"].pending.loss_change.abs().max() < 1e-4
    torch.testing.assert_close(own.kept(), inner.kept())


class Bank:
    def __init__(self, size: int) -> None:
        self.bank = torch.zeros(size)

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        self.bank.add_(1)
        return F.cross_entropy(out, y, reduction="none")


def test_what_is_too_large_to_be_copied_each_step_may_not_be_written() -> None:
    net = fb.convert(mlp())
    small, large = Bank(10), Bank(2_000_000)
    fb.PerturbedLoss(small.loss, net)(net(X), Y)
    assert torch.equal(small.bank, torch.ones(10))
    with pytest.raises(ValueError, match=r"criterion writes into Bank.bank, of 2000000 elements.*: hold it as a buffer of a criterion"):
        fb.PerturbedLoss(large.loss, net)(net(X), Y)


class Unreachable(nn.Module):
    reduction = "mean"

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(out, y, reduction="none") * (1 + random.SystemRandom().random())
        return losses.mean() if self.reduction == "mean" else losses


def test_numbers_that_nobody_can_draw_again_are_told() -> None:
    net = fb.convert(mlp())
    with pytest.raises(ValueError, match=r"criterion Unreachable has a mean of .* of the same outputs .* draws random numbers"):
        fb.PerturbedLoss(Unreachable(), net)(net(X), Y)


def test_a_batch_norm_in_a_criterion_moves_on_once_a_step() -> None:
    """torch's kernel writes into its statistics and leaves their version as it was."""
    norm, own = nn.BatchNorm1d(K, affine=False), nn.BatchNorm1d(K, affine=False)
    loss = lambda norm: lambda out, y: F.cross_entropy(norm(out), y, reduction="none")  # noqa: E731
    net = fb.convert(mlp())
    ours, plain = fb.PerturbedLoss(loss(own), net), loss(norm)
    for _ in range(2):
        torch.testing.assert_close(ours(net(X), Y), plain(mlp()(X), Y))
    torch.testing.assert_close(dict(own.named_buffers()), dict(norm.named_buffers()))


def test_a_criterion_that_fails_is_what_it_was() -> None:
    own = Changing()
    before = copy.deepcopy(own)
    net = fb.convert(mlp())
    with pytest.raises(IndexError):
        fb.PerturbedLoss(own, net)(net(X), Y + K)
    assert (own.calls, own.seen, own.reduction, own.count.dtype) == (0, [], "mean", torch.int64)
    same(own.state_dict(), before.state_dict())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_the_criterion_says_at_the_step_counts(compiled: bool) -> None:
    criterion = nn.CrossEntropyLoss(torch.ones(K), label_smoothing=0.5)
    net = fb.convert(small(), rule=fb.Fixed())
    ours = fb.PerturbedLoss(criterion, net)
    run = torch.compile(lambda: ours(net(X), Y), fullgraph=True, backend="eager") if compiled else lambda: ours(net(X), Y)

    def same_value() -> None:
        torch.testing.assert_close(run(), criterion(small()(X), Y))

    same_value()
    criterion.weight[1] = 9
    same_value()
    criterion.weight = W.clone()
    same_value()
    criterion.label_smoothing = 0.0
    same_value()
    criterion.weight = None
    same_value()
    criterion.reduction = "sum"
    same_value()


class Focal(nn.Module):
    """With the attributes of cross entropy, and a plain mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.ignore_index, self.reduction = W + 1, -100, "mean"

    def forward(self, out: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(out, target, self.weight, ignore_index=self.ignore_index, reduction="none")
        losses = (1 - torch.exp(-losses)) ** 2 * losses
        return losses.mean() if self.reduction == "mean" else losses


def through_dropout(out: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return F.mse_loss(F.dropout(out), target, reduction=reduction)


def hidden_weights(out: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(out, target, W + 1, reduction=reduction)


def hidden_ignored(out: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(out, target, reduction=reduction)


def alignment_of_one(out: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Each sample's mean divides by the length of its target."""
    lengths = torch.full((len(out),), 3), 1 + torch.arange(len(out)) % 2
    return F.ctc_loss(out.log_softmax(1).repeat(3, 1, 1), target[:, None].expand(-1, 2) % 4 + 1, *lengths, reduction=reduction)


@pytest.mark.parametrize(
    ("criterion", "target"),
    [
        (Focal(), IGNORED),
        (functools.partial(F.multi_margin_loss, weight=W + 1), Y),
        (nn.MultiMarginLoss(weight=W + 1), Y),
        (hidden_ignored, Y),
        (nn.NLLLoss(W + 1), IGNORED),
    ],
    ids=["focal", "partial multi margin", "multi margin", "wrapped", "nll"],
)
def test_the_mean_is_the_criterions_own(criterion: Any, target: Tensor) -> None:
    net = fb.convert(mlp(), rule=fb.Fixed())
    expected, value = criterion(mlp()(X), target), fb.PerturbedLoss(criterion, net)(net(X), target)
    torch.testing.assert_close(value, expected)
    (e,) = torch.autograd.grad(value, net[4].weight)
    model = mlp()
    torch.testing.assert_close(e, torch.autograd.grad(criterion(model(X), target), model[4].weight)[0])


@pytest.mark.parametrize(
    ("criterion", "target"),
    [(hidden_weights, Y), (functools.partial(F.mse_loss, weight=SOFT), SOFT), (alignment_of_one, Y)],
    ids=["class weights", "weighted mse", "ctc"],
)
def test_a_mean_that_is_not_the_losses_is_refused(criterion: Any, target: Tensor) -> None:
    net = fb.convert(mlp())
    ours = fb.PerturbedLoss(criterion, net)
    with pytest.raises(ValueError, match=r"criterion \w+ has a mean of .*, and its per-sample losses have .*: give it reduction='none'"):
        ours(net(X), target)
    each = lambda out, target: criterion(out, target, reduction="none").reshape(len(out), -1).mean(1)  # noqa: E731
    assert fb.PerturbedLoss(each, net)(net(X), target).shape == (8,)


def test_a_mean_may_be_another_in_a_later_step() -> None:
    net = fb.convert(mlp())
    ours = fb.PerturbedLoss(hidden_ignored, net)
    ours(net(X), Y)
    with pytest.raises(ValueError, match="criterion hidden_ignored has a mean"):
        ours(net(X), IGNORED)


def test_a_random_criterion_is_taken() -> None:
    net = fb.convert(mlp())
    assert fb.PerturbedLoss(through_dropout, net)(net(X), SOFT).isfinite()


def test_eval_gives_the_criterions_own_value() -> None:
    for criterion in (nn.CrossEntropyLoss(), lambda o, t: F.cross_entropy(o, t)):
        net = fb.convert(mlp())
        ours = fb.PerturbedLoss(criterion, net)
        net.eval()
        before = state(net)
        assert torch.equal(ours(net(X), Y), criterion(net(X), Y))
        with torch.no_grad():
            assert torch.equal(ours(net(X) + 1, Y), criterion(net(X) + 1, Y))  # any logits will do
        same(state(net), before)


def test_the_value_does_not_depend_on_the_rule_or_the_noise() -> None:
    expected = F.cross_entropy(mlp()(X), Y)
    for options in (
        {"noise_std": 3.0},
        {"rule": fb.Fixed()},
        {"feedback": "layerwise"},
        {"antithetic": True},
        {"fraction": 0.2},
        {"warmup": 3},
    ):
        net = fb.convert(mlp(), **options)
        torch.testing.assert_close(fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(X), Y), expected, rtol=8 * 2.0**-23, atol=0)


# what backward does


def step(net: nn.Module, x: Tensor = X, y: Tensor = Y, scale: float = 1, **options: Any) -> Tensor:
    loss = fb.PerturbedLoss(nn.CrossEntropyLoss(**options), net)(net(x), y)
    (loss * scale).backward()
    return loss.detach()


def trained(make: Any = mlp, feedback: str = "direct", rule: fb.Rule | None = None, steps: int = 2, **options: Any) -> nn.Module:
    """A network whose B is no longer its start, with no update pending and no gradient."""
    net = fb.convert(make(), feedback=feedback, rule=rule or fb.LMS(0.1), **{"noise_std": 0.1, "seed": 3, **options})
    for x, y in data(make, steps=steps):
        step(net, x, y)
    fb.flush(net)
    net.zero_grad()
    return net


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_backward_uses_B(feedback: str) -> None:
    """Not W: with B = 0 the hidden layers get exactly zero; four times the top B (a power of two) is four times its layer's gradient."""
    grads = {}
    for factor in (0.0, 1.0, 4.0):
        net = trained(feedback=feedback)
        point = fb.points(net)["2"]
        point.B = point.B * factor
        step(net)
        grads[factor] = gradients(net)
    hidden, output = slice(2, 4), slice(4, 6)
    assert all(g.abs().max() > 0 for g in grads[1.0])
    assert all(not g.any() for g in grads[0.0][hidden])
    assert all(torch.equal(4 * g, h) for g, h in zip(grads[1.0][hidden], grads[4.0][hidden], strict=True))
    assert all(torch.equal(g, h) for g, h in zip(grads[1.0][output], grads[0.0][output], strict=True))
    if feedback == "direct":
        assert all(torch.equal(g, h) for g, h in zip(grads[1.0][:2], grads[0.0][:2], strict=True))
    else:
        assert all(not g.any() for g in grads[0.0][:2])


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_gradients_by_hand(feedback: str) -> None:
    net = trained(feedback=feedback)
    B1, B2 = (fb.points(net)[n].B.clone() for n in ("0", "2"))
    W2, b2, W3, b3 = (t.detach() for t in (net[2].weight, net[2].bias, net[4].weight, net[4].bias))
    h1 = net[0](X).tanh().detach()
    h2 = (h1 @ W2.T + b2).sigmoid()
    e = (h2 @ W3.T + b3).softmax(1) - F.one_hot(Y, K)
    step(net)
    delta2 = (e @ B2.T) * h2 * (1 - h2)
    delta1 = ((e if feedback == "direct" else delta2) @ B1.T) * (1 - h1.square())
    expected = [delta1.T @ X, delta1.sum(0), delta2.T @ h1, delta2.sum(0), e.T @ h2, e.sum(0)]
    for got, want in zip(gradients(net), expected, strict=True):
        torch.testing.assert_close(got, want / len(X), rtol=0, atol=100 * 2.0**-23 * float(want.abs().max()) / len(X))


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize(
    ("feedback", "rule"), [("direct", fb.Ridge()), ("direct", fb.Joint()), ("layerwise", fb.LMS(0.1)), ("layerwise", fb.Joint())], ids=str
)
def test_loss_scaling(feedback: str, rule: fb.Rule, make: Any) -> None:
    """A power of two scales W's gradients exactly, and B never sees it."""
    nets = [trained(make, feedback, copy.deepcopy(rule)) for _ in range(2)]
    for i in range(2):
        x, y = data(make, steps=4)[2 + i]
        for net, scale in zip(nets, (1, 2.0**16), strict=True):
            net.zero_grad()
            step(net, x, y, scale)
        for a, b in zip(*map(gradients, nets), strict=True):
            assert torch.equal(a * 2.0**16, b)
    same(*map(learned, nets))


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_grad_scaler(feedback: str) -> None:
    plain, scaled = (trained(feedback=feedback) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for net in (plain, scaled):
        optimizer, criterion = torch.optim.SGD(net.parameters(), 0.5), fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
        for x, y in data(steps=3):
            optimizer.zero_grad()
            loss = criterion(net(x), y)
            if net is plain:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
    same(state(plain), state(scaled))


def test_an_overflowing_scale_keeps_B_finite() -> None:
    for feedback in ("direct", "layerwise"):
        net = trained(feedback=feedback)
        before = {n: p.B.clone() for n, p in fb.points(net).items()}
        step(net, scale=float("inf"))
        for name, point in fb.points(net).items():
            assert point.B.isfinite().all()
            assert feedback == "direct" or torch.equal(point.B, before[name])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("feedback", "rule"), [("direct", fb.Ridge()), ("direct", fb.Joint()), ("layerwise", fb.LMS(0.1))], ids=str)
def test_gradient_accumulation(feedback: str, rule: fb.Rule, reduction: str) -> None:
    """Micro batches with .grad kept give the sum of their gradients, bit for bit, and the same B."""
    kept, apart = (trained(feedback=feedback, rule=copy.deepcopy(rule)) for _ in range(2))
    total: list[Tensor] = []
    for x, y in data(steps=4):
        step(kept, x, y, reduction=reduction)
        apart.zero_grad()
        step(apart, x, y, reduction=reduction)
        total = [t + g for t, g in zip(total, gradients(apart), strict=True)] if total else gradients(apart)
    assert all(torch.equal(a, b) for a, b in zip(gradients(kept), total, strict=True))
    same(learned(kept), learned(apart))


def test_micro_batches_are_the_batch_with_a_fixed_B() -> None:
    x, y = data(n=12)[0]
    whole, parts = (fb.convert(mlp(), rule=fb.Fixed()) for _ in range(2))
    step(whole, x, y, reduction="sum")
    for i in range(3):
        step(parts, x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4], reduction="sum")
    for a, b in zip(gradients(parts), gradients(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=24 * 2.0**-23 * float(b.abs().max()))


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_reduction_changes_the_scale_of_W_and_not_B(feedback: str) -> None:
    nets = [trained(feedback=feedback) for _ in range(3)]
    for net, reduction in zip(nets, ("mean", "sum", "none"), strict=True):
        out = fb.PerturbedLoss(nn.CrossEntropyLoss(reduction=reduction), net)(net(X), Y)
        (out.sum() if reduction == "none" else out).backward()
    mean, total, none = map(gradients, nets)
    assert all(torch.equal(8 * m, s) for m, s in zip(mean, total, strict=True))  # N = 8, a power of two
    assert all(torch.equal(n, s) for n, s in zip(none, total, strict=True))
    same(learned(nets[0]), learned(nets[1]))
    same(learned(nets[2]), learned(nets[1]))


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_autocast(feedback: str, make: Any) -> None:
    """Gradients and B under bf16 autocast are as far from float32's as torch's own bf16 gradients are."""
    x, y = data(make, n=32)[0]

    def error(run: Callable[[nn.Module], Any], build: Callable[[], nn.Module]) -> float:
        exact, rounded = build(), build()
        run(exact)
        with torch.autocast("cpu", torch.bfloat16):
            run(rounded)
        pairs = list(zip(gradients(exact), gradients(rounded), strict=True))
        assert all(b.dtype == torch.float32 for _, b in pairs)
        return max(float((a - b).norm() / a.norm()) for a, b in pairs if a.norm() > 1e-6)

    torchs = error(lambda m: F.cross_entropy(m(x), y).backward(), make)
    ours = error(lambda m: step(m, x, y), lambda: trained(make, feedback))
    assert 0 < torchs < 0.1
    # B is not W: its gradients are smaller and their relative error is larger; 2^-8 is bf16's rounding, 30 of them no more than chance
    assert 0 < ours < max(4 * torchs, 30 * 2.0**-8)
    net = trained(make, feedback)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(x), y)
    loss.backward()  # outside, as torch advises
    assert loss.dtype == torch.float32
    assert all(p.B.dtype == torch.float32 and p.B.isfinite().all() for p in fb.points(net).values())


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_warm_up_moves_B_alone(feedback: str) -> None:
    model = cnn()
    net = fb.convert(model, feedback=feedback, warmup=2, rule=fb.LMS(0.1), noise_std=0.1)
    optimizer = torch.optim.AdamW(net.parameters(), 0.1, weight_decay=0.1)
    weights = [p.detach().clone() for p in net.parameters()]
    for i, (x, y) in enumerate(data(cnn, steps=3)):
        before = learned(net)
        optimizer.zero_grad()
        step(net, x, y)
        optimizer.step()
        moved = [not torch.equal(p, w) for p, w in zip(net.parameters(), weights, strict=True)]
        assert not any(moved) if i < 2 else any(moved)
        after = learned(net)
        assert i == 0 or any(not torch.equal(after[k], before[k]) for k in after if k.endswith(".B"))


# what must not slip past


def functional_loss(net: nn.Module, criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda params, x, y: criterion(torch.func.functional_call(net, params, (x,)), y)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], dict[str, Tensor]], Any]] = {
    "grad": lambda f, p: torch.func.grad(f)(p, X, Y),
    "grad_and_value": lambda f, p: torch.func.grad_and_value(f)(p, X, Y),
    "vjp": lambda f, p: torch.func.vjp(lambda p: f(p, X, Y), p),
    "jvp": lambda f, p: torch.func.jvp(lambda p: f(p, X, Y), (p,), (p,)),
    "vmap": lambda f, p: torch.func.vmap(f, (None, 0, 0))(p, X[:, None], Y[:, None]),
    "vmap of grad": lambda f, p: torch.func.vmap(torch.func.grad(f), (None, 0, 0))(p, X[:, None], Y[:, None]),
    "jacrev": lambda f, p: torch.func.jacrev(f)(p, X, Y),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_are_refused(transform: str, feedback: str, compiled: bool) -> None:
    net = trained(feedback=feedback)
    f = functional_loss(net, fb.PerturbedLoss(nn.CrossEntropyLoss(), net))
    params = {k: v.detach() for k, v in net.named_parameters()}
    before, random = state(net), torch.get_rng_state()

    def run() -> Any:
        return TRANSFORMS[transform](f, params)

    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"inside a torch\.func transform"):
        torch.compile(run, backend="eager")() if compiled else run()
    same(state(net), before)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_forward_mode_is_refused(feedback: str) -> None:
    import torch.autograd.forward_ad as fwd

    net = trained(feedback=feedback)
    with fwd.dual_level():
        x = fwd.make_dual(X, torch.ones_like(X))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"forward|jvp|transform"):
            fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(x), Y)


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_double_backward_is_refused(feedback: str) -> None:
    net = trained(feedback=feedback)
    loss = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(X), Y)
    with pytest.raises(RuntimeError, match=r"twice|once_differentiable"):
        sum(g.square().sum() for g in torch.autograd.grad(loss, list(net.parameters()), create_graph=True)).backward()


def test_detached_logits_are_refused() -> None:
    net = trained()
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    with pytest.raises(ValueError, match="output of its own network's last training forward"):
        criterion(net(X).detach(), Y)


# non-finite samples


class Weighted:
    """Squared errors, one a sample, times a weight that is the target's last column."""

    def __call__(self, out: Tensor, target: Tensor) -> Tensor:
        return target[:, K] * (out - target[:, :K]).square().sum(1)


RULES = [
    ("direct", fb.Ridge()),
    ("direct", fb.LMS(0.1)),
    ("direct", fb.NormalizedLMS(0.5)),
    ("direct", fb.Joint()),
    ("direct", fb.Joint(signal="output")),
    ("direct", fb.SyntheticGradient(0.1)),
    ("layerwise", fb.Ridge()),
    ("layerwise", fb.LMS(0.1)),
    ("layerwise", fb.NormalizedLMS(0.5)),
    ("layerwise", fb.Joint()),
    ("layerwise", fb.SyntheticGradient(0.1)),
]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize(("feedback", "rule"), RULES, ids=str)
def test_non_finite_samples_are_skipped(feedback: str, rule: fb.Rule, bad: float) -> None:
    """B is that of a step in which these samples weigh nothing, whose e and dL are zero."""
    nets = []
    for broken in (False, True):
        net = trained(feedback=feedback, rule=copy.deepcopy(rule))
        target = torch.cat((SOFT, torch.ones(8, 1)), 1)
        target[[2, 5], K] = 0
        if broken:
            target[2, K], target[5, 1] = bad, bad
            target[5, K] = 1
        criterion = fb.PerturbedLoss(Weighted(), net)
        with one_warning() if broken else contextlib.nullcontext():
            criterion(net(X), target).sum().backward()
            nets.append(learned(net))
    clean, skipped = nets
    assert int(skipped["0.feedback.shared.skipped"]) == 2
    assert int(clean["0.feedback.shared.skipped"]) == 0
    if (feedback, type(rule)) == ("direct", fb.Joint) and rule.signal == "output":
        clean = {k: v for k, v in clean.items() if not k.endswith(".B")}  # needs no loss: see test_a_skipped_sample_teaches_nothing
    for key, value in clean.items():
        if not key.endswith("skipped"):
            assert skipped[key].isfinite().all()
            torch.testing.assert_close(skipped[key], value, rtol=0, atol=64 * torch.finfo(torch.float32).eps * float(value.abs().max()))


@pytest.mark.parametrize("where", ["loss", "input"])
def test_a_skipped_sample_teaches_nothing(where: str) -> None:
    """All samples of a step are broken: the direct rules leave B bit for bit."""
    for rule in (fb.Ridge(), fb.LMS(0.1), fb.NormalizedLMS(0.5), fb.Joint(), fb.Joint(signal="output"), fb.SyntheticGradient(0.1)):
        net = trained(rule=rule)
        before = learned(net)
        x, target = X.clone(), SOFT.clone()
        (target if where == "loss" else x).fill_(float("nan"))
        with one_warning():
            fb.PerturbedLoss(nn.MSELoss(), net)(net(x), target).backward()
        after = learned(net)
        assert int(after["0.feedback.shared.skipped"]) == 8
        for key in before:
            if not key.endswith(("step", "skipped")):
                assert torch.equal(after[key], before[key]), (rule, key)


def test_weight_mirror_does_not_look_at_a_broken_input() -> None:
    net = trained(feedback="layerwise", rule=fb.WeightMirror())
    before = learned(net)
    with one_warning():
        fb.PerturbedLoss(nn.MSELoss(), net)(net(X.index_fill(0, torch.tensor([5]), float("nan"))), SOFT).backward()
    after = learned(net)
    for key in before:
        if key.endswith(".B"):
            assert after[key].isfinite().all()
            assert not torch.equal(after[key], before[key])


def test_one_warning_in_all() -> None:
    net = trained()
    criterion = fb.PerturbedLoss(nn.MSELoss(), net)
    with one_warning():
        for _ in range(3):
            criterion(net(X), SOFT.index_fill(0, torch.tensor([1]), float("nan")))
    assert "3 samples skipped" in str(fb.summary(net))


# compiled


def run_steps(
    net: nn.Module, criterion: Callable[..., Tensor], call: Callable[..., Tensor], batches: list[Any]
) -> list[tuple[Tensor, list[Tensor]]]:
    optimizer, seen = torch.optim.SGD(net.parameters(), 0.1), []
    for x, y in batches:
        optimizer.zero_grad()
        loss = call(x, y)
        loss.backward()
        seen.append((loss.detach().clone(), gradients(net)))
        optimizer.step()
    return seen


@pytest.mark.parametrize(
    ("make", "rule", "backend"),
    [
        (mlp, fb.Ridge(), "aot_eager"),
        (mlp, fb.Joint(), "aot_eager"),
        (mlp, fb.Joint(signal="output"), "aot_eager"),
        (mlp, fb.Fixed(), "aot_eager"),
        (cnn, fb.LMS(0.1), "aot_eager"),
        (small, fb.Ridge(), "inductor"),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_compiles_to_one_graph(make: Any, rule: fb.Rule, backend: str) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    batches = data(make, steps=5)
    eager, net = (fb.convert(make(), rule=copy.deepcopy(rule), noise_std=0.1, seed=3) for _ in range(2))
    plain = fb.PerturbedLoss(nn.CrossEntropyLoss(), eager)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    compiled = torch.compile(lambda x, y: criterion(net(x), y), fullgraph=True, backend=backend)
    expected = run_steps(eager, plain, lambda x, y: plain(eager(x), y), batches)
    got = run_steps(net, criterion, compiled, batches[:2])
    frames = counters["stats"]["unique_graphs"]
    got += run_steps(net, criterion, compiled, batches[2:])
    assert counters["stats"]["unique_graphs"] == frames, "recompiled after the second step"
    for i, ((loss, grads), (want, wants)) in enumerate(zip(got, expected, strict=True)):
        # the same arithmetic in another order, and W carries it from step to step
        torch.testing.assert_close(loss, want, rtol=32 * (i + 1) * 2.0**-23, atol=0)
        # of the net's largest gradient: that of a bias before batch normalisation is zero but for the rounding of its sum
        largest = max(float(w.abs().max()) for w in wants)
        for g, w in zip(grads, wants, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=500 * (i + 1) * 2.0**-23 * largest)
    ours, theirs = learned(net), learned(eager)
    assert list(ours) == list(theirs)
    for key, want in theirs.items():
        if want.is_floating_point():
            # w = dL / sigma^2 magnifies the rounding of dL: eps * |logits| / (sigma |gradient|)
            torch.testing.assert_close(ours[key], want, rtol=0, atol=2e-3 * float(want.abs().max()))
        else:
            assert torch.equal(ours[key], want)


@pytest.mark.parametrize(
    ("feedback", "rule"), [("direct", fb.Joint()), ("layerwise", fb.WeightMirror(samples=8))], ids=["direct", "layerwise"]
)
def test_networks_of_several_sizes_compile(feedback: str, rule: fb.Rule) -> None:
    """Dynamo leaves sizes open that another call of the same code has changed, and a placement needs them."""

    def compiled(net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
        return torch.compile(lambda x, y: criterion(net(x), y), fullgraph=True, backend="aot_eager")

    for size, n in ((3, 5), (4, 7), (6, 4)):
        plain = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * (size - 1) ** 2, 6), nn.ReLU(), nn.Linear(6, 3))
        eager, net = (fb.convert(plain, feedback=feedback, rule=copy.deepcopy(rule)) for _ in range(2))
        ours, theirs = compiled(net), fb.PerturbedLoss(nn.CrossEntropyLoss(), eager)
        for rows in (n, n, n + 2):
            x, y = torch.randn(rows, 1, size, size), torch.randint(3, (rows,))
            got = torch.autograd.grad(ours(x, y), [*net.parameters()])
            want = torch.autograd.grad(theirs(eager(x), y), [*eager.parameters()])
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@given(n=st.integers(1, 12), seed=st.integers(0, 2**63 - 1), fraction=st.floats(0.05, 1), antithetic=st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_batch_size_and_part(n: int, seed: int, fraction: float, antithetic: bool) -> None:
    net = fb.convert(mlp(), seed=seed, fraction=fraction, antithetic=antithetic)
    x, y = data(n=n)[0]
    loss = step(net, x, y)
    torch.testing.assert_close(loss, F.cross_entropy(net.eval()(x), y).detach(), rtol=8 * 2.0**-23, atol=1e-7)
    assert all(p.B.isfinite().all() and p.B.any() for p in fb.points(net).values())


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(W)], ids=["ignored", "weights"])
def test_both_streams_have_one_scale(criterion: nn.Module) -> None:
    """A mean over the targets that count is the same mean for the part of the batch that is perturbed: here by nothing."""
    net = fb.convert(mlp().double(), rule=fb.Ridge(), noise_std=1e-3, fraction=0.5)
    target = torch.where(torch.arange(8) < 3, -100, Y)
    logits = net(X.double())
    net.feedback.current.changes[0] = torch.zeros(4, logits.shape[1], dtype=logits.dtype)
    loss_change = []
    net.feedback.measure = lambda step, e, dL, *rest: loss_change.append(dL) or Network.measure(net.feedback, step, e, dL, *rest)
    fb.PerturbedLoss(criterion, net)(logits, target)
    assert not loss_change[0].any()


# losses of more than the output, of other samples, and random ones

LOG_VAR = nn.Parameter(torch.zeros(2, dtype=torch.float64))
MEASURING = [("layerwise", fb.LMS(1e-3)), ("direct", fb.Fixed()), ("direct", fb.Joint())]


def weighed(out: Tensor, y: Tensor) -> Tensor:
    parts = F.cross_entropy(out, y, reduction="none"), out.square().mean(1)
    return sum(torch.exp(-v) * part + v for v, part in zip(LOG_VAR, parts, strict=True))


def contrasted(out: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(out, dim=1)
    return F.cross_entropy(z @ z.T - 9 * torch.eye(len(z), dtype=z.dtype), y.roll(1), reduction="none")


@pytest.mark.parametrize(("feedback", "rule"), MEASURING, ids=repr)
def test_weights_of_a_loss_and_a_target_get_their_gradient(feedback: Any, rule: fb.Rule) -> None:
    plain, x = mlp().double(), X.double()
    net = fb.convert(plain, feedback=feedback, rule=rule)
    target = nn.Parameter(SOFT.double())
    for criterion, y, leaf in ((weighed, Y, LOG_VAR), (nn.MSELoss(), target, target), (nn.MSELoss(), 2 * target, target)):
        loss = fb.PerturbedLoss(criterion, net)
        for _ in range(2):
            leaf.grad = None
            loss(net(x), y).mean().mul(3.0).backward(retain_graph=True)
            (want,) = torch.autograd.grad(criterion(plain(x), y).mean() * 3.0, leaf, retain_graph=True)
            torch.testing.assert_close(leaf.grad, want)


@pytest.mark.parametrize(("feedback", "rule"), MEASURING[1:], ids=repr)
def test_weights_of_samples_whose_losses_depend_on_each_other(feedback: Any, rule: fb.Rule) -> None:
    plain, x, y = mlp().double(), X.double(), torch.arange(len(X))
    net = fb.convert(plain, feedback=feedback, rule=rule)
    weights = torch.tensor([1.0, 0.0, 0.0, 3.0, 0.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    loss = fb.PerturbedLoss(contrasted, net)
    for w in (weights, weights.flip(0)):
        net.zero_grad()
        (loss(net(x), y) * w).sum().backward()
        want = torch.autograd.grad((contrasted(plain(x), y) * w).sum(), [*plain[-1].parameters()])
        torch.testing.assert_close([p.grad for p in net[-1].parameters()], [*want])


def test_losses_that_depend_on_each_other_need_equal_weights_where_layers_regress() -> None:
    net = fb.convert(mlp(), feedback="layerwise", rule=fb.LMS(1e-3))
    loss = fb.PerturbedLoss(contrasted, net)
    loss(net(X), torch.arange(8)).mean().backward()
    with pytest.raises(RuntimeError, match="need equal weights where B learns from errors of layers"):
        (loss(net(X), torch.arange(8)) * torch.arange(8)).sum().backward()


def sampled(out: Tensor, y: Tensor) -> Tensor:
    return F.dropout(out, 0.5).square().sum(1) + out.gather(1, torch.randint(K, (len(y), 1)))[:, 0]


@pytest.mark.parametrize("how", [{}, {"antithetic": True}, {"fraction": 0.5}, {"fraction": 0.5, "antithetic": True}], ids=repr)
def test_a_random_criterion_draws_alike_for_both_streams(how: dict[str, Any]) -> None:
    net = fb.convert(mlp().double(), rule=fb.LMS(1e-3), noise_std=1e-6, **how)
    loss = fb.PerturbedLoss(sampled, net)
    for _ in range(2):
        torch.manual_seed(1)
        loss(net(X.double()), Y).mean().backward()
        drawn = torch.rand(1)
        assert net.feedback.points["0"].pending.loss_change.abs().max() < 1e-4
        torch.manual_seed(1)
        sampled(torch.zeros(8, K, dtype=torch.float64), Y)
        assert drawn == torch.rand(1)
