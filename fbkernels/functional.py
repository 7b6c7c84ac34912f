"""The functional interface."""

from __future__ import annotations

from typing import NamedTuple

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


class Pointwise(NamedTuple):
    """What :func:`perturbed_pointwise` returns."""

    h: Tensor
    p: Tensor
    kept: Tensor
    winner: Tensor


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
    bias: Tensor | None = None,
    activation: str = "identity",
    pool: str = "none",
    pool_first: bool = False,
    kernel_size: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    antithetic: bool = False,
    backend: str = "auto",
) -> Pointwise:
    """What follows a layer's convolution or matrix product, for both streams in one pass (SPEC 1):
    ``h = pool(phi(z + b))``, ``p = pool(phi(q + b)) + xi``.

    Without autograd. The error behind ``h`` goes back through :func:`feedback`, and ``torch.ops.fbkernels.unpool`` or
    ``pooled_weight_gradient``.

    Args:
        z: the clean pre-activation, float32 or bfloat16 (any float type with backend "reference"), [N, C, H, W] or [N, units].
        q: the perturbed one, [rows, ...], twice as many rows with ``antithetic``; None: still the same numbers.
        seed, step, point, std, kind: of the noise, as in :func:`noise`.
        rows: perturb the first so many samples; None: all.
        bias: [C] or [units], added in float32.
        activation: "identity", "relu", "tanh", "sigmoid" or "gelu".
        pool: "none", "max" or "avg" (padding counts); maps only.
        pool_first: pool before phi.
        kernel_size, stride, padding: of the pooling.
        antithetic: p has +xi, then -xi.

    Returns:
        h, p; ``kept``: z behind each h for gelu, whose derivative is not a function of h, else empty; ``winner``: uint8, the place
        ``kernel_width * y + x`` that each window of max-pooling took, else empty. Maps are channels-last in memory.

    Raises:
        ValueError, TypeError: naming the argument, its value and what was expected. RuntimeError: the backend cannot be had.
    """
    integer("seed", seed, 0, 2**64 - 1)
    rows = len(z) if rows is None else rows
    window = (pool, pool_first, kernel_size, stride, padding)
    key = (_step(step), ops.int64(seed), point, rows, std, kind)
    return Pointwise(*ops.perturbed_pointwise(z, q, bias, activation, *window, *key, antithetic=antithetic, backend=backend))


def feedback(e: Tensor, B: Tensor, kept: Tensor, activation: str = "identity", *, backend: str = "auto") -> Tensor:
    """``delta = (e B^T) * phi'``: the error of a layer's units before their activation (SPEC 3, ``direct``).

    Args:
        e: the output's error, [N, outputs].
        B: [units, outputs]; a convolution's units are numbered channels-last.
        kept: what phi' is read from, h = phi(z), or z for gelu: [N, units] or [N, C, H, W] with C H W units.
        activation: as in :func:`perturbed_pointwise`.

    Returns:
        delta in the shape and dtype of ``kept``; sums in float32.

    Raises:
        ValueError: shapes, devices or an activation that do not fit. RuntimeError: the backend cannot be had.
    """
    delta: Tensor = ops.feedback(e, B, kept, activation, backend=backend)
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


class RidgeGain(NamedTuple):
    """What :func:`ridge_gain` returns."""

    V: Tensor
    Q: Tensor
    M: Tensor
    G: Tensor


def ridge_gain(R: Tensor, w: Tensor, V: Tensor, gamma: float, forgetting: float = 1.0, *, backend: str = "auto") -> RidgeGain:
    """A batch of recursive least squares (SPEC 4; PAPER 1.2): ``V <- beta^N V + (1 - beta^N) gamma I + R^T D R`` with
    ``D = diag(beta^(N-1), ..., 1)``, then ``Q = D R V^-1``, ``M = R^T Q``, ``G = w * Q``.

    Args:
        R: regressors, [N, m], or [groups, N, m] with V [groups, m, m].
        w: ``dL / sigma^2``, [N].
        V: the statistics so far, float64 [m, m]; ``gamma I`` at the start.
        gamma: the ridge, > 0, in units of |r|^2.
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
