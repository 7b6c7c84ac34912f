"""The definition of the method in plain torch, for any float dtype. Read it beside SPEC.md; every backend is tested against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011). Words are int64 tensors that hold 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, so the masked shift still gives the exact high word
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) & _MASK ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) & _MASK ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _counters(seed: int, step: int | Tensor, point: int, samples: int, per_sample: int, device: torch.device | str, offset: int) -> Tensor:
    """The four words of counters ``((offset + n) * per_sample + i, step, point)``, int64 [samples, per_sample, 4]."""
    index = torch.arange(samples * per_sample, device=device) + offset * per_sample
    step = torch.as_tensor(step, device=device, dtype=torch.int64) & _MASK
    counter = (index & _MASK, index >> 32, step.expand_as(index), torch.full_like(index, point))
    return torch.stack(philox(counter, (seed & _MASK, seed >> 32 & _MASK)), -1).view(samples, per_sample, 4)


def philox_words(
    seed: int, step: int | Tensor, point: int, samples: int, units: int, device: torch.device | str = "cpu", offset: int = 0
) -> Tensor:
    """The 32-bit words of a step's noise at one feedback point, int64 [samples, units] (SPEC 6).

    Unit u of sample n takes word ``u % 4`` of counter ``(n * ceil(units / 4) + u // 4, step, point)``; the key is the seed.
    """
    return _counters(seed, step, point, samples, -(-units // 4), device, offset).flatten(1)[:, :units]


def noise(
    seed: int,
    step: int | Tensor,
    point: int,
    samples: int,
    units: int,
    std: float,
    kind: str = "gaussian",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    offset: int = 0,
) -> Tensor:
    """Noise with standard deviation ``std``, [samples, units], of the samples from ``offset`` of the global batch on (SPEC 6).

    Gaussian: Box-Muller on word pairs (0, 1) and (2, 3) with 24-bit uniforms, which float32 holds exactly:
    ``u = ((a >> 8) + 1) / 2^24``, ``v = (b >> 8) / 2^24``, ``std * sqrt(-2 ln u) * (cos 2 pi v, sin 2 pi v)``.
    Rademacher: one bit an element, so 128 units share a counter: unit u of sample n takes bit ``u // 4 % 32`` of word ``u % 4`` of
    counter ``(n * ceil(units / 128) + u // 128, step, point)``; ``std`` where it is 0, ``-std`` where it is 1.
    """
    if kind == "rademacher":
        words = _counters(seed, step, point, samples, -(-units // 128), device, offset)
        bits = words[:, :, None, :] >> torch.arange(32, device=device)[:, None] & 1  # [samples, counters, bit, word]
        return ((1 - 2 * bits.flatten(1)[:, :units]).double() * std).to(dtype)
    words = _counters(seed, step, point, samples, -(-units // 4), device, offset).unflatten(2, (2, 2)) >> 8
    radius = (-2 * ((words[..., 0] + 1) * 2.0**-24).double().log()).sqrt()
    angle = words[..., 1].double() * (2 * math.pi * 2.0**-24)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
    return (std * pairs).flatten(1)[:, :units].to(dtype)


def is_map(dimensions: int, channels_first: bool | None) -> bool:
    """Whether an activity of so many dimensions, the batch's included, is [samples, channels, ...].

    ``channels_first``: a convolution made it; None: not known, so four and more dimensions say so.
    """
    return channels_first or (channels_first is None and dimensions > 3)


def units(h: Tensor, channels_first: bool | None = None, share: int = 1) -> Tensor:
    """An activity as samples x units, a convolution's numbered channels-last: u = (y * W + x) * C + c (SPEC 6).

    Where ``share`` places along each dimension of a map are one unit, their sum is that unit's.
    """
    if not is_map(h.ndim, channels_first):
        return h.flatten(1)
    return (h if share == 1 else gather(h, share)).movedim(1, -1).flatten(1)


def layout(u: Tensor, shape: Sequence[int], channels_first: bool | None = None, share: int = 1) -> Tensor:
    """The adjoint of ``units``, and its inverse where nothing is shared: samples x units in the shape of an activity, batch first."""
    if not is_map(len(shape), channels_first):
        return u.view(*shape)
    small = patches(shape[1:], share)
    h = u.view(shape[0], *small[1:], small[0]).movedim(-1, 1)
    return h if share == 1 else spread(h, shape[1:], share)


def patches(shape: Sequence[int], share: int) -> tuple[int, ...]:
    """The shape of an activity [channels, ...] of which ``share`` places along each dimension of its maps are one."""
    return (shape[0], *(-(-n // share) for n in shape[1:]))


def spread(t: Tensor, shape: Sequence[int], share: int) -> Tensor:
    """Each patch's number at all its places: [samples, *patches(shape)] to [samples, *shape]."""
    for d, n in enumerate(shape[1:], 2):
        t = t.repeat_interleave(min(share, n), d).narrow(d, 0, n)
    return t


def gather(t: Tensor, share: int) -> Tensor:
    """The sum over each patch, the adjoint of ``spread``: [samples, channels, ...] to [samples, *patches(...)]."""
    for d in range(2, t.ndim):
        n, s = t.shape[d], min(share, t.shape[d])
        index = torch.arange(n, device=t.device) // s
        t = t.new_zeros(*t.shape[:d], -(-n // s), *t.shape[d + 1 :]).index_add(d, index, t)
    return t


# phi and, from what is kept of it, phi': h = phi(z), of gelu z itself
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
}


def derivative(kept: Tensor, activation: str) -> Tensor:
    """phi'(z) from h = phi(z); of gelu from z."""
    if activation == "gelu":
        gauss = (-0.5 * kept.square()).exp() / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(kept / math.sqrt(2))) + kept * gauss
    if activation == "relu":
        return (kept > 0).to(kept.dtype)
    if activation == "tanh":
        return 1 - kept.square()
    return kept * (1 - kept) if activation == "sigmoid" else torch.ones_like(kept)


def pointwise(
    z: Tensor,
    bias: Tensor | None,
    activation: str,
    pool: str,
    pool_first: bool,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """phi and pooling of scale z + bias, in either order: h; z behind each h where phi is gelu; and the winner of each max-pooling window.

    A winner is its place in the window, ``kernel_width * y + x``, uint8. Where phi does not decrease, pooling z gives the same h, and the
    winner is that of z: ties that phi alone makes do not count.
    """
    phi, window = ACTIVATIONS[activation], (tuple(kernel_size), tuple(stride), tuple(padding))
    scale, bias = (None if t is None else t.to(z.dtype).view(-1, *[1] * (z.ndim - 2)) for t in (scale, bias))
    z = z if scale is None else z * scale
    z = z if bias is None else z + bias
    none, nobody = z.new_empty(0), z.new_empty(0, dtype=torch.uint8)
    if pool == "avg":
        return phi(F.avg_pool2d(z, *window)) if pool_first else F.avg_pool2d(phi(z), *window), none, nobody
    if pool == "none":
        return phi(z), z if activation == "gelu" else none, nobody
    _, at = F.max_pool2d(phi(z) if activation == "gelu" and not pool_first else z, *window, return_indices=True)
    won = z.flatten(2).gather(2, at.flatten(2)).view(at.shape)
    y, x = at // z.shape[3], at % z.shape[3]
    first = [torch.arange(n, device=z.device) * s - p for n, s, p in zip(at.shape[2:], stride, padding, strict=True)]
    place = (y - first[0][:, None]) * kernel_size[1] + x - first[1]
    return phi(won), won if activation == "gelu" else none, place.to(torch.uint8)


def perturbed_pointwise(
    z: Tensor,
    dz: Tensor | None,
    xi: Tensor,
    antithetic: bool,
    bias: Tensor | None,
    activation: str,
    pool: str,
    pool_first: bool,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``pointwise`` of z, and beside h its difference to the perturbed activity (SPEC 1): h, d, kept, winner.

    d = pool(phi(scale (z + dz) + bias)) - pool(phi(scale z + bias)) + xi of the first samples, as many as xi has; with ``antithetic``
    twice, then with -xi. dz has the rows of d, None for 0. All of it in float32 (float64), and then rounded to the dtype of z.
    """
    exact, rows, signs = torch.promote_types(z.dtype, torch.float32), len(xi), 1 + antithetic
    how = (bias, activation, pool, pool_first, kernel_size, stride, padding, scale)
    h, kept, winner = pointwise(z.to(exact), *how)
    d = torch.cat((xi, -xi)) if antithetic else xi
    if dz is not None:
        moved = pointwise(torch.cat([z[:rows].to(exact)] * signs) + dz.to(exact), *how)[0]
        d = moved - torch.cat([h[:rows]] * signs) + d
    return h.to(z.dtype), d.to(z.dtype), kept.to(z.dtype), winner


def unpool(
    delta: Tensor, winner: Tensor, size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The error of max-pooled maps at the winners of ``pointwise``, [samples, channels, *size]; a winner of two windows gets their sum."""
    place = winner.long()
    y, x = (
        (torch.arange(n, device=delta.device) * s - p).view(-1, *[1] * (1 - i))
        + (place // kernel_size[1] if i == 0 else place % kernel_size[1])
        for i, (n, s, p) in enumerate(zip(delta.shape[2:], stride, padding, strict=True))
    )
    out = delta.new_zeros(*delta.shape[:2], size[0] * size[1])
    return out.scatter_add(2, (y * size[1] + x).flatten(2), delta.flatten(2)).view(*delta.shape[:2], *size)


def feedback_update(B: Tensor, xi: Tensor, M: Tensor | tuple[Tensor, Tensor] | None, G: Tensor) -> Tensor:
    """B (I - M) + Xi^T G, the one update that serves every rule (SPEC 4).

    B [n, m], Xi [N, n], G [N, m]; M [m, m], None for 0, or factors (R, Q), M = R^T Q: then G may be w [N] for w * Q, and where N < m
    ``B + (w * Xi - R B^T)^T Q`` is cheaper. A leading dimension of all but w stands for the groups of a convolution.
    """
    xi, G = xi.to(B.dtype), G.to(B.dtype)
    if isinstance(M, tuple):
        R, Q = (t.to(B.dtype) for t in M)
        if G.ndim == 1:
            return B + (G[:, None] * xi - R @ B.mT).mT @ Q
        return B + xi.mT @ G - (B @ R.mT) @ Q
    new = B + xi.mT @ G
    return new if M is None else new - B @ M.to(B.dtype)


def mirror_rate(samples: int, units: int, kind: str) -> float:
    """The step of :func:`mirror` with the fastest decay of E|W - B|^2: by the factor ``1 - samples * rate``.

    With A = Xi^T Xi, E|D (I - c A)|^2 = |D|^2 (1 - 2 c S + c^2 S (S + n + k - 2)) for noise of fourth moment k, 3 or 1: least where
    c = 1 / (S + n + k - 2).
    """
    return 1 / max(samples + units + (1 if kind == "gaussian" else -1), 1)


def mirror(B: Tensor, W: Tensor, xi: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """One step of the local mirror, B + rate (W - B) Xi^T Xi (SPEC 4), and how far the old B was from W.

    B, W [outputs, ...] with n numbers a row; Xi [S, n] of variance 1. The second result is |Z - Xi B|^2 / (S |W|^2), Z the response
    Xi W^T: in expectation |W - B|^2 / |W|^2.
    """
    unexplained = xi @ (W - B).flatten(1).T
    new = B + mirror_rate(len(xi), xi.shape[1], kind) * (unexplained.T @ xi).view(B.shape)
    return new, unexplained.square().sum() / (len(xi) * W.square().sum()).clamp_min(torch.finfo(W.dtype).tiny)


def patterns(signs: Tensor, first: int, rows: int) -> Tensor:
    """Rows ``first`` to ``first + rows`` of an orthogonal set of Rademacher noise, ``Xi[s, u] = signs[u] (-1)^(ones of s & u)``: Hadamard's
    matrix. Of all P, the least power of two >= n, ``Xi^T Xi = P I``.

    signs [n] of +-1; [rows, n].
    """
    index = torch.arange(max(first + rows, len(signs)), device=signs.device)
    odd = index[first : first + rows, None] & index[: len(signs)]
    for shift in (16, 8, 4, 2, 1):
        odd = odd ^ (odd >> shift)
    return torch.where(odd & 1 == 1, -signs, signs)


def conv_size(size: Sequence[int], weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """The height and width behind a convolution."""
    spatial = zip(size, weight.shape[2:], stride, padding, dilation, strict=True)
    return [(n + 2 * p - t * (k - 1) - 1) // s + 1 for n, k, s, p, t in spatial]


def pooled_weight_gradient(
    delta: Tensor,
    winner: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    kernel_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The gradients of a convolution's weight and bias, from the error at the output of the max-pool behind it.

    dW[c, i, ky, kx] = sum over n, y, x of d[n, c, y, x] x[n, i, y s + ky t - p, x s + kx t - p], db[c] = sum of d, with d the unpooled
    delta, stride s, dilation t and padding p; one group.
    """
    size = conv_size(x.shape[2:], weight, stride, padding, dilation)
    dense = unpool(delta, winner, size, kernel_size, pool_stride, pool_padding)
    gradient = torch.ops.aten.convolution_backward(
        dense, x.to(delta.dtype), weight.to(delta.dtype), None, stride, padding, dilation, False, [0, 0], 1, [False, True, False]
    )[1]
    return gradient, delta.sum((0, 2, 3))


def ridge_gain(
    R: Tensor,
    w: Tensor,
    V: Tensor,
    gamma: float,
    forgetting: float,
    before: int = 0,
    after: int = 0,
    total: Callable[[Tensor], Tensor] = lambda t: t,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch of recursive least squares (SPEC 4): V, and Q, M, G in the dtype of R.

    ``V <- beta^N V + (1 - beta^N) gamma I + R^T D R`` with ``D = diag(beta^(N-1), ..., 1)``, ``Q = D R V^-1``, ``M = R^T Q``,
    ``G = w * Q``. R [N, m], w [N], V [m, m] float64; all but w may have a leading dimension, the groups of a convolution.

    Of a batch with other samples ``before`` and ``after`` these, ``total`` adds up the R^T D R of its parts: V is that of the whole batch,
    M the part's own, and the sum over the parts the whole batch's.
    """
    exact = R.double()
    samples, m = R.shape[-2:]
    age = torch.arange(samples - 1, -1, -1, dtype=torch.float64, device=R.device) + after
    weighted = exact * (forgetting**age)[:, None] if forgetting < 1 else exact
    if forgetting < 1:
        keep = forgetting ** (before + samples + after)
        V = keep * V + (1 - keep) * gamma * torch.eye(m, dtype=torch.float64, device=R.device)
    V = V + total(exact.mT @ weighted)
    Q = torch.cholesky_solve(weighted.mT, torch.linalg.cholesky(V)).mT
    return V, Q.to(R.dtype), (exact.mT @ Q).to(R.dtype), (w.double()[:, None] * Q).to(R.dtype)


def perturbed_cross_entropy(
    logits: Tensor, perturbed: Tensor | None, target: Tensor, antithetic: bool, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropies of class indices, and what a perturbation of the logits did (SPEC 2), in float64.

    losses [N] and e = dL/dlogits [N, K]; dL = L~ - L, dy = y~ - y [rows, K] and whether all four of the sample are finite, ok [rows];
    where not, dL and dy are 0. ``perturbed``: of the first samples, [rows, K], or [2 rows, K], +xi then -xi, for half the differences of
    the two; None: none, rows = N and dL = dy = 0. ``scale``: of losses, e and dL. The target -100 is ignored: L = L~ = 0.
    """
    y = logits.double()
    factor = torch.ones_like(y[:, 0]) if scale is None else scale.double().expand(len(y))
    kept = (target != -100).to(y.dtype)
    losses = factor * F.cross_entropy(y, target, reduction="none")
    e = y.softmax(1)
    e = (factor * kept)[:, None] * (e - F.one_hot(target.clamp_min(0), y.shape[1]))
    rows = len(y) if perturbed is None else len(perturbed) // (1 + antithetic)
    dL, dy = torch.zeros_like(losses[:rows]), torch.zeros_like(y[:rows])
    if perturbed is not None:
        p, t = perturbed.double(), target[:rows]
        moved = torch.cat([factor[:rows] * F.cross_entropy(part, t, reduction="none") for part in p.split(rows)] if rows else [dL, dL])
        dL, dy = moved[:rows] - losses[:rows], p[:rows] - y[:rows]
        if antithetic:
            dL, dy = (moved[:rows] - moved[rows:]) / 2, (p[:rows] - p[rows:]) / 2
    ok = torch.isfinite(losses[:rows]) & torch.isfinite(e[:rows]).all(1) & torch.isfinite(dL) & torch.isfinite(dy).all(1)
    return losses, e, torch.where(ok, dL, 0.0), torch.where(ok[:, None], dy, 0.0), ok


def pair(v: Any) -> tuple[Any, Any]:
    """A size of two dimensions, given as torch takes it: one number or two."""
    return (v, v) if isinstance(v, int) else (v[0], v[-1])


@dataclass(frozen=True)
class Connection:
    """How a layer reads a point: a linear map or a two-dimensional convolution, forward and back (SPEC 3, ``layerwise``).

    As a regression its B is a matrix: channels x outputs for a linear map, [groups, channels, outputs * kernel positions] for a
    convolution, where the regressors are the patches of delta and every position is a sample.
    """

    convolution: bool
    channels: int
    kernel: tuple[int, int] = (1, 1)
    size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @staticmethod
    def of(
        name: str,
        weight: Tensor,
        x: Tensor,
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
    ) -> tuple[Connection, tuple[int, int, int, int]]:
        """The connection that ``F.linear`` or ``F.conv2d`` makes, and what to pad by hand: an even kernel with padding='same'."""
        if name == "linear":
            return Connection(False, weight.shape[1]), (0, 0, 0, 0)
        kernel, dilation, by_hand = (weight.shape[2], weight.shape[3]), pair(dilation), (0, 0, 0, 0)
        size = (x.shape[-2], x.shape[-1])
        if padding == "valid":
            padding = 0
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            padding = (total[0] // 2, total[1] // 2)
            by_hand = (0, total[1] % 2, 0, total[0] % 2)
            size = (size[0] + total[0] % 2, size[1] + total[1] % 2)
        assert not isinstance(padding, str)
        return Connection(True, x.shape[1], kernel, size, pair(stride), pair(padding), dilation, groups), by_hand

    def size_behind(self, weight: Tensor) -> list[int]:
        """The height and width of what the convolution computes, none of a linear map."""
        return conv_size(self.size, weight, self.stride, self.padding, self.dilation) if self.convolution else []

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.convolution:
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return F.linear(x, weight, bias)

    def input_gradient(self, delta: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """The error below, through ``weight``: here B, in the layout of the layer's weight."""
        if self.convolution:
            return self._backward(delta, x, weight, 0)
        gradient: Tensor = delta @ weight
        return gradient

    def weight_gradient(self, delta: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if self.convolution:
            return self._backward(delta, x, weight, 1)
        gradient: Tensor = delta.flatten(0, -2).T @ x.flatten(0, -2)
        return gradient

    def _backward(self, delta: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
        mask = [which == 0, which == 1, False]
        grads = torch.ops.aten.convolution_backward(
            delta, x, weight, None, self.stride, self.padding, self.dilation, False, [0, 0], self.groups, mask
        )
        gradient: Tensor = grads[which]
        return gradient

    def patches(self, delta: Tensor) -> Tensor:
        """The patch of delta around each input position of a convolution, [n, outputs * kernel positions, height, width]."""
        n, outputs = delta.shape[:2]
        k = math.prod(self.kernel)
        one_hot = torch.eye(k, dtype=delta.dtype, device=delta.device).view(1, k, *self.kernel).repeat(outputs, 1, 1, 1)
        x = delta.new_empty(n, outputs * k, *self.size)
        spread = Connection(True, outputs * k, self.kernel, self.size, self.stride, self.padding, self.dilation, outputs)
        return spread._backward(delta, x, one_hot, 0)

    def samples(self, x: Tensor) -> Tensor:
        """What the layer reads, or its regressors, as rows: [samples, channels], of a convolution [groups, samples, channels / groups]."""
        if not self.convolution:
            return x.flatten(0, -2)
        return x.reshape(len(x), self.groups, x.shape[1] // self.groups, -1).permute(1, 0, 3, 2).flatten(1, 2)

    def matrix(self, B: Tensor) -> Tensor:
        if not self.convolution:
            return B
        return B.reshape(self.groups, -1, B.shape[1], math.prod(self.kernel)).transpose(1, 2).flatten(2)

    def unmatrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        if not self.convolution:
            return matrix
        return matrix.view(self.groups, shape[1], -1, *self.kernel).transpose(1, 2).reshape(shape)
