"""B's update and the joint rules' prediction (SPEC 4, 5)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fbkernels import reference as definition
from fbkernels._check import integer
from fbkernels.ops import _op
from fbkernels.ops._op import Op, backend_for, expect, kernels
from fbkernels.ops.noise import NoiseKey, check_key, draw, public_key


def feedback_update(
    B: Tensor,
    M: Tensor | tuple[Tensor, Tensor] | None,
    G: Tensor,
    *,
    seed: int,
    step: int | Tensor,
    point: int,
    std: float,
    kind: str = "gaussian",
    backend: str = "auto",
) -> Tensor:
    """``B (I - M) + Xi^T G``, the one update that serves every rule, with Xi regenerated and never stored (SPEC 4).

    Args:
        B: [units, m], float32 (any float type with backend "reference").
        M: [m, m]; None for 0; or its factors (R, Q), each [N, m], with ``M = R^T Q``.
        G: [N, m]; Xi is that of N samples. With factors w [N], for ``G = w * Q``: ``B + (w * Xi - R B^T)^T Q``, cheaper where N < m.
        seed, step, point, std, kind: of the noise, as in :func:`noise`.

    Returns:
        The new B; the old one stays.

    Raises:
        ValueError: naming the argument and what was expected. RuntimeError: the backend cannot be had.
    """
    key = public_key(seed, step, point, 0, std, kind)
    gains = (None, None, *M, G) if isinstance(M, tuple) else (M, G, None, None, None)
    new: Tensor = op(B, *gains, key.step, None, key.seed, point, 0, std, kind, backend=backend)[0]
    return new


class Update(NamedTuple):
    """What a layer's launch does to B beside the layer (SPEC 5): ``B (I - M) + Xi^T G`` with the noise of an earlier ``step``, and the
    joint rules' prediction ``Xi B`` for the step that begins.

    Fields:
        B: [units, m], float32.
        M, G: as in :func:`feedback_update`; G None: B stays.
        step: the step whose noise B learns from.
        predict: whether the prediction is wanted.
    """

    B: Tensor
    M: Tensor | tuple[Tensor, Tensor] | None = None
    G: Tensor | None = None
    step: int | Tensor | None = None
    predict: bool = False

    def arguments(self) -> dict[str, Tensor | bool | None]:
        """As the operators take it."""
        step = self.step if self.step is None or isinstance(self.step, Tensor) else torch.tensor(integer("step", self.step, 0))
        learned = None if step is None else step.to(self.B.device)
        gains = {"M": self.M, "G": self.G} if not isinstance(self.M, tuple) else {"R": self.M[0], "Q": self.M[1], "w": self.G}
        return {"B": self.B, **gains, "learned_step": learned, "predicts": self.predict}


# In the launch of the layer whose rows of B they are ride B's update and the joint rules' prediction (SPEC 5).
RIDE = (
    "Tensor? B=None, Tensor? M=None, Tensor? G=None, Tensor? R=None, Tensor? Q=None, Tensor? w=None, Tensor? learned_step=None, "
    "bool predicts=False"
)


class Ride(NamedTuple):
    """``B (I - M) + Xi^T G``, or with R, Q and w for M = R^T Q and G = w * Q; Xi of ``learned_step``. B None: nothing rides."""

    B: Tensor | None = None
    M: Tensor | None = None
    G: Tensor | None = None
    R: Tensor | None = None
    Q: Tensor | None = None
    w: Tensor | None = None
    learned_step: Tensor | None = None
    predicts: bool = False


NOTHING = Ride()


def ride_outputs(z: Tensor, key: NoiseKey, r: Ride, backend: str) -> tuple[Tensor, Tensor]:
    none = z.new_empty(0, dtype=torch.float32)
    if r.B is None:
        return none, none.clone()
    return outputs(call(r.B, r, key, backend))


def ride(z: Tensor, key: NoiseKey, r: Ride, backend: str) -> tuple[Tensor, Tensor]:
    """What rides, in a launch of its own beside the layer."""
    if r.B is None:
        return z.new_empty(0, dtype=torch.float32), z.new_empty(0, dtype=torch.float32)
    return op.compute(call(r.B, r, key, backend))  # type: ignore[no-any-return]


def check_ride(like: Tensor, units: int, r: Ride) -> None:
    B, M, G, R, Q, w, learned_step, _ = r
    if B is None:
        return
    m = B.shape[-1] if B.ndim else 0
    expect("B", B, like, units, m)
    if (R is None) != (Q is None) or (R is None) != (w is None) or (R is not None and G is not None) or (M is not None and G is None):
        raise ValueError("G must be given, with or without M, or R, Q and w")
    if (G is None and R is None) != (learned_step is None):
        raise ValueError("learned_step goes together with G, or R, Q and w")
    first = R if G is None else G
    learned = first.shape[0] if first is not None and first.ndim else 0
    for name, t in (("G", G), ("R", R), ("Q", Q)):
        expect(name, t, like, learned, m)
    expect("M", M, like, m, m)
    expect("w", w, like, learned)
    expect("learned_step", learned_step, like, dtype=torch.int64)


def plan(like: Tensor, rows: int, kind: str, r: Ride) -> Any:
    """What rides, as a Triton launch takes it."""
    given = (None if t is None else t.float().contiguous() for t in r[:6])
    return kernels().plan(*given, r.learned_step, rows if r.predicts else 0, kind, like)


SCHEMA = (
    "feedback_update(Tensor B, Tensor? M, Tensor? G, Tensor? R, Tensor? Q, Tensor? w, Tensor? step, Tensor? predicted_step, int seed, "
    'int point, SymInt predicted_rows, float std, str kind, *, SymInt offset=0, str backend="auto") -> (Tensor, Tensor)'
)
TILE_UNITS = 64  # BU of kernels/feedback_update.py, FeedbackUpdateParams::block_units
TASK_UNITS = 1024  # FeedbackUpdateParams::task_units


def call(B: Tensor, r: Ride, key: NoiseKey, backend: str) -> Any:
    predicted, rows = (key.step, key.rows) if r.predicts else (None, 0)
    return op.arguments(B, *r[1:7], predicted, key.seed, key.point, rows, key.std, key.kind, key.offset, backend)


def outputs(a: Any) -> tuple[Tensor, Tensor]:
    """The new B, and the sums of Xi B over parts of its units: the tiles of a GPU's launch, else one."""
    B = a.B
    tiled = B.dtype == torch.float32 and backend_for(a.backend, B.device, B.dtype) in ("triton", "cuda")
    return sized(a, -(-B.shape[0] // TILE_UNITS) if tiled else 1)


def sized(a: Any, parts: int) -> tuple[Tensor, Tensor]:
    new = a.B.new_empty(0) if a.step is None else torch.empty_like(a.B, memory_format=torch.contiguous_format)
    return new, a.B.new_empty(0) if a.predicted_step is None else a.B.new_empty(parts, a.predicted_rows, a.B.shape[1])


def check(a: Any) -> None:
    if a.step is None and a.predicted_step is None:
        raise ValueError("G, or R, Q and w, or prediction must be given")
    for name, step, rows in (("step", a.step, 0), ("predicted_step", a.predicted_step, a.predicted_rows)):
        if step is not None:
            check_key(NoiseKey(step, a.seed, a.point, rows, a.std, a.kind, a.offset), len(a.B))
            expect(name, step, a.B, dtype=torch.int64)
    check_ride(a.B, len(a.B), Ride(*a[:7]))


def reference(a: Any) -> tuple[Tensor, Tensor]:
    new, gain, target = a.B, a.M if a.R is None or a.Q is None else (a.R, a.Q), a.G if a.w is None else a.w

    def xi(step: Tensor, rows: int, offset: int = 0) -> Tensor:
        return draw(step, a.seed, a.point, rows, len(a.B), a.std, a.kind, offset=offset, dtype=a.B.dtype, backend=a.backend)

    if target is not None and a.step is not None:
        new = definition.feedback_update(a.B, xi(a.step, len(target)), gain, target)
    if a.predicted_step is None:
        return new, a.B.new_empty(0)
    prediction = (xi(a.predicted_step, a.predicted_rows, a.offset) @ new)[None]
    return (a.B.new_empty(0) if a.step is None else new), prediction


def compiled(a: Any, parts: int) -> tuple[Tensor, Tensor]:
    new, sums = sized(a, parts)
    M, G, R, Q, w = (None if t is None else t.float().contiguous() for t in a[1:6])
    out, into = None if a.step is None else new, None if a.predicted_step is None else sums
    key = (a.seed, a.point, a.std, a.kind, a.offset)
    _op.C.feedback_update(a.B.contiguous(), out, M, G, R, Q, w, into, a.step, a.predicted_step, *key, torch.get_num_threads())
    return new, sums


def cpp(a: Any) -> tuple[Tensor, Tensor]:
    if a.B.dtype != torch.float32:
        return op.on("reference", a)  # type: ignore[no-any-return]
    new, sums = compiled(a, -(-a.B.shape[0] // TASK_UNITS) + 1)
    return new, sums[:1].clone() if a.predicted_step is not None else sums


def cuda(a: Any) -> tuple[Tensor, Tensor]:
    return compiled(a, -(-len(a.B) // TILE_UNITS))


def triton(a: Any) -> tuple[Tensor, Tensor]:
    if a.B.dtype != torch.float32:
        return reference(a)
    update = plan(a.B, a.predicted_rows, a.kind, Ride(*a[:7])._replace(predicts=a.predicted_step is not None and a.predicted_rows > 0))
    kernels().feedback_update(update, a.predicted_step, a.seed, a.point, len(a.B), a.std, a.kind, a.offset)
    return update.new, update.parts


op = Op(SCHEMA, outputs, {"reference": reference, "cpp": cpp, "triton": triton, "cuda": cuda}, check)
