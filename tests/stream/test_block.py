"""Direct feedback on the compiled backends: whole training steps, as exact as those of torch's own float32 operators."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fbkernels as fb
from fbkernels import ops

CL = torch.channels_last


def net(*layers: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 9), nn.Sigmoid(), nn.Linear(9, 5))


class Functional(nn.Module):
    """Functions in place of modules, an in-place one among them; a residual block; an activity that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.c, self.out = nn.Conv2d(8, 6, 3, stride=2), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.a(x), inplace=True), 2)
        h = torch.tanh(self.b(h)) + h
        z = self.c(F.interpolate(h, scale_factor=2.0))
        return self.out(F.avg_pool2d(torch.sigmoid(z), 2).flatten(1))


def settled(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """In eval mode, with statistics that are not those of the batch."""
    norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
    return norm.eval()


NETS: dict[str, Callable[[], nn.Module]] = {
    "max": lambda: net(
        nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 7, 3), nn.Tanh(), nn.MaxPool2d(2), features=28
    ),
    "pool first": lambda: net(
        nn.Conv2d(3, 8, 3), nn.MaxPool2d(2, 1), nn.GELU(), nn.Conv2d(8, 4, 1), nn.AvgPool2d(3), nn.ReLU(), features=36
    ),
    "gelu": lambda: net(
        nn.Conv2d(3, 8, 3, bias=False), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1), nn.GELU(), nn.AvgPool2d(2), features=16
    ),
    "norm": lambda: net(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), features=200),
    "norms": lambda: net(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 4, 1, bias=False),
        nn.BatchNorm2d(4, affine=False, momentum=None),
        nn.Tanh(),
        nn.AvgPool2d(2),
        features=16,
    ),
    "norms of vectors": lambda: nn.Sequential(
        nn.Flatten(),
        nn.Linear(432, 33),
        nn.BatchNorm1d(33),
        nn.GELU(),
        nn.Linear(33, 17),
        nn.BatchNorm1d(17, track_running_stats=False),
        nn.Linear(17, 5),
    ),
    "settled norm": lambda: net(nn.Conv2d(3, 8, 3), settled(nn.BatchNorm2d(8)), nn.MaxPool2d(2), nn.ReLU(inplace=True), features=200),
    "norm behind a pooling": lambda: net(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU(), features=200),
    "stride": lambda: net(nn.Conv2d(3, 8, 3, stride=2, dilation=2, padding=2), nn.Sigmoid(), nn.MaxPool2d(2), features=72),
    "groups": lambda: net(nn.Conv2d(3, 9, 3, groups=3, padding="same"), nn.ReLU(), nn.MaxPool2d(2), features=324),
    "no bias": lambda: net(nn.Conv2d(3, 8, 5, bias=False), nn.ReLU(), nn.MaxPool2d(2), features=128),  # 75 terms, from the winners
    "four dimensions": lambda: nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Flatten(), nn.Linear(252, 5)),  # but no convolution
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 33), nn.GELU(), nn.Linear(33, 17, bias=False), nn.Linear(17, 5)),
    "functional": Functional,
}
RULES: dict[str, Callable[[], fb.Rule]] = {
    "ridge": lambda: fb.Ridge(10.0),
    "joint": lambda: fb.Joint(signal="output"),
    "loss": fb.Joint,
    "fixed": fb.Fixed,
}


# Triton's interpreter takes the CPU's tensors
DEVICES = {"reference": "cpu", "cpp": "cpu", "auto": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}


def train(
    model: nn.Module, dtype: torch.dtype, backend: str, steps: int = 3, samples: int = 20, norms: torch.dtype | None = None, **options: Any
) -> dict[str, Tensor]:
    """Gradients, B, W and the statistics of norms after some steps."""
    device = DEVICES[backend]
    x = torch.randn(steps, samples, 3, 12, 12, generator=torch.Generator().manual_seed(1)).to(device)
    y = torch.randint(5, (steps, samples), generator=torch.Generator().manual_seed(2)).to(device)
    model = copy.deepcopy(model).to(device, dtype)
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.to(norms)
    network = fb.convert(model, seed=3, noise_std=0.1, backend=backend, **options)
    criterion, optimizer = fb.PerturbedLoss(nn.CrossEntropyLoss(), network), torch.optim.SGD(network.parameters(), 0.1)
    for i in range(steps):
        optimizer.zero_grad()
        criterion(network(x[i].to(dtype)), y[i]).backward()
        optimizer.step()
    out = {f"gradient of {n}": p.grad for n, p in network.named_parameters() if p.grad is not None}
    out |= {f"B of {n}": p.B for n, p in fb.points(network).items() if p.B is not None}
    out |= {n: t for n, t in network.named_buffers() if "running" in n}
    return {n: t.detach().cpu() for n, t in {**out, **dict(network.named_parameters())}.items()}


