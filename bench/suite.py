"""What is compared: a network's ops, its hardest layer and its step, each by ours and by its rivals.

``fbkernels bench`` and bench_suite.py measure these tables.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor, nn

import fbkernels as fb
from fbkernels import ops
from fbkernels.bench import rivals
from fbkernels.bench.rivals import Step, compiled
from fbkernels.bench.timing import allocated, gpu_seconds, in_turns, launches, repeat, roofline, seconds
from fbkernels.lab import models, train

STD, LR = 0.05, 1e-4
CHANNELS_LAST = torch.channels_last
POOL = ((3, 3), (2, 2), (1, 1))  # kernel, stride, padding of the paper's networks
MODELS: dict[str, tuple[tuple[int, int, int], int]] = {
    "cnn": ((1, 28, 28), 10),
    "paper_cnn": ((3, 32, 32), 100),
    "resnet20": ((3, 32, 32), 100),
    "resnet18": ((3, 32, 32), 100),
    "wrn16_4": ((3, 32, 32), 100),
}
NARROW: dict[str, dict[str, float]] = {
    "paper_cnn": {"width": 1 / 32},
    "resnet20": {"width": 1 / 16},
    "resnet18": {"width": 1 / 64},
    "wrn16_4": {"width": 1 / 16},
}


class Work(NamedTuple):
    """The least that a provider has to do: multiply-adds in float32 and in float64, bytes read and written.

    Bytes: each tensor once a pass, with a cache that holds none from one pass to the next; where it does, more than all of the roofline
    is to be had.
    """

    macs: float
    bytes: float
    macs64: float = 0.0

    def seconds(self, rates: Mapping[str, float]) -> float:
        """On a machine that never does less than ``timing.roofline`` found."""
        products = self.macs / rates["gemm_float32_gmac_s"] + self.macs64 / rates["gemm_float64_gmac_s"]
        return max(products, self.bytes / rates["copy_gb_s"]) / 1e9


class Provider(NamedTuple):
    build: Callable[[], Step]
    work: Work
    calls: int = 1  # in one run


class Case(NamedTuple):
    """``baseline``: the provider that the others are compared with. ``small``: the same on next to nothing, where host overhead is all."""

    name: str
    baseline: str
    providers: dict[str, Provider]
    small: Callable[[], Case]


class Layer(NamedTuple):
    """A Linear or Conv2d, on the meta device, with the shapes of a sample before and behind it."""

    module: nn.Conv2d | nn.Linear
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def macs(self) -> int:
        """Of a sample."""
        return math.prod(self.outputs[1:]) * self.module.weight.numel()

    @property
    def units(self) -> int:
        return math.prod(self.outputs)


@dataclass(frozen=True)
class Problem:
    """A network for classes and its batch; ``sizes`` of an MLP (tanh), or None. ``compiler`` of torch.compile, None: no such rivals."""

    name: str
    network: Callable[[], nn.Sequential]
    shape: tuple[int, ...]
    classes: int
    batch: int
    device: str = "cpu"
    sizes: tuple[int, ...] | None = None
    compiler: str | None = "inductor"

    @functools.cached_property
    def layers(self) -> list[Layer]:
        found: list[Layer] = []

        def keep(m: Any, args: tuple[Tensor, ...], z: Tensor) -> None:
            found.append(Layer(m, tuple(args[0].shape[1:]), tuple(z.shape[1:])))

        with torch.device("meta"):
            net = self.network()
        hooks = [m.register_forward_hook(keep) for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        net(torch.empty(2, *self.shape, device="meta"))
        for hook in hooks:
            hook.remove()
        return found

    @functools.cached_property
    def hardest(self) -> Layer:
        """The hidden layer with the most multiply-adds, behind the first where there is one."""
        return max(self.layers[1:-1] or self.layers[:1], key=lambda layer: layer.macs)

    @property
    def residual(self) -> bool:
        return self.name.startswith(("resnet", "wrn"))

    def small(self) -> Problem:
        if self.sizes is not None:
            return replace(mlp((2,) * len(self.sizes), 2, self.device), compiler=None)
        network = functools.partial(models.MODELS[self.name], (self.shape[0], 8, 8), 2, **NARROW.get(self.name, {}))
        return replace(self, network=network, shape=(self.shape[0], 8, 8), classes=2, batch=2, compiler=None)

    def net(self) -> nn.Sequential:
        torch.manual_seed(0)
        net: nn.Sequential = self.network().to(self.device, memory_format=CHANNELS_LAST)
        return net

    def data(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        x = torch.rand(self.batch, *self.shape, device=self.device)
        y = torch.randint(self.classes, (self.batch,), device=self.device)
        return x.contiguous(memory_format=CHANNELS_LAST) if x.ndim == 4 else x, y


def mlp(sizes: Sequence[int], batch: int, device: str = "cpu") -> Problem:
    """A tanh network with a linear output."""
    sizes = tuple(sizes)
    network = functools.partial(rivals.mlp, sizes, ("tanh",) * (len(sizes) - 2) + ("identity",))
    return Problem("-".join(map(str, sizes)), network, sizes[:1], sizes[-1], batch, device, sizes)


def model(name: str, batch: int, device: str = "cpu") -> Problem:
    """One of ``fbkernels train --model``; the paper's CNN without dropout."""
    if name == "mlp":
        return mlp((784, 50, 20, 10), batch, device)
    shape, classes = MODELS[name]
    network = rivals.cnn if name == "paper_cnn" else functools.partial(models.MODELS[name], shape, classes)
    return Problem(name, network, shape, classes, batch, device)


