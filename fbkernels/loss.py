"""The loss that sees both streams: its value is the clean loss, its backward the learned feedback."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fbkernels import ops
from fbkernels.autograd import Deliver
from fbkernels.feedback import Feedback
from fbkernels.processes import Processes, several


def unwrap(net: nn.Module) -> nn.Module:
    """The converted network inside torch.compile or another wrapper."""
    while not isinstance(getattr(net, "feedback", None), Feedback):
        inner = getattr(net, "_orig_mod", None) or getattr(net, "module", None)
        if not isinstance(inner, nn.Module):
            raise TypeError(f"net must be a network converted by fbkernels.convert, got {type(net).__name__}")
        net = inner
    return net


def owner_of(net: nn.Module) -> Feedback:
    """What the points of a converted network share."""
    owner = unwrap(net).feedback
    assert isinstance(owner, Feedback)
    return owner


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

    def __call__(self, logits: Tensor, target: Any, whole: Any = None) -> Tensor:
        """[N] losses, such that their mean, or sum, is the criterion's value; ``whole``: the target of the batch that these rows are of."""
        target = target.to(logits.dtype) if isinstance(target, Tensor) and target.is_floating_point() else target
        losses = self._losses(logits, target)
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

    def _losses(self, logits: Tensor, target: Any) -> Tensor:
        if isinstance(self.criterion, nn.Module):
            return self.exact(logits, target)
        try:
            return self.exact(logits, target)
        except RuntimeError:  # a function that captured float32 tensors, class weights say, takes no float64
            single = target.float() if isinstance(target, Tensor) and target.is_floating_point() else target
            return self.exact(logits.float(), single).to(logits.dtype)

    def scale(self, logits: Tensor, target: Any, losses: Tensor) -> Any:
        """What makes a mean of per-sample losses the criterion's, in which class weights and ignored targets count; None for 1."""
        if self.reduction != "mean":
            return None
        weight, ignored = getattr(self.exact, "weight", None), getattr(self.exact, "ignore_index", None)
        if isinstance(self.exact, functools.partial):
            weight, ignored = self.exact.keywords.get("weight"), self.exact.keywords.get("ignore_index", -100)
        if target.is_floating_point() or ignored is None:
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