def assert_as_exact(ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor], least: float = 0.0) -> None:
    """Two float32 paths round independently: one is seldom far off where the other is exact, hence the floor of some ulp, and ``least``."""
    for key, want in exact.items():
        error, limit = ((t[key].double() - want).norm() for t in (ours, theirs))
        limit = torch.maximum(limit, least * want.norm())
        # the terms of a bias's gradient cancel before a norm, those of the weight's do not
        size = max(want.norm(), exact[key.removesuffix("bias") + "weight"].norm()) if "gradient" in key and "bias" in key else want.norm()
        assert error <= 4 * limit + 30 * 2.0**-24 * size + 1e-9, (key, float(error), float(limit), float(size))


@pytest.mark.parametrize(
    ("name", "rule", "backend"),
    # Triton's interpreter is slow: there two rules take turns
    [*product(NETS, RULES, ["cpp"]), *((name, ("ridge", "joint")[i % 2], "triton") for i, name in enumerate(NETS))],
)
def test_steps_are_as_exact_as_those_of_torch(name: str, rule: str, backend: str) -> None:
    torch.manual_seed(0)
    model = NETS[name]()
    options: dict[str, Any] = {"steps": 2, "samples": 3} if backend == "triton" else {}
    exact = train(model, torch.float64, "reference", rule=RULES[rule](), **options)
    theirs, ours = (train(model, torch.float32, b, rule=RULES[rule](), **options) for b in ("reference", backend))
    assert ours.keys() == exact.keys()
    # of few samples the loss's change has an error of its own, which B and then each gradient has
    first = [train(model, dtype, "reference", rule=RULES[rule](), **{**options, "steps": 1}) for dtype in (torch.float32, torch.float64)]
    least = max(
        float((a.double() - b).norm() / b.norm()) for (k, a), b in zip(first[0].items(), first[1].values(), strict=True) if k[0] == "B"
    )
    assert_as_exact(ours, theirs, exact, least)


