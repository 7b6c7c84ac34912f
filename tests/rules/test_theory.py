"""What the theory promises of learned feedback, as numbers: SPEC 2, 4 and 7, PAPER 2. W is fixed throughout."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fbkernels as fb
from fbkernels.reference import units

SIGMA = 1e-2
Criterion = Callable[[Tensor, Any], Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


def half_sse(y: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (y - t).square().flatten(1).sum(1)


def cross_entropy(y: Tensor, t: Tensor) -> Tensor:
    return nn.functional.cross_entropy(y, t, reduction="none")


def mlp(*sizes: int, activation: type[nn.Module] = nn.Identity) -> nn.Sequential:
    """Layers "0", "2", ...; weights as the authors start them, N(0, 2 / n_in) (SPEC 8)."""
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(sizes):
        layers += [nn.Linear(n, m), activation()]
        nn.init.normal_(layers[-2].weight, std=(2 / n) ** 0.5)
    return nn.Sequential(*layers[:-1]).double()


def batch(n: int, inputs: int | tuple[int, ...], outputs: int, criterion: Criterion) -> tuple[Tensor, Tensor]:
    shape = (inputs,) if isinstance(inputs, int) else inputs
    x = torch.randn(n, *shape, dtype=torch.float64)
    return x, torch.randint(outputs, (n,)) if criterion is cross_entropy else torch.randn(n, outputs, dtype=torch.float64)


def learn(net: nn.Module, criterion: Criterion, steps: int, data: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """B learns, W stands still."""
    loss = fb.PerturbedLoss(criterion, net)
    for _ in range(steps):
        x, y = data()
        loss(net(x), y).sum().backward()
        net.zero_grad()


def true_gradients(model: nn.Sequential, criterion: Criterion, x: Tensor, y: Tensor, names: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Backprop's per-sample dL/dh_l, samples x units, of the activities after the named modules; and e."""
    kept: dict[str, Tensor] = {}
    h = x
    for name, module in model.named_children():
        h = module(h)
        if name in names:
            h.retain_grad()
            kept[name] = h
    h.retain_grad()
    criterion(h, y).sum().backward()
    model.zero_grad()
    return {name: units(a.grad) for name, a in kept.items()}, h.grad


def predicted_error(g: Tensor, everyone: Tensor, r: Tensor, samples: int, B: Tensor) -> float:
    """The expected |(B_T - B) V^(1/2)| / |B V^(1/2)| of ridge after T samples, to first order in sigma.

    lam_k = xi_k (g . xi) / sigma^2 over all noisy units has variance |g_all|^2 + g_k^2 for Gaussian noise (SPEC 7), summed over the layer
    n_l |g_all|^2 + |g_l|^2; B_T - B = sum (lam - B r) r^T V^-1. ``g``: the layer's gradient, ``everyone``: |g_all|^2 of each sample.
    """
    V = r.T @ r / len(r)
    variance = g.shape[1] * everyone + g.square().sum(1)
    noise = torch.trace(torch.linalg.pinv(V, rtol=1e-9) @ (r.T * variance) @ r) / len(r)
    return float((noise / samples / (B @ V @ B.T).trace()).sqrt())


def projected(B: Tensor, W: Tensor, r: Tensor) -> float:
    return float(((B - W) @ r.T).norm() / (W @ r.T).norm())


def angle(a: Tensor, b: Tensor) -> float:
    return math.degrees(math.acos(min(1.0, float((a * b).sum() / (a.norm() * b.norm())))))


def within(error: float, predicted: float, entries: int) -> bool:
    """An error whose square is a sum of ``entries`` squared Gaussians, equal in size to a factor of about 4, is within five deviations."""
    spread = 5 * math.sqrt(2 * 4 / entries)
    return predicted * math.sqrt(max(1 - spread, 0.1)) < error < predicted * math.sqrt(1 + spread)


# Theorem 1


