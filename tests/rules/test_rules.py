"""Each rule against its definition, one step or a few: SPEC 4, 5 and 7."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fbkernels as fb
from fbkernels import reference
from fbkernels.reference import Connection, feedback_update

EPS = 2.0**-52
F64 = torch.float64
Batch = tuple[Tensor, Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    """Equal but for ``tolerance``, in units of the larger's largest entry."""
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    error = (a - b).abs().max().item()
    assert error <= tolerance * max(a.abs().max().item(), b.abs().max().item()), error


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def measurement(regressor: Tensor, w: Tensor) -> fb.Measurement:
    """What a rule of the common form reads: a step's regressors and w = dL / sigma^2."""
    n = len(w)
    zero = torch.zeros(n, dtype=F64)
    ok = torch.ones(n, dtype=torch.bool)
    return fb.Measurement(torch.tensor(0), n, 1.0, 1, regressor, w, w, zero[:, None], ("0",), ok)


def apply(rule: fb.Rule, B: Tensor, xi: Tensor, R: Tensor, w: Tensor, splits: list[int], state: dict[str, Tensor] | None = None) -> Tensor:
    """The rule's own batch updates, one for each split."""
    state = {} if state is None else state
    for rows in zip(xi.split(splits), R.split(splits), w.split(splits), strict=True):
        M, G = rule.update(measurement(rows[1], rows[2]), state)
        B = feedback_update(B, rows[0], M, G)
    return B


splits = st.lists(st.integers(1, 12), min_size=1, max_size=8)


# Ridge: SPEC 4


def recursion(B: Tensor, xi: Tensor, R: Tensor, w: Tensor, gamma: float, beta: float) -> Tensor:
    """Recursive least squares as the books write it, a sample at a time."""
    P = torch.eye(R.shape[1], dtype=F64) / gamma
    for x, r, c in zip(xi, R, w, strict=True):
        Pr = P @ r
        k = Pr / (beta + r @ Pr)
        B = B + torch.outer(c * x - B @ r, k)
        P = (P - torch.outer(k, Pr)) / beta
    return B