def backends(device: str) -> tuple[str, ...]:
    """Ours that can be had there, the best first."""
    return ops.native(torch.device(device).type)


# Ops


def _tensors(problem: Problem) -> dict[str, Any]:
    """What the pieces of the hardest layer compute with."""
    device, n, k = problem.device, problem.batch, problem.classes
    layer = problem.hardest
    torch.manual_seed(0)
    maps = len(layer.outputs) == 3

    def random(*shape: int) -> Tensor:
        t = torch.randn(shape, device=device)
        return t.contiguous(memory_format=CHANNELS_LAST) if t.ndim == 4 else t

    own = copy.deepcopy(layer.module).to_empty(device=device).requires_grad_(False)
    for parameter in own.parameters():
        parameter.normal_(std=0.05)
    if maps:
        own = own.to(memory_format=CHANNELS_LAST)
    R = random(n, k)
    Q = torch.linalg.solve(torch.eye(k, device=device) + R.T @ R, R.T).T.contiguous()
    w = random(n)
    (x, dx), (z, dz) = ((random(n, *shape), random(n, *shape)) for shape in (layer.inputs, layer.outputs))
    return {
        "layer": own,
        "x": x,
        "dx": dx,
        "p": x + dx,
        "z": z,
        "dz": dz,
        "q": z + dz,
        "B": random(layer.units, k),
        "e": random(n, k),
        "R": R,
        "Q": Q,
        "w": w,
        "M": R.T @ Q,
        "G": w[:, None] * Q,
        "V": torch.eye(k, dtype=torch.float64, device=device),
        "y": torch.randint(k, (n,), device=device),
        "step": torch.tensor(0, device=device),
    }


def _providers(
    ours: Callable[[str], Step],
    eager: Callable[..., Any],
    args: Sequence[Tensor],
    problem: Problem,
    work: Work,
    lacking: Sequence[str] = (),
) -> dict[str, Provider]:
    """Ours by backend, but for those that have no kernel of it; the eager rival and the same compiled."""

    def rival(compiler: str | None) -> Step:
        run = torch.no_grad()(compiled(eager, compiler))
        return lambda: run(*args)

    table = {f"ours, {b}": Provider(lambda b=b: ours(b), work) for b in backends(problem.device) if b not in lacking}
    table["eager"] = Provider(lambda: rival(None), work)
    if problem.compiler:
        table["compiled"] = Provider(lambda: rival(problem.compiler), work)
    return table


