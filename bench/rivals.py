"""The rivals: what a careful user of torch would write by hand. Plain torch, nothing of fbkernels; tests/bench/test_rivals.py tests it.

A step is a function without arguments that trains on the next batch and returns the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[], Any]
aten = torch.ops.aten


def compiled(run: Callable[..., Any], compiler: str | None) -> Callable[..., Any]:
    """By torch.compile's backend of that name; None: as it is."""
    if compiler is None:
        return run
    # with code of its own, or all contenders of a benchmark would be variants of one function to dynamo, which allows eight
    own = FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    return torch.compile(own, fullgraph=True, backend=compiler)


def backprop(
    net: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    batches: Callable[[], tuple[Tensor, Tensor]],
    lr: float,
    compiler: str | None = None,
    **options: bool,
) -> Step:
    """As everybody writes it, forward pass and loss, and so their backward pass, ``compiled``; ``options`` of ``torch.optim.SGD``."""
    optimizer = torch.optim.SGD(net.parameters(), lr, **options)

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return criterion(net(x), y)

    run = compiled(forward, compiler)

    def step() -> Tensor:
        x, y = batches()
        loss = run(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def bare_backprop(
    net: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor], batches: Callable[[], tuple[Tensor, Tensor]], lr: float
) -> Step:
    """Without an optimiser object, whose bookkeeping is a fifth of a small network's step."""
    parameters = list(net.parameters())

    def step() -> Tensor:
        x, y = batches()
        loss = criterion(net(x), y)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-lr)
        return loss.detach()

    return step


# The paper's CIFAR-100 network


