"""Dropout and DropPath behind a layer: its feedback point comes after them, and the error passes the mask."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fbkernels as fb
from fbkernels import reference
from fbkernels.lab.models import paper_cnn

CL = torch.channels_last
DROPS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda h: F.dropout(h, 0.4),
    "module": nn.Dropout(0.3),
    "of channels": lambda h: F.dropout2d(h, 0.5),
    "method": lambda h: torch.dropout(h, 0.5, True),
    "twice": lambda h: F.dropout(F.dropout(h, 0.4), 0.3),
    "before pooling": lambda h: F.max_pool2d(F.dropout(h, 0.4), 2),
    "behind pooling": lambda h: F.dropout(F.max_pool2d(h, 2), 0.4),
    "before an activation": lambda h: F.dropout(h, 0.4).sigmoid(),
    "timm's DropPath": lambda h: h * h.new_empty((len(h), 1, 1, 1)).bernoulli_(0.5).div_(0.5),
    "torchvision's": lambda h: h * torch.empty((len(h), 1, 1, 1), dtype=h.dtype, device=h.device).bernoulli_(0.5).div_(0.5),
}


class Dropped(nn.Module):
    """One hidden convolution: with the output's weight as B, direct feedback is backprop."""

    def __init__(self, drop: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(2, 4, 3, padding=1), drop
        self.out = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x))
        return self.out((self.drop(h) if self.training else h).flatten(1))


def build(drop: str, dtype: torch.dtype, memory_format: torch.memory_format) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Dropped(DROPS[drop])
    x = torch.randn(8, 2, 6, 6)
    model(x)
    return model.to(dtype, memory_format=memory_format), x.to(dtype, memory_format=memory_format), torch.arange(8) % 5


@pytest.mark.parametrize(
    ("backend", "dtype", "memory_format"),
    [
        ("reference", torch.float64, torch.contiguous_format),
        ("cpp", torch.float32, torch.contiguous_format),
        ("cpp", torch.float32, CL),
    ],
)
@pytest.mark.parametrize("drop", DROPS)
def test_with_the_output_weight_as_b_it_is_backprop(drop: str, backend: str, dtype: torch.dtype, memory_format: Any) -> None:
    model, x, y = build(drop, dtype, memory_format)
    net = fb.convert(copy.deepcopy(model), rule=fb.Fixed(), backend=backend)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    criterion(net(x), y)
    (point,) = fb.points(net).values()
    assert point.layout.shape == (4, *([3, 3] if "pooling" in drop else [6, 6]))
    point.B = reference.units(model.out.weight.detach().view(5, *point.layout.shape), True).T

    torch.manual_seed(1)
    loss = criterion(net(x), y)
    torch.manual_seed(1)
    z = model(x)
    torch.testing.assert_close(loss, F.cross_entropy(z, y))
    loss.backward()
    F.cross_entropy(z, y).backward()
    for got, want in zip(net.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, 10), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(10, 3)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("rule", [fb.Ridge(), fb.Joint(0.2, "output"), fb.LMS(0.01)], ids=repr)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_dropped_unit_takes_no_part(backend: str, rule: fb.Rule) -> None:
    """One sample: what leads to a unit that was dropped has a gradient of exactly zero."""
    model = mlp()
    net = fb.convert(model, rule=rule, backend=backend)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    for step in range(12):
        x, y = torch.randn(1, 6), torch.tensor([step % 3])
        seen: list[Tensor] = []
        hooks = [m.register_forward_hook(lambda m, args, h, seen=seen: seen.append(h.detach())) for m in model if isinstance(m, nn.Dropout)]
        torch.manual_seed(step)
        plain = model(x)
        [hook.remove() for hook in hooks]
        torch.manual_seed(step)
        out = net(x)
        assert torch.equal(out, plain)
        net.zero_grad()
        criterion(out, y).backward()
        for layer, h in zip((net[0], net[3]), seen, strict=True):
            for grad in (layer.weight.grad.flatten(1), layer.bias.grad[:, None]):
                assert not grad[h[0] == 0].any()
                assert step == 0 or grad[h[0] != 0].any(1).all()  # B starts from zero
    assert torch.equal(net.eval()(x), model.eval()(x))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CL], ids=str)
