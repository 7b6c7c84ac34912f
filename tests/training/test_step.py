"""How long a step lives: nothing of it outlasts its loss, with Python's collector off, which does not see what hooks of tensors hold."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fbkernels as fb

RULES = {
    "direct": [fb.Fixed(), fb.Joint(), fb.Ridge(), fb.LMS(0.1), fb.NodePerturbation(), fb.SyntheticGradient(0.1)],
    "layerwise": [
        fb.Fixed(),
        fb.WeightMirror(),
        fb.KolenPollack(),
        fb.WeightTransport(),
        fb.Ridge(),
        fb.LMS(0.1),
        fb.SyntheticGradient(0.1),
    ],
}
X, Y = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def network(feedback: str, rule: fb.Rule) -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 10)]
    return fb.convert(nn.Sequential(*layers), feedback=feedback, rule=rule)


def forward(net: nn.Module) -> tuple[Tensor, list[weakref.ref]]:
    """The output, and all that a step holds."""
    out = net(X)
    step = net.feedback.current
    assert len(step.activities) == 2 and step.outputs[0] is out
    return out, [weakref.ref(t) for t in (step, out, *step.activities.values())]


def alive(refs: list[weakref.ref]) -> int:
    return sum(r() is not None for r in refs)


@pytest.mark.parametrize("loss", ["perturbed", "plain", "none"])
@pytest.mark.parametrize(("feedback", "rule"), [(f, r) for f, rules in RULES.items() for r in rules], ids=repr)
def test_a_step_ends_with_the_next(feedback: str, rule: fb.Rule, loss: str, no_collector: None) -> None:
    net = network(feedback, rule)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net) if loss == "perturbed" else nn.CrossEntropyLoss()
    net(X)  # which places the points
    steps = []
    for _ in range(3):
        out, refs = forward(net)
        steps.append(refs)
        if loss != "none":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the plain loss is none of ours
                criterion(out, Y).backward()
        del out
    assert [alive(refs) for refs in steps[:2]] == [0, 0]
    if loss == "perturbed" and not (feedback == "layerwise" and rule.regresses and rule.adapts):
        assert alive(steps[2]) == 0  # else B's update waits for the next forward


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_a_hook_or_a_kept_gradient_keeps_nothing(feedback: str, no_collector: None) -> None:
    net = network(feedback, fb.Fixed())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    net(X)
    seen: list[float] = []

    def keep(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        out.retain_grad()
        out.register_hook(lambda g: seen.append(float(g.abs().sum())))

    handle = net[4].register_forward_hook(keep)
    steps = []
    for _ in range(2):
        out, refs = forward(net)
        steps.append(refs)
        criterion(out, Y).backward()
        del out
    handle.remove()
    assert len(seen) == 2 and min(seen) > 0
    assert [alive(refs) for refs in steps] == [0, 0]


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_a_network_that_took_no_loss_is_freed(feedback: str) -> None:
    net = network(feedback, fb.Fixed())
    net(X)
    out, refs = forward(net)
    refs.append(weakref.ref(net))
    del net, out
    gc.collect()
    assert alive(refs) == 0