@pytest.mark.parametrize("structure", ["direct", "layerwise"])
@pytest.mark.parametrize("criterion", [half_sse, cross_entropy])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid])
def test_top_feedback_converges_to_the_output_weight(structure: str, criterion: Criterion, activation: type[nn.Module]) -> None:
    model = mlp(20, 10, 16, 8, activation=activation)
    net = fb.convert(model, feedback=structure, rule=fb.Ridge(gamma=0.1), noise_std=SIGMA)
    steps, n = 150, 1024
    learn(net, criterion, steps, lambda: batch(n, 20, 8, criterion))

    x, y = batch(20_000, 20, 8, criterion)
    g, e = true_gradients(model, criterion, x, y, ["1", "3"])
    W = model[4].weight.detach().T
    torch.testing.assert_close(g["3"], e @ W.T)  # the reason the theorem gives
    expected = predicted_error(g["3"], sum(v.square().sum(1) for v in g.values()), e, steps * n, W)
    error = projected(fb.points(net)["2"].B, W, e)
    assert within(error, expected, W.numel())
    assert error < 0.05  # PAPER 2: 0.014 to 0.047 after 640,000 samples on nets of this size


# Theorems 2 and 3


def downstream(model: nn.Sequential) -> dict[str, Tensor]:
    """The product of the weights above each layer of a deep linear net, units x outputs."""
    linear = {name: m.weight.detach() for name, m in model.named_children() if isinstance(m, nn.Linear)}
    names, product, result = list(linear), torch.eye(len(list(linear.values())[-1]), dtype=torch.float64), {}
    for below, name in zip(reversed(names[:-1]), reversed(names), strict=False):
        product = product @ linear[name]
        result[below] = product.T
    return result


def test_direct_feedback_of_a_deep_linear_net_converges_to_the_downstream_product() -> None:
    model = mlp(16, 12, 10, 9, 6)
    net = fb.convert(model, feedback="direct", rule=fb.Ridge(), noise_std=SIGMA)
    x, y = batch(20_000, 16, 6, half_sse)
    product = downstream(model)
    g, e = true_gradients(model, half_sse, x, y, ["1", "3", "5"])
    everyone = sum(v.square().sum(1) for v in g.values())
    errors: dict[int, dict[str, float]] = {}
    for steps, total in ((40, 40), (120, 160)):
        learn(net, half_sse, steps, lambda: batch(1024, 16, 6, half_sse))
        errors[total] = {name: projected(fb.points(net)[name].B, J, e) for name, J in product.items()}
        for (name, J), after in zip(product.items(), ("5", "3", "1"), strict=True):
            torch.testing.assert_close(g[after], e @ J.T)
            expected = predicted_error(g[after], everyone, e, total * 1024, J)
            assert within(errors[total][name], expected, J.numel()), (name, errors[total][name], expected)
    # units / samples: four times the samples halve the error. Old and new errors share a quarter of their samples, so that the ratio's
    # relative deviation is below that of two independent ones, sqrt(2 / (2 n m)) = 0.13 of the smallest B.
    for name in product:
        assert 2 / 1.65 < errors[40][name] / errors[160][name] < 2 * 1.65


def test_layerwise_feedback_of_a_deep_linear_net_converges_to_each_weight() -> None:
    model = mlp(16, 12, 10, 9, 6)
    net = fb.convert(model, feedback="layerwise", rule=fb.Ridge(), noise_std=SIGMA)
    x, y = batch(20_000, 16, 6, half_sse)
    g, e = true_gradients(model, half_sse, x, y, ["1", "3", "5"])
    everyone = sum(v.square().sum(1) for v in g.values())
    above = {"0": g["3"], "2": g["5"], "4": e}  # the true pre-activation errors: the regressors in the limit
    weight = {name: model[int(name) + 2].weight.detach().T for name in above}
    errors: dict[int, dict[str, float]] = {}
    for steps, total in ((75, 75), (225, 300)):
        learn(net, half_sse, steps, lambda: batch(1024, 16, 6, half_sse))
        errors[total] = {name: projected(fb.points(net)[name].B, weight[name], above[name]) for name in above}
        floor = 0.0
        for name, after in (("4", "5"), ("2", "3"), ("0", "1")):
            # A layer's own regression noise, and that of its regressors, which come through the B above it: V and S of the early
            # samples, when those were still wrong, weigh in as well, hence the factor 3 upwards.
            own = predicted_error(g[after], everyone, above[name], total * 1024, weight[name])
            floor = math.hypot(floor, own)
            assert own / 2 < errors[total][name] < 3 * floor, (name, errors[total][name], own, floor)
    for name in above:
        assert 2 / 1.65 < errors[75][name] / errors[300][name] < 2 * 1.65, (name, errors)
    assert max(errors[300].values()) < 0.1


