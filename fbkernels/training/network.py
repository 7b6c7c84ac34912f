"""What the points of one network share and what lives longer than a step; the forward of a converted network."""

from __future__ import annotations

import fnmatch
import functools
import math
import warnings
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_map_only

from fbkernels import ops
from fbkernels._compile import constant, whole
from fbkernels._tree import at, copied, differs, flatten, known_to_torch, tensors, unflatten
from fbkernels.layout import Layout, Rows
from fbkernels.placement import Placement, Recorder, keeps, layer_of, names_of, place
from fbkernels.rules.base import Gain, Measurement, Rule
from fbkernels.stream.chain import Chain
from fbkernels.stream.mode import Streams, shown
from fbkernels.training.autograd import Reach, Sent
from fbkernels.training.checkpoint import checkpointed, given
from fbkernels.training.compile import described, known, placed, register
from fbkernels.training.direct import Direct
from fbkernels.training.layerwise import Layerwise
from fbkernels.training.point import Entered, FeedbackPoint, Stateful
from fbkernels.training.probe import settle
from fbkernels.training.processes import Processes
from fbkernels.training.settings import Settings
from fbkernels.training.step import Step
from fbkernels.untouched import untouched

MEMORY = 20  # measured steps that the share which B explains is a running mean of
BOUND = 2  # samples for each noisy unit, after which a warm-up ends in any case: B needs about one (SPEC 4)


