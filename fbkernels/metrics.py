"""How close learned feedback is to backprop, and what shows it while a network trains."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map_only

from fbkernels.criterion import PerSample, error
from fbkernels.loss import PerturbedLoss, attach, network_of, signals, unwrap
from fbkernels.placement import layer_of
from fbkernels.training.network import Network
from fbkernels.training.step import Step


def alignment(net: nn.Module, criterion: Callable[..., Tensor], x: Tensor, y: Any) -> dict[str, dict[str, float]]:
    """Learned against true gradients on one batch, a dictionary of numbers for each point.

    All in float64 on a copy of the network, without noise, with the batch statistics and dropout masks of a training step.

    * ``angle``: degrees, 0 to 180, between the learned and the true ``dL/dh_l`` of the whole batch, as one vector each.
    * ``update_angle``: the same between the gradients of the parameters of the layer that the point is behind.
    * ``weight_angle``: between B and what it stands for: W_(l+1)^T in ``layerwise``; in ``direct`` the best linear map from e, or what
      ``rank`` leaves of it, to the true gradient on this batch.
    * ``sign_congruence``: fraction of B's entries with that map's sign; 0 counts half.
    * ``relative_error``: ``|W - B| / |W|``; ``projected_error``: the same weighted by the regressors, ``|(W - B) R^T| / |W R^T|``, the one
      that theory speaks of, since B is seen through its regressors only.
    * ``norm_ratio``: ``|learned| / |true|`` of dL/dh_l.

    Quantities that a rule does not have (pure node perturbation has no B), and those of a network that diverged, are nan. Parameters,
    buffers, random number generators and the network's step stay as they are.

    Args:
        net: a converted network.
        criterion: as for ``PerturbedLoss``.
        x, y: one batch.

    Raises:
        TypeError: net is not a converted network.
    """
    per_sample = PerSample(criterion.criterion if isinstance(criterion, PerturbedLoss) else criterion)
    result: dict[str, dict[str, float]] = {}
    with _copy(net) as probe:
        true, true_weights, _ = _gradients(probe, per_sample, (x,), {}, y, exact=True)
        learned, weights, e = _gradients(probe, per_sample, (x,), {}, y, exact=False)
        network = network_of(probe)
        for name in network.points:
            if name not in true:
                continue
            g, t = learned.get(name), true[name]
            B, W, R = _maps(network, name, t, e)
            row = {"angle": _angle(g, t), "update_angle": _angle(weights.get(name), true_weights.get(name))}
            row["weight_angle"] = _angle(B, W)
            row["sign_congruence"] = math.nan if B is None or W is None else float(((B.sign() * W.sign() + 1) / 2).mean())
            row["relative_error"] = math.nan if B is None or W is None else float((W - B).norm() / W.norm())
            row["projected_error"] = math.nan if B is None or W is None or R is None else float(((W - B) @ R.mT).norm() / (W @ R.mT).norm())
            row["norm_ratio"] = math.nan if g is None else float(g.norm() / t.norm())
            result[name] = row
    return result


def explained(net: nn.Module) -> tuple[float, dict[str, float]]:
    """How much of what the noise does B explains: the share of the network, and each point's part of it.

    ``1 - |t - p|^2 / |t|^2``, t what the noise did to the loss, ``dL`` (with ``Joint(signal="output")`` to the output, ``y~ - y``), and
    ``p = sum_l xi_l B_l r_l`` what B said it would do, before it learned from that. It needs no backprop and no second pass: training
    keeps running sums of it, over 20 measured steps, one step in eight once the warm-up is over; in compiled and captured steps each one
    with ``Joint``, and no other. No checkpoint has these sums. A point's part is
    ``(2 t p_l - p_l^2) / |t|^2``, and the parts add up to the share, but for noise.

    1 is reached where all samples have one Jacobian, as in a linear network; else B, which is one matrix for all, explains less. Below
    zero B is more noise than signal: ``Ridge`` is, in large networks and for long, and the direction may help all the same (``alignment``).
    nan where nothing was measured: rules without noise, before the first step. Reading it waits for the device.

    Raises:
        TypeError: net is not a converted network.
    """
    network = network_of(net)
    if "explained" not in network.state:
        return math.nan, dict.fromkeys(network.points, math.nan)
    whole, *parts = network.state["explained"].tolist()
    share, *own = (part / whole if whole else math.nan for part in parts)
    return share, dict(zip(network.points, own, strict=True))


def constant_guess(criterion: Callable[..., Tensor], y: Tensor) -> float | None:
    """The mean loss of the best constant output, on all targets y of a training set: of nn.CrossEntropyLoss the entropy of the classes'
    frequencies, log K where they are alike, label smoothing counting classes up to the highest target; of nn.MSELoss the targets'
    variance. None for other criteria, without targets, with class weights, ignored targets, or a reduction other than "mean"."""
    own: Any = criterion.criterion if isinstance(criterion, PerturbedLoss) else criterion
    if getattr(own, "reduction", "") != "mean" or not y.numel():
        return None
    if isinstance(own, nn.MSELoss):
        return float((y.double() - y.double().mean(0)).square().mean())
    if not isinstance(own, nn.CrossEntropyLoss) or own.weight is not None or y.is_floating_point() or bool((y == own.ignore_index).any()):
        return None
    p = y.flatten().bincount().double() / y.numel()
    p = (1 - own.label_smoothing) * p + own.label_smoothing / len(p)
    return float(-torch.special.xlogy(p, p).sum())


_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def runaway(net: nn.Module, losses: Sequence[float], guess: float | None) -> str | None:
    """What to do about a network that has run away: one whose training loss stays above that of the constant guess.

    While B is noise, hidden weights take a random walk, activities of an unbounded network grow, and no error tells them to stop. The
    last loss counts as one that stays above where it is twice the guess or not finite, or no less than the loss before it, which a young
    network with dropout is not. The answer is given once for each converted network, and None otherwise, as it is while a warm-up lasts,
    in which the parameters stand still.

    Args:
        net: a converted network, or a plain one.
        losses: mean training losses, of each epoch so far, or of each some hundred steps.
        guess: of ``constant_guess``; None: a loss that is not finite is all that counts.
    """
    before, loss = (math.inf, *losses)[-2:] if losses else (math.inf, 0.0)
    if math.isfinite(loss) and (guess is None or loss <= guess or (loss <= 2 * guess and not loss >= before)):
        return None
    helps, network = [], None
    with contextlib.suppress(TypeError):
        network = network_of(net)
    if network is not None:
        if network.holds or network.ran_away:
            return None
        network.ran_away = True
    if not any(isinstance(m, _NORMS) for m in net.modules()):
        helps.append("a normalisation behind each hidden layer, such as BatchNorm, which bounds the activities")
    if network is not None and network.settings.rule.explains and not (network.settings.auto or network.settings.warmup):
        how = "'auto'" if network.settings.rule.starts_blind else "500"
        helps.append(f"a warm-up, in which B learns first (warmup={how})")
    helps.append("a lower learning rate")
    than = "" if guess is None else f", and a constant guess has {guess:.4g}"
    return f"the network has run away: its training loss is {loss:.4g}{than}. What helps, in this order: {'; '.join(helps)}"


def authors_folded_angle(net: nn.Module, criterion: Callable[..., Tensor], x: Tensor, y: Any) -> dict[str, float]:
    """The angle of the authors' code, for comparison with their figures only: B r against W r of sample 0 alone, the same r for both, and
    *folded*, 180 - theta where theta > 90, so that anti-aligned feedback looks aligned. Layerwise; degrees."""
    per_sample = PerSample(criterion.criterion if isinstance(criterion, PerturbedLoss) else criterion)
    result = {}
    with _copy(net) as probe:
        true, _, _ = _gradients(probe, per_sample, (x[:1],), {}, y[:1], exact=True)
        _, _, e = _gradients(probe, per_sample, (x[:1],), {}, y[:1], exact=False)
        for name in network_of(probe).points:
            B, W, R = _maps(network_of(probe), name, true[name], e)
            theta = math.nan if B is None or W is None or R is None else _angle(B @ R.mT, W @ R.mT)
            result[name] = min(theta, 180 - theta)
    return result


def true_gradients(net: nn.Module, step: Step, per_sample: PerSample, target: Any) -> dict[str, Tensor]:
    """Backprop's dL/dh_l of a training forward, by point, batch first: the target of supervised rules."""
    args, kwargs = step.inputs
    changes = per_sample.changes
    with _copy(net) as probe:
        network_of(probe).processes = network_of(net).processes  # for SyncBatchNorm
        found = _gradients(probe, per_sample, args, kwargs, target, exact=True)[0]
    per_sample.changes = changes  # the step's own, of the outputs as they are
    return found


