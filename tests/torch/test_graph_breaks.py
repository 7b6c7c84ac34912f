"""torch.compile where a user's code breaks the graph: a training forward and its loss then run as they are, whole, and what is around them
is compiled. The numbers are eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fbkernels as fb

RULES = [("direct", fb.Joint()), ("direct", fb.Ridge()), ("layerwise", fb.WeightMirror()), ("layerwise", fb.LMS(1e-2))]


class Net(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.a, self.b, self.c, self.breaks = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4), breaks

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        if self.breaks and h.sum().item() > 1e9:
            h = h * 0
        return self.c(torch.relu(self.b(h)))


def broken(out: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(out, y, reduction="none")
    torch._dynamo.graph_break()
    return losses


def the_model(net: nn.Module, criterion: nn.Module, compiled: Callable[[Any], Any]) -> Callable[..., Tensor]:
    net = compiled(net)
    return lambda x, y: criterion(net(x), y)


def model_and_criterion(net: nn.Module, criterion: nn.Module, compiled: Callable[[Any], Any]) -> Callable[..., Tensor]:
    net, criterion = compiled(net), compiled(criterion)
    return lambda x, y: criterion(net(x), y)


def a_step(net: nn.Module, criterion: nn.Module, compiled: Callable[[Any], Any]) -> Callable[..., Tensor]:
    return compiled(lambda x, y: criterion(net(x), y))


def a_step_that_prints(net: nn.Module, criterion: nn.Module, compiled: Callable[[Any], Any]) -> Callable[..., Tensor]:
    def step(x: Tensor, y: Tensor) -> Tensor:
        out = net(x)
        print(len(x))
        return criterion(out, y)

    return compiled(step)


CASES = [(the_model, "model"), (model_and_criterion, "criterion"), (a_step, "model"), (a_step, "criterion"), (a_step_that_prints, "")]


@pytest.mark.parametrize(("what", "breaks"), CASES)
@pytest.mark.parametrize(("feedback", "rule"), RULES, ids=repr)
def test_a_graph_that_breaks_trains_as_eager(feedback: str, rule: fb.Rule, breaks: str, what: Any) -> None:
    found = []
    for compiled in (lambda f: f, lambda f: torch.compile(f, backend="eager")):
        torch.manual_seed(0)
        net = fb.convert(Net(breaks == "model").double(), feedback=feedback, rule=rule)
        criterion = fb.PerturbedLoss(broken if breaks == "criterion" else nn.CrossEntropyLoss(), net)
        step = what(net, criterion, compiled)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for n in (8, 8, 5, 3):
            optimizer.zero_grad()
            x = torch.randn(n, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
            loss = step(x, torch.arange(n) % 4).mean()
            loss.backward()
            optimizer.step()
        found.append([loss.detach(), *net.parameters(), *(p.B for p in fb.points(net).values())])
    torch.testing.assert_close(*found)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def test_a_custom_function_beside_a_break_is_torchs_own() -> None:
    """Its apply goes through fbkernels once a network has run."""
    net = fb.convert(Net(False))
    fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(torch.randn(4, 8)), torch.arange(4)).backward()

    def f(x: Tensor) -> Tensor:
        y = Double.apply(x)
        torch._dynamo.graph_break()
        return Double.apply(y.sin())

    x = torch.randn(3, requires_grad=True)
    assert torch.equal(torch.compile(f, backend="aot_eager")(x), f(x))


def test_open_sizes_from_the_first_step_on() -> None:
    """Dynamo traces twice where a size turns out to stay open, and the first trace has placed the points."""
    net = fb.convert(Net(False), feedback="layerwise", rule=fb.WeightMirror())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    step = torch.compile(lambda x, y: criterion(net(x), y), backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (8, 5):
        assert step(torch.randn(n, 8), torch.arange(n) % 4).isfinite()
