"""Each kernel once, against the reference in float64: what ``bench/gpu.sh correct`` runs first, a process a kernel.

Where no GPU is, Triton's kernels run in its interpreter and CUDA's emulated, at their smallest size.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import emulated
import pytest
import torch
from gpu import KERNELS
from poison import poisoned
from torch import Tensor

import fbkernels as fb

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
STEP = torch.tensor(7, device=DEVICE)
KEY: dict[str, Any] = {"seed": 2**63 + 11, "step": STEP, "point": 3, "std": 0.3}
F = fb.functional
Outputs = dict[str, Tensor]
Call = Callable[[str, torch.dtype], Outputs]  # of a backend, in a dtype


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Numbers that bfloat16 can hold, so that all dtypes compute with the same."""
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).bfloat16().float().to(DEVICE)


def at_least(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """What a rule knows, in float32 beside a network in bfloat16."""
    return [t.to(torch.promote_types(dtype, torch.float32)) for t in tensors]


def noise(samples: int, units: int, kind: str, offset: int) -> Call:
    def call(backend: str, dtype: torch.dtype) -> Outputs:
        key = (STEP, KEY["seed"] - 2**64, KEY["point"], samples, units, KEY["std"], kind)
        return {"noise": torch.ops.fbkernels.philox_noise(*key, offset=offset, dtype=dtype, backend=backend)}

    return call


def learning(form: str, units: int, m: int, rows: int, dtype: torch.dtype) -> F.Update:
    """B's update as it rides in a layer's launch: by M and G, or by the factors of M; with the prediction."""
    B, M, R, Q, w = at_least(
        dtype, normal(units, m), normal(m, m, seed=1, scale=0.1), normal(rows, m), normal(rows, m, scale=0.1), normal(rows)
    )
    return F.Update(B, (R, Q), w, STEP - 1, True) if form == "factors" else F.Update(B, M, Q, STEP - 1, True)


def activities(out: F.Perturbed) -> Outputs:
    named = {"h": out.h, "d": out.d, "kept": out.kept, "B": out.B, "prediction": out.prediction}
    return {name: t for name, t in named.items() if t.numel()}


def layer(what: str, shape: tuple[int, ...], weight: tuple[int, ...], samples: int, m: int, form: str, first: bool, **options: Any) -> Call:
    def call(backend: str, dtype: torch.dtype) -> Outputs:
        rows = options.get("rows", samples) * (2 if options.get("antithetic") else 1)
        x, W, b = normal(samples, *shape).to(dtype), normal(*weight, seed=1, scale=0.1).to(dtype), normal(weight[0], seed=2).to(dtype)
        p = None if first else normal(rows, *shape, seed=3).to(dtype)
        given: dict[str, Any] = {}
        units = weight[0]
        if what == "conv2d":
            given = {"stride": (2, 1), "padding": (1, 1), "groups": shape[0] // weight[1]}
            units *= ((shape[1] + 2 - weight[2]) // 2 + 1) * (shape[2] + 2 - weight[3] + 1)
        update = learning(form, units, m, samples, dtype)
        run = getattr(F, f"perturbed_{what}")
        return activities(run(x, p, W, b, **given, **KEY, **options, update=update, backend=backend))

    return call


def pointwise(shape: tuple[int, ...], samples: int, m: int, form: str, first: bool, pool: str, **options: Any) -> Call:
    def call(backend: str, dtype: torch.dtype) -> Outputs:
        rows = options.get("rows", samples) * (2 if options.get("antithetic") else 1)
        z, q = normal(samples, *shape).to(dtype), None if first else normal(rows, *shape, seed=3).to(dtype)
        scale, bias = at_least(dtype, normal(shape[0], seed=4), normal(shape[0], seed=5))
        window = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}
        behind = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape[1:], *window.values(), strict=True)]
        update = learning(form, shape[0] * behind[0] * behind[1], m, samples, dtype)
        out = F.perturbed_pointwise(z, q, **KEY, scale=scale, bias=bias, pool=pool, **window, **options, update=update, backend=backend)
        return activities(out)

    return call


