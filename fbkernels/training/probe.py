"""Which rows are whose: one sample of the input is exchanged, and the difference shows where that sample is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fbkernels._tree import at, copied, differs, flatten, tensors, where
from fbkernels.layout import Rows
from fbkernels.placement import Placement, Recorder, fixed_kernel
from fbkernels.stream.chain import Chain, Waiting
from fbkernels.stream.mode import Layer, Streams, shown
from fbkernels.untouched import untouched

if TYPE_CHECKING:
    from fbkernels.training.network import Network


class Probe:
    """A site without noise and without cuts, that looks at the differences at points."""

    constant = rows_first = antithetic = credits = False
    samples = 0
    fuses: tuple[torch.dtype, ...] = ()

    def __init__(self, network: Network, placement: Placement) -> None:
        self.network, self.placement, self.random = network, placement, placement.random
        self.ran: dict[str, int] = {}
        self.seen: dict[str, tuple[Tensor, Tensor | None]] = {}

    def partial(self) -> bool:
        return False

    def rows(self, h: Tensor, d: Tensor | None = None) -> Tensor:
        return h

    def sides(self, h: Tensor, d: Tensor) -> list[Tensor]:
        return [h + d]

    def joined(self, sides: Sequence[Tensor], like: Tensor | None) -> Tensor:
        return sides[0]

    def written(self, h: Tensor) -> None:
        pass

    def layer(self, mode: Streams, kind: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layer | None:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        if fixed_kernel(weight, self.placement.names):
            self.network.entered = ""
            return None
        name = self.placement.names.get(id(weight)) or self.network.entered or "layer"
        self.network.entered = ""
        key = (name, self.ran.get(name, 0))
        self.ran[name] = key[1] + 1
        if (reads := self.placement.reads.get(key)) is not None and reads not in self.seen:
            self.seen[reads] = (args[0], mode.d(args[0]))
        chain = self.placement.layers.get(key)
        return None if chain is None else (chain, None)

    def point(self, mode: Streams, chain: Chain, h: Tensor, d: Tensor | None, waiting: Waiting | None) -> tuple[Tensor, Tensor, Any]:
        self.seen[chain.point] = (h, d)
        return h, h, d


def settle(network: Network, placement: Placement, recorder: Recorder, root: nn.Module, args: Any, kwargs: Any) -> None:
    """Find the batch's dimension of the input, and the rows of every point's activity and of the outputs."""
    x = tensors(args, kwargs)[recorder.first_input()]
    placement.argument = where(x, root.forward, args, kwargs)
    placement.settled = True
    if x.layout != torch.strided:
        raise TypeError(f"a converted network needs a dense batch, got one of layout {x.layout}: pass x.to_dense()")
    if x.is_meta:  # which has no values that could show it
        return
    outside: list[tuple[int, ...]] = []
    # a sample's rows change alone; or most, in a network that mixes samples: h / h.max()
    for dim, share in ((dim, share) for share in (0.0, 0.5) for dim in range(x.ndim)):
        n = x.shape[dim]
        placement.batch = Rows(dim)
        placement.settled = n > 1
        if n < 2:
            continue
        try:
            probe, outputs = _run(network, placement, dim, root, args, kwargs)
        except ValueError:  # another sample goes another way, to other experts say
            if network.settings.numbered:
                raise
            placement.batch = Rows()
            return
        rows = [rows_of(h, d, n, 1, share) for h, d in outputs]
        outside = outside or [tuple(h.shape) for (h, _), r in zip(outputs, rows, strict=True) if r is None]
        if all(r is not None for r in rows):
            placement.outputs = tuple(rows)
            placement.rows = {name: rows_of(h, d, n, 1, share) for name, (h, d) in probe.seen.items()}
            return
    placement.batch, placement.settled = Rows(), False
    if x.ndim and len(x) < 2:
        return
    raise ValueError(
        f"the network's output of shape {outside[0] if outside else ()} cannot be matched with the samples of its input {tuple(x.shape)}: "
        "a sample's output must depend on that sample alone, batch norm apart; a loss that the model adds needs a number for each sample"
    )


def _run(
    network: Network, placement: Placement, dim: int, root: nn.Module, args: Any, kwargs: Any
) -> tuple[Probe, list[tuple[Tensor, Tensor | None]]]:
    probe = Probe(network, placement)
    mode = Streams(probe, network.buffers_known)
    args, kwargs = copied((args, kwargs))
    batch = at(placement.argument, args, kwargs)
    for x in tensors(args, kwargs):
        mode.put(x, exchanged(x, dim) if x is batch else None)
    network.running = (mode,)
    try:
        with untouched(root, (args, kwargs), network.runs), shown(mode), mode:
            output = network.plain(root, args, kwargs)
        leaves = [mode.current(t) for t in flatten(output)[0] if isinstance(t, Tensor) and differs(t)]
        return probe, [(t, mode.d(t)) for t in leaves if mode.mark(t) is not None]
    finally:
        network.running = ()
        mode.close()


def exchanged(x: Tensor, dim: int) -> Tensor:
    """The difference that another sample in the place of sample 1 makes."""
    x = x.detach().to(torch.int8) if x.dtype == torch.bool else x.detach()
    d = torch.zeros_like(x, memory_format=torch.contiguous_format)
    own, n = x.select(dim, 1), x.shape[dim]
    other = next((o for k in range(n) if not torch.equal(o := x.select(dim, k), own)), None)
    if other is not None:
        d.select(dim, 1).copy_(other - own)
    elif x.is_floating_point():
        d.select(dim, 1).copy_(torch.linspace(-1, 1, own.numel()).view(own.shape))
    return d


def rows_of(h: Tensor, d: Tensor | None, n: int, sample: int, share: float) -> Rows | None:
    """Where the rows of one of n samples are, by where its difference is, or is more than that share of the largest; None where they are no
    dimension's part."""
    if d is None or not d.numel() or not d.any() or not (d == d).all():
        return Rows() if h.ndim and len(h) == n else None  # it shows nowhere: constant, dead units, a diverged network
    # another memory format rounds otherwise, so a row that did not change may show a rounding
    least = max(share, torch.finfo(d.dtype).eps ** 0.5) if d.is_floating_point() else share
    changed = d.abs() > d.abs().max() * least
    for dim, size in enumerate(h.shape):
        if size % n:
            continue
        copies = size // n
        at = changed.movedim(dim, 0).flatten(1).any(1) if h.ndim > 1 else changed
        if not at[: sample * copies].any() and not at[(sample + 1) * copies :].any():
            return Rows(dim)
        at[sample::n] = False
        if not at.any():
            return Rows(dim, strided=True)
    return None
