"""Where backprop gives no credit, or another than what is computed would earn, the difference follows it (SPEC 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import fbkernels as fb

STD = 1e-3
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:  # type: ignore[override]
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * -0.5


class Spike(torch.autograd.Function):
    """A step, with the derivative of a fast sigmoid for its own."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(h)
        return (h > 0).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (h,) = ctx.saved_tensors
        return g / (1 + 10 * h.abs()) ** 2


class Pair(torch.autograd.Function):
    """Two results of two activities, of which the second has no gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(a, b)
        order = (a + b).sign()
        ctx.mark_non_differentiable(order)
        return a * b, order

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        return g * b * 2, g * a


class Hidden(torch.autograd.Function):
    """A reversal whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:  # type: ignore[override]
        return h.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class Square(torch.autograd.Function):
    """What it computes, and cannot be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(h)
        return h * h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


def no_grad(h: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.softmax(5 * h, 1)
    return gate * h


def written(h: Tensor) -> Tensor:
    h = h * 1
    with torch.no_grad():
        h.mul_(3.0)
    return h


def kept_out(h: Tensor) -> Tensor:
    h = h * 1
    h.detach_()
    return h


def pair(h: Tensor) -> Tensor:
    product, order = Pair.apply(h, h.tanh())
    return product + 0.1 * order


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda h: h.detach(),
    "detach_": kept_out,
    "data": lambda h: h.data.exp(),
    "gate": lambda h: torch.sigmoid(5 * h).detach() * h,
    "no_grad": no_grad,
    "written": written,
    "straight-through": lambda h: h + (h.sign() - h).detach(),
    "reverse": Reverse.apply,
    "spike": Spike.apply,
    "pair": pair,
    "square": Square.apply,
}


class Model(nn.Module):
    """A way from a point to the output, beside a plain one that keeps the layer alive."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden, self.out, self.beside, self.way = nn.Linear(6, 7), nn.Linear(7, 3), nn.Linear(7, 3), way

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(x))
        result: Tensor = self.out(self.way(h)) + 0.1 * self.beside(h)
        return result


@pytest.mark.parametrize("options", [{}, {"antithetic": True}, {"fraction": 0.5}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_difference_goes_where_gradients_do(way: str, options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    model = Model(WAYS[way]).double()
    net = fb.convert(model, rule=fb.Joint(signal="output"), noise_std=STD, **options)
    output = net(X)
    step = net.feedback.current
    change = step.changes[0]
    point = fb.points(net)["hidden"]
    n = step.perturbed_rows
    xi = point.noise(net.feedback.step, n, torch.float64, 0)
    plain = Model(WAYS[way]).double()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if "feedback" not in k})
    h = torch.tanh(plain.hidden(X)).detach().requires_grad_()
    y = plain.out(plain.way(h)) + 0.1 * plain.beside(h)
    torch.testing.assert_close(output, y)
    J = torch.stack([torch.autograd.grad(y[:, k].sum(), h, retain_graph=True)[0] for k in range(3)], 1)[:n]
    want = torch.einsum("nku,nu->nk", J, xi)
    torch.testing.assert_close(change[:n], want, rtol=0, atol=20 * STD * float(want.abs().max()))
    if options.get("antithetic"):
        torch.testing.assert_close(change[n:], -want, rtol=0, atol=20 * STD * float(want.abs().max()))


def test_a_head_on_a_detached_activity_gives_no_credit() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out, self.head = nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.a(x))
            return self.out(torch.tanh(self.b(h))), self.head(h.detach())

    net = fb.convert(Heads().double(), noise_std=STD)
    net(X)
    step = net.feedback.current
    assert step.changes[0].abs().max() > 0
    assert step.changes[1] is None
    assert step.placement.reach == {"a": (0,), "b": (0,)}


def test_layers_under_no_grad_get_no_point() -> None:
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out, self.teacher = nn.Linear(6, 7), nn.Linear(7, 3), nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            with torch.no_grad():
                wanted = self.teacher(h)
            return self.out(h) - wanted

    for structure in ("direct", "layerwise"):
        net = fb.convert(Teacher().double(), feedback=structure, rule=fb.Ridge())
        fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(X), torch.arange(8) % 3).backward()
        assert all("teacher" not in name for name in fb.points(net))


def test_a_hidden_reversal_is_refused() -> None:
    net = fb.convert(Model(Hidden.apply).double())
    with pytest.raises(ValueError, match=r"gradient of custom autograd.Function 'Hidden' is not that of what it computes.*once_diff"):
        net(X)
