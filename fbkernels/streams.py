"""Two streams through one forward: a tensor that carries its perturbed twin (SPEC 1)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fbkernels._compile import constant
from fbkernels.reference import Connection, pair

if TYPE_CHECKING:
    from fbkernels.feedback import Feedback
    from fbkernels.points import FeedbackPoint

# What may follow a layer before its feedback point: the noise goes in after normalisation, activation and pooling (SPEC 1), and after
# dropout, whose mask the error then passes on its way back.
_NORMS = {"batch_norm", "group_norm", "layer_norm", "instance_norm", "local_response_norm", "rms_norm"}
# fmt: off
_ACTIVATIONS = {
    "relu", "tanh", "sigmoid", "gelu", "silu", "elu", "leaky_relu", "hardtanh", "relu6", "softplus", "mish", "hardswish", "hardsigmoid",
    "selu", "celu", "prelu", "threshold", "softsign", "logsigmoid", "tanhshrink", "softshrink", "hardshrink", "clamp",
}
_POOLS = {f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for d in (1, 2, 3)}
# The dimensions of their tensors are those of the activity, the batch first.
_ELEMENTWISE = {
    "add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "div", "truediv", "rtruediv", "itruediv", "cat", "concat",
    "where", "maximum", "minimum", "lerp",
}
_DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"}
_GROUP = _NORMS | _ACTIVATIONS | _POOLS | _DROPOUTS
# Linear maps that carry a point's noise unchanged to the layer that reads it.
_REARRANGEMENTS = {
    "flatten", "view", "reshape", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "contiguous", "pad", "unflatten", "to",
    "float", "double",
}
_UNSHARED = {"alpha_dropout", "feature_alpha_dropout", "rrelu", "fractional_max_pool2d", "fractional_max_pool3d"}
_METADATA = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "element_size", "is_floating_point", "is_complex",
    "get_device", "storage_offset", "data_ptr", "__len__", "__repr__", "__format__", "__hash__", "type", "is_same_size",
    "untyped_storage",
}
_VIEWS = (Tensor.T, Tensor.mT, Tensor.H, Tensor.mH, Tensor.data)  # properties whose value is an activity
# fmt: on


Carry = tuple[tuple[str, Callable[[Tensor], Tensor]], ...]  # rearrangements by name


@dataclass(eq=False)
class Norm:
    """The arguments of ``F.batch_norm``. Its running statistics take a batch once, however often what was deferred is run."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    group: Any = None  # of the processes whose batch it is, where that is more than one

    def fits(self, dtype: torch.dtype, channels: int, values: int) -> bool:
        """Whether a block runs it behind a layer with so many values a channel; the rest is torch's to run or to refuse."""
        given = [t for t in (self.running_mean, self.running_var, self.weight, self.bias) if t is not None]
        known = values > 1 if self.training else self.running_mean is not None and self.running_var is not None
        dtypes = {t.dtype for t in given}
        return known and all(t.shape == (channels,) for t in given) and (dtypes <= {torch.float32} or dtypes == {dtype})

    def running(self) -> tuple[Tensor | None, Tensor | None]:
        """The running statistics; in training from the second call on nothing, as they have taken the batch."""
        running = self.running_mean, self.running_var
        if self.training:
            self.running_mean = self.running_var = None
        return running

    def statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the variance that z is normalised with, float32 [channels]; the running ones are updated."""
        mean, var = running = self.running()
        if not self.training:
            assert mean is not None and var is not None
            return mean.float(), var.float()
        if z.is_cuda:
            return torch.batch_norm_update_stats(z, mean, var, self.momentum)
        mean, var = _moments(z)
        n = z.numel() // z.shape[1]
        for t, new in zip(running, (mean, var * (n / (n - 1))), strict=True):
            if t is not None:
                t.copy_(t.float().lerp(new, self.momentum))
        return mean, var


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel in one pass, float32.

    torch adds up channels-last maps in float32. With the places of a row as channels of their own the sums are short and keep their digits:
    64 maps of 32x32 have 34 times smaller an error of the variance, in the same time.
    """
    rows = z.movedim(1, -1).flatten(2).flatten(0, -2) if z.ndim == 4 else z
    none = z.new_zeros(rows.shape[1], dtype=torch.float32)  # in whose dtype the result is
    means, variances = (t.view(-1, z.shape[1]) for t in torch.batch_norm_update_stats(rows[:, :, None, None], none, none, 0.0))
    between, mean = torch.var_mean(means, 0, correction=0)
    return mean, variances.mean(0) + between


