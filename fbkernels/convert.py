"""From a plain network to one with feedback points, and back."""

from __future__ import annotations

import copy
import dis
import fnmatch
import functools
import gc
import inspect
import types
import warnings
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from fbkernels import ops
from fbkernels._check import boolean, in_interval, integer, one_of, positive
from fbkernels.loss import network_of, unwrap
from fbkernels.nn import SyncBatchNorm
from fbkernels.rules import Ridge, Rule
from fbkernels.training.network import Network
from fbkernels.training.point import Entered, FeedbackPoint
from fbkernels.training.settings import Settings

_WHOLE = 2**31 - 1  # places that share: more than a map has


def convert(
    model: nn.Module,
    *,
    feedback: str = "direct",
    rule: Rule | None = None,
    noise_std: float = 0.05,
    noise: str = "gaussian",
    seed: int = 0,
    points: Iterable[str] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    every: int = 1,
    fraction: float = 1.0,
    antithetic: bool = False,
    warmup: int | str = "auto",
    backend: str = "auto",
    share: int | str = 1,
    rank: int | None = None,
) -> nn.Module:
    """A network with feedback points around the very same Parameter and buffer objects; ``model`` stays as it was.

    A point follows each hidden Linear and convolution layer, after its normalisation, activation, pooling and dropout (or DropPath),
    however the model's forward calls them; the last such layer is the output and stays exact. FeedbackPoints that the model has already
    are used instead.

    In ``layerwise`` feedback every Linear and convolution that reads a hidden activity has a B. Where that is no point's activity, or one
    that another layer reads already (a sum, what lies behind a pre-activation norm, a shortcut), the layer has a point at its input,
    ``NAME.input``; a point that no layer reads falls away. With ``points``, ``include`` or ``exclude`` what lies between the points is
    differentiated as it is, and so is nn.MultiheadAttention always.

    Args:
        model: any module whose forward maps a batch to tensors of outputs: one, a tuple, a dict, a dataclass.
        feedback: "direct" (every point gets e B^T from the output) or "layerwise" (every layer hands its error down through B).
        rule: how B is learned; default ``Ridge()``.
        noise_std: sigma > 0, in units of the activities.
        noise: "gaussian" or "rademacher" (+-sigma).
        seed: of the noise and of random B, 0 to 2^63 - 1.
        points: names of modules to put a point right after, instead of finding them: one for each residual block, say. Where dropout
            follows, name that: the error of a unit that it dropped is zero only behind it.
        include, exclude: name patterns (``fnmatch``) that keep or drop layers from those found.
        every: perturb, and update B, on each ``every``-th step only.
        fraction: perturb only the first ``ceil(fraction * N)`` samples of a batch, or of a process' part of it, in (0, 1].
        antithetic: perturb by +xi and -xi and take dL from half the difference, which removes the noise of even orders.
        warmup: in the first ``warmup`` steps only B learns. "auto": where B starts at zero and learns from
            noise (``Ridge``, ``NormalizedLMS``, ``Joint``, rules of your own that start so), until the share of the noise's effect that B
            explains (``fbkernels.metrics.explained``) stops rising, or for 2 samples a noisy unit; else 0. Gradients are zero until then,
            and torch's optimisers leave them out: no weight decay, and no step that Adam counts, but in compiled and captured steps.
        backend: "auto" or a name from ``fbkernels.backends()``.
        share: direct feedback: ``share`` x ``share`` neighbouring units of a channel, or with "channel" all of them, get the same noise and
            have one row of B, which learns the sum of their gradients; each gets the mean. So B is smaller and needs fewer samples, about
            n_tot with ``Joint``, and what differs within a patch is lost. Such maps run outside the fused kernels.
        rank: direct feedback: each layer gets ``(e C) B^T``, with one random C [outputs, rank] of orthonormal columns, a function of
            ``seed``. So B has ``rank`` columns, 1 to the number of outputs, and learns from e C (``Joint(signal="output")`` from the
            outputs' change times C). None: a column for each output.

    Raises:
        TypeError, ValueError: an argument that is not of the form above; no hidden layer found; a rule that the feedback structure
            does not carry; a name in ``points`` that is no module; a model that is converted already.
        RuntimeError: a backend asked for by name that is not there.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = {m: f"module {n!r}" if n else "model" for n, m in model.named_modules()}
    for m, where in modules.items():
        if isinstance(m, Network):
            raise ValueError("model is converted already: use fbkernels.revert first")
        if isinstance(m, torch.jit.ScriptModule):
            raise ValueError(
                f"{where} is a ScriptModule, whose calls cannot be seen: convert the module that it was scripted or traced from"
            )
        if isinstance(m._modules.get("_orig_mod"), nn.Module):
            raise ValueError(
                f"{where} is compiled, and its calls cannot be seen: convert with its _orig_mod in its place, and compile the result"
            )
        if _encloses(m.__dict__.get("forward"), modules):
            raise ValueError(
                f"{where} has a forward of its own that encloses the model itself, and the converted one is a copy: "
                "write a function of the module, and set module.forward = types.MethodType(function, module)"
            )
    held = next(
        (f"attribute {k!r} of {where}" for m, where in modules.items() for k, v in m.__dict__.items() if _encloses(v, modules)), None
    )
    if held is not None:
        warnings.warn(
            f"{held} is a function that encloses the model itself, and the converted one is a copy, whose training mode and "
            "attributes it does not see: write a method",
            stacklevel=2,
        )
    one_of("feedback", feedback, ("direct", "layerwise"))
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    ops.choose(backend, device)
    rule = Ridge() if rule is None else rule
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be an fbkernels rule such as Ridge(), got {rule!r}")
    if feedback not in rule.structures:
        raise ValueError(f"feedback must be {' or '.join(map(repr, rule.structures))} with {rule!r}, got {feedback!r}")
    if share != "channel":
        integer("share", share, 1)
    if share != 1 and (feedback != "direct" or rule.private):
        raise ValueError(f"share must be 1 with feedback={feedback!r} and {rule!r}, whose B has a row for no unit, got {share!r}")
    if rank is not None:
        integer("rank", rank, 1)
        if feedback != "direct" or rule.private:
            raise ValueError(f"rank must be None with feedback={feedback!r} and {rule!r}, whose B has a column for no output, got {rank!r}")
    places = _places(model, points, include, exclude)
    auto = warmup == "auto"
    settings = Settings(
        layerwise=feedback == "layerwise" and not rule.private,
        rule=rule,
        noise_std=float(positive("noise_std", noise_std)),
        noise=one_of("noise", noise, ("gaussian", "rademacher")),
        seed=integer("seed", seed, 0),
        every=integer("every", every, 1),
        fraction=float(in_interval("fraction", fraction, 0, 1, open_low=True)),
        antithetic=boolean("antithetic", antithetic),
        warmup=0 if auto else int(integer("warmup", warmup, 0)),
        auto=auto and rule.starts_blind,
        backend=backend,
        share=_WHOLE if share == "channel" else int(share),
        rank=rank,
        include=_patterns("include", include),
        exclude=_patterns("exclude", exclude),
        found=points is None and "point" not in places.values(),
    )
    network = Network(settings)
    net = _copied(model)
    for module in net.modules():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = SyncBatchNorm  # type: ignore[assignment]
    network.to(device)
    if hasattr(net, "feedback") and not isinstance(net.feedback, FeedbackPoint):
        raise ValueError("model has an attribute 'feedback', the name fbkernels needs: rename it")
    for name, kind in places.items():
        module = net.get_submodule(name)
        point = module if isinstance(module, FeedbackPoint) else getattr(module, "feedback", None)
        if not isinstance(point, FeedbackPoint):
            if point is not None:
                raise ValueError(f"module {name!r} has an attribute 'feedback', the name fbkernels needs: rename it")
            point = module.feedback = FeedbackPoint()
            point.converted = True
            point.train(module.training)
            if kind == "module" and type(module).forward is not nn.Sequential.forward:  # which runs the point itself, as its last child
                module.register_forward_hook(point.follow)
        if isinstance(module, (nn.Linear, _ConvNd)):
            point.maps = isinstance(module, _ConvNd)
        point.name, point.index, point._network = name, len(network.points), (network,)
        network.points[name] = point
    for name in _layers(net):
        module = net.get_submodule(name)
        if getattr(module.forward, "__func__", None) not in _PLAIN or not isinstance(module._parameters.get("weight"), nn.Parameter):
            module.register_forward_pre_hook(Entered(network, name))
    # a child of the first point and not of the network, which may be a Sequential that runs its children
    next(iter(network.points.values())).shared = network
    net.__dict__["feedback"] = network
    # no bound methods: pickle would look for them in the class. Exporters ask for the signature
    own = net.__dict__.get("forward")
    if own is not None:
        network.own = (own.__func__, net) if getattr(own, "__self__", None) is net else (own,)
    forward = functools.partial(_forward, net)
    forward.__signature__ = inspect.signature(net.forward)  # type: ignore[attr-defined]
    net.__dict__["forward"] = forward
    net.register_load_state_dict_pre_hook(network.check)
    net._register_state_dict_hook(network.last)
    network.root = (net,)
    network.train(model.training)
    return net


_PLAIN = {cls.forward for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)}


def _forward(net: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a converted network, beside its class' own."""
    return net.feedback.forward(net, args, kwargs)  # type: ignore[union-attr]