def cnn(pool_first: bool = False) -> nn.Sequential:
    """conv5x5 96-128-256, each relu and 3x3/2 max-pooling, fc 2048-2048-100. The order of relu and pooling does not change a number."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (96, 128, 256):
        pair = (nn.ReLU(inplace=pool_first), nn.MaxPool2d(3, 2, 1))
        layers += [nn.Conv2d(channels, width, 5, padding=2), *(reversed(pair) if pool_first else pair)]
        channels = width
    fc = (nn.Linear(4096, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 100))
    return nn.Sequential(*layers, nn.Flatten(), *fc)


class LearnedFeedbackCNN:
    """A step of direct learned feedback on ``cnn()``, channels-last, cross-entropy, mean loss: ``rule`` "ridge" or "joint" (output).

    No autograd: weight gradients alone, B of all points one matrix [units, K], its products one GEMM each, noise drawn in one call into
    one buffer; relu after pooling, in place; both streams of the fully connected layers in one GEMM. On the device of ``x``; ``dtype`` is
    that of the activities and of W's products, as under autocast.
    """

    def __init__(
        self,
        net: nn.Sequential,
        x: Tensor,
        y: Tensor,
        rule: str = "ridge",
        std: float = 0.05,
        lr: float = 1e-4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        layers = [m for m in net if isinstance(m, (nn.Conv2d, nn.Linear))]
        self.parameters = [p for m in layers for p in (m.weight, m.bias)]
        self.optimizer = torch.optim.SGD(self.parameters, lr, fused=True)
        self.x, self.y, self.rule, self.std = x.to(dtype).contiguous(memory_format=torch.channels_last), y, rule, std
        self.n, self.k, self.dtype = len(x), len(self.parameters[-1]), dtype
        self.shapes = [(16, 16, 96), (8, 8, 128), (4, 4, 256), (2048,), (2048,)]
        self.sizes = [torch.Size(s).numel() for s in self.shapes]
        with x.device:
            self.xi = torch.empty(self.n, sum(self.sizes))
            self.B = torch.zeros(sum(self.sizes), self.k)
            self.spare = torch.empty_like(self.B)
            self.V = 0.1 * torch.eye(self.k, dtype=torch.float64)
            self.eye, self.rows = torch.eye(self.k), torch.arange(self.n)
            self.fc = [torch.empty(2 * self.n, size, dtype=dtype) for size in (4096, 2048, 2048)]

    def draw(self) -> Tensor:
        """Noise of standard deviation 1, [N, units], units numbered channels-last."""
        return self.xi.normal_()

    def split(self, units: Tensor) -> list[Tensor]:
        """[N, units] by point, in the layout of its activity."""
        parts = [u.view(self.n, *s) for u, s in zip(units.split(self.sizes, 1), self.shapes, strict=True)]
        return [p.permute(0, 3, 1, 2) if p.ndim == 4 else p for p in parts]

    def conv(self, i: int, h: Tensor) -> Tensor:
        return F.conv2d(h, self.W[i], self.b[i], padding=2)

    def conv_gradients(self, i: int, g: Tensor, h: Tensor, where: Tensor, z: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        g = aten.threshold_backward.default(g, h, 0)
        g = aten.max_pool2d_with_indices_backward.default(g, z, [3, 3], [2, 2], [1, 1], [1, 1], False, where)
        out = aten.convolution_backward.default(
            g, below, self.W[i], [len(self.b[i])], [1, 1], [2, 2], [1, 1], False, [0, 0], 1, [False, True, True]
        )
        return out[1], out[2]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        n, std, y = self.n, self.std, self.y
        self.W, self.b = (
            [p.detach().to(self.dtype) for p in self.parameters[::2]],
            [p.detach().to(self.dtype) for p in self.parameters[1::2]],
        )
        xi = self.split(self.draw().to(self.dtype))
        below, p, saved = self.x, None, []
        for i in range(3):
            z = self.conv(i, below)
            h, where = F.max_pool2d(z, 3, 2, 1, return_indices=True)
            h.relu_()
            p = h if p is None else F.max_pool2d(self.conv(i, p), 3, 2, 1).relu_()
            p = torch.add(p, xi[i], alpha=std) if p is h else p.add_(xi[i], alpha=std)
            saved.append((i, h, where, z, below))
            below = h
        f, h4, h5 = self.fc
        f[:n].copy_(below.flatten(1)), f[n:].copy_(p.flatten(1))
        for i, (source, target) in enumerate(((f, h4), (h4, h5)), 3):
            torch.addmm(self.b[i], source, self.W[i].t(), out=target).relu_()
            target[n:].add_(xi[i], alpha=std)
        logits = torch.addmm(self.b[5], h5, self.W[5].t())
        logp = logits.double().log_softmax(1)
        losses = F.nll_loss(logp, y.repeat(2), reduction="none")
        e64 = logp[:n].exp()
        e64[self.rows, y] -= 1
        ce = (e64 / n).float()

        g = self.split((ce @ self.B.t()).to(self.dtype))
        ce = ce.to(self.dtype)
        gradients = [t for s, gl in zip(saved, g[:3], strict=True) for t in self.conv_gradients(s[0], gl, *s[1:])]
        d4, d5 = aten.threshold_backward.default(g[3], h4[:n], 0), aten.threshold_backward.default(g[4], h5[:n], 0)
        for d, h in ((d4, f), (d5, h4), (ce, h5)):
            gradients += [d.t() @ h[:n], d.sum(0)]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.float()
        self.optimizer.step()

        if self.rule == "joint":
            s = (logits[n:].float() - logits[:n]).addmm_(self.xi, self.B, alpha=-std)
            self.B.addmm_(self.xi.t(), s, alpha=0.2 / (std * len(self.B)))
        else:
            self.V.addmm_(e64.t(), e64)
            Q = torch.cholesky_solve(e64.t(), torch.linalg.cholesky(self.V)).t()
            G = (((losses[n:] - losses[:n]) / std)[:, None] * Q).float()
            torch.mm(self.B, self.eye - (e64.t() @ Q).float(), out=self.spare)  # a GEMM cannot write what it reads
            self.B, self.spare = self.spare.addmm_(self.xi.t(), G), self.B
        return losses[:n].mean()


# ResNet-18


class Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


def resnet18(outputs: int = 100) -> nn.Sequential:
    """He et al. 2016 with the stem that is usual for CIFAR: 3x3, no max-pooling."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    channels = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(channels, width, stride), Block(width, width, 1)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, outputs))


# Multilayer perceptrons


def _relu_backward(g: Tensor, h: Tensor, *, grad_input: Tensor) -> Tensor:
    return aten.threshold_backward.grad_input(g, h, 0, grad_input=grad_input)


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]] | None] = {
    "sigmoid": (Tensor.sigmoid_, aten.sigmoid_backward.grad_input),
    "tanh": (Tensor.tanh_, aten.tanh_backward.grad_input),
    "relu": (Tensor.relu_, _relu_backward),
    "identity": None,
}


def mlp(sizes: Sequence[int], activations: Sequence[str]) -> nn.Sequential:
    modules = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
    layers: list[nn.Module] = []
    for i, name in enumerate(activations):
        layers.append(nn.Linear(sizes[i], sizes[i + 1]))
        if name != "identity":
            layers.append(modules[name]())
    return nn.Sequential(*layers)


