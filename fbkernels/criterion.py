"""Any criterion as per-sample losses: in float64, with e = dL/doutput, and what a perturbation of the output does to them (SPEC 2)."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten


class PerSample:
    """Per-sample losses of a criterion in float64, so that L~ - L of two nearly equal losses keeps its digits (SPEC 2).

    ``reduction``: how the criterion itself sums them up, "mean", "sum" or "none". ``cross_entropy``: whether it is nn.CrossEntropyLoss or
    its function, with nothing but a reduction set.
    """

    def __init__(self, criterion: Callable[..., Tensor]) -> None:
        if not callable(criterion):
            raise TypeError(f"criterion must be a loss module or function, got {criterion!r}")
        self.criterion = criterion
        self.reduction = "none"
        self.exact: Callable[..., Tensor] = criterion
        if isinstance(criterion, nn.Module):
            if any(p.requires_grad for p in criterion.parameters()):
                raise ValueError("criterion has parameters that require a gradient, which would not get one: put them into the network")
            exact: Any = copy.deepcopy(criterion).double()
            if hasattr(exact, "reduction"):
                self.reduction, exact.reduction = exact.reduction, "none"
            self.exact = exact
        elif isinstance(criterion, functools.partial) or "reduction" in inspect.signature(criterion).parameters:
            keywords = criterion.keywords if isinstance(criterion, functools.partial) else {}
            if "reduction" in inspect.signature(criterion).parameters:
                self.reduction = keywords.get("reduction", inspect.signature(criterion).parameters["reduction"].default)
                keywords = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in keywords.items()}
                self.exact = functools.partial(criterion, **{**keywords, "reduction": "none"})
        e: Any = self.exact
        self.cross_entropy = False
        if type(e) is nn.CrossEntropyLoss:
            self.cross_entropy = (e.weight, e.label_smoothing, e.ignore_index) == (None, 0.0, -100)
        elif isinstance(e, functools.partial):
            self.cross_entropy = e.func is nn.functional.cross_entropy and not e.args and e.keywords.keys() == {"reduction"}

    def __call__(self, output: Any, target: Any, whole: Any = None) -> Tensor:
        """A loss for each row of the output, such that their mean, or sum, is the criterion's value; ``whole``: the target of the whole
        batch."""
        logits: Tensor = next(t for t in tree_leaves(output) if isinstance(t, Tensor))
        target = tree_map_only(Tensor, lambda t: t.to(logits.dtype) if t.is_floating_point() else t, target)
        losses = self._losses(output, target)
        if losses.ndim == 0 or len(losses) != len(logits):
            raise ValueError(
                f"criterion must give one loss per sample, got shape {tuple(losses.shape)} for {len(logits)} samples: "
                "pass a module or function with a `reduction` argument, or one that returns a loss for each sample"
            )
        if self.reduction == "none" and losses.ndim > 1:
            raise ValueError(
                f"criterion with reduction='none' must return shape ({len(logits)},), got {tuple(losses.shape)}: use 'mean' or 'sum'"
            )
        per = losses.flatten(1).sum(1) if losses.ndim > 1 else losses
        scale = self.scale(logits, target if whole is None else whole, losses)
        return per if scale is None else per * scale

    def _losses(self, output: Any, target: Any) -> Tensor:
        if isinstance(self.criterion, nn.Module):
            return self.exact(output, target)
        try:
            return self.exact(output, target)
        except RuntimeError:  # a function that captured float32 tensors, class weights say, takes no float64
            single = lambda t: t.float() if t.is_floating_point() else t  # noqa: E731
            dtype = next(t.dtype for t in tree_leaves(output) if isinstance(t, Tensor))
            return self.exact(tree_map_only(Tensor, single, output), tree_map_only(Tensor, single, target)).to(dtype)

    def scale(self, logits: Tensor, target: Any, losses: Tensor) -> Any:
        """What makes a mean of per-sample losses the criterion's, in which class weights and ignored targets count; None for 1."""
        if self.reduction != "mean":
            return None
        weight, ignored = getattr(self.exact, "weight", None), getattr(self.exact, "ignore_index", None)
        if isinstance(self.exact, functools.partial):
            weight, ignored = self.exact.keywords.get("weight"), self.exact.keywords.get("ignore_index", -100)
        if not isinstance(target, Tensor) or target.is_floating_point() or ignored is None:
            return len(losses) / losses.numel()
        valid = target != ignored
        dtype = torch.promote_types(logits.dtype, torch.float32)
        if weight is None:
            return len(target) / valid.sum().to(dtype)
        return len(target) / weight.to(dtype)[torch.where(valid, target, 0)].mul(valid).sum()

    def reduce(self, losses: Tensor) -> Tensor:
        if self.reduction == "batchmean":
            return losses.mean()
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()


def error(per_sample: PerSample, output: Any, target: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A loss for each row, and e = dL/doutput in the shape of each tensor of the output, all float64."""
    leaves, spec = tree_flatten(tree_map_only(Tensor, torch.Tensor.double, output))
    at = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point()]
    if torch.compiler.is_compiling():  # Dynamo traces torch.func.grad, and torch.autograd.grad only behind a switch

        def total(*z: Tensor) -> tuple[Tensor, Tensor]:
            filled = list(leaves)
            for i, t in zip(at, z, strict=True):
                filled[i] = t
            losses = per_sample(tree_unflatten(filled, spec), target)
            return losses.sum(), losses

        e, losses = torch.func.grad(total, argnums=tuple(range(len(at))), has_aux=True)(*(leaves[i] for i in at))
        return losses, tuple(e)
    with torch.enable_grad():
        z = [leaves[i].detach().requires_grad_() for i in at]
        for i, t in zip(at, z, strict=True):
            leaves[i] = t.view_as(t)  # hooks of FlopCounterMode's on a criterion's inputs expect no leaves
        losses = per_sample(tree_unflatten(leaves, spec), target)
        e = torch.autograd.grad(losses.sum(), z, allow_unused=True)
    return losses.detach(), tuple(torch.zeros_like(t) if g is None else g for g, t in zip(e, z, strict=True))