def test_masks_are_those_of_the_plain_model(memory_format: Any, backend: str) -> None:
    """Blocks make channels-last maps of others; random numbers are drawn in the plain model's order."""
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Dropout(0.5)]
    model = nn.Sequential(*layers, nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 5)).to(memory_format=memory_format)
    net, x = fb.convert(model, backend=backend), torch.randn(3, 2, 8, 8).to(memory_format=memory_format)
    for _ in range(2):
        torch.manual_seed(3)
        out = net(x)
        torch.manual_seed(3)
        torch.testing.assert_close(out, model(x))
        fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(out, torch.arange(3)).backward()


@pytest.mark.parametrize("model", [mlp, lambda: build("timm's DropPath", torch.float32, CL)[0]], ids=["mlp", "DropPath"])
def test_a_compiled_step_is_the_eager_one(model: Callable[[], nn.Module]) -> None:
    states = []
    for compiles in (False, True):
        torch._dynamo.reset()
        net = fb.convert(model(), rule=fb.Joint(0.2, "output"))
        criterion, optimizer = fb.PerturbedLoss(nn.CrossEntropyLoss(), net), torch.optim.SGD(net.parameters(), 0.1)
        run = lambda x, y, net=net, criterion=criterion: criterion(net(x), y)  # noqa: E731
        run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiles else run
        for step in range(4):
            torch.manual_seed(step)
            shape = (4, 6) if isinstance(net, nn.Sequential) else (4, 2, 6, 6)
            x, y = torch.randn(shape), torch.randint(3, (4,))
            optimizer.zero_grad()
            run(x, y).backward()
            optimizer.step()
        states.append(net.state_dict())
    for key, want in states[0].items():
        torch.testing.assert_close(states[1][key], want, rtol=1e-5, atol=1e-6)


def test_points_named_behind_dropout_are_the_same() -> None:
    torch.manual_seed(0)
    model = paper_cnn((3, 8, 8), 5, width=1 / 32)
    x, y = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    states = []
    for points in (None, ["pool1", "pool2", "pool3", "dropout1", "dropout2"]):
        net = fb.convert(copy.deepcopy(model), rule=fb.Joint(0.2, "output"), points=points)
        criterion, optimizer = fb.PerturbedLoss(nn.CrossEntropyLoss(), net), torch.optim.SGD(net.parameters(), 0.1)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            criterion(net(x), y).backward()
            optimizer.step()
        states.append([*net.parameters(), *(p.B for p in fb.points(net).values())])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_layerwise_with_the_weight_as_b_is_backprop() -> None:
    model = mlp().double()
    net = fb.convert(copy.deepcopy(model), feedback="layerwise", rule=fb.WeightTransport())
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 3
    torch.manual_seed(1)
    fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(x), y).backward()
    torch.manual_seed(1)
    F.cross_entropy(model(x), y).backward()
    for got, want in zip(net.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_an_activity_with_and_without_its_mask_has_its_point_before_it() -> None:
    class Both(Dropped):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.conv(x))
            return self.out((F.dropout(h, 0.5) + h).flatten(1))

    # the expectation of the output's change, over noise at the point, is that of the activity that both read
    model, sigma = Both(nn.Identity()).double(), 1e-3
    net = fb.convert(model, rule=fb.LMS(0.1), noise_std=sigma)
    x, seen = torch.randn(2, 2, 6, 6, dtype=torch.float64), []
    net.out.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    torch.manual_seed(0)
    out = net(x)
    (point,) = fb.points(net).values()
    xi = point.noise(net.feedback.step, 2, torch.float64, 0).contiguous()
    torch.manual_seed(0)
    h = torch.tanh(model.conv(x))
    torch.testing.assert_close(seen[-1], (F.dropout(h, 0.5) + h).flatten(1))
    torch.manual_seed(0)
    want = model.out((F.dropout(h + xi, 0.5) + h + xi).flatten(1)) - out
    torch.testing.assert_close(net.feedback.current.changes[0], want.detach(), rtol=0, atol=1e-12)
