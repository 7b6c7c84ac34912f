"""The feedback point: one layer's noise, its B, and the deferred update of B (SPEC 1, 3 to 6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fbkernels import ops, reference
from fbkernels.layers import Connection
from fbkernels.layout import Layout
from fbkernels.rules.base import Gain, Measurement, Rule

if TYPE_CHECKING:
    from fbkernels.training.network import Network

Carry = tuple[tuple[str, Callable[[Tensor], Tensor]], ...]  # rearrangements between a point and the layer that reads it, by name


class Stateful(nn.Module):
    """Tensors that the first forward makes, moved as buffers are; those of ``names`` a checkpoint brings along. Statistics stay float64;
    B keeps the float32 digits that the first forward of a bfloat16 network gives it.

    They are no buffers: torch pairs the buffers of a network with those of a copy (AveragedModel, DistributedDataParallel), made when these
    were not there yet.
    """

    state: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.state = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:  # what was no parameter, buffer or child is none now: nn.Module looks for 3 us
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def names(self) -> tuple[str, ...]:
        """What ``state`` may hold."""
        raise NotImplementedError

    def home(self) -> torch.device:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name, t in self.state.items():
            new = fn(t)
            dtype = t.dtype if name != "B" and t.dtype == torch.float64 else torch.promote_types(new.dtype, torch.float32)
            self.state[name] = new if new.dtype == dtype else t.to(new.device, dtype)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # a mirror's B lies as its weight does, transposed, which safetensors refuses
        destination.update({prefix + name: self.state[name].contiguous() for name in self.names() if name in self.state})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], unexpected: list[str], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, *args)
        for name in self.names():
            given = state_dict.get(prefix + name)
            if given is None:
                if name in self.state and strict:
                    missing.append(prefix + name)
                continue
            if prefix + name in unexpected:
                unexpected.remove(prefix + name)
            if metadata.get("assign_to_params_buffers", False):
                self.state[name] = given.detach()
                continue
            if name not in self.state or self.state[name].shape != given.shape:
                self.state[name] = torch.empty_like(given, device=self.home())
            self.state[name].copy_(given)


class FeedbackPoint(Stateful):
    """Where a hidden layer's activity gets its noise and its learned gradient: ``h = self.point(h)``.

    Where dropout follows, the point belongs behind it, so that the error passes its mask: ``h = self.point(dropout(h))``. Outside a
    converted network, and in ``eval()``, it is the identity. In training its perturbed stream is ``p = phi(q) + xi`` with fresh
    ``xi ~ std * N(0, I)`` (SPEC 1), in ``layerwise`` for the layer alone that reads it, and it owns B (SPEC 3): units x outputs in
    ``direct`` (a convolution's units are numbered channels-last), the transposed shape of the next layer's weight in ``layerwise`` (for a
    convolution the shape of its kernel).
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.index = -1
        self.converted = False  # put there by convert, and taken away by revert
        self.reads = ""  # the layer whose input this is; else the point is behind its own layer
        self._network: tuple[Network, ...] = ()  # a tuple, so that nn.Module does not register the owner as a child
        self.layout: Layout | None = None  # of the activity, once it has been seen
        self.maps: bool | None = None  # whether a convolution makes the activity; None: not known
        self.connection: Connection | None = None  # layerwise: how the next layer reads this point
        self._weight: tuple[Tensor, ...] = ()  # layerwise: the next layer's weight; a tuple, as above
        self.carry: Carry = ()  # layerwise: rearrangements between the point and the next layer
        self.merged = False  # layerwise: by them that layer's rows are no samples: windows, time and batch in one dimension
        self.pending: Measurement | None = None

    @property
    def network(self) -> Network:
        return self._network[0]

    @property
    def weight(self) -> Tensor | None:
        return self._weight[0] if self._weight else None

    def lay(self, layout: Layout) -> None:
        """How the activity lies in this step."""
        self.layout, B = layout, self.state.get("B")
        if B is not None and not self.network.settings.layerwise and B.shape[0] != layout.units:
            raise ValueError(
                f"B of point {self.name!r} has {len(B)} rows, the activity {layout.units} units: direct feedback takes images and "
                "sequences of one size; with feedback='layerwise' they may differ"
            )

    @property
    def units(self) -> int:
        """n_l, the number of noisy units; places of a map that share their noise are one."""
        return 0 if self.layout is None else self.layout.units

    @property
    def B(self) -> Tensor | None:
        """The current feedback matrix, flushed; None before the first training step has shown its shape.

        ``direct``: units x outputs. With ``convert(rank=r)`` units x r: a layer gets ``(e C) B^T``, C being ``basis``, and ``B C^T`` is
        the units x outputs of that. ``layerwise``: the transposed shape of the next layer's weight, for a convolution its shape.
        """
        if not self._network:
            return None
        self.network.flush()
        return self.network.settings.rule.feedback(self)

    @property
    def basis(self) -> Tensor | None:
        """C [outputs, rank], float64, orthonormal columns: what e is multiplied with before B; None without ``rank`` or before a step."""
        return self.network.state.get("C") if self._network else None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "B":  # nn.Module would write the buffer past every check
            self._assign(value)
        else:
            super().__setattr__(name, value)

    def _assign(self, value: Any) -> None:
        if not self._network:
            raise ValueError(f"B of point {self.name!r} cannot be set: the point is not part of a converted network")
        old = self.B
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else repr(value)
            raise TypeError(f"B of point {self.name!r} must be a floating-point tensor, got {got}")
        if old is None or "B" not in self.state:
            raise ValueError(f"B of point {self.name!r} must have a shape before it can be set: take one training step")
        if value.shape != old.shape:
            raise ValueError(f"B of point {self.name!r} must have shape {tuple(old.shape)}, got {tuple(value.shape)}")
        if value.device != old.device:
            raise ValueError(f"B of point {self.name!r} must be on {old.device}, got {value.device}")
        if not value.isfinite().all():
            raise ValueError(f"B of point {self.name!r} must be finite, got {int((~value.isfinite()).sum())} entries that are not")
        self.store(value.detach().to(old.dtype, copy=True, memory_format=torch.contiguous_format))

    def store(self, B: Tensor) -> None:
        """The new B: another tensor, since a backward pass to come has saved the old, except where a CUDA graph knows the old."""
        if self.network.static:
            self.state["B"].copy_(B)
        else:
            self.state["B"] = B

    def check(self, before: Tensor) -> None:
        """After an update of B: the old one, where the new has overflowed. On a GPU, in direct, the gains alone are looked at."""
        B, settings = self.state["B"], self.network.settings
        if B.is_cpu and not self.network.static and not torch.compiler.is_compiling():
            if not math.isfinite(float(B.sum())):
                self.store(before)
                self.network.overflowed(self.name)
        elif settings.layerwise or settings.rule.supervised:
            self.store(torch.where(torch.isfinite(B.sum()), B, before))

    def forward(self, h: Tensor) -> Tensor:
        return self.passed(h) if self._network and self.network.running else h

    def passed(self, h: Tensor) -> Tensor:
        """The point runs, in the forward that records or trains."""
        run = self.network.running[0]
        out: Tensor = run.point(self.name, h) if hasattr(run, "calls") else run.pass_point(self.name, self.maps, h)
        return out

    def extra_repr(self) -> str:
        return f"{self.name!r}, index={self.index}" if self._network else "not converted"

    def follow(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of a module named in ``points=``: the noise goes in right after it, into the first tensor of a tuple, a recurrent
        layer's or an attention's."""
        if type(output) is tuple and output and isinstance(output[0], Tensor) and self.network.running:
            return self.passed(output[0]), *output[1:]
        return self.passed(output) if isinstance(output, Tensor) and self.network.running else None

    def riding(self, predicts: bool) -> dict[str, Any]:
        """B's pending update and the joint rules' prediction, as arguments of the launch that runs the layer (SPEC 5)."""
        m, rule = self.pending, self.network.settings.rule
        if m is not None and (type(rule).learn is not Rule.learn or m.gains is None):
            self.flush()
            m = None
        if "B" not in self.state or not (predicts or m is not None):
            return {}
        update: dict[str, Any] = {"B": self.state["B"], "predicts": predicts}
        if m is not None and m.gains is not None:
            M, G = m.gains
            update |= {"learned_step": m.step, **({"R": M[0], "Q": M[1], "w": G} if isinstance(M, tuple) else {"M": M, "G": G})}
        return update

    def noise(self, step: Tensor, rows: int, dtype: torch.dtype, offset: int) -> Tensor:
        """The step's noise xi_l from row ``offset`` on, in the layout of the activity; regenerated, never stored."""
        assert self.layout is not None
        return self.layout.activity(self._noise(step, rows, dtype, offset)).to(dtype)

    def _noise(self, step: Tensor, rows: int, dtype: torch.dtype, offset: int) -> Tensor:
        """Samples x units."""
        settings = self.network.settings
        exact = dtype if dtype == torch.float64 else torch.float32
        key = (step, settings.seed, self.index, rows, self.units, settings.noise_std, settings.noise)
        return ops.noise(*key, offset=offset, dtype=exact, backend=settings.backend)

    def create(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """B at its first use, as the rule starts it."""
        if "B" not in self.state:
            dtype = torch.promote_types(like.dtype, torch.float32)
            last = torch.full((), 2**32 - 1, dtype=torch.int64, device=like.device)  # a step that training does not reach
            normal = ops.noise(last, self.network.settings.seed, self.index, shape[0], math.prod(shape[1:]), 1.0, "gaussian", dtype=dtype)
            self.state["B"] = self.network.settings.rule.start(normal.view(shape), self.network.settings.layerwise)
        B = self.state["B"]
        if B.shape != shape:
            got = f"B of point {self.name!r} has shape {tuple(B.shape)}, expected {tuple(shape)}"
            raise ValueError(f"{got}: it was made for other outputs, or another network; revert and convert again make a new one")
        return B

    def claim(self, weight: Tensor, connection: Connection, carry: Carry) -> Tensor:
        """Layerwise: the next layer announces itself and gets its feedback weights, in the layout of its own weight."""
        self._weight, self.connection, self.carry = (weight,), connection, carry
        rule, new = self.network.settings.rule, "B" not in self.state
        if rule.learned:
            self.create(tuple(weight.shape if connection.convolution else weight.shape[::-1]), weight.detach())
            if new:
                with torch.no_grad():
                    rule.settle(self)
        B = rule.feedback(self)
        assert B is not None
        if self.network.static and rule.mirrors:  # it learns in place before the backward pass reads it
            B = B.clone()
        return B if connection.convolution else B.T

    def flush(self, predicted_rows: int = 0) -> Tensor | None:
        """Apply the pending update of B (SPEC 5).

        With ``predicted_rows`` also the joint rules' prediction Xi B for the step that begins, if there is a B.
        """
        m, self.pending = self.pending, None
        rule, prediction, before = self.network.settings.rule, None, self.state.get("B")
        with torch.no_grad():
            if m is not None and type(rule).learn is Rule.learn and m.gains is not None:
                prediction = self.update(m, *m.gains, predicted_rows=predicted_rows)
            elif m is not None:
                rule.learn(self, m)
            if m is not None and before is not None:
                self.check(before)
            rule.feedback(self)  # which catches up with W where B follows it
            if predicted_rows and prediction is None and "B" in self.state:
                B = self.state["B"]
                prediction = self._op(B, *[None] * 6, self.network.step, predicted_rows)[1]
        return prediction

    def update(self, m: Measurement, M: Gain, G: Tensor, target: Tensor | None = None, predicted_rows: int = 0) -> Tensor | None:
        """B <- B (I - M) + Xi^T G, Xi regenerated from the step of the measurement (SPEC 4), or ``target`` in its place."""
        B = self.state["B"]
        plain = self.layout is None or self.layout.plain
        whole = len(B) == self.units and len(G) == m.rows and B.ndim == 2 and not self.carry and m.part is None and plain  # G or w
        if target is None and whole:
            given = (None, None, *M, G) if isinstance(M, tuple) else (M, G, None, None, None)
            predicted = self.network.step if predicted_rows else None
            new, prediction = self._op(B, *given, m.step, predicted, predicted_rows)
            self.store(new)
            return prediction if predicted_rows else None
        matrix = B if self.connection is None else self.connection.matrix(B)
        new = reference.feedback_update(matrix, self.regressand(m, matrix.dtype, target), M, G)
        if m.part is not None:
            new = matrix + m.sum(new - matrix)
        self.store((new if self.connection is None else self.connection.unmatrix(new, B.shape)).contiguous())
        return None

    def _op(self, B: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """ops.feedback_update with the point's own noise; the last of ``args`` is the number of predicted rows."""
        settings = self.network.settings
        out: tuple[Tensor, Tensor] = ops.feedback_update(
            B,
            *args[:-1],
            settings.seed,
            self.index,
            args[-1],
            settings.noise_std,
            settings.noise,
            offset=self.network.offset,
            backend=settings.backend,
        )
        return out

    def regressand(self, m: Measurement, dtype: torch.dtype, target: Tensor | None = None) -> Tensor:
        """Xi of the measured step: samples x units, in layerwise as the next layer reads it."""
        if self.connection is None:
            if target is None:
                return self._noise(m.step, m.rows, dtype, m.first).to(dtype)
            assert self.layout is not None
            return self.layout.units_of(target.to(dtype), m.rows)
        xi = self.noise(m.step, m.rows, dtype, m.first) if target is None else target.to(dtype)
        for name, rearrange in self.carry:
            xi = xi if name == "pad" and self.connection.convolution else rearrange(xi)
        xi = self.connection.samples(xi)
        plain = self.connection.convolution or self.layout is None or (self.layout.plain and not self.merged)
        return xi if plain else xi[self.owners(m.rows)[1]]

    def owners(self, samples: int) -> tuple[Tensor, Tensor]:
        """Whose each row is that the layer reads, and the order that puts a sample's rows together."""
        assert self.layout is not None and self.connection is not None
        index = torch.arange(samples, device=self.network.step.device)
        if self.connection.convolution:
            who = index.repeat_interleave(self.layout.copies)
            return who, torch.arange(len(who), device=who.device)
        who = self.layout.activity(index[:, None].expand(-1, self.layout.units).double())
        for _, rearrange in self.carry:
            who = rearrange(who)
        who = self.connection.samples(who)[:, 0].long()
        return who, who.argsort(stable=True)

    def regressors(self, delta: Tensor) -> Tensor:
        """R at the point's own positions: padding before a convolution sends the error of its copies back to where they came from."""
        assert self.connection is not None and self.layout is not None
        if not self.connection.convolution:
            return self.connection.samples(delta)
        patches = self.connection.patches(delta)
        pads = [pad for name, pad in self.carry if name == "pad"]
        if pads:
            with torch.enable_grad():
                x = patches.new_zeros(*patches.shape[:2], *self.layout.shape[1:], requires_grad=True)
                y = x
                for pad in pads:
                    y = pad(y)
                (patches,) = torch.autograd.grad(y, x, patches)
        return self.connection.samples(patches)

    def names(self) -> tuple[str, ...]:
        if not self._network:
            return ()
        rule = self.network.settings.rule
        return ("B",) * rule.learned + rule.statistics * self.network.settings.layerwise

    def home(self) -> torch.device:
        return self.network.step.device

    def _load_from_state_dict(self, *args: Any) -> None:
        if not (self._network and self.network.static):
            self.pending = None
        super()._load_from_state_dict(*args)

    def _save_to_state_dict(self, *args: Any) -> None:
        if self._network:
            self.network.flush()
        super()._save_to_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        if self._network:
            self.network.flush()
        return {**self.__dict__, "carry": (), "_weight": ()}


class Entered:
    """Forward pre-hook of a layer that computes its weight, by which it cannot be told then: the next layer that runs is this one."""

    def __init__(self, network: Network, name: str) -> None:
        self.network, self.name = (network,), name

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.network[0].entered = self.name

    @staticmethod
    def lacks(module: nn.Module) -> bool:
        """Whether this is a layer that needs the hook and has none: its weight is computed since convert."""
        computed = isinstance(module, (nn.Linear, _ConvNd)) and not isinstance(module._parameters.get("weight"), nn.Parameter)
        return computed and not any(isinstance(hook, Entered) for hook in module._forward_pre_hooks.values())
