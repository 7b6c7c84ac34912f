"""The loss that sees both streams: its value is the clean loss, its backward the learned feedback."""

from __future__ import annotations

import copy
import functools
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fbkernels import ops
from fbkernels._compile import whole
from fbkernels._tree import differs, flatten, unflatten
from fbkernels.criterion import PerSample, Weighted, error
from fbkernels.layout import Layout, Rows
from fbkernels.training.autograd import Deliver
from fbkernels.training.network import Network, capturing
from fbkernels.training.processes import Processes, several
from fbkernels.training.step import Step
from fbkernels.training.warmup import Zeros, stand


def unwrap(net: nn.Module) -> nn.Module:
    """The converted network inside torch.compile or another wrapper."""
    while not isinstance(getattr(net, "feedback", None), Network):
        inner = getattr(net, "_orig_mod", None) or getattr(net, "module", None)
        if not isinstance(inner, nn.Module):
            raise TypeError(f"net must be a network converted by fbkernels.convert, got {type(net).__name__}")
        net = inner
    return net


def network_of(net: nn.Module) -> Network:
    """What the points of a converted network share."""
    network = unwrap(net).feedback
    assert isinstance(network, Network)
    return network


class PerturbedLoss(nn.Module):
    """``criterion(net(x), y)`` for a converted network.

    The value is the clean loss. In training it also computes ``dL_n = L~_n - L_n`` and ``e_n = dL_n/dlogits_n`` (in float64, per sample,
    not divided by N or by a loss scale), lets the rule learn from them, and advances the network's step. Layerwise rules that measure
    nothing (``Fixed``, ``WeightMirror``, those that follow W) leave the output its gradient by the criterion. Its backward hands
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
    * ``SyntheticGradient`` the sum of B's updates; ``Fixed``, ``WeightMirror`` and rules that follow W nothing.

    and the number of rows and of skipped samples; in a warm-up, and then in one step of eight, also two numbers and one for each point, the
    sums behind ``metrics.explained``. Make the loss after ``init_process_group``, with the wrapped network where the group is
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
        group, network = getattr(net, "process_group", None), network_of(net)
        sharded = [n for n, m in unwrap(net).named_modules() if any(c.__name__ == "FSDPModule" for c in type(m).__mro__)]
        if sharded and sharded != [""]:
            raise ValueError(f"fully_shard the network as a whole, not its part {sharded[-1]!r}: no gradient reaches a part's input")
        if sharded and (network.settings.rule.follows or network.settings.rule.supervised):
            raise ValueError(
                f"{network.settings.rule!r} does not work with fully_shard, which hides W between steps: use DistributedDataParallel"
            )
        if not several(group) or network.step.is_meta:
            network.processes = None
        elif network.processes is None or network.processes.group is not (group or torch.distributed.group.WORLD):
            network.processes = Processes(group, network.step.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> PerturbedLoss:
        """Of the same network, unless that is copied with it."""
        own, net = self.__dict__, self._net[0]
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        memo.setdefault(id(net), net)
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in own.items()})
        return new

    def forward(self, output: Any, target: Any) -> Tensor:
        root = self._net[0]
        network = root.feedback
        assert isinstance(network, Network)
        if not root.training or not torch.is_grad_enabled():
            plain: Tensor = self.criterion(output, target)
            if plain.requires_grad and not (network.told or torch.compiler.is_compiling()):
                plain.register_hook(functools.partial(backprops, weakref.ref(network)))
            return plain
        return self._perturbed(network, output, target)

    @whole
    def _perturbed(self, network: Network, output: Any, target: Any) -> Tensor:
        if network.processes is None and not torch.compiler.is_compiling() and not network.step.is_meta and several():
            raise RuntimeError("several processes: make PerturbedLoss after torch.distributed.init_process_group")
        step, rule = network.current, network.settings.rule
        if step is not None:
            step.sent.taken = True
        chosen = None if step is None else given(step, output)
        exact = network.settings.layerwise and step is not None and not (rule.measures or network.probe or step.constant)
        if chosen is None and exact and step is not None and descends(step, output):  # autograd knows the rest
            chosen = [*range(len(step.outputs))]
        if network.placement is None:
            raise ValueError(
                "the network of this PerturbedLoss has taken no training forward: it is not the one that gave this output. A loss pickled "
                "alone has a network of its own: pickle it together with the network, or make another, PerturbedLoss(criterion, net)"
            )
        if step is None or chosen is None:
            raise ValueError(
                "PerturbedLoss must be called once, with the output of its own network's last training forward, or that reshaped, sliced, "
                "cast or scaled with its samples in order; what else follows, a full backward hook on the whole network too, belongs into "
                "forward, a loss of several parts is one criterion, mixup mixes the targets instead of the losses, and what takes several "
                "forwards, of pairs say, concatenates their batches to one"
            )
        if not (torch.compiler.is_compiling() or network.static):
            stand(network, step.constant or (step.held is not None and bool(step.held)))
        if exact:
            loss: Tensor = self.criterion(output, target)
            with torch.no_grad():
                if not (network.looks and all(math.isfinite(float(step.outputs[i].sum())) for i in chosen)):
                    flat = [step.layouts[i].units_of(step.outputs[i], step.samples) for i in chosen]
                    network.skip(torch.isfinite(flat[0] if len(flat) == 1 else torch.cat(flat, 1)).all(1))
            learns = rule.adapts and step.learning and (step.samples > 0 or step.part is not None)
        else:
            loss, learns = self._measured(step, chosen, output, target)
        step.release()
        network.current = None
        with torch.no_grad():
            if learns and rule.mirrors:
                read = [network.points[name] for name in step.placement.points if network.points[name].weight is not None]
                if read:
                    rule.reflect(read, network.step, step.rows_read)
            network.advance()
        network.warn()
        return loss

    def _measured(self, step: Step, chosen: list[int], output: Any, target: Any) -> tuple[Tensor, bool]:
        """The loss of what e and dL were taken of, and whether B learns from them."""
        network, rule = step.network, step.network.settings.rule
        losses, e, dL, dy, ok = signals(step, self.per_sample, output, chosen, target)
        y = step.outputs[chosen[0]]
        exact = torch.promote_types(y.dtype, torch.float32)
        dtype = torch.promote_types(next(iter(step.activities.values()), y).dtype, torch.float32)  # B's, whatever the output is cast to
        with torch.no_grad():
            flat = [step.layouts[i].units_of(t, step.samples) for i, t in zip(chosen, e, strict=True)]
            m = network.measure(step, flat[0] if len(flat) == 1 else torch.cat(flat, 1), dL, dy, ok, dtype)
        perturbed = step.perturbing and any(step.changes[i] is not None for i in chosen)
        learns = rule.adapts and step.learning and (perturbed or not rule.perturbs) and (step.samples > 0 or step.part is not None)
        out = attach(step, m, losses.to(exact), tuple(t.to(exact) for t in e), chosen, self._anchor)
        if step.held is not None:  # without a look at it: what is compiled or captured goes on when the warm-up ends
            out = torch.where(step.held, out.detach(), out)
        elif step.constant and (parameters := [p for p in self._net[0].parameters() if p.requires_grad]):
            out = Zeros.apply(out, *parameters)
        with torch.no_grad():
            if rule.supervised:
                from fbkernels.metrics import true_gradients

                m.targets = true_gradients(self._net[0], step, self.per_sample, target)
            if learns and not network.settings.layerwise:
                network.schedule(m)
            self.per_sample.advance()
        return self.per_sample.reduce(out), learns


def backprops(owner: weakref.ref[Network], _: Tensor) -> None:
    """A loss in eval mode is differentiated."""
    network = owner()
    if network is not None and not network.told:
        network.told = True
        warnings.warn(
            "the network is in eval mode, where gradients are backprop's: call net.train(), and then .eval() of the norms or dropouts that "
            "are to stay as they are",
            stacklevel=2,
        )


def given(step: Step, output: Any) -> list[int] | None:
    """Which of the network's outputs these are; None where one is not, or there is none."""
    chosen: list[int] = []
    for t in flatten(output)[0]:
        if not isinstance(t, Tensor) or not differs(t):
            continue
        i = next((i for i in range(len(step.outputs)) if same(step, i, t)), None)
        step.own = step.own and i is not None and t is step.outputs[i]
        if i is None:
            i = next((i for i in range(len(step.outputs)) if followed(step, i, t)), None)
        if i is None:
            return None
        step.outputs[i] = t  # the gradient takes the same way back: DistributedDataParallel waits for it at its copy
        chosen.append(i)
    return chosen or None


