"""The GPU's table: ``pytest bench/bench_triton.py --benchmark-json=FILE`` on a machine with one.

Medians of CUDA events around calls in turns, from a cold cache. A contender that cannot run fails its benchmark, after the others have been
timed. tests/bench/test_bench_triton.py runs all of them on the CPU, small.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fbkernels as fb
from fbkernels import ops
from fbkernels.bench.rivals import LearnedFeedbackCNN, Stacked, Step, cnn, compiled, resnet18
from fbkernels.bench.timing import gpu_seconds, in_turns, launches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
BATCH, OUTPUTS, STD, LR = 512, 100, 0.05, 1e-4
Builders = Mapping[str, Callable[[], Step]]
MODELS = {"cnn": cnn, "resnet18": resnet18}
# of the paper's network and of ResNet-18; the last is the size of a B whose copy is bound by memory
UPDATES = [(24576, BATCH, "gaussian"), (65536, BATCH, "gaussian"), (65536, BATCH, "rademacher"), (2**18, 64, "rademacher")]
LAYERS: dict[str, tuple[Callable[[], nn.Conv2d | nn.Linear], tuple[int, ...]]] = {
    "conv5x5 96-128, 16x16": (lambda: nn.Conv2d(96, 128, 5, padding=2), (96, 16, 16)),
    "conv5x5 128-256, 8x8": (lambda: nn.Conv2d(128, 256, 5, padding=2), (128, 8, 8)),
    "conv3x3 64-64, 32x32": (lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 32, 32)),
    "conv3x3 512-512, 4x4": (lambda: nn.Conv2d(512, 512, 3, padding=1), (512, 4, 4)),
    "linear 4096-2048": (lambda: nn.Linear(4096, 2048), (4096,)),
    "linear 2048-2048": (lambda: nn.Linear(2048, 2048), (2048,)),
}


def captured(step: Step) -> Step:
    """The step as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Any:
        graph.replay()
        return loss

    return replay


