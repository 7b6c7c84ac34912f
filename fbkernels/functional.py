"""The functional interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fbkernels import ops, reference
from fbkernels._check import integer


def _step(step: int | Tensor) -> Tensor:
    return step if isinstance(step, Tensor) else torch.tensor(integer("step", step, 0))


def philox_words(seed: int, step: int | Tensor, point: int, samples: int, units: int) -> Tensor:
    """The 32-bit words behind the noise of one step at one feedback point, int64 [samples, units].

    Unit u of sample n is word ``u % 4`` of ``Philox4x32-10(counter=(low, high, step, point), key=seed)`` with
    ``(low, high) = n * ceil(units / 4) + u // 4``.

    Args:
        seed: the 64-bit key, in [0, 2^64).
        step: the training step, >= 0, as an int or a 0-dim int64 tensor, whose device the result is on; its low 32 bits count.
        point: the index of the feedback point, in [0, 2^32).
        samples, units: the shape, >= 0.

    Raises:
        ValueError, TypeError: naming the argument, its value and what was expected.
    """
    integer("seed", seed, 0, 2**64 - 1)
    step = _step(step)
    ops.check_noise(step, point, samples, units, 0.0, "gaussian", 0)
    return reference.philox_words(seed, step, point, samples, units, step.device)


def noise(seed: int, step: int | Tensor, point: int, samples: int, units: int, std: float, kind: str = "gaussian") -> Tensor:
    """The noise of one step at one feedback point, float32 [samples, units], a pure function of its arguments.

    ``"gaussian"``: Box-Muller on the words (a, b) = (0, 1) and (2, 3) of a counter,
    ``std * sqrt(-2 ln u) * (cos 2 pi v, sin 2 pi v)`` with ``u = ((a >> 8) + 1) / 2^24`` and ``v = (b >> 8) / 2^24``.
    ``"rademacher"``: ``std`` or ``-std``; unit u of sample n takes bit ``u // 4 % 32`` of word ``u % 4`` of counter
    ``n * ceil(units / 128) + u // 128``.

    Args:
        seed, step, point, samples, units: as in :func:`philox_words`.
        std: the standard deviation, finite and >= 0.
        kind: ``"gaussian"`` or ``"rademacher"``.

    Raises:
        ValueError, TypeError: naming the argument, its value and what was expected.
    """
    integer("seed", seed, 0, 2**64 - 1)
    step = _step(step)
    ops.check_noise(step, point, samples, units, std, kind, 0)
    return ops.noise(step, seed, point, samples, units, std, kind)


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
        learned = None if self.step is None else _step(self.step).to(self.B.device)
        gains = {"M": self.M, "G": self.G} if not isinstance(self.M, tuple) else {"R": self.M[0], "Q": self.M[1], "w": self.G}
        return {"B": self.B, **gains, "learned_step": learned, "predicts": self.predict}


class Perturbed(NamedTuple):
    """A layer up to its feedback point.

    Fields:
        h: the activity.
        p: the perturbed one, [rows, ...], with ``antithetic`` twice as many; empty without rows.
        kept: z behind each h for gelu, whose derivative is not a function of h; else empty.
        winner: uint8, the place ``kernel_width * y + x`` that each window of max-pooling took; else empty.
        B: the new B; empty where none was learned.
        prediction: Xi B, [rows, m]; empty where it was not wanted.
    """

    h: Tensor
    p: Tensor
    kept: Tensor
    winner: Tensor
    B: Tensor
    prediction: Tensor


def perturbed_linear(
    x: Tensor,
    p: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seed: int,
    step: int | Tensor,
    point: int,
    std: float,
    kind: str = "gaussian",
    rows: int | None = None,
    activation: str = "identity",
    antithetic: bool = False,
    update: Update | None = None,
    backend: str = "auto",
) -> Perturbed:
    """A linear layer up to its feedback point, both streams, with B's pending update (SPEC 1, 5): ``h = phi(x W^T + b)``,
    ``p' = phi(p W^T + b) + xi``. One launch on the triton backend. Without autograd.

    Args:
        x: [N, in], float32, bfloat16 or (triton) float16; any float type with backend "reference".
        p: the perturbed input, [rows, in], with ``antithetic`` [2 rows, in]; None: still the same numbers.
        weight: [out, in]; bias: [out].
        seed, step, point, std, kind: of the noise, as in :func:`noise`.
        rows: perturb the first so many samples; None: all.
        activation: "identity", "relu", "tanh", "sigmoid" or "gelu".
        antithetic: p' has +xi, then -xi.
        update: B's update and prediction.

    Returns:
        :class:`Perturbed`; sums in float32 (float32 products in tf32 where ``torch.backends.cuda.matmul.allow_tf32``).

    Raises:
        ValueError, TypeError: naming the argument, its value and what was expected. RuntimeError: the backend cannot be had.
    """
    key, options = _call(x, seed, step, point, rows, std, kind, update)
    h, perturbed, kept, B, parts = ops.perturbed_linear(
        x, p, weight, bias, activation, *key, antithetic=antithetic, backend=backend, **options
    )
    return Perturbed(h, perturbed, kept, h.new_empty(0, dtype=torch.uint8), B, _sum(parts))


def perturbed_conv2d(
    x: Tensor,
    p: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    *,
    seed: int,
    step: int | Tensor,
    point: int,
    std: float,
    kind: str = "gaussian",
    rows: int | None = None,
    activation: str = "identity",
    pool: str = "none",
    pool_first: bool = False,
    kernel_size: tuple[int, int] = (1, 1),
    pool_stride: tuple[int, int] = (1, 1),
    pool_padding: tuple[int, int] = (0, 0),
    antithetic: bool = False,
    update: Update | None = None,
    backend: str = "auto",
) -> Perturbed:
    """A convolution up to its feedback point, both streams, with B's pending update (SPEC 1, 5): ``h = pool(phi(conv(x) + b))``,
    ``p' = pool(phi(conv(p) + b)) + xi``. Without autograd.

    On the triton backend without pooling it is one launch, an implicit GEMM over channels-last maps, or the library's convolution and
    one launch of :func:`perturbed_pointwise`, whichever was faster on this GPU for these shapes; with pooling always the latter.

    Args:
        x: [N, C, H, W]; p: the perturbed input, [rows, C, H, W], with ``antithetic`` [2 rows, ...]; None: still the same numbers.
        weight: [out, C / groups, KH, KW]; bias: [out]; stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``.
        pool, pool_first, kernel_size, pool_stride, pool_padding: as in :func:`perturbed_pointwise`.
        The others: as in :func:`perturbed_linear`.

    Returns:
        :class:`Perturbed`, maps channels-last in memory; B's units are numbered channels-last.

    Raises:
        ValueError, TypeError: naming the argument, its value and what was expected. RuntimeError: the backend cannot be had.
    """
    key, options = _call(x, seed, step, point, rows, std, kind, update)
    layer, window = (stride, padding, dilation, groups), (pool, pool_first, kernel_size, pool_stride, pool_padding)
    h, perturbed, kept, winner, B, parts = ops.perturbed_conv2d(
        x, p, weight, bias, *layer, activation, *window, *key, antithetic=antithetic, backend=backend, **options
    )
    return Perturbed(h, perturbed, kept, winner, B, _sum(parts))


def perturbed_pointwise(
    z: Tensor,
    q: Tensor | None,
    *,
    seed: int,
    step: int | Tensor,
    point: int,
    std: float,
    kind: str = "gaussian",
    rows: int | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "identity",
    pool: str = "none",
    pool_first: bool = False,
    kernel_size: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    antithetic: bool = False,
    update: Update | None = None,
    backend: str = "auto",
) -> Perturbed:
    """What follows a layer's convolution or matrix product, for both streams in one pass (SPEC 1), with B's pending update (SPEC 5):
    ``h = pool(phi(s z + b))``, ``p = pool(phi(s q + b)) + xi``. Without autograd.

    The error behind ``h`` goes back through :func:`feedback`, and ``torch.ops.fbkernels.unpool`` or ``pooled_weight_gradient``.

    Args:
        z: the clean pre-activation, float32, bfloat16 or (triton) float16; any float type with backend "reference": [N, C, H, W] or
            [N, units].
        q: the perturbed one, [rows, ...], twice as many rows with ``antithetic``; None: still the same numbers.
        seed, step, point, std, kind: of the noise, as in :func:`noise`.
        rows: perturb the first so many samples; None: all.
        scale, bias: [C] or [units], applied in float32: a bias, or a normalisation.
        activation: "identity", "relu", "tanh", "sigmoid" or "gelu".
        pool: "none", "max" or "avg" (padding counts); maps only.
        pool_first: pool before phi.
        kernel_size, stride, padding: of the pooling.
        antithetic: p has +xi, then -xi.
        update: B's update and prediction.

    Returns:
        :class:`Perturbed`; maps are channels-last in memory.

    Raises:
        ValueError, TypeError: naming the argument, its value and what was expected. RuntimeError: the backend cannot be had.
    """
    key, options = _call(z, seed, step, point, rows, std, kind, update)
    window = (pool, pool_first, kernel_size, stride, padding)
    h, perturbed, kept, winner, B, parts = ops.perturbed_pointwise(
        z, q, bias, activation, *window, *key, scale=scale, antithetic=antithetic, backend=backend, **options
    )
    return Perturbed(h, perturbed, kept, winner, B, _sum(parts))


def _call(
    x: Tensor, seed: int, step: int | Tensor, point: int, rows: int | None, std: float, kind: str, update: Update | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    integer("seed", seed, 0, 2**64 - 1)
    key = (_step(step).to(x.device), ops.int64(seed), point, len(x) if rows is None else rows, std, kind)
    return key, {} if update is None else update.arguments()


def _sum(parts: Tensor) -> Tensor:
    return parts.sum(0) if parts.ndim == 3 else parts


def feedback(
    e: Tensor,
    B: Tensor,
    kept: Tensor,
    activation: str = "identity",
    *,
    winner: Tensor | None = None,
    size: tuple[int, int] | None = None,
    kernel_size: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    backend: str = "auto",
) -> Tensor:
    """``delta = (e B^T) * phi'``: the error of a layer's units before their activation (SPEC 3, ``direct``), and before a max-pooling.

    Args:
        e: the output's error, [N, outputs].
        B: [units, outputs]; a convolution's units are numbered channels-last.
        kept: what phi' is read from, h = phi(z), or z for gelu: [N, units] or [N, C, H, W] with C H W units.
        activation: as in :func:`perturbed_pointwise`.
        winner, size, kernel_size, stride, padding: of a max-pooling, its winners and the map's size before it: the error goes to the
            winners, a winner of two windows gets their sum. Without ``winner`` there is none.

    Returns:
        delta in the shape, ``[N, C, *size]`` before a pooling, and dtype of ``kept``; sums in float32 (float32 products in tf32 where
        ``torch.backends.cuda.matmul.allow_tf32``, and where delta has fewer digits anyway).

    Raises:
        ValueError: shapes, devices or an activation that do not fit. RuntimeError: the backend cannot be had.
    """
    window = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    delta: Tensor = ops.feedback(e, B, kept, activation, winner=winner, size=size or (), **window, backend=backend)
    return delta


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
    integer("seed", seed, 0, 2**64 - 1)
    given = (None, None, *M, G) if isinstance(M, tuple) else (M, G, None, None, None)
    key = (ops.int64(seed), point, 0, std, kind)
    new: Tensor = ops.feedback_update(B, *given, _step(step), None, *key, backend=backend)[0]
    return new


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


def mirror(
    B: Tensor,
    W: Tensor,
    *,
    seed: int,
    step: int | Tensor,
    point: int,
    samples: int = 512,
    kind: str = "gaussian",
    draws: int = 1,
    offset: int = 0,
    backend: str = "auto",
) -> Mirror:
    """A step of the local mirror (SPEC 4): B learns W from the layer's responses ``Z = Xi W^T`` to noise of its own fan-in,
    ``B <- B + (Z - Xi B^T)^T Xi / (S + n + 1)``, with Rademacher noise ``/ (S + n - 1)``.

    This is the block LMS step of fastest decay: by it E|W - B|^2 falls by the factor ``1 - S / (S + n + 1)``, or ``1 - S / (S + n - 1)``.
    Xi has variance 1; its size cancels. B is in the layout of the layer's weight, [outputs, inputs / groups, *kernel], and converges to
    W itself. Unit u of the noise is number u of a row of the weight, in the weight's logical order whatever its memory format
    (of a convolution ``u = (c * KH + y) * KW + x``), n = inputs / groups * kernel size. Each output learns its own row from it, so that
    all groups of a convolution see the same S x n numbers and are one product.

    Args:
        B, W: [outputs, ...], float32; any float type with backend "reference" or "auto", float64 in float64, the others in float32.
        seed, step, point, kind: of the noise, as in :func:`noise`.
        samples: S, >= 1.
        draws: so many steps one after the other, each with S samples of its own.
        offset: the first sample; a call continues one with ``draws`` steps at ``offset + draws * samples``.

    Returns:
        :class:`Mirror`; of several draws the residual is that of the last one's old B. The old B stays.

    Raises:
        ValueError, TypeError: naming the argument, its value and what was expected. RuntimeError: the backend cannot be had.
    """
    options = {"seed": seed, "step": step, "samples": samples, "kind": kind, "draws": draws, "offset": offset, "backend": backend}
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
    kind: str = "gaussian",
    draws: int = 1,
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
    integer("seed", seed, 0, 2**64 - 1)
    step = _step(step)
    step = step if not B else step.to(B[0].device)
    return MirrorAll(*ops.mirror(B, W, step, ops.int64(seed), points, samples, kind, draws=draws, offset=offset, backend=backend))


class RidgeGain(NamedTuple):
    """What :func:`ridge_gain` returns."""

    V: Tensor
    Q: Tensor
    M: Tensor
    G: Tensor


def ridge_gain(R: Tensor, w: Tensor, V: Tensor, gamma: float, forgetting: float = 1.0, *, backend: str = "auto") -> RidgeGain:
    """A batch of recursive least squares (SPEC 4): ``V <- beta^N V + (1 - beta^N) gamma I + R^T D R`` with
    ``D = diag(beta^(N-1), ..., 1)``, then ``Q = D R V^-1``, ``M = R^T Q``, ``G = w * Q``.

    Args:
        R: regressors, [N, m], or [groups, N, m] with V [groups, m, m].
        w: ``dL / sigma^2``, [N].
        V: the statistics so far, float64 [m, m]; ``gamma I`` at the start.
        gamma: the ridge, > 0, in units of ``|r|^2``.
        forgetting: beta in (0, 1] per sample.

    Returns:
        The new V (float64), and Q, M, G in the dtype of R; the solve is in float64.

    Raises:
        ValueError: naming the argument and what was expected. RuntimeError: the backend cannot be had; V is not positive definite.
            With backend "triton" no such V raises, because a look at it would synchronise: Q, M and G are NaN or infinite throughout.
    """
    return RidgeGain(*ops.ridge_gain(R, w, V, gamma, forgetting, backend=backend))


class PerturbedCrossEntropy(NamedTuple):
    """What :func:`perturbed_cross_entropy` returns."""

    losses: Tensor
    e: Tensor
    dL: Tensor
    dy: Tensor
    ok: Tensor


def perturbed_cross_entropy(
    logits: Tensor,
    perturbed: Tensor | None,
    target: Tensor,
    antithetic: bool = False,
    *,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> PerturbedCrossEntropy:
    """Per-sample cross-entropies, ``e = softmax(y) - onehot``, and what a perturbation of the logits did to loss and output (SPEC 2).

    ``dL = L(y~) - L(y)``, antithetic ``(L(y+) - L(y-)) / 2``; ``dy`` the same of the logits. Backend "triton" does it in one launch in
    float32, with ``d = y~ - y``, ``s = softmax(y)`` and target t as ``dL = log1p(sum_k s_k expm1(d_k - d_t))``, which keeps its digits
    where the two losses agree in theirs; the others in float64 from the definition.

    Args:
        logits: y, [N, K].
        perturbed: y~ of the first samples, [rows, K], or +xi then -xi, [2 rows, K]; None: none, rows = N and dL = dy = 0.
        target: class indices, int64 [N]; -100 is ignored: loss, e and dL are 0.
        antithetic: whether ``perturbed`` holds both signs.
        scale: 0-dim, of losses, e and dL: what makes a mean of them the mean over the targets that count.

    Returns:
        losses [N], e [N, K], dL [rows], dy [rows, K] in float32 (float64 of float64), and ok [rows], bool: whether all of the sample is
        finite. Where not, dL and dy are 0.

    Raises:
        ValueError: naming the argument and what was expected. IndexError: a target is no class; with backend "triton", where a look
            would synchronise, its loss and e are NaN instead. RuntimeError: the backend cannot be had.
    """
    return PerturbedCrossEntropy(*ops.perturbed_cross_entropy(logits, perturbed, target, antithetic, scale=scale, backend=backend))
