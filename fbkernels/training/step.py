"""What lives for one training step, and for no longer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fbkernels.layout import Layout, Rows
from fbkernels.placement import Placement, fixed_kernel, used_twice
from fbkernels.stream.chain import Chain, Waiting
from fbkernels.training.autograd import Sent

if TYPE_CHECKING:
    from fbkernels.rules.base import Measurement
    from fbkernels.stream.mode import Layer, Streams
    from fbkernels.training.autograd import Behind
    from fbkernels.training.network import Network
    from fbkernels.training.point import FeedbackPoint
    from fbkernels.training.processes import Part


SHARE_EVERY = 8  # steps: the share that B explains is measured in one of so many, once the warm-up is over


class Step:
    """One training forward, and what its loss and its backward pass need. ``Direct`` and ``Layerwise`` say what happens at a point."""

    def __init__(self, network: Network, placement: Placement, samples: int, learning: bool, perturbing: bool, probe: str) -> None:
        settings = network.settings
        self.network, self.placement, self.samples = network, placement, samples
        self.learning, self.perturbing, self.probe = learning, perturbing, probe  # probe: of metrics, see Network
        self.constant = not probe and settings.warmup > 0 and network.steps < settings.warmup  # warm-up: only B learns
        self.held: Tensor | None = None  # direct, of a warm-up that ends by itself: bool, whether it lasts
        fixed = torch.compiler.is_compiling() or network.static  # the same operations in each step
        if network.warming and not probe:  # what is fixed goes on when it ends; DistributedDataParallel looks for a way to the parameters
            self.constant = settings.layerwise or not (fixed or network.processes is not None)
            self.held = None if self.constant else network.state["warmup"][-1] == 0
        due = settings.rule.predicts if fixed else network.steps % SHARE_EVERY == 0
        self.explains = settings.rule.explains and perturbing and not probe and (network.warming or due)
        self.predicts = perturbing and (settings.rule.predicts or self.explains)
        self.random, self.credits = placement.random, True
        self.antithetic = settings.antithetic
        self.perturbed_rows = samples if settings.fraction == 1 else math.ceil(settings.fraction * samples)
        self.rows_first = False  # the plain model's maps are not channels-last as those of blocks are
        self.fuses: tuple[torch.dtype, ...] = ()
        self.ran: dict[str, int] = {}  # how often each layer ran
        self.unknown: list[str] = []  # layers that ran and that the placement does not have
        self.sent = Sent()
        self.again = False  # a second run by torch.utils.checkpoint, in the backward pass
        self.part: Part | None = None  # of the perturbed rows of all processes
        self.activities: dict[str, Tensor] = {}  # h_l by point, before its cut, until the loss has taken them
        self.blocks: dict[str, tuple[Behind, Tensor, Tensor | None]] = {}  # fused ones, what phi' is read from, and the winners
        self.predictions: dict[str, Tensor] = {}  # [parts, rows, outputs] of each point: their sum is sum_l Xi_l B_l
        self.outputs: list[Tensor] = []
        self.edges: list[GradientEdge | None] = []  # where these began: what follows in place makes the tensor itself another's result
        self.own = True  # the loss takes the outputs themselves, no functions of them
        self.changes: list[Tensor | None] = []  # of the outputs, by the noise
        self.layouts: list[Layout] = []  # of the outputs
        self.weighted: Any = None  # the loss's gradient where it is more than c e
        self.inputs: tuple[Any, ...] = ()
        self.feedback: dict[str, Tensor] = {}  # layerwise: B of each point in this forward, for a second run by torch.utils.checkpoint
        self.errors: dict[str, Tensor] = {}  # layerwise: pre-activation error of the layer that reads a point, with the loss's scale

    @property
    def offset(self) -> int:
        """The index of this process' first perturbed row among those of all."""
        return 0 if self.part is None else self.part.before

    @property
    def rows_read(self) -> int:
        """Layerwise: products of the forward for each number in the weights of the layers that read a point, of all processes together."""
        samples = self.samples if self.part is None else self.part.total
        return samples * self.placement.products // max(1, self.placement.answering)

    def partial(self) -> bool:
        return self.antithetic or self.perturbed_rows != self.samples

    def rows(self, h: Tensor, d: Tensor | None = None) -> Tensor:
        """The rows of a clean activity that have a difference, in the order of the differences; ``d`` has that shape."""
        if not self.partial():
            return h
        dim = self._batch(h, d)
        part = h.narrow(dim, 0, self.perturbed_rows)
        return torch.cat((part, part), dim) if self.antithetic else part

    def _batch(self, h: Tensor, d: Tensor | None) -> int:
        n = self.perturbed_rows * (1 + self.antithetic)
        fits = [
            k for k, size in enumerate(h.shape) if size == self.samples and (d is None or d.shape == (*h.shape[:k], n, *h.shape[k + 1 :]))
        ]
        if not fits or (fits[0] > 0 and len(fits) > 1):
            raise ValueError(
                f"fraction and antithetic need the batch in a dimension of its own, got an activity of shape {tuple(h.shape)} for "
                f"{self.samples} samples: use fraction=1 and antithetic=False"
            )
        return fits[0]

    def sides(self, h: Tensor, d: Tensor) -> list[Tensor]:
        """The whole batch of a clean activity with its difference, once for each sign: where rows have random numbers of their own."""
        if not self.partial():
            return [(h + d).to(h.dtype)]
        dim, n = self._batch(h, d), self.perturbed_rows
        first, rest = h.narrow(dim, 0, n), h.narrow(dim, n, self.samples - n)
        return [torch.cat(((first + part).to(h.dtype), rest), dim) for part in d.split(n, dim)]

    def joined(self, sides: Sequence[Tensor], like: Tensor | None) -> Tensor:
        """Of results for each side the rows that have a difference, in the shape of ``like`` where that is known."""
        dim = self._batch(sides[0], like)
        return torch.cat([t.narrow(dim, 0, self.perturbed_rows) for t in sides], dim)

    def count(self, weight: Any) -> tuple[str, int] | None:
        """Which layer runs: its name, and how often it ran before in this step. None where it is no layer."""
        network = self.network
        if fixed_kernel(weight, self.placement.names):
            network.entered = ""
            return None
        name = self.placement.names.get(id(weight)) or network.entered or "layer"
        if name == "layer" and (name, self.ran.get(name, 0)) not in self.placement.layers and not torch.compiler.is_compiling():
            name = network.renamed(self.placement, weight)
        network.entered = ""
        times = self.ran.get(name, 0)
        self.ran[name] = times + 1
        return name, times

    def rows_of(self, point: str) -> Rows:
        rows = self.placement.rows.get(point, Rows())
        if rows is None and self.network.settings.numbered:
            raise ValueError(
                f"the rows of point {point!r} cannot be matched with samples: exclude that layer, or name others with points=[...]; in "
                "layerwise feedback WeightMirror() and other rules without a second stream need not know them"
            )
        return rows or Rows()

    def visit(self, point: FeedbackPoint, h: Tensor) -> None:
        """A point runs."""
        if point.name in self.activities:
            raise ValueError(used_twice(point.name))
        last = list(self.activities)[-1] if self.activities else None  # torch 2.11 does not trace reversed of none
        if last is not None and self.activities[last].requires_grad and not torch.is_grad_enabled():
            raise ValueError(
                f"point {point.name!r} runs under torch.no_grad behind point {last!r}, and its layers would get no gradient: "
                "torch.utils.checkpoint needs use_reentrant=False, and of layers that are to learn nothing exclude=[...] takes their points"
            )
        self.activities[point.name] = h

    def written(self, h: Tensor) -> None:
        """What follows a point is about to write into its activity, from which phi' of a block is read."""
        for name, (behind, kept, winner) in self.blocks.items():
            if kept.untyped_storage().data_ptr() == h.untyped_storage().data_ptr():
                kept = kept.clone()
                behind.version = kept._version
                self.blocks[name] = (behind, kept, winner)

    def release(self) -> None:
        """The loss has what it needs. What torch.utils.checkpoint will run again keeps the step, and these would keep that function: no
        collector sees such a circle through autograd's graph."""
        self.activities, self.blocks, self.predictions, self.outputs, self.changes = {}, {}, {}, [], []
        self.edges = []
        self.inputs, self.weighted = (), None

    # of Direct and Layerwise

    def layer(self, mode: Streams, kind: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layer | None:
        raise NotImplementedError

    def point(self, mode: Streams, chain: Chain, h: Tensor, d: Tensor | None, waiting: Waiting | None) -> tuple[Tensor, Tensor, Any]:
        raise NotImplementedError

    def begin(self) -> None:
        """What is known once a step begins."""

    def learn(self, m: Measurement) -> None:
        """Layerwise: what the backward pass has shown."""

    def record(self, m: Measurement) -> Any:
        """What the loss's backward does with its own scale."""
        return None


@contextlib.contextmanager
def second_run(step: Step, ran: dict[str, int]) -> Any:
    """A function that torch.utils.checkpoint runs again in the backward pass: its layers were counted, its points have run."""
    before, again = step.ran, step.again
    step.ran, step.again = dict(ran), True
    try:
        yield
    finally:
        step.ran, step.again = before, again