# The target


class Spy(fb.Rule):
    """Learns nothing, keeps what a rule is shown."""

    def __init__(self) -> None:
        self.seen: list[fb.Measurement] = []

    def update(self, m: fb.Measurement, state: dict[str, Tensor]) -> tuple[None, Tensor]:
        self.seen.append(m)
        return None, torch.zeros_like(m.regressor)


def targets(net: nn.Module, rule: Spy, criterion: Criterion, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """lam = dL xi / sigma^2 of one step, from the public noise."""
    fb.PerturbedLoss(criterion, net)(net(x), y)
    m, f = rule.seen[-1], net.feedback
    points = fb.points(net)
    xi = {
        k: fb.functional.noise(f.settings.seed, m.step, p.index, m.rows, p.units, m.std, f.settings.noise).double()
        for k, p in points.items()
    }
    return {k: m.w[:, None] * v for k, v in xi.items()}


def standard_errors(samples: Tensor, mean: Tensor) -> Tensor:
    return (samples.mean(0) - mean) / (samples.std(0) / math.sqrt(len(samples)))


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("criterion", [half_sse, cross_entropy])
def test_the_target_estimates_the_gradient_without_bias(criterion: Criterion, noise: str, antithetic: bool) -> None:
    model = mlp(7, 6, 5, 4, activation=nn.Tanh)
    rule, n = Spy(), 2**16
    net = fb.convert(model, rule=rule, noise_std=1e-3, noise=noise, antithetic=antithetic)
    x, y = batch(1, 7, 4, criterion)
    lam = targets(net, rule, criterion, x.expand(n, -1), y.expand(n, *y.shape[1:]))
    g, _ = true_gradients(model, criterion, x, y, ["1", "3"])
    everyone = sum(float(v.square().sum()) for v in g.values())
    for name, after in (("0", "1"), ("2", "3")):
        # the bias, of order sigma^2 = 1e-6, is far below a standard error, |g| / 256
        assert standard_errors(lam[name], g[after][0]).abs().max() < 5
        kurtosis = 1 if noise == "gaussian" else -1
        variance = everyone + kurtosis * g[after][0].square()
        # var(lam_k) = |g_all|^2 +- g_k^2 whatever sigma is (SPEC 7); lam is a product of two Gaussians at worst: relative deviation of the
        # sample variance below sqrt(80 / n)
        assert (lam[name].var(0) / variance - 1).abs().max() < 5 * math.sqrt(80 / n)


def cubic(y: Tensor, t: Tensor) -> Tensor:
    return y.squeeze(1) ** 3 / 6


def quadratic(y: Tensor, t: Tensor) -> Tensor:
    return y.squeeze(1) ** 2 / 2


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_bias_of_a_large_sigma_is_that_of_the_third_order(antithetic: bool) -> None:
    # y = w . (h + xi), L = y^3 / 6:  E[lam] = y^2 w / 2 + sigma^2 / 2 |w|^2 w exactly; +xi and -xi see the same odd orders, hence the same
    # bias
    model, sigma, n = mlp(3, 4, 1), 1.0, 2**18
    rule = Spy()
    net = fb.convert(model, rule=rule, noise_std=sigma, antithetic=antithetic)
    x = torch.randn(1, 3, dtype=torch.float64)
    lam = targets(net, rule, cubic, x.expand(n, -1), torch.zeros(n, 1, dtype=torch.float64))["0"]
    w, y = model[2].weight.detach()[0], model(x).item()
    gradient = y**2 / 2 * w
    assert standard_errors(lam, gradient + sigma**2 / 2 * w.square().sum() * w).abs().max() < 5
    assert standard_errors(lam, gradient).abs().max() > 15


def test_antithetic_noise_removes_even_orders() -> None:
    # L = y^2 / 2 is its second-order expansion: dL = g . xi + (w . xi)^2 / 2. The even term is uncorrelated with xi, so it is noise in
    # lam and not bias: E[(w . xi)^4 xi_k^2] / (4 sigma^4) = sigma^2 (3 |w|^4 + 12 |w|^2 w_k^2) / 4 of variance for Gaussian noise.
    model, sigma, n = mlp(3, 4, 1), 2.0, 2**18
    x = torch.randn(1, 3, dtype=torch.float64)
    w, y = model[2].weight.detach()[0], model(x).item()
    t = torch.zeros(n, 1, dtype=torch.float64)
    g = y * w
    exact = g.square().sum() + g.square()
    even = sigma**2 * (3 * w.square().sum() ** 2 + 12 * w.square().sum() * w.square()) / 4
    for antithetic in (False, True):
        rule = Spy()
        net = fb.convert(model, rule=rule, noise_std=sigma, antithetic=antithetic)
        lam = targets(net, rule, quadratic, x.expand(n, -1), t)["0"]
        assert standard_errors(lam, g).abs().max() < 5
        # the sample variance of a sixth-order product of Gaussians: relative deviation below sqrt(10^3 / n)
        torch.testing.assert_close(lam.var(0), exact if antithetic else exact + even, rtol=5 * math.sqrt(1000 / n), atol=0)
        if antithetic:  # and sample by sample the loss change is the linear one
            xi = fb.functional.noise(0, 0, 0, n, 4, sigma).double()
            torch.testing.assert_close(rule.seen[0].loss_change, xi @ g, rtol=1e-5, atol=1e-5 * float(g.norm()))
    assert (even / exact).min() > 1


def test_a_batch_wide_loss_difference_has_n_times_the_variance() -> None:
    model = mlp(7, 6, 5, 4, activation=nn.Tanh)
    rule, n, steps = Spy(), 32, 2000
    net = fb.convert(model, rule=rule, noise_std=1e-3)
    x, y = batch(1, 7, 4, half_sse)
    g, _ = true_gradients(model, half_sse, x, y, ["1", "3"])
    everyone = float(sum(v.square().sum() for v in g.values()))
    lam = targets(net, rule, half_sse, x.expand(n * steps, -1), y.expand(n * steps, -1))["2"].view(steps, n, 5)
    w = rule.seen[0].w.view(steps, n, 1)
    own, wide = lam.sum(1), w.sum(1) * (lam / w).sum(1)
    assert standard_errors(own, n * g["3"][0]).abs().max() < 5
    assert standard_errors(wide, n * g["3"][0]).abs().max() < 5
    ratio = float(wide.var(0).sum() / own.var(0).sum())
    # per sample: n (5 |g_all|^2 + |g_l|^2); batch-wide: n of these and n (n - 1) products of independent samples
    own_variance, cross = 5 * everyone + float(g["3"].square().sum()), 5 * everyone
    expected = (own_variance + (n - 1) * cross) / own_variance
    assert n / 2 < expected <= n
    # five units' variances, the batch-wide one a product of two Gaussians (kurtosis 9): deviation below sqrt((8 + 2) / steps)
    assert ratio == pytest.approx(expected, rel=5 * math.sqrt(10 / steps))


# Convolutions: one kernel for all positions


def conv_net(*between: nn.Module, **options: Any) -> nn.Sequential:
    """A point at the first layer, ``between`` and a second convolution that reads it, and exact layers from there on."""
    second = nn.Conv2d(4, 6, **({"kernel_size": 3} | options))
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Sequential(*between), second, nn.Flatten(), nn.LazyLinear(40)).double()
    model(torch.zeros(2, 2, 5, 5, dtype=torch.float64))
    return model