def descends(step: Step, output: Any) -> bool:
    """Whether all of it is computed from outputs of this step."""
    if torch.compiler.is_compiling():
        return False
    ours = {own.grad_fn for own in step.outputs}
    for t in flatten(output)[0]:
        if isinstance(t, Tensor):
            todo, seen = [t.grad_fn], set[Any]()
            while todo and todo[-1] not in ours:
                node = todo.pop()
                if node is not None and node not in seen:
                    seen.add(node)
                    todo += [before for before, _ in node.next_functions]
            if not todo:
                return False
    return True


def same(step: Step, i: int, t: Tensor) -> bool:
    """Whether t is output i as the network gave it, also where DistributedDataParallel has handed out a copy."""
    edge = step.edges[i]
    if t is step.outputs[i]:
        return edge is None or t.grad_fn is edge.node
    node: Any = getattr(t, "grad_fn", None)
    if type(node).__name__ != "_DDPSinkBackward" or edge is None:
        return False
    return bool(node.next_functions[t.output_nr] == (edge.node, edge.output_nr))


# affine functions, which may stand between the network and its loss: net(x).squeeze(1), .float(), a slice, a temperature
# fmt: off
_AFFINE = {
    "Add", "Alias", "Clone", "Div", "Expand", "Flatten", "Index", "IndexSelect", "Mean", "Mm", "Mul", "Neg", "Permute",
    "ReshapeAlias", "Rsub", "Select", "Slice", "Squeeze", "Sub", "Sum", "T", "ToCopy", "Transpose", "Unflatten", "UnsafeView",
    "Unsqueeze", "View",
}
# fmt: on


