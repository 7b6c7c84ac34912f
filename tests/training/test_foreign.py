"""Models and loops as others write them: a converted network does what the plain one would, or says why not."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import gc
import itertools
import random
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fbkernels as fb

X, Y = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 4


class Net(nn.Module):
    """Two hidden layers, one beside them and an output layer; ``how`` says what forward does with them."""

    def __init__(self, how: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.o = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(12, 4)
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return self.how(self, x)


def made(how: Callable[[Net, Tensor], Any]) -> Net:
    torch.manual_seed(0)
    return Net(how).double()


def filled(net: Net, x: Tensor) -> Tensor:
    z = torch.zeros(len(x), 16, dtype=x.dtype)
    z[:, :] = torch.tanh(net.a(x))
    return net.o(torch.tanh(net.b(z) + net.c(z)))


def filled_by_columns(net: Net, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x))
    z = h.new_zeros(16, len(x)).index_add_(0, torch.arange(16), h.T)
    return net.o(torch.tanh(net.b(z.T) + net.c(h)))


def filled_by_views(net: Net, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x))
    z = h.new_zeros(len(x), 32)
    z[:, :16].copy_(h)
    z.narrow(1, 16, 16).add_(h).mul_(2.0)
    for i in range(len(h)):
        z[i][:8].add_(h[i, 8:])
    return net.o(torch.tanh(net.b(z[:, :16]) + net.c(z[:, 16:])))


def features(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(net.b(torch.tanh(net.a(x))))
    return net.o(h), h


def detached(net: Net, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x))
    return net.o(torch.tanh(net.b(h)) + torch.tanh(net.c(h)).detach())


def two_heads(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(net.a(x))
    return net.o(torch.tanh(net.b(h))), torch.tanh(net.c(h))


MODELS = [filled, filled_by_columns, filled_by_views, features, detached, two_heads]


def logits(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def both(out: tuple[Tensor, Tensor], y: Tensor, reduction: str = "mean") -> Tensor:
    losses = F.cross_entropy(out[0], y, reduction="none") + 0.3 * out[1].square().sum(1)
    return losses.mean() if reduction == "mean" else losses


def gradients(net: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    net.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in net.named_parameters()}


def equal(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    for name, g in want.items():
        assert (got[name] is None) == (g is None), name
        if g is not None:
            torch.testing.assert_close(got[name], g, rtol=1e-10, atol=1e-12)


def learned(got: dict[str, Tensor | None], want: dict[str, Tensor | None], *names: str) -> None:
    """Not backprop's gradients, nor any where backprop has none."""
    for name in names:
        g, w = got[name], want[name]
        assert (g is None) == (w is None), name
        assert g is None or F.cosine_similarity(g.flatten(), w.flatten(), 0).abs() < 0.9, name


def exact(net: nn.Module) -> dict[str, Tensor | None]:
    """The plain network's."""
    return gradients(net, nn.CrossEntropyLoss()(logits(net(X)), Y))


@pytest.mark.parametrize("how", MODELS)
def test_layerwise_weight_transport_is_backprop(how: Callable[[Net, Tensor], Any]) -> None:
    net = fb.convert(made(how), feedback="layerwise", rule=fb.WeightTransport())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    equal(gradients(net, criterion(logits(net(X)), Y)), exact(made(how)))


@pytest.mark.parametrize("how", MODELS)
def test_direct_feedback_has_a_point_at_each_hidden_layer(how: Callable[[Net, Tensor], Any]) -> None:
    net = fb.convert(made(how), feedback="direct", rule=fb.Fixed())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    want = exact(made(how))
    for _ in range(2):
        got = gradients(net, criterion(logits(net(X)), Y))
        learned(got, want, "a.weight", "b.weight", "c.weight")
        torch.testing.assert_close(got["o.weight"], want["o.weight"])


@pytest.mark.parametrize("rule", [fb.WeightTransport(), fb.Fixed()], ids=repr)
@pytest.mark.parametrize("how", [features, two_heads])
def test_a_criterion_of_two_outputs(how: Callable[[Net, Tensor], Any], rule: fb.Rule) -> None:
    net, plain = fb.convert(made(how), feedback="layerwise", rule=rule), made(how)
    loss = fb.PerturbedLoss(both, net)(net(X), Y)
    got, want = gradients(net, loss), gradients(plain, both(plain(X), Y))
    torch.testing.assert_close(loss.detach(), both(plain(X), Y).detach())
    equal(got, want if isinstance(rule, fb.WeightTransport) else {k: g for k, g in want.items() if k[0] == "o"})


@pytest.mark.parametrize("compiled", [False, True])
def test_features_get_their_own_gradient_too(compiled: bool) -> None:
    """Direct: what a loss takes of the features is exact, beside e B^T of all outputs."""
    net, plain = fb.convert(made(features), rule=fb.Fixed()), made(features)
    criterion = fb.PerturbedLoss(both, net)
    net(X)
    run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
    out = run(X)
    got = gradients(net, criterion(out, Y))["b.bias"]
    h = plain(X)[1]
    own = gradients(plain, 0.3 * h.square().sum(1).mean())["b.bias"]
    e = torch.cat((torch.softmax(out[0], 1) - F.one_hot(Y, 4), 0.6 * h), 1).detach() / 6
    through = ((e @ net.b.feedback.B.T) * (1 - h.detach() ** 2)).sum(0)
    torch.testing.assert_close(got, own + through, rtol=1e-10, atol=1e-12)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)).double()


def other_tensors(net: nn.Module) -> None:
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)


def another_parameter(net: nn.Module) -> None:
    net[2].weight = nn.Parameter(net[2].weight.detach().clone())


def other_layers(net: nn.Module) -> None:
    net[0], net[2] = nn.Linear(8, 16).double(), nn.Linear(16, 12).double()


@pytest.mark.parametrize("change", [other_tensors, another_parameter, other_layers])
@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_no_step_of_backprop_after_a_change(change: Callable[[nn.Module], None], feedback: str) -> None:
    net, plain = fb.convert(mlp(), feedback=feedback, rule=fb.Fixed()), mlp()
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    criterion(net(X), Y).backward()
    before = {k for k in net.state_dict() if k.endswith(".B")}
    change(net)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if "feedback" not in k})
    for _ in range(3):
        learned(gradients(net, criterion(net(X), Y)), exact(plain), "0.weight")
    assert before == {k for k in net.state_dict() if k.endswith(".B")}


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_functional_call(feedback: str) -> None:
    net = fb.convert(mlp(), feedback=feedback, rule=fb.Fixed())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    want = gradients(net, criterion(net(X), Y))
    for _ in range(3):
        given = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        criterion(torch.func.functional_call(net, given, (X,)), Y).backward()
        equal({name: p.grad for name, p in given.items()}, want)


def test_a_weight_that_is_computed_since_convert() -> None:
    net = fb.convert(mlp(), rule=fb.Fixed())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    criterion(net(X), Y).backward()
    parametrizations.weight_norm(net[0])
    parametrizations.weight_norm(net[2])
    with pytest.warns(UserWarning, match="the weights of 0, 2 are computed since convert: this step trains those layers by backprop"):
        criterion(net(X), Y).backward()
    got, want = gradients(net, criterion(net(X), Y)), exact(mlp())
    learned({"0": got["0.parametrizations.weight.original1"]}, {"0": want["0.weight"]}, "0")
    assert list(fb.points(net)) == ["0", "2"]


def test_rows_of_the_output_in_another_order() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    x, y = torch.randn(4, 5, 8, dtype=torch.float64), torch.randint(4, (4, 5))
    views: list[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = [
        lambda out, y: (out.reshape(-1, 4), y.reshape(-1)),
        lambda out, y: (out.transpose(0, 1).reshape(-1, 4), y.T.reshape(-1)),
        lambda out, y: (out.transpose(1, 2), y),
        lambda out, y: (2 * out.reshape(-1, 4) / 2, y.reshape(-1)),
        lambda out, y: (out.flatten(0, 1) @ torch.eye(4, dtype=out.dtype) + 0.5, y.reshape(-1)),
    ]
    found = []
    for view in views:
        net = fb.convert(copy.deepcopy(plain), rule=fb.Joint())
        criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
        for _ in range(3):
            got = gradients(net, criterion(*view(net(x), y)))
        found.append(got)
    for got in found[1:]:
        equal(got, found[0])
    net = fb.convert(plain, rule=fb.Fixed())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    order = torch.tensor([3, 1, 0, 2])
    with pytest.raises(ValueError, match="reshaped, sliced, cast or scaled with its samples in order"):
        criterion(net(x)[order].transpose(1, 2), y[order])


@pytest.mark.parametrize("rule", [fb.WeightTransport(), fb.Fixed(), fb.WeightMirror()], ids=repr)
def test_layerwise_rules_that_measure_nothing_take_any_loss(rule: fb.Rule) -> None:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        z = out - out.mean(0)
        return F.cross_entropy(z, y) + (z.T @ z).square().sum()

    net, plain = fb.convert(mlp(), feedback="layerwise", rule=rule), mlp()
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    z = (out := net(X)) - out.mean(0)
    got, want = gradients(net, criterion(z, Y) + (z.T @ z).square().sum()), gradients(plain, loss(plain(X), Y))
    equal(got, want if isinstance(rule, fb.WeightTransport) else {k: want[k] for k in ("4.weight", "4.bias")})
    old = net(X) ** 2
    net(X)
    with pytest.raises(ValueError, match="with the output of its own network's last training forward"):
        criterion(old, Y)


def test_many_rows_in_low_precision() -> None:
    """The numbers of a thousand samples are no numbers of bfloat16."""
    net = fb.convert(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).bfloat16(), rule=fb.Fixed())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    criterion(net(torch.randn(1000, 8).bfloat16()).float() / 0.7, torch.randint(4, (1000,))).backward()
    assert net[0].weight.grad.norm() > 0