class HandMLP:
    """A backprop step of an MLP without autograd: sum loss, plain SGD folded into the weight gradients' GEMMs, every result in a buffer.

    Targets are rows of numbers for ``loss="mse"`` (1/2 squared error), one-hot rows for "cross_entropy".
    """

    streams = 1

    def __init__(self, net: nn.Sequential, activations: Sequence[str], loss: str, batch: int, lr: float) -> None:
        layers = [m for m in net if isinstance(m, nn.Linear)]
        self.n, self.lr, self.loss = batch, lr, loss
        self.W = [m.weight.detach().clone() for m in layers]
        self.b = [m.bias.detach().clone() for m in layers]
        self.WT = [W.t() for W in self.W]
        self.activations = [ACTIVATIONS[name] for name in activations]
        self.H = [torch.empty(self.streams * batch, len(b)) for b in self.b]  # the clean rows first
        self.clean = [H[:batch] for H in self.H]
        self.delta = [torch.empty(batch, len(b)) for b in self.b]
        self.deltaT = [d.t() for d in self.delta]
        self.ones = torch.ones(batch)

    def forward(self, x: Tensor) -> None:
        below = x
        for b, WT, H, activation in zip(self.b, self.WT, self.H, self.activations, strict=True):
            torch.addmm(b, below, WT, out=H)
            if activation is not None:
                activation[0](H)
            below = H

    def error(self, target: Tensor) -> None:
        """The output's pre-activation error, into ``delta[-1]``."""
        y, e, activation = self.clean[-1], self.delta[-1], self.activations[-1]
        if self.loss == "mse":
            torch.sub(y, target, out=e)
        else:
            torch.softmax(y, 1, out=e)
            e.sub_(target)
        if activation is not None:
            activation[1](e, y, grad_input=e)

    def feedback(self, i: int) -> Tensor:
        """What layer i hands its error down through, [n_i, n_{i-1}]."""
        return self.W[i]

    def learn(self, i: int) -> None:
        """Called when the errors of layer i and below are known."""

    def __call__(self, x: Tensor, target: Tensor) -> None:
        with torch.inference_mode():
            self.forward(x)
            self.error(target)
            for i in range(len(self.W) - 1, -1, -1):
                if i:
                    below, d = self.clean[i - 1], self.delta[i - 1]
                    torch.mm(self.delta[i], self.feedback(i), out=d)
                    activation = self.activations[i - 1]
                    if activation is not None:
                        activation[1](d, below, grad_input=d)
                    self.learn(i)
                else:
                    below = x
                self.W[i].addmm_(self.deltaT[i], below, alpha=-self.lr)
                self.b[i].addmv_(self.deltaT[i], self.ones, alpha=-self.lr)


