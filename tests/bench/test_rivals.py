"""The benchmarks' rivals do the same work as the library: same noise in, same weights and B out."""

import pytest
import torch
from torch import nn

import fbkernels as fb
from fbkernels.bench.rivals import ACTIVATIONS, HandMLP, LearnedFeedbackCNN, Pointwise, RidgeMLP, backprop, bare_backprop, cnn, mlp

SIZES, STD, LR, BATCH, STEPS = (9, 7, 3, 6, 5), 0.05, 1e-3, 4, 3


def close(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> None:
    """float32 GEMMs in another order: c eps sqrt(length) of the largest entry, here 4 eps sqrt(4096) over a few steps."""
    assert (a - b).abs().max() <= 256 * torch.finfo(torch.float32).eps * scale * b.abs().max()


def criterion(loss):
    def per_sample(output, target):
        if loss == "mse":
            return (output - target).square().sum(1) / 2
        return nn.functional.cross_entropy(output, target, reduction="none")

    return per_sample


def batch(loss):
    torch.manual_seed(1)
    return torch.rand(BATCH, SIZES[0]), torch.eye(SIZES[-1])[torch.arange(BATCH)] if loss == "cross_entropy" else torch.rand(
        BATCH, SIZES[-1]
    )


@pytest.mark.parametrize("rival", [backprop, bare_backprop])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("activations", [("tanh", "identity", "relu", "relu"), ("sigmoid", "tanh", "sigmoid", "identity")])
def test_hand_backprop(activations, loss, rival):
    torch.manual_seed(0)
    net = mlp(SIZES, activations)
    hand = HandMLP(net, activations, loss, BATCH, LR)
    x, target = batch(loss)
    per_sample = criterion(loss)
    step = rival(net, lambda o, t: per_sample(o, t).sum(), lambda: (x, target), LR)
    for _ in range(STEPS):
        step(), hand(x, target)
    for module, W, b in zip([m for m in net if isinstance(m, nn.Linear)], hand.W, hand.b, strict=True):
        close(W, module.weight), close(b, module.bias)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("solver", ["solve", "cholesky", "blocked"])
def test_hand_ridge(solver, loss):
    activations = ("tanh", "identity", "sigmoid", "relu" if loss == "mse" else "identity")
    torch.manual_seed(0)
    net = mlp(SIZES, activations)
    hand = RidgeMLP(net, activations, loss, BATCH, LR, STD, solver)
    learned = fb.convert(net, feedback="layerwise", rule=fb.Ridge(), noise_std=STD)
    per_sample = fb.PerturbedLoss(criterion(loss), learned)
    x, target = batch(loss)
    optimizer = torch.optim.SGD(learned.parameters(), LR)
    for step in range(STEPS):
        hand.draw = lambda step=step: [xi.copy_(fb.functional.noise(0, step, point, *xi.shape, 1.0)) for point, xi in enumerate(hand.xi)]
        optimizer.zero_grad()
        per_sample(learned(x), target).sum().backward()
        optimizer.step(), hand(x, target)
    for B, point in zip(hand.B, fb.points(learned).values(), strict=True):
        # the library's dL is float64, the rival's loses the digits of L / |dL|
        close(B, point.B, scale=100)
    for module, W in zip([m for m in learned if isinstance(m, nn.Linear)], hand.W, strict=True):
        close(W, module.weight)


@pytest.mark.parametrize("rule", ["ridge", "joint"])
def test_cnn(rule):
    torch.manual_seed(0)
    x, y = torch.rand(BATCH, 3, 32, 32), torch.arange(BATCH)
    net = cnn().to(memory_format=torch.channels_last)
    start = [p.detach().clone() for p in net.parameters()]
    learned = fb.convert(net, rule=fb.Ridge() if rule == "ridge" else fb.Joint(signal="output"), noise_std=STD)
    loss = fb.PerturbedLoss(nn.CrossEntropyLoss(), learned)
    optimizer = torch.optim.SGD(learned.parameters(), LR)
    twin = cnn().to(memory_format=torch.channels_last)
    twin.load_state_dict(net.state_dict())
    rival = LearnedFeedbackCNN(twin, x, y, rule, STD, LR)
    for step in range(2):
        rival.draw = lambda step=step: torch.cat(
            [fb.functional.noise(0, step, point, BATCH, units, 1.0) for point, units in enumerate(rival.sizes)], 1, out=rival.xi
        )
        optimizer.zero_grad()
        value = loss(learned(x), y)
        value.backward()
        optimizer.step()
        assert float(rival()) == pytest.approx(value.item(), rel=1e-5)
    for B, point in zip(rival.B.split(rival.sizes), fb.points(learned).values(), strict=True):
        close(B, point.B, scale=100)
    for before, ours, theirs in zip(start, net.parameters(), twin.parameters(), strict=True):
        assert not torch.equal(ours, before)
        rounding = 2 * torch.finfo(torch.float32).eps * before.abs().max()  # of the weight itself, once a step
        assert (theirs - ours).abs().max() <= rounding + 256 * torch.finfo(torch.float32).eps * 100 * (ours - before).abs().max()


@pytest.mark.parametrize("low_rank", [False, True])
def test_pointwise(low_rank):
    torch.manual_seed(0)
    z, q = (torch.randn(BATCH, 6, 8, 8).contiguous(memory_format=torch.channels_last) for _ in range(2))
    B, R, Q, w = torch.randn(96, 5), torch.randn(BATCH, 5) / 9, torch.randn(BATCH, 5) / 9, torch.randn(BATCH)
    h, where, p = (rival := Pointwise(z, q, B, R, Q, w, STD, low_rank))()
    pooled, places = nn.functional.max_pool2d(z.relu(), 3, 2, 1, return_indices=True)
    assert torch.equal(h, pooled) and torch.equal(where[h > 0], places[h > 0])
    xi = fb.reference.units(p - nn.functional.max_pool2d(q.relu(), 3, 2, 1))
    if not low_rank:
        close(xi, STD * rival.xi, scale=100)  # p - h loses the digits of h / std
    close(rival.B, fb.reference.feedback_update(B, xi, (R, Q), w), scale=100)


def test_pool_first_is_the_same_net():
    torch.manual_seed(0)
    net, x = cnn(), torch.rand(2, 3, 32, 32)
    other = cnn(pool_first=True)
    other.load_state_dict(dict(zip(other.state_dict(), net.state_dict().values(), strict=True)))
    close(other(x), net(x))


def test_every_activation_has_its_derivative():
    for name, pair in ACTIVATIONS.items():
        if pair is None:
            continue
        z = torch.linspace(-2, 2, 9, requires_grad=True)
        h = getattr(torch, name)(z)
        h.sum().backward()
        close(pair[1](torch.ones(9), h.detach(), grad_input=torch.empty(9)), z.grad)