def test_a_gradient_from_outside_of_the_loss_is_told() -> None:
    net = fb.convert(mlp(), rule=fb.Fixed())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    out = net(X)
    loss = criterion(out, Y) + out.square().mean()
    with pytest.warns(UserWarning, match="a part of the output's gradient is from outside of PerturbedLoss"):
        loss.backward()


def test_a_model_that_adds_a_loss_or_chooses() -> None:
    net = fb.convert(made(lambda net, x: (net.o(torch.tanh(net.b(torch.tanh(net.a(x))))), net.a(x).square().mean())))
    with pytest.raises(ValueError, match=r"the network's output of shape \(\) cannot be matched with the samples of its input \(6, 8\)"):
        net(X)

    def routed(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh(net.a(x))
        chosen = (h[:, 0] > 0).nonzero()[:, 0]
        return net.o(torch.tanh(net.b(h)).index_add(0, chosen, net.c(h[chosen])))

    net = fb.convert(made(routed), noise_std=2.0, exclude=["c"])
    with pytest.raises(ValueError, match="the model chooses by the values of its activities"):
        net(torch.randn(600, 8, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_direct_feedback_wants_images_of_one_size(dtype: torch.dtype) -> None:
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    plain = nn.Sequential(*layers).to(dtype)
    net = fb.convert(plain, rule=fb.Joint())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    for _ in range(2):
        criterion(net(torch.randn(6, 3, 8, 8, dtype=dtype)), Y).backward()
    with pytest.raises(ValueError, match="feedback='layerwise' they may differ"):
        criterion(net(torch.randn(6, 3, 12, 12, dtype=dtype)), Y).backward()
    net = fb.convert(plain, feedback="layerwise", rule=fb.WeightMirror())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    for size in (8, 12):
        criterion(net(torch.randn(6, 3, size, size, dtype=dtype)), Y).backward()


def tokens(net: Net, x: Tensor) -> Tensor:
    """[N, T, features] throughout."""
    return net.o(torch.tanh(net.b(torch.tanh(net.a(x)))).mean(1))


def merged(net: Net, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x)).reshape(-1, 16)
    return net.o(torch.tanh(net.b(h)).reshape(len(x), -1, 12).mean(1))


def windows(net: Net, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x)).unflatten(1, (2, -1)).permute(1, 0, 2, 3).reshape(2 * len(x), -1, 16)
    return net.o(torch.tanh(net.b(h)).unflatten(0, (2, -1)).mean((0, 2)))


def time_first(net: Net, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x)).transpose(0, 1)
    return net.o(torch.tanh(net.b(h)).mean(0))


RULES = [fb.Ridge(), fb.LMS(1e-3), fb.NormalizedLMS(1e-2), fb.Joint(), fb.SyntheticGradient(1e-3), fb.WeightTransport(), fb.Fixed()]


@pytest.mark.parametrize("how", [merged, windows, time_first])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rows_that_a_layer_reads_are_no_samples(how: Callable[[Net, Tensor], Tensor], rule: fb.Rule) -> None:
    """Layerwise B learns what it does where they are; also where there are as many places as samples."""
    x = torch.randn(6, 6, 8, dtype=torch.float64)
    found = []
    for forward in (tokens, how):
        net = fb.convert(made(forward), feedback="layerwise", rule=rule)
        criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
        for _ in range(4):
            got = gradients(net, criterion(net(x), Y))
        found.append(got | {"B": net.a.feedback.B})
    found[0].pop("c.weight"), found[0].pop("c.bias")
    equal(found[1], found[0])


def test_node_perturbation_where_time_comes_first() -> None:
    """The noise of a sample's rows is multiplied with that sample's loss change."""
    x = torch.randn(6, 6, 8, dtype=torch.float64)

    def first(net: Net, x: Tensor) -> Tensor:
        return net.o(torch.tanh(net.a(x.transpose(0, 1))).mean(0)[:, :12])

    def last(net: Net, x: Tensor) -> Tensor:
        return net.o(torch.tanh(net.a(x)).mean(1)[:, :12])

    found = []
    for forward in (first, last):
        net = fb.convert(made(forward), rule=fb.NodePerturbation())
        found.append(gradients(net, fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(x), Y)))
    equal({"a.weight": found[0]["a.weight"]}, {"a.weight": found[1]["a.weight"]})


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_a_layer_that_every_second_step_skips(feedback: str) -> None:
    """It gets its point though the recording before each forward sees the path of that forward alone."""
    runs = [False]
    net = fb.convert(
        made(lambda net, x: net.o(torch.tanh(net.b(h := torch.tanh(net.a(x))) + (net.c(h) if runs[0] else 0)))),
        feedback=feedback,
        rule=fb.Fixed(),
    )
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    for step in range(4):
        runs[0] = step % 2 == 1
        criterion(net(X), Y).backward()
    assert len(fb.points(net)) == 3


# what a recording leaves behind


class Box:
    n = 0


class Tight:
    __slots__ = ("n", "seen")

    def __init__(self) -> None:
        self.n, self.seen = 0, [0]


class Keeper(Net):
    """Keeps and writes whatever a forward can."""

    def __init__(self) -> None:
        super().__init__(filled)
        self._steps, self.box, self.tight, self.array = 0, Box(), Tight(), np.zeros(1)
        self.stats: Any = {"seen": {"n": 0}, "log": []}
        self.count: Any = collections.Counter()
        self.random, self.numpy, self.torch = random.Random(0), np.random.default_rng(0), torch.Generator().manual_seed(0)
        self.draws, self.target = iter(range(99)), nn.Linear(8, 16).requires_grad_(False)
        self.turns: Any = {"cycle": itertools.cycle("abc"), "made": (i * i for i in range(99))}
        self.pairs = [zip(range(99), itertools.chain(range(3), range(99)), strict=False)]
        self.optimizer = torch.optim.SGD(self.c.parameters(), 0.1, momentum=0.9)

    def forward(self, x: Tensor) -> Any:
        x.sub_(1).mul_(0.5)
        self._steps, self.box.n, self.last = self._steps + 1, self.box.n + 1, x.sum().item()
        self.stats["seen"]["n"] += 1
        self.stats["log"] += [next(self.draws), next(self.turns["cycle"]), next(self.turns["made"]), next(self.pairs[0])]
        self.tight.n += 1
        self.tight.seen.append(self.tight.n)
        self.optimizer.zero_grad()
        self.c(x.detach().repeat(1, 2)).square().mean().backward()
        self.optimizer.step()
        self.count["n"] += 1
        self.array += 1
        drawn = self.random.random() + self.numpy.random() + torch.rand((), generator=self.torch, dtype=x.dtype)
        self.target.weight.data = self.target.weight.data * 0.9 + self.a.weight.data * 0.1
        with torch.no_grad():
            self.target.bias.mul_(0.9).add_(self.a.bias, alpha=0.1)
        return super().forward(x) + drawn + self.target(x).sum(1, keepdim=True)

    def kept(self) -> Any:
        plain = self._steps, self.box.n, self.last, self.stats, self.count, self.array.tolist(), self.tight.n, self.tight.seen
        return *plain, next(self.draws), next(self.turns["cycle"]), next(self.turns["made"]), next(self.pairs[0])


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_the_first_step_leaves_what_the_plain_one_does(feedback: str) -> None:
    torch.manual_seed(0)
    plain, x = Keeper().double(), X.clone()
    torch.manual_seed(0)
    net, own = fb.convert(Keeper().double(), feedback=feedback, rule=fb.Fixed()), X.clone()
    stats = net.stats
    for _ in range(3):
        assert torch.equal(net(own), plain(x))
        assert torch.equal(own, x)
    assert net.kept() == plain.kept()
    assert net.stats is stats
    for layer in ("target", "c"):
        equal(dict(getattr(net, layer).named_parameters()), dict(getattr(plain, layer).named_parameters()))