class RidgeMLP(HandMLP):
    """A step of layerwise learned feedback, each B by recursive ridge regression (gamma 0.1) in float64.

    ``solver``: "solve" or "cholesky" factors V anew, "blocked" downdates its inverse by the batch (cheaper where m is above the batch).
    """

    streams = 2

    def __init__(
        self, net: nn.Sequential, activations: Sequence[str], loss: str, batch: int, lr: float, std: float, solver: str | Sequence[str]
    ) -> None:
        super().__init__(net, activations, loss, batch, lr)
        self.std = std
        self.perturbed = [H[batch:] for H in self.H]
        widths = [len(b) for b in self.b]
        self.solvers = [solver] * (len(widths) - 1) if isinstance(solver, str) else list(solver)
        self.B = [torch.zeros(n, m) for n, m in pairwise(widths)]
        self.BT = [B.t() for B in self.B]
        self.V = [
            torch.eye(m, dtype=torch.float64) * (10.0 if s == "blocked" else 0.1) for m, s in zip(widths[1:], self.solvers, strict=True)
        ]
        self.eye = torch.eye(batch, dtype=torch.float64)
        self.noise = torch.empty(batch * sum(widths[:-1]))
        parts = self.noise.split([batch * n for n in widths[:-1]])
        self.xi = [p.view(batch, -1) for p in parts]
        self.lam = [torch.empty_like(xi) for xi in self.xi]
        self.lamT = [lam.t() for lam in self.lam]
        self.w = torch.empty(batch, 1, 1)
        self.change = torch.empty(batch, widths[-1])
        self.mean_error = torch.empty(batch, widths[-1])

    def draw(self) -> None:
        self.noise.normal_()

    def forward(self, x: Tensor) -> None:
        self.draw()
        below = x
        for i, (b, WT, H, activation) in enumerate(zip(self.b, self.WT, self.H, self.activations, strict=True)):
            target = H if i else self.clean[0]
            torch.addmm(b, below, WT, out=target)
            if activation is not None:
                activation[0](target)
            if i == 0:
                torch.add(target, self.xi[0], alpha=self.std, out=self.perturbed[0])
            elif i < len(self.xi):
                self.perturbed[i].add_(self.xi[i], alpha=self.std)
            below = H

    def error(self, target: Tensor) -> None:
        y, p, e = self.clean[-1], self.perturbed[-1], self.delta[-1]
        if self.loss == "mse":
            torch.sub(y, target, out=e)
            torch.sub(p, y, out=self.change)
            torch.add(e, self.change, alpha=0.5, out=self.mean_error)
            torch.bmm(self.mean_error[:, None], self.change[:, :, None], out=self.w)  # (y~ - y)(y~ + y - 2t) / 2
        else:
            logp = torch.log_softmax(self.H[-1], 1)
            torch.sub(logp[: self.n], logp[self.n :], out=self.change)
            torch.bmm(target[:, None], self.change[:, :, None], out=self.w)
            torch.exp(logp[: self.n], out=e)
            e.sub_(target)
        self.w.div_(self.std)
        activation = self.activations[-1]
        if activation is not None:
            activation[1](e, y, grad_input=e)

    def feedback(self, i: int) -> Tensor:
        return self.BT[i - 1]

    def gain(self, i: int, R: Tensor) -> Tensor:
        """Q = R (V + R^T R)^-1, and V, or its inverse, for the next step."""
        V, solver = self.V[i - 1], self.solvers[i - 1]
        RT = R.t()
        if solver == "blocked":
            RP = R @ V
            L = torch.linalg.cholesky(torch.addmm(self.eye, RP, RT))
            T = torch.linalg.solve_triangular(L, RP, upper=False)
            V.addmm_(T.t(), T, alpha=-1)
            return torch.linalg.solve_triangular(L.t(), T, upper=True)
        V.addmm_(RT, R)
        if solver == "solve":
            return torch.linalg.solve(V, RT).t()
        return torch.cholesky_solve(RT, torch.linalg.cholesky_ex(V).L).t()

    def learn(self, i: int) -> None:
        Q = self.gain(i, self.delta[i].double()).float()
        torch.mul(self.xi[i - 1], self.w[:, 0], out=self.lam[i - 1])
        self.B[i - 1].addmm_(torch.addmm(self.lamT[i - 1], self.B[i - 1], self.deltaT[i], alpha=-1), Q)


# One feedback point


class Pointwise:
    """relu, 3x3/2 max-pooling and noise on both streams of a channels-last convolution's output, then the update of B by a gain of
    factors R and Q, ``B <- B (I - R^T Q) + Xi^T (w * Q)``; ``low_rank``: as ``B + (w * Xi - R B^T)^T Q``, a fifth fewer products here."""

    def __init__(self, z: Tensor, q: Tensor, B: Tensor, R: Tensor, Q: Tensor, w: Tensor, std: float, low_rank: bool) -> None:
        self.z, self.q, self.B, self.std = z, q, B.clone(), std
        self.R, self.Q, self.w, self.low_rank = R, Q, std * w[:, None], low_rank
        self.keep, self.G = torch.eye(len(Q[0])) - R.T @ Q, std * w[:, None] * Q
        self.spare, self.xi = torch.empty_like(B), torch.empty(len(z), len(B))
        self.shape = (len(z), z.shape[2] // 2, z.shape[3] // 2, z.shape[1])

    @torch.inference_mode()
    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        h, where = F.max_pool2d(self.z, 3, 2, 1, return_indices=True)
        h.relu_()
        xi = self.xi.normal_()
        p = F.max_pool2d(self.q, 3, 2, 1).relu_().add_(xi.view(self.shape).permute(0, 3, 1, 2), alpha=self.std)
        if self.low_rank:
            self.B.addmm_(xi.mul_(self.w).addmm_(self.R, self.B.t(), alpha=-1).t(), self.Q)
        else:
            torch.mm(self.B, self.keep, out=self.spare)
            self.B, self.spare = self.spare.addmm_(xi.t(), self.G), self.B
        return h, where, p


def _product(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight)
    return F.conv2d(x, layer.weight, None, layer.stride, layer.padding)


def _streams(layer: nn.Conv2d | nn.Linear, x: Tensor, p: Tensor, cat: bool) -> Sequence[Tensor]:
    """One product of a library for both streams, or one for each."""
    return _product(layer, torch.cat((x, p))).chunk(2) if cat else (_product(layer, x), _product(layer, p))


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor | float:
    return 0.0 if layer.bias is None else layer.bias.view(-1, *(1,) * (layer.weight.ndim - 2))


class Stacked:
    """A layer, relu and noise on both streams: one product of a library for both, ``cat([x, p])``, or one for each; the rest compiled."""

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, x: Tensor, p: Tensor, std: float, cat: bool, compiler: str | None = "inductor"
    ) -> None:
        self.layer, self.x, self.p, self.cat = layer, x, p, cat
        bias = _bias(layer)

        def epilogue(z: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
            return F.relu(z + bias), torch.add(F.relu(q + bias), torch.randn_like(q), alpha=std)

        self.epilogue = compiled(epilogue, compiler)

    def product(self, x: Tensor) -> Tensor:
        return _product(self.layer, x)

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, Tensor]:
        h: tuple[Tensor, Tensor] = self.epilogue(*_streams(self.layer, self.x, self.p, self.cat))
        return h


