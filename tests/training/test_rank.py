"""B of low rank: ``convert(rank=)``."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fbkernels as fb
from fbkernels import ops

TURNS = [fb.Ridge(0.1), fb.Ridge(0.1, 0.99), fb.NormalizedLMS(0.3), fb.Joint(0.2), fb.Joint(0.2, "output")]  # from B = 0


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    front = (nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*front, nn.Linear(27, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 5)).to(dtype)


def data(n: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 2, 6, 6, dtype=dtype), torch.arange(n) % 5


def steps(net: nn.Module, x: Tensor, y: Tensor, count: int = 1, compiles: bool = False) -> None:
    criterion, optimizer = fb.PerturbedLoss(nn.CrossEntropyLoss(), net), torch.optim.SGD(net.parameters(), 0.1)
    run = lambda x, y: criterion(net(x), y)  # noqa: E731
    run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiles else run
    for i in range(count):
        torch.manual_seed(i)  # of dropout
        optimizer.zero_grad()
        run(x, y).backward()
        optimizer.step()


BACKENDS: list[tuple[str, torch.dtype, float, dict[str, Any]]] = [
    ("reference", torch.float64, 1e-9, {}),
    ("reference", torch.float64, 1e-9, {"share": 2}),
    ("cpp", torch.float32, 1e-4, {}),
    ("cpp", torch.float32, 1e-4, {"antithetic": True, "fraction": 0.5}),
    ("triton", torch.float32, 1e-4, {}),
]


@pytest.mark.parametrize(("backend", "dtype", "tolerance", "options"), BACKENDS, ids=str)
@pytest.mark.parametrize("rule", TURNS, ids=repr)
def test_of_full_rank_it_is_the_same_turned(
    rule: fb.Rule, options: dict[str, Any], backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    """C is orthogonal then, and these rules do not see a rotation of e: B C^T is the B of no rank, and W is the same."""
    x, y = data(dtype=dtype)
    nets = [fb.convert(network(dtype), rule=copy.deepcopy(rule), backend=backend, rank=r, **options) for r in (None, 5)]
    for net in nets:
        steps(net, x, y, 3)
    for (name, a), b in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * float(a.detach().abs().max()), msg=name)
    for a, b in zip(fb.points(nets[0]).values(), fb.points(nets[1]).values(), strict=True):
        C = b.basis.to(dtype)
        torch.testing.assert_close(b.B @ C.T, a.B, rtol=tolerance, atol=tolerance * float(a.B.abs().max()))


@pytest.mark.parametrize("rule", [fb.Ridge(0.1), fb.Joint(0.3, "output"), fb.Joint(0.3), fb.Fixed(), fb.LMS(0.02)], ids=repr)
def test_a_step_by_hand(rule: fb.Rule) -> None:
    x, y = data()
    net = fb.convert(network(), rule=copy.deepcopy(rule), noise_std=0.1, rank=2, seed=4)
    steps(net, x, y)
    B = [p.B.clone() for p in fb.points(net).values()]
    plain = copy.deepcopy(fb.revert(net)).train()
    net.zero_grad()
    torch.manual_seed(7)
    fb.PerturbedLoss(nn.CrossEntropyLoss(reduction="sum"), net)(net(x), y).backward()
    dy = None if net.feedback.scheduled is None else net.feedback.scheduled.output_change
    torch.manual_seed(7)
    h = plain[:4](x)
    g = plain[4:7](h.detach())
    z = plain[7](g.detach())
    points, C = list(fb.points(net).values()), points_basis(net)
    assert C.shape == (5, 2) and C.dtype == torch.float64
    torch.testing.assert_close(C.T @ C, torch.eye(2, dtype=torch.float64))
    e = (z.softmax(1) - F.one_hot(y, 5)).detach()
    r = e @ C
    z.backward(e)
    g.backward(r @ B[1].T)
    maps = (r @ B[0].T).view(8, 3, 3, 3).movedim(3, 1)  # units are numbered channels-last
    h.backward(maps.flatten(1))
    for got, want in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)

    xi = [ops.noise(torch.tensor(1), 4, i, 8, p.units, 0.1, "gaussian", dtype=torch.float64) for i, p in enumerate(points)]
    for p, noise, old in zip(points, xi, B, strict=True):
        if isinstance(rule, fb.Fixed):
            assert torch.equal(p.B, old)
        elif isinstance(rule, fb.Joint) and rule.signal == "output":
            assert dy is not None
            predicted = sum(n @ b for n, b in zip(xi, B, strict=True))
            torch.testing.assert_close(p.B, old + noise.T @ (0.3 / (0.01 * (27 + 6)) * (dy - predicted)))


def points_basis(net: nn.Module) -> Tensor:
    bases = [p.basis for p in fb.points(net).values()]
    assert all(b is bases[0] for b in bases)
    return bases[0]


def test_b_learns_the_projected_jacobian() -> None:
    """A network that is linear behind its point: B of Joint(output) is the Jacobian of the output times C."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 9)).double()
    net = fb.convert(model, rule=fb.Joint(0.5, "output"), rank=4, noise_std=0.1, warmup=10**9)
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    for _ in range(60):
        criterion(net(torch.randn(64, 4, dtype=torch.float64)), torch.randint(9, (64,))).backward()
    (point,) = fb.points(net).values()
    want = model[2].weight.detach().T @ points_basis(net)
    assert point.B.shape == (12, 4)
    # what it started from is forgotten like exp(-0.5 * 60), and no noise is left where the net is linear
    assert float((point.B - want).norm() / want.norm()) < 1e-6


