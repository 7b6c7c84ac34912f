from __future__ import annotations

import copy
import gc
import math
import random
import signal
import threading
from collections.abc import Sequence
from typing import Any

import emulated
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fbkernels as fb
import fbkernels.functional as fn
from fbkernels import _C

EPS = 2.0**-23
SIMD = _C.simd_paths()
RULES = [fb.Ridge(0.1), fb.Ridge(0.1, 0.99), fb.LMS(0.02), fb.Joint(0.2), fb.Joint(0.2, "output"), fb.Fixed(), fb.WeightTransport()]
METHODS = [(rule, feedback) for rule in RULES for feedback in rule.structures]
names = lambda v: repr(v) if isinstance(v, fb.Rule) else None  # noqa: E731


def order(seed: int, samples: int, steps: int, batch: int) -> Tensor:
    """The documented order of the samples, [steps, batch]."""
    epochs = -(-steps * batch // samples)
    stream = [fn.philox_words(seed, k, 2**32 - 1, samples, 1).flatten().argsort(stable=True) for k in range(epochs)]
    return torch.cat(stream)[: steps * batch].view(steps, batch)


def modules(net: fb.FusedMLP, x: Tensor, y: Tensor, steps: int, batch: int, dtype: torch.dtype) -> tuple[list[Tensor], int]:
    """What the modules and a torch optimiser make of it: losses, then layers, then B; and how many samples were skipped."""
    model = net.to_module().to(dtype)
    options: dict[str, Any] = {"noise_std": net.noise_std, "noise": net.noise, "seed": net.seed, "warmup": net.warmup}
    converted = fb.convert(model, feedback=net.feedback, rule=copy.deepcopy(net.rule), **options)
    for point, B in zip(fb.points(converted).values(), net.B, strict=True):
        if net.rule.learned:
            point.state["B"] = B.to(dtype, copy=True)
    criterion = fb.PerturbedLoss(net._criterion, converted)
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer
    if net.optimizer == "adam":
        optimizer = torch.optim.Adam(parameters, lr=net.lr)
    else:
        optimizer = torch.optim.SGD(parameters, lr=net.lr, momentum=0.9 if net.optimizer == "momentum" else 0)
    losses = []
    for rows in order(net.seed, len(x), steps, batch):
        target = y[rows].to(dtype) if y.is_floating_point() else y[rows]
        loss = criterion(converted(x[rows].to(dtype)), target).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    skipped = int(converted.feedback.skipped)  # type: ignore[arg-type, union-attr]
    fb.flush(converted)
    B = [point.B for point in fb.points(converted).values()]
    return [torch.stack(losses), *layers(parameters[::2], parameters[1::2]), *(b.detach() for b in B if b is not None)], skipped


def layers(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat((W, b[:, None]), 1).detach() for W, b in zip(weights, biases, strict=True)]


def learned(net: fb.FusedMLP, losses: Tensor) -> list[Tensor]:
    return [losses, *layers(net.weights, net.biases), *net.B]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def assert_equal_to_modules(net: fb.FusedMLP, x: Tensor, y: Tensor, steps: int, batch: int, slack: int = 4) -> None:
    exact, _ = modules(net, x, y, steps, batch, torch.float64)
    single, _ = modules(net, x, y, steps, batch, torch.float32)
    twin, *data = emulated.moved(net, x, y)
    mine = learned(net, net.fit(x, y, steps=steps, batch_size=batch))
    with emulated.engine():
        on_gpu = learned(twin, twin.fit(*data, steps=steps, batch_size=batch))
    # Both deviations are random, and that of a small tensor can be zero. The scale is the worst of theirs, or what one rounding a layer
    # in both streams does to the outputs' difference, which is the noise. Ours may be twice that, and twice again as the modules form
    # losses in float64.
    scale = max(2 * len(net.weights) * EPS / net.noise_std, *(distance(s, e) for s, e in zip(single, exact, strict=True)))
    for m, g, e in zip(mine, on_gpu, exact, strict=True):
        assert distance(m, e) <= slack * scale
        assert distance(g.cpu(), e) <= slack * scale
    assert twin.step == net.step


def make(sizes: tuple[int, ...], samples: int, classes: bool = True, **options: Any) -> tuple[fb.FusedMLP, Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(samples, sizes[0])
    y = torch.randint(sizes[-1], (samples,)) if classes else torch.randn(samples, sizes[-1])
    return fb.FusedMLP(sizes, **options), x, y


# the same as the modules


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize(("rule", "feedback"), METHODS, ids=names)
def test_learns_what_the_modules_learn(rule: fb.Rule, feedback: str, loss: str, optimizer: str) -> None:
    lr = {"sgd": 2e-3, "momentum": 5e-4, "adam": 1e-3}[optimizer]
    net, x, y = make(
        (23, 18, 9, 5),
        70,
        activations=("tanh", "sigmoid"),
        loss=loss,
        feedback=feedback,
        rule=rule,
        optimizer=optimizer,
        lr=lr,
        warmup=3,
        seed=5,
        noise="rademacher" if optimizer == "adam" else "gaussian",
    )
    assert_equal_to_modules(net, x, y, 30, {"sgd": 13, "momentum": 8, "adam": 32}[optimizer])


@pytest.mark.parametrize("batch", [3, 32])
def test_joint_on_samples_that_are_fitted(batch: int) -> None:
    """Their |r|^2 counts as a hundredth of the batch's mean (rules/joint.py)."""
    net, x, y = make((23, 18, 9, 5), 70, classes=False, rule=fb.Joint(0.2), lr=1e-6, noise_std=0.1)
    y[::2] = net.to_module()(x).detach()[::2] + 1e-4 * y[::2]
    assert_equal_to_modules(net, x, y, 10, batch)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=3, max_size=5),
    batch=st.integers(1, 40),
    activation=st.sampled_from(["identity", "relu", "tanh", "sigmoid", "gelu"]),
    output=st.sampled_from(["identity", "relu", "tanh", "sigmoid", "gelu"]),
    method=st.sampled_from(METHODS),
    simd=st.sampled_from(SIMD),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(sizes: list[int], batch: int, activation: str, output: str, method: tuple[fb.Rule, str], simd: str) -> None:
    rule, feedback = method
    rule = fb.LMS(1e-5) if isinstance(rule, fb.LMS) else rule  # stable in any of these networks
    rule = fb.Ridge(10.0, rule.forgetting) if isinstance(rule, fb.Ridge) else rule
    names = [activation] * (len(sizes) - 2) + [output]
    net, x, y = make(tuple(sizes), 50, classes=False, activations=names, feedback=feedback, rule=rule, lr=1e-4, noise_std=0.1)
    net._simd = simd
    if isinstance(rule, fb.Ridge):  # a deep network may explode in its first steps, until float64 ends
        try:
            exact, _ = modules(net, x, y, 4, batch, torch.float64)
        except torch.linalg.LinAlgError:
            assume(False)
        assume(max(float(t.abs().max()) for t in exact) < 1e4)
    # hypothesis looks for the worst case, a few samples whose loss hardly changes; an index that is wrong shows as an error of order one
    assert_equal_to_modules(net, x, y, 4, batch, slack=32)


def test_both_ridges_are_the_same_regression() -> None:
    """V and its inverse, changed from one to the other by the size of a batch on the way."""
    net, x, y = make((12, 30, 20, 25), 60, classes=False, lr=1e-3)
    twin = copy.deepcopy(net)
    net.fit(x, y, steps=10, batch_size=30)
    assert not net._inverted
    twin.fit(x, y, steps=10, batch_size=30)
    twin._choose_statistics(8)
    assert twin._inverted
    for V, P in zip(net._V, twin._V, strict=True):
        torch.testing.assert_close(V @ P, torch.eye(len(V), dtype=torch.float64), atol=1e-9, rtol=0)
    before = [P.clone() for P in twin._V]
    twin.fit(x, y, steps=5, batch_size=8)
    for P, old in zip(twin._V, before, strict=True):
        assert torch.equal(P, P.T)
        assert float(torch.linalg.eigvalsh(P)[0]) > 0
        assert float(torch.linalg.eigvalsh(old - P)[0]) >= -1e-12  # what is learned only shrinks the uncertainty


def test_targets_by_class_are_one_hot() -> None:
    net, x, y = make((6, 5, 4), 20)
    twin = copy.deepcopy(net)
    a = net.fit(x, y, steps=10, batch_size=4)
    b = twin.fit(x, torch.nn.functional.one_hot(y, 4).float(), steps=10, batch_size=4)
    assert torch.equal(a, b)
    assert torch.equal(net.B[0], twin.B[0])


def test_weight_transport_is_backprop() -> None:
    net, x, y = make((20, 15, 10, 4), 64, rule=fb.WeightTransport(), loss="cross_entropy", activations="gelu", lr=1e-2)
    model = net.to_module()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    net.fit(x, y, steps=20, batch_size=16)
    for rows in order(0, 64, 20, 16):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="sum").backward()
        optimizer.step()
    for mine, theirs in zip(net.to_module().parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


# a run is a pure function of the seed, the data and the settings


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40), samples=st.integers(0, 5000))
@settings(max_examples=30, deadline=None)
def test_order_of_an_epoch(seed: int, epoch: int, samples: int) -> None:
    out = torch.empty(samples, dtype=torch.int64)
    _C.shuffle(out, seed, epoch)
    assert torch.equal(out, fn.philox_words(seed, epoch, 2**32 - 1, samples, 1).flatten().argsort(stable=True))