CONVOLUTIONS: list[tuple[tuple[nn.Module, ...], dict[str, Any]]] = [
    ((), {"padding": 1}),
    ((), {"stride": 2, "padding": 1}),
    ((), {"groups": 2, "dilation": 2, "padding": 2}),
    ((), {"padding": "same", "dilation": 2}),
    ((), {"kernel_size": (1, 3), "padding": "valid"}),
    ((), {"kernel_size": 2, "padding": "same"}),
    ((), {"padding_mode": "circular", "padding": 1}),
    ((), {"padding_mode": "reflect", "padding": 1}),
    ((nn.ZeroPad2d(1),), {}),
    ((nn.Dropout(0.5),), {"padding": 1}),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("between", "options"), CONVOLUTIONS, ids=str)
def test_layerwise_ridge_of_a_convolution_converges_to_its_kernel(between: tuple[nn.Module, ...], options: dict[str, Any]) -> None:
    model = conv_net(*between, **options)
    net = fb.convert(model, feedback="layerwise", rule=fb.Ridge(), noise_std=SIGMA, include="0")
    steps, n = 60, 256
    learn(net, half_sse, steps, lambda: batch(n, (2, 5, 5), 40, half_sse))
    B, W = fb.points(net)["0"].B, model[2].weight.detach()
    assert B.shape == W.shape
    row = fb.metrics.alignment(net, half_sse, *batch(n, (2, 5, 5), 40, half_sse))["0"]
    # parameters of B / samples (SPEC 3): each has the noise |g|^2 of the whole layer, the patches' errors add up to |g|^2
    expected = math.sqrt(W.numel() / (steps * n))
    assert within(row["projected_error"], expected, W.numel())


