"""The paper's experiments, on images of noise: what they run is what they say, and it goes on where it was."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from experiments import fail, few, images, watch
from torch import nn

import fbkernels as fb
from fbkernels.lab import cli
from fbkernels.lab.paper import EXPERIMENTS, autoencoder, cifar, driver, fig2, fixed_w, noise_search, reproduce, scaling
from fbkernels.lab.paper.driver import Experiment, Interrupted
from fbkernels.lab.paper.mlp import MLP, BiasUnit, Fused, HalfSquaredError, Modules, TF1Adam, WithoutResidual


def colour(data_dir: str = "", device: str = "cpu") -> cifar.Images:
    generator = torch.Generator().manual_seed(0)
    x, test_x = (torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8) for n in (300, 40))
    y, test_y = (torch.randint(10, (n,), generator=generator) for n in (300, 40))
    return cifar.Images(x, y, test_x, test_y, 10)


def without_times(result: dict) -> dict:
    return {k: v for k, v in result.items() if k != "seconds"}


KINDS = {
    "fig2": fig2.jobs("smoke", (0,), False),
    "fig2-faithful": fig2.jobs("smoke", (0,), True),
    "fixed-w": fixed_w.jobs("smoke", (0,), False),
    "fixed-w-faithful": fixed_w.jobs("smoke", (0,), True),
    "autoencoder": autoencoder.jobs("smoke", (0,), False),
    "autoencoder-faithful": autoencoder.jobs("smoke", (0,), True),
    "scaling": scaling.jobs("smoke", (0,), False),
    "noise-search": noise_search.jobs("smoke", (0,), False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_trained_and_drawn(kind: str, tmp_path: Path) -> None:
    names = {"fixed-w": "fig2-fixed-w", "autoencoder": "fig3"}
    name = kind.removesuffix("-faithful")
    experiment = EXPERIMENTS[names.get(name, name)]
    jobs = KINDS[kind]
    assert len({job.name for job in jobs}) == len(jobs)
    kept = {f"{job.method} {job.variant if kind == 'scaling' else ''}": job for job in jobs}  # one of each sweep
    jobs = [replace(job, steps=4, every=2 if kind == "fig2" else 4) for job in kept.values()]
    results = []
    for job in jobs:
        out = job.run(images(), watch(tmp_path / f"{job.name}.pt"))
        assert [r["step"] for r in out["records"]] == ([2, 4] if kind == "fig2" else [4])
        assert all(math.isfinite(r["train_loss"]) for r in out["records"]), job
        results.append(json.loads(json.dumps({"method": job.method, "seed": 0, "job": driver._plain(job), **out})))
    methods = {job.method for job in jobs}
    for table in experiment.tables(results):
        assert table.rows
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert {row[0] for row in table.rows} <= methods or table.columns[0] == "test loss"
    for name, figure in experiment.figures(results).items():
        figure.savefig(tmp_path / f"{name}.png")


@pytest.mark.parametrize("rule", ["ridge", "lms", "joint", "fixed", "weight-transport"])
@pytest.mark.parametrize("target", ["classes", "input"])
def test_modules_do_what_the_fused_network_does(rule: str, target: str) -> None:
    """Same start, batches, noise and steps: so the losses of 12 steps, four epochs, agree to float32 rounding."""
    options = {"ridge": {"gamma": 0.1}, "lms": {"lr": 1e-6}}
    sizes = (784, 50, 20, 10) if target == "classes" else (784, 20, 2, 20, 784)
    activations = ("tanh",) * (len(sizes) - 2) + ("identity",)
    job = MLP("", 3, 12, 12, "", sizes, activations, target=target, rule=rule, rule_args=options.get(rule, {}), noise_std=0.05, lr=1e-6)
    data = images()
    y = data.y if target == "classes" else data.x
    fused, modules = Fused(job, data.x.device), Modules(job, data.x.device)
    a, b = (net.fit(data.x, y, steps=12, batch_size=32) for net in (fused, modules))
    torch.testing.assert_close(a.float(), b, rtol=2e-5, atol=0)
    assert len(a.unique()) == 12


NOISY = {"rule": "weight-transport", "optimizer": "adam", "activity_noise": 0.1}


@pytest.mark.parametrize("changes", [{}, {"rule": "sign-symmetric"}, NOISY])
def test_a_multilayer_perceptron_goes_on_bit_for_bit(changes: dict, tmp_path: Path) -> None:
    job = MLP("x", 0, 24, 4, rule_args={} if changes else {"gamma": 0.1}, **changes)
    whole = job.run(images(), watch(tmp_path / "whole.pt"))
    with pytest.raises(Interrupted):
        job.run(images(), watch(tmp_path / "state.pt", stop_at=12))
    assert without_times(job.run(images(), watch(tmp_path / "state.pt"))) == without_times(whole)


@pytest.mark.parametrize("faithful", [False, True])
def test_every_cifar_row_is_trained_and_goes_on_bit_for_bit(faithful: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "HELD_OUT", 16)
    jobs = [replace(job, images=160, width=0.03, epochs=2) for job in cifar.jobs("cifar10", "smoke", (0,), faithful)]
    results = []
    for job in jobs:
        whole = job.run(colour(), watch(tmp_path / f"whole-{job.name}.pt"))
        assert len(whole["records"]) == 2
        results.append(json.loads(json.dumps({"method": job.method, "seed": 0, "job": driver._plain(job), **whole})))
        if job.method not in ("backprop", "learned"):
            continue
        path = tmp_path / f"{job.name}.pt"
        with pytest.raises(Interrupted):
            job.run(colour(), watch(path, stop_at=job.batches + 1 if job.batches > 1 else 1))
        assert without_times(job.run(colour(), watch(path))) == without_times(whole), job
    (table,) = cifar.tables("cifar10", results)
    assert len(table.rows) == len(jobs)
    assert cifar.figures("cifar10", results).keys() == {"cifar10"}


def test_published_pairing() -> None:
    """fc1's B stands still; fc2's learns from fc1's noise: B + lr (xi w - B r) r^T in float64 from the same measurement (PAPER 1.5)."""
    job = next(job for job in cifar.jobs("cifar10", "smoke", (0,), True) if job.method == "learned")
    job = replace(job, width=0.03, rule_args={"lr": 0.1})
    data = colour()
    net, criterion, _ = job.build(data)
    x, y = data.x[:8].float() / 255, data.y[:8]
    points = fb.points(net)
    criterion(net(x), y).backward()
    fb.flush(net)
    before = {name: point.B.clone() for name, point in points.items()}
    seen: list[fb.Measurement] = []
    rule = next(iter(points.values())).shared.settings.rule
    learn = rule.learn
    rule.learn = lambda point, m: (seen.append(m), learn(point, m))[1]
    criterion(net(x), y).backward()
    fb.flush(net)
    m = seen[0]
    assert torch.equal(points["dropout1"].B, before["dropout1"])
    assert not torch.equal(points["pool1"].B, before["pool1"])
    xi = fb.functional.noise(0, 1, points["dropout1"].index, 8, len(before["dropout1"]), job.noise_std).double()
    B, R, w = before["dropout2"].double(), m.regressor.double(), m.w.double()
    expected = B + 0.1 * (xi.T * w - B @ R.T) @ R
    torch.testing.assert_close(points["dropout2"].B.double() - B, expected - B, rtol=1e-4, atol=1e-7)


