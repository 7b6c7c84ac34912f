"""Bias, activation, pooling and noise of activity and difference, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fbkernels.functional as fn
from fbkernels import _C, ops, reference
from fbkernels.ops._op import dense, maps

STEP = torch.tensor(5)
ACTIVATIONS = tuple(reference.ACTIVATIONS)
POOLS = ("none", "max", "avg")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the triton backend; its interpreter takes the CPU's tensors
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}  # twice that is half an ulp of 1 and more


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    x = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)


def window(draw: Any, size: tuple[int, int]) -> tuple[list[int], list[int], list[int]]:
    kernel = [draw(st.integers(1, min(n, 4))) for n in size]
    return kernel, [draw(st.integers(1, 3)) for _ in size], [draw(st.integers(0, k // 2)) for k in kernel]


@st.composite
def calls(draw: Any, low: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Arguments of perturbed_pointwise."""
    n, channels = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    maps = draw(st.booleans())
    size = (draw(st.integers(1, 7)), draw(st.integers(1, 7))) if maps else ()
    seed, dtype = draw(st.integers(0, 99)), draw(st.sampled_from([torch.float32, low]))
    rows, antithetic = draw(st.integers(0, n)), draw(st.booleans())
    z = images(n, channels, *size, seed=seed, dtype=dtype)
    if maps and draw(st.booleans()):
        z = z.contiguous(memory_format=torch.channels_last)
    scale = draw(st.sampled_from([2.0, 0.01]))
    dz = images(rows * (1 + antithetic), channels, *size, seed=seed + 1, dtype=dtype, scale=scale) if rows and draw(st.booleans()) else None
    kernel, stride, padding = window(draw, size) if maps else ([1, 1], [1, 1], [0, 0])
    return {
        "z": z,
        "dz": dz,
        "bias": images(channels, seed=seed + 2) if draw(st.booleans()) else None,
        "scale": images(channels, seed=seed + 3, scale=0.5) if draw(st.booleans()) else None,
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "pool": draw(st.sampled_from(POOLS)) if maps else "none",
        "pool_first": draw(st.booleans()),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "step": STEP,
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
        "point": draw(st.integers(0, 2**32 - 1)),
        "rows": rows,
        "std": 0.3,
        "kind": draw(st.sampled_from(["gaussian", "rademacher"])),
        "antithetic": antithetic,
        "offset": draw(st.integers(0, 2**40)),
    }


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def tolerance(call: dict[str, Any]) -> float:
    """float32 arithmetic, and one rounding to the dtype, of values of the size of scale (z + dz) + bias + noise.

    Within are: the products with the scale and the sums with the bias and dz 1/2 ulp each,
    an activation 2 ulp (erf 4 times |z| / 2), the average of up to 16 one each, the noise 4.
    """
    largest = sum(float(t.double().abs().max()) for t in (call["z"], call["dz"]) if t is not None and t.numel())
    largest *= 1 if call["scale"] is None else max(1.0, float(call["scale"].abs().max()))
    largest += 0 if call["bias"] is None else float(call["bias"].abs().max())
    return (2 * EPS[call["z"].dtype] + 2 * (1 + 4 + 16 + 4) * EPS[torch.float32]) * max(1.0, largest + 5.8 * call["std"])