def test_order_is_stable_where_words_are_equal() -> None:
    samples = 200_000  # among which 2^32 words repeat about five times
    words = fn.philox_words(3, 0, 2**32 - 1, samples, 1).flatten()
    assert len(words.unique()) < samples
    out = torch.empty(samples, dtype=torch.int64)
    _C.shuffle(out, 3, 0)
    assert torch.equal(out, words.argsort(stable=True))


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [20, 48])
@pytest.mark.parametrize(("rule", "feedback"), METHODS, ids=names)
def test_thread_count_changes_no_bit(rule: fb.Rule, feedback: str, batch: int, threads: Any) -> None:
    results = []
    for count in (1, 2):
        threads(count)
        rule = fb.LMS(1e-5) if isinstance(rule, fb.LMS) else rule  # stable at this size
        net, x, y = make((130, 290, 37, 50), 60, classes=False, rule=rule, feedback=feedback, optimizer="adam", lr=1e-4)
        results.append(learned(net, net.fit(x, y, steps=12, batch_size=batch)))
    assert all(a.isfinite().all() and torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("cuts", [[20], [1] * 20, [7, 0, 13]])
@pytest.mark.parametrize("sizes", [(9, 8, 4, 3), (9, 8, 40, 33)], ids=["V", "P"])
def test_cutting_a_run_changes_no_bit(sizes: tuple[int, ...], cuts: list[int]) -> None:
    net, x, y = make(sizes, 23, optimizer="momentum", warmup=5)
    whole = learned(net, net.fit(x, y, steps=20, batch_size=6))
    net, x, y = make(sizes, 23, optimizer="momentum", warmup=5)
    parts = torch.cat([net.fit(x, y, steps=n, batch_size=6) for n in cuts])
    assert net.step == 20
    assert all(torch.equal(a, b) for a, b in zip(learned(net, parts), whole, strict=True))


@pytest.mark.parametrize("sizes", [(9, 8, 4, 3), (9, 8, 40, 33)], ids=["V", "P"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_a_checkpoint_resumes_bit_for_bit(sizes: tuple[int, ...], optimizer: str, tmp_path: Any) -> None:
    options: dict[str, Any] = {"optimizer": optimizer, "warmup": 3}
    net, x, y = make(sizes, 23, seed=4, **options)
    net.fit(x, y, steps=9, batch_size=6)
    torch.save(net.state_dict(), tmp_path / "checkpoint.pt")
    rest = learned(net, net.fit(x, y, steps=11, batch_size=6))
    other = fb.FusedMLP(sizes, seed=77, **options)
    other.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert other.step == 9
    assert all(torch.equal(a, b) for a, b in zip(learned(other, other.fit(x, y, steps=11, batch_size=6)), rest, strict=True))


def test_a_foreign_or_damaged_checkpoint_changes_nothing() -> None:
    net, x, y = make((9, 8, 4, 3), 23)
    net.fit(x, y, steps=3, batch_size=6)
    before = net.state_dict()
    other = fb.FusedMLP((9, 8, 4, 3), optimizer="adam").state_dict()
    short, wide = dict(before), dict(before)
    del short["B.0"]
    wide["V.1"] = torch.zeros(4, 4, dtype=torch.float64)
    for bad in (other, short, wide, before | {"seed": -1}, before | {"weights.0": None}, {}, 3):
        with pytest.raises(ValueError, match="state"):
            net.load_state_dict(bad)  # type: ignore[arg-type]
    after = net.state_dict()
    assert all(torch.equal(t, after[k]) if isinstance(t, Tensor) else t == after[k] for k, t in before.items())


def test_start_is_that_of_the_modules() -> None:
    for rule, feedback in METHODS:
        if not rule.learned:
            continue
        net = fb.FusedMLP((10, 8, 6, 4), rule=rule, feedback=feedback, seed=9)
        converted = fb.convert(net.to_module(), feedback=feedback, rule=copy.deepcopy(rule), seed=9, warmup=1)
        fb.PerturbedLoss(net._criterion, converted)(converted(torch.zeros(2, 10)), torch.zeros(2, 4))
        for B, point in zip(net.B, fb.points(converted).values(), strict=True):
            assert torch.equal(B, point.state["B"])


def test_warmup_trains_B_alone() -> None:
    net, x, y = make((9, 8, 4, 3), 23, warmup=10)
    before = net.state_dict()
    net.fit(x, y, steps=10, batch_size=6)
    assert all(torch.equal(W, before[f"weights.{i}"]) for i, W in enumerate(net.weights))
    assert all(float(B.abs().max()) > 0 for B in net.B)
    net.fit(x, y, steps=1, batch_size=6)
    assert not any(torch.equal(W, before[f"weights.{i}"]) for i, W in enumerate(net.weights))


def test_weights_are_live() -> None:
    net, x, y = make((9, 8, 4, 3), 23)
    twin = copy.deepcopy(net)
    for W in net.weights:
        W.zero_()
    assert net.fit(x, y, steps=1, batch_size=23)[0] == 23 / 2  # outputs of zero against one-hot targets
    assert twin.fit(x, y, steps=1, batch_size=23)[0] != 23 / 2


# what it learns


def test_ridge_finds_the_weights_of_a_linear_network() -> None:
    """Theorem 2: layerwise B converges to W^T; with W fixed, n B parameters and t samples the error falls like sqrt(n_tot / t)."""
    net, x, _ = make((10, 8, 6, 4), 512, activations="identity", warmup=10**9, noise_std=1e-3)
    y = net.to_module()(x).detach() + torch.randn(512, 4)
    steps, batch = 2000, 64
    net.fit(x, y, steps=steps, batch_size=batch)
    for row in net.alignment(x, y).values():
        # the variance of lam is that of all layers' noise: units in all, over units of one layer
        assert row["projected_error"] < 6 * math.sqrt(14 * 6 / (steps * batch))


@pytest.mark.parametrize(("rule", "feedback"), METHODS, ids=names)
def test_learns_digits(rule: fb.Rule, feedback: str) -> None:
    from fbkernels.lab.data import load

    data = load("digits")
    x, test = (data.to_float(t).flatten(1).contiguous() for t in (data.train_x, data.test_x))
    net = fb.FusedMLP((64, 32, 10), loss="cross_entropy", rule=rule, feedback=feedback, lr=5e-3, warmup=50)
    losses = net.fit(x, data.train_y, steps=1500, batch_size=32)
    assert losses[-50:].mean() < 0.25 * losses[:50].mean()
    assert net.evaluate(test, data.test_y)["accuracy"] > 0.9
    assert net.skipped == 0


def test_evaluate_and_alignment_are_those_of_the_modules() -> None:
    net, x, y = make((9, 8, 4, 3), 40, loss="cross_entropy", rule=fb.Fixed())
    outputs = net.to_module()(x)
    expected = torch.nn.functional.cross_entropy(outputs.double(), y)
    got = net.evaluate(x, y, batch_size=7)
    assert got["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert got["accuracy"] == float((outputs.argmax(1) == y).double().mean())
    rows = net.alignment(x, y)
    W, B = net.weights[1].T.double().flatten(), net.B[0].double().flatten()
    angle = math.degrees(math.acos(float(W @ B / (W.norm() * B.norm()))))
    assert rows["0"]["weight_angle"] == pytest.approx(angle, abs=1e-6)
    backprop = fb.FusedMLP((9, 8, 4, 3), rule=fb.WeightTransport(), activations=["relu", "identity"])
    assert all(row["angle"] < 1e-5 for row in backprop.alignment(x, torch.randn(40, 3)).values())


# progress, interrupts, samples that are not finite


def test_progress() -> None:
    net, x, y = make((9, 8, 4, 3), 23)
    seen: list[tuple[int, int]] = []
    net.fit(x, y, steps=5, batch_size=6)
    losses = net.fit(x, y, steps=25, batch_size=6, every=10, progress=lambda step, losses: seen.append((step, len(losses))))
    assert seen == [(15, 10), (25, 20), (30, 25)]
    assert losses.isfinite().all()


def test_ctrl_c_stops_between_steps_and_the_run_goes_on() -> None:
    net, x, y = make((9, 8, 4, 3), 23)
    gc.collect()  # an interrupt inside a weak reference's callback, of which Dynamo has many, is lost
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
    threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            net.fit(x, y, steps=10**9 // 1000, batch_size=6)
    finally:
        signal.signal(signal.SIGINT, before)
    taken = net.step
    assert taken > 0
    other, x, y = make((9, 8, 4, 3), 23)
    other.fit(x, y, steps=taken + 10, batch_size=6)
    net.fit(x, y, steps=10, batch_size=6)
    assert all(torch.equal(a, b) for a, b in zip((*net.weights, *net.B), (*other.weights, *other.B), strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize(("rule", "feedback"), [m for m in METHODS if m[0].perturbs], ids=names)
def test_samples_that_are_not_finite(rule: fb.Rule, feedback: str, loss: str, bad: float) -> None:
    net, x, y = make((9, 8, 4, 3), 20, rule=rule, feedback=feedback, loss=loss, warmup=100)
    x[5] = bad
    exact, expected = modules(net, x, y, 6, 10, torch.float64)
    with pytest.warns(UserWarning, match="non-finite"):
        losses = net.fit(x, y, steps=6, batch_size=10)
    assert net.skipped == expected == 3
    assert int((~losses.isfinite()).sum()) == 3
    for B, b in zip(net.B, exact[-2:], strict=True):
        assert B.isfinite().all()
        assert distance(B, b) < 1e-3
    assert all(V.isfinite().all() for V in net._V)
    net.fit(x, y, steps=4, batch_size=10)  # the one warning was enough; pytest turns none into an error here
    assert net.skipped == 5


@pytest.mark.parametrize("threads_", [1, 2])
def test_a_ridge_beyond_float64_raises(threads_: int, threads: Any) -> None:
    """|r|^2 of 1e13 gamma is refused, of 1e11 gamma regressed like any other; B stays what it was, and W what the step made of it."""
    threads(threads_)
    for outputs, batch in ((33, 6), (700, 32)):
        for power, beyond in ((1e11, False), (1e15, True)):
            net, x, y = make((9, 8, 40, outputs), 64, classes=False, warmup=3, rule=fb.Ridge(1.0), noise_std=0.5)
            net.fit(x, y, steps=2, batch_size=batch)
            before = [B.clone() for B in net.B]
            y *= math.sqrt(power / float((y @ net.B[1].T).square().sum(1).max()))  # the larger regressors are those of the first layer
            if not beyond:
                net.fit(x, y, steps=1, batch_size=batch)
                assert all(B.isfinite().all() for B in (*net.B, *net._V)) and net.step == 3
                assert not any(torch.equal(B, b) for B, b in zip(net.B, before, strict=True))
                continue
            for steps in (1, 5):  # the last of a call too
                with pytest.raises(RuntimeError, match=r"step 2 is beyond float64.*gamma"):
                    copy.deepcopy(net).fit(x, y, steps=steps, batch_size=batch)
            with pytest.raises(RuntimeError, match=r"step 2 is beyond float64.*gamma"):
                net.fit(x, y, steps=5, batch_size=batch)
            assert net.step == 3
            assert all(torch.equal(B, b) for B, b in zip(net.B, before, strict=True))
            assert all(torch.linalg.eigvalsh(P)[0] > 0 for P in net._V)


def test_a_matrix_that_is_not_positive_definite_raises() -> None:
    net, x, y = make((9, 8, 4, 3), 23)
    net._V[1].copy_(-torch.eye(3, dtype=torch.float64) * 1e9)
    before = [B.clone() for B in net.B]
    with pytest.raises(RuntimeError, match=r"step 0 is beyond float64.*gamma"):
        net.fit(x, y, steps=5, batch_size=6)
    assert net.step == 1
    assert all(torch.equal(B, b) for B, b in zip(net.B, before, strict=True))


# bad input


@pytest.mark.parametrize(
    ("sizes", "options", "error", "match"),
    [
        ((3, 2), {}, ValueError, "sizes"),
        ((3, 0, 2), {}, ValueError, "sizes"),
        ((3, 2.5, 2), {}, TypeError, "sizes"),
        ("352", {}, TypeError, "sizes"),
        ((3, 2, 2), {"activations": "softplus"}, ValueError, "activations"),
        ((3, 2, 2), {"activations": ["tanh", "tanh", "tanh"]}, ValueError, "activations"),
        ((3, 2, 2), {"activations": ["tanh", "relu"], "loss": "cross_entropy"}, ValueError, "activations"),
        ((3, 2, 2), {"loss": "mae"}, ValueError, "loss"),
        ((3, 2, 2), {"feedback": "both"}, ValueError, "feedback"),
        ((3, 2, 2), {"rule": fb.NodePerturbation()}, ValueError, "Ridge, LMS, Joint, Fixed, WeightTransport"),
        ((3, 2, 2), {"rule": fb.Joint(0.1, "output")}, ValueError, "feedback"),
        ((3, 2, 2), {"rule": fb.WeightTransport(), "feedback": "direct"}, ValueError, "feedback"),
        ((3, 2, 2), {"noise_std": 0.0}, ValueError, "noise_std"),
        ((3, 2, 2), {"noise_std": math.nan}, ValueError, "noise_std"),
        ((3, 2, 2), {"noise": "uniform"}, ValueError, "noise"),
        ((3, 2, 2), {"optimizer": "lion"}, ValueError, "optimizer"),
        ((3, 2, 2), {"lr": -1.0}, ValueError, "lr"),
        ((3, 2, 2), {"warmup": -1}, ValueError, "warmup"),
        ((3, 2, 2), {"seed": -1}, ValueError, "seed"),
        ((3, 2, 2), {"device": "meta"}, ValueError, "device"),
    ],
)
def test_bad_settings(sizes: Any, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        fb.FusedMLP(sizes, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match=r"device='cuda:0' cannot be had: CUDA is (not )?compiled in"):
        fb.FusedMLP((3, 2, 2), device="cuda:0")


def test_bad_data_changes_nothing() -> None:
    net, x, y = make((9, 8, 4, 3), 23)
    before = net.state_dict()
    good: dict[str, Any] = {"x": x, "y": y, "steps": 2, "batch_size": 4}
    for change, match in [
        ({"x": x.double()}, "x must be float32"),
        ({"x": x[:, :8]}, "x must be"),
        ({"x": x.T.contiguous().T}, "x must be contiguous"),
        ({"x": x[:0], "y": y[:0]}, "x must be"),
        ({"y": y[:5]}, "y must be"),
        ({"y": y.int()}, "y must be"),
        ({"y": y + 1}, "y must be classes"),
        ({"y": torch.zeros(23, 4)}, "y must be"),
        ({"steps": -1}, "steps"),
        ({"batch_size": 24}, "batch_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"every": 0}, "every"),
    ]:
        with pytest.raises(ValueError, match=match):
            net.fit(**(good | change))
    after = net.state_dict()
    assert all(torch.equal(t, after[k]) if isinstance(t, Tensor) else t == after[k] for k, t in before.items())


def test_malformed_calls_of_the_compiled_part_raise() -> None:
    """2,000 calls, each with some arguments replaced by ones that fit another place or none."""
    net, x, y = make((5, 6, 4, 3), 11, classes=False)
    good: dict[str, Any] = {}
    original = _C.fused_mlp
    try:
        _C.fused_mlp = lambda **k: good.update(k) or original(**k)  # type: ignore[assignment]
        net.fit(x, y, steps=2, batch_size=4)
    finally:
        _C.fused_mlp = original
    generator = random.Random(0)
    pool: list[Any] = [
        *good.values(),
        None,
        -1,
        0,
        1.5,
        math.nan,
        2**63,
        "x",
        [],
        [3],
        (5, 6, 4),
        x[:0],
        x.T,
        x.double(),
        y[0],
        torch.zeros(3, 3),
    ]
    pool += [
        torch.full((2, 4), 11),
        torch.full((2, 4), -1),
        torch.zeros(2, 0, dtype=torch.int64),
        x.to("meta"),
        list(net.weights),
        [x, x, x],
    ]
    refused = 0
    for _ in range(2000):
        call = dict(good)
        for name in generator.sample(list(call), generator.randint(1, 3)):
            call[name] = generator.choice(pool)
        call["threads"] = generator.choice((1, 2, 0, call["threads"]))
        try:
            original(**call)
        except (ValueError, TypeError, RuntimeError, MemoryError):
            refused += 1
    assert refused > 1200
