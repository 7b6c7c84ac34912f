"""Where the points of a network are: found once, by recording the calls of one forward; plain data from then on."""

from __future__ import annotations

import collections
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fbkernels._tree import Where
from fbkernels.layout import Rows
from fbkernels.stream.chain import Chain, fusible
from fbkernels.stream.custom import contradicts, declared
from fbkernels.stream.kinds import (
    DROPOUTS,
    GROUP,
    OWN_WEIGHTS,
    PRODUCTS,
    REARRANGEMENTS,
    SEVERAL_PRODUCTS,
    by_position,
    in_place,
    kind_of,
    name_of,
    same,
)


@dataclass(eq=False)
class Placement:
    """What a recording has shown. ``layers``: by name and by how often the layer ran before, the chain from it to its point, None for an
    output layer and for one whose input depends on no sample. ``reads``: layerwise, likewise, the point whose activity it reads, or ""."""

    layers: dict[tuple[str, int], Chain | None] = field(default_factory=dict)
    reads: dict[tuple[str, int], str] = field(default_factory=dict)
    points: tuple[str, ...] = ()  # in the order in which they run
    names: dict[int, str] = field(default_factory=dict)  # of layers by the identity of their weight
    weights: tuple[Tensor, ...] = ()  # which are kept, so that no identity is used again
    random: frozenset[Any] = frozenset()  # functions that draw random numbers
    argument: Where = (0, "", ())  # which of the tensors that go in has the batch
    batch: Rows = field(default_factory=Rows)
    rows: dict[str, Rows | None] = field(default_factory=dict)  # of each point's activity; None: not known
    outputs: tuple[Rows | None, ...] = ()
    reach: dict[str, tuple[int, ...]] = field(default_factory=dict)  # direct: the outputs that depend on a point
    settled: bool = False  # more than one sample has shown the rows
    checkpoints: bool = False  # torch.utils.checkpoint runs parts of the model
    views: bool = False  # the model reads what it has written through a view
    products: int = 0  # of numbers by layers' weights, in the forward of one sample
    asked: bool = False  # direct: whether the model asks if an activity right behind a point requires a gradient
    answering: int = 0  # layerwise: numbers in the weights of the layers that read a point
    kept: tuple[tuple[str, str], ...] = ()  # direct: module and attribute of what the model keeps behind a point, with a gradient
    own_weights: tuple[str, ...] = ()  # functions, and by which weights of their own they carry the error

    @property
    def plain(self) -> bool:
        """Whether the batch comes first everywhere."""
        return all(r is not None and r.plain for r in (self.batch, *self.rows.values(), *self.outputs))

    def join(self, earlier: Placement) -> None:
        """Keep what an earlier recording showed of layers that this one did not run."""
        known = set(self.names.values())
        self.layers = {k: c for k, c in earlier.layers.items() if k[0] in known} | self.layers
        self.reads = {k: p for k, p in earlier.reads.items() if k[0] in known} | self.reads
        left = {c.point for c in self.layers.values() if c is not None} | set(self.reads.values()) | set(self.points)
        self.points = (*(p for p in earlier.points if p in left), *(p for p in self.points if p not in earlier.points))
        self.random |= earlier.random
        self.reach = {k: v for k, v in earlier.reach.items() if k in self.points} | self.reach


@dataclass(eq=False)
class Call:
    func: Any
    ins: list[int]
    outs: list[int]
    layer: tuple[str, int] | None = None
    group: bool = False  # may stand between a layer and its point
    weighted: bool = False  # reads a tensor of the model's own
    own: str = ""  # the parameter of its own that it carries an error through
    random: bool = False
    cut: bool = False  # no gradient passes
    point: str = ""

    @property
    def hook(self) -> bool:
        """Whether it is torch's own identity for full backward hooks."""
        return self.func is not None and name_of(self.func) == "BackwardHookFunction"


_ASKS = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