def feedback(shape: tuple[int, ...], samples: int, m: int, activation: str, pooled: bool) -> Call:
    def call(backend: str, dtype: torch.dtype) -> Outputs:
        kept = normal(samples, *shape, scale=0.5).to(dtype)
        e, B = at_least(dtype, normal(samples, m, seed=1), normal(kept[0].numel(), m, seed=2))
        window: dict[str, Any] = {}
        if pooled:  # of windows of 2 x 3, any place may have won
            winner = torch.randint(6, kept.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.uint8)
            size = (shape[1] + 1, 2 * shape[2] + 1)
            window = {"winner": winner, "size": size, "kernel_size": (2, 3), "stride": (1, 2)}
        return {"delta": F.feedback(e, B, kept, activation, **window, backend=backend)}

    return call


def update(units: int, m: int, rows: int, form: str, kind: str) -> Call:
    def call(backend: str, dtype: torch.dtype) -> Outputs:
        given = learning(form, units, m, rows, dtype)
        assert given.G is not None
        return {"B": F.feedback_update(given.B, given.M, given.G, **KEY, kind=kind, backend=backend)}

    return call


def gain(samples: int, m: int, forgetting: float) -> Call:
    def call(backend: str, dtype: torch.dtype) -> Outputs:
        R, w = at_least(dtype, normal(samples, m), normal(samples))
        V = 0.1 * torch.eye(m, dtype=torch.float64, device=DEVICE)
        return F.ridge_gain(R, w, V, 0.1, forgetting, backend=backend)._asdict()

    return call


def loss(samples: int, classes: int, rows: int, antithetic: bool) -> Call:
    def call(backend: str, dtype: torch.dtype) -> Outputs:
        logits = normal(samples, classes).to(dtype)
        perturbed = torch.cat([logits[:rows]] * (1 + antithetic)) + normal(rows * (1 + antithetic), classes, seed=1, scale=0.25).to(dtype)
        target = torch.arange(samples, device=DEVICE) % classes
        target[0] = -100
        out = F.perturbed_cross_entropy(logits, perturbed, target, antithetic, scale=torch.tensor(0.5, device=DEVICE), backend=backend)
        return {name: t for name, t in out._asdict().items() if name != "ok"}

    return call


# smallest first: that one alone runs where no GPU is
CALLS: dict[str, list[Call]] = {
    "noise": [
        noise(samples, units, kind, offset)
        for samples, units, offset in ((3, 5, 2**33 - 1), (301, 1027, 0))
        for kind in ("gaussian", "rademacher")
    ],
    "pointwise": [
        pointwise((5, 7, 6), 4, 7, "M", False, "max", activation="gelu", antithetic=True, rows=3),
        pointwise((33, 13, 9), 17, 10, "factors", True, "avg", activation="tanh", kind="rademacher"),
    ],
    "linear": [
        layer("linear", (63,), (37, 63), 5, 7, "M", False, activation="gelu", antithetic=True, rows=3),
        layer("linear", (301,), (131, 301), 67, 100, "factors", True, activation="relu", kind="rademacher"),
    ],
    "conv2d": [
        layer("conv2d", (6, 7, 5), (10, 3, 3, 2), 3, 7, "M", False, activation="gelu", antithetic=True, rows=2),
        layer("conv2d", (33, 13, 9), (67, 33, 3, 3), 17, 10, "factors", True, activation="tanh", kind="rademacher"),
    ],
    "feedback": [
        feedback((5, 3, 4), 3, 7, "gelu", True),
        feedback((131,), 67, 100, "relu", False),
        feedback((17, 6, 5), 33, 77, "tanh", True),
    ],
    "update": [update(37, 7, 5, "M", "gaussian"), update(3001, 77, 33, "factors", "gaussian"), update(3001, 100, 67, "M", "rademacher")],
    "gain": [gain(9, 7, 0.99), gain(33, 100, 0.99), gain(64, 300, 1.0)],
    "loss": [loss(9, 10, 5, True), loss(67, 1001, 67, False)],
}