_ATOMIC = (type, types.ModuleType, types.FunctionType, types.GeneratorType, Tensor)
_REGISTRIES = nn.Module().__dict__.keys()  # a module's own


def _copied(model: nn.Module) -> nn.Module:
    """Another module tree around the same parameters and buffers, and whatever else it refers to that leads to no module of its own."""
    registered = set(model.modules())
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    apart: dict[int, Any] = {}  # what leads to none
    seen: set[int] = set()

    def leads(value: Any) -> bool:
        todo, passed = [value], dict[int, Any]()
        while todo:
            v = todo.pop()
            if (isinstance(v, nn.Module) and v in registered) or isinstance(v, RemovableHandle):  # which knows its hook's module weakly
                return True
            if not (isinstance(v, _ATOMIC) or id(v) in passed or id(v) in apart):
                passed[id(v)] = v
                todo += gc.get_referents(v)
        apart.update(passed)
        return False

    def share(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):  # what a hook has computed, old weight norm or pruning, will be computed anew
            memo.setdefault(id(value), value if value.is_leaf else value.detach())
        elif not leads(value):
            memo[id(value)] = value
        elif isinstance(value, dict):
            for part in (*value.keys(), *value.values()):
                share(part)
        elif isinstance(value, (list, tuple, set, frozenset)):
            for part in value:
                share(part)
        elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, types.MethodType):
            share_all(value)

    def share_all(owner: Any) -> None:
        for name, value in vars(owner).items():
            if not isinstance(owner, nn.Module) or name not in _REGISTRIES:
                share(value)
            elif not value and type(value) in (dict, OrderedDict, set):  # most of a module's: a quarter of the call
                memo[id(value)] = value.copy()
            elif isinstance(value, dict):
                for part in value.values():
                    share(part)

    share(model)
    return copy.deepcopy(model, memo)


