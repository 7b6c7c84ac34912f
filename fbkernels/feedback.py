"""What the points of one network share: the rule, the noise, the step, and the order of one training step (SPEC 5)."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fbkernels import ops
from fbkernels._compile import constant
from fbkernels.autograd import Behind, Reach, Transport
from fbkernels.points import FeedbackPoint, Stateful
from fbkernels.processes import Part, Processes
from fbkernels.reference import Connection
from fbkernels.rules.base import Gain, Measurement, Rule
from fbkernels.streams import Carry, Streams, resolve, streams, twin


class Feedback(Stateful):
    """What the points of one network share: the rule, the noise, the step, and one training step's bookkeeping."""

    step: Tensor  # int64, training steps so far
    method: Tensor  # uint8 text, feedback structure and rule: a checkpoint of another one is refused
    skipped: Tensor  # int64, samples whose loss or loss change was not finite

    def __init__(
        self,
        *,
        layerwise: bool,
        everywhere: bool,
        rule: Rule,
        noise_std: float,
        noise: str,
        seed: int,
        every: int,
        fraction: float,
        antithetic: bool,
        warmup: int,
        backend: str,
        share: int,
        rank: int | None,
    ) -> None:
        super().__init__()
        self.layerwise, self.everywhere = layerwise, everywhere
        self.rule, self.noise_std, self.noise, self.seed = rule, noise_std, noise, seed
        self.every, self.fraction, self.antithetic, self.warmup, self.backend = every, fraction, antithetic, warmup, backend
        self.share = share  # places along each dimension of a map that have one noise and one row of B
        self.rank = rank  # columns of B, where they are fewer than outputs
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))
        self.points: dict[str, FeedbackPoint] = {}
        self.readers = nn.ModuleDict()  # layerwise: a layer's own point at its input, where no other layer's point is
        self.numbered: list[str] = []  # points that have run, in order
        self.steps = 0  # the host's copy of step, so that every= and warmup= need no synchronisation
        self.probe = ""  # metrics: "exact" (backprop through the same points) or "learned", both without noise
        self.warned = False
        self.measured: list[Measurement] = []  # layerwise: steps whose backward pass has run
        self.root: tuple[nn.Module, ...] = ()  # the network; a tuple, so that it is no child
        self.hooks: list[tuple[dict[int, Any], int, Any]] = []  # of points on the modules: in which dictionary, its key, the hook
        self.hooked = True
        self.static = False  # a CUDA graph was captured: what one step hands to the next keeps its storage
        self.scheduled: Measurement | None = None  # the last step that B was to learn from
        self.processes: Processes | None = None  # where there are several; PerturbedLoss knows them
        self.register_buffer("method", torch.tensor(list(self._method().encode()), dtype=torch.uint8))
        self._reset()

    def _reset(self) -> None:
        self.activities: dict[str, Tensor] = {}  # h_l by point, until the loss has taken them
        self.blocks: dict[str, tuple[Behind, Tensor, Tensor | None]] = {}  # fused ones, what phi' is read from, and the winners
        self.logits: Tensor | None = None
        self.perturbed: Tensor | None = None
        self.predictions: list[Tensor] = []  # [parts, rows, outputs] of each point: their sum is sum_l Xi_l B_l
        self.inputs: tuple[Any, ...] = ()
        self.errors: dict[str, Tensor] = {}  # layerwise: pre-activation error of the layer that reads a point, with the loss's scale
        self.changes: dict[str, tuple[Tensor, Tensor]] = {}  # p - h at that layer's input, and what it did to its pre-activation
        self.perturbing = self.learning = self.warming = self.transports = False
        self.running = False  # else whatever runs is a second run in the backward pass, by torch.utils.checkpoint
        self.reader: tuple[FeedbackPoint, ...] = ()  # layerwise: of the layer that runs; a tuple, so that it is no child
        self.forks: set[str] = set()  # layerwise: points that something beside a layer reads
        self.fuses: tuple[torch.dtype, ...] = ()
        self.rows_first = False  # the plain model's maps are not channels-last as those of blocks are
        self.perturbed_rows = 0
        self.part: Part | None = None  # of the perturbed rows of all processes
        self.group: Any = None  # of the SyncBatchNorm that runs

    # the forward of the network

    def train(self, mode: bool = True) -> Feedback:
        super().train(mode)
        if self.root:
            self.hook()
        return self

    def hook(self) -> None:
        """The points' hooks are there in training alone, so that in eval the modules are the plain ones."""
        if self.hooked == self.root[0].training:
            return
        self.hooked = self.root[0].training
        for hooks, key, hook in self.hooks:
            later = [(k, hooks.pop(k)) for k in list(hooks) if k >= key]  # keys grow, and a user's own hooks keep their places
            hooks.update(([(key, hook)] if self.hooked else []) + [(k, h) for k, h in later if k != key])

    def begin(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the network."""
        if not root.training:
            return None
        self.hook()  # where a part of the model keeps train() to itself
        self._reset()
        if transformed():
            raise RuntimeError(
                "learned feedback inside a torch.func transform: it would differentiate through the forward weights instead of B; "
                "call loss.backward() or torch.autograd.grad"
            )
        if self.layerwise:
            if torch.compiler.is_compiling():  # Transport's backward keeps the error for B, a side effect that Dynamo does not trace
                raise RuntimeError("layerwise feedback cannot be compiled yet: compile with feedback='direct', or leave torch.compile out")
            self.flush()
        if capturing(self.step):
            self._capture()
        batch = next((x.shape[0] for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim), None)
        if batch is None:
            raise ValueError("a converted network needs a tensor with a batch dimension as input")
        self.inputs = (args, kwargs) if self.rule.supervised else ()  # only a second pass needs the batch after this one
        self.transports = self.layerwise and self.probe != "exact"
        device = self.step.device
        if not (self.layerwise or self.probe or self.rule.private):
            self.fuses = ops.fuses(self.backend, device)
        self.learning = not self.probe and (self.every == 1 or self.steps % self.every == 0)
        wanted = self.rule.private if self.probe == "learned" else self.rule.perturbs and self.learning
        self.perturbing = wanted and torch.is_grad_enabled()
        self.warming = not self.probe and self.steps < self.warmup
        self.perturbed_rows = math.ceil(self.fraction * batch)
        if self.processes is not None and not self.probe and torch.is_grad_enabled():
            if torch.compiler.is_compiling():
                raise RuntimeError("a training step of several processes cannot be compiled yet: leave torch.compile out")
            if not self.processes.agreed:
                self.processes.agree(self._description())
            if self.perturbing or (self.learning and self.rule.adapts):
                self.part = self.processes.part(self.perturbed_rows)
        for point in self.points.values():
            point._weight = ()
        self.running = True
        return tree_map_only(Tensor, lambda x: streams(self, x, None), (args, kwargs))

    def _capture(self) -> None:
        """A CUDA graph replays what this step does with the tensors that it finds now."""
        if self.layerwise or self.rule.supervised or self.every > 1 or self.steps < self.warmup or self.processes is not None:
            raise RuntimeError(
                "a CUDA graph can hold a training step with direct feedback, a rule that needs no second pass, every=1, after the warm-up, "
                "in one process"
            )
        learns = type(self.rule).learn is Rule.learn and self.rule.adapts
        if learns and any(point.pending is None for point in self.points.values()):
            raise RuntimeError("take a training step right before the capture of one: it makes B, its statistics and its pending update")
        self.static = True

    def end(self, root: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the network: keeps the perturbed logits, hands out the clean ones."""
        if not root.training:
            return None
        if not isinstance(output, Streams):
            raise TypeError(f"the network's forward must return one tensor computed from its input, got {type(output).__name__}")
        resolve(output).check()
        everywhere = self.layerwise and self.everywhere  # then no noise is where no layer reads
        if not everywhere and (output.pending is not None or (self.activities and not output.read)):
            name = output.pending.name if output.pending is not None else next(reversed(self.activities))
            raise ValueError(
                f"layer {name!r} is the network's output, which is never perturbed: pass points=[...] to convert, with the names of "
                "the hidden layers"
            )
        if self.transports:
            for name in [n for n, p in self.points.items() if p.connection is None and (everywhere or n in self.activities)]:
                if not everywhere:
                    raise ValueError(
                        f"layerwise feedback: no Linear or Conv2d reads point {name!r} directly: use feedback='direct', or convert without "
                        "points, include and exclude, which gives each layer a B of its own"
                    )
                del self.points[name]
                self.activities.pop(name, None)
            forks = [n for n in self.activities if n in self.forks] if self.rule.supervised else []
            if forks:
                raise ValueError(
                    f"{self.rule!r} in layerwise feedback learns from the gradient of point {forks[0]!r}, which more than one layer reads: "
                    "use feedback='direct'"
                )
        if not self.activities:
            raise ValueError("no feedback point was reached in the forward pass: name modules that run with points=[...]")
        if [p.index for p in self.points.values()] != list(range(len(self.points))):
            ordered = sorted(self.points.items(), key=lambda item: item[1].index)
            self.points.clear()
            self.points.update(ordered)
        y = output.clean
        if self.rank is not None and self.rank > math.prod(y.shape[1:]):
            raise ValueError(f"rank must be at most {math.prod(y.shape[1:])}, the number of outputs, got {self.rank}")
        if self.processes is not None and not self.layerwise:
            y = Reach.apply(y, *self.activities.values())
        self.logits, self.perturbed, self.running = y, output.perturbed, False
        return y

    def visit(self, point: FeedbackPoint, h: Tensor) -> None:
        if point.name in self.activities:
            raise ValueError(f"layer {point.name!r} is used twice in one forward; use two layers, or points=[...]")
        last = list(self.activities)[-1] if self.activities else None  # torch 2.11 does not trace reversed of none
        if last is not None and self.activities[last].requires_grad and not torch.is_grad_enabled():
            raise ValueError(
                f"point {point.name!r} runs under torch.no_grad behind point {last!r}, and its layers would get no gradient: "
                "torch.utils.checkpoint needs use_reentrant=False"
            )
        self.activities[point.name] = h

    def number(self, point: FeedbackPoint) -> None:
        """Points are numbered in the order in which they first run (SPEC 6), which is not always that of the modules."""
        if point.name in self.numbered:
            return
        if point.name not in self.points:
            point.index = len(self.points)
            self.points[point.name] = point
        index = len(self.numbered)
        if point.index != index:
            other = next(p for p in self.points.values() if p.index == index)
            other.index, point.index = point.index, index
        self.numbered.append(point.name)

    def cut(self, h: Tensor) -> Tensor:
        """What the next layer gets: detached in direct, so that no gradient crosses a point."""
        if self.probe == "exact" or (self.probe and self.layerwise):
            return h.clone()  # h keeps its own gradient when the model goes on in place
        if not self.layerwise:
            return h.detach()
        return h.detach().requires_grad_() if self.warming and not h.requires_grad else h

    @property
    def first(self) -> int:
        """The index of the first perturbed row among those of all processes."""
        return 0 if self.part is None else self.part.before

    def rows(self, t: Tensor) -> Tensor:
        """The rows of a clean batch that have a perturbed twin, in the order of the perturbed stream."""
        part = t if self.perturbed_rows == len(t) else t[: self.perturbed_rows]
        return torch.cat((part, part)) if self.antithetic else part

    @staticmethod
    def constant(x: Any) -> Any:
        """Warm-up: parameters, and what is computed from them alone, are constants: no gradient at all, and no optimiser moves them."""
        return x.detach() if isinstance(x, Tensor) and x.requires_grad else x

    def entry(self, input: Streams, weight: Tensor) -> tuple[FeedbackPoint, Carry] | None:
        """Layerwise: the point that a layer reads, where no other layer has read it yet, else the layer's own; None: no hidden activity."""
        own, self.reader = next(iter(self.reader), None), ()
        if not self.running:
            return next(((p, p.carry) for p in self.points.values() if p.weight is weight), None)
        if input.source is not None:
            point = input.source[0]
            if point.weight is None:
                return input.source
            self.forks.add(point.name)
            if own is None:
                raise ValueError(f"point {point.name!r} feeds two layers, the second no nn.Linear or nn.Conv2d: use feedback='direct'")
        elif own is None or not self.everywhere or not input.clean.requires_grad:
            return None
        return own, ()

    def transport(
        self,
        entry: tuple[FeedbackPoint, Carry],
        name: str,
        input: Streams,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Streams:
        """Layerwise: a layer hands its error down through B instead of its weight. What it reads gets the noise of that B and of no other,
        so that the noise has no other way to the loss (SPEC 2)."""
        if name not in ("linear", "conv2d"):
            raise ValueError(f"layerwise feedback covers Linear and Conv2d, got {name}: use feedback='direct'")
        point, carry = entry
        x = input.clean
        connection, padding = Connection.of(name, weight, x, *args, **kwargs)
        if point.reads and self.running:
            x = x.view_as(x)  # whose gradient is this layer's alone
            self.visit(point, x)
            point.shape, point.channels_first = x.shape[1:], connection.convolution
        self.number(point)
        px = None
        if self.perturbing and self.running:
            with torch.no_grad():
                xi = point.noise(self.step, self.perturbed_rows, self.activities[point.name].dtype, self.first)
                xi = torch.cat((xi, -xi)) if self.antithetic else xi
                for _, rearrange in carry:
                    xi = rearrange(xi)
                px = twin(input) + xi
        if any(padding):
            pad = lambda t: torch.nn.functional.pad(t, padding)  # noqa: E731
            x, px, carry = pad(x), None if px is None else pad(px), (*carry, ("pad", pad))
        B = point.claim(weight, connection, carry if self.running else point.carry)
        if self.warming:
            weight, bias = self.constant(weight), self.constant(bias)
        if B is None:
            clean = connection.forward(x, weight, bias)
        else:
            clean = Transport.apply(x, weight, bias, B, connection, point.name, self.errors)
        perturbed = None
        if px is not None:
            with torch.no_grad():
                perturbed = connection.forward(px, weight, bias)
                if self.rule.mirrors:
                    self.changes[point.name] = (px - self.rows(x.detach()), perturbed - self.rows(clean.detach()))
        return streams(self, clean, perturbed, read=True)

    # learning B

    def project(self, t: Tensor) -> Tensor:
        """[N, outputs] as B's regression sees it: t C with ``rank``, C [outputs, rank] with orthonormal columns, a function of the seed."""
        if self.rank is None:
            return t
        if "C" not in self.state:
            last = torch.full((), 2**32 - 1, dtype=torch.int64)  # a step that training does not reach, and a point
            normal = ops.noise(last, self.seed, 2**32 - 1, t.shape[1], self.rank, 1.0, "gaussian", dtype=torch.float64)
            Q, R = torch.linalg.qr(normal)
            self.state["C"] = (Q * R.diagonal().sign()).to(self.step.device)
        return t @ self.state["C"].to(t.dtype)

    def measure(self, e: Tensor, dL: Tensor, dy: Tensor, ok: Tensor) -> Measurement:
        """What the step showed: the loss change of each perturbed sample and e = dL/dlogits, or e C; samples that are not ok count as
        zero."""
        assert self.logits is not None
        dtype, n = torch.promote_types(self.logits.dtype, torch.float32), len(ok)
        w = (dL / self.noise_std**2).to(dtype)
        ok = ok & torch.isfinite(w)
        skipped = (~ok).sum()
        self.skipped.add_(skipped if self.processes is None else self.processes.sum(skipped))
        r, dy = self.project(torch.where(ok[:, None], e[:n], 0.0)), self.project(dy)
        prediction: Tensor | float = 0.0
        if self.predictions:
            prediction = torch.cat(self.predictions).sum(0) * ok[:, None]
        return Measurement(
            step=self.step.clone(),
            rows=n,
            std=self.noise_std,
            units=sum(self.points[name].units for name in self.activities),
            regressor=r.to(dtype),
            w=torch.where(ok, w, 0.0),
            loss_change=torch.where(ok, dL, 0.0).to(dtype),
            output_change=torch.where(ok[:, None], dy, 0.0).to(dtype),
            prediction=prediction,
            points=tuple(self.activities),
            errors=self.errors,
            changes=self.changes,
            ok=ok,
            part=self.part,
        )

    def schedule(self, m: Measurement) -> None:
        """Let B take the step before the next forward (SPEC 5)."""
        if self.layerwise:
            self.measured.append(m)
            if m.part is not None:  # the end of the backward pass is where all processes meet; a flush may be of one alone
                torch.autograd.Variable._execution_engine.queue_callback(self.flush)
            return
        known, part = dict(self.state), m.part
        if part is not None and not self.rule.supervised:
            if self.rule.exchanged:
                m = m.gathered(self.rule.exchanged)
            else:
                (G,) = part.gather(self.rule.update(m, self.state)[1])
                m = replace(m, rows=len(G), part=None, gains=(None, G))
        m.gains = finite(*(m.gains or self.rule.update(m, self.state)))
        if self.static and self.scheduled is not None:
            for name in self.rule.statistics:
                self.state[name] = known[name].copy_(self.state[name])
            old, new = self.scheduled.handed_on, m.handed_on
            if [t.shape for t in old] != [t.shape for t in new]:
                raise RuntimeError(f"a network with a captured step takes batches of {self.scheduled.rows} samples, got {m.rows}")
            for t, value in zip(old, new, strict=True):
                t.copy_(value)
            m = self.scheduled
        self.scheduled = m
        for point in m.points:
            self.points[point].pending = m
        if m.part is not None:
            self.flush()

    def flush(self) -> None:
        """Apply every pending update of B."""
        measured, self.measured = self.measured, []
        for m in measured:
            with torch.no_grad():
                self._measure_layers(m)
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
            point.flush()

    def _measure_layers(self, step: Measurement) -> None:
        # each layer regresses its own lam on the errors of the layer above, known once the backward pass has run
        assert step.scale is not None and step.ok is not None
        layers = [(self.points[name], delta) for name, delta in step.errors.items()]
        if not self.rule.regresses:
            for point, _ in layers:
                point.pending = step
            return
        dtype = step.w.dtype
        measured: list[tuple[FeedbackPoint, Connection, Measurement]] = []
        for point, delta in layers:
            assert point.connection is not None
            delta = delta[: step.rows].to(dtype)
            column = (-1, *[1] * (delta.ndim - 1))
            c = step.scale[: step.rows].to(dtype).view(column)
            ok = step.ok.view(column) & (c != 0) & torch.isfinite(delta).flatten(1).all(1).view(column)
            r = point.regressors(torch.where(ok, delta / c, torch.zeros_like(delta)))
            measured.append((point, point.connection, step.at(r)))
        if self.rule.predicts:
            predicted = torch.zeros_like(step.loss_change)
            for point, connection, m in measured:
                B = point.state["B"]
                product = (point.regressand(m, B.dtype) * (m.regressor @ connection.matrix(B).mT)).sum(-1)  # [S] or [groups, S]
                predicted = predicted + product.view(-1, m.rows, len(m.w) // m.rows).sum((0, 2))
            for _, _, m in measured:
                m.prediction, m.units = predicted, sum(connection.channels for _, connection, _ in measured)
        for point, _, m in measured:
            point.pending = m if self.rule.additive else m.gathered(self.rule.exchanged)
            point.pending.gains = self.rule.update(point.pending, point.state)  # FeedbackPoint.flush looks at B itself

    def advance(self) -> None:
        self.step.add_(1)
        if self.every > 1 or self.warmup:
            self.steps += 1

    def warn(self) -> None:
        """One warning when samples were skipped; on a GPU only ``fb.summary`` looks, because looking synchronises."""
        if not self.warned and not torch.compiler.is_compiling() and self.skipped.device.type == "cpu" and int(self.skipped):
            self.warned = True
            warnings.warn(f"{int(self.skipped)} samples had a non-finite loss or loss change; B and its statistics skip them", stacklevel=4)

    def extra_repr(self) -> str:
        share = "" if self.share == 1 else f", share={self.share}"
        rank = "" if self.rank is None else f", rank={self.rank}"
        structure = "layerwise" if self.layerwise else "direct"
        return f"{structure}, rule={self.rule}, noise_std={self.noise_std}, noise={self.noise!r}{share}{rank}"

    def names(self) -> tuple[str, ...]:
        return () if self.layerwise else self.rule.statistics

    def home(self) -> torch.device:
        return self.step.device

    def check(self, root: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Hook before a checkpoint is loaded into the network: refuse another network's before anything is written."""
        own = {prefix + k: t for k, t in (*root.named_parameters(), *root.named_buffers())}
        own |= {f"{prefix}{n}.{k}": t for n, m in root.named_modules() if isinstance(m, Stateful) for k, t in m.state.items()}
        for key, t in own.items():
            if key in state_dict and key.rpartition(".")[2] not in ("method",) and state_dict[key].shape != t.shape:
                raise ValueError(
                    f"checkpoint of another network: size mismatch for {key}, {tuple(state_dict[key].shape)} in the checkpoint, "
                    f"{tuple(t.shape)} here"
                )
        here = {k.rpartition(".")[0] for k in own if k.endswith(".shared.step")}
        theirs = [k for k in state_dict if k.endswith(".shared.method")]
        if not theirs:
            return
        points = {prefix + name: m for name, m in root.named_modules() if isinstance(m, FeedbackPoint)}
        found = {k.rpartition(".")[0] for k in state_dict if k.endswith(".B")}
        # which points of layerwise feedback are read the first forward shows
        needed = {name for name, m in points.items() if not self.layerwise or "B" in m.state} if self.rule.learned else set()
        if theirs[0].rpartition(".")[0] not in here or not found <= points.keys() or (found and needed - found):
            raise ValueError(f"checkpoint of another network: its feedback points are {sorted(found)}, those here are {sorted(points)}")
        method = bytes(state_dict[theirs[0]].tolist()).decode()
        if method != self._method():
            raise ValueError(f"checkpoint of another rule: its feedback is {method}, the network's is {self._method()}")

    def _method(self) -> str:
        basis = "" if self.rank is None else f", rank {self.rank} of seed {self.seed}"  # without which B has no meaning
        return f"{'layerwise' if self.layerwise else 'direct'} {type(self.rule).__name__}{basis}"

    def _description(self) -> dict[str, Any]:
        """What processes have to have in common."""
        names = ("noise_std", "noise", "seed", "share", "rank", "every", "fraction", "antithetic", "warmup", "backend")
        feedback = "layerwise" if self.layerwise else "direct"
        described = {"feedback": feedback, "rule": repr(self.rule), "points": list(self.points)} | {n: getattr(self, n) for n in names}
        states = {f"{k} of point {n!r}": t for n, point in self.points.items() for k, t in point.state.items()} | self.state
        sums = {n: int(t.contiguous().view(torch.uint8).sum(dtype=torch.int64)) for n, t in states.items()}
        return described | {"step": int(self.step)} | sums

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.measured = []
        if self.processes is not None:
            self.processes.agreed = False
        self._spend()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "step" in state_dict:
            self.steps = int(state_dict[prefix + "step"])

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        fresh: dict[str, Any] = {
            "activities": {},
            "blocks": {},
            "errors": {},
            "changes": {},
            "logits": None,
            "perturbed": None,
            "predictions": [],
            "static": False,
            "scheduled": None,
            "inputs": (),
            "processes": None,
            "part": None,
        }
        return {**self.__dict__, **fresh}


def finite(M: Gain, G: Tensor) -> tuple[Gain, Tensor]:
    """The gains; zero, so that B stays as it is, where one of them has overflowed."""
    small = M[1] if isinstance(M, tuple) else M
    ok = torch.isfinite(G.sum() if small is None else G.sum() + small.sum())
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