class Recorder(TorchFunctionMode):
    """The calls of a forward with the values that they take and give, a number each."""

    def __init__(self, network: Any, names: Mapping[int, str], inputs: list[Tensor]) -> None:
        super().__init__()
        self.network, self.names, self.count = network, names, 0
        self.grad = torch.is_grad_enabled()
        self.calls: list[Call] = []
        self.ran: collections.Counter[str] = collections.Counter()
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.checkpoints = False
        self.fresh: dict[int, Tensor] = {}  # made in this forward, of no value; kept, so that no identity is used again
        self.nodes: dict[Any, int] = {}  # autograd's, of the values; 0 of what is none though made from them: a buffer, a random mask
        self.differentiated: list[int] = []  # values of which the model takes gradients itself
        self.asked: set[int | None] = set()  # values of which the model wants to know whether they require a gradient
        self.points: set[int] = set()  # values right behind those that the model names itself
        self.wholes: list[int] = []  # values of tensors that were written through a view
        self.products = 0
        self.sizes: dict[str, int] = {}  # of layers' weights
        self.inputs = [self.value(t) for t in inputs]

    def checkpoint(self, fn: Any) -> Any:
        """What torch.utils.checkpoint runs."""
        self.checkpoints = True
        return fn

    def value(self, t: Tensor) -> int:
        self.count += 1
        t._fb_value = (id(self), self.count)  # type: ignore[attr-defined]
        self.shapes[self.count] = tuple(t.shape)
        if t.grad_fn is not None:
            self.nodes[t.grad_fn] = self.count
        return self.count

    def check(self, t: Tensor) -> None:
        """Refuse what is computed from a value where nobody could see it."""
        if self.known(t) is not None or t.grad_fn is None:
            return
        todo, seen = [t.grad_fn], set[Any]()
        while todo:
            node = todo.pop()
            if self.nodes.get(node):
                below = self.layer_below(self.nodes[node])
                raise ValueError(
                    f"what follows layer {below!r} runs where torch shows no calls, in torch.jit.script, torch.vmap, torch.autograd.grad "
                    "or an extension of C++, and layers below would get no learned gradient: write it in plain torch (PYTORCH_JIT=0 runs "
                    "scripts so)"
                )
            if node not in seen and node not in self.nodes:
                seen.add(node)
                todo += [before for before, _ in node.next_functions if before is not None]

    def parameter(self, t: Tensor) -> str:
        """The name of the one that a weight is, or is computed of."""
        todo: list[Any] = [t.grad_fn]
        for node in todo:  # which grows
            leaf = t if node is None else getattr(node, "variable", None)
            if id(leaf) in self.names:
                return self.names[id(leaf)]
            todo += [] if node is None else [n for n, _ in node.next_functions if n is not None and n not in todo]
        return "a tensor of its own"

    def layer_below(self, v: int) -> str:
        """The last layer that a value depends on."""
        found = {v}
        for c in reversed(self.calls):
            if not found.isdisjoint(c.outs):
                if c.layer is not None:
                    return c.layer[0]
                found.update(c.ins)
        return ""

    def known(self, t: Any) -> int | None:
        given = getattr(t, "_fb_value", None)
        return given[1] if given is not None and given[0] == id(self) else None

    def layer(self, weight: Any) -> tuple[str, int]:
        name = self.names.get(id(weight)) or self.network.entered or "layer"
        self.network.entered = ""
        self.ran[name] += 1
        return name, self.ran[name] - 1

    def point(self, name: str, h: Tensor) -> Tensor:
        """A point that the model names itself."""
        with torch._C.DisableTorchFunction():
            out = h.view_as(h)
        known = self.known(h)
        if known is not None:
            self.calls.append(Call(None, [known], [self.value(out)], point=name))
            self.points.add(self.count)
        return out

    def custom(self, cls: Any, plain: Any, args: Any, kwargs: Any) -> Any:
        """A custom autograd.Function."""
        if cls.__name__ == "CheckpointFunction":
            raise ValueError("what torch.utils.checkpoint runs would get no learned gradient: it needs use_reentrant=False")
        with torch._C.DisableTorchFunction():
            before = torch.get_rng_state()
            out = plain(*args, **kwargs)
            random = not torch.equal(before, torch.get_rng_state())
        ins = [v for t in tree_leaves((args, kwargs)) if (v := self.known(t)) is not None]
        if cls.__module__.startswith("torch.distributed."):  # fully_shard's, which changes nothing
            for t, o in zip(
                (t for t in args if isinstance(t, Tensor)), (o for o in tree_leaves(out) if isinstance(o, Tensor)), strict=True
            ):
                o._fb_value = getattr(t, "_fb_value", None)  # type: ignore[attr-defined]
        elif ins:
            outs = [self.value(t) for t in tree_leaves(out) if isinstance(t, Tensor)]
            call = Call(cls, ins, outs, random=random, cut=self.grad and not torch.is_grad_enabled())
            call.group = call.hook
            if not (cls.__module__.startswith("torch.") or call.cut):
                self.judge(cls, plain, args, kwargs)
            self.calls.append(call)
        return out

    def judge(self, cls: Any, plain: Any, args: Any, kwargs: Any) -> None:
        """Refuse a custom function that says another gradient than that of what it computes where the difference cannot follow it."""
        with torch._C.DisableTorchFunction(), torch.random.fork_rng([]):
            at = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and self.known(t) is not None and t.requires_grad]
            hides = bool(at) and declared(plain, args, kwargs, at, [torch.ones_like(t) for t in at]) is None
            if hides and contradicts(plain, args, kwargs, at):
                raise ValueError(
                    f"the gradient of custom autograd.Function {cls.__name__!r} is not that of what it computes, and B can learn it only "
                    "from a backward that can be differentiated: write it in torch, without once_differentiable"
                )

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, kind, name = kwargs or {}, kind_of(func), name_of(func)
        if kind in ("metadata", "gradient"):
            if same(func, _ASKS) and not str(sys._getframe(1).f_globals.get("__name__")).startswith("torch."):
                self.asked.add(self.known(args[0]))
            if name in ("backward", "grad"):
                self.differentiated += [v for t in tree_leaves(args[0]) if (v := self.known(t)) is not None]
            return func(*args, **kwargs)
        if not args and "input" in kwargs:
            args, kwargs = by_position(func, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        ins = [] if kind == "made" else [v for t in tensors if (v := self.known(t)) is not None]
        for t in tensors:
            self.check(t)
        before = torch.get_rng_state() if kind != "look" else None
        written = in_place(name, args, kwargs)
        silent = self.grad and not torch.is_grad_enabled()  # behind torch.no_grad there is no credit
        if silent and written:
            ins = [v for t in tensors[:1] if (v := self.known(t)) is not None]
        buffer = written and bool(tensors) and self.known(tensors[0]) is None and self.lives(tensors[0])
        whole = tensors[0]._base if written and tensors and ins and not buffer else None  # that a view writes into
        if whole is not None and (self.lives(whole) or self.known(tensors[0]) in self.points):
            whole = None
        if (v := self.known(whole)) is not None and v not in ins:
            ins.append(v)
        out = func(*args, **kwargs)
        if kind == "look":
            self.calls.append(Call(func, ins, []))
            return out
        drawn = before is not None and not torch.equal(before, torch.get_rng_state())
        if drawn and name.startswith("rrelu"):  # how many it draws depends on the signs
            raise ValueError(f"{name} draws random numbers that the two streams cannot share: use dropout, or a leaky ReLU")
        call = Call(func, ins, [], random=drawn, weighted=bool(ins) and len(ins) < len(tensors))
        call.cut = kind == "cut" or name == "bernoulli" or (silent and not written)
        if name in OWN_WEIGHTS:
            own = (t for t in tensors if t.requires_grad and self.known(t) is None and self.nodes.get(t.grad_fn) != 0)
            call.own = next((self.parameter(t) for t in own), "")
        results = [args[0]] if name == "__setitem__" else [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if ins and not buffer:
            call.outs = [self.value(t) for t in (*results, *([] if whole is None else [whole]))]
            self.wholes += call.outs[len(results) :]
        elif buffer or kind == "made":
            self.nodes |= {t.grad_fn: 0 for t in results if t.grad_fn is not None}
        if not ins:
            self.fresh |= {id(t): t for t in results if not (written or t.requires_grad)}
        first = args[0] if args else None
        if kind == "layer" and self.known_before(first, ins):
            assert isinstance(first, Tensor)
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if fixed_kernel(weight, self.names):
                self.network.entered = ""
            else:
                call.layer = self.layer(weight)
                self.sizes[call.layer[0]] = weight.numel()
            self.products += (first if "transpose" in name else out).numel() * weight[0].numel()
        call.group = name.removesuffix("_") in GROUP or _mask(name, args, ins)
        self.calls.append(call)
        return out

    def first_input(self) -> int:
        """Which of the tensors that went in the first layer depends on; one of several numbers before one number, a step's time."""
        made = {v: c for c in self.calls for v in c.outs}
        for c in self.calls:
            if c.layer is None:
                continue
            todo, seen, found = [c.ins[0]], set[int](), list[int]()
            while todo:
                v = todo.pop()
                if v in self.inputs and self.shapes[v]:
                    found.append(v)
                if v not in seen:
                    seen.add(v)
                    todo += reversed(made[v].ins) if v in made else []
            if found:
                return self.inputs.index(max(found, key=lambda v: (self.shapes[v][0] > 1, math.prod(self.shapes[v]) > 1)))
        return next((i for i, v in enumerate(self.inputs) if self.shapes[v]), 0)

    def lives(self, t: Tensor) -> bool:
        """What a forward writes and that was there before it: a buffer."""
        return t.is_leaf and id(t) not in self.fresh

    def known_before(self, t: Any, ins: list[int]) -> bool:
        return bool(ins) and isinstance(t, Tensor) and self.known(t) == ins[0]


def _mask(name: str, args: tuple[Any, ...], ins: list[int]) -> bool:
    """A constant for each sample, as DropPath multiplies with."""
    if name.strip("_") not in ("mul", "rmul") or len(args) < 2 or len(ins) != 1:
        return False
    x, mask = args[0], args[1]
    return type(mask) is Tensor and not mask.requires_grad and mask.ndim == x.ndim and mask.numel() == len(mask)


def fixed_kernel(weight: Tensor, names: Mapping[int, str]) -> bool:
    """Whether what looks like a layer is a function of the model's: a filter that blurs, with a buffer for its kernel."""
    return id(weight) not in names and not weight.requires_grad


def names_of(net: nn.Module) -> tuple[dict[int, str], tuple[Tensor, ...]]:
    """The name of the layer that each parameter is the weight of: its module's, or the parameter's own where that is called otherwise."""
    found: dict[int, str] = {}
    kept: list[Tensor] = []
    for module_name, module in net.named_modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) not in found:
                path = f"{module_name}.{name}" if module_name else name
                found[id(p)] = module_name if name == "weight" and module_name else path
                kept.append(p)
    return found, tuple(kept)


def place(
    recorder: Recorder,
    outputs: list[Tensor],
    *,
    found: bool,
    hidden: Callable[[str], bool],
    layerwise: bool,
    alone: bool,
    shares: bool,
    kept: Mapping[tuple[str, str], list[int]],
    earlier: Mapping[tuple[str, int], str],
) -> Placement:
    """Where points are, from the calls. ``found``: the layers that ``hidden`` allows get points; else those that the model has itself.
    ``alone``: layerwise, a layer reads an activity of a point only where nobody else does. ``shares``: layerwise, a layer that runs several
    times has one B for all of them; else, and in direct, a point, and a B, for each."""
    graph = _Graph(recorder, outputs)
    placement = Placement(random=frozenset(c.func for c in recorder.calls if c.random), checkpoints=recorder.checkpoints)
    reading = (c for c in recorder.calls if not graph.live.isdisjoint(c.outs) and name_of(c.func) != "__setitem__")
    placement.views = any(v in recorder.wholes for c in reading for v in c.ins)
    ends: dict[int, tuple[int, Chain]] = {}  # by the value behind a point: when it runs
    for i, c in enumerate(recorder.calls):
        if c.layer is None:
            continue
        placement.layers[c.layer] = None
        if c.cut or c.outs[0] not in graph.live or c.outs[0] in graph.bare:
            continue
        chain, last = _chain(c, graph, found)
        if chain is None or (found and not hidden(c.layer[0])):
            continue
        _check_name(c.layer)
        placement.layers[c.layer] = chain
        ends[last.outs[0]] = (max(i, recorder.calls.index(last)), chain)
    for i, c in enumerate(recorder.calls):
        if c.point and c.outs[0] in graph.live:
            if c.outs[0] not in graph.weighted:
                raise ValueError(
                    f"layer {c.point!r} is the network's output, which is never perturbed: pass points=[...] to convert, with the names of "
                    "the hidden layers"
                )
            if c.outs[0] in ends:
                continue
            ends[c.outs[0]] = (i, Chain("", c.point, (), (), None, explicit=True))
    names = [chain.point for _, chain in sorted(ends.values(), key=lambda end: end[0])]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ValueError(used_twice(twice))
    crossed = set[int]().union(*(graph.before_of(v) for v in recorder.differentiated)) & ends.keys()
    if crossed:
        raise ValueError(
            f"the forward differentiates what follows layer {recorder.layer_below(min(crossed))!r}, whose feedback point no such gradient "
            "crosses: let these layers run once more for it, on what is detached"
        )
    if layerwise:
        everywhere = found and all(hidden(c.layer[0]) for c in recorder.calls if c.layer)
        return _reads(recorder, graph, placement, ends, everywhere, alone, shares, earlier)
    placement.points = tuple(names)
    cut = set(ends)
    for c in recorder.calls:
        if c.ins and c.layer is None and not c.weighted and cut.issuperset(c.ins):
            cut.update(c.outs)
    placement.asked = not cut.isdisjoint(recorder.asked)
    placement.reach = {chain.point: tuple(i for i, known in enumerate(graph.before) if v in known) for v, (_, chain) in ends.items()}
    placement.kept = tuple(k for k, values in kept.items() if any(not graph.before_of(v).isdisjoint(ends) for v in values))
    free = graph.live - graph.bare - {c.ins[0] for c in recorder.calls if c.point}
    placement.own_weights = _carriers(recorder, graph, lambda c: name_of(c.func) in PRODUCTS and not free.isdisjoint(c.outs))
    return placement


def _carriers(recorder: Recorder, graph: _Graph, those: Callable[[Call], bool]) -> tuple[str, ...]:
    calls = (c for c in recorder.calls if c.own and not graph.live.isdisjoint(c.outs))
    return tuple(dict.fromkeys(f"{name_of(c.func)} by {c.own!r}" for c in calls if name_of(c.func) in SEVERAL_PRODUCTS or those(c)))


def used_twice(name: str) -> str:
    return f"point {name!r} runs twice in one forward: run both inputs as one batch (torch.cat), or let convert find the points"


def run_of(layer: tuple[str, int]) -> str:
    """The name of a layer's point: of its second run NAME:2."""
    name, before = layer
    return f"{name}:{before + 1}" if before else name


def _check_name(layer: tuple[str, int]) -> None:
    if layer[0] == "layer" and layer[1]:
        raise ValueError(
            "two layers have weights that are no parameters, a tied one's weight.T perhaps, and feedback cannot tell them apart: "
            "exclude=['layer'] trains what is below them through these weights"
        )


def layer_of(point: str) -> str:
    """The inverse: the layer's name."""
    name, _, run = point.rpartition(":")
    return name if name and run.isdecimal() else point


class _Graph:
    """Who reads what. ``ends``: the outputs; ``before``: what the gradient of each reaches, ``live`` of any; ``bare``: what reaches an
    output through no layer, but for outputs from which a layer makes another one: features beside logits; ``weighted``: what a layer or a
    tensor of the model's own reads on the way."""

    def __init__(self, recorder: Recorder, outputs: list[Tensor]) -> None:
        ends = [v for t in outputs if (v := recorder.known(t)) is not None]
        self.made = {v: c for c in recorder.calls for v in c.outs}
        self.ends, self.before = set(ends), [self.before_of(v) for v in ends]
        self.live = set[int]().union(*self.before)
        running = [c for c in recorder.calls if any(v in self.live for v in c.outs)]
        self.readers: dict[int, list[Call]] = collections.defaultdict(list)
        self.seen: collections.Counter[int] = collections.Counter(v for c in recorder.calls for v in set(c.ins))
        self.weighted, self.above, below = set[int](), set[int](), set[int]()
        for c in reversed(running):
            if c.layer is not None or any(v in below for v in c.outs):
                below.update(c.ins)
        self.bare = self.ends - below
        for c in running:
            for v in c.ins:
                self.readers[v].append(c)
            if c.layer is not None or any(v in self.above for v in c.ins):
                self.above.update(c.outs)  # behind a layer
        for c in reversed(running):
            if c.layer is None and not c.cut and any(v in self.bare for v in c.outs):
                self.bare.update(c.ins)
            if c.weighted or any(v in self.weighted for v in c.outs):
                self.weighted.update(c.ins)

    def before_of(self, end: int) -> set[int]:
        """What an output depends on."""
        found, todo = set[int](), [end]
        while todo:
            v = todo.pop()
            if v not in found:
                found.add(v)
                todo += self.made[v].ins if v in self.made and not self.made[v].cut else []
        return found


def _chain(c: Call, graph: _Graph, found: bool) -> tuple[Chain | None, Call]:
    """From a layer to its point: the last norm, activation, pooling or dropout while one call that the output depends on reads each."""
    assert c.layer is not None
    calls, last = [c], c
    while len(last.outs) == 1 and last.outs[0] not in graph.ends and len(graph.readers[last.outs[0]]) == 1:
        (following,) = graph.readers[last.outs[0]]
        if following.point:
            names = [name_of(k.func) for k in calls]
            alone = [graph.seen[k.outs[0]] == 1 for k in calls]
            return _made(c, following.point, calls, fusible(names, alone), explicit=True), following
        own = following.ins == last.outs and len(following.outs) == 1 and following.outs[0] not in graph.bare
        if not following.group or following.layer is not None or not own:
            break
        calls.append(following)
        last = following
    if not found:
        return None, last
    while calls[-1].hook:  # a point cuts, and torch hooks nothing that needs no gradient
        calls.pop()
    last = calls[-1]
    names = [name_of(k.func) for k in calls]
    return _made(c, run_of(c.layer), calls, fusible(names, [graph.seen[k.outs[0]] == 1 for k in calls[:-1]] + [True])), last


def _made(c: Call, point: str, calls: list[Call], fuses: tuple[bool, ...], explicit: bool = False) -> Chain:
    assert c.layer is not None
    maps = "conv" in name_of(c.func)
    return Chain(c.layer[0], point, tuple(k.func for k in calls[1:]), fuses, maps, explicit)


def _reads(
    recorder: Recorder,
    graph: _Graph,
    placement: Placement,
    ends: dict[int, tuple[int, Chain]],
    everywhere: bool,
    alone: bool,
    shares: bool,
    earlier: Mapping[tuple[str, int], str],
) -> Placement:
    """Layerwise: the point whose activity each layer reads; its own, ``NAME.input``, where that is no point's, is read already, or was
    another point's in an ``earlier`` recording."""
    placement.own_weights = _carriers(recorder, graph, lambda c: not graph.above.isdisjoint(c.ins))
    claimed: list[str] = []
    read: set[str] = set()  # by a layer that has its B elsewhere
    for c in recorder.calls:
        if c.layer is None or c.cut or c.outs[0] not in graph.live or c.ins[0] not in graph.above:
            continue
        v, shared = c.ins[0], len(graph.readers[c.ins[0]]) > 1
        while v not in ends and v in graph.made and (graph.made[v].hook or name_of(graph.made[v].func) in REARRANGEMENTS | DROPOUTS):
            v = graph.made[v].ins[0]
            shared = shared or len(graph.readers[v]) > 1
        source = ends[v][1].point if v in ends and not (alone and shared) else ""
        if not source and not everywhere:
            continue
        _check_name(c.layer)
        first = next((point for (name, _), point in placement.reads.items() if name == c.layer[0]), None) if shares else None
        if first is not None:
            read.add(source)
            placement.reads[c.layer] = first
            continue
        if not source or source in claimed or earlier.get(c.layer, source) != source:
            source = f"{run_of(c.layer)}.input"
        claimed.append(source)
        placement.reads[c.layer] = source
    unread = [] if everywhere else [chain.point for _, chain in ends.values() if chain.point not in (*claimed, *read)]
    if unread:
        raise ValueError(
            f"layerwise feedback: no layer reads point {unread[0]!r} directly: use feedback='direct', or convert without points, include "
            "and exclude, which gives each layer a B of its own"
        )
    placement.points = tuple(claimed)
    placement.answering = sum(recorder.sizes[name] for name in {name for name, _ in placement.reads})
    return placement


def keeps(net: nn.Module, known: Callable[[Any], int | None]) -> dict[tuple[str, str], list[int]]:
    """By module and attribute, what ``known`` says of the tensors that the modules keep in their own attributes."""
    found: dict[tuple[str, str], list[int]] = {}
    for name, m in net.named_modules():
        for k, v in m.__dict__.items():
            if k not in _INTERNAL and isinstance(v, (Tensor, list, tuple, dict)):
                values = [i for t in tree_leaves(v) if isinstance(t, Tensor) and (i := known(t)) is not None]
                if values:
                    found[name, k] = values
    return found


_INTERNAL = frozenset(vars(nn.Module()))
