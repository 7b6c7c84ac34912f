"""A step of the local mirror (SPEC 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fbkernels import reference as definition
from fbkernels._check import integer
from fbkernels.ops import _op
from fbkernels.ops._op import Op, chosen_for, expect, kernels
from fbkernels.ops.noise import NoiseKey, check_key, public_key


def mirror(
    B: Tensor,
    W: Tensor,
    *,
    seed: int,
    step: int | Tensor,
    point: int,
    samples: int = 512,
    kind: str = "rademacher",
    offset: int = 0,
    backend: str = "auto",
) -> Mirror:
    """A step of the local mirror (SPEC 4): B learns W from the layer's responses ``Z = Xi W^T`` to noise of its own fan-in,
    ``B <- B + (Z - Xi B^T)^T Xi / (S + n - 1)``, with Gaussian noise ``/ (S + n + 1)``.

    This is the block LMS step of fastest decay: by it E|W - B|^2 falls by the factor ``1 - S / (S + n - 1)``, or ``1 - S / (S + n + 1)``.
    Xi has variance 1; its size cancels. Rademacher noise is the default: the error decays faster, and it is made several times faster.

    B is in the layout of the layer's weight, ``[outputs, inputs / groups, *kernel]``, and converges to W itself. Unit u of the noise is
    number u of a row of the weight, in its logical order whatever its memory format (of a convolution ``u = (c * KH + y) * KW + x``), so
    that n = inputs / groups * kernel size. Each output learns its own row from it: all groups of a convolution see the same S x n numbers,
    and are one product.

    Args:
        B, W: [outputs, ...], float32; any float type with backend "reference" or "auto", float64 in float64, the others in float32.
        seed, step, point, kind: of the noise, as in :func:`noise`.
        samples: S, in [1, 2^20].
        offset: the first sample; of one step's noise another call takes others by another offset.

    Returns:
        :class:`Mirror`. The old B stays.

    Raises:
        ValueError, TypeError: naming the argument, its value and what was expected. RuntimeError: the backend cannot be had.
    """
    options = {"seed": seed, "step": step, "samples": samples, "kind": kind, "offset": offset, "backend": backend}
    (new,), residual = mirror_all([B], [W], points=[point], **options)  # type: ignore[arg-type]
    return Mirror(new, residual[0])


def mirror_all(
    B: Sequence[Tensor],
    W: Sequence[Tensor],
    *,
    seed: int,
    step: int | Tensor,
    points: Sequence[int],
    samples: int = 512,
    kind: str = "rademacher",
    offset: int = 0,
    backend: str = "auto",
) -> MirrorAll:
    """:func:`mirror` for all layers of a step in one call.

    Layers with the same point and the same fan-in n see the same noise, which is then made once for them; layers with points of their own
    see noise of their own. Both are the same estimator for each layer.

    Args:
        B, W, points: of each layer.
        The others: as in :func:`mirror`.
    """
    B, device = list(B), B[0].device if B else None
    key = public_key(seed, step, 0, 0, 1.0, kind, device)
    return MirrorAll(*op(B, list(W), key.step, key.seed, list(points), samples, kind, offset=offset, backend=backend))


class Mirror(NamedTuple):
    """What :func:`mirror` returns.

    Fields:
        B: the new B, in the shape and memory format of the old.
        residual: 0-dim float32, ``|Z - Xi B|^2 / (S |W|^2)`` of the old B; in expectation ``|W - B|^2 / |W|^2``.
    """

    B: Tensor
    residual: Tensor


class MirrorAll(NamedTuple):
    """What :func:`mirror_all` returns: the new B of each layer, and their residuals, float32 [layers]."""

    B: list[Tensor]
    residual: Tensor


SCHEMA = (
    "mirror(Tensor[] B, Tensor[] W, Tensor step, int seed, int[] points, SymInt samples, str kind, *, SymInt offset=0, "
    'str backend="auto") -> (Tensor[], Tensor)'
)


def outputs(a: Any) -> tuple[list[Tensor], Tensor]:
    return [torch.empty_like(b) for b in a.B], a.step.new_empty(len(a.B), dtype=torch.float32)


def check(a: Any) -> None:
    check_shapes(a)
    for b, w, point in zip(a.B, a.W, a.points, strict=True):
        check_key(NoiseKey(a.step, a.seed, point, a.samples, 1.0, a.kind, a.offset), b[0].numel())
        expect("B", b, a.step, *b.shape)
        expect("W", w, b, *b.shape)


def check_shapes(a: Any) -> None:
    """What the compiled part does not see: it is given matrices."""
    if not len(a.B) == len(a.W) == len(a.points):
        raise ValueError(f"B, W and points must be of one length, got {len(a.B)}, {len(a.W)} and {len(a.points)}")
    integer("samples", a.samples, 1, 2**20)
    for b, w in zip(a.B, a.W, strict=True):
        if b.ndim < 2 or not b.numel():
            raise ValueError(f"B must be [outputs, inputs, ...] and not empty, got shape {tuple(b.shape)}")
        if w.shape != b.shape:
            raise ValueError(f"W must have shape {tuple(b.shape)}, got {tuple(w.shape)}")


def reference(a: Any) -> tuple[list[Tensor], Tensor]:
    new, residual = [], a.step.new_empty(len(a.B), dtype=torch.float32)
    for i, (b, w, point) in enumerate(zip(a.B, a.W, a.points, strict=True)):
        exact = torch.promote_types(b.dtype, torch.float32)
        key = (a.seed, a.step, point, a.samples, b[0].numel(), 1.0, a.kind)
        learned, residual[i] = definition.mirror(b.to(exact), w.to(exact), definition.noise(*key, exact, a.step.device, a.offset), a.kind)
        new.append(torch.empty_like(b).copy_(learned))
    return new, residual


def matrix(t: Tensor) -> Tensor:
    return t if t.ndim == 2 and t.dtype == torch.float32 and t.is_contiguous() else t.float().flatten(1).contiguous()


def like(t: Tensor, new: Tensor) -> Tensor:
    """The matrix in the shape, dtype and memory format of another tensor."""
    if t.dtype == torch.float32 and t.is_contiguous():
        return new if t.ndim == 2 else new.view(t.shape)
    return torch.empty_like(t).copy_(new.view(t.shape))


def by_kernel(a: Any, launch: Callable[..., None]) -> tuple[list[Tensor], Tensor]:
    """``launch(B, W, new, residual)`` takes float32 matrices, and fills the last two."""
    if any(chosen_for(a.backend, t.device, t.dtype) == "reference" for t in (*a.B, *a.W)):
        return op.on("reference", a)  # type: ignore[no-any-return]
    B, W = [matrix(b) for b in a.B], [matrix(w) for w in a.W]
    new, residual = [torch.empty_like(b) for b in B], a.step.new_empty(len(B), dtype=torch.float32)
    launch(B, W, new, residual)
    return [like(b, n) for b, n in zip(a.B, new, strict=True)], residual


def cpp(a: Any) -> tuple[list[Tensor], Tensor]:
    check_shapes(a)
    key, threads = (a.step, a.seed, a.points, a.samples, a.kind), torch.get_num_threads()
    return by_kernel(a, lambda *layers: _op.C.mirror(*layers, None, *key, a.offset, threads))


def cuda(a: Any) -> tuple[list[Tensor], Tensor]:
    check_shapes(a)
    # the responses, and two sums of each block that makes them (mirror_scratch of csrc/mirror.h)
    numbers = sum(len(b) * a.samples + 2 * -(-len(b) // 64) * -(-a.samples // 64) for b in a.B)
    scratch, key = a.step.new_empty(numbers, dtype=torch.float32), (a.step, a.seed, a.points, a.samples, a.kind)
    return by_kernel(a, lambda *layers: _op.C.mirror(*layers, scratch, *key, a.offset))


def triton(a: Any) -> tuple[list[Tensor], Tensor]:
    key = (a.step, a.seed, a.points, a.samples, a.kind)
    return by_kernel(a, lambda *layers: kernels().mirror(layers[3], *layers[:3], *key, a.offset))


# the step is where the tensors are, and a list of none has no dtype
op = Op(SCHEMA, outputs, {"reference": reference, "cpp": cpp, "triton": triton, "cuda": cuda}, check, by=2, any_dtype=True)
