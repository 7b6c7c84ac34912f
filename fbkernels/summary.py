"""What was converted: each point's layer, units, B and memory."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fbkernels.loss import PerturbedLoss, network_of, unwrap
from fbkernels.metrics import explained
from fbkernels.placement import layer_of


@dataclass(frozen=True)
class PointSummary:
    """One row of ``fbkernels.summary``."""

    name: str
    layer: str
    index: int
    units: int
    B: tuple[int, ...] | None
    bytes: int
    explained: float = field(compare=False)  # its part of the share, see ``metrics.explained``


class Summary(list[PointSummary]):
    """What was converted; prints as a table."""

    def __init__(self, rows: Iterable[PointSummary], title: str, peak: int | None = None, explained: float = math.nan) -> None:
        super().__init__(rows)
        self.title, self.peak, self.explained = title, peak, explained

    def __repr__(self) -> str:
        head = ("point", "layer", "index", "units", "B", "memory", "explained")
        rows = [
            (
                r.name,
                r.layer,
                str(r.index),
                str(r.units or "?"),
                *(("x".join(map(str, r.B)), f"{r.bytes / 2**20:.2f} MiB") if r.B else "??"),
                "-" if math.isnan(r.explained) else f"{r.explained:.1%}",
            )
            for r in self
        ]
        width = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip() for row in (head, *rows)]
        return "\n".join([self.title, *lines])

    __str__ = __repr__


def summary(net: nn.Module, x: Tensor | None = None) -> Summary:
    """What was converted: each point's layer, units, B and the memory of B and its statistics.

    Shapes are known after the first training forward; until then they read "?". With a batch ``x`` of inputs (on the meta device, if you
    like: only its shape counts) they are predicted, by a training step of plain torch operators on a copy without data, and with them
    ``peak``, the bytes that such a step holds at most: parameters, gradients, activities of both streams, B and its statistics; not what an
    optimiser keeps, nor what it takes to draw the noise. The fused kernels need less. ``explained`` is the share of the noise's effect that
    B explains, and of a point its part: see ``fbkernels.metrics.explained``.

    Raises:
        TypeError: net is not a converted network.
    """
    root, network = unwrap(net), network_of(net)
    text, peak = "", None
    if x is not None:
        network.flush()
        root = copy.deepcopy(root).to("meta").train()
        network_of(root).adopt(network)
        with _Peak(root) as memory:
            z = root(x.to("meta"))
            PerturbedLoss(_squares, root)(z, None).sum().backward()
            network_of(root).flush()
        peak = memory.peak
        text = f", a step on {len(x)} samples at most {peak / 2**20:.2f} MiB"
    shown = network_of(root)
    share, parts = explained(net)
    rows = []
    for name, point in shown.points.items():
        B = point.B
        layer, shape = type(root.get_submodule(layer_of(point.reads or name))).__name__, None if B is None else tuple(B.shape)
        rows.append(PointSummary(name, layer, point.index, point.units, shape, _bytes(point.state), parts.get(name, math.nan)))
    title = (
        f"{type(root).__name__}: {network.settings}\n{sum(r.units for r in rows)} noisy units, step {int(network.step)}, "
        f"{int(network.skipped)} samples skipped, shared statistics {_bytes(shown.state) / 2**20:.2f} MiB{text}"
    )
    title += "" if math.isnan(share) else f", B explains {share:.1%} of what the noise does"
    own = shown.placement.own_weights if shown.placement is not None else ()
    title += f"\nno B, the error passes the weights themselves: {', '.join(own)}" * bool(own)
    return Summary(rows, title, peak, share)


def _squares(output: Any, target: Any) -> Tensor:
    """A loss of any output, one for each sample."""
    return torch.stack([t.flatten(1).square().sum(1) if t.ndim > 1 else t.square() for t in tree_leaves(output)]).sum(0)


def _bytes(state: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in state.values())


def _batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any) -> tuple[Tensor, ...]:
    kept = x.shape[1] if training else 0
    return torch.empty_like(x), x.new_empty(kept), x.new_empty(kept)


def _batch_norm_backward(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    return tuple(t if wanted else None for t, wanted in zip((torch.empty_like(x), *x.new_empty(2, x.shape[1])), rest[-1], strict=True))


# torch's meta kernels of these are dozens of calls in Python
_DECOMPOSED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten.native_batch_norm_backward.default: _batch_norm_backward,
    torch.ops.aten.threshold_backward.default: lambda g, *rest: torch.empty_like(g),
}


class _Peak(TorchDispatchMode):
    """The most bytes at once of a network and of what operators make in the ``with`` block."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*net.parameters(), *net.buffers())}
        self.known, self.now = set(held), sum(held.values())
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = _DECOMPOSED.get(func) if args and isinstance(args[0], Tensor) and args[0].is_meta else None
        out = func(*args, **(kwargs or {})) if made is None else made(*args)
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and (storage := t.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