def check(call: dict[str, Any], backend: str) -> None:
    device = DEVICE if backend in ("triton", "cuda") else "cpu"
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.items()}
    h, d, kept, winner = (t.cpu() for t in ops.perturbed_pointwise(**given, backend=backend)[:4])
    expected = ops.perturbed_pointwise(**{k: double(v) for k, v in call.items()}, backend="reference")[:4]
    atol = tolerance(call)
    if kept.numel() and call["pool"] == "max" and not call["pool_first"]:  # gelu is 0 to rounding in many places
        torch.testing.assert_close(F.gelu(kept.double()), expected[0], rtol=0, atol=1.13 * atol)
        kept, expected = kept.new_empty(0), (*expected[:2], kept.new_empty(0), expected[3])
    for got, want, bound in ((h, expected[0], atol), (d, expected[1], 2 * atol), (kept, expected[2], atol)):
        assert (got.shape, got.dtype) == (want.shape, call["z"].dtype)
        torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=bound)
    if call["dz"] is None and call["rows"]:  # nothing but noise, of which no digit is lost to the activity
        torch.testing.assert_close(
            d.double(), expected[1].double(), rtol=2 * EPS[call["z"].dtype], atol=30 * EPS[torch.float32] * call["std"]
        )
    assert winner.shape == expected[3].shape
    if call["pool"] == "max":
        # a winner is right if what stands at its place is the maximum: rounding makes ties that float64 has not
        z, window = call["z"].double(), (call["kernel_size"], call["stride"], call["padding"])
        z = z if call["scale"] is None else z * call["scale"].double().view(-1, 1, 1)
        z = z if call["bias"] is None else z + call["bias"].double().view(-1, 1, 1)
        inner = reference.ACTIVATIONS[call["activation"]] if call["activation"] == "gelu" and not call["pool_first"] else torch.clone
        for i in range(h.shape[2]):
            for j in range(h.shape[3]):
                y = i * window[1][0] - window[2][0] + winner[:, :, i, j].long() // window[0][1]
                x = j * window[1][1] - window[2][1] + winner[:, :, i, j].long() % window[0][1]
                won = z.flatten(2).gather(2, (y * z.shape[3] + x)[..., None])[..., 0]
                best = F.max_pool2d(inner(z), *window)[:, :, i, j]
                torch.testing.assert_close(inner(won), best, rtol=0, atol=atol)
    assert all(t.ndim != 4 or t.is_contiguous(memory_format=torch.channels_last) for t in (h, d, winner))


@given(calls(), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_instruction_set_and_thread_count(call: dict[str, Any], threads: int) -> None:
    results = []
    for simd in _C.simd_paths():
        for t in (1, threads):
            out = [torch.full_like(x, 7) for x in ops.perturbed_pointwise(**call)[:4]]
            z, dz = (None if x is None else maps(dense(x)) for x in (call["z"], call["dz"]))
            given = [maps(x) if x.numel() else None for x in out]
            sizes = (*call["kernel_size"], *call["stride"], *call["padding"])
            names = ("step", "seed", "point", "std", "kind", "rows", "antithetic", "offset")
            key = [call[k] for k in names]
            _C.perturbed_pointwise(
                z, dz, call["scale"], call["bias"], *given, call["activation"], call["pool"], call["pool_first"], sizes, *key, t, simd
            )
            results.append(out)
    for i in range(0, len(results), 2):
        assert all(torch.equal(a, b) for a, b in zip(results[i], results[i + 1], strict=True)), "depends on the thread count"
    tied = call["pool"] == "max" and call["activation"] == "gelu"  # two z can have one gelu to rounding, and either may win
    values = [(h, d, F.gelu(kept.double()) if tied else kept) for h, d, kept, _ in results[::2]]
    for out in values[1:]:
        for a, b in zip(out, values[0], strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=2 * tolerance(call))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_as_good_as_those_of_torch(name: str) -> None:
    z = torch.cat((torch.linspace(-12, 12, 200_001), torch.linspace(-0.7, 0.7, 200_001), torch.tensor([0.0, 1e-30, -1e-30, 88.0, -88.0])))
    h = ops.perturbed_pointwise(z[None], None, None, name, "none", False, [1, 1], [1, 1], [0, 0], STEP, 1, 0, 0, 0.1, "gaussian")[0][0]
    phi = reference.ACTIVATIONS[name]
    exact, theirs = phi(z.double()), phi(z)
    ulp = 2.0 ** (exact.abs().clamp_min(2.0**-126).log2().floor() - 23)
    error = ((h - exact).abs() / ulp).max() if name != "gelu" else (h - exact).abs().max()
    limit = ((theirs - exact).abs() / ulp).max() if name != "gelu" else (theirs - exact).abs().max()
    assert error <= 2 * limit + 0.5  # half an ulp is what a float32 cannot avoid


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_not_a_number_and_infinity_go_through(name: str) -> None:
    # torch's own gelu makes a nan of infinity
    z = torch.tensor([float("nan"), 7.0, -0.0, -2.0] * 9 if name == "gelu" else [float("nan"), float("inf"), -float("inf"), -0.0] * 9)
    h = ops.perturbed_pointwise(z[None], None, None, name, "none", False, [1, 1], [1, 1], [0, 0], STEP, 1, 0, 0, 0.1, "gaussian")[0][0]
    torch.testing.assert_close(h, reference.ACTIVATIONS[name](z), equal_nan=True)
    maps = z.view(1, 1, 6, 6)
    pooled = ops.perturbed_pointwise(maps, None, None, name, "max", False, [3, 3], [2, 2], [1, 1], STEP, 1, 0, 0, 0.1, "gaussian")[0]
    torch.testing.assert_close(pooled, F.max_pool2d(reference.ACTIVATIONS[name](maps), 3, 2, 1), equal_nan=True)


@st.composite
def unpoolings(draw: Any) -> tuple[Tensor, Tensor, list[int], tuple[list[int], list[int], list[int]]]:
    size = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    kernel, stride, padding = window(draw, size)
    z = images(draw(st.integers(1, 3)), draw(st.integers(1, 40)), *size, seed=draw(st.integers(0, 99)))
    h, _, _, winner, *_ = ops.perturbed_pointwise(
        z, None, None, "identity", "max", True, kernel, stride, padding, STEP, 1, 0, 0, 0.1, "gaussian"
    )
    return torch.randn_like(h), winner, list(size), (kernel, stride, padding)


def check_unpool(case: tuple[Tensor, Tensor, list[int], tuple[list[int], list[int], list[int]]], backend: str) -> None:
    delta, winner, size, window = case
    device = "cpu" if backend == "cpp" else DEVICE
    expected = ops.unpool(delta.double(), winner, size, *window, backend="reference")
    got = ops.unpool(delta.to(device), winner.to(device), size, *window, backend=backend).cpu()
    # a place can win in 16 windows at most: kernel 4, stride 1
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=16 * 2 * 5 * EPS[torch.float32])
    for simd in _C.simd_paths():
        out = dense(torch.full((*delta.shape[:2], *size), 7.0))
        _C.unpool(maps(dense(delta)), maps(winner), maps(out), (*window[0], *window[1], *window[2]), 2, simd)
        torch.testing.assert_close(out, expected.float(), rtol=0, atol=16 * 2 * 5 * EPS[torch.float32])


