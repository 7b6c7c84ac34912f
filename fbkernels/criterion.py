"""Any criterion as per-sample losses: in float64, with e = dL/doutput, and what a perturbation of the output does to them (SPEC 2)."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from fbkernels._tree import differs
from fbkernels.draws import Draws, drawn, drawn_again, shared_generators, state_of
from fbkernels.held import Held
from fbkernels.layout import Layout

_WEIGHTED = (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward, F.cross_entropy, F.nll_loss)  # whose mean counts weights and ignored targets


class PerSample:
    """Per-sample losses of a criterion in float64, so that L~ - L of two nearly equal losses keeps its digits (SPEC 2).

    It is the criterion itself that runs, as it stands at the time, and a call leaves it as it was: what the clean call of a step would have
    changed, ``advance`` changes.
    """

    def __init__(self, criterion: Callable[..., Tensor]) -> None:
        if not callable(criterion):
            raise TypeError(f"criterion must be a loss module or function, got {criterion!r}")
        self.criterion: Any = criterion
        self.module = isinstance(criterion, nn.Module)
        if isinstance(criterion, nn.Module) and any(p.requires_grad for p in criterion.parameters()):
            raise ValueError("criterion has parameters that require a gradient, which would not get one: put them into the network")
        parameter = None if self.module else inspect.signature(criterion).parameters.get("reduction")
        self.default: str | None = None if parameter is None else parameter.default  # a function's reduction
        self.keywords = criterion.keywords if isinstance(criterion, functools.partial) else {}
        self.function: Any = criterion.func if isinstance(criterion, functools.partial) else criterion
        runs = getattr(criterion.forward, "__func__", None) if isinstance(criterion, nn.Module) else self.function
        bare = self.keywords.keys() <= {"reduction"} and not getattr(criterion, "args", ())
        of_torch = getattr(runs, "__module__", None) in (nn.modules.loss.__name__, F.__name__) and runs is not F.ctc_loss
        self.weighted = runs in _WEIGHTED
        self.plain = self.weighted or (of_torch and bare)  # its value is known to be what its losses come to
        self.stock = runs is nn.CrossEntropyLoss.forward or (runs is F.cross_entropy and bare)
        self.changes: list[Callable[[], object]] = []  # by the last clean call
        self.compared = 0
        self.held: Held | None = None  # by the criterion, at this step
        self.began: list[Callable[[], object]] | None = None  # where the clean call found the generators
        self.dtype: torch.dtype | None = None  # of outputs as they are
        self.draws: Draws | None = None  # of the last call, on outputs in their own dtype; None while it has drawn nothing
        self.steps = 0  # of which its graph was looked at, and has shown:
        self.coupled = False  # a sample's loss depends on the outputs of others
        self.others = False  # a gradient goes to more than the output: a target, weights of the loss

    def __getstate__(self) -> dict[str, Any]:  # no generator can be copied
        return {**self.__dict__, "held": None, "began": None, "draws": None, "changes": []}

    @property
    def reduction(self) -> str:
        """How the criterion itself sums the losses up: "mean", "sum" or "none"."""
        return getattr(self.criterion, "reduction", "none") if self.module else self.default or "none"

    @property
    def cross_entropy(self) -> bool:
        """Whether it is nn.CrossEntropyLoss or its function, with nothing but a reduction set."""
        c = self.criterion
        return self.stock and (not self.module or (c.weight is None and c.label_smoothing == 0.0 and c.ignore_index == -100))

    def __call__(self, output: Any, target: Any, whole: Any = None, *, samples: int = -1, clean: bool = False) -> Tensor:
        """A loss for each row of the output, or each of ``samples``, such that their mean, or sum, is the criterion's value; ``whole``: the
        target of the whole batch; ``clean``: what the criterion changes of itself waits for ``advance``."""
        logits: Tensor = next(t for t in tree_leaves(output) if isinstance(t, Tensor) and differs(t))
        losses = self._run(output, target, "none", clean)
        if losses.ndim == 0 or len(losses) not in (len(logits), samples):
            raise ValueError(
                f"criterion must give one loss per sample, got shape {tuple(losses.shape)} for {len(logits) if samples < 0 else samples} "
                "samples: pass a module or function with a `reduction` argument, or one that returns a loss for each sample; samples come "
                "first in what the network takes, not time; WeightMirror(), layerwise, takes a loss that is one number"
            )
        if self.reduction == "none" and losses.ndim > 1:
            raise ValueError(
                f"criterion with reduction='none' must return shape ({len(logits)},), got {tuple(losses.shape)}: use 'mean' or 'sum'"
            )
        per = losses.flatten(1).sum(1) if losses.ndim > 1 else losses
        scale = self.scale(logits, target if whole is None else whole, losses)
        return per if scale is None else per * scale

    def look(self) -> Held:
        """At what the criterion holds as a step begins."""
        self.held = Held(self.criterion, self.plain)
        return self.held

    def _run(self, output: Any, target: Any, reduction: str, clean: bool = False) -> Tensor:
        dtype: torch.dtype = next(t.dtype for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())
        if torch.compiler.is_compiling() and self.module:
            return self._traced(output, target, reduction, dtype)
        states = [] if self.draws is None else self.states()
        try:
            return self._eager(output, target, reduction, clean, dtype)
        except RuntimeError:  # one that refers to float32 tensors out of reach, class weights say, takes no float64
            if dtype == torch.float32:
                raise
            for back in states:
                back()
            return self._eager(output, target, reduction, clean, torch.float32).to(dtype)

    def _eager(self, output: Any, target: Any, reduction: str, clean: bool, dtype: torch.dtype) -> Tensor:
        exact = lambda t: t.to(dtype) if t.is_floating_point() else t  # noqa: E731
        output, target = tree_map_only(Tensor, exact, (output, target))
        more = {} if self.default is None else {"reduction": reduction}
        keywords = lambda: {k: exact(v) for k, v in self.keywords.items() if isinstance(v, Tensor)} | more  # noqa: E731
        if torch.compiler.is_compiling():
            return self.criterion(output, target, **keywords())  # type: ignore[no-any-return]
        drawing = contextlib.nullcontext() if self.draws is None else Draws(self.draws)
        held = self.held or self.look()
        with held.lent(dtype, self.dtype) as changes, _reduced(self.function, reduction), drawing:
            losses: Tensor = self.criterion(output, target, **keywords())
        if clean:
            self.changes = changes
        return losses

    def _traced(self, output: Any, target: Any, reduction: str, dtype: torch.dtype) -> Tensor:
        """As Dynamo can follow it, which sees what the criterion is, but not that it runs on copies of its attributes."""
        criterion = self.criterion
        tensors = {k: t.to(dtype) for k, t in (*criterion.named_parameters(), *criterion.named_buffers()) if t.is_floating_point()}
        target = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, target)
        own = self.reduction
        if hasattr(criterion, "reduction"):
            criterion.reduction = reduction
        try:
            losses: Tensor = torch.func.functional_call(criterion, tensors, (output, target)) if tensors else criterion(output, target)
            return losses
        finally:
            if hasattr(criterion, "reduction"):
                criterion.reduction = own

    def advance(self) -> None:
        """Make the criterion what the step's clean call has made of it."""
        for change in self.changes:
            change()
        self.changes, self.held, self.began = [], None, None

    def compare(self, output: Any, target: Any, losses: Tensor) -> None:
        """Refuse a criterion whose own value is another than what its per-sample losses come to: their gradient would be another, too."""
        if self.reduction == "none" or self.plain or losses.is_meta or (losses.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        self.compared += 1
        if losses.is_cuda and self.compared & (self.compared - 1):  # to look synchronises: at steps 1, 2, 4, 8, ...
            return
        values = []
        for again in (False, True):
            with self.drawn_again():
                own = float(self._run(output, target, self.reduction))
            values.append(own)
            if again:  # a random criterion has drawn other numbers
                with self.drawn_again():
                    losses = self(output, target, samples=len(losses))
            ours = float(self.reduce(losses))
            if not math.isfinite(own) or abs(own - ours) <= 1e-4 * float(self.reduce(losses.abs())) or not math.isfinite(ours):
                return
        name = type(self.criterion).__name__ if self.module else getattr(self.function, "__name__", self.criterion)
        if values[0] != values[1]:
            raise ValueError(
                f"criterion {name} has a {self.reduction} of {values[0]:.6g}, and of the same outputs then one of {values[1]:.6g}: it "
                "draws random numbers from a generator, or keeps state, that is out of reach: hold that as an attribute of the criterion"
            )
        raise ValueError(
            f"criterion {name} has a {self.reduction} of {own:.6g}, and its per-sample losses "
            f"have {ours:.6g}: give it reduction='none', or pass a function that returns a loss for each sample, and average them yourself"
        )

    def generators(self) -> list[Any]:
        return [*shared_generators(), *(self.held or self.look()).generators]

    def states(self) -> list[Callable[[], object]]:
        """Of the generators that it may draw from."""
        return [state for g in self.generators() if (state := drawn(g)) is not None]

    def drew(self, before: list[Callable[[], object]]) -> bool:
        """Whether it has drawn since."""
        return [*map(state_of, before)] != [*map(state_of, self.states())]

    def rehearse(self, output: Any, target: Any) -> list[Callable[[], object]]:
        """See what it draws of outputs in their own dtype, and where that leaves the generators; they are put back."""
        plain = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(differs(t)).view_as(t), output)
        with torch.enable_grad(), self.drawn_again(), (self.held or self.look()).lent(None), Draws() as draws:
            self.criterion(plain, target)
            self.draws = draws
            return self.states()

    def drawn_again(self, states: Iterable[Callable[[], object]] = ()) -> contextlib.AbstractContextManager[None]:
        """Its generators draw from those states on, and are then what they were."""
        return drawn_again(states, self.generators())

    def scale(self, logits: Tensor, target: Any, losses: Tensor) -> Any:
        """What makes a mean of per-sample losses the criterion's, where class weights and ignored targets count; None for 1."""
        if self.reduction != "mean":
            return None
        if not self.weighted or not isinstance(target, Tensor) or target.is_floating_point():
            return len(losses) / losses.numel()
        if self.module:
            weight, ignored = self.criterion.weight, self.criterion.ignore_index
        else:
            weight, ignored = self.keywords.get("weight"), self.keywords.get("ignore_index", -100)
        valid = target != ignored
        dtype = torch.promote_types(logits.dtype, torch.float32)
        if weight is None:
            return len(target) / valid.sum().to(dtype)
        return len(target) / weight.to(dtype)[torch.where(valid, target, 0)].mul(valid).sum()

    def reduce(self, losses: Tensor) -> Tensor:
        if self.reduction == "batchmean":
            return losses.mean()
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()


