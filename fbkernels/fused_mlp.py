"""Whole training steps of a multilayer perceptron in compiled code."""

from __future__ import annotations

import copy
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbkernels import _C, metrics, ops
from fbkernels._check import integer, one_of, positive
from fbkernels.convert import convert, points
from fbkernels.rules import LMS, Fixed, Joint, Ridge, Rule, WeightTransport

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
}
_STATES = {"sgd": 0, "momentum": 1, "adam": 2}
_RULES = (Ridge, LMS, Joint, Fixed, WeightTransport)
_LAST = 2**32 - 1  # a step and a point that training does not reach
_CHUNK = 0.05  # seconds that the compiled loop runs before Python looks for Ctrl-C


class FusedMLP:
    """A multilayer perceptron whose training steps, many at a time, run in compiled code: both streams, loss, feedback, B, W.

    The method is that of ``convert`` and ``PerturbedLoss`` on ``to_module()`` with a torch optimiser, step by step and to float32 rounding
    (SPEC 1 to 6; Lansdell, Prakash & Kording 2020): same noise, same start of B, same order of a step. Losses are sums over the batch of
    the clean per-sample losses, and W follows the gradient of that sum: ``"mse"`` is ``1/2 sum_j (y_j - t_j)^2``, ``"cross_entropy"``
    is ``log sum_j exp y_j - y_t``.

    A run is a pure function of the seed, the data and the settings; neither the number of threads (``torch.get_num_threads()``, or one
    where the network is too small to share) nor how it is cut into calls of ``fit`` changes a bit. Epoch k visits the samples in the
    order ``philox_words(seed, k, 2**32 - 1, n, 1).flatten().argsort(stable=True)``; batch t is the t-th piece of the epochs' orders laid
    end to end, so a batch may begin in one epoch and end in the next.

    Args:
        sizes: units of the input, of each hidden layer (one at least) and of the output.
        activations: a name from identity, relu, tanh, sigmoid, gelu for every hidden layer, or one name per hidden layer, with another
            one for the output; otherwise the output is linear.
        loss: "mse" or "cross_entropy" (with a linear output).
        feedback: "layerwise" or "direct".
        rule: Ridge, LMS, Joint, Fixed (feedback alignment) or WeightTransport (backprop).
        noise_std, noise, seed, warmup: as for ``convert``.
        optimizer: "sgd", "momentum" (0.9) or "adam" (betas 0.9 and 0.999, eps 1e-8), with torch's formulas.
        lr: > 0.
        device: "cpu" or a CUDA device, on which the whole training step is one cooperative kernel, and many steps a launch.

    Attributes:
        weights, biases: W [units, inputs] and b [units] of each layer, float32, on the device. W starts from N(0, 2 / inputs), b from 0.
        B: of each hidden layer, [units, units of the next layer] in layerwise, [units, outputs] in direct; W^T with WeightTransport.
            Training changes these tensors in place, and what is written into them counts.
        step: training steps so far, those of the warm-up included.
        skipped: samples whose loss or loss change was not finite; B and its statistics skip them.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
        RuntimeError: a CUDA device that torch or this build does not have, and why.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activations: str | Sequence[str] = "tanh",
        loss: str = "mse",
        feedback: str = "layerwise",
        rule: Rule | None = None,
        noise_std: float = 0.05,
        noise: str = "gaussian",
        optimizer: str = "sgd",
        lr: float = 1e-3,
        warmup: int = 0,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if isinstance(sizes, str) or not isinstance(sizes, Sequence):
            raise TypeError(f"sizes must be a sequence of integers, got {sizes!r}")
        self.sizes = tuple(int(integer("sizes", n, 1, 2**31 - 1)) for n in sizes)
        if not 3 <= len(self.sizes) <= 33:
            raise ValueError(f"sizes must name an input, 1 to 31 hidden layers and an output, got {self.sizes}")
        layers = len(self.sizes) - 1
        names = (activations,) * (layers - 1) if isinstance(activations, str) else tuple(activations)
        if len(names) == layers - 1:
            names += ("identity",)
        if len(names) != layers:
            raise ValueError(f"activations must be one name, {layers - 1} or {layers} of them, got {activations!r}")
        self.activations = tuple(one_of("activations", name, _ACTIVATIONS) for name in names)
        self.loss = one_of("loss", loss, ("mse", "cross_entropy"))
        if loss == "cross_entropy" and self.activations[-1] != "identity":
            raise ValueError(f"activations must leave the output linear with loss='cross_entropy', got {self.activations[-1]!r}")
        self.feedback = one_of("feedback", feedback, ("layerwise", "direct"))
        rule = Ridge() if rule is None else rule
        if type(rule) not in _RULES:
            raise ValueError(f"rule must be one of {', '.join(r.__name__ for r in _RULES)}, got {rule!r}")
        if feedback not in rule.structures:
            raise ValueError(f"feedback must be {' or '.join(map(repr, rule.structures))} with {rule!r}, got {feedback!r}")
        self.rule = rule
        self.noise_std = float(positive("noise_std", noise_std))
        self.noise = one_of("noise", noise, ops.KINDS)
        self.optimizer = one_of("optimizer", optimizer, _STATES)
        self.lr = float(positive("lr", lr))
        self.warmup = integer("warmup", warmup, 0)
        self.seed = integer("seed", seed, 0)
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {str(device)!r}")
        state = ops.backends()["cuda"]
        if self.device.type == "cuda" and not state.startswith("available"):
            raise RuntimeError(f"device={str(device)!r} cannot be had: CUDA is {state}")
        # steps, skipped samples and whether a ridge failed; advanced in compiled code, which Ctrl-C cannot part from the weights
        self._counters = torch.zeros(3, dtype=torch.int64, device=self.device)

        def put(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
            return tuple(t.to(self.device) for t in tensors)

        shapes = list(zip(self.sizes[1:], self.sizes[:-1], strict=True))
        generator = torch.Generator().manual_seed(self.seed)
        self.weights = put(torch.randn(shape, generator=generator) * math.sqrt(2 / shape[1]) for shape in shapes)
        self.biases = put(torch.zeros(units) for units, _ in shapes)
        regressors = self.sizes[2:] if feedback == "layerwise" else self.sizes[-1:] * (layers - 1)
        last = torch.tensor(_LAST)
        self._B = put(
            rule.start(ops.noise(last, self.seed, index, units, m, 1.0, "gaussian"), feedback == "layerwise").contiguous()
            for index, (units, m) in enumerate(zip(self.sizes[1:-1], regressors, strict=True))
            if rule.learned
        )
        states = _STATES[optimizer]
        self._weight_state = put(torch.zeros(states, *shape) for shape in shapes if states)
        self._bias_state = put(torch.zeros(states, shape[0]) for shape in shapes if states)
        orders = () if not isinstance(rule, Ridge) else regressors if feedback == "layerwise" else regressors[:1]
        self._V = put(rule.gamma * torch.eye(m, dtype=torch.float64) for m in orders if isinstance(rule, Ridge))
        self._scratch = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._blocks = 0  # of a launch; 0 leaves it to the kernel
        self._inverted = False  # whether _V holds P = V^-1, which is cheaper to keep than V where a batch is small
        self._chunk = 1024  # samples between two looks for Ctrl-C
        self._simd = ""
        self._order: tuple[int, int, Tensor] = (-1, -1, torch.empty(0))  # epoch, samples, their order

    @property
    def step(self) -> int:
        return int(self._counters[0])

    @property
    def skipped(self) -> int:
        return int(self._counters[1])

    @property
    def B(self) -> tuple[Tensor, ...]:
        return self._B if self.rule.learned else tuple(W.T for W in self.weights[1:])

    def __repr__(self) -> str:
        return f"FusedMLP({self._method()}, step={self.step})"

    def _method(self) -> str:
        rule = type(self.rule).__name__
        return f"{list(self.sizes)}, {', '.join(self.activations)}, {self.loss}, {self.feedback}, {rule}, {self.optimizer}"

    # training

    def fit(
        self,
        x: Tensor,
        y: Tensor,
        *,
        steps: int,
        batch_size: int,
        progress: Callable[[int, Tensor], Any] | None = None,
        every: int = 100,
    ) -> Tensor:
        """Train for ``steps`` steps and return the loss of each, float64 [steps]: the sum over the batch before the step.

        Ctrl-C stops between two steps; ``step`` counts those that were taken, and another call goes on from there.

        Args:
            x: float32 [n, sizes[0]], contiguous, on the network's device; read in place.
            y: with "cross_entropy" int64 classes [n]; with "mse" float32 targets [n, sizes[-1]] or int64 classes, taken as one-hot.
            steps: >= 0.
            batch_size: in [1, n].
            progress: called every ``every`` steps of this call, and after the last, with ``step`` and the losses so far.

        Raises:
            TypeError, ValueError: naming the argument, its value and what was expected; nothing has changed then.
            RuntimeError: a ridge whose regressors are too large for its gamma: ``|r|^2`` of 1e13 gamma where a batch is smaller than the
                regressors are many, a matrix that is not positive definite in float64 otherwise. That step left B as it was.
        """
        self._check(x, y)
        integer("steps", steps, 0, 2**62 - self.step)
        integer("batch_size", batch_size, 1, len(x))
        integer("every", every, 1)
        self._choose_statistics(batch_size)
        losses = torch.empty(steps, dtype=torch.float64, device=self.device)
        done = 0
        while done < steps:
            count = min(max(1, self._chunk // batch_size), steps - done)
            if progress is not None:
                count = min(count, every - done % every)
            start = time.perf_counter()
            self._run(x, y, self._rows(self.step, count, batch_size, len(x)), losses[done : done + count])
            seconds = time.perf_counter() - start
            self._chunk = min(int(_CHUNK / seconds * count) + 1, 4 * count) * batch_size
            done += count
            if progress is not None and (done % every == 0 or done == steps):
                progress(self.step, losses[:done])
        return losses

    def _run(self, x: Tensor, y: Tensor, rows: Tensor, losses: Tensor) -> None:
        rule = self.rule
        name = {Ridge: "ridge", LMS: "lms", Fixed: "fixed", WeightTransport: "weight_transport"}.get(type(rule))
        before = self.skipped
        train = functools.partial(
            _C.fused_mlp,
            sizes=self.sizes,
            activations=self.activations,
            loss=self.loss,
            layerwise=self.feedback == "layerwise",
            rule=name or f"joint_{rule.signal}",  # type: ignore[attr-defined]
            rule_rate=rule.gamma if isinstance(rule, Ridge) else rule.lr if isinstance(rule, LMS | Joint) else 1.0,
            forgetting=rule.forgetting if isinstance(rule, Ridge) else 1.0,
            downdate=self._inverted,
            optimizer=self.optimizer,
            lr=self.lr,
            noise_std=self.noise_std,
            noise=self.noise,
            seed=self.seed,
            warmup=self.warmup,
            weights=self.weights,
            biases=self.biases,
            weight_state=self._weight_state,
            bias_state=self._bias_state,
            B=self._B,
            statistics=self._V,
            x=x,
            y=y,
            rows=rows,
            losses=losses,
            counters=self._counters,
            threads=torch.get_num_threads(),
            blocks=self._blocks,
            simd=self._simd,
        )
        if missing := train(scratch=self._scratch):
            self._scratch = torch.zeros(missing, dtype=torch.uint8, device=self.device)
            train(scratch=self._scratch)
        step, skipped, failed = self._counters.tolist()
        if skipped and not before:
            warnings.warn(f"{skipped} samples had a non-finite loss or loss change; B and its statistics skip them", stacklevel=3)
        if failed:
            self._counters[2] = 0
            raise RuntimeError(
                f"the ridge regression of step {step - 1} is beyond float64: |r|^2 is too large for gamma = {rule.gamma}, "  # type: ignore[attr-defined]
                "so choose a larger gamma or a smaller lr"
            )

    def _rows(self, step: int, steps: int, batch: int, samples: int) -> Tensor:
        first, last = step * batch, (step + steps) * batch
        pieces = []
        while first < last:
            epoch, offset = divmod(first, samples)
            if self._order[:2] != (epoch, samples):
                order = torch.empty(samples, dtype=torch.int64)
                _C.shuffle(order, self.seed, epoch)
                self._order = (epoch, samples, order.to(self.device))
            pieces.append(self._order[2][offset : offset + last - first])
            first += len(pieces[-1])
        return torch.cat(pieces).view(steps, batch)

    def _choose_statistics(self, batch: int) -> None:
        if not isinstance(self.rule, Ridge):
            return
        invert = self.rule.forgetting == 1 and batch < max(len(V) for V in self._V)
        if invert != self._inverted:
            self._V = tuple(torch.cholesky_inverse(torch.linalg.cholesky(V)).contiguous() for V in self._V)
            self._inverted = invert

    def _check(self, x: Tensor, y: Tensor) -> None:
        for name, t in (("x", x), ("y", y)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
            if t.device != self._counters.device or not t.is_contiguous():
                where = self._counters.device
                raise ValueError(f"{name} must be contiguous and on {where}, got strides {t.stride()} on {t.device}")
        if x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] != self.sizes[0] or not len(x):
            raise ValueError(f"x must be float32 [n, {self.sizes[0]}] with n >= 1, got {x.dtype} {list(x.shape)}")
        classes = y.dtype == torch.int64 and y.shape == (len(x),)
        targets = self.loss == "mse" and y.dtype == torch.float32 and y.shape == (len(x), self.sizes[-1])
        if not classes and not targets:
            expected = f"int64 [{len(x)}]" + (f" or float32 [{len(x)}, {self.sizes[-1]}]" if self.loss == "mse" else "")
            raise ValueError(f"y must be {expected} with {self.loss}, got {y.dtype} {list(y.shape)}")
        if classes and not 0 <= int(y.min()) <= int(y.max()) < self.sizes[-1]:
            raise ValueError(f"y must be classes in [0, {self.sizes[-1]}), got {int(y.min())} to {int(y.max())}")

    # what has been learned

    def to_module(self) -> nn.Sequential:
        """Linear and activation modules with copies of the weights; the output's activation is left out where it is the identity."""
        modules: list[nn.Module] = []
        for W, b, name in zip(self.weights, self.biases, self.activations, strict=True):
            linear = nn.utils.skip_init(nn.Linear, W.shape[1], W.shape[0], device=W.device)
            linear.weight.data.copy_(W)
            linear.bias.data.copy_(b)
            modules += [linear, _ACTIVATIONS[name]()]
        return nn.Sequential(*modules[: -1 if self.activations[-1] == "identity" else None])

    def evaluate(self, x: Tensor, y: Tensor, *, batch_size: int = 4096) -> dict[str, float]:
        """Mean of the per-sample losses, and the accuracy where y are classes, by the clean stream."""
        self._check(x, y)
        integer("batch_size", batch_size, 1)
        model, classes = self.to_module(), y.dtype == torch.int64
        loss, correct = 0.0, 0
        with torch.no_grad():
            for part, target in zip(x.split(batch_size), y.split(batch_size), strict=True):
                outputs = model(part)
                loss += float(self._criterion(outputs.double(), target).sum())
                correct += int((outputs.argmax(1) == target).sum()) if classes else 0
        return {"loss": loss / len(x)} | ({"accuracy": correct / len(x)} if classes else {})

    def to_converted(self) -> nn.Module:
        """``to_module()`` converted, with copies of B: the network that trains as this one does, for what ``fb.metrics`` measures."""
        net = convert(
            self.to_module(),
            feedback=self.feedback,
            rule=copy.deepcopy(self.rule),
            noise_std=self.noise_std,
            noise=self.noise,
            seed=self.seed,
        )
        for point, B in zip(points(net).values(), self._B, strict=False):
            point.state["B"] = B.clone()
        return net

    def alignment(self, x: Tensor, y: Tensor) -> dict[str, dict[str, float]]:
        """``fb.metrics.alignment`` of the network on one batch, by hidden layer: ``"0"``, ``"1"`` and so on."""
        self._check(x, y)
        rows = metrics.alignment(self.to_converted(), self._criterion, x, y)
        return {str(index): row for index, row in enumerate(rows.values())}

    def _criterion(self, outputs: Tensor, y: Tensor) -> Tensor:
        if self.loss == "cross_entropy":
            return F.cross_entropy(outputs, y, reduction="none")
        target = F.one_hot(y, self.sizes[-1]) if y.dtype == torch.int64 else y
        return 0.5 * (outputs - target.to(outputs.dtype)).square().sum(1)

    # checkpoints

    def _tensors(self) -> dict[str, Tensor]:
        groups = {
            "weights": self.weights,
            "biases": self.biases,
            "B": self._B,
            "P" if self._inverted else "V": self._V,
            "weight_state": self._weight_state,
            "bias_state": self._bias_state,
            "counters": (self._counters[:2],),
        }
        return {f"{name}.{i}": t for name, group in groups.items() for i, t in enumerate(group)}

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything that training changes; with the same data and settings a loaded network goes on bit for bit."""
        tensors = {name: t.clone() for name, t in self._tensors().items()}
        return tensors | {"seed": self.seed, "method": self._method()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a ``state_dict()``, seed included; lr, noise, warm-up and the rule's own settings stay this network's.

        Raises:
            ValueError: another network's, or incomplete; nothing has changed then.
        """
        if not isinstance(state, dict) or state.get("method") != self._method():
            got = state.get("method") if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state must be of FusedMLP({self._method()}), got {got}")
        inverted = "P.0" in state
        own = {("P" if inverted else "V") + name[1:] if name[:2] in ("P.", "V.") else name: t for name, t in self._tensors().items()}
        for name, t in own.items():
            new = state.get(name)
            if not isinstance(new, Tensor) or new.shape != t.shape or new.dtype != t.dtype:
                got = f"{new.dtype} {list(new.shape)}" if isinstance(new, Tensor) else repr(new)
                raise ValueError(f"state[{name!r}] must be {t.dtype} {list(t.shape)}, got {got}")
        seed = integer("state['seed']", state.get("seed", -1), 0)
        for name, t in own.items():
            t.copy_(state[name])
        self.seed, self._inverted = seed, inverted
        self._order = (-1, -1, torch.empty(0))