def test_a_recording_leaves_the_containers_that_go_in() -> None:
    def popped(net: Net, batch: dict[str, Any]) -> Tensor:
        batch["seen"].append(1)
        return filled(net, batch.pop("x"))

    net, batch = fb.convert(made(popped), rule=fb.Fixed()), {"x": X, "seen": []}
    assert torch.equal(net(batch), made(filled)(X))
    assert batch == {"seen": [1]}


def test_forward_hooks_of_the_users_run_once() -> None:
    net, seen = fb.convert(made(filled), rule=fb.Fixed()), []
    net.b.register_forward_hook(lambda *_: seen.append("behind"))
    net(X)
    assert seen == ["behind"]


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_pre_hooks_that_compute_a_weight_or_switch_a_layer_on(feedback: str) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh(net.b(torch.tanh(net.a(x))))
        return net.o(torch.tanh(net.d(h)) if net.on else h)

    def weigh(m: nn.Module, _: Any) -> None:
        m.weight = 2 * m.weight_orig

    net: Any = made(forward)
    net.d, net.on = nn.Linear(12, 12).double(), False
    net.register_forward_pre_hook(lambda m, _: setattr(m, "on", True))
    net.a.weight_orig = net.a._parameters.pop("weight")
    net.a.register_forward_pre_hook(weigh)
    net = fb.convert(net, feedback=feedback, rule=fb.Fixed())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    for _ in range(2):
        gradients(net, criterion(net(X), Y))
    assert len(fb.points(net)) == 3 and not net.feedback.stale
    assert all(p.B is not None for p in fb.points(net).values())


def test_a_recording_leaves_no_graph_and_no_gradient() -> None:
    def adds(net: Net, x: Tensor) -> Tensor:
        x += net.shift
        net.seen.add_(x.mean(0))
        net.aux(x.detach()).square().sum().backward()
        return filled(net, x + net.seen)

    found = []
    for wrap in (lambda net: net, lambda net: fb.convert(net, feedback="layerwise", rule=fb.WeightTransport())):
        net: Any = made(adds)
        net.shift, net.aux = nn.Parameter(torch.ones(8, dtype=torch.float64)), nn.Linear(8, 12).double()
        net.register_buffer("seen", torch.zeros(8, dtype=torch.float64))
        torch.manual_seed(1)
        nn.init.normal_(net.aux.weight), nn.init.zeros_(net.aux.bias)
        net = wrap(net)
        criterion = nn.CrossEntropyLoss() if not found else fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
        batch = torch.cat((X, X))[:6]
        criterion(net(batch), Y).backward(retain_graph=True)
        found.append({k: p.grad for k, p in net.named_parameters() if "feedback" not in k})
    equal({k: found[1][k] for k in found[0]}, found[0])


