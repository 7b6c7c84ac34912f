"""fb.convert on the networks that people train: the clean stream is theirs, the noise goes where SPEC 1 says, B serves every layer."""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, CLASSES
from torch import Tensor, nn

import fbkernels as fb
from fbkernels import reference
from fbkernels.lab import models

X, Y = torch.linspace(-2, 2, 4 * 3 * 32 * 32).mul(40).sin().view(4, 3, 32, 32), torch.arange(4) % CLASSES
HIDDEN = {
    "paper_cnn": 5, "vgg11": 10, "vgg11_bn": 10, "resnet18": 20, "resnet20": 21, "resnet50": 53, "resnet56": 55, "wrn16_4": 16,
    "densenet": 15, "mobilenet_v2": 16, "convnext": 14, "vit": 9, "vit_fused_attention": 5,
}  # fmt: skip
BLOCKS = {
    "resnet18": "layer[1-4].?",
    "resnet50": "layer[1-4].?",
    "resnet56": "net.body.[3-9]",
    "wrn16_4": "layer[1-3].?",
    "mobilenet_v2": "features.[3-7]",
    "convnext": "stages.?.?",
    "vit": "blocks.?",
    "vit_fused_attention": "blocks.?",
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the maps are small
    yield
    torch.set_num_threads(threads)


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """With statistics and layer scales that are not those of a fresh network."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().to(dtype)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                (
                    m.running_mean.uniform_(-0.1, 0.1),
                    m.running_var.uniform_(0.8, 1.2),
                    m.weight.uniform_(0.8, 1.2),
                    m.bias.uniform_(-0.1, 0.1),
                )
    return model


def run(net: Callable[[Tensor], Tensor], x: Tensor, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)  # of dropout and drop path
    return net(x)


def statistics(net: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in net.named_buffers() if ".feedback." not in k}


def named(model: nn.Module, pattern: str) -> list[str]:
    return [n for n, _ in model.named_modules() if fnmatchcase(n, pattern) and n.count(".") == pattern.count(".")]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_clean_forward_is_the_plain_one(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        model, x = build(name, dtype), X.to(dtype)
        net = fb.convert(copy.deepcopy(model))
        assert torch.equal(net.eval()(x), model.eval()(x))
        out, expected = run(net.train(), x), run(model.train(), x)
        assert type(out) is Tensor
        ours, theirs = {"output": out, **statistics(net)}, {"output": expected, **statistics(model)}
        assert ours.keys() == theirs.keys()
        if dtype == torch.float32:
            rounded, compiled = theirs, ours
    for key, want in theirs.items():
        assert torch.equal(ours[key], want), key
        error, limit = ((t[key].double() - want).norm() for t in (compiled, rounded))
        # a block's sums are in another order than torch's
        assert error <= 4 * limit + 30 * 2.0**-24 * want.double().norm(), (key, float(error), float(limit))


def noise(h: Tensor, index: int, std: float, images: bool | None = None) -> Tensor:
    """Step 0's noise of an activity; a convolution's units are numbered channels-last (SPEC 6)."""
    xi = reference.noise(5, 0, index, len(h), h[0].numel(), std, dtype=h.dtype)
    return xi.view(len(h), *h.shape[2:], h.shape[1]).movedim(-1, 1) if (h.ndim == 4 if images is None else images) else xi.view(h.shape)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_of_direct_feedback(name: str) -> None:
    """dL is the first-order effect of each point's own noise, B learns at every point, every parameter gets a gradient, none through W."""
    model, x, std = build(name), X.double(), 1e-6
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()  # backprop goes through statistics of the batch, which the two streams share
    net = fb.convert(model, rule=fb.LMS(0.1), noise_std=std, seed=5)
    probe = copy.deepcopy(net)
    probe.feedback.probe = "exact"
    run(probe, x)
    activities = dict(probe.feedback.current.activities)
    losses = F.cross_entropy(probe.feedback.current.outputs[0], Y, reduction="none")
    gradients = torch.autograd.grad(losses.sum(), list(activities.values()))
    points = fb.points(probe)
    effect = torch.zeros(4, dtype=torch.float64)
    for (point, h), g in zip(activities.items(), gradients, strict=True):
        channels_first = isinstance(model.get_submodule(point), nn.Conv2d)
        effect += (g * noise(h, points[point].index, std, channels_first)).flatten(1).sum(1)
    assert len(activities) == HIDDEN[name]
    assert [p.index for p in points.values()] == list(range(HIDDEN[name]))

    measured: queue.SimpleQueue[Tensor] = queue.SimpleQueue()  # a list would forget all but the clean call's

    def criterion(out: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(out, y, reduction="none")
        measured.put(losses.detach())
        return losses

    run(net, x)
    out = net.feedback.current.outputs[0]
    loss = fb.PerturbedLoss(criterion, net)(out, Y).mean()
    clean, perturbed = measured.get(), measured.get()
    # the second order is sigma times curvatures of order 1 to 100, and kinks of relu within sigma
    torch.testing.assert_close(perturbed - clean, effect, rtol=0, atol=1e-3 * float(effect.abs().max()))

    before = [p.state["B"].clone() for p in fb.points(net).values()]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
    assert len(before) == HIDDEN[name]
    assert all((p.B - B).any(1).all() for p, B in zip(fb.points(net).values(), before, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_no_layer_sends_its_error_through_its_weight(feedback: str, name: str) -> None:
    """What the weights are when the backward pass runs makes no difference to any layer's gradient."""
    gradients = []
    for broken in (False, True):
        net = fb.convert(build(name), feedback=feedback, rule=fb.Fixed())
        loss = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(run(net, X.double()), Y)
        layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m.weight.ndim]
        layers = [m for m in layers if type(m) in (nn.Linear, nn.Conv2d)]  # attention is differentiated as a block
        for m in layers if broken else ():
            m.weight.data.fill_(float("nan"))
        loss.backward()
        gradients.append([m.weight.grad for m in layers])
    for a, b in zip(*gradients, strict=True):
        assert a.any() and torch.equal(a, b)


def by_hand(model: nn.Module, names: list[str], x: Tensor, std: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Clean logits and block outputs, cut from each other as in SPEC 1, and the perturbed logits, by hooks on two plain copies."""
    clean, perturbed, activities = copy.deepcopy(model), copy.deepcopy(model), []
    for name, m in clean.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            twin = perturbed.get_submodule(name).eval()

            def share(_: Any, args: Any, twin: nn.Module = twin) -> None:
                twin.running_var, twin.running_mean = torch.var_mean(args[0].detach(), (0, 2, 3), correction=0)

            m.register_forward_pre_hook(share)
    for i, name in enumerate(names):
        clean.get_submodule(name).register_forward_hook(lambda _, args, h: (activities.append(h), h.detach().clone())[1])
        perturbed.get_submodule(name).register_forward_hook(lambda _, args, h, i=i: h + noise(h, i, std))
    logits = run(clean, x)
    model.load_state_dict(clean.state_dict())
    model.gradients = lambda loss: torch.autograd.grad(loss, list(clean.parameters()))
    with torch.no_grad():
        return logits, run(perturbed, x), activities


@pytest.mark.parametrize("name", BLOCKS)
def test_a_point_behind_each_block(name: str) -> None:
    """Both streams, and each block's gradients, which are backprop's within the block."""
    model, x, std = build(name), X.double(), 0.1
    names = named(model, BLOCKS[name])
    net = fb.convert(copy.deepcopy(model), rule=fb.LMS(0.1), noise_std=std, seed=5, points=names)
    seen: queue.SimpleQueue[Tensor] = queue.SimpleQueue()  # a list would forget all but the clean call's
    criterion = fb.PerturbedLoss(lambda out, y: seen.put(out) or F.cross_entropy(out, y, reduction="none"), net)
    loss = criterion(run(net, x), Y).mean()
    logits, perturbed, activities = by_hand(model, names, x, std)
    torch.testing.assert_close(seen.get(), logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen.get(), perturbed, rtol=2e-12, atol=2e-12)  # h + d is rounded as well as h
    e = (logits.softmax(1) - F.one_hot(Y, CLASSES)).detach() / 4
    by_layer = F.cross_entropy(logits, Y)
    for h, point in zip(activities, fb.points(net).values(), strict=True):
        units = h.movedim(1, -1) if h.ndim == 4 else h
        by_layer = by_layer + (units.flatten(1) * (e @ point.state["B"].T)).sum()
    loss.backward()
    for (key, p), want in zip(net.named_parameters(), model.gradients(by_layer), strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-11, atol=1e-13, msg=lambda m, key=key: f"{key}: {m}")
    assert all(p.B.isfinite().all() and p.B.any() for p in fb.points(net).values())


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("where", ["groups", "blocks"])
def test_layerwise_weight_transport_is_backprop(name: str, where: str) -> None:
    model, x = build(name), X.double()
    names = None if where == "groups" else named(model, BLOCKS.get(name, "-"))
    if names == []:
        pytest.skip("no blocks")
    net = fb.convert(copy.deepcopy(model), feedback="layerwise", rule=fb.WeightTransport(), points=names)
    if names is not None and name not in ("resnet56", "mobilenet_v2"):  # whose layers read blocks directly
        with pytest.raises(ValueError, match=r"reads point '.*' directly: use feedback='direct', or convert without points"):
            net(x)
        return
    fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(run(net, x), Y).backward()
    F.cross_entropy(run(model, x), Y).backward()
    for (key, got), want in zip(net.named_parameters(), model.parameters(), strict=True):
        # a bias before a norm has no gradient but the rounding of a sum
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-11, atol=1e-13, msg=lambda m, key=key: f"{key}: {m}")
    assert len(fb.points(net)) == (HIDDEN[name] if names is None else len(names))


@pytest.mark.parametrize("name", ["resnet18", "densenet", "vit"])
@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_what_convert_gives_is_there_and_goes(name: str, feedback: str) -> None:
    model, x = build(name), X.double()
    rule = fb.WeightTransport() if feedback == "layerwise" else fb.Fixed()
    net = fb.convert(model, feedback=feedback, rule=rule)
    for _ in range(2):
        fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(run(net, x), Y).backward()
    rows, table = fb.metrics.alignment(net, nn.CrossEntropyLoss(), x, Y), fb.summary(net)
    assert list(rows) == [r.name for r in table] == list(fb.points(net))
    assert [r.index for r in table] == list(range(HIDDEN[name]))
    assert all(r.units and r.B and r.layer in ("Linear", "Conv2d") for r in table)
    if feedback == "layerwise":
        assert all(row["angle"] < 1e-5 and row["relative_error"] == 0 for row in rows.values())
    plain = fb.revert(net)
    assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    assert list(plain.state_dict()) == list(model.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    assert torch.equal(run(plain, x), run(model, x))


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)], ids=str)
def test_the_command_lines_models_take_its_data(shape: tuple[int, int, int]) -> None:
    for name, make in models.MODELS.items():
        assert make(shape, 7).eval()(torch.zeros(2, *shape)).shape == (2, 7), name
    for name, millions in {"resnet20": 0.27, "resnet18": 11.2, "wrn16_4": 2.8}.items():  # as published, with a head for 100 classes
        assert sum(p.numel() for p in models.MODELS[name]((3, 32, 32), 100).parameters()) / 1e6 == pytest.approx(millions, rel=0.05)