def followed(step: Step, i: int, t: Tensor) -> bool:
    """Whether t is output i behind affine functions of torch that leave the samples in order: then it takes that output's place, and its
    change is what they make of it."""
    edge, change = step.edges[i], step.changes[i]
    if edge is None:
        return False
    node: Any = t.grad_fn
    which = t.output_nr  # of what node made
    while node is not None and (node, which) != (edge.node, edge.output_nr):
        before = [way for way in node.next_functions if way[0] is not None]
        if node.name().rstrip("0123456789").removesuffix("Backward") not in _AFFINE or len(before) != 1:
            return False
        ((node, which),) = before
    if node is None or step.partial() or t.ndim == 0 or (step.samples and len(t) % step.samples):
        return False
    n, layout = step.samples, step.layouts[i]
    if n == 0:
        step.changes[i], step.layouts[i] = None if change is None else torch.zeros_like(t), Layout.of(t, n, False, 1, layout.rows)
        return True
    with torch.enable_grad():  # J d as the derivative of J^T v with respect to v
        v = torch.zeros_like(t, requires_grad=True)
        (back,) = torch.autograd.grad(t, edge, v, create_graph=True)

        def image(d: Tensor) -> Tensor:
            return torch.autograd.grad(back, v, d.to(back.dtype), retain_graph=True)[0]

        whose = torch.arange(n, device=t.device, dtype=back.dtype)
        sample = layout.activity(whose[:, None].expand(n, layout.units)).view(back.shape)
        number, one = (image(x).reshape(len(t), -1) for x in (sample, torch.ones_like(sample)))
        if change is not None:
            change = image(change)
    copies, close = len(t) // n, 4 * torch.finfo(back.dtype).eps
    for rows, order in ((Rows(), whose.repeat_interleave(copies)), (Rows(strided=True), whose.repeat(copies))):
        if torch.allclose(number, one * order[:, None].to(one.dtype), rtol=close, atol=0.0):
            step.changes[i], step.layouts[i] = change, Layout.of(t, n, False, 1, rows)
            return True
    return False