class PerturbedLoss(nn.Module):
    """``criterion(net(x), y)`` for a converted network.

    The value is the clean loss. In training it also computes ``dL_n = L~_n - L_n`` and ``e_n = dL_n/dlogits_n`` (in float64, per sample,
    not divided by N or by a loss scale), lets the rule learn from them, and advances the network's step. Its backward hands
    ``c_n e_n`` to the logits, c_n the weight of sample n in whatever is differentiated (1/N of a mean, times a loss scale), and
    ``c_n e_n B_l^T`` to each hidden activity (``direct``), or starts the chain of errors through B (``layerwise``).

    Args:
        criterion: a loss module or function with per-sample losses: one with a ``reduction`` of "mean", "sum" or "none", or a callable
            ``(output, target) -> [N]``.
        net: the network from ``fbkernels.convert``, also inside torch.compile or DistributedDataParallel.

    **Several processes** (torch.distributed). The batch is that of all of them, rank 0's rows first: each takes its rows of the batch's
    noise, parts may differ in size, and B, statistics and step are on every process what one process would have, up to the order of
    float32 sums. They are replicated and never sent; beside W's gradients, a step with a perturbed stream sends, in float32,

    * ``direct``: ``(e_n, dL_n)`` of each sample, K + 1 numbers; ``Joint`` K, a row of G. With ``rank`` K is that. Every process regenerates
      the noise of all.
    * ``layerwise``: at the end of the backward pass the sum of B's updates, as large as W, ``Ridge`` also R^T R [m, m] in float64; for
      rules that are no sum over samples (``NormalizedLMS``, your own without ``additive``) the regressors of each sample instead.
    * ``SyntheticGradient`` the sum of B's updates; ``Fixed`` and rules that follow W nothing.

    and the number of rows and of skipped samples. Make the loss after ``init_process_group``, with the wrapped network where the group is
    not the default one. All processes take the same steps: no Join. DistributedDataParallel averages the gradients of W over processes:
    those of a mean are the batch's where parts are equal; else multiply the loss by ``processes * rows / batch``, or each process counts
    alike. B counts each sample alike in any case. Class weights and ignored targets are averaged in each process. Batch norm has each
    process' own statistics, nn.SyncBatchNorm all processes'. ``fully_shard(net)`` (FSDP2) shards W as a whole, not layer by layer, and B
    stays whole on each process.

    Raises:
        TypeError: net is not a converted network.
        ValueError: no per-sample losses; logits that are not the output of the network's last forward; ``fully_shard`` of a part of the
            network, or with a rule that reads W or copies the network; at the first step, processes that differ in rule, seed, points or B.
        RuntimeError: called inside torch.func.grad, vmap or jvp, which would differentiate past the feedback (pytorch #193279); several
            processes, and torch.compile or a loss that was made before ``init_process_group``.
    """

    def __init__(self, criterion: Callable[..., Tensor], net: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion
        self.per_sample = PerSample(criterion)
        self._anchor = torch.zeros((), requires_grad=True)  # keeps loss.backward() legal in warm-up, when nothing else is attached
        self._net = (unwrap(net),)  # a tuple: the loss does not own the network's parameters
        group, owner = getattr(net, "process_group", None), owner_of(net)
        sharded = [n for n, m in unwrap(net).named_modules() if any(c.__name__ == "FSDPModule" for c in type(m).__mro__)]
        if sharded and sharded != [""]:
            raise ValueError(f"fully_shard the network as a whole, not its part {sharded[-1]!r}: no gradient reaches a part's input")
        if sharded and (owner.rule.follows or owner.rule.supervised):
            raise ValueError(f"{owner.rule!r} does not work with fully_shard, which hides W between steps: use DistributedDataParallel")
        if not several(group) or owner.step.is_meta:
            owner.processes = None
        elif owner.processes is None or owner.processes.group is not (group or torch.distributed.group.WORLD):
            owner.processes = Processes(group, owner.step.device)

    def forward(self, logits: Tensor, target: Any) -> Tensor:
        root = self._net[0]
        net = root.feedback
        assert isinstance(net, Feedback)
        if not root.training:
            return self.criterion(logits, target)
        if net.processes is None and not torch.compiler.is_compiling() and not net.step.is_meta and several():
            raise RuntimeError("several processes: make PerturbedLoss after torch.distributed.init_process_group")
        if net.logits is None or not _same(logits, net.logits):
            raise ValueError(
                "PerturbedLoss must be called once, with the output of the network's last training forward; a loss of several parts is one "
                "criterion, and mixup mixes the targets instead of the losses"
            )
        losses, e, *change = signals(net, self.per_sample, logits.detach(), target)
        with torch.no_grad():
            m = net.measure(e, *change)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        perturbed = net.perturbing and net.perturbed is not None
        learns = net.rule.adapts and net.learning and (perturbed or not net.rule.perturbs)
        out = attach(net, m, losses.to(dtype), e.to(dtype), logits, self._anchor, learns)
        net.activities, net.blocks, net.logits = {}, {}, None
        with torch.no_grad():
            if net.rule.supervised:
                from fbkernels.metrics import true_gradients

                m.targets = true_gradients(root, self.per_sample, target)
            if learns and not net.layerwise:
                net.schedule(m)
            net.advance()
        net.warn()
        return self.per_sample.reduce(out)


def _same(logits: Tensor, own: Tensor) -> bool:
    """Whether they are the network's own output, also where DistributedDataParallel has handed out a copy."""
    if logits is own:
        return True
    node: Any = getattr(logits, "grad_fn", None)
    return type(node).__name__ == "_DDPSinkBackward" and node.next_functions[0][0] is own.grad_fn


def signals(net: Feedback, per_sample: PerSample, y: Tensor, target: Any) -> tuple[Tensor, ...]:
    """Losses [N] and e [N, K]; of the perturbed samples dL, dy = y~ - y, and ok: whether all four are finite; where not, dL = dy = 0."""
    moved = net.perturbed.detach() if net.perturbing and net.perturbed is not None else None
    if (
        per_sample.cross_entropy
        and isinstance(target, Tensor)
        and target.dtype == torch.int64
        and y.ndim == 2
        and y.dtype != torch.float64
        and not torch.compiler.is_compiling()
        and ops.backend_of(y, net.backend) == "triton"
    ):
        antithetic = net.antithetic and moved is not None
        return ops.perturbed_cross_entropy(  # type: ignore[no-any-return]
            y, moved, target, antithetic, scale=per_sample.scale(y, target, y), backend="triton"
        )
    losses, e = error(per_sample, y.double(), target)
    with torch.no_grad():
        n = len(losses) if moved is None else net.perturbed_rows
        dL, dy = torch.zeros_like(losses[:n]), torch.zeros_like(e[:n])
        if moved is not None:
            targets = tree_map_only(Tensor, lambda t: net.rows(t) if t.ndim and len(t) == len(y) else t, target)
            whole = target if isinstance(target, Tensor) else None
            moved = moved.double()
            L, p = per_sample(moved, targets, whole), moved.flatten(1)
            if net.antithetic:
                dL, dy = (L[:n] - L[n:]) / 2, (p[:n] - p[n:]) / 2
            else:
                dL, dy = L - losses[:n], p - y.flatten(1)[:n].double()
        ok = torch.isfinite(losses[:n]) & torch.isfinite(e[:n]).all(1) & torch.isfinite(dL) & torch.isfinite(dy).all(1)
        return losses, e, torch.where(ok, dL, 0.0), torch.where(ok[:, None], dy, 0.0), ok


def error(per_sample: PerSample, logits: Tensor, target: Any) -> tuple[Tensor, Tensor]:
    """Per-sample losses and e = dL_n/dlogits_n [N, outputs], both float64."""
    if torch.compiler.is_compiling():  # Dynamo traces torch.func.grad, and torch.autograd.grad only behind a switch

        def total(z: Tensor) -> tuple[Tensor, Tensor]:
            losses = per_sample(z, target)
            return losses.sum(), losses

        e, losses = torch.func.grad(total, has_aux=True)(logits)
        return losses, e.flatten(1)
    with torch.enable_grad():
        z = logits.requires_grad_()
        losses = per_sample(z, target)
        (e,) = torch.autograd.grad(losses.sum(), z)
    return losses.detach(), e.flatten(1)


def attach(net: Feedback, m: Any, losses: Tensor, e: Tensor, logits: Tensor, anchor: Tensor | None = None, learns: bool = False) -> Tensor:
    """The losses with the feedback as their backward."""
    points = [net.points[name] for name in net.activities]
    record = None
    feedback: tuple[Tensor, ...] = ()
    activities: tuple[Tensor, ...] = ()
    if net.rule.private:
        padding = len(logits) - m.rows
        given = [net.rule.gradients(point, m) for point in points]
        feedback = tuple(nn.functional.pad(g, (*[0] * (2 * g.ndim - 1), padding)) if padding else g for g in given)
        activities = tuple(net.activities.values())
    elif net.layerwise:

        def record(c: Tensor) -> None:
            if learns and m.scale is None:
                net.schedule(m)
            m.scale = c.detach()
    else:
        feedback = tuple(point.create((point.units, net.rank or e.shape[1]), logits) for point in points)
        activities = tuple(net.activities.values())
    layouts = tuple((point.channels_first, net.share) for point in points) if activities else ()
    blocks = tuple(net.blocks.get(name) for name in net.activities) if activities else ()
    for point, block in zip(points, blocks, strict=False):
        if block is not None and not torch.compiler.is_compiling() and block[1]._version != block[0].version:
            raise RuntimeError(f"the activity of point {point.name!r} was modified in place, and its gradient needs it: write h = h + ...")
    out: Tensor = Deliver.apply(
        losses, e, net.state.get("C"), feedback, blocks, layouts, net.rule.private, record, anchor, logits, *activities
    )
    return out
