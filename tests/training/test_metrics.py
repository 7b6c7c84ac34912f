"""fb.metrics: how close learned feedback is to backprop."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fbkernels as fb

CE = nn.CrossEntropyLoss()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6), nn.Sigmoid(), nn.Linear(6, 5))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(6, 5),
    )  # fmt: skip


def train(net: nn.Module, x: Tensor, y: Tensor, steps: int = 4) -> None:
    criterion, optimizer = fb.PerturbedLoss(CE, net), torch.optim.SGD(net.parameters(), 0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(net(x), y).backward()
        optimizer.step()


def angle(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().flatten().double(), b.detach().flatten().double()
    return math.degrees(math.acos(max(-1.0, min(1.0, float(a @ b / a.norm() / b.norm())))))


# the arc cosine of 1 - k eps is sqrt(2 k eps) rad; k = 100 roundings
ZERO = math.degrees(math.sqrt(2 * 100 * 2.0**-52))


@pytest.mark.parametrize("make", [mlp, cnn])
def test_weight_transport_is_backprop(make: Any) -> None:
    x, y = torch.randn(9, 4) if make is mlp else torch.randn(9, 3, 6, 6), torch.arange(9) % 5
    net = fb.convert(make(), feedback="layerwise", rule=fb.WeightTransport())
    rows = fb.metrics.alignment(net, CE, x, y)
    assert list(rows) == list(fb.points(net))
    for row in rows.values():
        assert row["angle"] <= ZERO
        assert row["update_angle"] <= ZERO
        assert row["weight_angle"] <= ZERO
        assert row["norm_ratio"] == pytest.approx(1, rel=1e-12)
        assert row["sign_congruence"] == 1
        assert row["relative_error"] == 0
        assert row["projected_error"] == 0


def true_gradients(model: nn.Sequential, x: Tensor, y: Tensor, after: tuple[int, ...]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Autograd's dL/dh after the named layers, of the summed loss; e; and the parameters' gradient."""
    h, hidden = x.double(), []
    for i, module in enumerate(copy.deepcopy(model).double()):
        h = module(h)
        if i in after:
            hidden.append(h)
    (*grads, e) = torch.autograd.grad(F.cross_entropy(h, y, reduction="sum"), (*hidden, h))
    return grads, e, h


def test_direct_numbers() -> None:
    model, x, y = mlp(), torch.randn(9, 4), torch.arange(9) % 5
    net = fb.convert(model, rule=fb.LMS(0.3), noise_std=0.1)
    train(net, x, y)
    rows = fb.metrics.alignment(net, CE, x, y)
    grads, e, _ = true_gradients(model, x, y, (1, 3))
    assert list(rows) == ["0", "2"]
    for (name, row), g in zip(rows.items(), grads, strict=True):
        B = fb.points(net)[name].B.double()
        learned = e @ B.T
        W = torch.linalg.lstsq(e, g, driver="gelsd").solution.T
        assert row["angle"] == pytest.approx(angle(learned, g), abs=1e-9)
        assert row["norm_ratio"] == pytest.approx(float(learned.norm() / g.norm()), rel=1e-9)
        assert row["weight_angle"] == pytest.approx(angle(B, W), abs=1e-7)
        assert row["relative_error"] == pytest.approx(float((W - B).norm() / W.norm()), rel=1e-7)
        assert row["projected_error"] == pytest.approx(float(((W - B) @ e.T).norm() / (W @ e.T).norm()), rel=1e-7)
        assert row["sign_congruence"] == pytest.approx(float((B.sign() * W.sign() + 1).mean() / 2), abs=1e-12)
        assert 0.5 < row["angle"] < 180
    first = model[0](x).double().tanh()
    for learned_h, g, key in ((e @ fb.points(net)["0"].B.double().T, grads[0], "0"),):
        slope = 1 - first.square()
        update = [torch.cat(((d * slope).T.matmul(x.double()).flatten(), (d * slope).sum(0))) for d in (learned_h, g)]
        assert rows[key]["update_angle"] == pytest.approx(angle(*update), abs=1e-4)  # float32 activities in this test's slope


def test_layerwise_numbers() -> None:
    model, x, y = mlp(), torch.randn(9, 4), torch.arange(9) % 5
    net = fb.convert(model, feedback="layerwise", rule=fb.LMS(0.3), noise_std=0.1)
    train(net, x, y)
    rows = fb.metrics.alignment(net, CE, x, y)
    (g1, g2), e, _ = true_gradients(model, x, y, (1, 3))
    B1, B2 = (fb.points(net)[n].B.double() for n in ("0", "2"))
    h1 = torch.tanh(x.double() @ model[0].weight.double().T + model[0].bias.double())
    h2 = torch.sigmoid(h1 @ model[2].weight.double().T + model[2].bias.double())
    delta = (e @ B2.T) * h2 * (1 - h2)
    W1, W2 = model[2].weight.detach().double().T, model[4].weight.detach().double().T
    for name, learned, true, B, W, r in (("0", delta @ B1.T, g1, B1, W1, delta), ("2", e @ B2.T, g2, B2, W2, e)):
        row = rows[name]
        assert row["angle"] == pytest.approx(angle(learned, true), abs=1e-9)
        assert row["norm_ratio"] == pytest.approx(float((learned.norm() / true.norm()).detach()), rel=1e-9)
        assert row["weight_angle"] == pytest.approx(angle(B, W), abs=1e-9)
        assert row["relative_error"] == pytest.approx(float((W - B).norm() / W.norm()), rel=1e-9)
        assert row["projected_error"] == pytest.approx(float(((W - B) @ r.T).norm() / (W @ r.T).norm()), rel=1e-9)
        assert row["sign_congruence"] == pytest.approx(float((B.sign() * W.sign() + 1).mean() / 2), abs=1e-12)


