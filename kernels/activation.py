"""phi and phi' of SPEC 1 in registers; tests/ops/test_perturbed_pointwise.py measures them against float64."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    # no libdevice: Triton's interpreter has none
    s = x * x
    small = s * -0.00570498872745 + 0.0206390887954
    small = s * small - 0.0537397155531
    small = s * small + 0.133314422036
    small = s * small - 0.333332819422
    small = x * s * small + x
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) >= 0.625, tl.where(x < 0.0, -large, large), small)


@triton.jit
def phi(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "tanh":
        z = tanh(z)
    elif ACTIVATION == "sigmoid":
        z = 1.0 / (1.0 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    return z


@triton.jit
def derivative(kept, ACTIVATION: tl.constexpr):
    # from h = phi(z), of gelu from z
    if ACTIVATION == "relu":
        slope = tl.where(kept > 0.0, 1.0, 0.0)
    elif ACTIVATION == "tanh":
        slope = 1.0 - kept * kept
    elif ACTIVATION == "sigmoid":
        slope = kept * (1.0 - kept)
    elif ACTIVATION == "gelu":
        slope = 0.5 * (1.0 + tl.erf(kept * 0.7071067811865476)) + kept * 0.3989422804014327 * tl.exp(-0.5 * kept * kept)
    else:
        slope = tl.full(kept.shape, 1.0, tl.float32)
    return slope