@pytest.fixture
def strict() -> Iterator[None]:
    """Products of float32 in float32."""
    products = torch.backends.cuda.matmul, torch.backends.cudnn
    tf32 = [p.allow_tf32 for p in products]
    for p in products:
        p.allow_tf32 = False
    yield
    for p, allow in zip(products, tf32, strict=True):
        p.allow_tf32 = allow


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(("backend", "kernel"), [pair for b, names in KERNELS.items() for pair in itertools.product([b], names)])
def test_kernel(backend: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No further from float64 than twice torch in the same dtype; where torch rounds once, than sixteen roundings of float32."""
    dtypes = [torch.float32] if backend == "cuda" or not ON_GPU else [torch.float32, torch.bfloat16]  # all that each takes
    with emulated.backend() if backend == "cuda" else contextlib.nullcontext():
        for call, dtype in itertools.product(CALLS[kernel] if ON_GPU else CALLS[kernel][:1], dtypes):
            exact, theirs = call("reference", torch.float64), call("reference", dtype)
            for candidate in range(3 if kernel in ("linear", "conv2d") and ON_GPU else 1):  # tiles, and the library's product
                with monkeypatch.context() as patch:
                    pick = lambda name, key, candidates, run, i=candidate: candidates[min(i, len(candidates) - 1)]  # noqa: E731
                    patch.setattr("fbkernels.ops.tuning.fastest", pick)
                    # what is not written is not-a-number, and nothing is written beside it; there is no such bool
                    with contextlib.nullcontext() if kernel == "loss" else poisoned():
                        ours = call(backend, dtype)
                assert ours.keys() == exact.keys()
                for name, want in exact.items():
                    error, limit = (float((t[name].double() - want).norm() / want.norm()) for t in (ours, theirs))
                    assert error <= 2 * limit + 2.0**-20, (
                        f"{name}: {error:.1e} from float64, torch {limit:.1e}; {dtype}, candidate {candidate}"
                    )


@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("rule", [fb.Ridge(), fb.Joint(signal="output")], ids=["ridge", "joint"])
def test_a_replayed_step_is_the_eager_one(rule: fb.Rule, dtype: torch.dtype) -> None:
    """A linear network, whose kernels are compiled in seconds; test_gpu.py has a convolutional one."""
    x, y = torch.randn(6, 64, 50, device="cuda"), torch.randint(10, (6, 64), device="cuda")

    def training() -> tuple[torch.nn.Module, Callable[[Tensor, Tensor], Tensor]]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(50, 70), torch.nn.ReLU(), torch.nn.Linear(70, 33), torch.nn.ReLU(), torch.nn.Linear(33, 10)
        )
        net = fb.convert(model.cuda(), rule=copy.deepcopy(rule), noise_std=0.1)
        criterion, optimizer = fb.PerturbedLoss(torch.nn.CrossEntropyLoss(), net), torch.optim.SGD(net.parameters(), 0.1)

        def step(x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
                loss = criterion(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return net, step

    (eager, theirs), (net, ours) = training(), training()
    expected = [theirs(x[i], y[i]) for i in range(6)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        losses = [ours(x[i], y[i]) for i in range(3)]
    torch.cuda.current_stream().wait_stream(side)
    static, graph = (x[3].clone(), y[3].clone()), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = ours(*static)
    for i in range(3, 6):
        static[0].copy_(x[i]), static[1].copy_(y[i])
        graph.replay()
        losses.append(loss.clone())
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    state = net.state_dict()
    assert [key for key, want in eager.state_dict().items() if not torch.equal(state[key], want)] == []