class Network(Stateful):
    """The rule, the noise and the points of a converted network; it runs the training forward and hands B's updates on."""

    step: Tensor  # int64, training steps so far
    skipped: Tensor  # int64, samples whose loss or loss change was not finite

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.key = register(self)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))
        self.points: dict[str, FeedbackPoint] = {}
        self.readers = nn.ModuleDict()  # points at a layer's input, and those of layers that are no modules of their own
        self.root: tuple[nn.Module, ...] = ()  # the network; a tuple, so that it is no child
        self.own: tuple[Any, ...] = ()  # the forward that was set on the model itself, of a bound method its function and the network
        self.placement: Placement | None = None
        self.stale = False  # the placement is not of this model any more: a layer was replaced, a hook changes activities
        self.unplaced: set[str] = set()  # layers that ran and that no recording has seen, as they are skipped at times
        self.buffers_known: frozenset[int] = frozenset()
        self.moved = False  # buffers may be other tensors since
        self.steps = 0  # the host's copy of step, so that every= and warmup= need no synchronisation
        self.warming = settings.auto  # a warm-up that ends by itself may last; compiled and captured steps look at the state alone
        if settings.auto:
            self.state["warmup"] = torch.zeros(7, dtype=torch.float64)  # see ``warm``
        self.current: Step | None = None  # the last training forward, until its loss has taken it
        self.running: tuple[Any, ...] = ()  # the recorder or mode of the forward that runs; a tuple, so that Dynamo sees no module
        self.entered = ""  # the layer whose module runs, where its weight is computed
        self.watched = False  # a forward hook of the user's changes an activity
        self.offset = 0  # of this process' first perturbed row among those of all
        self.probe = ""  # metrics: "exact" (backprop through the same points) or "learned", both without noise
        self.warned = self.unseen = self.named = self.lost = self.told = self.ran_away = False  # what a warning was given of
        self.measured: list[tuple[Step, Measurement]] = []  # layerwise: steps whose backward pass has run
        self.static = False  # a CUDA graph was captured: what one step hands to the next keeps its storage
        self.scheduled: Measurement | None = None  # the last step that B was to learn from
        self.processes: Processes | None = None  # where there are several; PerturbedLoss knows them

    # the forward

    def forward(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own forward, in training with both streams."""
        if not root.training or not torch.is_grad_enabled():  # what cannot learn is the plain model
            return self.plain(root, args, kwargs)
        return self.perturbed(root, args, kwargs)

    @whole
    def perturbed(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = self.begin(root, args, kwargs)
        output = self.run(step, root, args, kwargs)
        if torch.compiler.is_compiling():
            if step.unknown:
                raise RuntimeError(f"layer {step.unknown[0]!r} is new to the network: take an eager step before you compile")
            self.current = step
            return output
        missed = [
            c for (name, k), c in step.placement.layers.items() if c is not None and step.ran.get(name, 0) > k and not self.reached(step, c)
        ]
        self.stale = self.stale or bool(missed)
        self.unplaced |= {*step.unknown}
        self.watched = self.watched or bool(missed)
        self.current = step
        return output

    def plain(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward as it was: its class', or the one that was set on the model itself."""
        forward, *bound = self.own or (type(root).forward, root)
        return forward(*bound, *args, **kwargs)

    def run(self, step: Step, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mode = Streams(step, self.buffers_known)
        mode.sources = self.settings.layerwise
        if torch.compiler.is_compiling():  # no mark of a graph's is left on what it was given
            args, kwargs = tree_map_only(Tensor, lambda x: x.view_as(x), (args, kwargs))
        for x in tensors(args, kwargs):
            mode.put(x, None)
        self.running = (mode,)
        try:
            with shown(mode), checkpointed(mode, step), mode:
                output = self.plain(root, args, kwargs)
            self.running = ()
            for layer, t in mode.finish():
                if t.requires_grad:
                    t.register_hook(functools.partial(_lost, weakref.ref(self), f"what was kept behind layer {layer!r}"))
            output = self.end(step, mode, output)
            if step.placement.kept and not torch.compiler.is_compiling():
                for name, attribute in step.placement.kept:
                    own = root.get_submodule(name).__dict__
                    own[attribute] = self.kept(mode, f"attribute {attribute!r} of {name or 'the model'}", own.get(attribute))
            return output
        finally:
            self.running = ()
            mode.close()

    def kept(self, mode: Streams, name: str, value: Any) -> Any:
        """Direct: an attribute that is computed behind a point, whose gradient would be lost without a word."""
        if type(value) in (list, tuple):
            told = [self.kept(mode, name, v) for v in value]
            if isinstance(value, tuple):
                return tuple(told)
            value[:] = told
            return value
        if type(value) is dict:
            value.update({k: self.kept(mode, name, v) for k, v in value.items()})
        if not isinstance(value, Tensor) or mode.mark(value) is None or not value.is_floating_point():
            return value
        t = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        t.register_hook(functools.partial(_lost, weakref.ref(self), name))
        return t

    def begin(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        settings, rule = self.settings, self.settings.rule
        if transformed():
            raise RuntimeError(
                "learned feedback inside a torch.func transform: it would differentiate through the forward weights instead of B; "
                "call loss.backward() or torch.autograd.grad"
            )
        compiling = torch.compiler.is_compiling()
        if compiling and not known(self.key):  # before Dynamo has seen a point's tensors
            placed(self.key, described(args), described(kwargs))
        if settings.layerwise:
            self.flush()
        if capturing(self.step):
            self._capture()
        if self.warming and not (compiling or capturing(self.step) or self.step.is_meta):
            self.warming = not bool(self.state["warmup"][-1])
        if self.current is not None:  # a forward without a loss
            self.current.release()
        self.current = None
        if self.moved and not compiling:
            self.moved, self.buffers_known = False, frozenset(id(t) for t in root.buffers())
        placement = self.placement
        samples = self._samples(placement, args, kwargs)
        if compiling:
            assert placement is not None
            if placement.checkpoints:
                raise RuntimeError(
                    "the second run of torch.utils.checkpoint cannot be traced: leave torch.utils.checkpoint out of a compiled step"
                )
            if placement.views:
                raise RuntimeError(
                    "the model reads what it has written through a view, h[:, :3].mul_(2) say, which a trace does not follow: "
                    "leave torch.compile out, or write h[:, :3] *= 2"
                )
        elif placement is None or self.stale or self.unplaced or (samples > 1 and not placement.settled):
            placement = self.placement = self.find(root, args, kwargs)
            self.stale = False
            self.unplaced -= {name for name, _ in placement.layers}
            samples = self._samples(placement, args, kwargs)
        learning = not self.probe and (settings.every == 1 or self.steps % settings.every == 0)
        wanted = rule.private if self.probe == "learned" else rule.perturbs and learning
        perturbing = wanted and torch.is_grad_enabled()
        step = (Layerwise if settings.layerwise else Direct)(self, placement, samples, learning, perturbing, self.probe)
        step.inputs = (args, kwargs) if rule.supervised else ()  # only a second pass needs the batch after this one
        if self.processes is not None and not self.probe and torch.is_grad_enabled():
            if torch.compiler.is_compiling():
                raise RuntimeError("a training step of several processes cannot be compiled yet: leave torch.compile out")
            if not self.processes.agreed:
                self.processes.agree(self._description())
                placement.products = self.processes.most(placement.products)  # one that begins with no sample has not seen them
            if perturbing or (learning and rule.adapts):
                step.part = self.processes.part(step.perturbed_rows)
        self.offset = step.offset
        for point in self.points.values():
            point._weight = ()
        step.begin()
        return step

    def _samples(self, placement: Placement | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        x = None if placement is None else at(placement.argument, args, kwargs)
        if placement is not None and x is not None:
            return x.shape[placement.batch.dim]
        known_to_torch((args, kwargs))
        if not any(x.ndim for x in tensors(args, kwargs)):
            raise ValueError("a converted network needs a tensor with a batch dimension as input")
        self.stale = True  # other arguments than before
        return 0

    def find(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Placement:
        """Record a forward, place the points, and see which rows are whose; the network is left as it was."""
        settings = self.settings
        names, weights = names_of(root)
        recorder, output, kept = self._recorded(root, names, args, kwargs)
        outputs = [t for t in flatten(output)[0] if isinstance(t, Tensor) and differs(t)]
        for t in outputs:
            recorder.check(t)
        if not any(recorder.known(t) is not None for t in outputs):
            raise TypeError(f"the network's forward must return tensors computed from its input, got {type(output).__name__}")
        placement = place(
            recorder,
            outputs,
            found=settings.found,
            hidden=self.hidden,
            layerwise=settings.layerwise,
            alone=settings.rule.supervised,
            shares=not settings.rule.measures,
            kept=kept,
            earlier={} if self.placement is None else self.placement.reads,
        )
        placement.names, placement.weights = names, weights
        if placement.own_weights and not self.named:
            self.named = True
            carried = (
                "the error goes on to what lies below, and to earlier times, through these weights; feedback='direct' gives each point "
                "below an error of its own"
                if settings.layerwise
                else "they are trained by backprop, through each other's weights, earlier times too, and through those of what reads "
                "them, up to the next point" + "; points=[...] can name a module right behind which there is to be one" * settings.found
            )
            warnings.warn(f"{settings.structure} feedback has no B for {', '.join(placement.own_weights)}: {carried}", stacklevel=5)
        if placement.asked and not self.named:
            self.named = True
            warnings.warn(
                "direct feedback: the model asks whether an activity requires a gradient, which right behind a point it does not, so it "
                "may go another way than the plain model: ask for torch.is_grad_enabled(), or use feedback='layerwise'",
                stacklevel=5,
            )
        read = {name for name, _ in placement.reads}
        if (bad := next((names[id(w)] for w in weights if w.is_complex() and names[id(w)] in read), None)) is not None:
            raise TypeError(f"layer {bad!r} has complex weights, and layerwise feedback has no complex B: use feedback='direct'")
        points, earlier = dict(self.points), {} if self.placement is None else dict(self.placement.reads)
        if self.placement is not None:
            placement.join(self.placement)
        if not placement.points:
            raise ValueError("no feedback point was reached in the forward pass: name modules that run with points=[...]")
        self.buffers_known = frozenset(id(t) for t in root.buffers())
        self._number(root, placement)
        self._reckon()
        for layer, name in placement.reads.items():
            if (old := earlier.get(layer, name)) != name:  # B goes where its layer reads now
                self.points[name].state, points[old].state = points[old].state, {}
        settle(self, placement, recorder, root, args, kwargs)
        placement.products = recorder.products // max(1, self._samples(placement, args, kwargs))
        return placement

    def _recorded(self, root: nn.Module, names: dict[int, str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Recorder, Any, Any]:
        """A recorder that has seen a forward, what that gave, and what the model keeps with a gradient."""
        own = copied((args, kwargs))
        recorder = Recorder(self, names, tensors(*own))
        self.running = (recorder,)
        try:
            with untouched(root, own, self.runs):
                with shown(recorder), given(recorder.checkpoint), recorder:
                    output = self.plain(root, *own)
                known_to_torch(output)
                kept = {} if self.settings.layerwise else keeps(root, lambda t: recorder.known(t) if t.requires_grad else None)
                return recorder, output, kept
        except Exception as e:
            if type(e).__module__.startswith("torch._dynamo"):
                raise TypeError(
                    "a function inside the model is compiled by torch.compile, which hides its calls: call it uncompiled, and compile the "
                    "converted network"
                ) from e
            if self.watched or not any(m._forward_hooks or m._forward_pre_hooks for m in root.modules()):
                raise
        finally:
            self.running = ()
        self.watched = True  # a forward may need what a hook does
        return self._recorded(root, names, args, kwargs)

    def renamed(self, placement: Placement, weight: Tensor) -> str:
        """The name of a layer whose weight is another tensor than it was: by functional_call, ``assign=True``, a new parameter or layer."""
        root = self.root[0]
        placement.names, placement.weights = names_of(root)
        modules = dict(root.named_modules())
        # a new layer has no point of its own yet: the next forward sees to that
        present = {*modules.values()}
        self.stale = self.stale or any(p.converted and p not in present for p in self.points.values())
        if id(weight) not in placement.names and (new := [n for n, m in modules.items() if Entered.lacks(m)]):
            for name in new:
                modules[name].register_forward_pre_hook(Entered(self, name))
            warnings.warn(
                f"the weights of {', '.join(new)} are computed since convert: this step trains those layers by backprop", stacklevel=2
            )
        return placement.names.get(id(weight), "layer")

    def adopt(self, other: Network) -> None:
        """The placement of the network that this one is a copy of."""
        if other.placement is not None:
            names, weights = names_of(self.root[0])
            self.placement = replace(other.placement, names=names, weights=weights)
            self.buffers_known = frozenset(id(t) for t in self.root[0].buffers())
            self._reckon()

    def _reckon(self) -> None:
        """Make the sums of ``explain``, where there are none for these points; a captured step finds them."""
        n = 2 + len(self.points)
        if self.settings.rule.explains and len(self.state.get("explained", ())) != n:
            self.state["explained"] = torch.zeros(n, dtype=torch.float64, device=self.step.device)

    def reached(self, step: Step, chain: Chain) -> bool:
        """Whether the point of a chain that began has run."""
        return chain.point in step.activities or chain.point not in self.points

    def runs(self, hook: Any) -> bool:
        """Whether a hook runs while a forward is recorded: ours and torch's, and the user's where one was seen to change an activity."""
        return self.watched or str(getattr(hook, "__module__", "")).startswith(("torch.", "fbkernels.training"))

    def hidden(self, name: str) -> bool:
        """Whether a layer may get a point."""
        kept = self.settings.include is None or any(fnmatch.fnmatchcase(name, p) for p in self.settings.include)
        return kept and not (self.settings.exclude is not None and any(fnmatch.fnmatchcase(name, p) for p in self.settings.exclude))

    def _number(self, root: nn.Module, placement: Placement) -> None:
        """Points are numbered in the order in which they run (SPEC 6)."""
        own = {m.name: m for m in root.modules() if isinstance(m, FeedbackPoint) and m.name}
        self.points.clear()
        for index, name in enumerate(placement.points):
            point = own.get(name) or self._make(root, name)
            point.index = index
            self.points[name] = point

    def _make(self, root: nn.Module, name: str) -> FeedbackPoint:
        """A point that convert did not foresee: at a layer's input, or behind a layer that is no module of its own."""
        point = FeedbackPoint()
        point.converted = True
        point.train(self.training)
        point.name, point._network = name, (self,)
        layer = dict(root.named_modules()).get(name)
        if name.endswith(".input"):
            point.reads = name.removesuffix(".input")
            self.readers[point.reads.replace(".", "/")] = point
        elif layer is not None and not hasattr(layer, "feedback") and not isinstance(layer, nn.Sequential):
            layer.feedback = point
        else:
            self.readers[name.replace(".", "/") + "/"] = point
        return point

    def end(self, step: Step, mode: Streams, output: Any) -> Any:
        """Keeps the differences of the outputs, hands out plain tensors."""
        leaves, spec = flatten(output)
        twice = [t for i, t in enumerate(leaves) if isinstance(t, Tensor) and any(t is o for o in leaves[:i])]  # with a gradient for each
        for i, t in enumerate(leaves):
            if not isinstance(t, Tensor) or (mark := mode.mark(t)) is None or not differs(t):
                continue
            if mark[3] is not None:
                mode.realise(t)
            t = mode.current(t)
            mark = mode.mark(t)
            rows = step.placement.outputs[len(step.outputs)] if len(step.outputs) < len(step.placement.outputs) else Rows()
            if rows is None:
                raise ValueError(f"the rows of an output of shape {tuple(t.shape)} cannot be matched with the {step.samples} samples")
            if not t.requires_grad and (h := mode.before(t)) is not None:  # features beside logits: the cut is not theirs
                t = h.view_as(h)
            if step.constant and not t.requires_grad:  # so that what is computed from it can be followed, and differentiated
                t = t.detach().requires_grad_().view_as(t)
            if self.processes is not None and not self.settings.layerwise and not step.outputs:
                t = Reach.apply(t, *step.activities.values())
            elif any(t is own for own in step.activities.values()) or any(leaves[i] is o for o in twice):
                t = t.view_as(t)
            if not (self.probe or torch.compiler.is_compiling()) and t.requires_grad:
                # a hook that held the step would keep it for ever: no collector sees the way from a tensor through its hooks
                edge = get_gradient_edge(t)
                edge.node.register_prehook(functools.partial(_unseen, weakref.ref(self), step.sent, edge.output_nr))  # behind t's own
            step.layouts.append(Layout.of(t, step.samples, False, 1, rows))
            step.outputs.append(t)
            step.edges.append(None if torch.compiler.is_compiling() or not t.requires_grad else get_gradient_edge(t))
            step.changes.append(None if mark is None else mark[1])
            leaves[i] = t
            if not torch.compiler.is_compiling() and hasattr(t, "_fb"):
                del t._fb
        if not step.outputs:
            raise TypeError(f"the network's forward must return tensors computed from its input, got {type(output).__name__}")
        outputs = sum(layout.units for layout in step.layouts)
        if self.settings.rank is not None and self.settings.rank > outputs:
            raise ValueError(f"rank must be at most {outputs}, the number of outputs, got {self.settings.rank}")
        if not step.activities and not step.unknown:
            raise ValueError("no feedback point was reached in the forward pass: name modules that run with points=[...]")
        return unflatten(leaves, spec)

    def _capture(self) -> None:
        """A CUDA graph replays what this step does with the tensors that it finds now."""
        settings, rule = self.settings, self.settings.rule
        refused = rule.measures or rule.statistics if settings.layerwise else rule.supervised
        if refused or settings.every > 1 or self.steps < settings.warmup or self.processes is not None:
            raise RuntimeError(
                "a CUDA graph can hold a training step with direct feedback and a rule that needs no second pass, or with layerwise "
                "feedback and WeightMirror, Fixed, SignSymmetric or WeightTransport; every=1, after the warm-up, in one process"
            )
        if settings.layerwise and rule.learned and any("B" not in point.state for point in self.points.values()):
            raise RuntimeError("take a training step before the capture of one: it makes B")
        learns = type(rule).learn is Rule.learn and rule.adapts and not settings.layerwise
        if learns and any(point.pending is None for point in self.points.values()):
            raise RuntimeError("take a training step right before the capture of one: it makes B, its statistics and its pending update")
        self.static = True

    # learning B

    def project(self, t: Tensor) -> Tensor:
        """[N, outputs] as B's regression sees it: t C with ``rank``, C [outputs, rank] with orthonormal columns, a function of the seed."""
        rank = self.settings.rank
        if rank is None:
            return t
        if "C" not in self.state:
            last = torch.full((), 2**32 - 1, dtype=torch.int64)  # a step that training does not reach, and a point
            normal = ops.noise(last, self.settings.seed, 2**32 - 1, t.shape[1], rank, 1.0, "gaussian", dtype=torch.float64)
            Q, R = torch.linalg.qr(normal)
            self.state["C"] = (Q * R.diagonal().sign()).to(self.step.device)
        return t @ self.state["C"].to(t.dtype)

    @property
    def looks(self) -> bool:
        """Whether a number may be looked at: a look costs a CPU less than masks do, and nothing else can afford it."""
        return self.step.is_cpu and self.processes is None and not (self.static or torch.compiler.is_compiling())

    def skip(self, ok: Tensor) -> None:
        """Count the samples that are not ok, of all processes."""
        skipped = (~ok).sum()
        self.skipped.add_(skipped if self.processes is None else self.processes.sum(skipped))

    def measure(self, step: Step, e: Tensor, dL: Tensor, dy: Tensor, ok: Tensor, dtype: torch.dtype) -> Measurement:
        """What the step showed: the loss change of each perturbed sample and e = dL/doutput, or e C; samples that are not ok count as
        zero."""
        settings, n = self.settings, len(ok)
        w = (dL / settings.noise_std**2).to(dtype)
        prediction: Tensor | float = torch.cat([*step.predictions.values()]).sum(0) if step.predictions else 0.0
        e = e[:n]
        if not (self.looks and bool(ok.all()) and math.isfinite(float(w.sum()))):
            ok = ok & torch.isfinite(w)
            self.skip(ok)
            e, dy, prediction = torch.where(ok[:, None], e, 0.0), torch.where(ok[:, None], dy, 0.0), prediction * ok[:, None]
            w, dL = torch.where(ok, w, 0.0), torch.where(ok, dL, 0.0)
        m = Measurement(
            step=self.step.clone(),
            rows=n,
            std=settings.noise_std,
            units=sum(self.points[name].units for name in step.activities),
            regressor=self.project(e).to(dtype),
            w=w,
            loss_change=dL.to(dtype),
            output_change=self.project(dy).to(dtype),
            prediction=prediction,
            points=tuple(step.activities),
            errors=step.errors,
            ok=ok,
            part=step.part,
        )
        if step.explains and not settings.layerwise:
            nothing = torch.zeros_like(m.regressor)
            Xi_B = torch.stack([step.predictions[p].sum(0) if p in step.predictions else nothing for p in self.points])
            self.explain(m, m.units, *settings.rule.effect(m, Xi_B * ok[:, None]))
        return m

    def explain(self, m: Measurement, units: int, t: Tensor, p: Tensor) -> None:
        """Add a step to the running sums behind ``metrics.explained``: of t [N, ...], what the noise did, and of p [points, N, ...], what
        each point's B said before it learned from that. A point's part is 2 t p - p^2: their sum is t^2 - (t - sum p)^2, but for
        products of two layers' noise, which are zero in the mean. No checkpoint has them: compiled steps measure at other steps."""
        t, p = t.double(), p.double()
        whole, left = t.square().sum(), (t - p.sum(0)).square().sum()
        sums = m.sum(torch.cat((torch.stack((whole, whole - left)), (2 * t * p - p.square()).flatten(1).sum(1))))
        self.state["explained"].mul_(1 - 1 / MEMORY).add_(sums)
        if self.warming:
            self.warm(torch.where(sums[0] > 0, sums[1] / sums[0], 0.0), m.batch, BOUND * units)

    @property
    def holds(self) -> bool:
        """Whether parameters stand still in the next step, since B learns first."""
        return bool(self.state["warmup"][-1] == 0) if self.settings.auto else int(self.step) < self.settings.warmup

    def warm(self, share: Tensor, rows: int, bound: int) -> None:
        """A step of the warm-up that ends by itself, on the device: a function of what was measured, of all processes together.

        Its mean share is compared over stretches of samples, each as long as all before it. The warm-up ends behind one that is less than
        half as much again as the one before, if that had 8 steps or more and was 4 standard errors above zero; or after ``bound`` samples.
        """
        samples, begun, steps, total, square, before, ended = self.state["warmup"].unbind()
        samples, steps, total, square = samples + rows, steps + 1, total + share, square + share.square()
        mean = total / steps
        error = ((square - total * mean).clamp_min(0) / (steps * (steps - 1))).sqrt()  # of one step nan, which is above nothing
        full = samples >= 2 * begun
        ended = (ended > 0) | (samples >= bound) | (full & (before > 0) & (mean < 1.5 * before))
        before = torch.where(full, torch.where((steps >= 8) & (mean > 4 * error), mean, 0.0), before)
        begun = torch.where(full, samples, begun)
        steps, total, square = (torch.where(full, 0.0, v) for v in (steps, total, square))
        new = torch.stack((samples, begun, steps, total, square, before, ended.double()))
        self.state["warmup"].copy_(torch.where(self.state["warmup"][-1] > 0, self.state["warmup"], new))  # a compiled step goes on

    def schedule(self, m: Measurement) -> None:
        """Direct: let B take the step before the next forward (SPEC 5)."""
        rule = self.settings.rule
        known, part = dict(self.state), m.part
        if part is not None and not rule.supervised:
            if rule.exchanged:
                m = m.gathered(rule.exchanged)
            else:
                (G,) = part.gather(rule.update(m, self.state)[1])
                m = replace(m, rows=len(G), part=None, gains=(None, G))
        m.gains = finite(*(m.gains or rule.update(m, self.state)), self.looks)
        if self.static and self.scheduled is not None:
            for name in rule.statistics:
                self.state[name] = known[name].copy_(self.state[name])
            old, new = self.scheduled.handed_on, m.handed_on
            if [t.shape for t in old] != [t.shape for t in new]:
                raise RuntimeError(f"a network with a captured step takes batches of {self.scheduled.rows} samples, got {m.rows}")
            for t, value in zip(old, new, strict=True):
                t.copy_(value)
            m = self.scheduled
        self.scheduled = m
        for name in m.points:
            self.points[name].pending = m
        if m.part is not None:
            self.flush()

    def flush(self) -> None:
        """Apply every pending update of B."""
        measured, self.measured = self.measured, []
        for step, m in measured:
            with torch.no_grad():
                step.learn(m)
            self._flush_points()
        self._flush_points()
        self._spend()

    def _spend(self) -> None:
        """A graph's next replay learns once more from what was scheduled: let that be nothing."""
        if not self.static or self.scheduled is None:
            return
        with torch.no_grad():
            for t in self.scheduled.handed_on[1:]:
                t.zero_()
        for name in self.scheduled.points:
            self.points[name].pending = self.scheduled

    def _flush_points(self) -> None:
        for point in self.points.values():
            if point.pending is not None or self.settings.rule.follows:
                point.flush()

    def advance(self) -> None:
        self.step.add_(1)
        if self.settings.every > 1 or self.settings.warmup or not torch.compiler.is_compiling():
            self.steps += 1

    def warn(self) -> None:
        """One warning when samples were skipped; on a GPU only ``fb.summary`` looks, because looking synchronises."""
        if not self.warned and not torch.compiler.is_compiling() and self.skipped.device.type == "cpu" and int(self.skipped):
            self.warned = True
            warnings.warn(f"{int(self.skipped)} samples had a non-finite loss or loss change; B and its statistics skip them", stacklevel=4)

    def overflowed(self, point: str) -> None:
        """One warning when an update of a point's B was dropped since it is not finite."""
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"an update of B of point {point!r} was non-finite and is left out: {self.settings.rule!r} diverges; take a smaller lr or "
                "a larger gamma, and a smaller learning rate where the network itself diverges",
                stacklevel=4,
            )

    def extra_repr(self) -> str:
        return str(self.settings)

    def __prepare_scriptable__(self) -> Network:
        """What torch.jit.script calls of each module first."""
        raise TypeError("a converted network cannot be scripted: torch.jit.script(fbkernels.revert(net)), which is what it is in eval")

    # checkpoints

    def names(self) -> tuple[str, ...]:
        return (*(() if self.settings.layerwise else self.settings.rule.statistics), "warmup")

    def home(self) -> torch.device:
        return self.step.device

    def check(self, root: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Hook before a checkpoint is loaded into the network: refuse another network's before anything is written."""
        own = {prefix + k: t for k, t in (*root.named_parameters(), *root.named_buffers())}
        own |= {f"{prefix}{n}.{k}": t for n, m in root.named_modules() if isinstance(m, Stateful) for k, t in m.state.items()}
        for key, t in own.items():
            if key in state_dict and state_dict[key].shape != t.shape:
                raise ValueError(
                    f"checkpoint of another network: size mismatch for {key}, {tuple(state_dict[key].shape)} in the checkpoint, "
                    f"{tuple(t.shape)} here"
                )
        here = {k.rpartition(".")[0] for k in own if k.endswith(".shared.step")}
        theirs = [k for k in state_dict if k.endswith(".shared.method")]
        if not theirs:
            ours = next(iter(here), "")
            if state_dict and ours and f"{ours}.step" not in state_dict and (self.step.is_meta or not int(self.step)):  # the plain model's
                self._restart(next(iter(state_dict.values())).device if self.step.is_meta else self.step.device)
                state_dict |= {f"{ours}.step": self.step, f"{ours}.skipped": self.skipped}
                state_dict |= {f"{ours}.{k}": t for k, t in self.state.items() if k == "warmup"}
            return
        found = {k.rpartition(".")[0] for k in state_dict if k.endswith(".B")}
        modules, made = dict(root.named_modules(remove_duplicate=False)), set[str]()
        points = {prefix + name: m for name, m in modules.items() if isinstance(m, FeedbackPoint)}
        if self.placement is None:  # which will show these points, at the first training forward
            first = {m: n for n, m in root.named_modules()}  # of several names
            for key in found - points.keys():
                path = key.removeprefix(prefix)
                reader, layer = path.rpartition(".shared.readers.")[1:]
                at = layer.rstrip("/").replace("/", ".") if reader else path.removesuffix(".feedback")
                at = first[modules[at]] if at in modules else at
                if layer_of(at) in modules and self.settings.found and self.hidden(layer_of(at)):
                    made.add(f"{at}.input" if reader and not layer.endswith("/") else at)
            for name in made:
                self._make(root, name)
            points |= {prefix + n: m for n, m in root.named_modules(remove_duplicate=False) if isinstance(m, FeedbackPoint)}
        needed = {name for name, m in points.items() if "B" in m.state} if self.settings.rule.learned else set()
        if self.settings.rule.learned and not (self.settings.layerwise or self.placement or needed or made):  # made: convert guessed wrong
            needed = {prefix + n for n, m in root.named_modules() if isinstance(m, FeedbackPoint) and m.name in self.points}
        if theirs[0].rpartition(".")[0] not in here or not found <= points.keys() or (found and needed - found):
            raise ValueError(f"checkpoint of another network: its feedback points are {sorted(found)}, those here are {sorted(points)}")
        method = bytes(state_dict[theirs[0]].tolist()).decode()
        if method != self.settings.method:
            raise ValueError(f"checkpoint of another rule: its feedback is {method}, the network's is {self.settings.method}")

    def last(self, root: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        """Hook behind ``state_dict``: B and statistics go to its end. What pairs it by order with that of a copy from before the first
        step, which has none of them, pairs the rest right (timm's ModelEma)."""
        for name, m in root.named_modules():
            if isinstance(m, Stateful):
                for k in m.names():
                    if (key := f"{prefix}{name}.{k}") in state_dict:
                        state_dict[key] = state_dict.pop(key)

    def _description(self) -> dict[str, Any]:
        """What processes have to have in common."""
        described = self.settings.described | {"points": list(self.points)}
        states = {f"{k} of point {n!r}": t for n, point in self.points.items() for k, t in point.state.items()} | self.state
        sums = {n: int(t.contiguous().view(torch.uint8).sum(dtype=torch.int64)) for n, t in states.items()}
        return described | {"step": int(self.step)} | sums

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "method"] = torch.tensor(list(self.settings.method.encode()), dtype=torch.uint8, device=self.step.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.moved, empty = True, self.step.is_meta
        super()._apply(fn, recurse)
        if empty and not self.step.is_meta:  # to_empty
            self._restart(self.step.device)
        return self

    def _restart(self, device: torch.device) -> None:
        self.step, self.skipped = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        if self.settings.auto:
            self.state["warmup"] = torch.zeros(7, dtype=torch.float64, device=device)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], unexpected: list[str], *args: Any
    ) -> None:
        self.measured, self.moved = [], True
        if self.processes is not None:
            self.processes.agreed = False
        self._spend()
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, *args)
        if prefix + "method" in unexpected:
            unexpected.remove(prefix + "method")
        missing[:] = [key for key in missing if key != prefix + "warmup"]  # checkpoints of 0.1 have none
        if prefix + "step" in state_dict:
            self.steps = int(state_dict[prefix + "step"])
            self.warming = self.settings.auto
            if self.warming and prefix + "warmup" not in state_dict:  # the network has trained without one
                self.state["warmup"][-1] = 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.key = register(self)

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        fresh: dict[str, Any] = {
            "current": None,
            "running": (),
            "placement": None,
            "static": False,
            "scheduled": None,
            "processes": None,
        }
        return {**self.__dict__, **fresh}


def finite(M: Gain, G: Tensor, looks: bool) -> tuple[Gain, Tensor]:
    """The gains; zero, so that B stays as it is, where one of them has overflowed."""
    small = M[1] if isinstance(M, tuple) else M
    total = G.sum() if small is None else G.sum() + small.sum()
    if looks and math.isfinite(float(total)):
        return M, G
    ok = torch.isfinite(total)
    G = torch.where(ok, G, 0.0)
    if small is None:
        return None, G
    small = torch.where(ok, small, 0.0)
    return (M[0], small) if isinstance(M, tuple) else small, G


def capturing(step: Tensor) -> bool:
    return step.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


@constant  # Dynamo enters the transforms while it traces, so the answer is known then
def transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _lost(owner: weakref.ref[Network], what: str, _: Tensor) -> None:
    """The gradient of a tensor that was kept behind a point."""
    network = owner()
    if network is not None and not network.lost:
        network.lost = True
        warnings.warn(
            f"{what} is in a loss, and direct feedback sends its gradient to no layer below it: return it from forward, a number for each "
            "sample, and let the criterion add it, or use feedback='layerwise'",
            stacklevel=2,
        )


def _unseen(owner: weakref.ref[Network], sent: Sent, output: int, gradients: tuple[Tensor | None, ...]) -> None:
    """The gradient of an output, which a PerturbedLoss has to send, in direct feedback all of it."""
    network, gradient = owner(), gradients[output]
    if network is None or network.unseen or gradient is None:
        return
    if not sent.taken and network.settings.layerwise and not network.settings.rule.adapts:
        return
    if not sent.taken:
        network.unseen = True
        what = "B learns nothing" if network.settings.layerwise else "its hidden layers get no learned feedback"
        warnings.warn(
            f"the output of a converted network got its gradient from a loss that is no PerturbedLoss, so {what}: write criterion = "
            "fbkernels.PerturbedLoss(criterion, net)",
            stacklevel=2,
        )
    elif sent.gradients and all(g.data_ptr() != gradient.data_ptr() for g in sent.gradients):  # autograd, or a hook, has made another one
        network.unseen = True
        warnings.warn(
            "a part of the output's gradient is from outside of PerturbedLoss, from another term or a hook on the output, and hidden "
            "layers with direct feedback do not see it: let the criterion compute it too, or use feedback='layerwise'",
            stacklevel=2,
        )
    sent.gradients = []