def test_the_weight_angle_is_to_the_best_of_its_form() -> None:
    x, y = data(40)
    model = network()
    model[6] = nn.Identity()
    net = fb.convert(model, rule=fb.Fixed(), rank=3)
    steps(net, x, y)
    plain, (point, _) = fb.revert(net), fb.points(net).values()
    h = plain[:3](x).detach().requires_grad_()
    z = plain[3:](h)
    F.cross_entropy(z, y, reduction="sum").backward()
    r = (z.softmax(1) - F.one_hot(y, 5)).detach() @ points_basis(net)
    point.B = (torch.linalg.pinv(r) @ h.grad.movedim(1, 3).flatten(1)).T
    row = fb.metrics.alignment(net, nn.CrossEntropyLoss(), x, y)["0"]
    assert row["weight_angle"] < 1e-3 and row["relative_error"] < 1e-6 and row["projected_error"] < 1e-6
    assert 1 < row["angle"] < 90  # what e C does not say


@pytest.mark.parametrize("rule", [fb.Ridge(0.1), fb.Joint(0.2, "output"), fb.SyntheticGradient(0.01)], ids=repr)
def test_checkpoints_and_copies(rule: fb.Rule) -> None:
    x, y = data(dtype=torch.float32)
    net, other = (fb.convert(network(torch.float32), rule=copy.deepcopy(rule), rank=2) for _ in range(2))
    steps(net, x, y, 2)
    assert not [k for k in net.state_dict() if k.endswith(".C")]
    other.load_state_dict(net.state_dict())
    third = copy.deepcopy(net)
    for n in (net, other, third):
        steps(n, x, y, 2)
    for n in (other, third):
        assert all(torch.equal(t, n.state_dict()[k]) for k, t in net.state_dict().items())
    for changed in ({"rank": 3}, {"rank": 2, "seed": 1}, {}):
        with pytest.raises(ValueError, match="checkpoint of another"):
            fb.convert(network(torch.float32), rule=copy.deepcopy(rule), **changed).load_state_dict(net.state_dict())


def test_a_compiled_step_is_the_eager_one() -> None:
    states = []
    for compiles in (False, True):
        torch._dynamo.reset()
        net = fb.convert(network(torch.float32), rule=fb.Joint(0.2, "output"), rank=2)
        steps(net, *data(dtype=torch.float32), 3, compiles)
        states.append(net.state_dict())
    for key, want in states[0].items():
        torch.testing.assert_close(states[1][key], want, rtol=1e-5, atol=1e-6)


def test_summary() -> None:
    net, (x, y) = fb.convert(network(torch.float32), rule=fb.Ridge(), rank=2, share=2), data(dtype=torch.float32)
    predicted = fb.summary(net, x)
    assert [(row.B, row.bytes) for row in predicted] == [((12, 2), 96), ((6, 2), 48)]
    steps(net, x, y)
    assert list(fb.summary(net)) == list(predicted)
    assert "rank=2" in str(predicted)


def test_what_the_docs_say_was_measured() -> None:
    root = Path(__file__).parents[2]
    rows = json.loads((root / "bench" / "results" / "share.json").read_text())["rank"]["rows"]
    full, half = (next(r for r in rows if (r["rank"], r["signal"]) == (rank, "output")) for rank in (None, 50))
    angles = [" ".join(f"{a:.0f}" for a in r["angles"]["38400"]) for r in (half, full)]
    time = half["step_cpu_seconds"] / full["step_cpu_seconds"]
    said = (
        f"On CIFAR-100 rank 50 halves B, a step takes {time:.2f} of the time, and after 38,400 samples the layers are {angles[0]} degrees "
        f"off, with all 100 columns {angles[1]}."
    )
    assert full["B_bytes"] == 2 * half["B_bytes"]
    assert said in " ".join((root / "docs" / "networks.md").read_text().split())


def test_bad_settings() -> None:
    for bad, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="rank"):
            fb.convert(network(), rank=bad)  # type: ignore[arg-type]
    for method in ({"feedback": "layerwise"}, {"rule": fb.NodePerturbation()}):
        with pytest.raises(ValueError, match="rank must be None"):
            fb.convert(network(), rank=2, **method)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank must be at most 5, the number of outputs, got 6"):
        fb.convert(network(), rank=6)(data()[0])
