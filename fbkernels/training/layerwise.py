"""``layerwise`` feedback: a layer hands its error down through B instead of its weight (SPEC 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fbkernels.layers import Connection
from fbkernels.layout import Layout
from fbkernels.rules.base import Measurement
from fbkernels.stream.chain import Chain, Waiting
from fbkernels.stream.differences import weighted
from fbkernels.stream.kinds import name_of
from fbkernels.stream.mode import Layer, Streams
from fbkernels.training.autograd import Transport
from fbkernels.training.point import FeedbackPoint
from fbkernels.training.step import Step


class Layerwise(Step):
    """What a layer reads gets the noise of its own B and of no other, so that the noise has one way to the loss (SPEC 1)."""

    def begin(self) -> None:
        rule = self.network.settings.rule
        self.transports = self.probe != "exact"
        # B regresses on the errors of the layers, which the backward pass has to leave behind
        self.learns = self.probe == "learned" or (
            self.learning and rule.adapts and rule.regresses and (self.perturbing or not rule.perturbs)
        )
        if self.learns and torch.compiler.is_compiling():
            raise RuntimeError(
                f"{type(rule).__name__} in layerwise feedback cannot be compiled: use feedback='direct', or leave torch.compile out"
            )

    def cut(self, h: Tensor) -> Tensor:
        if self.probe:
            return h.clone()
        return h.detach().requires_grad_() if self.constant and not h.requires_grad else h

    def point(self, mode: Streams, chain: Chain, h: Tensor, d: Tensor | None, waiting: Waiting | None) -> tuple[Tensor, Tensor, Any]:
        point = self.network.points.get(chain.point)
        if point is not None and not self.again:
            self.visit(point, h)
            point.layout = Layout.of(h, self.samples, point.maps if chain.explicit else chain.maps, 1, self.rows_of(point.name))
        return h, self.cut(h), d

    def layer(self, mode: Streams, kind: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layer | None:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        key = self.count(weight)
        if key is None:
            return None
        if key not in self.placement.layers:
            self.unknown.append(key[0])
            return None
        chain, reads = self.placement.layers[key], self.placement.reads.get(key)
        frozen = not args[0].requires_grad and not self.constant
        if reads is not None and not self.transports and (point := self.network.points[reads]).reads:
            x = self.visit_input(point, args[0], kind != "linear")
            with torch._C.DisableTorchFunction():
                return chain, (func(x, *args[1:], **kwargs), None)
        if reads is None or not self.transports or frozen:
            return None if chain is None else (chain, None)
        return chain, self.read(mode, self.network.points[reads], func, args, kwargs)

    def visit_input(self, point: FeedbackPoint, x: Tensor, convolution: bool) -> Tensor:
        """A point at a layer's input: a view, whose gradient is this layer's alone."""
        if self.again or point.name in self.activities:  # which runs again
            return x
        x = x.view_as(x)
        self.visit(point, x)
        point.layout = Layout.of(x, self.samples, convolution, 1, self.rows_of(point.name))
        return x

    def read(
        self, mode: Streams, point: FeedbackPoint, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """A layer that reads a point's activity: its result, whose error goes down through B, and that of the difference."""
        given = dict(zip(("weight", "bias"), args[1:], strict=False)) | kwargs
        x, weight, bias = args[0], given["weight"], given.get("bias")
        shape = {k: v for k, v in kwargs.items() if k not in ("weight", "bias")}
        connection, padding = Connection.of(name_of(func), weight, x, *args[3:], **shape)
        if connection.transposed and self.network.settings.rule.regresses and self.network.settings.rule.perturbs:
            raise ValueError(
                f"{self.network.settings.rule!r} cannot learn B of {name_of(func)} in layerwise feedback: use WeightMirror(), or "
                "feedback='direct'"
            )
        source = getattr(x, "_fb_source", None)
        carry = source[2] if source is not None and source[0] == mode.token and source[1] == point.name else ()
        d = mode.d(x)
        moved = any(rearrange in ("permute", "transpose", "movedim") for rearrange, _ in carry)
        point.merged = len(carry) > 0 and (moved or len(x) != self.samples)
        if point.reads and not self.again:
            x = self.visit_input(point, x, connection.convolution)
        if point.name not in self.activities and not self.again:  # the layer before was skipped, and this one reads another's activity
            point.layout = Layout.of(x, self.samples, connection.convolution, 1, self.rows_of(point.name))
        if self.perturbing and not self.again:
            with torch.no_grad():
                xi = point.noise(self.network.step, self.perturbed_rows, self.activities.get(point.name, x).dtype, self.offset)
                xi = torch.cat((xi, -xi)) if self.antithetic else xi
                for _, rearrange in carry:
                    xi = rearrange(xi)
                d = xi if d is None else d + xi
        if any(padding):
            pad = lambda t: torch.nn.functional.pad(t, padding)  # noqa: E731
            x, d, carry = pad(x), None if d is None else pad(d), (*carry, ("pad", pad))
            args = (x, weight, bias, connection.stride, connection.padding, connection.dilation, connection.groups)
            kwargs = {}
        if point.name not in self.feedback:
            self.feedback[point.name] = point.claim(weight, connection, carry)
        B = self.feedback[point.name]
        constant = (lambda t: None if t is None else t.detach()) if self.constant else (lambda t: t)
        errors = self.errors if self.learns else None
        clean = Transport.apply(mode.bare(x), constant(weight), constant(bias), B, connection, point.name, errors)
        return clean, None if d is None else weighted(func, d, args, kwargs)

    def record(self, m: Measurement) -> Any:
        network = self.network
        if not self.learns or self.probe or (self.samples == 0 and m.part is None):
            return None

        def record(c: Tensor) -> None:
            if m.scale is None:
                network.measured.append((self, m))
                if m.part is not None:  # the end of the backward pass is where all processes meet; a flush may be of one alone
                    torch.autograd.Variable._execution_engine.queue_callback(network.flush)
            m.scale = c.detach()

        return record

    def learn(self, m: Measurement) -> None:
        """Each layer regresses its own lam on the errors of the layer above, known once the backward pass has run."""
        assert m.scale is not None and m.ok is not None
        network, rule = self.network, self.network.settings.rule
        dtype = m.w.dtype
        scale = m.scale
        if len(scale) != self.samples and self.layouts:  # a loss for each row of the output
            scale = self.layouts[0].rows.first(scale, self.samples).reshape(self.samples, -1).mean(1)
        measured: list[tuple[FeedbackPoint, Connection, Measurement]] = []
        for name, delta in m.errors.items():
            point = network.points[name]
            assert point.connection is not None and point.layout is not None
            if point.layout.plain and not point.merged:
                delta = delta[: m.rows].to(dtype)
                c, ok = scale[: m.rows].to(dtype), m.ok
            else:
                if point.connection.convolution and (point.merged or not point.layout.rows.plain):
                    raise ValueError(
                        f"{rule!r} cannot learn B of point {name!r}, whose samples are not its rows: use WeightMirror(), or "
                        "feedback='direct'"
                    )
                who, order = point.owners(self.samples)
                delta = delta.to(dtype) if point.connection.convolution else delta.flatten(0, -2)[order].to(dtype)
                c, ok = scale.to(dtype)[who[order]], m.ok[who[order]]
            column = (-1, *[1] * (delta.ndim - 1))
            c = c.view(column)
            ok = ok.view(column) & (c != 0) & torch.isfinite(delta).flatten(1).all(1).view(column)
            r = point.regressors(torch.where(ok, delta / c, torch.zeros_like(delta)))
            measured.append((point, point.connection, m.at(r)))
        units = sum(connection.channels for _, connection, _ in measured)
        if rule.predicts or self.explains:
            predictions: dict[str, Tensor] = {}
            for point, connection, own in measured:
                B = point.state["B"]
                product = (point.regressand(own, B.dtype) * (own.regressor @ connection.matrix(B).mT)).sum(-1)  # [S] or [groups, S]
                predictions[point.name] = product.view(-1, own.rows, len(own.w) // own.rows).sum((0, 2))
            predicted = sum(predictions.values(), torch.zeros_like(m.loss_change))
            for _, _, own in measured:
                own.prediction, own.units = predicted, units
            if self.explains and predictions:
                nothing = torch.zeros_like(m.loss_change)
                network.explain(m, units, m.loss_change, torch.stack([predictions.get(p, nothing) for p in network.points]))
        for point, _, own in measured:
            point.pending = own if rule.additive else own.gathered(rule.exchanged)
            point.pending.gains = rule.update(point.pending, point.state)  # FeedbackPoint.flush looks at B itself