LOW = {"cpp": torch.bfloat16, "triton": torch.float16, "cuda": torch.float32}  # Triton's interpreter truncates to bfloat16
CASES = {
    "perturbed_pointwise": (lambda backend: calls(LOW[backend]), check),
    "unpool": (lambda _: unpoolings(), check_unpool),
}


def test_unpool_is_the_gradient_of_pooling() -> None:
    z = images(3, 5, 9, 8).requires_grad_()
    pooled = F.max_pool2d(z, 3, 2, 1)
    delta = torch.randn_like(pooled)
    (expected,) = torch.autograd.grad(pooled, z, delta)
    winner = ops.perturbed_pointwise(
        z.detach(), None, None, "identity", "max", True, [3, 3], [2, 2], [1, 1], STEP, 1, 0, 0, 0.1, "gaussian"
    )[3]
    torch.testing.assert_close(ops.unpool(delta, winner, [9, 8], [3, 3], [2, 2], [1, 1]), expected)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("pool", POOLS)
def test_the_ops(pool: str, activation: str, backend: str) -> None:
    device = DEVICE if backend in ("triton", "cuda") else "cpu"
    z, bias, step = images(3, 5, 8, 7).to(device, memory_format=torch.channels_last), images(5).to(device), STEP.to(device)
    window = ([3, 2], [2, 2], [1, 0])
    args = (z, z[:2], bias, activation, pool, False, *window, step, 1, 2, 2, 0.1, "rademacher")
    torch.library.opcheck(torch.ops.fbkernels.perturbed_pointwise.default, args, {"backend": backend})
    if pool == "max":
        h, _, _, winner, *_ = ops.perturbed_pointwise(*args)
        if backend == "triton":
            with pytest.raises(RuntimeError, match="has no kernel for unpool"):
                ops.unpool(h, winner, [8, 7], *window, backend=backend)
        else:
            torch.library.opcheck(torch.ops.fbkernels.unpool.default, (h, winner, [8, 7], *window), {"backend": backend})
    R = torch.ones(3, 4, device=device)
    update = {"B": torch.zeros(ops.perturbed_pointwise(*args)[0][0].numel(), 4, device=device), "R": R, "Q": R, "w": R[:, 0]}
    update |= {"learned_step": step, "predicts": True}
    if pool == "max":
        torch.library.opcheck(torch.ops.fbkernels.perturbed_pointwise.default, args, {"backend": backend, **update})
    args = (z[:, :, 0, 0], None, None, activation, "none", False, [1, 1], [1, 1], [0, 0], step, 1, 2, 0, 0.1, "gaussian")
    torch.library.opcheck(torch.ops.fbkernels.perturbed_pointwise.default, args, {"backend": backend})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(3, 4, 5)}, "z must be .* got shape"),
        ({"z": torch.zeros(3, 4)}, "without pooling"),
        ({"activation": "softplus"}, "activation must be one of"),
        ({"pool": "min"}, "pool must be one of"),
        ({"kernel_size": [9, 3]}, "kernel_size must not be larger"),
        ({"kernel_size": [0, 3]}, "must be >= 1"),
        ({"stride": [1, 0]}, "stride must be"),
        ({"padding": [2, 1]}, "padding must be"),
        ({"rows": 4}, "rows must be an integer in"),
        ({"rows": -1}, "rows must be an integer in"),
        ({"dz": torch.zeros(2, 4, 5, 5)}, "dz must have shape"),
        ({"bias": torch.zeros(3)}, "bias must have shape"),
        ({"std": -1.0}, "std must be"),
        ({"kind": "uniform"}, "kind must be one of"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "z": torch.zeros(3, 4, 5, 5),
        "dz": None,
        "bias": None,
        "activation": "relu",
        "pool": "max",
        "pool_first": False,
    }
    good |= {"kernel_size": [3, 3], "stride": [2, 2], "padding": [1, 1], "step": STEP, "seed": 1, "point": 2, "rows": 3, "std": 0.1}
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.perturbed_pointwise(**(good | {"kind": "gaussian"} | change))