class Sum(torch.autograd.Function):
    """Over the processes of a group, forward and back."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        t = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(t, group=group)
        return t

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return Sum.apply(g, ctx.group), None


def _synchronised(
    z: Tensor, norm: Norm, running: tuple[Tensor | None, Tensor | None], weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with the mean and variance of the batch of all processes, and these two; the running ones are updated."""
    x = z.to(torch.promote_types(z.dtype, torch.float32))
    others, column = [d for d in range(x.ndim) if d != 1], (-1, *[1] * (x.ndim - 2))
    mean, n = Sum.apply(torch.cat((x.sum(others), x.new_tensor([x.numel() / x.shape[1]]))), norm.group).tensor_split([-1])
    mean = mean / n
    centred = x - mean.view(column)
    var = Sum.apply(centred.square().sum(others), norm.group) / n
    with torch.no_grad():
        for t, new in zip(running, (mean, var * (n / (n - 1))), strict=True):
            if t is not None:
                t.copy_(t.to(new.dtype).lerp(new, norm.momentum))
    rstd = (var + norm.eps).rsqrt()
    y = centred * (rstd if weight is None else weight * rstd).view(column)
    return (y if bias is None else y + bias.view(column)).to(z.dtype), mean, var


@dataclass(frozen=True)
class Deferred:
    """Functions that wait for their point: a layer, its batch norm, activation, pooling. ``FeedbackPoint.block`` runs them in one pass.

    Whatever else reads the activity first has them run one by one.
    """

    source: Streams
    calls: tuple[tuple[Any, str, tuple[Any, ...], dict[str, Any]], ...]  # function, its name, arguments but the first, keywords
    parts: tuple[tuple[Any, ...], ...]  # fusible() of what follows the layer, ("norm", Norm) of a batch norm
    grad: bool  # whether autograd was on
    hooks: Any  # those on saved tensors: of torch.utils.checkpoint
    autocast: torch.dtype | None  # what autocast ran the layer in