def test_tf1_adam() -> None:
    """lr_t = lr sqrt(1 - b2^t) / (1 - b1^t), w -= lr_t m / (sqrt(v) + eps): TensorFlow 1's form."""
    w = nn.Parameter(torch.tensor([0.3, -2.0], dtype=torch.float64))
    optimizer = TF1Adam([w], lr=0.1, eps=1e-2)
    expected, m, v = w.detach().clone(), torch.zeros(2).double(), torch.zeros(2).double()
    for t in range(1, 6):
        w.grad = torch.tensor([1e-3, 0.5], dtype=torch.float64) * t
        optimizer.step()
        m, v = 0.9 * m + 0.1 * w.grad, 0.999 * v + 0.001 * w.grad**2
        expected -= 0.1 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (v.sqrt() + 1e-2)
    torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=0)


def test_softmax_error() -> None:
    z = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    target = torch.arange(6)
    criterion = cifar.SoftmaxError()
    loss = criterion(z, target)
    loss.backward()
    p, t = z.detach().softmax(1), nn.functional.one_hot(target, 10)
    torch.testing.assert_close(loss.detach(), 0.5 * (p - t).square().sum(1).mean())
    torch.testing.assert_close(z.grad, (p - t) / 6)


def test_half_squared_error() -> None:
    y, t = torch.randn(4, 10, dtype=torch.float64), torch.tensor([1, 0, 3, 9])
    expected = 0.5 * sum(float(((y[n] - torch.eye(10)[t[n]]) ** 2).sum()) for n in range(4))
    assert float(HalfSquaredError()(y, t)) == pytest.approx(expected, rel=1e-12)


def test_bias_units_are_biases_of_which_b_has_a_row() -> None:
    """The authors' layout computes the network that has biases, and perturbs the unit (PAPER 6.4)."""
    job = MLP("", 0, 4, 4, rule_args={"gamma": 0.1}, bias_units=True)
    net = Modules(job, torch.device("cpu"))
    plain = Fused(replace(job, bias_units=False), torch.device("cpu"))
    torch.testing.assert_close(net.model()(images().x), plain.model()(images().x), rtol=1e-5, atol=1e-5)
    net.fit(images().x, images().y, steps=1, batch_size=32)
    assert [tuple(point.B.shape) for point in fb.points(net.net).values()] == [(51, 20), (21, 10)]
    assert any(isinstance(layer, BiasUnit) for layer in net.model())