@pytest.mark.parametrize("structure", ["direct", "layerwise"])
def test_dropout_does_not_rescale_the_feedback(structure: str) -> None:
    # h -> m h with masks m of 0 and 1 / (1 - p): E[lam] = m W^T e has the mean W^T e, and m^2 has not
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 8)).double()
    net = fb.convert(model, feedback=structure, rule=fb.Ridge(), noise_std=SIGMA)
    steps, n = 50, 1024
    learn(net, half_sse, steps, lambda: batch(n, 20, 8, half_sse))
    B, W = fb.points(net)["0"].B, model[3].weight.detach().T
    # the noise of lam_k is below m_max^2 = 4 times |g|^2, e is white to a factor 2: the relative error is below sqrt(2 * 4 * 8 * 16 / T)
    expected = math.sqrt(2 * 4 * W.numel() / (steps * n))
    assert (B - W).norm() / W.norm() < 2 * expected


# Weight mirror


READERS = {
    "linear": nn.Linear(24, 7),
    "grouped": nn.Sequential(nn.Unflatten(1, (6, 4)), nn.Conv1d(6, 9, 3, groups=3)),
    "depthwise": nn.Sequential(nn.Unflatten(1, (6, 2, 2)), nn.Conv2d(6, 6, 2, groups=6)),
    "transposed": nn.Sequential(nn.Unflatten(1, (6, 2, 2)), nn.ConvTranspose2d(6, 4, 3, groups=2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reader", READERS)
def test_a_mirror_knows_w_before_the_first_step(reader: str, dtype: torch.dtype) -> None:
    """From the answers to an orthogonal set of P patterns; sums of n and of P numbers round by (n + P) eps. bfloat16: under autocast."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    layer = copy.deepcopy(READERS[reader])
    net = fb.convert(
        nn.Sequential(nn.Linear(5, 24), nn.Tanh(), layer, nn.Flatten(), nn.LazyLinear(3)).to(exact),
        feedback="layerwise",
        rule=fb.WeightMirror(),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        net(torch.randn(2, 5, dtype=exact))
    point = fb.points(net)["0"]
    B, W = (point.connection.answers(t.detach().double()) for t in (point.B if point.connection.convolution else point.B.T, point.weight))
    n = W[0].numel()
    bound = (n + 2 * n) * torch.finfo(exact).eps * W.flatten(1).abs().sum(1)
    assert bool(((B - W).flatten(1).abs().amax(1) <= bound).all()) and point.B.dtype == exact


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("between", "options"), CONVOLUTIONS, ids=str)
def test_weight_mirror_finds_a_convolution(between: tuple[nn.Module, ...], options: dict[str, Any]) -> None:
    model = conv_net(*between, **options)
    net = fb.convert(model, feedback="layerwise", rule=fb.WeightMirror(), noise_std=SIGMA, include="0")
    learn(net, half_sse, 200, lambda: batch(16, (2, 5, 5), 40, half_sse))
    assert angle(fb.points(net)["0"].B, model[2].weight.detach()) < 3


def test_weight_mirror_needs_no_linear_net() -> None:
    model = mlp(20, 30, 20, 10, activation=nn.Tanh)
    net = fb.convert(model, feedback="layerwise", rule=fb.WeightMirror(), noise_std=SIGMA)
    learn(net, cross_entropy, 300, lambda: batch(64, 20, 10, cross_entropy))
    for name, above in (("0", 2), ("2", 4)):
        assert angle(fb.points(net)[name].B, model[above].weight.detach().T) < 3


class Residual(nn.Module):
    """Layers that share what they read with each other and with skip connections, and one that reads a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.out = (nn.Linear(i, o) for i, o in ((16, 12), (12, 12), (12, 12), (12, 12), (12, 6)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        s = torch.tanh(h + self.b(h) + self.c(h))
        return self.out(s + self.d(s))


# ridge's error falls with the square root of the samples; a target that sees the skip connections would be wrong by its own size
@pytest.mark.parametrize(("rule", "steps", "limit"), [(fb.Ridge(), 150, 0.25), (fb.Joint(0.3), 300, 0.2), (fb.WeightMirror(), 100, 0.05)])
def test_layerwise_feedback_beside_skip_connections_converges_to_each_weight(rule: fb.Rule, steps: int, limit: float) -> None:
    net = fb.convert(Residual().double(), feedback="layerwise", rule=rule, noise_std=SIGMA)
    learn(net, half_sse, steps, lambda: batch(512, 16, 6, half_sse))
    rows = fb.metrics.alignment(net, half_sse, *batch(1000, 16, 6, half_sse))
    assert list(rows) == list(fb.points(net))
    assert all(row["projected_error"] < limit for row in rows.values()), rows


# The joint rules


@pytest.mark.parametrize("signal", ["output", "loss"])
def test_joint_rules_beat_a_regression_per_layer(signal: str) -> None:
    model = mlp(16, 12, 10, 8, 6)
    n_tot, K = 30, 6
    samples = 40 * n_tot * (1 if signal == "output" else K)  # they need about n_tot, n_tot K (SPEC 4)
    product = downstream(model)
    error: dict[str, list[float]] = {}
    x, y = batch(5000, 16, K, half_sse)
    _, e = true_gradients(model, half_sse, x, y, [])
    for rule in (fb.Ridge(), fb.Joint(lr=0.2, signal=signal)):
        net = fb.convert(copy.deepcopy(model), feedback="direct", rule=rule, noise_std=SIGMA)
        learn(net, half_sse, samples // 32, lambda: batch(32, 16, K, half_sse))
        error[type(rule).__name__] = [projected(fb.points(net)[name].B, J, e) for name, J in product.items()]
    for ridge, joint in zip(error["Ridge"], error["Joint"], strict=True):
        assert joint < ridge / 4


def test_joint_rule_converges_layerwise() -> None:
    model = mlp(16, 12, 10, 8)
    net = fb.convert(model, feedback="layerwise", rule=fb.Joint(lr=0.3), noise_std=SIGMA)
    learn(net, half_sse, 400, lambda: batch(32, 16, 8, half_sse))
    for row in fb.metrics.alignment(net, half_sse, *batch(1000, 16, 8, half_sse)).values():
        assert row["projected_error"] < 0.1


# Synthetic gradients


def test_synthetic_gradients_find_the_best_linear_map_where_lms_is_slower() -> None:
    model = mlp(12, 16, 10, 6, activation=nn.Tanh)
    x, y = batch(20_000, 12, 6, half_sse)
    g, e = true_gradients(model, half_sse, x, y, ["1", "3"])
    error = {}
    for rule in (fb.SyntheticGradient(lr=2e-4), fb.LMS(lr=2e-4)):
        net = fb.convert(copy.deepcopy(model), feedback="direct", rule=rule, noise_std=SIGMA)
        learn(net, half_sse, 300, lambda: batch(64, 12, 6, half_sse))
        for name, after in (("0", "1"), ("2", "3")):
            best = torch.linalg.lstsq(e, g[after]).solution.T
            error[type(rule).__name__, name] = projected(fb.points(net)[name].B, best, e)
    for name in ("0", "2"):
        assert error["SyntheticGradient", name] < 0.1
        assert error["LMS", name] > 3 * error["SyntheticGradient", name]