class Streams(Tensor):
    """The clean activity, as a tensor, with its perturbed twin beside it.

    Whatever function of torch the model's forward calls runs on both: on ``clean`` as ever, on ``perturbed`` without autograd. Dropout
    masks and batch statistics come from the clean stream. ``perturbed`` is None as long as both are the same numbers, so that what lies
    before the first noise is computed once. ``pending`` is the point of the layer whose normalisation, activation, pooling and dropout are
    still running; the first other function that reads the activity puts the noise in. ``deferred``: they have not run yet, ``clean`` and
    ``perturbed`` do not exist, and the tensor itself is an empty one. ``source`` is the point whose activity this is, with the
    rearrangements since.
    """

    clean: Tensor
    perturbed: Tensor | None
    net: Feedback
    pending: FeedbackPoint | None
    source: tuple[FeedbackPoint, Carry] | None
    realised: Streams | None
    deferred: Deferred | None
    read: bool  # something with a tensor of its own, a weight, has read the activity since the last point

    def check(self) -> None:
        """torch shows a custom autograd.Function to nobody: its output is a Streams whose clean tensor has lost its gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            if self.deferred is None and self.requires_grad and not self.clean.requires_grad:
                raise ValueError(
                    "a custom autograd.Function hides the second stream and loses its own gradient: use torch functions, and "
                    "torch.utils.checkpoint with use_reentrant=False"
                )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _run(func, _name(func), args, kwargs or {})


@constant  # Dynamo does not know __name__ of a builtin
def _name(func: Any) -> str:
    return str(func.__name__)


def streams(
    net: Feedback, clean: Tensor, perturbed: Tensor | None, pending: FeedbackPoint | None = None, source: Any = None, read: bool = False
) -> Streams:
    """Pair a clean and a perturbed tensor (None: the same numbers)."""
    with torch.no_grad():
        pair = clean.as_subclass(Streams)
    pair.clean, pair.perturbed, pair.net, pair.pending, pair.source, pair.realised = clean, perturbed, net, pending, source, None
    pair.read, pair.deferred = read, None
    return pair


def defer(net: Feedback, deferred: Deferred, pending: FeedbackPoint | None) -> Streams:
    # it requires grad where what it stands for does, so that check() notices a custom autograd.Function
    args = (deferred.source.clean, *deferred.calls[0][2])
    grad = deferred.grad and not net.warming and any(isinstance(t, Tensor) and t.requires_grad for t in args)
    wait = streams(net, deferred.source.clean.new_empty(0, requires_grad=grad), None, pending)
    wait.deferred = deferred
    return wait


def resolve(s: Streams) -> Streams:
    """The activity with its deferred functions run, one by one."""
    if s.deferred is not None:
        y = s.deferred.source
        with torch.set_grad_enabled(s.deferred.grad), outside(s.deferred.hooks):
            for func, name, args, kwargs in s.deferred.calls:
                y = _execute(func, name, (y, *args), kwargs)
        s.clean, s.perturbed, s.source, s.read, s.deferred = y.clean, y.perturbed, y.source, y.read, None
    return s


def hooks() -> Any:
    """What takes the tensors that autograd saves now."""
    pair = None if torch.compiler.is_compiling() else torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if pair is None else pair[0]


def outside(then: Any) -> Any:
    """What was put off before a checkpointed function began, or in one that has ended, is none that its second run repeats."""
    return contextlib.nullcontext() if hooks() is then else torch.autograd.graph.saved_tensors_hooks(_same, _same)


def twin(s: Streams) -> Tensor:
    """The perturbed rows, also where they are still the clean ones."""
    return s.net.rows(s.clean.detach()) if s.perturbed is None else s.perturbed


def _run(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name in ("dim", "ndimension") and args[0].deferred is not None:  # nn.BatchNorm2d asks
        return _ndim(args[0])
    made = name.startswith(("new_", "rand", "bernoulli")) or name.endswith("_like")
    if made or name in _METADATA or (name == "__get__" and func.__self__ not in _VIEWS):
        return func(*_map(_plain if made else _clean, args), **kwargs)
    if not _grouped(name, args):
        args, kwargs = _map(_realise, args), _map(_realise, kwargs)
    if args and isinstance(args[0], Streams) and args[0].net.fuses and len(_all((args, kwargs))) == 1:
        waits = _defer(func, name, args[0], args[1:], kwargs)
        if waits is not None:
            return waits
    return _execute(func, name, _map(resolve, args), _map(resolve, kwargs))


def _defer(func: Any, name: str, s: Streams, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams | None:
    """Put off a layer, or what follows it up to its point, where the point can run it in its one pass."""
    if func is F.batch_norm:
        # not behind a layer, or in a graph of Dynamo's, which traces no running statistics written inside an autograd.Function
        if s.deferred is None or s.deferred.parts or torch.compiler.is_compiling() or s.net.group is not None:
            return None
        func, args, kwargs = Norm(*args, **kwargs), (), {}
    call = (func, name, args, kwargs)
    if name in ("linear", "conv2d"):
        x, device = s.clean, s.clean.device.type
        if x.requires_grad or x.ndim != (2 if name == "linear" else 4) or x.dtype not in s.net.fuses:
            return None
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        weight, _, layer, by_hand = connect(name, x, args, kwargs)
        # what torch refuses it refuses at once, before a norm counts the batch
        refused = weight.shape[1] * layer.groups != x.shape[1] or any(n < 1 for n in layer.size_behind(weight))
        if refused or any(by_hand) or (weight.dtype != x.dtype and autocast is None):
            return None
        return defer(s.net, Deferred(s, (call,), (), torch.is_grad_enabled(), hooks(), autocast), None)
    part = ("norm", func) if isinstance(func, Norm) else fusible(name, args, kwargs)
    if part is None:
        return None
    if s.deferred is None:
        if (
            s.pending is None
            or not (s.clean.ndim == 2 or (s.clean.ndim == 4 and s.pending.channels_first is not False))
            or s.clean.dtype not in s.net.fuses
            or _in_place(name, kwargs)
        ):
            return None
        return defer(s.net, Deferred(s, (call,), (part,), torch.is_grad_enabled(), hooks(), None), s.pending)
    deferred = replace(s.deferred, calls=(*s.deferred.calls, call), parts=(*s.deferred.parts, part))
    if not _in_place(name, kwargs):
        return defer(s.net, deferred, s.pending)
    s.deferred = deferred  # relu_(x): x itself is what comes out
    return s


def connect(name: str, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None, Connection, Any]:
    """Weight, bias and connection of ``F.linear`` or ``F.conv2d``, and what to pad by hand."""
    given = dict(zip(("weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False)) | kwargs
    weight, bias = given.pop("weight"), given.pop("bias", None)
    return weight, bias, *Connection.of(name, weight, x, **given)


def fusible(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """("activation", kind) or ("pool", kind, kernel_size, stride, padding) of a function that perturbed_pointwise covers."""
    name = name.removesuffix("_")
    if name in ("relu", "tanh", "sigmoid") or (name == "gelu" and not args and kwargs.get("approximate", "none") == "none"):
        return "activation", name
    if name not in ("max_pool2d", "avg_pool2d"):
        return None
    own = ("dilation", "ceil_mode", "return_indices") if name == "max_pool2d" else ("ceil_mode", "count_include_pad", "divisor_override")
    given = dict(zip(("kernel_size", "stride", "padding", *own), args, strict=False)) | kwargs
    plain = {"dilation": (1, 1), "ceil_mode": False, "return_indices": False, "count_include_pad": True, "divisor_override": None}
    if any((pair(given[k]) if k == "dilation" else given[k]) != plain[k] for k in own if k in given):
        return None
    kernel = pair(given["kernel_size"])
    if name == "max_pool2d" and kernel[0] * kernel[1] > 256:  # a winner's place is a byte
        return None
    return "pool", name[:3], kernel, pair(given.get("stride") or kernel), pair(given.get("padding", 0))


def _in_place(name: str, kwargs: dict[str, Any]) -> bool:
    return (
        name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or bool(kwargs.get("inplace"))
    )


def _execute(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    every = _all((args, kwargs))
    first, net = every[0], every[0].net
    for s in every:
        s.check()
    read = any(s.read for s in every) or _holds_tensor((args, kwargs))
    if name in _UNSHARED or _attention_dropout(name, args, kwargs):
        raise ValueError(f"{name} draws random numbers that the two streams cannot share: use dropout, or take it out of the model")
    if args and callable(args[0]):  # Dynamo's torch.utils.checkpoint, with both streams
        raise RuntimeError(
            f"{name} runs a part of the model where its feedback points do not show: leave torch.utils.checkpoint out of a compiled step; "
            "torch._functorch.config.activation_memory_budget has the compiler choose what to recompute"
        )
    if name in _DROPOUTS:
        return _dropout(func, first, args, kwargs)
    if func is F.batch_norm or isinstance(func, Norm):
        return _batch_norm(first, func if isinstance(func, Norm) else replace(Norm(*args[1:], **kwargs), group=net.group))
    if net.layerwise and name in ("linear", "conv1d", "conv2d", "conv3d") and isinstance(args[0], Streams):
        entry = net.entry(args[0], args[1] if len(args) > 1 else kwargs["weight"])
        if entry is not None:
            return net.transport(entry, name, *args, **kwargs)
    if net.layerwise and name not in _REARRANGEMENTS:
        net.forks.update(s.source[0].name for s in every if s.source is not None)

    if name == "view":  # a block's maps are channels-last, whatever the model's are
        first.clean = _rows_first(first.clean)
        first.perturbed = None if first.perturbed is None else _rows_first(first.perturbed)
    if _in_place(name, kwargs) and first.source is not None and first.source[0].name in net.blocks:
        first.clean = first.clean.clone()  # phi' of the block is read from what it was
    differ = net.running and any(s.perturbed is not None for s in every)
    if _in_place(name, kwargs) and differ and first.perturbed is None:
        first.perturbed = twin(first).clone()
    constant = net.constant if net.warming else _same
    clean = func(*_map(_clean, args, constant), **_map(_clean, kwargs, constant))
    perturbed = None
    if differ:
        n = len(first.clean) if first.clean.ndim else 0
        rows = partial(_aligned, first) if name.strip("_") in _ELEMENTWISE and (net.antithetic or net.perturbed_rows != n) else None
        args, kwargs = _map(twin, args, rows), _map(twin, kwargs, rows)
        with torch.no_grad():
            perturbed = func(*_fit(name, args, first.clean.shape[0]), **kwargs)
    source = None
    if net.layerwise and first.source is not None and name in _REARRANGEMENTS:
        rest, n = args[1:], first.clean.shape[0]
        again = Tensor.reshape if name == "view" else func  # the noise of a map lies channels-last
        source = (first.source[0], (*first.source[1], (name, lambda t: again(*_fit(name, (t, *rest), n), **kwargs))))
    if isinstance(clean, Tensor):
        return streams(net, clean, perturbed, first.pending if _grouped(name, args) else None, source, read)
    if isinstance(clean, (tuple, list)):
        twins = perturbed if perturbed is not None else [None] * len(clean)
        return type(clean)([streams(net, c, p, read=read) if isinstance(c, Tensor) else c for c, p in zip(clean, twins, strict=True)])
    return clean


def _grouped(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a layer's point comes after it: what _GROUP holds, and a constant for each sample, as DropPath multiplies with."""
    if name.removesuffix("_") in _GROUP:
        return True
    if name.strip("_") not in ("mul", "rmul") or not isinstance(args[0], Streams) or args[0].pending is None:
        return False
    x, mask = args[0], args[1]
    return type(mask) is Tensor and not mask.requires_grad and mask.ndim == _ndim(x) and mask.numel() == len(mask)