@pytest.mark.parametrize(
    "options", [{"fraction": 0.35}, {"antithetic": True}, {"fraction": 0.5, "antithetic": True}, {"every": 2}, {"warmup": 2}], ids=str
)
@pytest.mark.parametrize(
    ("name", "rule", "backend"),
    [("max", "ridge", "cpp"), ("max", "joint", "cpp"), ("norm", "ridge", "cpp"), ("norm", "joint", "cpp"), ("stride", "joint", "triton")],
)
def test_options_of_the_noise(name: str, backend: str, rule: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = NETS[name]()
    for noise in ("rademacher",) if backend == "triton" else ("gaussian", "rademacher"):  # the interpreter is slow
        options = {**options, "noise": noise, "rule": RULES[rule](), "steps": 3, "samples": 4 if backend == "triton" else 20}
        exact = train(model, torch.float64, "reference", **options)
        theirs, ours = (train(model, torch.float32, b, **options) for b in ("reference", backend))
        assert_as_exact(ours, theirs, exact)


def test_the_compiled_block_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = NETS["max"](), []
    for name in ("perturbed_conv2d", "perturbed_linear", "pooled_weight_gradient", "feedback", "feedback_update"):
        run = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, run=run, name=name, **k: (calls.append(name), run(*a, **k))[1])
    train(model, torch.float32, "auto", steps=2, rule=fb.Joint(signal="output"))
    points = 3
    assert (calls.count("perturbed_conv2d"), calls.count("perturbed_linear")) == (2 * 2, 2 * 1)
    assert calls.count("feedback") == 2 * points
    assert calls.count("pooled_weight_gradient") == 2 * 1  # 8 x 3 x 3 = 72 terms are too few, see sparse_gradient
    assert calls.count("feedback_update") == points  # the flush at the end; before, the update is part of the layer's own launch


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize(("name", "points"), [("norms", 2), ("norms of vectors", 2), ("settled norm", 1), ("norm behind a pooling", 0)])
def test_what_follows_a_layer_with_a_norm_is_one_launch(name: str, points: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, alone = [], []
    pointwise, norm = ops.perturbed_pointwise, torch.batch_norm
    monkeypatch.setattr(ops, "perturbed_pointwise", lambda *a, **k: (calls.append(k), pointwise(*a, **k))[1])
    monkeypatch.setattr(torch, "batch_norm", lambda *a, **k: (alone.append(a), norm(*a, **k))[1])
    train(NETS[name](), torch.float32, backend, steps=1, samples=3, rule=fb.Ridge())
    first = len(alone)  # of finding the points, which runs the plain model
    calls.clear()
    train(NETS[name](), torch.float32, backend, steps=2, samples=3, rule=fb.Ridge())
    fused = [k for k in calls if k.get("scale") is not None]
    assert len(fused) == 2 * points
    assert all(k["learned_step"] is not None and k["B"] is not None for k in fused[points:])
    assert (len(alone) > 2 * first) == (points == 0)


def test_a_norm_read_twice_counts_a_batch_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.point, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), fb.FeedbackPoint(), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            z = self.norm(self.a(x))
            h = self.point(torch.relu(z))
            return self.out(torch.cat((h.mean((2, 3)), z.mean((2, 3))), 1))

    torch.manual_seed(0)
    model, x, y = Twice(), torch.randn(6, 3, 8, 8), torch.randint(5, (6,))
    network = fb.convert(model, rule=fb.Fixed(), backend="cpp")
    plain = copy.deepcopy(model)
    fb.PerturbedLoss(nn.CrossEntropyLoss(), network)(network(x), y)
    plain(x)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(network.norm, key), getattr(plain.norm, key))


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e3])
def test_a_norm_far_from_zero_is_as_exact_as_that_of_torch(mean: float) -> None:
    torch.manual_seed(0)
    model = NETS["norm"]()
    with torch.no_grad():
        model[0].bias.fill_(mean)
    exact = train(model, torch.float64, "reference", steps=1, rule=fb.Fixed())
    theirs, ours = (train(model, torch.float32, backend, steps=1, rule=fb.Fixed()) for backend in ("reference", "cpp"))
    for key in ("gradient of 0.weight", "gradient of 1.weight", "gradient of 1.bias", "1.running_mean", "1.running_var"):
        error, limit = ((t[key].double() - exact[key]).norm() for t in (ours, theirs))
        assert error <= 4 * limit + 30 * 2.0**-24 * exact[key].norm(), (key, float(error), float(limit))


def test_memory_format_and_thread_count_change_nothing() -> None:
    torch.manual_seed(0)
    model = NETS["max"]()
    threads = torch.get_num_threads()
    try:
        results = []
        for t, format in ((1, torch.contiguous_format), (1, CL), (2, CL)):
            torch.set_num_threads(t)
            results.append(train(model.to(memory_format=format), torch.float32, "cpp", rule=fb.Joint(signal="output")))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for key, want in results[0].items():
            # torch's own products and convolutions round differently with another number of threads
            torch.testing.assert_close(other[key], want, rtol=0, atol=50 * 2.0**-23 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("name", "dtype", "norms", "backend"),
    [
        ("max", torch.bfloat16, torch.bfloat16, "cpp"),
        ("norms", torch.bfloat16, torch.bfloat16, "cpp"),
        ("norms", torch.bfloat16, torch.float32, "cpp"),
        ("norms", torch.float16, torch.float32, "triton"),  # whose interpreter gets bfloat16 products wrong
    ],
)
def test_low_precision(name: str, dtype: torch.dtype, norms: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    model = NETS[name]()
    options: dict[str, Any] = {"steps": 1, "samples": 5 if backend == "triton" else 20, "rule": fb.Fixed()}
    exact = train(model, torch.float64, "reference", **options)
    theirs, ours = (train(model, dtype, b, norms=norms, **options) for b in ("reference", backend))
    for key, want in exact.items():
        assert ours[key].dtype == theirs[key].dtype
        error, limit = ((t[key].double() - want).norm() for t in (ours, theirs))
        assert error <= 2 * limit + 2.0**-9 * want.norm(), key


@pytest.mark.parametrize("frozen", [["0.weight", "0.bias"], ["1.weight"], ["1.bias"], ["1.weight", "1.bias"], ["5.weight"]])
def test_frozen_parameters_get_no_gradient(frozen: list[str]) -> None:
    torch.manual_seed(0)
    model = NETS["norm"]()
    every = train(model, torch.float32, "cpp", steps=1, rule=fb.Fixed())
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    gradients = train(model, torch.float32, "cpp", steps=1, rule=fb.Fixed())
    assert every.keys() - gradients.keys() == {f"gradient of {name}" for name in frozen}
    for key, got in gradients.items():
        if key.startswith("gradient"):
            torch.testing.assert_close(got, every[key], rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's autocast; test_gpu.py has the GPU's")
def test_a_norm_under_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 5))
    options: dict[str, Any] = {"steps": 1, "samples": 5, "rule": fb.Fixed()}
    exact = train(model, torch.float64, "reference", **options)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (train(model, torch.float32, backend, **options) for backend in ("reference", "triton"))
    for key, want in exact.items():
        assert ours[key].dtype == theirs[key].dtype
        error, limit = ((t[key].double() - want).norm() for t in (ours, theirs))
        assert error <= 2 * limit + 2.0**-9 * want.norm(), key


