"""convert on networks that nobody has written: drawn layer by layer, as modules and as functions in forward, against plain torch."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fbkernels as fb

K = 3
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
Draw = Callable[[Any], Any]
pytestmark = pytest.mark.usefixtures("one_thread")

ACTIVATIONS = [
    nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Hardtanh, nn.Mish,
    lambda: nn.ReLU(inplace=True), lambda: nn.ELU(inplace=True), lambda: nn.SiLU(inplace=True), lambda: nn.LeakyReLU(0.1, inplace=True),
]  # fmt: skip
FUNCTIONS = [
    F.relu,
    torch.tanh,
    Tensor.sigmoid,
    F.gelu,
    Tensor.relu_,
    torch.tanh_,
    lambda x: F.relu(x, inplace=True),
    lambda x: x.clamp(-1, 1),
]
FLATTENINGS = [
    nn.Flatten(), lambda x: x.flatten(1), lambda x: x.view(x.size(0), -1), lambda x: torch.flatten(x, 1), lambda x: x.reshape(len(x), -1),
    lambda x: x.mean((2, 3)), lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1), lambda x: x.amax((2, 3)),
]  # fmt: skip


class Call(nn.Module):
    """A function in forward; it keeps no module of its own."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class Sum(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module | None, how: int) -> None:
        super().__init__()
        self.body, self.shortcut, self.how = body, shortcut, how

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        out: Tensor = self.body(x)
        if self.how == 0:
            return identity + out
        if self.how == 1:
            out += identity
            return out
        return torch.add(out, identity, alpha=0.5) if self.how == 2 else out.mul(0.5).add_(identity)