def test_angles_are_unfolded_and_the_authors_are_folded() -> None:
    x, y = torch.randn(9, 4), torch.arange(9) % 5
    net = fb.convert(mlp(), feedback="layerwise", rule=fb.Fixed())
    train(net, x, y, 1)
    for point, layer in zip(fb.points(net).values(), (2, 4), strict=True):
        point.B = -net[layer].weight.detach().T
    rows = fb.metrics.alignment(net, CE, x, y)
    assert rows["2"]["angle"] >= 180 - ZERO
    assert rows["2"]["weight_angle"] >= 180 - ZERO
    assert rows["0"]["angle"] <= ZERO  # twice reversed
    assert rows["2"]["sign_congruence"] == 0
    folded = fb.metrics.authors_folded_angle(net, CE, x, y)
    assert list(folded) == ["0", "2"]
    assert max(folded.values()) <= ZERO
    # sample 0 alone counts
    other = fb.metrics.authors_folded_angle(net, CE, torch.cat((x[:1], torch.randn(8, 4))), y)
    assert other == folded


@pytest.mark.parametrize("metric", [fb.metrics.alignment, fb.metrics.authors_folded_angle], ids=lambda f: f.__name__)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("feedback", "rule"), [("direct", fb.Ridge()), ("direct", fb.Joint()), ("layerwise", fb.Ridge())], ids=str)
def test_nothing_is_touched_and_a_pending_update_counts(feedback: str, rule: fb.Rule, training: bool, metric: Any) -> None:
    x, y = torch.randn(9, 3, 6, 6), torch.arange(9) % 5
    model = cnn()
    nets = [fb.convert(copy.deepcopy(model), feedback=feedback, rule=copy.deepcopy(rule), noise_std=0.1) for _ in range(2)]
    measured, alone = nets
    for net in nets:
        torch.manual_seed(1)
        train(net, x, y)  # leaves an update pending
    for net in nets:
        net.train(training)
    flushed = copy.deepcopy(alone)
    fb.flush(flushed)
    versions = [(id(t), t._version) for t in measured.parameters()]
    grads = [p.grad.clone() for p in measured.parameters()]
    random = torch.get_rng_state()
    rows = metric(measured, CE, x, y)
    assert torch.equal(torch.get_rng_state(), random)
    assert [(id(t), t._version) for t in measured.parameters()] == versions
    assert all(torch.equal(p.grad, g) for p, g in zip(measured.parameters(), grads, strict=True))
    assert all(m.training == training for m in measured.modules())
    assert str(metric(flushed, CE, x, y)) == str(rows)  # as text, in which nan equals nan
    for net in nets:
        net.train()
        torch.manual_seed(2)
        train(net, x, y)
    for (k, a), (j, b) in zip(measured.state_dict().items(), alone.state_dict().items(), strict=True):
        assert k == j
        assert torch.equal(a, b), k


@pytest.mark.parametrize("when", ["forward", "loss", "backward"])
@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_in_the_middle_of_a_step(feedback: str, when: str) -> None:
    x, y = torch.randn(9, 4), torch.arange(9) % 5
    nets = [fb.convert(mlp_of(3), feedback=feedback, rule=fb.LMS(0.3), noise_std=0.1) for _ in range(2)]
    for net, measure in zip(nets, (True, False), strict=True):
        train(net, x, y, 2)
        net.zero_grad()
        out = net(x)
        at = lambda now: fb.metrics.alignment(net, CE, x, y) if measure and now == when else None  # noqa: B023, E731
        at("forward")
        loss = fb.PerturbedLoss(CE, net)(out, y)
        at("loss")
        loss.backward()
        at("backward")
        train(net, x, y, 1)
    for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def mlp_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return mlp()


def test_what_a_rule_does_not_have_is_nan() -> None:
    x, y = torch.randn(9, 4), torch.arange(9) % 5
    net = fb.convert(mlp(), rule=fb.NodePerturbation(), noise_std=1e-4)
    train(net, x, y, 1)
    for row in fb.metrics.alignment(net, CE, x, y).values():
        assert math.isnan(row["weight_angle"])
        assert math.isnan(row["sign_congruence"])
        assert 0 < row["angle"] < 180
        assert row["norm_ratio"] > 0


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_a_diverged_network_has_nan_angles(feedback: str) -> None:
    net = fb.convert(mlp(), feedback=feedback)
    x, y = torch.randn(8, 4), torch.randint(5, (8,))
    train(net, x, y)
    with torch.no_grad():
        next(net.parameters()).fill_(math.nan)
    rows = fb.metrics.alignment(net, CE, x, y)
    assert len(rows) == 2
    assert all(math.isnan(row["angle"]) for row in rows.values())


def test_the_criterion_may_be_the_perturbed_loss() -> None:
    x, y = torch.randn(9, 4), torch.arange(9) % 5
    net = fb.convert(mlp(), rule=fb.LMS(0.3))
    train(net, x, y)
    assert fb.metrics.alignment(net, fb.PerturbedLoss(CE, net), x, y) == fb.metrics.alignment(net, CE, x, y)
    # the mean's 1/N changes no direction and no ratio
    assert fb.metrics.alignment(net, nn.CrossEntropyLoss(reduction="sum"), x, y)["0"]["angle"] == pytest.approx(
        fb.metrics.alignment(net, CE, x, y)["0"]["angle"], abs=1e-9
    )


@pytest.mark.parametrize("metric", [fb.metrics.alignment, fb.metrics.authors_folded_angle])
def test_a_plain_network_is_refused(metric: Any) -> None:
    with pytest.raises(TypeError, match=r"net must be a network converted by fbkernels.convert, got Sequential"):
        metric(mlp(), CE, torch.randn(2, 4), torch.tensor([0, 1]))
