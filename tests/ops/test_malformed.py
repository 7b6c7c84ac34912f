"""10,000 malformed calls into the compiled part, 2,500 into its CUDA side: each ends in an exception or in a result, never in a crash.

Run as a script it makes the calls; the test runs it in a process of its own, so that a crash is a status and not the end of the tests.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

CALLS = 10_000
ALLOWED = (ValueError, TypeError, RuntimeError, OverflowError, IndexError)
STEP = torch.tensor(3)


def perturbed_pointwise() -> dict[str, Any]:
    z, h = torch.randn(3, 6, 5, 7), torch.empty(3, 3, 3, 7)
    noise = {"step": STEP, "seed": 1, "point": 2, "std": 0.1, "kind": "gaussian", "rows": 2, "antithetic": False, "offset": 0}
    out = {"h": h, "d": torch.empty(2, 3, 3, 7), "kept": torch.empty_like(h), "winner": torch.empty_like(h, dtype=torch.uint8)}
    how = {"activation": "gelu", "pool": "max", "pool_first": False, "sizes": (3, 3, 2, 2, 1, 1)}
    return {
        "z": z,
        "dz": torch.randn(2, 6, 5, 7),
        "scale": torch.randn(7),
        "bias": torch.randn(7),
        **out,
        **how,
        **noise,
        "threads": 2,
        "simd": "",
    }


def perturbed_linear() -> dict[str, Any]:
    noise = {"step": STEP, "seed": 1, "point": 2, "std": 0.1, "kind": "gaussian", "rows": 2, "antithetic": False, "offset": 0}
    out = {"h": torch.empty(3, 7), "d": torch.empty(2, 7), "kept": torch.empty(3, 7)}
    layer = {"x": torch.randn(3, 6), "dx": torch.randn(2, 6), "weight": torch.randn(7, 6), "bias": torch.randn(7)}
    return {**layer, **out, "activation": "gelu", **noise}


def unpool() -> dict[str, Any]:
    delta, out = torch.randn(3, 3, 3, 7), torch.empty(3, 6, 5, 7)
    winner = torch.randint(0, 256, delta.shape, dtype=torch.uint8)  # most of them lie nowhere
    return {"delta": delta, "winner": winner, "out": out, "sizes": (3, 3, 2, 2, 1, 1), "threads": 2, "simd": ""}


def pooled_weight_gradient() -> dict[str, Any]:
    delta = torch.randn(3, 3, 3, 7)  # of maps [6, 5], behind a 3x3 kernel over 4 channels
    winner = torch.full(delta.shape, 4, dtype=torch.uint8)
    out = {"weight_gradient": torch.empty(7, 4, 3, 3), "bias_gradient": torch.empty(7)}
    where = {"geometry": (1, 1, 1, 1, 1, 1), "sizes": (3, 3, 2, 2, 1, 1), "threads": 2, "simd": ""}
    return {"delta": delta, "winner": winner, "x": torch.randn(3, 6, 5, 4), **out, **where}


def feedback_update(parts: int = 2) -> dict[str, Any]:
    G = torch.randn(4, 6)
    key = {"step": STEP, "predicted_step": STEP, "seed": 1, "point": 2, "std": 0.1, "kind": "rademacher", "offset": 0}
    given = {"M": torch.randn(6, 6), "G": G, "R": None, "Q": None, "w": None, "prediction": torch.empty(parts, 5, 6)}
    return {"B": torch.randn(9, 6), "out": torch.empty(9, 6), **given, **key, "threads": 2, "simd": ""}


def feedback() -> dict[str, Any]:
    tensors = {"e": torch.randn(3, 6), "B": torch.randn(9, 6), "kept": torch.randn(3, 9), "delta": torch.empty(3, 9)}
    return {**tensors, "activation": "tanh", "threads": 2, "simd": ""}


def ridge_gain() -> dict[str, Any]:
    def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.eye(*shape, dtype=dtype) if shape == (5, 5) else torch.ones(shape, dtype=dtype)

    double = {"V": t(5, 5, dtype=torch.float64), "V_out": t(5, 5, dtype=torch.float64), "scratch": t(22, 5, dtype=torch.float64)}
    return {"R": t(4, 5), "w": t(4), **double, "Q": t(4, 5), "M": t(5, 5), "G": t(4, 5), "gamma": 0.1, "forgetting": 0.9, "simd": ""}


def fused_mlp() -> dict[str, Any]:
    def shaped(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [0.1 * torch.ones(s, dtype=dtype) for s in shapes]

    sizes = (6, 5, 4, 3)
    weights = [(5, 6), (4, 5), (3, 4)]
    how = {"activations": ["tanh", "gelu", "identity"], "loss": "cross_entropy", "layerwise": True, "rule": "ridge", "rule_rate": 0.1}
    how |= {
        "forgetting": 1.0,
        "downdate": False,
        "optimizer": "adam",
        "lr": 0.1,
        "noise_std": 0.1,
        "noise": "gaussian",
        "seed": 1,
        "warmup": 0,
    }
    net = {"weights": shaped(*weights), "biases": shaped((5,), (4,), (3,)), "B": shaped((5, 4), (4, 3))}
    net |= {"weight_state": shaped(*[(2, *s) for s in weights]), "bias_state": shaped((2, 5), (2, 4), (2, 3))}
    net |= {"statistics": [torch.eye(4, dtype=torch.float64), torch.eye(3, dtype=torch.float64)]}
    data = {
        "x": torch.ones(9, 6),
        "y": torch.arange(9) % 3,
        "rows": torch.arange(8).view(2, 4),
        "losses": torch.empty(2, dtype=torch.float64),
    }
    return {
        "sizes": sizes,
        **how,
        **net,
        **data,
        "counters": torch.zeros(3, dtype=torch.int64),
        "scratch": torch.empty(0, dtype=torch.uint8),
        "threads": 2,
        "blocks": 0,
        "simd": "",
    }


def perturbed_cross_entropy() -> dict[str, Any]:
    double = {"logits": torch.randn(4, 5).double(), "perturbed": torch.randn(6, 5).double()}
    out = {"losses": torch.empty(4), "e": torch.empty(4, 5), "dL": torch.empty(3), "dy": torch.empty(3, 5), "ok": torch.empty(3) > 0}
    return {**double, "target": torch.tensor([0, 4, -100, 2]), "antithetic": True, "scale": 0.5, **out, "threads": 2}


def mirror(gpu: bool = False) -> dict[str, Any]:
    B, W, out = ([f(7, 9), f(3, 9)] for f in (torch.randn, torch.randn, torch.empty))
    key = {"step": STEP, "seed": 1, "points": [2, 2], "samples": 70, "kind": "gaussian", "offset": 0, "threads": 2, "simd": ""}
    return {"B": B, "W": W, "out": out, "residual": torch.empty(2), "scratch": torch.empty(10 * 70 + 2 * 2 * 2) if gpu else None, **key}


def noise() -> dict[str, Any]:
    key = {"step": STEP, "seed": 1, "point": 2, "std": 0.1, "kind": "gaussian", "offset": 0}
    return {"out": torch.empty(3, 9), **key, "threads": 2, "simd": ""}


GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "noise": noise,
    "philox": lambda: {"counter": [1, 2, 3, 4], "key": [5, 6]},
    "perturbed_pointwise": perturbed_pointwise,
    "unpool": unpool,
    "pooled_weight_gradient": pooled_weight_gradient,
    "feedback_update": feedback_update,
    "feedback": feedback,
    "perturbed_cross_entropy": perturbed_cross_entropy,
    "mirror": mirror,
    "fused_mlp": fused_mlp,
    "ridge_gain": ridge_gain,
    "shuffle": lambda: {"out": torch.empty(9, dtype=torch.int64), "seed": 1, "epoch": 2},
}
# on a GPU, whose fused_mlp leaves it to the caller that rows and classes are within bounds
ON_GPU = {name: GOOD[name] for name in ("noise", "perturbed_pointwise", "unpool", "feedback", "ridge_gain")}
ON_GPU |= {"perturbed_linear": perturbed_linear, "feedback_update": lambda: feedback_update(parts=1), "mirror": lambda: mirror(gpu=True)}
HARMLESS = {"build_info", "simd_paths"}  # take no arguments
NUMBERS = (0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, -(2**63), 2**63 - 1, 2**63, 2**64, 0.5, -0.0, 1e39, float("nan"), float("inf"), True)
OTHERS = (None, "", "gaussian", "max", "avx512", "\0", "x" * 1000, [], (), {}, object(), torch, b"bytes", 1j)


def tensor(rng: random.Random, like: Any) -> Tensor:
    """A tensor that is wrong in some way, often only slightly."""
    shape = list(like.shape) if isinstance(like, Tensor) else []
    if rng.random() < 0.5 and shape:
        shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 3, 17))
    elif rng.random() < 0.3:
        shape = [rng.choice((0, 1, 2, 3, 5)) for _ in range(rng.randrange(6))]
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool, torch.complex64)
    dtype = like.dtype if isinstance(like, Tensor) and rng.random() < 0.7 else rng.choice(dtypes)
    if rng.random() < 0.05:
        return torch.empty(shape, dtype=dtype, device="meta")
    t = torch.full(shape, rng.choice((0, 1, 3, 200)), dtype=torch.float64).to(dtype)
    how = rng.randrange(9)
    if how == 0 and t.ndim > 1:
        return t.transpose(0, -1)
    if how == 1:
        return t.expand(2, *t.shape)
    if how == 2 and t.ndim and t.shape[-1] > 1:
        return t[..., ::2]
    if how == 3 and t.is_floating_point():
        return t.fill_(float("nan"))
    if how == 4 and t.is_floating_point():
        return t.requires_grad_()
    if how == 5 and t.ndim == 2 and dtype != torch.bool:
        return t.to_sparse()
    return t


def value(rng: random.Random, old: Any) -> Any:
    if isinstance(old, (list, tuple)) and old and isinstance(old[0], Tensor):
        return [value(rng, t) if rng.random() < 0.4 else t for t in old][: rng.choice((None, None, 1))]
    if isinstance(old, (list, tuple)) and rng.random() < 0.7:
        new = [rng.choice(NUMBERS) if rng.random() < 0.4 else x for x in old]
        return new if rng.random() < 0.8 else new[: rng.randrange(len(new) + 1)] * rng.randrange(3)
    if isinstance(old, Tensor) or rng.random() < 0.2:
        return tensor(rng, old)
    return rng.choice(NUMBERS) if rng.random() < 0.6 else rng.choice(OTHERS)


def main(seed: int, emulated: bool) -> None:
    if emulated:
        from emulated import compiled

        _C, good = compiled(), ON_GPU
    else:
        from fbkernels import _C

        good = GOOD
    rng, names, refused = random.Random(seed), sorted(good), 0
    assert {*GOOD, *ON_GPU, *HARMLESS} == {n for n in dir(_C) if not n.startswith("_")}, "a function without malformed calls"
    for name in names:
        getattr(_C, name)(**good[name]())  # the good call is good
    for call in range(CALLS // 4 if emulated else CALLS):
        name = names[call % len(names)]
        arguments = good[name]()
        for key in rng.sample(sorted(arguments), min(len(arguments), rng.choice((1, 1, 1, 2, 3)))):
            arguments[key] = value(rng, arguments[key])
        if rng.random() < 0.02:
            arguments.pop(rng.choice(sorted(arguments)))
        try:
            getattr(_C, name)(**arguments)
        except ALLOWED:
            refused += 1
    print(refused / (call + 1))


if __name__ == "__main__":
    main(int(sys.argv[1]), "emulated" in sys.argv)


@pytest.mark.parametrize("where", ["cpu", "emulated"])
def test_malformed_calls_never_crash(where: str) -> None:
    command = [sys.executable, "-P", "-X", "faulthandler", __file__, "1", where]
    path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert float(run.stdout) > 1 / 2  # most of them are malformed indeed