def signals(
    step: Step, per_sample: PerSample, output: Any, chosen: list[int], target: Any
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor, Tensor]:
    """A loss for each row, and e in the shape of each output; of the perturbed samples dL [n], dy = y~ - y [n, K], and ok: whether all are
    finite; where not, dL = dy = 0."""
    y = step.outputs[chosen[0]].detach()
    layouts, changes = [step.layouts[i] for i in chosen], [step.changes[i] for i in chosen]
    moves = step.perturbing and any(d is not None for d in changes)
    n = step.perturbed_rows if moves else step.samples
    backend = "reference"
    if (
        per_sample.cross_entropy
        and len(chosen) == 1
        and layouts[0].plain
        and isinstance(target, Tensor)
        and target.dtype == torch.int64
        and y.ndim == 2
        and y.dtype != torch.float64
        and not torch.compiler.is_compiling()
    ):
        backend = ops.backend_of(y, step.network.settings.backend)
    if backend in ("cpp", "triton"):
        moved: Tensor | None = None
        if moves:
            own = step.rows(y)
            moved = (own.double() if backend == "cpp" else own) + changes[0]  # type: ignore[operator]
        losses, e, dL, dy, ok = ops.perturbed_cross_entropy(
            y, moved, target, step.antithetic and moves, scale=per_sample.scale(y, target, y), backend=backend
        )
        return losses, (e,), dL, dy, ok
    if not torch.compiler.is_compiling():
        per_sample.look()
    states = None if per_sample.plain or torch.compiler.is_compiling() or capturing(y) else per_sample.states()
    per_sample.began = states
    losses, e, step.weighted = clean(step, per_sample, output, target, layouts, states)
    with torch.no_grad():
        sides = [layout.units_of(t, step.samples)[:n] for layout, t in zip(layouts, e, strict=True)]
        dy = torch.cat(sides, 1) * 0
        sample = samplewise(step, layouts[0], losses)
        dL = torch.zeros_like(sample[:n])
        if moves:
            leaves, spec = flatten(output)
            at = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and differs(t)]
            beside = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and not differs(t)]
            ds = [
                torch.zeros_like(step.rows(own), dtype=torch.float64) if d is None else d.double()
                for d, own in zip(changes, [step.outputs[i].detach() for i in chosen], strict=True)
            ]
            rows = len(y)
            if states is not None and (per_sample.coupled or per_sample.draws is not None):  # the same numbers, and company, for each row
                sides_of = [step.sides(leaves[i].detach().double(), d) for i, d in zip(at, ds, strict=True)]
                drawn_alike = []
                for moved_leaves in zip(*sides_of, strict=True):
                    for i, t in zip(at, moved_leaves, strict=True):
                        leaves[i] = t
                    with per_sample.drawn_again(states):
                        drawn_alike.append(
                            samplewise(step, layouts[0], per_sample(unflatten(leaves, spec), target, samples=step.samples))[:n]
                        )
                L = torch.cat(drawn_alike)
            else:
                for i, d in zip(at, ds, strict=True):
                    leaves[i] = step.rows(leaves[i].detach()).double() + d
                for i in beside:
                    leaves[i] = step.rows(leaves[i])
                targets = tree_map_only(Tensor, lambda t: step.rows(t) if step.partial() and t.ndim and len(t) == rows else t, target)
                every = target if isinstance(target, Tensor) else None
                L = per_sample(unflatten(leaves, spec), targets, every, samples=n * (1 + step.antithetic))
            if step.antithetic:
                dL = (L[:n] - L[n:]) / 2
                dy = torch.cat([layout.units_of((d[:n] - d[n:]) / 2, n) for layout, d in zip(layouts, ds, strict=True)], 1)
            else:
                dL = samplewise(step, layouts[0], L, n) - sample[:n]
                dy = torch.cat([layout.units_of(d, n) for layout, d in zip(layouts, ds, strict=True)], 1)
        ok = torch.isfinite(sample[:n]) & torch.isfinite(dL) & torch.isfinite(dy).all(1)
        for side in sides:
            ok = ok & torch.isfinite(side).all(1)
        return losses, e, torch.where(ok, dL, 0.0), torch.where(ok[:, None], dy, 0.0), ok