def units(t: Tensor) -> Tensor:
    """[samples, units], a map's numbered channels-last."""
    return t.permute(0, 2, 3, 1).flatten(1) if t.ndim == 4 else t


def weight_gradient(layer: nn.Conv2d | nn.Linear, delta: Tensor, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return delta.t() @ x
    how = (layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups, (False, True, False))
    out: Tensor = aten.convolution_backward.default(delta, x, layer.weight, None, *how)[1]
    return out


def learned_layer(
    layer: nn.Conv2d | nn.Linear,
    x: Tensor,
    p: Tensor,
    e: Tensor,
    B: Tensor,
    M: Tensor,
    G: Tensor,
    std: float,
    cat: bool,
    compiler: str | None = None,
) -> Callable[[], tuple[Tensor, ...]]:
    """A layer's part of a step of direct learned feedback: relu and noise on both streams, the error through B, the gradient of W and b
    (the bias), and ``B (I - M) + Xi^T G``. All of it compiled, the products by the libraries."""
    bias = _bias(layer)

    def part(x: Tensor, p: Tensor, e: Tensor, B: Tensor, M: Tensor, G: Tensor) -> tuple[Tensor, ...]:
        z, q = _streams(layer, x, p, cat)
        h, xi = F.relu(z + bias), torch.randn_like(q).mul_(std)
        error = e @ B.t()
        if h.ndim == 4:
            error = error.view(len(h), *h.shape[2:], h.shape[1]).permute(0, 3, 1, 2)
        delta = aten.threshold_backward.default(error, h, 0)
        gradients = weight_gradient(layer, delta, x), delta.sum((0, 2, 3)[: h.ndim - 1])
        return h, F.relu(q + bias) + xi, *gradients, torch.addmm(B, B, M, alpha=-1).addmm_(units(xi).t(), G)

    run = compiled(part, compiler)

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = run(x, p, e, B, M, G)
        return out

    return call


def backprop_layer(layer: nn.Module, x: Tensor, g: Tensor, compiler: str | None = None) -> Callable[[], tuple[Tensor, ...]]:
    """A layer's part of a step of backprop: relu, the gradients of its input and its parameters."""
    x = x.detach().requires_grad_()
    wanted = (x, *(p for p in layer.parameters() if p.requires_grad))

    def forward(x: Tensor) -> Tensor:
        return F.relu(layer(x))

    run = compiled(forward, compiler)
    return lambda: torch.autograd.grad(run(x), wanted, g)


# BioTorch (Sanfiz & Akrout 2021), where it is installed: `pip install --no-deps biotorch`, as its layers need torch alone


def biotorch(net: nn.Module, mode: str, outputs: int, y: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """Their layers in place of the network's: "fa", feedback alignment, or "dfa", direct, whose forward pass takes targets and loss."""
    from biotorch.module.biomodule import BioModule

    with redirect_stdout(StringIO()):
        bio: nn.Module = BioModule(net, mode, output_dim=outputs)
    if mode == "dfa":
        bio.register_forward_pre_hook(lambda _, args: (args[0], y, criterion))
    return bio
