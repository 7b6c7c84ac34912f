"""A captured training step, replayed: what a CUDA graph does, emulated on the CPU by a trace of the step's operators."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fbkernels as fb
from fbkernels.training import network as owner

STEPS, BATCH = 7, 9
DATA = torch.randn(STEPS, BATCH, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()
TARGETS = torch.randint(5, (STEPS, BATCH), generator=torch.Generator().manual_seed(2))
RULES: dict[str, Callable[[], fb.Rule]] = {
    "ridge": lambda: fb.Ridge(1.0, forgetting=0.99),  # more samples than outputs: M and G
    "lms": lambda: fb.LMS(0.1),
    "output": lambda: fb.Joint(signal="output"),
    "loss": fb.Joint,
    "fixed": fb.Fixed,
    "node": fb.NodePerturbation,
}
LAYERWISE: dict[str, Callable[[], fb.Rule]] = {
    "mirror": lambda: fb.WeightMirror(samples=5),
    "fixed": fb.Fixed,
    "sign": fb.SignSymmetric,
    "transport": fb.WeightTransport,
}


def network(rule: str, outputs: int = 5, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, outputs))
    return fb.convert(nn.Sequential(*layers).double(), rule=(RULES | LAYERWISE)[rule](), backend="reference", **options)


def stepper(net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    criterion, parameters = fb.PerturbedLoss(nn.CrossEntropyLoss(), net), list(net.parameters())

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = criterion(net(x), y)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.sub_(0.1 * g)
        return loss.detach().clone()

    return step


def captured(
    net: nn.Module, step: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Tensor, Tensor], Tensor]:
    """The step as its operators on the tensors that it found; unlike a capture, a trace runs once, which is undone."""
    before = {k: t.clone() for k, t in tensors(net).items()}
    with monkeypatch.context() as m:
        m.setattr(owner, "capturing", lambda _: True)
        m.setattr(owner.Network, "warn", lambda _: None)  # which looks at the count of skipped samples on a CPU alone
        graph = make_fx(step)(DATA[0], TARGETS[0])
    with torch.no_grad():
        for k, t in tensors(net).items():
            t.copy_(before[k])
    return torch.no_grad()(graph)


def tensors(net: nn.Module) -> dict[str, Tensor]:
    """All that one step hands to the next."""
    shared = net.feedback
    out = {n: p.detach() for n, p in net.named_parameters()} | dict(net.named_buffers())
    out |= {f"{n}.{k}": t for n, m in net.named_modules() for k, t in getattr(m, "state", {}).items()}
    if shared.scheduled is not None and shared.scheduled.gains is not None:
        out |= {f"handed on {i}": t for i, t in enumerate(shared.scheduled.handed_on)}
    return out


def same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for key, want in theirs.items():
        torch.testing.assert_close(ours[key], want, rtol=1e-12, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("outputs", [5, 12])  # more and fewer samples than outputs: (M, G) and ((R, Q), w)
@pytest.mark.parametrize("rule", RULES)
def test_replays_are_the_eager_steps(rule: str, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, net = network(rule, outputs), network(rule, outputs)
    step = stepper(net)
    expected = [stepper(eager)(DATA[i], TARGETS[i]) for i in range(STEPS)]
    losses = [step(DATA[i], TARGETS[i]) for i in range(2)]
    replay = captured(net, step, monkeypatch)
    losses += [replay(DATA[i], TARGETS[i]) for i in range(2, 5)]
    if rule == "ridge":
        net.state_dict()  # flushes, after which a replay must not learn the same once more
    losses += [replay(DATA[5], TARGETS[5]), step(DATA[6], TARGETS[6])]  # and an eager step goes on
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    same(net, eager)


@pytest.mark.parametrize("rule", ["ridge", "output", "loss"])
def test_a_warm_up_ends_within_the_replays(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples for each of 19 units: five steps of nine, the first of which is eager."""
    eager, net = (network(rule, warmup="auto") for _ in range(2))
    start = [p.detach().clone() for p in net.parameters()]
    step = stepper(net)
    expected = [stepper(eager)(DATA[i], TARGETS[i]) for i in range(STEPS)]
    losses = [step(DATA[0], TARGETS[0])]
    replay = captured(net, step, monkeypatch)
    for i in range(1, STEPS):
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), start, strict=True)) == (i <= 5)
        losses.append(replay(DATA[i], TARGETS[i]))
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    same(net, eager)


@pytest.mark.parametrize("rule", LAYERWISE)
def test_layerwise_replays_are_the_eager_steps(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, net = (network(rule, feedback="layerwise") for _ in range(2))
    step = stepper(net)
    expected = [stepper(eager)(DATA[i], TARGETS[i]) for i in range(STEPS)]
    losses = [step(DATA[0], TARGETS[0])]
    replay = captured(net, step, monkeypatch)
    losses += [replay(DATA[i], TARGETS[i]) for i in range(1, 6)]
    losses.append(step(DATA[6], TARGETS[6]))
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    same(net, eager)


def test_a_checkpoint_can_be_loaded_between_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, net = network("ridge"), network("ridge")
    theirs, step = stepper(eager), stepper(net)
    for i in range(3):
        theirs(DATA[i], TARGETS[i])
    checkpoint = copy.deepcopy(eager.state_dict())
    step(DATA[0], TARGETS[0])
    replay = captured(net, step, monkeypatch)
    replay(DATA[5], TARGETS[5])
    net.load_state_dict(checkpoint)
    for i in range(3, 5):
        replay(DATA[i], TARGETS[i])
        theirs(DATA[i], TARGETS[i])
    same(net, eager)


def test_what_a_graph_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "capturing", lambda _: True)
    with pytest.raises(RuntimeError, match="take a training step right before the capture"):
        stepper(network("ridge"))(DATA[0], TARGETS[0])
    with pytest.raises(RuntimeError, match="take a training step before the capture"):
        stepper(network("mirror", feedback="layerwise"))(DATA[0], TARGETS[0])
    for options in ({"feedback": "layerwise"}, {"every": 2}, {"warmup": 1}):
        with pytest.raises(RuntimeError, match="a CUDA graph can hold a training step with direct feedback"):
            stepper(network("ridge", **options))(DATA[0], TARGETS[0])
    monkeypatch.undo()
    net = network("ridge")
    step = stepper(net)
    step(DATA[0], TARGETS[0])
    captured(net, step, monkeypatch)
    with pytest.raises(RuntimeError, match="takes batches of 9 samples, got 4"):
        step(DATA[1, :4], TARGETS[1, :4])