def _ndim(s: Streams) -> int:
    return (s.clean if s.deferred is None else s.deferred.source.clean).ndim  # which no fused function changes


def _rows_first(t: Tensor) -> Tensor:
    return t.contiguous() if t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last) else t


def _attention_dropout(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "scaled_dot_product_attention":
        return bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) > 0)
    return bool(name == "multi_head_attention_forward" and kwargs.get("training", True) and args[10] > 0)


def _holds_tensor(tree: Any) -> bool:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return any(_holds_tensor(x) for x in tree)
    return isinstance(tree, Tensor) and not isinstance(tree, Streams)


def _aligned(first: Streams, x: Any) -> Any:
    # a tensor made for each sample of the clean batch, such as an expanded class token
    clean = first.clean
    return first.net.rows(x) if isinstance(x, Tensor) and x.ndim == clean.ndim and 1 < len(x) == len(clean) else x


def _map(f: Callable[[Streams], Any], tree: Any, leaf: Callable[[Any], Any] | None = None) -> Any:
    if isinstance(tree, Streams):
        return f(tree)
    if isinstance(tree, (list, tuple)) and not hasattr(tree, "numel"):  # torch.Size passes as it is
        return type(tree)([_map(f, x, leaf) for x in tree])
    if isinstance(tree, dict):
        return {k: _map(f, v, leaf) for k, v in tree.items()}
    return leaf(tree) if leaf is not None else tree