def _noise(p: Problem, t: dict[str, Any]) -> dict[str, Provider]:
    n, units = p.batch, len(t["B"])
    step, like = t["step"], torch.empty(n, units, device=p.device)
    eager = lambda like: torch.randn_like(like) * STD  # noqa: E731
    work = Work(0, 4 * n * units)
    return _providers(lambda b: lambda: ops.noise(step, 0, 0, n, units, STD, "gaussian", backend=b), eager, (like,), p, work)


def _pointwise(p: Problem, t: dict[str, Any]) -> dict[str, Provider]:
    """relu and noise, of activity and difference, eager of two streams; behind a convolution also 3x3/2 max-pooling with its winners."""
    z, dz, q, maps = t["z"], t["dz"], t["q"], t["z"].ndim == 4
    window = ("max", False, *POOL) if maps else ("none", False, (1, 1), (1, 1), (0, 0))

    def ours(b: str) -> Step:
        return lambda: ops.perturbed_pointwise(z, dz, None, "relu", *window, t["step"], 0, 0, p.batch, STD, "gaussian", backend=b)

    def eager(z: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        if not maps:
            h = F.relu(z)
            return h, torch.add(F.relu(q), torch.randn_like(q), alpha=STD)
        h, where = F.max_pool2d(z, *POOL, return_indices=True)
        q = F.max_pool2d(q, *POOL)
        return F.relu(h), where, torch.add(F.relu(q), torch.randn_like(q), alpha=STD)

    out = F.max_pool2d(z[:1], *POOL).numel() * len(z) if maps else z.numel()
    return _providers(ours, eager, (z, q), p, Work(0, 4 * (2 * z.numel() + 2 * out) + out * maps))


def _layer(p: Problem, t: dict[str, Any]) -> dict[str, Provider]:
    """The product, relu and noise, of activity and difference, the others on two streams."""
    layer, x, dx = t["layer"], t["x"], t["dx"]
    key = (t["step"], 0, 0, p.batch, STD, "gaussian")
    macs, numel = 2 * p.batch * p.hardest.macs, p.batch * p.hardest.units
    work = Work(macs, 4 * (2 * x.numel() + 2 * numel + layer.weight.numel()))

    def ours(b: str) -> Step:
        if isinstance(layer, nn.Linear):
            return lambda: ops.perturbed_linear(x, dx, layer.weight, layer.bias, "relu", *key, backend=b)
        how = (layer.stride, layer.padding, layer.dilation, layer.groups, "relu", "none", False, (1, 1), (1, 1), (0, 0))
        return lambda: ops.perturbed_conv2d(x, dx, layer.weight, layer.bias, *how, *key, backend=b)

    table = {f"ours, {b}": Provider(lambda b=b: ours(b), work) for b in backends(p.device)}
    for compiler in dict.fromkeys((None, p.compiler)):
        for cat in (False, True):
            name = ("compiled" if compiler else "eager") + ", cat" * cat
            table[name] = Provider(functools.partial(rivals.Stacked, layer, x, t["p"], STD, cat, compiler), work)
    return table


def _feedback(p: Problem, t: dict[str, Any]) -> dict[str, Provider]:
    e, B, h = t["e"], t["B"], t["z"].relu()

    def eager(e: Tensor, B: Tensor, h: Tensor) -> Tensor:
        error = e @ B.t()
        if h.ndim == 4:
            error = error.view(len(h), *h.shape[2:], h.shape[1]).permute(0, 3, 1, 2)
        return torch.ops.aten.threshold_backward.default(error, h, 0)

    work = Work(e.numel() * len(B), 4 * (e.numel() + B.numel() + 2 * h.numel()))
    return _providers(lambda b: lambda: ops.feedback(e, B, h, "relu", backend=b), eager, (e, B, h), p, work)


def _update(p: Problem, t: dict[str, Any]) -> dict[str, Provider]:
    """The ridge's: M of rank N, or dense where there are fewer outputs than samples."""
    n, k = t["R"].shape
    B, M, G, R, Q, w = (t[name] for name in "BMGRQw")
    given = (B, None, None, R, Q, w) if n < k else (B, M, G, None, None, None)
    xi = torch.empty(n, len(B), device=p.device)

    def dense(B: Tensor, M: Tensor, G: Tensor, xi: Tensor) -> Tensor:
        return torch.addmm(B, B, M, alpha=-1).addmm_((torch.randn_like(xi) * STD).t(), G)

    def low_rank(B: Tensor, R: Tensor, Q: Tensor, w: Tensor, xi: Tensor) -> Tensor:
        return torch.addmm(B, (torch.randn_like(xi) * STD).mul_(w[:, None]).addmm_(R, B.t(), alpha=-1).t(), Q)

    ours = lambda b: lambda: ops.feedback_update(*given, t["step"], None, 0, 0, 0, STD, "gaussian", backend=b)  # noqa: E731
    rival, args = (low_rank, (B, R, Q, w, xi)) if n < k else (dense, (B, M, G, xi))
    return _providers(ours, rival, args, p, Work(len(B) * k * (n + min(n, k)), 2 * 4 * B.numel()))


def _gain(p: Problem, t: dict[str, Any]) -> dict[str, Provider]:
    """A batch of recursive least squares."""
    R, w, V = t["R"], t["w"], t["V"]

    def eager(R: Tensor, w: Tensor, V: Tensor) -> tuple[Tensor, ...]:
        R64 = R.double()
        V = torch.addmm(V, R64.t(), R64)
        Q = torch.cholesky_solve(R64.t(), torch.linalg.cholesky(V)).t()
        return V, Q.float(), (R64.t() @ Q).float(), (w[:, None] * Q).float()

    work = Work(0, 8 * 2 * V.numel() + 4 * (3 * R.numel() + V.numel()), _gain_macs(*R.shape))
    return _providers(lambda b: lambda: ops.ridge_gain(R, w, V, 0.1, 1.0, backend=b), eager, (R, w, V), p, work)


def _gain_macs(n: int, m: int) -> float:
    """R^T R, its Cholesky factors, two triangular solves, R^T Q: of symmetric matrices one half."""
    return n * m * m / 2 + m**3 / 6 + n * m * m + n * m * m


def _cross_entropy(p: Problem, t: dict[str, Any]) -> dict[str, Provider]:
    """Losses of both streams, their difference and the error."""
    logits, perturbed, y = t["e"], t["R"], t["y"]

    def eager(logits: Tensor, perturbed: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        logp, losses = logits.double().log_softmax(1), F.cross_entropy(perturbed.double(), y, reduction="none")
        clean = F.nll_loss(logp, y, reduction="none")
        e = logp.exp() - F.one_hot(y, logits.shape[1])
        return clean.float(), e.float(), (losses - clean).float(), perturbed - logits

    work = Work(0, 4 * (4 * logits.numel() + 2 * len(y)) + 8 * len(y))
    ours = lambda b: lambda: ops.perturbed_cross_entropy(logits, perturbed, y, False, backend=b)  # noqa: E731
    return _providers(ours, eager, (logits, perturbed, y), p, work, ("cpp", "cuda"))  # which take the reference


def _unpool(p: Problem, t: dict[str, Any]) -> dict[str, Provider]:
    """The error to before a 3x3/2 max-pooling."""
    z = t["z"]
    h, where = F.max_pool2d(z, *POOL, return_indices=True)
    winner = ops.perturbed_pointwise(z, None, None, "identity", "max", False, *POOL, t["step"], 0, 0, 0, STD, "gaussian")[3]
    eager = lambda h, z, where: torch.ops.aten.max_pool2d_with_indices_backward.default(h, z, *POOL, (1, 1), False, where)  # noqa: E731
    work = Work(0, 5 * h.numel() + 4 * z.numel())
    # Triton does it within feedback
    return _providers(lambda b: lambda: ops.unpool(h, winner, z.shape[2:], *POOL, backend=b), eager, (h, z, where), p, work, ("triton",))


def _pooled_gradient(p: Problem, t: dict[str, Any]) -> dict[str, Provider]:
    """The weight gradient behind a max-pooling; the rival is given the error before it."""
    layer, x, z = t["layer"], t["x"], t["z"]
    delta = F.max_pool2d(z, *POOL)
    winner = ops.perturbed_pointwise(z, None, None, "identity", "max", False, *POOL, t["step"], 0, 0, 0, STD, "gaussian")[3]
    dense = ops.unpool(delta, winner, z.shape[2:], *POOL)
    how = (layer.stride, layer.padding, layer.dilation)
    ours = lambda b: lambda: ops.pooled_weight_gradient(delta, winner, x, layer.weight, *how, *POOL, backend=b)  # noqa: E731
    eager = lambda dense, x: (rivals.weight_gradient(layer, dense, x), dense.sum((0, 2, 3)))  # noqa: E731
    work = Work(delta.numel() * layer.weight[0].numel(), 4 * (delta.numel() + x.numel() + layer.weight.numel()) + winner.numel())
    return _providers(ours, eager, (dense, x), p, work, ("triton", "cuda"))  # which take the library's


OPS: dict[str, Callable[[Problem, dict[str, Any]], dict[str, Provider]]] = {
    "noise": _noise,
    "perturbed_pointwise": _pointwise,
    "perturbed_layer": _layer,
    "feedback": _feedback,
    "feedback_update": _update,
    "ridge_gain": _gain,
    "perturbed_cross_entropy": _cross_entropy,
    "unpool": _unpool,
    "pooled_weight_gradient": _pooled_gradient,
}


def op_names(problem: Problem) -> list[str]:
    """Of the ops that such a network has."""
    layer = problem.hardest.module
    pools = isinstance(layer, nn.Conv2d) and layer.groups == 1
    return [name for name in OPS if pools or name not in ("unpool", "pooled_weight_gradient")]


def op(name: str, problem: Problem) -> Case:
    """One of fbkernels' ops on the hardest layer."""
    title = f"{name}, {_size(problem)}, batch {problem.batch}, {problem.classes} classes"
    return Case(title, "eager", OPS[name](problem, _tensors(problem)), lambda: op(name, problem.small()))


def _size(problem: Problem) -> str:
    layer = problem.hardest
    m = layer.module
    if isinstance(m, nn.Linear):
        return f"linear {m.in_features}-{m.out_features}"
    kernel, size = ("x".join(map(str, s)) for s in (m.kernel_size, layer.outputs[1:]))
    return f"conv {kernel} {m.in_channels}-{m.out_channels} to {size}"


# Layers


def layer(problem: Problem) -> Case:
    """The hardest layer's part of a training step: ours and its rivals do both streams, relu, noise, the error through B, the gradients of
    W and b, and B's update; backprop and feedback alignment the forward pass, relu and all gradients."""
    t = _tensors(problem)
    module, x, dx, e, B, M, G = (t[name] for name in ("layer", "x", "dx", "e", "B", "M", "G"))
    n, k, macs, W = problem.batch, problem.classes, problem.batch * problem.hardest.macs, module.weight.numel()
    activities = n * (problem.hardest.units + math.prod(problem.hardest.inputs))
    own = len(B) * k * (2 * n + min(n, k))
    learned = Work(3 * macs + own, 4 * (3 * activities + 3 * W + 3 * B.numel()))
    exact = Work(3 * macs, 4 * (3 * activities + 3 * W))

    def ours(b: str) -> Step:
        key = {"seed": 0, "step": t["step"], "point": 0, "std": STD}
        gain = (t["R"], t["Q"]) if n < k else M
        update = fb.functional.Update(B, gain, t["w"] if n < k else G, t["step"])

        def run() -> Any:
            if isinstance(module, nn.Linear):
                out = fb.functional.perturbed_linear(x, dx, module.weight, module.bias, activation="relu", update=update, backend=b, **key)
            else:
                how = (module.stride, module.padding, module.dilation, module.groups)
                out = fb.functional.perturbed_conv2d(
                    x, dx, module.weight, module.bias, *how, activation="relu", update=update, backend=b, **key
                )
            delta = fb.functional.feedback(e, B, out.h, "relu", backend=b)
            return out, rivals.weight_gradient(module, delta, x), delta.sum((0, 2, 3)[: delta.ndim - 1])

        return run

    def twin() -> nn.Module:
        return copy.deepcopy(module).requires_grad_()

    def bio(mode: str) -> Step:
        own = rivals.biotorch(nn.Sequential(twin()), mode, k, t["y"], F.cross_entropy).module[0]
        own.loss_gradient = e
        return rivals.backprop_layer(own.to(memory_format=CHANNELS_LAST), x, t["z"])

    table = {f"ours, {b}": Provider(lambda b=b: torch.no_grad()(ours(b)), learned) for b in backends(problem.device)}
    for compiler in dict.fromkeys((None, problem.compiler)):
        kind = "compiled" if compiler else "eager"
        for cat in (False, True):
            build = functools.partial(rivals.learned_layer, module, x, t["p"], e, B, M, G, STD, cat, compiler)
            table[kind + ", cat" * cat] = Provider(build, learned)
    table["backprop"] = Provider(lambda: rivals.backprop_layer(twin(), x, t["z"]), exact)
    if problem.compiler:
        table["backprop, compiled"] = Provider(lambda: rivals.backprop_layer(twin(), x, t["z"], problem.compiler), exact)
    if importlib.util.find_spec("biotorch"):
        table |= {f"BioTorch {mode.upper()}": Provider(functools.partial(bio, mode), exact) for mode in ("fa", "dfa")}
    return Case(f"layer {_size(problem)}, batch {n}, {k} classes", "backprop", table, lambda: layer(problem.small()))


# Steps


RULES: dict[str, Callable[[], fb.Rule]] = {"ridge": fb.Ridge, "joint": functools.partial(fb.Joint, signal="output")}
FUSED_CALLS = 20


def _convert(problem: Problem, rule: str, backend: str) -> nn.Module:
    """Direct feedback as ``fbkernels train`` has it, its warm-up over."""
    share = 4 if problem.residual else 1
    return fb.convert(problem.net(), rule=RULES[rule](), noise_std=STD, share=share, backend=backend, warmup=0)


def step(problem: Problem) -> Case:
    """A whole training step, SGD. Ours: direct feedback by ``convert``, of an MLP also layerwise ridge by ``FusedMLP``."""
    n, k, criterion, data = problem.batch, problem.classes, nn.CrossEntropyLoss(), problem.data()
    noisy = fb.summary(_convert(replace(problem, device="cpu"), "joint", "reference"), data[0])
    units, shapes = sum(p.units for p in noisy), [p.B for p in noisy if p.B]
    backprop, joint = _work(problem, units, []), _work(problem, units, shapes)
    works = {"joint": joint, "ridge": joint._replace(macs64=_gain_macs(n, k))}

    def plain(compiler: str | None = None) -> Step:
        return rivals.backprop(problem.net(), criterion, lambda: data, LR, compiler, fused=True)

    def ours(rule: str, backend: str, compiler: str | None = None) -> Step:
        net = _convert(problem, rule, backend)
        return rivals.backprop(net, fb.PerturbedLoss(criterion, net), lambda: data, LR, compiler, fused=True)

    def bio(mode: str) -> Step:
        net = rivals.biotorch(problem.net(), mode, k, data[1], criterion).to(problem.device, memory_format=CHANNELS_LAST)
        return rivals.backprop(net, criterion, lambda: data, LR)

    def eager(rule: str) -> Step:
        return rivals.LearnedFeedbackCNN(problem.net(), *data, rule, STD, LR)

    table: dict[str, Provider] = {}
    for b in backends(problem.device):
        table |= {f"ours {rule}, {b}": Provider(functools.partial(ours, rule, b), works[rule]) for rule in RULES}
    if problem.compiler and not problem.residual:  # where both streams of each layer take minutes to compile
        table["ours joint, compiled"] = Provider(lambda: ours("joint", "auto", problem.compiler), joint)
    if problem.network is rivals.cnn:
        table |= {f"eager {rule}": Provider(functools.partial(eager, rule), works[rule]) for rule in RULES}
    if problem.sizes is not None:
        table |= _layerwise(problem, data)
    table["backprop"] = Provider(plain, backprop)
    if problem.compiler:
        table["backprop, compiled"] = Provider(lambda: plain(problem.compiler), backprop)
    if importlib.util.find_spec("biotorch"):
        table |= {f"BioTorch {mode.upper()}": Provider(functools.partial(bio, mode), backprop) for mode in ("fa", "dfa")}
    return Case(f"step of {problem.name}, batch {n}", "backprop", table, lambda: step(problem.small()))


def _work(problem: Problem, units: int, shapes: Sequence[Sequence[int]]) -> Work:
    """A step of backprop: forward, error, W's gradient. Or with feedback matrices B of these shapes, which cost no error through W but a
    perturbed stream, both but for the first layer."""
    n = problem.batch
    macs = n * (3 * sum(layer.macs for layer in problem.layers) - problem.layers[0].macs)
    weights = sum(layer.module.weight.numel() for layer in problem.layers)
    own = sum(math.prod(B) * (2 * n + min(n, B[-1])) for B in shapes)
    # W is read forward and back, or for both streams at once; its gradient is written and read, W read and written
    passes = 5 if shapes else 6
    return Work(macs + own, 4 * (passes * weights + 4 * n * units + 3 * sum(map(math.prod, shapes))))


def _layerwise(problem: Problem, data: tuple[Tensor, Tensor]) -> dict[str, Provider]:
    """An MLP's, by ``FusedMLP`` and by hand."""
    sizes, n, (x, y) = problem.sizes or (), problem.batch, data
    activations = ("tanh",) * (len(sizes) - 2) + ("identity",)
    units, shapes = sum(sizes[1:-1]), list(itertools.pairwise(sizes[1:]))
    work = _work(problem, units, shapes)._replace(macs64=sum(_gain_macs(n, m) for _, m in shapes))

    def fused() -> Step:
        net = fb.FusedMLP(sizes, loss="cross_entropy", rule=fb.Ridge(), noise_std=STD, lr=LR / n, device=problem.device)
        return lambda: net.fit(x, y, steps=FUSED_CALLS, batch_size=n)

    def by_hand(make: Callable[..., Any], *rest: Any) -> Step:
        with torch.device(problem.device):
            run = make(problem.net(), activations, "cross_entropy", n, LR / n, *rest)
        target = F.one_hot(y, sizes[-1]).float()
        return lambda: run(x, target)

    return {
        "ours, FusedMLP ridge": Provider(fused, work, FUSED_CALLS),
        "eager layerwise ridge": Provider(lambda: by_hand(rivals.RidgeMLP, STD, "cholesky"), work),
        "backprop by hand": Provider(lambda: by_hand(rivals.HandMLP), _work(problem, units, [])),
    }


# Sweeps

SWEEPS: dict[str, tuple[int, ...]] = {
    "batch": (32, 64, 128, 256, 512, 1024),
    "width": (64, 128, 256, 512, 1024, 2048, 4096),
    "classes": (10, 30, 100, 300, 1000),
    "depth": (2, 5, 10, 20, 50),
}


def sweep(axis: str, value: int, device: str = "cpu") -> Case:
    """How a step's cost grows with one of batch, width, classes and depth (hidden layers), from 784-256-256-256-10 and batch 64."""
    at = {"batch": 64, "width": 256, "classes": 10, "depth": 3} | {axis: value}
    case = step(replace(mlp((784, *(at["width"],) * at["depth"], at["classes"]), at["batch"], device), compiler=None))
    best = backends(device)[0]
    chosen = {"ours ridge": f"ours ridge, {best}", "ours joint": f"ours joint, {best}", "backprop": "backprop"}

    def few(case: Case) -> Case:
        return case._replace(providers={name: case.providers[key] for name, key in chosen.items()}, small=lambda: few(case.small()))

    return few(case)._replace(name=f"step, {axis} {value:,}")


# Measuring


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the times depend on, the rates that bound them, and what else the machine was doing.

    Raises:
        ValueError: the device cannot be used.
    """
    train.Settings(device=device)  # raises
    rates = roofline(torch.get_num_threads(), "cuda" if device.startswith("cuda") else "cpu")
    return {**train.hardware(device), **train.versions(), "build": fb.build_info(), "load": os.getloadavg(), "rates": rates}


def measure(case: Case, device: str = "cpu", budget: float = 1.0) -> list[dict[str, Any]]:
    """A row a provider: "provider", and "us" (median of calls in turns), "ratio" to the baseline's, "mflop" and "kb" (its ``Work``),
    "gflop_s", "gb_s", "roofline" (%, of the machine's rates in this run), "peak_kib" (``timing.allocated``), on a GPU "launches", and
    "host_us": a call's time on the host: on a GPU until it is queued, on the CPU of the same provider on next to nothing (if not compiled).

    A provider that cannot run has "failed" instead. ``budget``: seconds for the turns, but three are taken.
    """
    gpu = device.startswith("cuda")
    runs, peak, rows = {}, {}, {}
    for name, provider in case.providers.items():
        try:
            runs[name], peak[name] = allocated(provider.build, device)
        except Exception as error:
            rows[name] = {"provider": name, "failed": f"{type(error).__name__}: {error}"[:500]}
    once = {name: seconds(run) for name, run in runs.items()}
    # a clock's tick and its call are nothing beside a millisecond
    calls = {name: 1 if gpu else math.ceil(1e-3 / t) for name, t in once.items()}
    turn = sum(once[name] * calls[name] for name in runs)
    rounds = min(max(int(budget / turn), 3), 50)
    times = in_turns({name: repeat(run, calls[name]) for name, run in runs.items()}, rounds, gpu_seconds if gpu else seconds)
    each = {name: t / calls[name] / case.providers[name].calls for name, t in times.items()}
    overhead = _overhead_gpu(runs) if gpu else _overhead(case)
    rates = roofline(torch.get_num_threads(), "cuda" if gpu else "cpu")
    for name, t in each.items():
        work = case.providers[name].work
        flops = 2 * (work.macs + work.macs64)
        rows[name] = {
            "provider": name,
            "us": t * 1e6,
            "ratio": t / each[case.baseline] if case.baseline in each else None,
            "mflop": flops / 1e6,
            "kb": work.bytes / 1e3,
            "gflop_s": flops / t / 1e9,
            "gb_s": work.bytes / t / 1e9,
            "roofline": 100 * work.seconds(rates) / t,
            "peak_kib": peak[name] / 2**10,
            "launches": len(launches(runs[name])) if gpu else None,
            "host_us": overhead.get(name),
        }
    return [rows[name] for name in case.providers]


def _overhead_gpu(runs: Mapping[str, Step]) -> dict[str, float]:
    """Microseconds until a call has been queued."""

    def queued(run: Step) -> float:
        torch.cuda.synchronize()
        return seconds(run)

    return {name: t * 1e6 for name, t in in_turns(runs, 9, queued).items()}


def _overhead(case: Case) -> dict[str, float]:
    runs, providers = {}, case.small().providers
    for name in case.providers.keys() & providers.keys():
        with contextlib.suppress(Exception):  # a rival that is made for one size
            run = providers[name].build()
            run()
            runs[name] = run
    return {name: t * 1e6 / 10 / providers[name].calls for name, t in in_turns({n: repeat(r, 10) for n, r in runs.items()}, 9).items()}


UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6}


def table(case: Case, rows: Sequence[Mapping[str, Any]]) -> Table:
    """For a terminal."""
    out = Table(title=case.name, title_justify="left", caption_justify="left", box=SIMPLE, pad_edge=False, collapse_padding=True)
    heads = {"ratio": f"x {case.baseline}", "mflop": "MFLOP", "kb": "kB", "roofline": "% roof", "peak_kib": "KiB", "launches": "launches"}
    heads = {key: head for key, head in heads.items() if key != "launches" or any(row.get(key) for row in rows)} | {"host_us": "host us"}
    out.add_column("provider", no_wrap=True)
    for head in ("time", *heads.values()):
        out.add_column(head, justify="right")
    for row in rows:
        if "failed" not in row:
            unit, scale = next(((u, s) for u, s in reversed(UNITS.items()) if row["us"] >= s), ("us", 1.0))
            numbers = ("-" if row[key] is None else figure(row[key]) for key in heads)
            out.add_row(row["provider"], f"{figure(row['us'] / scale)} {unit}", *numbers)
    out.caption = "\n".join(f"{row['provider']} failed: {row['failed']}" for row in rows if "failed" in row) or None
    return out


def figure(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