@given(splits, st.sampled_from([2, 5, 20]), st.sampled_from([0.1, 10.0]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_ridge_is_recursive_least_squares_however_the_samples_are_batched(sizes: list[int], m: int, gamma: float, seed: int) -> None:
    n = sum(sizes)
    xi, R, w, B = normal(n, 3, seed=seed), normal(n, m, seed=seed + 100), normal(n, seed=seed + 200), normal(3, m, seed=seed + 300)
    got = apply(fb.Ridge(gamma), B, xi, R, w, sizes)
    # the recursion's P loses what |P_0| / |P_n| = V_n / gamma magnifies; a Wishart V of n m unit variances is below (sqrt n + sqrt m + 3)^2
    magnified = (math.sqrt(n) + math.sqrt(m) + 3) ** 2 / gamma
    close(got, recursion(B, xi, R, w, gamma, 1.0), 20 * n * magnified * EPS)
    # B V - B_0 gamma = S: the offline solve, whose prior is the B that it starts from
    V = gamma * torch.eye(m, dtype=F64) + R.T @ R
    close(got, torch.linalg.solve(V, (gamma * B + (w[:, None] * xi).T @ R).T).T, 20 * n * magnified * EPS)


@given(splits, st.sampled_from([2, 5]), st.sampled_from([0.9, 0.99]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_ridge_that_forgets_is_the_weighted_solve(sizes: list[int], m: int, beta: float, seed: int) -> None:
    first, gamma = 3 * m, 1e-9
    sizes = [first, *sizes]
    n = sum(sizes)
    xi, R, w = normal(n, 3, seed=seed), normal(n, m, seed=seed + 100), normal(n, seed=seed + 200)
    rule, state, history = fb.Ridge(gamma, beta), {}, [torch.zeros(3, m, dtype=F64)]
    for rows in zip(xi.split(sizes), R.split(sizes), w.split(sizes), strict=True):
        history.append(apply(rule, history[-1], *rows, [len(rows[0])], state))
    D = beta ** torch.arange(n - 1, -1, -1, dtype=F64)[:, None]
    V = R.T @ (D * R)
    smallest = torch.linalg.eigvalsh(V)[0].item()
    assume(smallest > 1e-3)
    # the renewed ridge adds at most gamma to V, and gamma times an earlier B to S
    tolerance = (2 * m * gamma / smallest + 1e3 * n * EPS * V.norm().item() / smallest) * max(B.abs().max().item() for B in history)
    expected = torch.linalg.solve(V, ((w[:, None] * xi).T @ (D * R)).T).T
    torch.testing.assert_close(history[-1], expected, rtol=0, atol=tolerance)
    textbook = recursion(torch.zeros(3, m, dtype=F64), xi, R, w, gamma, beta)
    torch.testing.assert_close(history[-1], textbook, rtol=0, atol=tolerance + 1e3 * n * EPS / gamma)


def test_ridge_keeps_its_floor_where_nothing_excites() -> None:
    # cross-entropy errors sum to zero: all-ones is never excited, and a P without the floor would grow by 1 / beta a sample, 0.9^-32000
    gamma, m = 0.1, 5
    rule, state, B = fb.Ridge(gamma, forgetting=0.9), {}, torch.zeros(4, m, dtype=F64)
    for step in range(1000):
        R = normal(32, m, seed=step)
        R = (R - R.mean(1, keepdim=True)) * (1.0 if step < 500 else 1e-4)  # and then hardly anything is
        B = apply(rule, B, normal(32, 4, seed=step + 5000), R, normal(32, seed=step + 9000), [32], state)
    assert torch.isfinite(B).all()
    eigenvalues = torch.linalg.eigvalsh(state["V"])
    assert eigenvalues[0] >= gamma * (1 - 1e-12)
    assert eigenvalues[-1] < 2 * gamma
    # B has learned nothing in the direction that it never saw: rows of R sum to EPS, and 1 / gamma of that stays
    assert B.sum(1).abs().max() < 1000 * 32 / gamma * EPS
    assert B.abs().max() > 0.01


@pytest.mark.parametrize("beta", [1.0, 0.95])
def test_low_rank_gain_is_the_dense_one(beta: float) -> None:
    n, m = 7, 20
    R, w, xi, B = normal(n, m, seed=1), normal(n, seed=2), normal(n, 9, seed=3), normal(9, m, seed=4)
    M, v = fb.Ridge(0.3, beta).update(measurement(R, w), {})
    assert isinstance(M, tuple)
    assert torch.equal(v, w)
    dense, G = M[0].T @ M[1], w[:, None] * M[1]
    close(feedback_update(B, xi, M, v), B @ (torch.eye(m, dtype=F64) - dense) + xi.T @ G, 100 * EPS)
    close(feedback_update(B, xi, M, G), B @ (torch.eye(m, dtype=F64) - dense) + xi.T @ G, 100 * EPS)
    more, _ = fb.Ridge(0.3, beta).update(measurement(R.repeat(3, 1), w.repeat(3)), {})
    assert isinstance(more, Tensor)


def test_ridge_statistics_stay_float64() -> None:
    state: dict[str, Tensor] = {}
    fb.Ridge().update(measurement(normal(4, 3).float(), normal(4).float()), state)
    assert state["V"].dtype == F64


# LMS and normalised LMS


def test_lms_descends_half_the_squared_error() -> None:
    n, m, lr = 6, 4, 0.03
    xi, R, w = normal(n, 5, seed=1), normal(n, m, seed=2), normal(n, seed=3)
    B = normal(5, m, seed=4).requires_grad_()
    (0.5 * (B @ R.T - (w[:, None] * xi).T).square().sum()).backward()
    close(apply(fb.LMS(lr), B.detach(), xi, R, w, [n]), B.detach() - lr * B.grad, 20 * n * EPS)


def nlms(B: Tensor, xi: Tensor, R: Tensor, w: Tensor, lr: float) -> Tensor:
    for x, r, c in zip(xi, R, w, strict=True):
        B = B + torch.outer(c * x - B @ r, lr * r / (r @ r))
    return B


@given(splits, st.sampled_from([1, 3, 20]), st.sampled_from([0.1, 1.0, 1.9]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_normalized_lms_goes_a_sample_at_a_time_however_they_are_batched(sizes: list[int], m: int, lr: float, seed: int) -> None:
    n = sum(sizes)
    xi, R, w, B = normal(n, 3, seed=seed), normal(n, m, seed=seed + 100), normal(n, seed=seed + 200), normal(3, m, seed=seed + 300)
    assume(R.square().sum(1).min() > 1e-4)  # eps = 1e-12 beside |r|^2
    close(apply(fb.NormalizedLMS(lr), B, xi, R, w, sizes), nlms(B, xi, R, w, lr), 1e-7)


@pytest.mark.parametrize("n", [255, 256, 257, 600])
def test_normalized_lms_past_its_block(n: int) -> None:
    m, lr = 5, 0.7
    assert fb.NormalizedLMS.block == 256
    xi, R, w, B = normal(n, 3, seed=1), normal(n, m, seed=2), normal(n, seed=3), normal(3, m, seed=4)
    close(apply(fb.NormalizedLMS(lr), B, xi, R, w, [n]), nlms(B, xi, R, w, lr), 1e-9)
    groups = R.expand(2, n, m) * torch.tensor([1.0, 3.0], dtype=F64)[:, None, None]  # groups of a convolution
    M, G = fb.NormalizedLMS(lr).update(measurement(groups, w), {})
    got = feedback_update(B.expand(2, 3, m), xi.expand(2, n, 3), M, G)
    for group in (0, 1):
        close(got[group], nlms(B, xi, groups[group], w, lr), 1e-9)


# Convolutions as regressions

convolutions = st.fixed_dictionaries(
    {
        "groups": st.integers(1, 3),
        "kernel": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "size": st.tuples(st.integers(3, 7), st.integers(3, 7)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "padding": st.tuples(st.integers(0, 3), st.integers(0, 3)),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    }
)


@given(convolutions, st.integers(1, 2), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_regressors_times_b_is_the_input_gradient(options: dict[str, Any], channels: int, outputs: int, n: int) -> None:
    groups, kernel, size = options["groups"], options["kernel"], options["size"]
    pairs = zip(size, kernel, options["padding"], options["dilation"], strict=True)
    assume(all(s + 2 * p >= d * (k - 1) + 1 for s, k, p, d in pairs))
    geometry = {k: options[k] for k in ("stride", "padding", "dilation", "groups")}
    x = normal(n, channels * groups, *size).requires_grad_()
    B = normal(outputs * groups, channels, *kernel, seed=1).requires_grad_()
    z = nn.functional.conv2d(x, B, **geometry)
    delta = normal(*z.shape, seed=2)
    gradient, kernel_gradient = torch.autograd.grad(z, (x, B), delta)
    connection, by_hand = Connection.of("conv2d", B.detach(), x.detach(), **geometry)
    assert not any(by_hand)
    R, matrix = connection.samples(connection.patches(delta)), connection.matrix(B.detach())
    terms = B[0].numel() * outputs
    close(R @ matrix.mT, connection.samples(gradient), 4 * terms * EPS)
    close(connection.input_gradient(delta, B.detach(), x.detach()), gradient, 4 * terms * EPS)
    # the other way round: X^T R is the gradient of the kernel, laid out as the matrix of B
    close(connection.unmatrix(connection.samples(x.detach()).mT @ R, B.shape), kernel_gradient, 4 * n * size[0] * size[1] * EPS)
    assert torch.equal(connection.unmatrix(matrix, B.shape), B.detach())


# Whole steps


def sse(y: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (y - t).square().flatten(1).sum(1)


def mlp(activation: type[nn.Module] = nn.Sigmoid) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 3)).double()


def cnn() -> nn.Sequential:
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers).double()


def data(model: nn.Sequential, n: int = 8, seed: int = 0) -> Batch:
    shape = (6,) if isinstance(model[0], nn.Linear) else (2, 6, 6)
    return normal(n, *shape, seed=seed), normal(n, 3, seed=seed + 1000)


def one_step(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    fb.PerturbedLoss(sse, net)(net(x), y).sum().backward()
    return {name: p.grad for name, p in net.named_parameters()}


def xi_of(net: nn.Module, name: str, step: int, rows: int) -> Tensor:
    """Noise in float64, samples x units; the public noise is its float32."""
    point, f = fb.points(net)[name], net.feedback.settings
    xi = reference.noise(f.seed, step, point.index, rows, point.units, f.noise_std, f.noise, F64)
    torch.testing.assert_close(xi.float(), fb.functional.noise(f.seed, step, point.index, rows, point.units, f.noise_std, f.noise))
    return xi


def xi_of_rows(net: nn.Module, name: str, h: Tensor) -> Tensor:
    """The first step's noise in the layout of h, also before it."""
    f = net.feedback.settings
    u = reference.noise(f.seed, 0, fb.points(net)[name].index, len(h), h[0].numel(), f.noise_std, f.noise, F64)
    return reference.layout(u, h.shape)


class ByHand:
    """Both streams of a 6-5-4-3 sigmoid net, written out."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, step: int, sign: int = 1) -> None:
        W = [net[i].weight.detach() for i in (0, 2, 4)]
        b = [net[i].bias.detach() for i in (0, 2, 4)]
        self.W, self.x = W, x
        self.h1 = torch.sigmoid(x @ W[0].T + b[0])
        self.h2 = torch.sigmoid(self.h1 @ W[1].T + b[1])
        out = self.h2 @ W[2].T + b[2]
        self.e = out - y
        self.xi1, self.xi2 = xi_of(net, "0", step, len(x)), xi_of(net, "2", step, len(x))
        p1 = self.h1 + sign * self.xi1
        p2 = torch.sigmoid(p1 @ W[1].T + b[1]) + sign * self.xi2
        perturbed = p2 @ W[2].T + b[2]
        self.dy = perturbed - out
        self.dL = (0.5 * (perturbed - out) * (perturbed + out - 2 * y)).sum(1)

    def gradients(self, g1: Tensor, g2: Tensor) -> dict[str, Tensor]:
        """Of the parameters, from dL/dh_1 and dL/dh_2, summed over the batch."""
        d1, d2 = g1 * self.h1 * (1 - self.h1), g2 * self.h2 * (1 - self.h2)
        result = {}
        for name, delta, below in (("0", d1, self.x), ("2", d2, self.h1), ("4", self.e, self.h2)):
            result |= {f"{name}.weight": delta.T @ below, f"{name}.bias": delta.sum(0)}
        return result

    def chain(self, B1: Tensor, B2: Tensor) -> tuple[Tensor, Tensor]:
        g2 = self.e @ B2.T
        return (g2 * self.h2 * (1 - self.h2)) @ B1.T, g2

    def regressors(self, structure: str, B2: Tensor) -> tuple[Tensor, Tensor]:
        """r of both layers."""
        return (self.e, self.e) if structure == "direct" else (self.e @ B2.T * self.h2 * (1 - self.h2), self.e)


def grads_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 200 * EPS) -> None:
    assert got.keys() == expected.keys()
    for name, g in got.items():
        close(g, expected[name], tolerance)


@pytest.mark.parametrize("structure", ["direct", "layerwise"])
def test_fixed_is_feedback_alignment(structure: str) -> None:
    net = fb.convert(mlp(), feedback=structure, rule=fb.Fixed())
    x, y = data(net)
    first = one_step(net, x, y)
    B1, B2 = (fb.points(net)[name].B.clone() for name in ("0", "2"))
    hand = ByHand(net, x, y, 0)
    expected = hand.gradients(hand.e @ B1.T, hand.e @ B2.T) if structure == "direct" else hand.gradients(*hand.chain(B1, B2))
    grads_close(first, expected)
    grads_close(one_step(net, x, y), expected)
    assert torch.equal(fb.points(net)["0"].B, B1)
    assert B1.shape == ((5, 3) if structure == "direct" else (5, 4))
    # random enough: the spread of B is that of its distribution to five standard errors
    std = (1 / math.sqrt(3 * 5)) if structure == "direct" else math.sqrt(2 / 5)
    assert B1.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * B1.numel()))


@pytest.mark.parametrize("structure", ["direct", "layerwise"])
@pytest.mark.parametrize("rule", [fb.LMS(0.05), fb.NormalizedLMS(0.5), fb.Ridge(0.2), fb.Joint(0.2), fb.Joint(0.3, "output")], ids=repr)
def test_one_step_by_hand(structure: str, rule: fb.Rule) -> None:
    if structure not in rule.structures:
        with pytest.raises(ValueError, match="feedback must be 'direct'"):
            fb.convert(mlp(), feedback=structure, rule=rule)
        return
    net = fb.convert(mlp(), feedback=structure, rule=rule, noise_std=0.01)
    x, y = data(net)
    one_step(net, x, y)
    points = fb.points(net)
    widths = (3, 3) if structure == "direct" else (4, 3)
    for i, name in enumerate(("0", "2")):
        points[name].B = normal(points[name].units, widths[i], seed=10 + i)
    B = [points[name].B.clone() for name in ("0", "2")]
    V = {name: t.clone() for name, t in (net.feedback if structure == "direct" else points["2"]).state.items() if name == "V"}
    V1 = {name: t.clone() for name, t in points["0"].state.items() if name == "V"} if structure == "layerwise" else V

    x, y = data(net, n=11, seed=1)
    step = int(net.feedback.step)
    hand = ByHand(net, x, y, step)
    got = one_step(net, x, y)
    # the gradients of W use the B from before this step's update (SPEC 5)
    expected = hand.gradients(hand.e @ B[0].T, hand.e @ B[1].T) if structure == "direct" else hand.gradients(*hand.chain(*B))
    grads_close(got, expected)

    r, w = hand.regressors(structure, B[1]), hand.dL / 0.01**2
    for i, (name, xi) in enumerate((("0", hand.xi1), ("2", hand.xi2))):
        R = r[i]
        if isinstance(rule, fb.LMS):
            lam = w[:, None] * xi
            new = B[i] + 0.05 * (lam - R @ B[i].T).T @ R
        elif isinstance(rule, fb.NormalizedLMS):
            new = nlms(B[i], xi, R, w, 0.5)
        elif isinstance(rule, fb.Ridge):
            old = (V1 if name == "0" else V)["V"]
            new = torch.linalg.solve(old + R.T @ R, (B[i] @ old + (w[:, None] * xi).T @ R).T).T
        elif rule.signal == "output":
            s = hand.dy - hand.xi1 @ B[0] - hand.xi2 @ B[1]
            new = B[i] + 0.3 * xi.T @ s / (0.01**2 * 11)  # 9 noisy units, 11 samples
        else:
            s = hand.dL - ((hand.xi1 @ B[0]) * r[0]).sum(1) - ((hand.xi2 @ B[1]) * r[1]).sum(1)
            new = B[i] + 0.2 * xi.T @ (s[:, None] * R / R.square().sum(1, keepdim=True)) / (0.01**2 * 11)
        # dL comes from two losses in float64, each right to EPS |L|, and is divided by sigma^2
        rounding = 20 * EPS * sse(hand.e, torch.zeros_like(hand.e)).max().item() / hand.dL.abs().median().item()
        close(points[name].B, new, 1e3 * EPS + 10 * rounding)
        assert not torch.equal(points[name].B, B[i])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_joint_closes_lr_of_the_gap(groups: int) -> None:
    # One sample, one position, and |xi|^2 = sigma^2 n exactly: what B predicts of the same loss change afterwards is lr of it
    conv = nn.Conv2d(4, 8, 1, groups=groups)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), conv, nn.Flatten(), nn.Linear(8, 3)).double()
    net = fb.convert(model, feedback="layerwise", rule=fb.Joint(0.25), noise="rademacher", noise_std=1e-3, include="0")
    x, y = normal(1, 2, 1, 1), normal(1, 3, seed=1)
    h = model[0](x).detach()
    xi = xi_of_rows(net, "0", h)
    e = model[3](model[2](conv(h))) - y
    dL = sse(model[3](model[2](conv(h + xi))), y) - sse(e, torch.zeros_like(e))
    one_step(net, x, y)
    delta = (e @ model[3].weight).detach().view(1, 8, 1, 1)
    predicted = (xi * nn.functional.conv_transpose2d(delta, fb.points(net)["0"].B, groups=groups)).sum()
    # dL: two losses in float64 whose difference is 1e-3 of them
    torch.testing.assert_close(predicted, 0.25 * dL.detach().squeeze(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("groups", [(), (2,)], ids=["whole", "grouped"])
def test_joint_divides_by_no_less_than_a_hundredth_of_the_mean(groups: tuple[int, ...], positions: int) -> None:
    rows, m = 6, 4
    fit = torch.tensor([1, 1e-3, 1, 0, 0.5, 1], dtype=torch.float64).repeat_interleave(positions)[:, None]  # two samples are fitted
    R, s = normal(*groups, rows * positions, m) * fit, normal(rows, seed=1)

    def gains(rows: slice, part: Any = None) -> Tensor:
        r = R.unflatten(-2, (-1, positions))[..., rows, :, :].flatten(-3, -2)
        n = len(s[rows])
        measured = fb.Measurement(torch.tensor(0), n, 0.1, 50, r, s[rows].repeat_interleave(positions), s[rows], s[rows], part=part)
        return fb.Joint(0.2).update(measured, {})[1]

    G = gains(slice(None))
    power = R.square().sum(-1).view(-1, rows * positions).mean(0).view(rows, positions).sum(1)
    divisor = torch.stack([max(p, power.mean() / 100) for p in power]).repeat_interleave(positions)
    assert (divisor[positions] > 1e3 * power[1]).all()
    expected = 0.2 / (0.1**2 * 50) * (s.repeat_interleave(positions) / divisor)[:, None] * R
    close(G, expected, 8 * EPS)
    # of several processes, the mean of the whole batch
    for own in (slice(0, 2), slice(2, rows)):
        processes = SimpleNamespace(sum=lambda t, own=own: t + positions * (power.sum() - power[own].sum()))
        part = SimpleNamespace(total=rows, processes=processes)
        close(gains(own, part), expected.unflatten(-2, (rows, positions))[..., own, :, :].flatten(-3, -2), 8 * EPS)


@pytest.mark.parametrize("structure", ["direct", "layerwise"])
@pytest.mark.parametrize("options", [{}, {"fraction": 0.5, "antithetic": True}], ids=str)
def test_node_perturbation_uses_the_target_itself(structure: str, options: dict[str, Any]) -> None:
    net = fb.convert(mlp(), feedback=structure, rule=fb.NodePerturbation(), noise_std=0.01, **options)
    x, y = data(net)
    got = one_step(net, x, y)
    rows = 4 if options else 8
    hand = ByHand(net, x[:rows], y[:rows], 0)
    dL = hand.dL
    if options:  # (dL(+xi) - dL(-xi)) / 2
        dL = (dL - ByHand(net, x[:rows], y[:rows], 0, sign=-1).dL) / 2
    full = ByHand(net, x, y, 0)
    lam = [torch.cat((dL[:, None] * xi / 0.01**2, xi.new_zeros(8 - rows, xi.shape[1]))) for xi in (hand.xi1, hand.xi2)]
    grads_close(got, full.gradients(*lam), 1e-10)
    assert fb.points(net)["0"].B is None


# Kolen-Pollack, sign symmetry, weight transport


def difference(net: nn.Sequential, name: str) -> Tensor:
    B, W = fb.points(net)[name].B, net[int(name) + 2].weight.detach()
    return (W if W.ndim > 2 else W.T) - B


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_matching_rule_keeps_its_distance(optimizer: str) -> None:
    net = fb.convert(mlp(), feedback="layerwise", rule=fb.KolenPollack())
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    opt = kinds[optimizer](net.parameters(), lr=0.05)
    one_step(net, *data(net))
    before = {name: difference(net, name).clone() for name in ("0", "2")}
    start = net[2].weight.detach().clone()
    for step in range(10):
        one_step(net, *data(net, seed=step))
        opt.step()
    for name, d in before.items():
        close(difference(net, name), d, 100 * EPS)
    assert (net[2].weight - start).abs().max() > 0.01


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_kolen_pollack_shrinks_its_distance_by_the_decay(make: Callable[[], nn.Sequential], momentum: float) -> None:
    decay, lr = 0.1, 0.05
    net = fb.convert(make(), feedback="layerwise", rule=fb.KolenPollack(decay=decay))
    x, _ = data(net)
    net(x)
    before = difference(net, "0").clone()
    weights = [net[i].weight for i in (2, 4) if hasattr(net[i], "weight")]
    if momentum:  # decoupled, so that a step decays by lr * weight_decay whatever the momentum
        opt: torch.optim.Optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=decay / lr)
    else:
        opt = torch.optim.SGD(weights, lr=lr, weight_decay=decay / lr)
    for step in range(5):
        one_step(net, *data(net, seed=step))
        opt.step()
    close(difference(net, "0"), (1 - decay) ** 5 * before, 100 * EPS)


def test_kolen_pollack_moves_with_the_weight_alone() -> None:
    # nothing but the optimiser moves W, so a B that is not shown a step of it has nothing to copy: weights are not transported
    net = fb.convert(mlp(), feedback="layerwise", rule=fb.KolenPollack(decay=0.1))
    x, y = data(net)
    net(x)
    B = fb.points(net)["0"].B.clone()
    for _ in range(5):  # gradients accumulate, the optimiser does not step
        fb.PerturbedLoss(sse, net)(net(x), y).sum().backward()
    assert torch.equal(fb.points(net)["0"].B, B)


@pytest.mark.parametrize("make", [mlp, cnn])
def test_sign_symmetric_feedback(make: Callable[[], nn.Sequential]) -> None:
    net = fb.convert(make(), feedback="layerwise", rule=fb.SignSymmetric())
    x, y = data(net)
    got = one_step(net, x, y)
    W = net[2].weight.detach()
    B = fb.points(net)["0"].B
    assert torch.equal(B.sign(), W.sign() if W.ndim > 2 else W.sign().T)
    close(B.abs(), W.abs().mean().expand_as(B), 10 * EPS)
    if isinstance(net[0], nn.Linear):
        hand = ByHand(net, x, y, 0)
        signs = [V.T.sign() * V.abs().mean() for V in hand.W[1:]]
        grads_close(got, hand.gradients(*hand.chain(*signs)))


class Leading(nn.Module):
    """Linear layers over [N, T, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.out(h).mean(1)


class LeadingDimensions(nn.Module):
    """The same with the output layer reading all of them: a point is read by one layer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 5), nn.Linear(5, 2), nn.Linear(2 * 4 * 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))).flatten(1))


def tower(*middle: nn.Module, channels: int = 4, first: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(first or nn.Conv2d(2, channels, 3, padding=1), *middle, nn.Flatten(), nn.LazyLinear(7), nn.Tanh(), nn.Linear(7, 3))


PLAIN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5), nn.GELU(), nn.Linear(5, 3)), (6,)),
    "mlp, batch norm, dropout": (
        lambda: nn.Sequential(
            nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, 5), nn.Sigmoid(), nn.Dropout(0.5), nn.Linear(5, 3)
        ),
        (6,),
    ),
    "no bias": (lambda: nn.Sequential(nn.Linear(6, 9, bias=False), nn.Tanh(), nn.Linear(9, 3, bias=False)), (6,)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.SiLU(), nn.Linear(9, 3)), (6,)),
    "leading dimensions": (Leading, (5, 6)),
    "leading dimensions, flattened": (LeadingDimensions, (3, 4, 6)),
    "cnn, batch norm, pools": (
        lambda: tower(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        (2, 8, 8),
    ),
    "cnn, dropout": (lambda: tower(nn.Tanh(), nn.Dropout2d(0.5), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Dropout(0.2)), (2, 6, 6)),
    "stride": (lambda: tower(nn.Tanh(), nn.Conv2d(4, 6, 3, stride=(2, 3))), (2, 8, 9)),
    "dilation": (lambda: tower(nn.Tanh(), nn.Conv2d(4, 6, 3, dilation=(2, 1), padding=1)), (2, 8, 8)),
    "groups": (lambda: tower(nn.Tanh(), nn.Conv2d(4, 6, 3, groups=2)), (2, 6, 6)),
    "depthwise": (lambda: tower(nn.Tanh(), nn.Conv2d(4, 4, (3, 2), groups=4, stride=2, padding=(1, 0))), (2, 6, 6)),
    "same": (lambda: tower(nn.Tanh(), nn.Conv2d(4, 6, 3, padding="same", dilation=2)), (2, 6, 6)),
    "same, even kernel": (lambda: tower(nn.Tanh(), nn.Conv2d(4, 6, (2, 4), padding="same")), (2, 6, 6)),
    "valid": (lambda: tower(nn.Tanh(), nn.Conv2d(4, 6, 3, padding="valid")), (2, 6, 6)),
    "circular": (lambda: tower(nn.Tanh(), nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")), (2, 6, 6)),
    "reflect": (lambda: tower(nn.Tanh(), nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect")), (2, 6, 6)),
    "replicate": (lambda: tower(nn.Tanh(), nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate")), (2, 6, 6)),
    "adaptive pool": (lambda: tower(nn.Tanh(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2)), (2, 6, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_weight_transport_is_backprop(name: str, dtype: torch.dtype) -> None:
    make, shape = PLAIN[name]
    x, y = normal(16, *shape).to(dtype), normal(16, 3, seed=1).to(dtype)
    model = make().to(dtype)
    model(x)  # lazy shapes
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    net = fb.convert(model, feedback="layerwise", rule=fb.WeightTransport())
    results = {}
    for kind, (m, criterion) in {"plain": (plain, sse), "exact": (exact, sse), "net": (net, fb.PerturbedLoss(sse, net))}.items():
        torch.manual_seed(3)
        d = torch.float64 if kind == "exact" else dtype
        out = m(x.to(d))
        criterion(out, y.to(d)).sum().backward()
        results[kind] = {n: p.grad.double() for n, p in m.named_parameters()} | {
            n: b.double() for n, b in m.named_buffers() if "running" in n
        }
    if dtype == torch.float32 and "dropout" in name:
        results["exact"] = results["plain"]  # float64 masks are other masks
    eps = torch.finfo(dtype).eps
    for n, true in results["exact"].items():
        # torch's own error on the same graph, twice; and a rounding of each of the terms that a gradient adds up, which no one is spared
        scale = true.abs().max().item()
        own = (results["plain"][n] - true).abs().max().item()
        error = (results["net"][n] - true).abs().max().item()
        noise = eps * scale * math.sqrt(x.numel())
        # a bias before batch norm has the gradient zero: what is left is rounding of the terms that cancel
        floor = eps * 16 * max(v.abs().max().item() for v in results["exact"].values())
        assert error <= 2 * own + noise + floor, (n, error, own, noise)
    assert any(v.abs().max() > 0 for v in results["net"].values())


# Rules of one's own


class DecayingHebb(fb.Rule):
    """B <- (1 - a) B + a lam r^T / |r|^2 averaged over the batch: a rule that the library does not know."""

    statistics = ("count",)

    def __init__(self, a: float) -> None:
        self.a = a

    def update(self, m: fb.Measurement, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        state["count"] = state.get("count", m.w.new_zeros(())) + 1
        k = m.regressor / m.regressor.square().sum(-1, keepdim=True) / m.regressor.shape[-2]
        return self.a * torch.eye(m.regressor.shape[-1], dtype=m.regressor.dtype), self.a * m.w[:, None] * k


@pytest.mark.parametrize("structure", ["direct", "layerwise"])
def test_a_rule_of_ones_own(structure: str) -> None:
    net = fb.convert(mlp(), feedback=structure, rule=DecayingHebb(0.1), noise_std=0.01)
    x, y = data(net)
    B2 = torch.zeros(4, 3, dtype=F64)
    for step in range(3):
        one_step(net, x, y)
        hand = ByHand(net, x, y, step)
        lam = hand.dL[:, None] * hand.xi2 / 0.01**2
        B2 = 0.9 * B2 + 0.1 * lam.T @ (hand.e / hand.e.square().sum(1, keepdim=True)) / 8
    close(fb.points(net)["2"].B, B2, 1e-9)
    assert "DecayingHebb(a=0.1)" in repr(net)
    state = net.state_dict()
    counts = [v for k, v in state.items() if k.endswith(".count")]
    assert [float(v) for v in counts] == [3.0] * (1 if structure == "direct" else 2)
    other = fb.convert(mlp(), feedback=structure, rule=DecayingHebb(0.1), noise_std=0.01)
    other.load_state_dict(state)
    for n in (net, other):
        one_step(n, x, y)
    assert torch.equal(fb.points(other)["2"].B, fb.points(net)["2"].B)


# Every rule with every option

RULES: list[fb.Rule] = [
    fb.Ridge(),
    fb.Ridge(forgetting=0.99),
    fb.LMS(1e-3),
    fb.NormalizedLMS(0.5),
    fb.Joint(0.2),
    fb.Joint(0.2, "output"),
    fb.WeightMirror(),
    fb.Fixed(),
    fb.KolenPollack(),
    fb.SyntheticGradient(1e-3),
    fb.SignSymmetric(),
    fb.WeightTransport(),
    fb.NodePerturbation(),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"fraction": 0.5, "antithetic": True},
    {"noise": "rademacher"},
    {"every": 2},
    {"warmup": 2},
    {"every": 2, "warmup": 3, "fraction": 0.3},
]
FOLLOWS_W = (fb.KolenPollack, fb.SignSymmetric, fb.WeightTransport)
CASES = [(rule, structure) for rule in RULES for structure in rule.structures]


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("rule", "structure"), CASES, ids=[f"{r!r}-{s}" for r, s in CASES])
def test_b_and_w_move_when_they_should(rule: fb.Rule, structure: str, options: dict[str, Any], make: Callable[[], nn.Sequential]) -> None:
    every, warmup = options.get("every", 1), options.get("warmup", 0)
    model = make()
    net = fb.convert(model, feedback=structure, rule=rule, noise_std=0.01, **options)
    opt = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    loss = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    name = "0" if structure == "direct" or not isinstance(rule, fb.Ridge) else "2"  # ridge starts at 0: the top layer learns first
    B: Tensor | None = None
    for step in range(5):
        W = [p.detach().clone() for p in net.parameters()]
        x, _ = data(net, seed=step)
        opt.zero_grad()
        loss(net(x), torch.arange(8) % 3).backward()
        frozen = step < warmup
        assert all(not (frozen and p.grad.any()) for p in net.parameters())
        opt.step()
        for before, p in zip(W, net.parameters(), strict=True):
            assert torch.equal(before, p) == frozen
            assert torch.isfinite(p).all()
        new = fb.points(net)[name].B
        if isinstance(rule, fb.NodePerturbation):
            assert new is None
            continue
        assert torch.isfinite(new).all()
        learns = not frozen if isinstance(rule, FOLLOWS_W) else not isinstance(rule, fb.Fixed) and step % every == 0
        learns = learns and not (isinstance(rule, fb.WeightMirror) and step <= warmup)  # B is W until W moves
        if B is not None:  # the first step shows the shape
            assert torch.equal(new, B) != learns, step
        elif isinstance(rule, (fb.Ridge, fb.Joint, fb.NormalizedLMS, fb.WeightMirror)):
            top = fb.points(net)["2"].B  # these start at 0
            assert top.abs().max() > 0
        B = new.clone()
    assert int(net.feedback.step) == 5
    assert int(net.feedback.skipped) == 0


@pytest.mark.parametrize(("rule", "structure"), CASES, ids=[f"{r!r}-{s}" for r, s in CASES])
def test_the_scale_of_the_loss_does_not_reach_b(rule: fb.Rule, structure: str) -> None:
    # regressors are per sample, not divided by N or by a loss scale (SPEC 3)
    learned = []
    for weight in (1.0, 1 / 8, 2.0**16):
        torch.manual_seed(0)
        net = fb.convert(mlp(), feedback=structure, rule=rule, noise_std=0.01)
        for step in range(4):
            x, y = data(net, seed=step)
            (weight * fb.PerturbedLoss(sse, net)(net(x), y).sum()).backward()
        learned.append([p.B for p in fb.points(net).values()])
    for other in learned[1:]:
        for a, b in zip(learned[0], other, strict=True):  # powers of two: the same bits
            assert a is None if isinstance(rule, fb.NodePerturbation) else torch.equal(a, b)


@pytest.mark.parametrize(("rule", "structure"), CASES, ids=[f"{r!r}-{s}" for r, s in CASES])
@pytest.mark.filterwarnings("ignore:.*non-finite loss")
def test_a_non_finite_sample_is_skipped(rule: fb.Rule, structure: str) -> None:
    net = fb.convert(mlp(), feedback=structure, rule=rule, noise_std=0.01)
    x, y = data(net)
    one_step(net, x, y)
    with torch.no_grad():
        for p in net.parameters():  # a mirror's B is W until W moves
            p.mul_(1.01)
    bad = x.clone()
    bad[3] = math.nan
    got = []
    for xs in (bad, x):
        other = copy.deepcopy(net)
        one_step(other, xs, y)
        got.append([p.B for p in fb.points(other).values()])
        own = (*fb.points(other).values(), other.feedback)
        assert all(torch.isfinite(b).all() for m in own for b in m.state.values() if b is not None)
        assert int(other.feedback.skipped) == (xs is bad)
    if rule.adapts and not isinstance(rule, fb.KolenPollack):  # and the other samples still count
        before = [p.B for p in fb.points(net).values()]
        assert all(not torch.equal(a, b) for a, b in zip(got[0], before, strict=True))
        reads = not isinstance(rule, fb.WeightMirror)  # whose samples are its own
        assert all(torch.equal(a, b) != reads for a, b in zip(got[0], got[1], strict=True))


def tall(sizes: tuple[int, ...]) -> nn.Sequential:
    return nn.Sequential(*(m for i, o in itertools.pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())))[:-1]


def grouped(*after: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *after)


@pytest.mark.parametrize(
    ("model", "shape", "samples", "expected"),
    [
        (lambda: tall((784, 500, 500, 10)), (128, 784), None, 3 * (128 * (784 * 500 + 500 * 500 + 5000) // (500 * 500 + 5000)) // 40),
        (lambda: tall((9, 8, 4)), (4, 9), None, 16),
        (lambda: tall((9, 8, 4)), (4, 9), 7, 7),
        (lambda: grouped(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 3)), (20, 3, 8, 8), None, 29),
        (lambda: grouped(nn.ConvTranspose2d(4, 3, 3)), (40, 3, 8, 8), None, 216),
        (lambda: grouped(nn.Conv2d(4, 3, 3)), (99, 3, 30, 30), None, 512),
    ],
)
def test_a_mirror_costs_a_twentieth_of_the_step(
    model: Callable[[], nn.Module], shape: tuple[int, ...], samples: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = fb.convert(model(), feedback="layerwise", rule=fb.WeightMirror(samples=samples))
    criterion, x, seen = fb.PerturbedLoss(nn.MSELoss(), net), torch.randn(shape), []
    with torch.no_grad():
        y = torch.randn_like(net(x))
    criterion(net(x), y).backward()
    mirror = fb.rules.weight_mirror.ops.mirror
    monkeypatch.setattr(fb.rules.weight_mirror.ops, "mirror", lambda *args, **o: (seen.append(args[5]), mirror(*args, **o))[1])
    criterion(net(x), y).backward()
    assert seen == [expected]
    if samples is None and expected not in (16, 512):
        read = [p.weight for p in fb.points(net).values()]
        counted = FlopCounterMode(display=False)
        with counted, torch.no_grad():
            net.eval()(x)
        mirrored, forward = 2 * expected * sum(w.numel() for w in read), counted.get_total_flops() / 2
        assert 0.04 < mirrored / (3 * forward) <= 0.05