def _all(tree: Any) -> list[Streams]:
    if isinstance(tree, Streams):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [s for x in tree for s in _all(x)] if isinstance(tree, (list, tuple)) else []


def _clean(s: Streams) -> Tensor:
    return resolve(s).clean


def _plain(s: Streams) -> Tensor:
    """The clean activity in the plain model's layout, in whose order random numbers are drawn."""
    return _rows_first(_clean(s)) if s.net.rows_first else _clean(s)


def _same(x: Any) -> Any:
    return x


def _realise(s: Streams) -> Streams:
    if s.pending is None:
        return resolve(s)
    if s.realised is None:
        s.realised = s.pending.perturb(s)
    return s.realised


def _fit(name: str, args: tuple[Any, ...], n: int) -> tuple[Any, ...]:
    # x.view(len(x), -1): the perturbed stream can have another number of rows than the clean one (fraction, antithetic)
    if name not in ("view", "reshape") or len(args[0]) == n:
        return args
    shape = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
    return (args[0], (len(args[0]), *shape[1:])) if shape[0] == n else args


def _dropout(func: Any, s: Streams, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
    if "inplace" in kwargs:
        kwargs = {**kwargs, "inplace": False}
    with torch.no_grad():
        mask = func(torch.ones_like(_plain(s)), *args[1:], **kwargs)
        rows = s.net.rows(mask)
        perturbed = s.perturbed * rows if s.net.running and s.perturbed is not None else None
    # in layerwise the source stays: the layer that reads the activity puts the noise in behind the mask
    return streams(s.net, s.clean * mask, perturbed, s.pending, s.source, s.read)


def _batch_norm(s: Streams, norm: Norm) -> Streams:
    constant = s.net.constant if s.net.warming else _same
    running, weight, bias = norm.running(), norm.weight, norm.bias
    mean, var = running
    if norm.group is not None:
        clean, mean, var = _synchronised(s.clean, norm, running, constant(weight), constant(bias))
    else:
        clean = F.batch_norm(s.clean, *running, constant(weight), constant(bias), norm.training, norm.momentum, norm.eps)
    perturbed = None
    if s.net.running and s.perturbed is not None:
        with torch.no_grad():
            if norm.training:
                exact = torch.promote_types(s.clean.dtype, torch.float32)
                if norm.group is None:
                    var, mean = torch.var_mean(s.clean.to(exact), [d for d in range(s.clean.ndim) if d != 1], correction=0)
                weight, bias = (None if t is None else t.to(exact) for t in (weight, bias))
            perturbed = F.batch_norm(s.perturbed, mean, var, weight, bias, False, 0.0, norm.eps)
    return streams(s.net, clean, perturbed, s.pending, read=True)