def test_a_read_only_batch(tmp_path: Any) -> None:
    np.save(tmp_path / "x.npy", X.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert torch.equal(fb.convert(made(filled), rule=fb.Fixed())(x), made(filled)(X))


def test_a_loss_weight_that_begins_to_learn() -> None:
    s = torch.zeros((), dtype=torch.float64, requires_grad=True)
    on = [False]

    def criterion(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="none") * (s.exp() if on[0] else 1)

    net = fb.convert(made(filled), rule=fb.Joint())
    loss = fb.PerturbedLoss(criterion, net)
    loss(net(X), Y).mean().backward()
    on[0] = True
    out = net(X)
    want = float(F.cross_entropy(out.detach(), Y))
    loss(out, Y).mean().backward()
    assert s.grad is not None
    torch.testing.assert_close(float(s.grad), want)


@pytest.mark.parametrize(
    ("layout", "how"),
    [("one loss a row", {}), ("one loss a row", {"fraction": 0.5, "antithetic": True}), ("one loss for three rows", {})],
)
def test_losses_that_begin_to_depend_on_each_other(layout: str, how: dict[str, Any]) -> None:
    on, n = [0.0], 6

    def criterion(z: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(z.flatten(0, -2), y.repeat(len(z.flatten(0, -2)) // n), reduction="none").view(n, -1).mean(1)
        return losses + on[0] * losses * losses.flip(0)

    x = X if layout == "one loss a row" else X.repeat(3, 1).view(3, 6, 8).transpose(0, 1) * torch.tensor([[[1.0], [2.0], [3.0]]])
    plain = made(lambda net, x: net.o(torch.tanh(net.b(torch.tanh(net.a(x))))).flatten(0, -2))
    net, c = fb.convert(copy.deepcopy(plain), rule=fb.LMS(1e-3), **how), torch.linspace(1, 2, n, dtype=torch.float64)
    loss = fb.PerturbedLoss(criterion, net)
    for on[0] in (0.0, 0.0, 0.5):
        got = gradients(net, (loss(net(x), Y) * c).sum())
        want = gradients(plain, (criterion(plain(x), Y) * c).sum())
        equal({"o.weight": got["o.weight"]}, {"o.weight": want["o.weight"]})


GENERATOR, DRAWS = torch.Generator().manual_seed(0), np.random.default_rng(0)


class Drawing(nn.Module):
    def __init__(self, draw: Callable[[Any], Any]) -> None:
        super().__init__()
        self.generator, self.draw, self.begun = torch.Generator().manual_seed(0), draw, False

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return z.square().sum(1) * (1 + self.draw(self) if self.begun else 1)


@pytest.mark.parametrize(
    "draw",
    [
        lambda c: torch.rand(()).double(),
        lambda c: random.random(),
        lambda c: float(np.random.rand()),
        lambda c: torch.rand((), generator=c.generator).double(),
        lambda c: torch.rand((), generator=GENERATOR).double(),
        lambda c: DRAWS.random(),
    ],
    ids=["torch", "random", "numpy", "its own", "a global one", "numpy's global one"],
)
@pytest.mark.parametrize("how", [{}, {"fraction": 0.5, "antithetic": True}], ids=repr)
def test_a_criterion_that_begins_to_draw(draw: Callable[[Any], Any], how: dict[str, Any]) -> None:
    """Both streams draw the same numbers, and one step draws once."""
    criterion = Drawing(draw)
    net = fb.convert(made(filled), rule=fb.LMS(1e-3), noise_std=1e-6, **how)
    loss = fb.PerturbedLoss(criterion, net)
    for step in range(3):
        criterion.begun = step > 0
        out = net(X)
        again = loss.per_sample.states()
        value = loss(out, Y)
        after = draw(criterion)
        assert net.feedback.points["a"].pending.loss_change.abs().max() < 1e-4
        for back in again:
            back()
        torch.testing.assert_close(value.detach(), criterion(out, Y).detach())
        assert float(after) == float(draw(criterion))
    copy.deepcopy(fb.PerturbedLoss(functools.partial(drawing, draw), net))


class Noisy(nn.Module):
    """Draws for the output's own dtype, whatever that is."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw, self.reduction = draw, "mean"

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z + 0.1 * self.draw(z), y, reduction=self.reduction)


@pytest.mark.parametrize(
    "draw",
    [
        torch.randn_like,
        lambda z: torch.rand(z.shape, dtype=z.dtype) + torch.rand(3, dtype=torch.float64).sum(),
        lambda z: torch.bernoulli(torch.full_like(z, 0.5)),
        lambda z: torch.empty_like(z).exponential_(),
        lambda z: torch.normal(torch.zeros_like(z), 1.0),
        lambda z: F.dropout(z, 0.5),
        lambda z: F.gumbel_softmax(z),
        lambda z: torch.distributions.Gamma(torch.ones_like(z + torch.zeros(4)), 1.0).rsample() + torch.randint(3, z.shape),
        lambda z: torch.multinomial(z.detach().softmax(1), 4, replacement=True),
    ],
    ids=["randn_like", "rand", "bernoulli", "exponential_", "normal", "dropout", "gumbel_softmax", "gamma", "multinomial"],
)
@pytest.mark.parametrize("how", [{"rule": fb.Joint()}, {"rule": fb.LMS(1e-3), "fraction": 0.5, "antithetic": True}], ids=["whole", "part"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_criterion_that_draws_for_the_output(draw: Any, how: dict[str, Any], dtype: torch.dtype) -> None:
    """It draws what the plain one does, though losses are taken in float64, and leaves the generator where the plain one does."""
    net, criterion = fb.convert(made(filled).to(dtype), noise_std=1e-4, **how), Noisy(draw)
    loss = fb.PerturbedLoss(criterion, net)
    for _ in range(3):
        out = net(X.to(dtype))
        before = torch.get_rng_state()
        value = loss(out, Y)
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        z = out.detach().requires_grad_()
        want = criterion(z, Y)
        assert torch.equal(after, torch.get_rng_state())
        close = 4 * torch.finfo(dtype).eps * (1 + out.detach().abs().max().item())
        torch.testing.assert_close(value.detach().double(), want.detach().double(), rtol=close, atol=close)
        (got,) = torch.autograd.grad(value, out)
        (e,) = torch.autograd.grad(want, z)
        torch.testing.assert_close(got, e, rtol=8 * close, atol=8 * close)


def test_a_criterion_whose_draws_hang_on_the_dtype_is_refused() -> None:
    net = fb.convert(made(filled).float(), rule=fb.Joint())
    loss = fb.PerturbedLoss(lambda z, y: z.square().sum(1) * torch.rand(1 if z.dtype == torch.float32 else 2).sum(), net)
    with pytest.raises(ValueError, match="draws other random numbers in float64"):
        loss(net(X.float()), Y)


def drawing(draw: Callable[[Any], Any], z: Tensor, y: Tensor) -> Tensor:
    return z.square().sum(1) * torch.rand((), generator=GENERATOR)


def test_what_a_hook_keeps_for_the_forward() -> None:
    def hooked(net: Net, x: Tensor) -> Tensor:
        torch.tanh(net.a(x))
        return net.o(torch.tanh(net.b(net.kept)))

    net, plain = fb.convert(made(hooked), rule=fb.Fixed()), made(hooked)
    for m in (net, plain):
        m.a.register_forward_hook(lambda _, args, h, m=m: setattr(m, "kept", h))
    assert torch.equal(net(X), plain(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streams_draw_alike_in_any_dtype(dtype: torch.dtype) -> None:
    """A difference is formed in float32, in which a function would draw another mask than in bfloat16: what is dropped has none."""

    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.alpha_dropout(torch.tanh(net.a(x)), 0.5, training=True)
        return net.o(torch.tanh(net.b(h))), h

    net = fb.convert(made(forward).to(dtype), rule=fb.LMS(1e-3), noise_std=0.01)
    _, h = net(X.to(dtype))
    d = net.feedback.current.changes[1]
    dropped = h == h.min()
    assert 20 < int(dropped.sum()) < 76
    assert torch.equal(d == 0, dropped)


def held(run: Callable[[], Any]) -> int:
    """Bytes of torch's allocator that a call does not give back, after a collection."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
        gc.collect()
    return sum(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")


class InPlace(nn.Module):
    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again = again
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(True), nn.Conv2d(8, 8, 3), nn.ReLU(True), nn.Flatten())
        self.o = nn.Linear(8 * 12 * 12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(checkpoint(self.body, x, use_reentrant=False) if self.again else self.body(x))


@pytest.mark.parametrize("again", [False, True], ids=["", "checkpoint"])
@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_nothing_is_left_of_a_forward(feedback: str, again: bool) -> None:
    """Nor of one whose loss nobody differentiates, where activations work in place."""
    net = fb.convert(InPlace(again), feedback=feedback, rule=fb.Joint() if feedback == "direct" else fb.WeightMirror(samples=8))
    criterion, x = fb.PerturbedLoss(nn.CrossEntropyLoss(), net), torch.randn(6, 3, 16, 16)
    first = held(lambda: criterion(net(x), Y))
    kept = sum(t.numel() * t.element_size() for k, t in net.state_dict().items() if "feedback" in k)
    assert first < 1.1 * kept + 8 * 14 * 14 * 4  # less than one activity of one sample
    assert abs(held(lambda: criterion(net(x), Y))) < 1000
    steps = [held(lambda: (criterion(net(x), Y).backward(), net.zero_grad())) for _ in range(2)]
    assert abs(steps[1]) < 1000


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn, self.o = getattr(nn, kind)(8, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_a_recurrent_layer_has_a_point_by_name(kind: str) -> None:
    """Its weights get what the plain layer's do when B e comes in at its output."""
    torch.manual_seed(0)
    plain = Recurrent(kind).double()
    with pytest.raises(ValueError, match=rf"layers are \['o'\]; {kind} 'rnn' can have one right behind, by name: points"):
        fb.convert(plain)
    net, x = fb.convert(plain, rule=fb.Fixed(), points=["rnn"]), torch.randn(6, 5, 8).double()
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    with pytest.warns(UserWarning, match=rf"direct feedback has no B for {kind.lower()}[a-z_]* by 'rnn.weight_ih_l0': they are trained"):
        out = net(x)
    (e,) = torch.autograd.grad(criterion(out, Y), out, retain_graph=True)
    criterion(net(x), Y).backward()
    h = plain.rnn(x)[0]
    want = torch.autograd.grad(h, [*plain.rnn.parameters()], (e @ fb.points(net)["rnn"].B.T).view(h.shape))
    for got, g in zip(net.rnn.parameters(), want, strict=True):
        torch.testing.assert_close(got.grad, g, rtol=1e-10, atol=1e-12)
    assert "no B, the error passes the weights themselves" in str(fb.summary(net))


def test_a_cell_has_none() -> None:
    with pytest.raises(ValueError, match=r"RNNCell '0' can have none: write the recurrence with nn.Linear"):
        fb.convert(nn.Sequential(nn.RNNCell(8, 6), nn.Linear(6, 4)))


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_a_layer_that_runs_while_gradients_are_enabled(feedback: str) -> None:
    def asks(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh(net.a(x))
        return net.o(torch.tanh(net.b(h)) + (torch.tanh(net.c(h)) if torch.is_grad_enabled() else 0))

    net = fb.convert(made(asks), feedback=feedback, rule=fb.Fixed())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    criterion(net(X), Y).backward()
    assert len(fb.points(net)) == 3
    assert net.feedback.unplaced == set()


# calls that torch shows to nobody, or shows in another form


@torch.jit.script
def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
@pytest.mark.parametrize("unseen", [swish, torch.vmap(lambda v: v * v.norm())])
@pytest.mark.parametrize("last", [False, True])
def test_calls_that_cannot_be_seen_are_told(feedback: str, unseen: Any, last: bool) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh(net.a(x))
        out = net.o(torch.tanh(net.b(h)) + (net.c(h) if last else unseen(net.c(h))))
        return out + unseen(out) if last else out

    net = fb.convert(made(forward), feedback=feedback, rule=fb.Fixed())
    with pytest.raises(
        ValueError, match=f"what follows layer '{'o' if last else 'c'}' runs where torch shows no calls, in torch.jit.script"
    ):
        net(X)


def test_a_buffer_that_holds_an_activity_and_a_mask_drawn_from_one_are_no_such_calls() -> None:
    def kept(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh(net.a(x))
        net.bank = torch.zeros(6, 16, dtype=x.dtype)
        net.bank[:] = h
        return net.o(torch.tanh(net.b(h * torch.bernoulli(h.sigmoid()))) + net.bank.mean())

    assert list(fb.points(net := fb.convert(made(kept), rule=fb.Fixed()))) and net(X).shape == (6, 4)


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
@pytest.mark.parametrize("rule", [fb.Fixed(), fb.LMS(1e-3)], ids=repr)
def test_keywords_are_positions(feedback: str, rule: fb.Rule) -> None:
    def named(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh(input=F.linear(weight=net.a.weight, bias=net.a.bias, input=x))
        return net.o(torch.tanh(F.linear(input=h, weight=net.b.weight, bias=net.b.bias)))

    found = []
    for how in (named, lambda net, x: net.o(torch.tanh(net.b(torch.tanh(net.a(x)))))):
        net = fb.convert(made(how), feedback=feedback, rule=rule)
        criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
        found.append([gradients(net, criterion(net(X), Y)) for _ in range(3)][-1])
    equal(*found)


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_tensordot(feedback: str) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.o(torch.tanh(torch.tensordot(torch.tanh(net.a(x)), net.b.weight, ([1], [1]))))

    net = fb.convert(made(forward), feedback=feedback, rule=fb.Fixed())
    assert torch.equal(net(X), made(forward)(X))


@pytest.mark.parametrize("name", ["product", "einsum", "inner", "GRUCell", "LSTMCell", "RNNCell"])
def test_layerwise_says_which_weights_have_no_B(name: str) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh(net.a(x))
        if name == "product":
            h = h @ (net.b.weight.T @ net.c.weight)
        elif name == "einsum":
            h = torch.einsum("ni,oi->no", h, net.b.weight * 1.0)
        elif name == "inner":
            h = torch.inner(h, net.b.weight)
        else:
            h = net.cell(h)
            h = h[0] if isinstance(h, tuple) else h
        return net.o(torch.tanh(h[:, :12]))

    cell = getattr(nn, name)(16, 12).double() if name.endswith("Cell") else None
    net = made(forward)
    net.cell = cell
    which = {"product": "matmul by 'c'", "einsum": "einsum by 'b'", "inner": "inner by 'b'"}.get(name, "[a-z_]*cell by 'cell.weight_ih'")
    for feedback, told in (("layerwise", "the error goes on to what lies below"), ("direct", "they are trained by backprop")):
        with pytest.warns(UserWarning, match=f"{feedback} feedback has no B for {which}: {told}"):
            fb.convert(copy.deepcopy(net), feedback=feedback, rule=fb.Fixed())(X)


def test_a_gradient_inside_of_a_forward() -> None:
    """Of layers that run for it alone it is the plain one; through a point it is refused."""

    def moved(net: Net, x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(net.o(torch.tanh(net.b(torch.tanh(net.a(z := x.detach().requires_grad_()))))).sum(), z)
        return net.o(torch.tanh(net.b(torch.tanh(net.a(x - g)))))

    def crosses(net: Net, x: Tensor) -> Tensor:
        out = net.o(torch.tanh(net.b(h := torch.tanh(net.a(x)))))
        return out + torch.autograd.grad(out.sum(), h, retain_graph=True)[0].mean(1, keepdim=True)

    def differentiated(net: Net, x: Tensor) -> Tensor:
        out = net.o(torch.tanh(net.a(z := x.detach().requires_grad_()))[:, :12])
        return torch.autograd.grad(out.sum(), z, create_graph=True)[0]

    for feedback in ("direct", "layerwise"):
        net = fb.convert(made(moved), feedback=feedback, rule=fb.WeightTransport() if feedback == "layerwise" else fb.Fixed())
        got = gradients(net, fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(X), Y))
        want = exact(made(moved))
        equal(*({n: g[n] for n in want if feedback == "layerwise" or n == "o.weight"} for g in (got, want)))
        with pytest.raises(ValueError, match="the forward differentiates what follows layer 'a', whose feedback point no such gradient"):
            fb.convert(made(crosses), feedback=feedback)(X)
        with pytest.raises(ValueError, match=r"what follows layer '.' runs where torch shows no calls, .* torch\.autograd\.grad"):
            fb.convert(made(differentiated), feedback=feedback)(X)


# what changes between two steps


@pytest.mark.parametrize("change", [other_tensors, nn.Module.double])
def test_statistics_of_a_norm_are_written_once_after_a_move(change: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    norm = nn.InstanceNorm1d(4, track_running_stats=True)
    plain = nn.Sequential(nn.Conv1d(8, 4, 1), nn.Tanh(), nn.Conv1d(4, 4, 1), norm, nn.Flatten(), nn.Linear(20, 4)).double()
    net, x = fb.convert(copy.deepcopy(plain), rule=fb.Joint()), torch.randn(6, 8, 5, dtype=torch.float64)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    for _ in range(2):
        plain(x)
        criterion(net(x), Y).backward()
        torch.testing.assert_close(net[3].running_var, plain[3].running_var)
        if change is other_tensors:
            change(net)
        else:
            net.float(), change(net)
            plain.float().double()


@pytest.mark.parametrize("rule", [fb.LMS(1e-3), fb.Ridge()], ids=repr)
def test_the_batch_is_found_by_its_parameter(rule: fb.Rule) -> None:
    class Two(Net):
        def forward(self, x: Tensor | None = None, m: Any = None) -> Any:
            assert x is not None
            return self.o(torch.tanh(self.b(torch.tanh(self.a(x)))) * m["m"].mean())

    m, found = torch.rand(3, 3, dtype=torch.float64), []
    for second in (((X, {"m": m}), {}), ((), {"x": X, "m": {"m": m}}), ((), {"m": {"m": m}, "x": X})):
        torch.manual_seed(0)
        net = fb.convert(Two(filled).double(), feedback="layerwise", rule=rule)
        criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
        criterion(net(X, m={"m": m}), Y).backward()
        for _ in range(2):
            got = gradients(net, criterion(net(*second[0], **second[1]), Y))
        found.append(got)
    equal(found[1], found[0])
    equal(found[2], found[0])


def test_a_batch_that_another_parameter_takes() -> None:
    class Either(Net):
        def forward(self, x: Any = None, embedded: Any = None) -> Any:
            return filled(self, embedded if x is None else x)

    net = fb.convert(Either(filled).double(), rule=fb.Joint())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    criterion(net(X), Y).backward()
    criterion(net(embedded=X[:4]), Y[:4]).backward()


def test_what_a_model_refers_to_stays_the_users() -> None:
    model = made(lambda net, x: filled(net, x) / net.settings["temperature"])
    settings: Any = {"temperature": 1.0}
    model.settings, model.lock, model.draws, model.layers = settings, threading.Lock(), (i for i in range(3)), {"o": [model.o, settings]}
    net = fb.convert(model)
    settings["temperature"] = 2.0
    assert torch.equal(net.eval()(X), model.eval()(X))
    assert net.lock is model.lock and net.draws is model.draws
    assert net.layers["o"][0] is net.o is not model.o and net.layers["o"][1] is settings


def test_a_function_that_encloses_the_model_is_told() -> None:
    model: Any = made(lambda net, x: net.o(net.drop(torch.tanh(net.b(torch.tanh(net.a(x)))))))
    model.drop = lambda h: F.dropout(h, training=model.training)
    with pytest.warns(UserWarning, match="attribute 'drop' of model is a function that encloses the model itself"):
        fb.convert(model)
    model.drop = functools.partial(F.dropout, p=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fb.convert(model)


def test_a_compiled_part_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 16), torch.compile(nn.Tanh()), nn.Linear(16, 4))
    with pytest.raises(ValueError, match="module '1' is compiled, and its calls cannot be seen: convert with its _orig_mod in its place"):
        fb.convert(model)


def test_a_model_that_asks_for_requires_grad_is_warned_where_the_answer_is_another() -> None:
    def asks(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh(net.a(x)).view(-1, 16)
        return net.o(torch.tanh(net.b(h)) + (torch.tanh(net.c(h)) if h.requires_grad else 0))

    with pytest.warns(UserWarning, match="direct feedback: the model asks whether an activity requires a gradient"):
        fb.convert(made(asks), rule=fb.Fixed())(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fb.convert(made(asks), feedback="layerwise", rule=fb.Fixed())(X), made(asks)(X))
        net = fb.convert(made(filled), rule=fb.Fixed())
        net.b.register_full_backward_hook(lambda *_: None)
        net(X)


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_tied_layers_and_one_for_two_inputs(feedback: str) -> None:
    def tied_twice(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(torch.tanh(net.b(torch.tanh(net.a(x)))), net.b.weight.T))
        return net.o(torch.tanh(F.linear(torch.tanh(F.linear(h, net.a.weight.T)), net.c.weight[:, :8])))

    with pytest.raises(ValueError, match=r"no parameters, a tied one's weight.T perhaps, .*: exclude=\['layer'\] trains"):
        fb.convert(made(tied_twice), feedback=feedback, rule=fb.Fixed())(X)
    net = fb.convert(made(tied_twice), feedback=feedback, rule=fb.Fixed(), exclude=["layer"])
    assert torch.equal(net(X), made(tied_twice)(X)) and len(fb.points(net)) == 2


class Shared(nn.Module):
    """Two branches and a state that is read again and again; ``apart``: a layer of its own for each run, with the same weights."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        a, b, self.o = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        other = copy.deepcopy if apart else lambda layer: layer
        self.a, self.b = nn.ModuleList([a, other(a)]), nn.ModuleList([b, *(other(b) for _ in range(3))])

    def forward(self, x: Tensor) -> Tensor:
        u, v = torch.tanh(self.b[0](torch.tanh(self.a[0](x)))), torch.tanh(self.b[1](torch.tanh(self.a[1](x.flip(1)))))
        h = torch.tanh(self.b[2](u * v))
        return self.o(torch.tanh(self.b[3](h) + u))


def shared(apart: bool) -> nn.Module:
    torch.manual_seed(0)
    return Shared(apart).double()


def summed(got: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Of layers that each run once, in the name of the first."""
    total: dict[str, Any] = {}
    for name, g in got.items():
        first = re.sub(r"\.\d", ".0", name)
        total[first] = g if first not in total else total[first] + g
    return total


@pytest.mark.parametrize("rule", [fb.LMS(1e-3), fb.Ridge(), fb.Joint(), fb.Joint(signal="output"), fb.Fixed()], ids=repr)
@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_a_layer_that_runs_several_times(feedback: str, rule: fb.Rule) -> None:
    """It is as many layers, whose weights are the same, and their gradients are summed; layerwise, what is fixed is one B for all."""
    if feedback not in rule.structures:
        pytest.skip("no such rule")
    nets = [fb.convert(shared(apart), feedback=feedback, rule=rule, noise_std=1e-3) for apart in (False, True)]
    criteria = [fb.PerturbedLoss(nn.CrossEntropyLoss(), net) for net in nets]
    for _ in range(3):
        got, want = (gradients(net, criterion(net(X), Y)) for net, criterion in zip(nets, criteria, strict=True))
        if feedback == "layerwise" and not rule.measures:
            first = next(p for p in fb.points(nets[0]).values() if p.weight is nets[0].b[0].weight)
            for p in fb.points(nets[1]).values():
                p.B = first.B if p.B.shape == first.B.shape else fb.points(nets[0])[p.name].B
            want = gradients(nets[1], criteria[1](nets[1](X), Y))
        equal(got, summed(want))
    names = [*fb.points(nets[0])]
    assert len(names) == (6 if feedback == "direct" else 5 if rule.measures else 2)


@pytest.mark.parametrize("rule", [fb.WeightTransport(), fb.WeightMirror()], ids=repr)
def test_a_layer_that_runs_several_times_has_one_transported_weight(rule: fb.Rule) -> None:
    plain, net = shared(False), fb.convert(shared(False), feedback="layerwise", rule=rule)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    for _ in range(2):
        got = gradients(net, criterion(net(X), Y))
    want = gradients(plain, nn.CrossEntropyLoss()(plain(X), Y))
    for name, g in want.items():
        torch.testing.assert_close(got[name], g, rtol=1e-10, atol=1e-12)
    other = fb.convert(shared(False), feedback="layerwise", rule=rule)
    other.load_state_dict(net.state_dict())
    assert len(fb.points(net)) == 2 and str(fb.summary(other, X))


def test_points_of_a_layer_s_runs_are_saved() -> None:
    net = fb.convert(shared(False), rule=fb.Ridge())
    fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(X), Y).backward()
    assert [*fb.points(net)] == ["a.0", "b.0", "a.0:2", "b.0:2", "b.0:3", "b.0:4"] and str(fb.summary(net))
    other = fb.convert(shared(False), rule=fb.Ridge())
    other.load_state_dict(net.state_dict())
    other(X)
    assert all(torch.equal(p.B, fb.points(other)[n].B) for n, p in fb.points(net).items())
    angles = fb.metrics.alignment(net, nn.CrossEntropyLoss(), X, Y)
    assert angles.keys() == fb.points(net).keys()


def keeps(net: Net, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x))
    g = torch.tanh(net.b(h))
    net.kl, net.terms = h.square().mean(), [g.abs().mean()]
    with torch.no_grad():
        net.seen = h.mean()
    return net.o(g)


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
@pytest.mark.parametrize("term", [lambda net: net.kl, lambda net: net.terms[0]])
def test_a_loss_of_what_the_model_keeps_is_told_or_right(feedback: str, term: Callable[[Any], Tensor]) -> None:
    plain = made(keeps)
    net = fb.convert(plain, feedback=feedback, rule=fb.WeightTransport() if feedback == "layerwise" else fb.Fixed())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    criterion(net(X), Y).backward()
    assert not net.seen.requires_grad
    criterion(net(X), Y)
    if feedback == "direct":
        with pytest.warns(UserWarning, match="is in a loss, and direct feedback sends its gradient to no layer below it"):
            term(net).backward()
    else:
        plain(X)
        equal(gradients(net, term(net)), gradients(plain, term(plain)))


def test_a_loss_of_what_a_hook_kept_of_a_fused_layer_is_told() -> None:
    net = fb.convert(mlp().float(), rule=fb.Fixed())
    seen: list[Tensor] = []
    net[0].register_forward_hook(lambda module, args, out: seen.append(out))
    net(X.float())
    with pytest.warns(UserWarning, match="what was kept behind layer '0' is in a loss"):
        seen[0].square().mean().backward()


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_a_step_in_eval_mode_is_told(feedback: str) -> None:
    net = fb.convert(mlp(), feedback=feedback, rule=fb.Fixed())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    criterion(net(X), Y).backward()
    net.eval()
    criterion(net(X), Y)  # an evaluation that has not turned autograd off
    with pytest.warns(UserWarning, match="the network is in eval mode, where gradients are backprop's"):
        criterion(net(X), Y).backward()


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_layers_are_refused_in_layerwise_feedback() -> None:
    layers = [nn.Linear(8, 6), nn.Linear(6, 6, dtype=torch.complex128), nn.Linear(6, 4)]

    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = (layer.to(torch.complex128 if i == 1 else torch.float64) for i, layer in enumerate(layers))

        def forward(self, x: Tensor) -> Tensor:
            return self.o(torch.tanh(self.b(torch.tanh(self.a(x)).to(torch.complex128))).abs())

    with pytest.raises(TypeError, match="layer 'b' has complex weights, and layerwise feedback has no complex B"):
        fb.convert(Complex(), feedback="layerwise", rule=fb.WeightTransport())(X)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rule", [fb.Fixed(), fb.Joint()], ids=repr)
def test_an_output_that_is_returned_twice(rule: fb.Rule) -> None:
    def twice(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        out = net.o(torch.tanh(net.b(torch.tanh(net.a(x)))))
        return out, out

    plain = made(twice)
    net = fb.convert(plain, rule=rule)
    got = gradients(net, fb.PerturbedLoss(both, net)(net(X), Y))
    want = gradients(plain, both(plain(X), Y))
    equal({"o.weight": got["o.weight"]}, {"o.weight": want["o.weight"]})


@pytest.mark.filterwarnings("error:the output of a converted network")
def test_a_layerwise_generator_learns_from_another_network_s_loss() -> None:
    generator = fb.convert(mlp(), feedback="layerwise", rule=fb.WeightTransport())
    judge = fb.convert(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double(), feedback="layerwise", rule=fb.Fixed())
    fb.PerturbedLoss(nn.BCEWithLogitsLoss(), judge)(judge(generator(X)), torch.ones(6, 1, dtype=torch.float64)).backward()
    assert generator[0].weight.grad.norm() > 0
    mirror = fb.convert(mlp(), feedback="layerwise", rule=fb.WeightMirror())
    with pytest.warns(UserWarning, match="a loss that is no PerturbedLoss, so B learns nothing"):
        mirror(X).sum().backward()


@pytest.mark.parametrize("rule", [fb.Fixed(), fb.Joint(), fb.WeightTransport()], ids=repr)
def test_a_choice_and_a_mask_beside_logits(rule: fb.Rule) -> None:
    def chosen(net: Net, x: Tensor) -> dict[str, Tensor]:
        out = net.o(torch.tanh(net.b(torch.tanh(net.a(x)))))
        return {"sure": out.amax(1) > 0, "pred": out.argmax(1), "logits": out}

    def criterion(out: dict[str, Tensor], y: Tensor) -> Tensor:
        assert out["pred"].dtype == torch.int64 and out["sure"].dtype == torch.bool
        return F.cross_entropy(out["logits"], y, reduction="none")

    plain, transport = made(chosen), isinstance(rule, fb.WeightTransport)
    for options in ({}, {"antithetic": True, "fraction": 0.5}) if isinstance(rule, fb.Joint) else ({},):
        net = fb.convert(plain, feedback="layerwise" if transport else "direct", rule=rule, **options)
        got = gradients(net, fb.PerturbedLoss(criterion, net)(net(X), Y).mean())
        want = gradients(plain, criterion(plain(X), Y).mean())
        equal(got, {n: g for n, g in want.items() if transport or n.startswith("o.")})


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_ctc_of_time_first_outputs(feedback: str) -> None:
    """A loss for each sample of an output [T, N, C]."""
    x, y, sizes = torch.randn(9, 6, 8, dtype=torch.float64), torch.randint(1, 4, (6, 3)), torch.full((6,), 9)

    def criterion(out: Tensor, y: Tensor) -> Tensor:
        n = len(y)
        return F.ctc_loss(out.log_softmax(2), y, sizes[:n], torch.full((n,), 3), reduction="none")

    pointwise = fb.convert(made(lambda net, x: net.o(torch.tanh(net.b(torch.tanh(net.a(x)))))), feedback=feedback, rule=fb.LMS(1e-3))
    with pytest.raises(ValueError, match=r"got shape .6,. for 9 samples: .* samples come first in what the network takes, not time"):
        fb.PerturbedLoss(criterion, pointwise)(pointwise(x), y)
    plain = made(lambda net, x: net.o(torch.tanh(net.b(torch.tanh(net.a(x)).cumsum(0)))))  # which mixes times, so that these are no samples
    net = fb.convert(plain, feedback=feedback, rule=fb.LMS(1e-3))
    loss, c = fb.PerturbedLoss(criterion, net), torch.arange(6.0)
    for _ in range(2):
        got = gradients(net, (loss(net(x), y) * c).sum())["o.weight"]
        torch.testing.assert_close(got, gradients(plain, (criterion(plain(x), y) * c).sum())["o.weight"])


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_a_second_derivative_is_refused(feedback: str) -> None:
    net = fb.convert(mlp(), feedback=feedback, rule=fb.Fixed())
    loss = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(X), Y)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice: leave out create_graph=True"):
        torch.autograd.grad(loss, [*net.parameters()], create_graph=True)


def test_a_sparse_batch_is_refused() -> None:
    net = fb.convert(made(lambda net, x: net.o(torch.tanh(net.b(torch.tanh(torch.sparse.mm(x, net.a.weight.t())))))), rule=fb.Fixed())
    with pytest.raises(TypeError, match=r"needs a dense batch, got one of layout torch.sparse_coo: pass x.to_dense\(\)"):
        net(X.to_sparse())


def test_a_compiled_function_inside_is_refused_or_seen() -> None:
    """Dynamo of torch 2.11 leaves what runs under a mode alone, that of 2.13 does not."""

    def gated(h: Tensor) -> Tensor:
        return h * torch.sigmoid(h)

    def step(act: Any) -> dict[str, Tensor | None]:
        net = fb.convert(made(lambda net, x: net.o(act(net.b(act(net.a(x)))))), rule=fb.Fixed())
        return gradients(net, fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(X), Y))

    compiled = torch.compile(gated, backend="eager")
    if torch.__version__ < "2.12":
        equal(step(compiled), step(gated))
    else:
        with pytest.raises(TypeError, match=r"a function inside the model is compiled by torch\.compile, which hides its calls"):
            step(compiled)


class Blurred(nn.Module):
    """Filters that are buffers, and one that is computed of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3), nn.Linear(4, 4)
        self.register_buffer("blur", torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).expand(4, 1, 3).clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv1d(torch.tanh(self.a(x)), self.blur, stride=2, groups=4)
        return self.o((torch.tanh(self.b(F.conv1d(h, 2 * self.blur, groups=4)))).mean(2))


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_a_constant_filter_is_a_function(feedback: str) -> None:
    torch.manual_seed(0)
    plain, x = Blurred().double(), torch.randn(6, 3, 20, dtype=torch.float64)
    rule = fb.Fixed() if feedback == "direct" else fb.WeightTransport()
    net = fb.convert(copy.deepcopy(plain), feedback=feedback, rule=rule)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    for _ in range(2):
        got = gradients(net, criterion(net(x), Y))
    want = gradients(plain, nn.CrossEntropyLoss()(plain(x), Y))
    assert list(fb.points(net)) == (["a", "b"] if feedback == "direct" else ["b.input", "o.input"])
    assert net.feedback.unplaced == set()
    same = [k for k, g in want.items() if torch.allclose(got[k], g, rtol=1e-8)]
    assert same == (["o.weight", "o.bias"] if feedback == "direct" else list(want))


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_lazy_layers(feedback: str) -> None:
    torch.manual_seed(0)
    net = fb.convert(nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(4)).double(), feedback=feedback)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    for _ in range(2):
        criterion(net(X), Y).backward()
    assert (type(net[0]), type(net[3])) == (nn.Linear, nn.Linear) and list(fb.points(net)) == ["0"]
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("before", ["convert", "the second step"])
def test_full_backward_hooks(feedback: str, at: int, before: str, dtype: torch.dtype) -> None:
    found, seen = [], []
    for hooked in (False, True):
        torch.manual_seed(0)
        net: nn.Module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)).to(dtype)
        if hooked and before == "convert":
            net[at].register_full_backward_hook(lambda *_: seen.append(1))
        net = fb.convert(net, feedback=feedback, rule=fb.Fixed())
        criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
        for step in range(3):
            if hooked and before != "convert" and step == 1:
                net[at].register_full_backward_hook(lambda *_: seen.append(1))
            found.append(gradients(net, criterion(net(X.to(dtype)), Y)))
        assert list(fb.points(net)) == ["0", "2"] and not net.feedback.stale
        assert all(p.B is not None for p in fb.points(net).values())
    for ours, plain in zip(found[3:], found[:3], strict=True):
        equal(ours, plain)
    assert seen or (feedback == "direct" and at in (1, 3))


@pytest.mark.parametrize("rule", [fb.Joint(), fb.Joint(signal="output"), fb.Ridge(), fb.LMS(1e-3), fb.Fixed()], ids=repr)
def test_an_output_of_more_digits_than_the_network(rule: fb.Rule) -> None:
    def cast(net: Net, x: Tensor) -> Tensor:
        return filled(net, x).double()

    torch.manual_seed(0)
    net = fb.convert(Net(cast), rule=rule)
    criterion, x = fb.PerturbedLoss(nn.CrossEntropyLoss(), net), X.float()
    for _ in range(3):
        criterion(net(x), Y).backward()
    assert {p.B.dtype for p in fb.points(net).values()} == {torch.float32}


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_one_number_beside_the_batch(feedback: str, shape: tuple[int, ...]) -> None:
    class Timed(Net):
        def forward(self, t: Tensor, x: Tensor) -> Any:  # type: ignore[override]
            return filled(self, t * x)

    torch.manual_seed(0)
    net = fb.convert(Timed(filled).double(), feedback=feedback, rule=fb.Ridge())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    criterion(net(torch.ones(shape, dtype=torch.float64), X), Y).backward()
    assert {len(p.B) for p in fb.points(net).values()} <= {16, 12}


@pytest.mark.parametrize("rule", [fb.Fixed(), fb.KolenPollack(0.9), fb.WeightMirror(), fb.Ridge(), fb.WeightTransport()], ids=repr)
@pytest.mark.parametrize("first", [True, False])
def test_a_layer_that_the_first_step_skips(rule: fb.Rule, first: bool) -> None:
    """B goes with the layer that it is of."""

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.o = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 12), nn.Linear(12, 4)
            self.skip = False

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            h = h if self.skip else torch.tanh(self.b(h))
            return self.o(torch.tanh(self.c(h)))

    torch.manual_seed(0)
    plain: Any = Skips().double()
    net: Any = fb.convert(copy.deepcopy(plain), feedback="layerwise", rule=rule)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    of_c = None
    for step in range(4):
        net.skip = plain.skip = (step % 2 == 0) == first
        got = gradients(net, criterion(net(X), Y))
        reads = net.feedback.placement.reads
        B = fb.points(net)[reads["c", 0]].B.clone()
        if isinstance(rule, fb.Fixed):
            assert of_c is None or torch.equal(B, of_c)
            of_c = B
        if isinstance(rule, (fb.WeightMirror, fb.WeightTransport)):
            want = gradients(plain, nn.CrossEntropyLoss()(plain(X), Y))
            assert all(torch.allclose(got[k], g, rtol=1e-8) for k, g in want.items() if g is not None)


@pytest.mark.parametrize("how", [lambda z: z.div_(0.5), lambda z: z.mul_(4.0)], ids=["div_", "mul_"])
@pytest.mark.parametrize(("feedback", "rule"), [("direct", fb.Joint()), ("layerwise", fb.LMS(1e-3))], ids=repr)
def test_an_output_changed_in_place_is_a_function_of_it(feedback: str, rule: fb.Rule, how: Callable[[Tensor], Any]) -> None:
    nets = [fb.convert(mlp(), feedback=feedback, rule=rule, noise_std=0.1) for _ in range(2)]
    for net, inplace in zip(nets, (False, True), strict=True):
        criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
        for _ in range(3):
            z = net(X)
            if not inplace:
                z = z.clone()
            how(z)
            criterion(z, Y).backward()
    equal(*({k: p.grad for k, p in net.named_parameters()} for net in nets))
    for a, b in zip(*(fb.points(net).values() for net in nets), strict=True):
        torch.testing.assert_close(a.B, b.B)
        assert a.B.any()
    z = net(X)
    z[:, :2].mul_(3.0)
    with pytest.raises(ValueError, match="what else follows"):
        criterion(z, Y)


def test_a_hook_on_the_output_is_told() -> None:
    """Hidden layers with direct feedback have their error from the loss, before the hook."""
    net = fb.convert(mlp(), rule=fb.Fixed())
    out = net(X)
    out.register_hook(lambda g: 2 * g)
    with pytest.warns(UserWarning, match="a part of the output's gradient is from outside of PerturbedLoss, from another term or a hook"):
        fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(out, Y).backward()


def in_place(net: Net, x: Tensor) -> Tensor:
    """Results that nobody takes: what was written is read."""
    h = torch.tanh(net.a(x)).clone()
    h.mul_(2.0)
    h.masked_fill_(h > 1, 0.5)
    h[:, :3] *= 2
    h[:, 0] = 0
    h.div_(h.detach().norm(dim=1, keepdim=True) + 1)
    z = x.new_zeros(len(x), 16)
    z[:] = h
    z.add_(h)
    z.relu_()
    return net.o(torch.tanh(net.b(z)))


@pytest.mark.parametrize(("feedback", "rule"), [("direct", fb.Joint()), ("layerwise", fb.WeightMirror())], ids=repr)
def test_what_is_written_in_place_in_a_trace(feedback: str, rule: fb.Rule) -> None:
    """Dynamo's result of an in-place call is another than its argument, whose difference was the old one; and z[:] = h wrote the noise."""
    found = []
    for compiled in (False, True):
        net = fb.convert(made(in_place), feedback=feedback, rule=rule, noise_std=0.1)
        criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
        whole = torch.__version__ >= "2.12"  # Dynamo of torch 2.11 knows no identity of what a trace makes: then the step is eager
        run = torch.compile(net, backend="eager", fullgraph=whole) if compiled else net
        loss = criterion(run(X), Y)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None), *(p.B for p in fb.points(net).values())])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("part", [lambda h: h.chunk(2, 1), lambda h: torch.split(h, 8, 1), lambda h: h.view(-1, 2, 8).unbind(1)])
@pytest.mark.parametrize(("feedback", "rule"), [("direct", fb.Joint()), ("layerwise", fb.WeightMirror())], ids=repr)
def test_parts_of_an_activity_in_a_trace(feedback: str, rule: fb.Rule, part: Callable[[Tensor], Any]) -> None:
    def how(net: Net, x: Tensor) -> Tensor:
        u, v = part(torch.tanh(net.a(x)))
        return net.o(torch.tanh(net.b(torch.cat((v, u * 2), 1))))

    found = []
    for compiled in (False, True):
        net = fb.convert(made(how), feedback=feedback, rule=rule, noise_std=0.1)
        criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
        run = torch.compile(net, backend="eager", fullgraph=True) if compiled else net
        criterion(run(X), Y).backward()
        found.append([*(p.grad for p in net.parameters() if p.grad is not None), *(p.B for p in fb.points(net).values())])
    torch.testing.assert_close(*found)


def by_columns(net: Net, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x))
    z = h.new_zeros(len(x), 32)
    z[:, :16].copy_(h)
    z.narrow(1, 16, 16).add_(h).mul_(2.0)
    return net.o(torch.tanh(net.b(z[:, :16]) + net.c(z[:, 16:])))


@pytest.mark.parametrize("how", [{}, {"fraction": 0.5}, {"antithetic": True}, {"fraction": 0.5, "antithetic": True}], ids=repr)
def test_the_difference_of_what_is_written_through_views(how: dict[str, Any]) -> None:
    """That of a second pass with the noise that the engine draws."""
    net = fb.convert(made(by_columns), rule=fb.Joint(), noise_std=0.1, seed=5, **how)
    net(X)
    xi = [fb.functional.noise(5, 0, i, 6, units, 0.1).double() for i, units in enumerate((16, 12, 12))]
    plain, rows = made(by_columns), 3 if "fraction" in how else 6

    def noisy(sign: float) -> Tensor:
        h = torch.tanh(plain.a(X)) + sign * xi[0]
        return plain.o(torch.tanh(plain.b(h) + sign * xi[1] + plain.c(2 * h) + sign * xi[2]))

    want = [(noisy(sign) - noisy(0.0))[:rows] for sign in ((1.0, -1.0) if "antithetic" in how else (1.0,))]
    torch.testing.assert_close(net.feedback.current.changes[0], torch.cat(want).detach(), rtol=0, atol=1e-6)  # noise is of float32


def test_what_is_written_through_views_is_refused_where_it_cannot_be_followed() -> None:
    net = fb.convert(made(filled_by_views), rule=fb.Joint(), fraction=0.5)
    with pytest.raises(ValueError, match="use fraction=1 and antithetic=False"):
        net(X)
    net = fb.convert(made(by_columns), rule=fb.Joint())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="reads what it has written through a view"):
        torch.compile(net, backend="eager", fullgraph=True)(X)


@dataclasses.dataclass(frozen=True)
class Heads:
    other: Any
    nothing: None = None


@dataclasses.dataclass
class Output:
    logits: Tensor
    heads: Heads
    name: str


@dataclasses.dataclass
class Batch:
    x: Tensor
    scale: float


def test_dataclasses_go_in_and_come_out() -> None:
    def how(net: Net, batch: Any) -> Output:
        h = torch.tanh(net.a(batch.x * batch.scale))
        return Output(net.o(torch.tanh(net.b(h))), Heads(torch.tanh(net.c(h))), "both")

    def loss(out: Output, y: Tensor) -> Tensor:
        return F.cross_entropy(out.logits, y, reduction="none") + out.heads.other.square().sum(1)

    plain, net = made(how), fb.convert(made(how), feedback="layerwise", rule=fb.WeightTransport())
    out = net(Batch(X, 2.0))
    assert (type(out), type(out.heads), out.name) == (Output, Heads, "both")
    equal(gradients(net, fb.PerturbedLoss(loss, net)(out, Y).mean()), gradients(plain, loss(plain(Batch(X, 2.0)), Y).mean()))


def routed(net: Net, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x))
    out, first = h.new_zeros(len(h), 12), h[:, 0] > 0
    out[first] = net.b(h[first])
    rest = (~first).nonzero()[:, 0]
    return net.o(torch.tanh(out.index_add(0, rest, net.c(h[rest]))))


@pytest.mark.parametrize("rule", [fb.WeightTransport(), fb.WeightMirror(), fb.Fixed(), fb.SignSymmetric(), fb.KolenPollack()], ids=repr)
def test_experts_that_samples_are_sent_to(rule: fb.Rule) -> None:
    """Without a second stream nobody needs to know whose an expert's rows are."""
    plain, net = made(routed), fb.convert(made(routed), feedback="layerwise", rule=rule)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    for x in (X, X[:5].flip(0), -X):
        got, want = gradients(net, criterion(net(x), Y[: len(x)])), gradients(plain, nn.CrossEntropyLoss()(plain(x), Y[: len(x)]))
        equal(got, want if type(rule) is fb.WeightTransport else {k: want[k] for k in ("o.weight", "o.bias")})


@pytest.mark.parametrize(("feedback", "rule"), [("direct", fb.Joint()), ("layerwise", fb.LMS(1e-3))], ids=repr)
def test_experts_where_a_second_stream_would_choose_others(feedback: str, rule: fb.Rule) -> None:
    net, x = fb.convert(made(routed), feedback=feedback, rule=rule), torch.linspace(-2, 2, 96, dtype=torch.float64).sin().view(12, 8)
    with pytest.raises(ValueError, match=r"chooses by the values of its activities.*feedback='layerwise' and WeightMirror"):
        net(x)


def test_a_supervised_rule_where_a_layer_is_skipped() -> None:
    def how(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh(net.a(x))
        net.steps = getattr(net, "steps", 0) + 1
        return net.o(torch.tanh(net.b(h) + net.c(h) if net.steps % 2 else net.c(h)))

    net = fb.convert(made(how), rule=fb.SyntheticGradient(0.1))
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    for _ in range(4):
        criterion(net(X), Y).backward()
    assert all(p.B.isfinite().all() for p in fb.points(net).values())


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.GroupNorm(4, 16)], ids=repr)
def test_a_norm_in_a_network_of_low_precision(norm: nn.Module) -> None:
    """The difference is float32's, and the norm's weights are not."""
    model = nn.Sequential(nn.Linear(8, 16), norm, nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)).bfloat16()
    net = fb.convert(model, rule=fb.Joint(), noise_std=0.1)
    net(X.bfloat16())
    d = net.feedback.current.changes[0].double()
    exact = fb.convert(copy.deepcopy(model).double(), rule=fb.Joint(), noise_std=0.1)
    exact(X.bfloat16().double())
    want = exact.feedback.current.changes[0]
    assert (d - want).norm() < 0.05 * want.norm()


def test_a_point_right_behind_a_recurrent_layer_is_not_told_to_name_one() -> None:
    def how(net: Net, x: Tensor) -> Tensor:
        return net.o(net.lstm(x[:, None])[0][:, -1])

    model = made(how)
    model.lstm = nn.LSTM(8, 12, batch_first=True).double()
    with pytest.warns(UserWarning, match="no B for lstm") as told:
        fb.convert(model, points=["lstm"])(X)
    assert "can name a module" not in str(told[0].message)
