"""Feedback points and what they share: noise, B, and the deferred update of B (SPEC 1 to 6)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fbkernels import ops, reference
from fbkernels.autograd import Transport
from fbkernels.reference import Connection
from fbkernels.rules.base import Measurement, Rule
from fbkernels.streams import Streams, streams, twin


class _LazyBuffers(nn.Module):
    """Buffers whose shapes are known after the first forward; a checkpoint brings them along. float64 statistics stay float64."""

    def _names(self) -> tuple[str, ...]:
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._names():
            if prefix + name in state_dict:
                self._buffers[name] = torch.empty_like(state_dict[prefix + name], device=self._device())
            else:
                self._buffers.pop(name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _device(self) -> torch.device:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = {k: v for k, v in self._buffers.items() if v is not None and v.dtype == torch.float64}
        super()._apply(fn, recurse)
        for name, old in exact.items():
            new = self._buffers[name]
            if name != "B" and new is not None and new.dtype != torch.float64:
                self._buffers[name] = old.to(new.device)
        return self


class FeedbackPoint(_LazyBuffers):
    """Where a hidden layer's activity gets its noise and its learned gradient: ``h = self.point(h)``.

    Outside a converted network, and in ``eval()``, it is the identity. In training its perturbed stream is ``p = phi(q) + xi`` with fresh
    ``xi ~ std * N(0, I)`` (SPEC 1), and it owns B (SPEC 3): units x outputs in ``direct`` (a convolution's units are numbered
    channels-last), the transposed shape of the next layer's weight in ``layerwise`` (for a convolution the shape of its kernel).
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.index = -1
        self.converted = False  # put there by convert, and taken away by revert
        self._net: tuple[Feedback, ...] = ()  # a tuple, so that nn.Module does not register the owner as a child
        self.shape: torch.Size | None = None  # of the activity, without the batch
        self.connection: Connection | None = None  # layerwise: how the next layer reads this point
        self._weight: tuple[Tensor, ...] = ()  # layerwise: the next layer's weight; a tuple, as above
        self.carry: tuple[Callable[[Tensor], Tensor], ...] = ()  # layerwise: rearrangements between the point and the next layer
        self.delta: Tensor | None = None  # layerwise: pre-activation error of the next layer, with the loss's scale
        self.change: tuple[Tensor, Tensor] | None = None  # layerwise: p - h at the next layer's input, and what it did to z
        self.pending: Measurement | None = None

    @property
    def net(self) -> Feedback:
        return self._net[0]

    @property
    def weight(self) -> Tensor | None:
        return self._weight[0] if self._weight else None

    @property
    def units(self) -> int:
        """n_l, the number of noisy units."""
        return math.prod(self.shape) if self.shape is not None else 0

    @property
    def statistics(self) -> dict[str, Tensor]:
        return self._buffers  # type: ignore[return-value]

    @property
    def B(self) -> Tensor | None:
        """The current feedback matrix, flushed; None before the first training step has shown its shape."""
        if not self._net:
            return None
        self.net.flush()
        return self.net.rule.feedback(self)

    @B.setter
    def B(self, value: Tensor) -> None:
        if not self._net:
            raise ValueError(f"B of point {self.name!r} cannot be set: the point is not part of a converted network")
        self.net.flush()
        old = self._buffers.get("B")
        if old is not None and old.shape != value.shape:
            raise ValueError(f"B of point {self.name!r} must have shape {tuple(old.shape)}, got {tuple(value.shape)}")
        self._buffers["B"] = value.detach().clone()

    def forward(self, h: Tensor) -> Tensor:
        return self.perturb(h) if isinstance(h, Streams) and self._net else h

    def extra_repr(self) -> str:
        return f"{self.name!r}, index={self.index}" if self._net else "not converted"

    def attach(self, layer: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of a converted layer: the noise goes in after the layer's normalisation, activation and pooling."""
        return streams(self.net, output.clean, output.perturbed, pending=self) if isinstance(output, Streams) else None

    def follow(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of a module named in ``points=``: the noise goes in right after it."""
        return self.perturb(output) if isinstance(output, Streams) else None

    def perturb(self, s: Streams) -> Streams:
        net = self.net
        h = s.clean
        net.visit(self, s)
        self.shape = h.shape[1:]
        if not net.layerwise:
            self.flush()
        h = net.cut(h)
        perturbed = s.perturbed
        if net.perturbing:
            xi = self.noise(net.step, net.perturbed_rows, h.dtype)
            if net.rule.predicts and not net.layerwise and "B" in self._buffers:
                net.prediction = net.prediction + reference.units(xi).to(self._buffers["B"].dtype) @ self._buffers["B"]
            perturbed = twin(s) + (torch.cat((xi, -xi)) if net.antithetic else xi)
        return streams(net, h, perturbed, source=(self, ()))

    def noise(self, step: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        """The step's noise xi_l, in the layout of the activity; regenerated, never stored."""
        assert self.shape is not None
        net = self.net
        exact = dtype if dtype == torch.float64 else torch.float32
        xi = ops.noise(step, net.seed, self.index, rows, self.units, net.noise_std, net.noise, dtype=exact, backend=net.backend)
        return reference.layout(xi, (rows, *self.shape)).to(dtype)

    def create(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """B at its first use, as the rule starts it."""
        if "B" not in self._buffers:
            dtype = torch.promote_types(like.dtype, torch.float32)
            generator = torch.Generator().manual_seed((self.net.seed * 1_000_003 + self.index) % 2**63)
            self._buffers["B"] = self.net.rule.start(shape, self.net.layerwise, generator).to(like.device, dtype)
        B = self._buffers["B"]
        if B.shape != shape:
            raise ValueError(f"B of point {self.name!r} has shape {tuple(B.shape)}, expected {tuple(shape)}: is this another network's?")
        return B

    def claim(self, weight: Tensor, connection: Connection, carry: tuple[Callable[[Tensor], Tensor], ...]) -> Tensor:
        """Layerwise: the next layer announces itself and gets its feedback weights, in the layout of its own weight."""
        if self.weight is not None:
            raise ValueError(
                f"point {self.name!r} feeds two layers, and layerwise feedback has one B a point: "
                "use feedback='direct', or name the points with points=[...]"
            )
        self._weight, self.connection, self.carry = (weight,), connection, carry
        if self.net.rule.learned:
            self.create(weight.shape if connection.convolution else weight.shape[::-1], weight.detach())
        B = self.net.rule.feedback(self)
        assert B is not None
        return B if connection.convolution else B.T

    def flush(self) -> None:
        """Apply the pending update of B (SPEC 5). B keeps its storage."""
        m, self.pending = self.pending, None
        if m is not None:
            with torch.no_grad():
                self.net.rule.learn(self, m)

    def update(self, m: Measurement, M: Any, G: Tensor, target: Tensor | None = None) -> None:
        """B <- B (I - M) + Xi^T G, Xi regenerated from the step of the measurement (SPEC 4), or ``target`` in its place."""
        B = self._buffers["B"]
        matrix = B if self.connection is None else self.connection.matrix(B)
        new = reference.feedback_update(matrix, self.regressand(m, matrix.dtype, target), M, G)
        B.copy_(new if self.connection is None else self.connection.unmatrix(new, B.shape))

    def regressand(self, m: Measurement, dtype: torch.dtype, target: Tensor | None = None) -> Tensor:
        """Xi of the measured step: samples x units, in layerwise as the next layer reads it."""
        xi = self.noise(m.step, m.rows, dtype) if target is None else target.to(dtype)
        if self.connection is None:
            return reference.units(xi)
        for rearrange in self.carry:
            xi = rearrange(xi)
        return self.connection.samples(xi)

    def _names(self) -> tuple[str, ...]:
        return ("B", *self.net.rule.statistics) if self._net else ()

    def _device(self) -> torch.device:
        return self.net.step.device

    def _load_from_state_dict(self, *args: Any) -> None:
        self.pending = None
        super()._load_from_state_dict(*args)

    def _save_to_state_dict(self, *args: Any) -> None:
        if self._net:
            self.net.flush()
        super()._save_to_state_dict(*args)


class Feedback(_LazyBuffers):
    """What the points of one network share: the rule, the noise, the step, and one training step's bookkeeping."""

    def __init__(
        self,
        *,
        layerwise: bool,
        rule: Rule,
        noise_std: float,
        noise: str,
        seed: int,
        every: int,
        fraction: float,
        antithetic: bool,
        warmup: int,
        backend: str,
    ) -> None:
        super().__init__()
        self.layerwise, self.rule, self.noise_std, self.noise, self.seed = layerwise, rule, noise_std, noise, seed
        self.every, self.fraction, self.antithetic, self.warmup, self.backend = every, fraction, antithetic, warmup, backend
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))
        self.points: dict[str, FeedbackPoint] = {}
        self.steps = 0  # the host's copy of step, so that every= and warmup= need no synchronisation
        self.probe = ""  # metrics: "exact" (backprop through the same points) or "learned", both without noise
        self.warned = False
        self.measured: Measurement | None = None
        self._reset()

    def _reset(self) -> None:
        self.activities: dict[str, Tensor] = {}  # h_l by point, until the loss has taken them
        self.logits: Tensor | None = None
        self.perturbed: Tensor | None = None
        self.prediction: Tensor | float = 0.0
        self.inputs: tuple[Any, ...] = ()
        self.perturbing = self.warming = self.transports = False
        self.perturbed_rows = 0

    # the forward of the network

    def begin(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the network."""
        self._reset()
        if not root.training:
            return None
        if self.layerwise:
            self.flush()
        batch = next((x.shape[0] for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim), None)
        if batch is None:
            raise ValueError("a converted network needs a tensor with a batch dimension as input")
        self.inputs = (args, kwargs)
        self.transports = self.layerwise and self.probe != "exact"
        wanted = self.rule.private if self.probe == "learned" else self.rule.perturbs and not self.probe
        self.perturbing = wanted and torch.is_grad_enabled() and (self.every == 1 or self.steps % self.every == 0)
        self.warming = not self.probe and self.steps < self.warmup
        self.perturbed_rows = math.ceil(self.fraction * batch)
        for point in self.points.values():
            point._weight, point.delta, point.change = (), None, None
        wrap = lambda x: streams(self, x, None) if isinstance(x, Tensor) else x  # noqa: E731
        return tuple(wrap(x) for x in args), {k: wrap(v) for k, v in kwargs.items()}

    def end(self, root: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the network: keeps the perturbed logits, hands out the clean ones."""
        if not root.training:
            return None
        if not isinstance(output, Streams):
            raise TypeError(f"the network's forward must return one tensor computed from its input, got {type(output).__name__}")
        if output.pending is not None or output.source is not None and not output.source[1]:
            name = (output.pending or output.source[0]).name  # type: ignore[index]
            raise ValueError(
                f"layer {name!r} is the network's output, which is never perturbed: pass exclude=[{name!r}] to convert, "
                "or name the hidden layers with points=[...]"
            )
        if not self.activities:
            raise ValueError("no feedback point was reached in the forward pass: name modules that run with points=[...]")
        if self.transports:
            idle = [n for n in self.activities if self.points[n].weight is None]
            if idle:
                raise ValueError(
                    f"layerwise feedback: no Linear or Conv2d reads point {idle[0]!r} directly; use feedback='direct', or move the point"
                )
        self.logits, self.perturbed = output.clean, output.perturbed
        return output.clean

    def visit(self, point: FeedbackPoint, s: Streams) -> None:
        if torch.Tensor.requires_grad.__get__(s) and not s.clean.requires_grad:
            raise TypeError(f"a custom autograd.Function before point {point.name!r} hides the second stream: put the points around it by hand")
        if point.name in self.activities:
            raise ValueError(f"layer {point.name!r} is used twice in one forward; a feedback point can serve one place: use two layers")
        last = next(reversed(self.activities), None)
        if last is not None and self.points[last].index > point.index:
            raise ValueError(
                f"point {point.name!r} runs after {last!r}, but was registered before it: pass points=[...] in the order of the forward pass"
            )
        self.activities[point.name] = s.clean

    def cut(self, h: Tensor) -> Tensor:
        """What the next layer gets: detached in direct, so that no gradient crosses a point (DESIGN 1)."""
        if self.probe == "exact":
            return h
        if not self.layerwise:
            return h.detach()
        return h.detach().requires_grad_() if self.warming and not h.requires_grad else h

    def rows(self, t: Tensor) -> Tensor:
        """The rows of a clean batch that have a perturbed twin, in the order of the perturbed stream."""
        part = t if self.perturbed_rows == len(t) else t[: self.perturbed_rows]
        return torch.cat((part, part)) if self.antithetic else part

    @staticmethod
    def constant(x: Any) -> Any:
        """Warm-up: parameters are constants, so that they get no gradient at all and no optimiser moves them."""
        return x.detach() if isinstance(x, Tensor) and x.is_leaf and x.requires_grad else x

    def transport(self, name: str, input: Streams, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Streams:
        """Layerwise: a layer that reads a point hands its error down through B instead of its weight."""
        if name not in ("linear", "conv2d"):
            raise ValueError(f"layerwise feedback covers Linear and Conv2d, got {name}: use feedback='direct'")
        assert input.source is not None
        point, carry = input.source
        connection, padding = Connection.of(name, weight, input.clean, *args, **kwargs)
        if any(padding):
            pad = lambda t: torch.nn.functional.pad(t, padding)  # noqa: E731
            x, carry = pad(input.clean), (*carry, pad)
        else:
            x = input.clean
        B = point.claim(weight, connection, carry)
        if self.warming:
            weight, bias = self.constant(weight), self.constant(bias)
        clean = Transport.apply(x, weight, bias, B, connection, point)
        perturbed = None
        if input.perturbed is not None:
            with torch.no_grad():
                px = torch.nn.functional.pad(input.perturbed, padding) if any(padding) else input.perturbed
                perturbed = connection.forward(px, weight, bias)
                if self.rule.mirrors:
                    point.change = (px - self.rows(x.detach()), perturbed - self.rows(clean.detach()))
        return streams(self, clean, perturbed)

    # learning B

    def measure(self, losses: Tensor, perturbed_losses: Tensor | None, e: Tensor) -> Measurement:
        """What the step showed: the loss change of each perturbed sample and e = dL/dlogits; non-finite samples count as zero."""
        assert self.logits is not None
        dtype = torch.promote_types(self.logits.dtype, torch.float32)
        n = self.perturbed_rows if perturbed_losses is not None else len(losses)
        ok = torch.isfinite(losses[:n]) & torch.isfinite(e[:n]).all(1)
        dL, dy = torch.zeros_like(losses[:n]), torch.zeros_like(e[:n])
        if perturbed_losses is not None and self.perturbed is not None:
            y = self.perturbed.detach().flatten(1).to(e.dtype)
            if self.antithetic:
                dL, dy = (perturbed_losses[:n] - perturbed_losses[n:]) / 2, (y[:n] - y[n:]) / 2
            else:
                dL, dy = perturbed_losses - losses[:n], y - self.logits.detach().flatten(1)[:n].to(e.dtype)
            ok = ok & torch.isfinite(dL) & torch.isfinite(dy).all(1)
        self.skipped.add_((~ok).sum())
        zero = torch.zeros((), dtype=e.dtype, device=e.device)
        dL, e, dy = torch.where(ok, dL, zero), torch.where(ok[:, None], e[:n], zero), torch.where(ok[:, None], dy, zero)
        return Measurement(
            step=self.step.clone(),
            rows=n,
            std=self.noise_std,
            units=sum(self.points[name].units for name in self.activities),
            regressor=e.to(dtype),
            w=(dL / self.noise_std**2).to(dtype),
            loss_change=dL.to(dtype),
            output_change=dy.to(dtype),
            prediction=self.prediction,
            points=tuple(self.activities),
            ok=ok,
        )

    def schedule(self, m: Measurement) -> None:
        """Let B take the step before the next forward (SPEC 5)."""
        if self.layerwise:
            self.measured = m
            return
        m.gains = self.rule.update(m, self._buffers)  # type: ignore[arg-type]
        for point in m.points:
            self.points[point].pending = m

    def flush(self) -> None:
        """Apply every pending update of B."""
        m = self.measured
        if m is not None and m.scale is not None:  # the backward pass has run
            self.measured = None
            with torch.no_grad():
                self._measure_layers(m, m.scale)
        for point in self.points.values():
            point.flush()

    def _measure_layers(self, step: Measurement, scale: Tensor) -> None:
        # each layer regresses its own lam on the errors of the layer above, known once the backward pass has run
        measured: list[tuple[FeedbackPoint, Connection, Measurement]] = []
        for point in self.points.values():
            if point.delta is None or point.connection is None:
                continue
            dtype = step.w.dtype
            delta = point.delta[: step.rows].to(dtype)
            column = (-1, *[1] * (delta.ndim - 1))
            c = scale[: step.rows].to(dtype).view(column)
            ok = step.ok.view(column) & (c != 0) & torch.isfinite(delta).flatten(1).all(1).view(column)
            r = point.connection.regressors(torch.where(ok, delta / c, torch.zeros_like(delta)))
            measured.append((point, point.connection, step.at(r)))
        if self.rule.predicts:
            predicted = torch.zeros_like(step.loss_change)
            for point, connection, m in measured:
                B = point._buffers["B"]
                assert B is not None
                product = (point.regressand(m, B.dtype) * (m.regressor @ connection.matrix(B).mT)).sum(-1)  # [S] or [groups, S]
                predicted = predicted + product.view(-1, m.rows, len(m.w) // m.rows).sum((0, 2))
            for _, _, m in measured:
                m.prediction, m.units = predicted, sum(connection.channels for _, connection, _ in measured)
        for point, _, m in measured:
            m.gains = self.rule.update(m, point._buffers)  # type: ignore[arg-type]
            point.pending, point.delta = m, None

    def advance(self) -> None:
        self.step.add_(1)
        if self.every > 1 or self.warmup:
            self.steps += 1

    def warn(self) -> None:
        """One warning when samples were skipped; on a GPU only ``fb.summary`` looks, because looking synchronises."""
        if not self.warned and not torch.compiler.is_compiling() and self.skipped.device.type == "cpu" and int(self.skipped):
            self.warned = True
            warnings.warn(f"{int(self.skipped)} samples had a non-finite loss or loss change; B and its statistics skip them", stacklevel=4)

    def extra_repr(self) -> str:
        return f"{'layerwise' if self.layerwise else 'direct'}, rule={self.rule}, noise_std={self.noise_std}, noise={self.noise!r}"

    def _names(self) -> tuple[str, ...]:
        return () if self.layerwise else self.rule.statistics

    def _device(self) -> torch.device:
        return self.step.device

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.measured = None
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "step" in state_dict:
            self.steps = int(state_dict[prefix + "step"])