@contextlib.contextmanager
def _copy(net: nn.Module) -> Iterator[nn.Module]:
    root, network = unwrap(net), network_of(net)
    network.flush()
    devices = [network.step.device] if network.step.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), torch.autocast(network.step.device.type, enabled=False):
        probe = copy.deepcopy(root).double()
        network_of(probe).adopt(network)
        for p in probe.parameters():
            p.requires_grad_(True)
        yield probe.train()


def _gradients(
    probe: nn.Module, per_sample: PerSample, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any, *, exact: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """dL/dh_l, dL/d(parameters of layer l) as one vector, and e; of the sum of the per-sample losses."""
    network = network_of(probe)
    network.probe = "exact" if exact else "learned"
    double = lambda v: v.double() if v.is_floating_point() else v  # noqa: E731
    probe.zero_grad()
    devices = [network.step.device] if network.step.device.type == "cuda" else []
    with torch.random.fork_rng(devices), per_sample.drawn_again():  # both passes draw the same masks
        output = probe(*tree_map_only(Tensor, double, args), **tree_map_only(Tensor, double, kwargs))
    step = network.current
    assert step is not None
    activities = dict(step.activities)
    for h in activities.values():
        h.retain_grad()
    into = [t for t in (*activities.values(), *probe.parameters()) if t.requires_grad]  # a target and weights of the loss are the user's
    chosen = list(range(len(step.outputs)))
    began = per_sample.began or ()  # where the step's own call found the generators
    if exact:
        with per_sample.drawn_again(began):
            _, e, _ = error(per_sample, tree_map_only(Tensor, Tensor.detach, output), target, step.samples)
        with per_sample.drawn_again(began):
            losses = per_sample(output, target, samples=step.samples)
        losses.sum().backward(inputs=into)
    else:
        with per_sample.drawn_again():
            losses, e, dL, dy, ok = signals(step, per_sample, output, chosen, target)
        attach(step, network.measure(step, _flat(step, e), dL, dy, ok, torch.float64), losses, e, chosen).sum().backward(inputs=into)
    hidden = {name: h.grad for name, h in activities.items() if h.grad is not None}
    weights = {}
    for name in (n for n in activities if not network.points[n].reads):
        own = [p.grad.flatten() for p in _layer(probe, name).parameters() if p.grad is not None]
        if own:
            weights[name] = torch.cat(own)
    return hidden, weights, _flat(step, e)


def _flat(step: Step, e: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([layout.units_of(t, step.samples) for layout, t in zip(step.layouts, e, strict=True)], 1)


def _layer(net: nn.Module, name: str) -> nn.Module:
    """The module that a point is behind, or that the weight of its layer belongs to."""
    name = layer_of(name)
    while name:
        with contextlib.suppress(AttributeError):
            return net.get_submodule(name)
        name = name.rpartition(".")[0]
    return net


def _maps(network: Network, name: str, t: Tensor, e: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """B, the map that it stands for, and its regressors, as matrices."""
    point, settings = network.points[name], network.settings
    B = settings.rule.feedback(point)
    if B is None or point.layout is None:
        return None, None, None
    if not settings.layerwise:
        e = network.project(e)
        if not torch.isfinite(e).all():
            return B, None, e  # diverged: there is no best map
        best = torch.linalg.pinv(e) @ point.layout.units_of(t, len(e))  # e of cross-entropy is rank-deficient
        return B, best.T, e
    assert point.weight is not None and point.connection is not None
    W = point.weight.detach()
    W = W if point.connection.convolution else W.T
    return (
        point.connection.matrix(B),
        point.connection.matrix(W),
        point.regressors(network.current.errors[name]) if network.current is not None else None,
    )


def _angle(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return math.nan
    a, b = a.flatten(), b.flatten()
    cosine = float(a @ b / (a.norm() * b.norm()))
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) if math.isfinite(cosine) else math.nan
