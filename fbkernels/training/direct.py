"""``direct`` feedback: every point gets e B^T from the output, and no gradient crosses it (SPEC 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fbkernels import ops
from fbkernels.layout import Layout
from fbkernels.stream.chain import Chain, Waiting
from fbkernels.stream.mode import Layer, Streams
from fbkernels.training.block import run_block
from fbkernels.training.step import Step


class Direct(Step):
    """Noise goes in at a point, and the activity is cut there."""

    def begin(self) -> None:
        settings, network = self.network.settings, self.network
        if not (self.probe or settings.rule.private) and self.placement.plain:
            self.fuses = ops.fuses(settings.backend, network.step.device)

    def layer(self, mode: Streams, kind: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layer | None:
        key = self.count(args[1] if len(args) > 1 else kwargs["weight"])
        if key is None:
            return None
        if key not in self.placement.layers:
            self.unknown.append(key[0])
            return None
        chain = self.placement.layers[key]
        return None if chain is None else (chain, None)

    def cut(self, h: Tensor) -> Tensor:
        return h.clone() if self.probe == "exact" else h.detach()  # h keeps its own gradient when the model goes on in place

    def point(self, mode: Streams, chain: Chain, h: Tensor, d: Tensor | None, waiting: Waiting | None) -> tuple[Tensor, Tensor, Any]:
        network = self.network
        point = network.points[chain.point]
        predicts = self.predicts and not self.again
        if waiting is not None:
            block = run_block(self, point, waiting, predicts)
            if block is not None:
                h, d = block
                return h, self.cut(h), d
            with waiting.as_then():
                h, d = mode.run(waiting)
        if not self.again:
            self.visit(point, h)
            maps = chain.maps if not chain.explicit else point.maps
            point.lay(Layout.of(h, self.samples, maps, network.settings.share, self.rows_of(point.name)))
            prediction = point.flush(self.perturbed_rows if predicts else 0)
            if prediction is not None:
                self.predictions[point.name] = prediction
            if self.perturbing:
                xi = point.noise(network.step, self.perturbed_rows, h.dtype, self.offset)
                xi = torch.cat((xi, -xi)) if self.antithetic else xi
                d = xi if d is None else d + xi
        return h, self.cut(h), d