def training(net: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, compiler: str | None = None) -> Step:
    """bf16 autocast and fused SGD; forward pass and loss, and with them their backward pass, compiled where ``compiler`` is named."""
    optimizer = torch.optim.SGD(net.parameters(), LR, fused=True)

    def forward(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return criterion(net(x), y)

    run = compiled(forward, compiler)

    def step() -> Tensor:
        loss = run(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def steps(model: str, batch: int, size: int, device: str, compiler: str = "inductor") -> Builders:
    """Whole training steps of a model on ``batch`` images of ``size`` x ``size``; on a GPU also as one CUDA graph."""
    torch.manual_seed(1)
    x = torch.rand(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(OUTPUTS, (batch,), device=device)

    def network() -> nn.Module:
        torch.manual_seed(0)
        return MODELS[model]().to(device, memory_format=torch.channels_last)

    def learned(rule: fb.Rule, compiler: str | None = None, backend: str = "auto", feedback: str = "direct") -> Step:
        net = fb.convert(network(), feedback=feedback, rule=rule, noise_std=STD, backend=backend, warmup=0)
        return training(net, fb.PerturbedLoss(nn.CrossEntropyLoss(), net), x, y, compiler)

    def backprop(compiler: str | None = None) -> Step:
        return training(network(), nn.CrossEntropyLoss(), x, y, compiler)

    builders: dict[str, Callable[[], Step]] = {
        "ours ridge": lambda: learned(fb.Ridge()),
        "ours joint": lambda: learned(fb.Joint(signal="output")),
        "reference ridge": lambda: learned(fb.Ridge(), backend="reference"),
        "reference joint": lambda: learned(fb.Joint(signal="output"), backend="reference"),
        "backprop": backprop,
        "backprop, compiled": lambda: backprop(compiler),
    }
    if model == "resnet18":
        builders["ours weight mirror, layerwise"] = lambda: learned(fb.WeightMirror(), feedback="layerwise")
    if model == "cnn":  # of the other, both streams of each layer take minutes to compile
        builders["ours joint, compiled"] = lambda: learned(fb.Joint(signal="output"), compiler)
        for rule in ("ridge", "joint"):
            builders[f"eager {rule}"] = lambda rule=rule: LearnedFeedbackCNN(network(), x, y, rule, STD, LR, torch.bfloat16)
    if device == "cuda":
        builders = {name: functools.cache(build) for name, build in builders.items()}
        for name in ("ours ridge", "ours joint", "backprop, compiled"):
            builders[f"{name}, graph"] = lambda name=name: captured(builders[name]())
    return builders


def updates(units: int, rows: int, kind: str, outputs: int, device: str) -> Builders:
    """The update of a B [units, outputs] from the noise of ``rows`` samples, and of the device's copy of as many bytes."""
    torch.manual_seed(0)
    B, R, w = torch.randn(units, outputs, device=device), torch.randn(rows, outputs, device=device), torch.randn(rows, device=device)
    Q = torch.linalg.solve(torch.eye(outputs, device=device) + R.T @ R, R.T).T.contiguous()
    M, G = R.T @ Q, w[:, None] * Q
    out, step = torch.empty_like(B), torch.tensor(0, device=device)
    key = (0, 0, 0, STD, kind)

    def eager() -> Tensor:
        return torch.addmm(B, B, M, alpha=-1).addmm_(torch.randn(rows, units, device=device).mul_(STD).t(), G)

    return {
        "ours": lambda: lambda: ops.feedback_update(B, M, G, None, None, None, step, None, *key),
        "ours, factors": lambda: lambda: ops.feedback_update(B, None, None, R, Q, w, step, None, *key),
        "ours, M = 0": lambda: lambda: ops.feedback_update(B, None, G, None, None, None, step, None, *key),
        "copy": lambda: lambda: out.copy_(B),
        "eager": lambda: eager,
    }


def one_launch(layer: nn.Conv2d | nn.Linear, x: Tensor, dx: Tensor, std: float, learns: bool, configuration: dict[str, int]) -> Step:
    """The layer as one launch in a configuration, beside it B's update from as many samples where it ``learns``."""
    from fbkernels import kernels

    how: tuple[Any, ...] = ((1, 1), (0, 0), (1, 1), 1)
    if isinstance(layer, nn.Conv2d):
        how = (layer.stride, layer.padding, layer.dilation, layer.groups)
    h, d = (torch.empty_like(layer(t)) for t in (x, dx))
    step, gains, B = torch.tensor(0, device=x.device), [None] * 3, None
    if learns:
        B = torch.randn(h[0].numel(), OUTPUTS, device=x.device)
        gains = [torch.randn(len(x), *shape, device=x.device) for shape in ((OUTPUTS,), (OUTPUTS,), ())]
    update = kernels.plan(B, None, None, *gains, step if learns else None, 0, "gaussian", x)
    given = (x, dx, layer.weight, layer.bias, *how, "relu", step, 0, 0, len(x), std, "gaussian", 0, False, h, d, None, update)

    def run() -> tuple[Tensor, Tensor]:
        kernels.perturbed_conv2d(*given, configuration)
        return h, d

    return run


def layers(name: str, batch: int, device: str, dtype: torch.dtype, std: float = STD, compiler: str = "inductor") -> Builders:
    """A layer, relu and noise: ours of activity and difference, the others on two streams."""
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    x, dx = (torch.randn(batch, *shape, device=device, dtype=dtype) for _ in range(2))
    layer = build().to(device, dtype).requires_grad_(False)
    if len(shape) == 3:
        x, dx, layer = (t.to(memory_format=torch.channels_last) for t in (x, dx, layer))
    p = x + dx
    step = torch.tensor(0, device=device)
    product = Stacked(layer, x, p, std, True, compiler).product

    def pointwise() -> tuple[Tensor, Tensor]:
        window = ("relu", "none", False, [1, 1], [1, 1], [0, 0])
        out = ops.perturbed_pointwise(product(x), product(dx), layer.bias, *window, step, 0, 0, batch, std, "gaussian")
        return out[0], out[1]

    def chosen() -> tuple[Tensor, Tensor]:
        key = (step, 0, 0, batch, std, "gaussian")
        if isinstance(layer, nn.Linear):
            return ops.perturbed_linear(x, dx, layer.weight, layer.bias, "relu", *key)[:2]
        how = (layer.stride, layer.padding, layer.dilation, layer.groups, "relu", "none", False, (1, 1), (1, 1), (0, 0))
        return ops.perturbed_conv2d(x, dx, layer.weight, layer.bias, *how, *key)[:2]

    builders: dict[str, Callable[[], Step]] = {"ours": lambda: chosen}
    if device == "cuda":
        from fbkernels import kernels

        for learns in (False, True):
            for c in kernels.configurations(dtype, 2):
                tile = "x".join(str(c[k]) for k in ("BM", "BN", "BK")) + ", and B" * learns
                builders[f"ours, one launch {tile}"] = functools.partial(one_launch, layer, x, dx, std, learns, c)
    return {
        **builders,
        "ours, library and pointwise": lambda: pointwise,
        "compiled, cat": lambda: Stacked(layer, x, p, std, True, compiler),
        "compiled, apart": lambda: Stacked(layer, x, p, std, False, compiler),
        "product alone": lambda: lambda: product(torch.cat((x, p))),
    }


def pieces(batch: int, channels: int, size: int, outputs: int, device: str) -> dict[str, Callable[[], Any]]:
    """What a layer launches beside its product."""
    torch.manual_seed(0)
    z, dz = (torch.randn(batch, channels, size, size, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2))
    e, B = torch.randn(batch, outputs, device=device), torch.randn(channels * size * size, outputs, device=device)
    step, window = torch.tensor(0, device=device), ("none", False, [1, 1], [1, 1], [0, 0])
    W = torch.randn(channels, channels, 1, 1, device=device)
    key, layer = (step, 0, 0, batch, STD, "gaussian"), ((1, 1), (0, 0), (1, 1), 1, "relu", *window)
    update = {"G": e, "learned_step": step}
    return {
        "perturbed_linear": lambda: ops.perturbed_linear(z[:, :, 0, 0], None, W[:, :, 0, 0], None, "relu", *key, B=B[:channels], **update),
        "perturbed_conv2d": lambda: ops.perturbed_conv2d(z, dz, W, None, *layer, *key, B=B, **update),
        "perturbed_pointwise": lambda: ops.perturbed_pointwise(z, dz, None, "relu", *window, step, 0, 0, batch, STD, "gaussian"),
        "feedback": lambda: ops.feedback(e, B, z, "relu"),
        "feedback_update": lambda: ops.feedback_update(B, None, e, None, None, None, step, None, 0, 0, 0, STD, "gaussian"),
        "noise": lambda: ops.noise(step, 0, 0, batch, len(B), STD, "gaussian"),
    }


def measure(benchmark: Any, builders: Builders, unit: str, rounds: int) -> dict[str, float]:
    """Median seconds of each that can run; the first is the benchmark's own."""
    runs, failed = {}, {}
    for name, build in builders.items():
        try:
            runs[name] = build()
            runs[name](), torch.cuda.synchronize()
        except Exception as error:
            runs.pop(name, None)
            failed[name] = f"{type(error).__name__}: {error}"[:500]
    times = in_turns(runs, 1 if benchmark.disabled else rounds, gpu_seconds)  # disabled, it compiles for another process
    scale = {"ms": 1e3, "us": 1e6}[unit]
    benchmark.extra_info |= {
        f"median_{unit}": {name: t * scale for name, t in times.items()},
        "failed": failed,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "build": fb.build_info(),
    }
    benchmark.pedantic(lambda: (next(iter(runs.values()))(), torch.cuda.synchronize()), rounds=5)
    return times


@pytest.fixture(autouse=True)
def _tf32() -> Any:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_noise(benchmark: Any, kind: str) -> None:
    step = torch.tensor(0, device="cuda")
    builders = {
        f"ours, {name}": lambda name=name: lambda: ops.noise(step, 0, 0, BATCH, 65536, STD, kind, backend=name)
        for name in ("triton", "cuda")
    }
    times = measure(benchmark, {**builders, "torch.randn": lambda: lambda: torch.randn(BATCH, 65536, device="cuda")}, "us", 30)
    benchmark.extra_info["speedup"] = {name: times["torch.randn"] / t for name, t in times.items()}
    assert not benchmark.extra_info["failed"]


@pytest.mark.parametrize(("units", "rows", "kind"), UPDATES)
def test_update(benchmark: Any, units: int, rows: int, kind: str) -> None:
    times = measure(benchmark, updates(units, rows, kind, OUTPUTS, "cuda"), "us", 30)
    benchmark.extra_info |= {
        "share_of_copy": {name: times["copy"] / t for name, t in times.items()},
        "copy_gb_s": 2 * 4 * units * OUTPUTS / times["copy"] / 1e9,
    }
    assert not benchmark.extra_info["failed"]


@pytest.mark.parametrize("name", LAYERS)
def test_layer(benchmark: Any, name: str) -> None:
    times = measure(benchmark, layers(name, BATCH, "cuda", torch.bfloat16), "us", 30)
    best = min((t for n, t in times.items() if n.startswith("compiled")), default=float("nan"))
    benchmark.extra_info["time_over_compiled"] = {n: t / best for n, t in times.items()}
    assert not benchmark.extra_info["failed"]


def test_launches(benchmark: Any) -> None:
    """How many kernels each piece of a layer launches, by torch.profiler."""
    runs = pieces(BATCH, 64, 32, OUTPUTS, "cuda")
    names = {name: launches(run) for name, run in runs.items()}
    benchmark.extra_info |= {"launches": {name: len(kernels) for name, kernels in names.items()}, "kernels": names}
    benchmark.pedantic(runs["feedback_update"], rounds=5)
    assert all(names.values())


@pytest.mark.parametrize("model", MODELS)
def test_step(benchmark: Any, model: str) -> None:
    builders = steps(model, BATCH, 32, "cuda")
    times = measure(benchmark, builders, "ms", 15)
    rival = times.get("backprop, compiled", float("nan"))
    benchmark.extra_info |= {
        "time_over_compiled_backprop": {name: t / rival for name, t in times.items()},
        "kernels_a_step": {name: len(launches(builders[name]())) for name in ("ours ridge", "ours joint", "backprop") if name in times},
    }
    assert not benchmark.extra_info["failed"]