@contextlib.contextmanager
def _reduced(criterion: Any, reduction: str) -> Iterator[None]:
    """While it lasts, a module has this reduction."""
    own = getattr(criterion, "reduction", None) if isinstance(criterion, nn.Module) else None
    if own is None:
        yield
        return
    criterion.reduction = reduction
    try:
        yield
    finally:
        criterion.reduction = own


@dataclass(frozen=True)
class Weighted:
    """The gradient of ``(c * losses).sum()``, c the weight of each loss, where ``c * e`` is not all of it."""

    losses: Tensor
    z: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    coupled: bool

    def __call__(self, c: Tensor) -> list[Tensor]:
        """By the tensors of the output, and by the others."""
        to = (*self.z, *self.others)
        gradients = torch.autograd.grad(self.losses, to, c.to(self.losses.dtype), retain_graph=True, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, to, strict=True)]


def others(losses: Tensor, z: list[Tensor]) -> tuple[Tensor, ...]:
    """What the losses send a gradient to, beside z."""
    found: dict[int, Tensor] = {}
    todo, seen = [losses.grad_fn], set[Any]()
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [before for before, _ in node.next_functions]
        t = getattr(node, "variable", None)
        if isinstance(t, Tensor) and all(t is not own for own in z):
            found[id(t)] = t
    return tuple(found.values())


