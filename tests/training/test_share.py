"""Places of a map that share their noise and their row of B: ``convert(share=)``."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fbkernels as fb
from fbkernels import ops, reference
from fbkernels.lab.models import resnet18

RULES = [fb.Ridge(0.1), fb.LMS(0.01), fb.Joint(0.2), fb.Joint(0.2, "output"), fb.Fixed()]


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    first = (nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh())
    return nn.Sequential(
        *first, nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 3 * 2, 6), nn.Tanh(), nn.Linear(6, 5)
    ).to(dtype)


def data(n: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 2, 7, 6, dtype=dtype), torch.arange(n) % 5


def steps(net: nn.Module, x: Tensor, y: Tensor, count: int = 1) -> None:
    criterion, optimizer = fb.PerturbedLoss(nn.CrossEntropyLoss(), net), torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(count):
        loss = criterion(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@given(shape=st.lists(st.integers(1, 7), min_size=2, max_size=4), share=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_patches(shape: list[int], share: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    small = reference.patches(shape, share)
    u = torch.randn(3, math.prod(small), generator=generator, dtype=torch.float64)
    h = reference.layout(u, (3, *shape), True, share)
    assert h.shape == (3, *shape)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, len(shape)).tolist():
        patch = [place[0], *(i // min(share, n) for i, n in zip(place[1:], shape[1:], strict=True))]
        assert torch.equal(h[(slice(None), *place)], reference.layout(u, (3, *small), True)[(slice(None), *patch)])
    t = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close((h * t).sum(), (u * reference.units(t, True, share)).sum())  # one is the other's adjoint


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_alone_nothing_changes(rule: fb.Rule) -> None:
    x, y = data()
    nets = [fb.convert(network(), rule=copy.deepcopy(rule), **given) for given in ({}, {"share": 1})]
    for net in nets:
        steps(net, x, y, 3)
    a, b = (net.state_dict() for net in nets)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("share", [2, 3, "channel"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_step_is_that_of_the_summed_units(rule: fb.Rule, share: Any) -> None:
    """The definition with the patches as a matrix S [places, patches]: p = h + xi S^T, lam of S^T dL/dh, and the mean back through S."""
    x, y = data()
    net = fb.convert(network(), rule=copy.deepcopy(rule), share=share, noise_std=0.1)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(reduction="sum"), net)
    out = net(x)
    change = net.feedback.current.changes[0]
    criterion(out, y).backward()
    points = list(fb.points(net).values())
    sizes = [(3, 7, 6), (4, 3, 2)]
    s = 99 if share == "channel" else share
    assert [p.units for p in points] == [*(c * -(-h // s) * -(-w // s) for c, h, w in sizes), 6]

    plain, step = network(), torch.tensor(0)
    S = [torch.eye(6, dtype=torch.float64)] * 3
    for i, (p, size) in enumerate(zip(points[:2], sizes, strict=True)):
        S[i] = reference.units(reference.layout(torch.eye(p.units, dtype=torch.float64), (p.units, *size), True, s), True).T
    groups = plain[:3], plain[3:5], plain[5:8]
    h, q, activities = x, x, []
    xis = [ops.noise(step, 0, i, len(x), p.units, 0.1, "gaussian", dtype=torch.float64) for i, p in enumerate(points)]
    for i, group in enumerate(groups):
        h, q = (group(h), group(q)) if i else (group(x),) * 2
        q = q + reference.layout(xis[i] @ S[i].T, h.shape, i < 2)
        activities.append(h)
    z, moved = plain[8](h), plain[8](q)
    dL = F.cross_entropy(moved, y, reduction="none") - F.cross_entropy(z, y, reduction="none")
    if rule.perturbs:
        torch.testing.assert_close(change, (moved - z).detach())
    e = (z.softmax(1) - F.one_hot(y, 5)).detach()
    B = [p.state["B"].clone() for p in points]
    learned = {name: t.grad for name, t in net.named_parameters()}
    for i, (activity, b) in enumerate(zip(activities, B, strict=True)):
        g = (e @ b.T / S[i].sum(0)) @ S[i].T
        for name, parameter in groups[i].named_parameters():
            (want,) = torch.autograd.grad(activity, parameter, reference.layout(g, activity.shape, i < 2), retain_graph=True)
            torch.testing.assert_close(learned[name], want)
    fb.flush(net)
    if isinstance(rule, fb.Ridge):  # from B = 0: Xi^T (w Q)
        V = 0.1 * torch.eye(5, dtype=torch.float64) + e.T @ e
        for p, xi in zip(points, xis, strict=True):
            torch.testing.assert_close(p.B, xi.T @ ((dL / 0.01)[:, None] * (e @ V.inverse())))


def test_b_learns_the_sum_over_a_patch() -> None:
    """A network that is linear behind its point: B of Joint(output) is the mean Jacobian of the output, summed over each patch."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 4 * 4, 3)).double()
    net = fb.convert(model, rule=fb.Joint(0.5, "output"), share=2, noise_std=0.1, warmup=10**9)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    for _ in range(60):
        criterion(net(torch.randn(64, 1, 4, 4, dtype=torch.float64)), torch.randint(3, (64,))).backward()
    fb.flush(net)
    (point,) = fb.points(net).values()
    W = reference.units(model[2].weight.detach().view(3, 2, 4, 4), True, 2).T
    assert point.B.shape == (8, 3)
    # exact RLS would be exact; the stochastic gradient forgets what it started from like exp(-0.5 * 60 * 64 / 64)
    assert float((point.B - W).norm() / W.norm()) < 1e-3