def _encloses(function: Any, modules: Container[nn.Module]) -> bool:
    """Whether a function reaches one of the modules past its arguments: in a variable from around it, or by a global name."""
    functions: list[Any] = [function] if isinstance(function, (types.FunctionType, types.MethodType, functools.partial)) else []
    for f in functions:  # which grows
        f = f.func if isinstance(f, functools.partial) else f  # whose arguments are copied with the model
        f = getattr(f, "__func__", f)
        if not isinstance(f, types.FunctionType):
            continue
        around = [cell.cell_contents for cell in f.__closure__ or ()]
        names = {i.argval for i in dis.get_instructions(f) if i.opname == "LOAD_GLOBAL"} & f.__globals__.keys()
        for value in (*around, *(f.__globals__[name] for name in names)):
            owner = value.__self__ if isinstance(value, types.MethodType) else value
            if isinstance(owner, nn.Module) and owner in modules:
                return True
        functions += [v for v in around if isinstance(v, (types.FunctionType, functools.partial)) and v not in functions]
    return False


def _places(
    model: nn.Module, points: Iterable[str] | None, include: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> dict[str, str]:
    """Where points go: module name -> "layer" (after its whole group), "module" (right after it) or "point" (is one)."""
    modules = dict(model.named_modules())
    if points is not None:
        names = [points] if isinstance(points, str) else list(points)
        for name in names:
            if name not in modules or name == "":
                raise ValueError(f"points: {name!r} is no module of the model; it has {', '.join(map(repr, list(modules)[1:]))}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"points must name each module once, and at least one, got {names!r}")
        return dict.fromkeys(names, "module")
    own = {name.removesuffix(".feedback"): "point" for name, m in modules.items() if isinstance(m, FeedbackPoint)}
    layers = _layers(model)
    found = own or dict.fromkeys(layers[:-1], "layer")
    found = {
        n: k
        for n, k in found.items()
        if _matches(n, _patterns("include", include), True) and not _matches(n, _patterns("exclude", exclude), False)
    }
    if not found:
        others = [f"{type(m).__name__} {n!r}" for n, m in modules.items() if isinstance(m, _POINTED_BY_NAME)]
        cells = [f"{type(m).__name__} {n!r}" for n, m in modules.items() if isinstance(m, nn.RNNCellBase)]
        raise ValueError(
            f"model has no hidden Linear or convolution layer to put a feedback point after: its layers are {layers!r}"
            + f"; {', '.join(others)} can have one right behind, by name: points=[...]" * bool(others)
            + f"; {', '.join(cells)} can have none: write the recurrence with nn.Linear" * bool(cells)
        )
    return found


_POINTED_BY_NAME = (nn.RNNBase, nn.MultiheadAttention, nn.Bilinear)


def _layers(model: nn.Module) -> list[str]:
    """Linear and convolution layers by name; attention is a block."""
    modules = dict(model.named_modules())
    attention = tuple(name + "." for name, m in modules.items() if isinstance(m, nn.MultiheadAttention))
    return [n for n, m in modules.items() if isinstance(m, (nn.Linear, _ConvNd)) and not n.startswith(attention)]


def _patterns(argument: str, patterns: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{argument} must be a name pattern or several, got {patterns!r}")
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matches(name: str, patterns: tuple[str, ...] | None, default: bool) -> bool:
    return default if patterns is None else any(fnmatch.fnmatchcase(name, p) for p in patterns)


def revert(net: nn.Module) -> nn.Module:
    """The plain model of a converted network, around the same Parameter and buffer objects; ``net`` stays as it was.

    Raises:
        TypeError: net is not a converted network.
    """
    net = unwrap(net)
    flush(net)
    forward = net.__dict__.pop("forward")
    network = net.__dict__.pop("feedback")
    if network.own:
        net.__dict__["forward"] = types.MethodType(*network.own) if len(network.own) == 2 else network.own[0]
    try:
        model = _copied(net)
    finally:
        net.__dict__["feedback"], net.__dict__["forward"] = network, forward
    for module in list(model.modules()):
        if type(module) is SyncBatchNorm:
            module.__class__ = nn.SyncBatchNorm  # type: ignore[assignment]
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._load_state_dict_pre_hooks, module._state_dict_hooks):
            for key in [k for k, hook in hooks.items() if _ours(hook)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for child, point in list(module._modules.items()):
            if isinstance(point, FeedbackPoint) and point.converted:
                del module._modules[child]
            elif isinstance(point, FeedbackPoint):
                module._modules[child] = FeedbackPoint()
    return model


def _ours(hook: Any) -> bool:
    inner = getattr(hook, "hook", hook)
    return isinstance(inner, Entered) or isinstance(getattr(inner, "__self__", None), (Network, FeedbackPoint))


def points(net: nn.Module) -> Mapping[str, FeedbackPoint]:
    """The network's feedback points in the order of the forward pass, by name."""
    return MappingProxyType(network_of(net).points)


def flush(net: nn.Module) -> None:
    """Apply the pending update of every B now (SPEC 5). Exact at any time between two training steps."""
    network_of(net).flush()