def couples(losses: Tensor, z: list[Tensor], e: tuple[Tensor | None, ...], layouts: Sequence[Layout | None]) -> bool:
    """Whether a loss depends on rows of the output that are another's."""
    c = torch.linspace(1, 2, len(losses), dtype=losses.dtype, device=losses.device)
    for g, own, layout in zip(torch.autograd.grad(losses, z, c, retain_graph=True, allow_unused=True), e, layouts, strict=True):
        if g is not None and own is not None and g.numel() and (layout is not None or len(own) == len(c)):
            want = own * c.view(-1, *[1] * (own.ndim - 1)) if layout is None or len(own) == len(c) else layout.scaled(own, c)
            size = want.abs()
            if bool(((g - want).abs() > 1e-6 * (size + size.max())).any()):  # which nan is not
                return True
    return False


def error(
    per_sample: PerSample, output: Any, target: Any, samples: int = -1, layouts: Sequence[Layout] = ()
) -> tuple[Tensor, tuple[Tensor, ...], Weighted | None]:
    """A loss for each row, and e = dL/doutput in the shape of each tensor of the output, all float64; ``layouts`` of these."""
    leaves, spec = tree_flatten(tree_map_only(Tensor, lambda t: t.double() if differs(t) else t, output))
    at = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point()]
    more = per_sample.others or (isinstance(target, Tensor) and target.requires_grad)
    if torch.compiler.is_compiling():  # Dynamo traces torch.func.grad, and torch.autograd.grad only behind a switch
        if more or per_sample.coupled:
            raise RuntimeError(
                "a loss that gives gradients to more than the output, or whose samples depend on each other, cannot be compiled: "
                "leave torch.compile out"
            )

        def total(*z: Tensor) -> tuple[Tensor, Tensor]:
            filled = list(leaves)
            for i, t in zip(at, z, strict=True):
                filled[i] = t
            losses = per_sample(tree_unflatten(filled, spec), target, samples=samples)
            return losses.sum(), losses

        e, losses = torch.func.grad(total, argnums=tuple(range(len(at))), has_aux=True)(*(leaves[i] for i in at))
        return losses, tuple(e), None
    per_sample.dtype = next(t.dtype for t in tree_leaves(output) if isinstance(t, Tensor) and differs(t))
    with torch.enable_grad():
        z = [leaves[i].detach().requires_grad_() for i in at]
        for i, t in zip(at, z, strict=True):
            leaves[i] = t.view_as(t)  # hooks of FlopCounterMode's on a criterion's inputs expect no leaves
        losses = per_sample(tree_unflatten(leaves, spec), target, samples=samples, clean=True)
        captured = losses.is_cuda and torch.cuda.is_current_stream_capturing()
        free, own = not (losses.is_meta or captured), not per_sample.plain  # which may begin to, at any step
        beside = others(losses, z) if own or more or (free and per_sample.steps == 0) else ()
        per_sample.steps += free
        seldom = losses.is_cuda and per_sample.steps & (per_sample.steps - 1)  # as to look at numbers synchronises
        compares = own and free and not (per_sample.coupled or seldom)
        e = torch.autograd.grad(losses.sum(), z, allow_unused=True, retain_graph=compares or bool(beside) or per_sample.coupled)
        if beside:
            per_sample.others = True
        if compares:
            per_sample.coupled = couples(losses, z, e, layouts or [None] * len(z))
        weighted = Weighted(losses, tuple(z), beside, per_sample.coupled) if beside or per_sample.coupled else None
    with torch.no_grad():
        per_sample.compare(tree_unflatten([t.detach() if isinstance(t, Tensor) else t for t in leaves], spec), target, losses)
    return losses.detach(), tuple(torch.zeros_like(t) if g is None else g for g, t in zip(e, z, strict=True)), weighted