def test_the_angle_is_to_the_whole_gradient() -> None:
    """With B the best there is, what is left is what differs within the patches and what e does not explain."""
    x, y = data(40)
    angles = {}
    for share in (1, 2, "channel"):
        net = fb.convert(network(), rule=fb.Fixed(), share=share)
        steps(net, x, y)
        criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
        plain = fb.revert(net).train()
        h = plain[:3](x).detach().requires_grad_()
        z = plain[3:](h)
        F.cross_entropy(z, y, reduction="sum").backward()
        e = (z.softmax(1) - F.one_hot(y, 5)).detach()
        point = next(iter(fb.points(net).values()))
        s = {1: 1, 2: 2, "channel": 99}[share]
        point.B = (torch.linalg.pinv(e) @ reference.units(h.grad, True, s)).T
        row = next(iter(fb.metrics.alignment(net, criterion, x, y).values()))
        assert row["weight_angle"] < 1e-3 and row["relative_error"] < 1e-6
        angles[share] = row["angle"]
    assert angles[1] < angles[2] < angles["channel"] < 90


def test_checkpoints_and_summary() -> None:
    x, y = data(dtype=torch.float32)
    net, other = (fb.convert(network(torch.float32), share=2) for _ in range(2))
    steps(net, x, y, 2)
    steps(other, x, y, 1)
    other.load_state_dict(net.state_dict())
    steps(net, x, y, 2), steps(other, x, y, 2)
    a, b = net.state_dict(), other.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [row.units for row in fb.summary(net)] == [3 * 4 * 3, 4 * 2 * 1, 6]


def test_units_of_a_resnet() -> None:
    """The numbers of the README."""
    x = torch.empty(2, 3, 32, 32, device="meta")
    for share, units in ((1, 614_400), (4, 38_400), ("channel", 4_800)):
        assert sum(row.units for row in fb.summary(fb.convert(resnet18((3, 32, 32), 100), share=share), x)) == units


def test_bad_settings() -> None:
    for bad, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), ("map", TypeError)):
        with pytest.raises(error, match="share"):
            fb.convert(network(), share=bad)  # type: ignore[arg-type]
    for method in ({"feedback": "layerwise"}, {"rule": fb.NodePerturbation()}):
        with pytest.raises(ValueError, match="share must be 1"):
            fb.convert(network(), share=2, **method)  # type: ignore[arg-type]