def test_functional() -> None:
    z, dz, bias = images(3, 5, 8, 7), images(2, 5, 8, 7, seed=1, scale=0.1), images(5, seed=2)
    key: dict[str, Any] = {"seed": 2**63 + 1, "step": 9, "point": 2, "std": 0.2}
    out = fn.perturbed_pointwise(z, dz, **key, rows=2, bias=bias, activation="tanh", pool="max", kernel_size=(3, 3), stride=(2, 2))
    act = lambda t: F.max_pool2d(torch.tanh(t + bias.view(-1, 1, 1)), 3, 2)  # noqa: E731
    xi = fn.noise(**{k: key[k] for k in ("seed", "step", "point")}, samples=2, units=45, std=0.2)
    torch.testing.assert_close(out.h, act(z), rtol=0, atol=4 * 2.0**-23)
    torch.testing.assert_close(out.d, act(z[:2] + dz) - act(z[:2]) + reference.layout(xi, (2, 5, 3, 3)), rtol=0, atol=8 * 2.0**-23)
    assert [t.numel() for t in (out.kept, out.B, out.prediction)] == [0, 0, 0]
    B, G = images(45, 3), images(2, 3, seed=4)
    updated = fn.perturbed_pointwise(
        z,
        dz,
        **key,
        rows=2,
        bias=bias,
        activation="tanh",
        pool="max",
        kernel_size=(3, 3),
        stride=(2, 2),
        update=fn.Update(B, None, G, 8, True),
    )
    new = fn.feedback_update(B, None, G, **(key | {"step": 8}))
    assert torch.equal(updated.d, out.d)
    torch.testing.assert_close(updated.B, new)
    torch.testing.assert_close(updated.prediction, xi @ new, rtol=0, atol=45**0.5 * 2.0**-22)
    with pytest.raises(ValueError, match="seed must be an integer"):
        fn.perturbed_pointwise(z, dz, **(key | {"seed": -1}))
    with pytest.raises(RuntimeError, match=r"backend 'cuda' (is not compiled|is compiled in, but|cannot take tensors on cpu)"):
        fn.perturbed_pointwise(z, dz, **key, backend="cuda")