class Concat(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Gate(nn.Module):
    def __init__(self, body: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.body, self.gate = body, gate

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * torch.sigmoid(self.gate(x))


class Drop(nn.Dropout):
    """Dropout as a function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)


class Network(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def numbers(low: int, high: int) -> Any:
    return st.integers(low, high)


def group(draw: Draw, layer: nn.Module, shape: tuple[int, ...], shared: nn.Module) -> list[nn.Module]:
    """A layer and what may follow it in any order that somebody would write."""
    channels = shape[0]
    norms: list[Callable[[], nn.Module]] = [lambda: nn.LayerNorm(shape)]
    if len(shape) == 1:
        norms += [lambda: nn.BatchNorm1d(channels), lambda: nn.BatchNorm1d(channels, affine=False, track_running_stats=False)]
    else:
        norms += [lambda: nn.BatchNorm2d(channels), lambda: nn.GroupNorm(1, channels), lambda: nn.BatchNorm2d(channels, momentum=None)]
    out = [layer]
    if draw(st.booleans()):
        out.append(draw(st.sampled_from(norms))())
    kind = draw(numbers(0, 9))
    if kind < 5:
        out.append(draw(st.sampled_from(ACTIVATIONS))())
    elif kind < 8:
        out.append(Call(draw(st.sampled_from(FUNCTIONS))))
    elif kind < 9:
        out.append(shared)
    if draw(numbers(0, 4)) == 0:
        dropouts = [lambda: nn.Dropout(0.3), lambda: Drop(0.3), *([lambda: nn.Dropout2d(0.3)] if len(shape) == 3 else [])]
        out.append(draw(st.sampled_from(dropouts))())
    return out


def convolution(draw: Draw, channels: int, outputs: int, same: bool, large: bool) -> nn.Conv2d:
    kernel = draw(st.sampled_from((1, 3)))
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if channels % g == 0 and outputs % g == 0]))
    padding: Any = kernel // 2
    mode = draw(st.sampled_from(("zeros", "zeros", "reflect", "circular", "replicate"))) if large else "zeros"
    stride = 1 if same else draw(numbers(1, 2))
    if stride == 1 and draw(st.booleans()):
        padding = "same"
    return nn.Conv2d(channels, outputs, kernel, stride, padding, groups=groups, padding_mode=mode, bias=draw(st.booleans()))


def layer(draw: Draw, shape: tuple[int, ...], width: int | None = None, same: bool = False) -> tuple[nn.Module, tuple[int, ...]]:
    outputs = draw(numbers(1, 6)) if width is None else width
    if len(shape) == 1:
        return nn.Linear(shape[0], outputs, bias=draw(st.booleans())), (outputs,)
    made = convolution(draw, shape[0], outputs, same, min(shape[1:]) > 1)
    size = made(torch.zeros(1, *shape)).shape[1:]
    return made, tuple(size)


def stage(draw: Draw, shape: tuple[int, ...], shared: nn.Module, depth: int = 0) -> tuple[list[nn.Module], tuple[int, ...]]:
    """Something with layers in it."""
    kind = draw(numbers(0, 9)) if depth < 2 else 0
    if kind < 6:
        made, shape = layer(draw, shape)
        out = group(draw, made, shape, shared)
        if len(shape) == 3 and min(shape[1:]) >= 4 and draw(st.booleans()):
            pools: list[Callable[[Tensor], Tensor]] = [
                nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d((3, 2)),
                Call(lambda x: F.max_pool2d(x, 2)), Call(lambda x: F.avg_pool2d(x, 3, 2, 1)),
                nn.AvgPool2d(3, 2, 1, count_include_pad=False),
                nn.MaxPool2d(2, ceil_mode=True), Call(lambda x: x[:, :, ::2, 1:]),
            ]  # fmt: skip
            out.append(draw(st.sampled_from(pools)))
            shape = tuple(nn.Sequential(out[-1])(torch.zeros(1, *shape)).shape[1:])
        return out, shape
    if kind < 8:  # a sum
        made, inner = layer(draw, shape, same=True)
        body = group(draw, made, inner, shared)
        last, end = layer(draw, inner, same=True) if draw(st.booleans()) else layer(draw, inner, shape[0], same=True)
        body += group(draw, last, end, shared) if draw(st.booleans()) else [last]
        shortcut = None if end == shape else layer(draw, shape, end[0], same=True)[0]
        return [Sum(nn.Sequential(*body), shortcut, draw(numbers(0, 3)))], end
    if kind < 9:  # branches side by side
        branches, channels = [nn.Sequential(Call(lambda x: x))] if draw(st.booleans()) else [], 0
        channels = shape[0] * len(branches)
        for _ in range(2):
            made, end = layer(draw, shape, same=True)
            branches.append(nn.Sequential(*group(draw, made, end, shared)))
            channels += end[0]
        return [Concat(*branches)], (channels, *shape[1:])
    width = draw(numbers(1, 6))
    (a, end), (b, _) = layer(draw, shape, width, same=True), layer(draw, shape, width, same=True)
    return [Gate(nn.Sequential(*group(draw, a, end, shared)), b)], end


@st.composite
def networks(draw: Draw) -> tuple[nn.Module, tuple[int, ...], int]:
    """A network, the shape of its input, and the size of a batch."""
    torch.manual_seed(draw(numbers(0, 2**31)))
    shape: tuple[int, ...] = (draw(numbers(1, 7)),)
    if draw(st.booleans()):
        shape = (draw(numbers(1, 3)), draw(numbers(5, 8)), draw(numbers(5, 8)))
    start, shared, layers = shape, draw(st.sampled_from(ACTIVATIONS))(), list[nn.Module]()
    for _ in range(draw(numbers(1, 3))):
        made, shape = stage(draw, shape, shared)
        layers += made
    if len(shape) == 3:
        flatten = draw(st.sampled_from(FLATTENINGS))
        layers.append(flatten if isinstance(flatten, nn.Module) else Call(flatten))
        shape = tuple(layers[-1](torch.zeros(1, *shape)).shape[1:])
        if draw(st.booleans()):
            made, shape = stage(draw, shape, shared)
            layers += made
    layers.append(nn.Linear(shape[0], K))
    net: nn.Module = nn.Sequential(*layers) if draw(st.booleans()) else Network(layers)
    return net, start, draw(numbers(2, 5))


def fuzz(examples: int) -> Any:
    phases = (Phase.explicit, Phase.reuse, Phase.generate)  # networks are small, and to shrink them takes minutes
    return settings(max_examples=examples, deadline=None, phases=phases, suppress_health_check=list(HealthCheck))


def run(net: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(5)  # of dropout
    out: Tensor = net(x)
    return out


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


@fuzz(EXAMPLES)
@given(networks())
def test_random_networks(drawn: tuple[nn.Module, tuple[int, ...], int]) -> None:
    model, shape, n = drawn
    x, y = torch.randn(n, *shape), torch.arange(n) % K
    plain = copy.deepcopy(model).double()
    try:
        expected = run(plain, x.double())
        F.cross_entropy(expected, y).backward()
    except (RuntimeError, ValueError):  # torch refuses it: in place on what a gradient needs, one value a channel
        assume(False)

    for feedback, rule in (("direct", fb.Joint()), ("layerwise", fb.Joint()), ("layerwise", fb.WeightTransport())):
        own = copy.deepcopy(model)
        net = fb.convert(own, feedback=feedback, rule=copy.deepcopy(rule))
        assert torch.equal(net.eval()(x), own.eval()(x))
        net = fb.convert(copy.deepcopy(model).double(), feedback=feedback, rule=rule)
        criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
        out = run(net, x.double())
        assert type(out) is Tensor
        assert torch.equal(out, expected)
        ours = {k: v for k, v in net.state_dict().items() if ".feedback." not in k}
        assert all(torch.equal(ours[k], v) for k, v in plain.state_dict().items())  # running statistics
        criterion(out, y).backward()
        for name, g in gradients(plain).items():
            own_g = dict(net.named_parameters())[name].grad
            if isinstance(rule, fb.WeightTransport):
                assert g is not None and own_g is not None, name
                scale = max(float(p.abs().max()) for p in gradients(plain).values())
                torch.testing.assert_close(own_g, g, rtol=1e-9, atol=1e-11 * scale, msg=lambda m, name=name: f"{name}: {m}")
            else:
                assert own_g is not None and own_g.isfinite().all(), name
        criterion(run(net, x.double()), y).backward()  # B has learned
        fb.flush(net)
        assert all(point.B is not None and point.B.isfinite().all() for point in fb.points(net).values())
        back = fb.revert(net)
        assert list(back.state_dict()) == list(model.state_dict())


@fuzz(EXAMPLES // 4)
@given(networks(), st.sampled_from(["direct", "layerwise"]), st.booleans())
def test_random_networks_in_float32(drawn: tuple[nn.Module, tuple[int, ...], int], feedback: str, antithetic: bool) -> None:
    """The fused kernels: the clean stream to rounding, finite gradients, a loss change that is the noise's."""
    model, shape, n = drawn
    x, y = torch.randn(n, *shape), torch.arange(n) % K
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # torch draws a mask in the order of memory, and the kernels' maps are channels-last
    try:
        exact = run(copy.deepcopy(model).double(), x.double())
        rounded = run(copy.deepcopy(model), x)
        F.cross_entropy(rounded, y).backward()
    except (RuntimeError, ValueError):
        assume(False)
    net = fb.convert(copy.deepcopy(model), feedback=feedback, rule=fb.Joint(), antithetic=antithetic)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    out = run(net, x)
    exact = exact.detach()
    error, limit = ((t.detach().double() - exact).norm() for t in (out, rounded))
    assert error <= 4 * limit + 30 * 2.0**-24 * exact.norm(), (float(error), float(limit))
    for _ in range(2):
        criterion(out, y).backward()
        out = run(net, x)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