@pytest.mark.parametrize("signal", ["output", "loss"])
def test_without_residual_averages_to_what_joint_finds(signal: str) -> None:
    """With W fixed and a linear network both have the same mean: B of the paper's third theorem, here to the error of the average."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    net = fb.convert(model, feedback="direct", rule=WithoutResidual(lr=0.01, signal=signal), noise_std=0.1)
    criterion = fb.PerturbedLoss(HalfSquaredError(), net)
    total, steps = torch.zeros(5, 3), 1000
    (point,) = fb.points(net).values()
    for step in range(steps + 300):
        criterion(net(torch.randn(5, 6)), torch.randn(5, 3)).backward()
        total += point.B * (step >= 300) / steps
    W = model[1].weight.detach().T
    assert (total - W).norm() / W.norm() < 0.15


def test_random_search_is_log_uniform_and_the_same_each_time() -> None:
    draws = noise_search.draws(200)
    assert draws == noise_search.draws(200)
    for key, ends in noise_search.SPACE.items():
        values = torch.tensor([math.log(draw[key]) for draw in draws])
        low, high = map(math.log, ends)
        assert low <= values.min() <= values.max() <= high
        assert abs(float(values.mean()) - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * 200)


def test_settings_of_the_paper() -> None:
    """SPEC 8's numbers, where a slip would make another experiment."""
    learned = next(job for job in fig2.jobs("full", range(5), False) if job.method == "learned 0.01")
    assert (learned.sizes, learned.activations) == ((784, 50, 20, 10), ("sigmoid", "sigmoid", "identity"))
    assert (learned.steps, learned.batch, learned.lr, learned.warmup, learned.rule_args) == (2_000_000, 32, 4e-4, 1000, {"gamma": 0.1})
    ours = next(job for job in autoencoder.jobs("full", range(3), True) if job.method == "learned")
    assert (ours.sizes, ours.steps, ours.lr, ours.rule_args, ours.noise_std) == (
        (784, 50, 2, 50, 784), 1_000_000, 1e-4, {"lr": 8e-6}, 0.018942,
    )  # fmt: skip
    cnn = next(job for job in cifar.jobs("cifar10", "full", range(5), True) if job.method == "learned")
    assert (cnn.epochs, cnn.width, cnn.noise_std, cnn.lr, cnn.rule_args) == (200, 1.0, 0.06732, 4.785e-6, {"lr": 8.322e-6})
    rows = {row: loss for row, (loss, _) in autoencoder.PAPER.items()}
    assert min(rows, key=rows.__getitem__) == "synthetic gradients"
    assert rows["learned"] == 515.3


FEW = Experiment("two lines of figure 2", 2, few, images, fig2.tables, fig2.figures)  # type: ignore[arg-type]
options = functools.partial(
    reproduce, "fig2", FEW, scale="smoke", faithful=False, data_dir="", device="cpu", processes=2, command=["fbkernels"]
)


def test_an_experiment_side_by_side(tmp_path: Path) -> None:
    tables = options(tmp_path, seeds=(0, 1), methods=None)
    raw = json.loads((tmp_path / "results.json").read_text())
    assert [(run["method"], run["seed"]) for run in raw["results"]] == [
        ("backprop", 0), ("backprop", 1), ("feedback alignment", 0), ("feedback alignment", 1),
    ]  # fmt: skip
    assert raw["hardware"]["cores"]
    assert [row[0] for row in tables[0].rows] == ["backprop", "feedback alignment"]
    assert (tmp_path / "table.md").read_text() == tables[0].markdown()
    assert (tmp_path / "fig2.png").stat().st_size > 1000
    in_process = few("smoke", range(1), False)[1].run(images(), watch(tmp_path / "none.pt"))
    assert raw["results"][2]["records"] == in_process["records"]
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "jobs").iterdir()}
    options(tmp_path, seeds=(0, 1, 2), methods=["backprop"])  # a further seed; what is done stays
    assert {name: (tmp_path / "jobs" / name).stat().st_mtime_ns for name in times} == times
    assert [run["seed"] for run in json.loads((tmp_path / "results.json").read_text())["results"]] == [0, 1, 2, 0, 1]


def test_bad_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="methods must be of backprop, feedback alignment, got 'dfa'"):
        options(tmp_path, seeds=(0,), methods=["dfa"])
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "backprop-0.json").write_text(json.dumps({"method": "backprop", "seed": 0, "job": {"lr": 1}}))
    with pytest.raises(ValueError, match=r"backprop-0\.json is of another experiment, scale or version"):
        options(tmp_path, seeds=(0,), methods=None)
    assert cli.main(["reproduce", "fig2", "--data-dir", str(tmp_path / "none"), "--out", str(tmp_path / "new")]) == 2
    assert "none" in capsys.readouterr().err
    assert cli.main(["reproduce", "fig2", "--data-dir", str(tmp_path), "--processes", "0"]) == 2
    assert "processes must be an integer in [1, 1024], got 0" in capsys.readouterr().err


def test_a_job_that_fails_stops_the_experiment(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        reproduce(
            "fig2", Experiment("", 1, few, fail, fig2.tables, fig2.figures), tmp_path, scale="smoke", seeds=(0,), faithful=False,  # type: ignore[arg-type]
            methods=None, data_dir="", device="cpu", processes=1, command=[],
        )  # fmt: skip