def test_autocast_and_double_run_in_torch() -> None:
    model = NETS["max"]()
    network = fb.convert(model, rule=fb.Ridge())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), network)
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(network(torch.randn(4, 3, 12, 12)), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_shapes_are_known_before_the_point() -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Conv2d(2, 6, 3), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.a(x)
            assert (z.shape, z.dtype, len(z)) == ((5, 6, 4, 4), torch.float32, 5)
            h = F.max_pool2d(torch.relu(z), 2)
            assert h.size(2) == 2
            return self.out(h.flatten(1))

    network = fb.convert(Watched(), rule=fb.Fixed())
    fb.PerturbedLoss(nn.CrossEntropyLoss(), network)(network(torch.randn(5, 2, 6, 6)), torch.tensor([0, 1, 2, 0, 1])).backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "backend"), [*product(["max", "norm", "gelu", "mlp"], ["cpp"]), ("stride", "triton"), ("norm", "triton"), ("mlp", "triton")]
)
def test_a_compiled_step_is_the_eager_one(name: str, backend: str) -> None:
    torch.manual_seed(0)
    model = NETS[name]()
    torch._dynamo.reset()
    device = DEVICES[backend]
    model, x, y = model.to(device), torch.randn(2, 4, 3, 12, 12, device=device), torch.randint(5, (2, 4), device=device)
    states = []
    for compiles in (False, True):
        network = fb.convert(copy.deepcopy(model), rule=fb.Joint(signal="output"), backend=backend)
        criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), network)
        run = lambda x, y, network=network, criterion=criterion: criterion(network(x), y)  # noqa: E731
        run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiles else run
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        for i in range(2):
            optimizer.zero_grad()
            run(x[i], y[i]).backward()
            optimizer.step()
        states.append(network.state_dict())
    for key, want in states[0].items():
        # the loss and e are float64 in a compiled step, Triton's own kernel in an eager one
        torch.testing.assert_close(states[1][key], want, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


class Changed(nn.Module):
    """What a model may do to a pooled activity: in place, through a view."""

    def __init__(self, change: Callable[[Tensor], Any], size: int = 12) -> None:
        super().__init__()
        self.a, self.b, self.out, self.change = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(36, 5), change

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.a(x)), 2)
        changed = self.change(h)
        h = F.max_pool2d(torch.tanh(self.b(h if changed is None else changed)), 2)
        return self.out(h.view(len(x), -1))


def add(h: Tensor) -> None:
    h += 0.5


CHANGES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]] = {
    "+=": (add, lambda h: h + 0.5),
    "mul_": (lambda h: h.mul_(-1), lambda h: -h),
    "relu_": (lambda h: F.relu(h - 0.3, inplace=True), lambda h: F.relu(h - 0.3)),
    "view": (lambda h: h.view(len(h), -1).add_(0.5).view_as(h), lambda h: h + 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_activity_changed_in_place(change: str) -> None:
    results = []
    for how in CHANGES[change]:
        torch.manual_seed(0)
        results.append(train(Changed(how), torch.float32, "cpp", rule=fb.Joint(signal="output")))
    for key, want in results[1].items():
        # a clone of the activity in another memory format, another order of a convolution's sums
        torch.testing.assert_close(results[0][key], want, rtol=0, atol=50 * 2.0**-23 * float(want.abs().max()))


def test_an_activity_changed_in_place_behind_our_back_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 5))
    model[3].register_forward_hook(lambda m, args, h: h.add_(1.0))
    network = fb.convert(model, rule=fb.Fixed(), backend="cpp")
    out = network(torch.randn(6, 3, 6, 6))
    with pytest.raises(RuntimeError, match=r"the activity of point '0' was modified in place"):
        fb.PerturbedLoss(nn.CrossEntropyLoss(), network)(out, torch.arange(6) % 5)