def clean(
    step: Step, per_sample: PerSample, output: Any, target: Any, layouts: list[Layout], states: list[Callable[[], object]] | None
) -> tuple[Tensor, tuple[Tensor, ...], Weighted | None]:
    """Losses and e; a criterion that draws from the generators, whose ``states`` these are, draws what the plain one would."""
    own = tree_map_only(Tensor, Tensor.detach, output)
    if states is None or per_sample.draws is None:
        found = error(per_sample, own, target, step.samples, layouts)
        if states is None or not per_sample.drew(states):
            return found
        for back in states:
            back()
    after = per_sample.rehearse(output, target)
    found = error(per_sample, own, target, step.samples, layouts)
    if per_sample.drew(after):
        raise ValueError(
            "criterion draws other random numbers in float64, in which a loss is taken where B learns from noise, than of the outputs as "
            f"they are, {step.outputs[0].dtype}: let what it draws have a dtype of its own, torch.randn(len(output), dtype=torch.float32)"
        )
    return found


def samplewise(step: Step, layout: Any, losses: Tensor, n: int | None = None) -> Tensor:
    """[N]: the sum over a sample's rows, where the criterion has one loss for each row."""
    n = step.samples if n is None else n
    return losses if len(losses) == n else layout.rows.first(losses, n).reshape(n, -1).sum(1)


def attach(step: Step, m: Any, losses: Tensor, e: tuple[Tensor, ...], chosen: list[int], anchor: Tensor | None = None) -> Tensor:
    """The losses with the feedback as their backward."""
    network, settings = step.network, step.network.settings
    # what no chosen output depends on has no gradient: an auxiliary head that this loss leaves out
    reach = step.placement.reach
    names = [name for name in step.activities if any(i in reach.get(name, chosen) for i in chosen)]
    points = [network.points[name] for name in names]
    outputs = [step.outputs[i] for i in chosen]
    feedback: tuple[Tensor, ...] = ()
    activities: tuple[Tensor, ...] = ()
    weighted, step.weighted = step.weighted, None
    if settings.rule.private:
        padding = step.samples - m.rows
        given = [settings.rule.gradients(point, m) for point in points]
        feedback = tuple(nn.functional.pad(g, (*[0] * (2 * g.ndim - 1), padding)) if padding else g for g in given)
        activities = tuple(step.activities[name] for name in names)
    elif not settings.layerwise:
        K = m.regressor.shape[-1]
        feedback = tuple(point.create((point.units, K), step.activities[name]) for name, point in zip(names, points, strict=True))
        activities = tuple(step.activities[name] for name in names)
    layouts = (*(step.layouts[i] for i in chosen), *(point.layout for point in points if activities))
    blocks = tuple(step.blocks.get(name) for name in names) if activities else ()
    for point, block in zip(points, blocks, strict=False):
        if block is not None and not torch.compiler.is_compiling() and block[1]._version != block[0].version:
            raise RuntimeError(f"the activity of point {point.name!r} was modified in place, and its gradient needs it: write h = h + ...")
    out: Tensor = Deliver.apply(
        losses,
        e,
        network.state.get("C"),
        feedback,
        blocks,
        layouts,
        settings.rule.private,
        step.record(m),
        step.sent if step.own and not (settings.layerwise or torch.compiler.is_compiling()) else None,
        anchor,
        weighted,
        *outputs,
        *activities,
        *(() if weighted is None else weighted.others),
    )
    return out
