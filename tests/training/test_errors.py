"""Bad input: an error that names the argument, the value and what was expected, before anything is written (see DESIGN)."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fbkernels as fb

X, Y = torch.linspace(-2, 2, 24).sin().view(6, 4), torch.arange(6) % 5
NAN, INF = math.nan, math.inf


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 6), nn.Sigmoid(), nn.Linear(6, 5))


def trained(**options: Any) -> nn.Module:
    net = fb.convert(mlp(), **{"rule": fb.LMS(0.1), "noise_std": 0.1, **options})
    fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(X), Y).backward()
    net.zero_grad()
    return net


def snapshot(net: nn.Module) -> list[Any]:
    return [(k, v.clone()) for k, v in net.state_dict().items()] + [p.grad is None for p in net.parameters()]


@contextlib.contextmanager
def untouched(*nets: nn.Module) -> Iterator[None]:
    """Random number generator, parameters, statistics, B, step and gradients are those of before."""
    before, random = [snapshot(n) for n in nets], torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), random)
    for net, old in zip(nets, before, strict=True):
        for a, b in zip(snapshot(net), old, strict=True):
            assert a == b if isinstance(a, bool) else a[0] == b[0] and torch.equal(a[1], b[1]), a


# the arguments of convert

CONVERT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"noise_std": -0.1}, ValueError, "noise_std must be a finite number > 0, got -0.1"),
    ({"noise_std": 0}, ValueError, "noise_std must be a finite number > 0, got 0"),
    ({"noise_std": NAN}, ValueError, "noise_std must be a finite number > 0, got nan"),
    ({"noise_std": INF}, ValueError, "noise_std must be a finite number > 0, got inf"),
    ({"noise_std": "0.1"}, TypeError, "noise_std must be a finite number > 0, got '0.1'"),
    ({"noise_std": True}, TypeError, "noise_std must be a finite number > 0, got True"),
    ({"noise_std": None}, TypeError, "noise_std must be a finite number > 0, got None"),
    ({"noise": "uniform"}, ValueError, "noise must be one of 'gaussian', 'rademacher', got 'uniform'"),
    ({"feedback": "random"}, ValueError, "feedback must be one of 'direct', 'layerwise', got 'random'"),
    ({"rule": "ridge"}, TypeError, r"rule must be an fbkernels rule such as Ridge\(\), got 'ridge'"),
    ({"rule": fb.Ridge}, TypeError, r"rule must be an fbkernels rule such as Ridge\(\), got <class"),
    ({"rule": fb.WeightTransport()}, ValueError, r"feedback must be 'layerwise' with WeightTransport\(\), got 'direct'"),
    ({"rule": fb.WeightMirror()}, ValueError, r"feedback must be 'layerwise' with WeightMirror\(samples=None\), got 'direct'"),
    ({"rule": fb.KolenPollack()}, ValueError, r"feedback must be 'layerwise' with KolenPollack\(decay=0.0\), got 'direct'"),
    (
        {"rule": fb.Joint(signal="output"), "feedback": "layerwise"},
        ValueError,
        r"feedback must be 'direct' with Joint\(lr=0.2, signal='output'\)",
    ),
    ({"seed": -1}, ValueError, "seed must be an integer in .*, got -1"),
    ({"seed": 2**64}, ValueError, "seed must be an integer in .*, got 18446744073709551616"),
    ({"seed": 1.5}, TypeError, "seed must be an integer in .*, got 1.5"),
    ({"every": 0}, ValueError, "every must be an integer in .*, got 0"),
    ({"every": 2.0}, TypeError, "every must be an integer in .*, got 2.0"),
    ({"fraction": 0}, ValueError, r"fraction must be in \(0, 1\], got 0"),
    ({"fraction": 1.5}, ValueError, r"fraction must be in \(0, 1\], got 1.5"),
    ({"fraction": NAN}, ValueError, r"fraction must be in \(0, 1\], got nan"),
    ({"antithetic": "no"}, TypeError, "antithetic must be .*, got 'no'"),
    ({"warmup": -1}, ValueError, "warmup must be an integer in .*, got -1"),
    ({"warmup": "3"}, TypeError, "warmup must be an integer in .*, got '3'"),
    ({"backend": "gpu"}, ValueError, "backend must be one of 'auto', 'reference', 'cpp', 'triton', 'cuda', got 'gpu'"),
    ({"points": ["1", "9"]}, ValueError, "points: '9' is no module of the model; it has '0', '1'"),
    ({"points": [""]}, ValueError, "points: '' is no module"),
    ({"points": []}, ValueError, r"points must name each module once, and at least one, got \[\]"),
    ({"points": ["1", "1"]}, ValueError, r"points must name each module once, and at least one, got \['1', '1'\]"),
    ({"points": [1]}, (ValueError, TypeError), "points: 1 is no module"),
    ({"include": "conv*"}, ValueError, "no hidden Linear or convolution layer .*'0', '3', '5'"),
    ({"exclude": "*"}, ValueError, "no hidden Linear or convolution layer"),
    ({"include": 3}, TypeError, "include must be .*, got 3"),
]  # type: ignore[assignment]


@pytest.mark.parametrize(("options", "error", "message"), CONVERT, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_arguments_of_convert(options: dict[str, Any], error: Any, message: str) -> None:
    model = mlp()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with untouched(model), pytest.raises(error, match=message):
        fb.convert(model, **options)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert len(list(model.modules())) == 7


@given(
    value=st.one_of(st.floats(max_value=0), st.just(NAN), st.just(INF), st.text(max_size=3), st.none(), st.booleans(), st.complex_numbers())
)
@settings(max_examples=60, deadline=None)
def test_sigma_is_a_finite_positive_number(value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(f"noise_std must be a finite number > 0, got {value!r}")):
        fb.convert(mlp(), noise_std=value)


def test_a_backend_asked_for_by_name_is_there_or_the_error_says_how_to_get_it() -> None:
    model = mlp()
    for name, state in fb.backends().items():
        if name == "reference":
            assert state == "available"
        elif not state.startswith("available"):
            with untouched(model), pytest.raises(RuntimeError, match=f"backend '{name}' is "):
                fb.convert(model, backend=name)
    if not fb.build_info()["cuda"]:
        with pytest.raises(RuntimeError, match="FBK_CUDA=1 pip install"):
            fb.convert(model, backend="cuda")
    assert fb.convert(model, backend="auto") is not model


def test_a_model_that_is_none_and_one_that_is_converted() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        fb.convert(test_a_model_that_is_none_and_one_that_is_converted)
    net = trained()
    with untouched(net), pytest.raises(ValueError, match=r"converted already: use fbkernels.revert"):
        fb.convert(net)
    outer = nn.Sequential(net, nn.Linear(5, 5))
    with untouched(net), pytest.raises(ValueError, match="converted already"):
        fb.convert(outer)


@pytest.mark.parametrize(
    "model", [nn.Linear(4, 5), nn.Sequential(nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU())], ids=str
)
def test_no_hidden_layer(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="model has no hidden Linear or convolution layer to put a feedback point after: its layers are"):
        fb.convert(model)


def test_a_name_that_is_taken() -> None:
    model = mlp()
    model.feedback = nn.Linear(5, 5)
    with pytest.raises(ValueError, match="attribute 'feedback', the name fbkernels needs: rename it"):
        fb.convert(model)
    model = mlp()
    model[0].feedback = "mine"
    with untouched(model), pytest.raises(ValueError, match="module '0' has an attribute 'feedback'"):
        fb.convert(model)


# the rules

RULES: list[tuple[Callable[[], Any], Any, str]] = [
    (lambda: fb.Ridge(gamma=0), ValueError, "gamma must be a finite number > 0, got 0"),
    (lambda: fb.Ridge(gamma=-1.0), ValueError, "gamma must be a finite number > 0, got -1.0"),
    (lambda: fb.Ridge(gamma=NAN), ValueError, "gamma must be a finite number > 0, got nan"),
    (lambda: fb.Ridge(gamma=INF), ValueError, "gamma must be a finite number > 0, got inf"),
    (lambda: fb.Ridge(gamma="1"), TypeError, "gamma must be a finite number > 0, got '1'"),
    (lambda: fb.Ridge(forgetting=0), ValueError, r"forgetting must be in \(0, 1\], got 0"),
    (lambda: fb.Ridge(forgetting=1.01), ValueError, r"forgetting must be in \(0, 1\], got 1.01"),
    (lambda: fb.Ridge(forgetting=NAN), ValueError, r"forgetting must be in \(0, 1\], got nan"),
    (lambda: fb.Ridge(forgetting=None), TypeError, r"forgetting must be in \(0, 1\], got None"),
    (lambda: fb.LMS(0), ValueError, "lr must be a finite number > 0, got 0"),
    (lambda: fb.LMS(-1), ValueError, "lr must be a finite number > 0, got -1"),
    (lambda: fb.LMS(INF), ValueError, "lr must be a finite number > 0, got inf"),
    (lambda: fb.NormalizedLMS(0), ValueError, r"lr must be in \(0, 2\), got 0"),
    (lambda: fb.NormalizedLMS(2), ValueError, r"lr must be in \(0, 2\), got 2"),
    (lambda: fb.Joint(0), ValueError, r"lr must be in \(0, 1\], got 0"),
    (lambda: fb.Joint(1.5), ValueError, r"lr must be in \(0, 1\], got 1.5"),
    (lambda: fb.Joint(signal="noise"), ValueError, "signal must be one of 'loss', 'output', got 'noise'"),
    (lambda: fb.WeightMirror(0), ValueError, r"samples must be an integer in \[1, \d+\], got 0"),
    (lambda: fb.KolenPollack(1), ValueError, r"decay must be in \[0, 1\), got 1"),
    (lambda: fb.KolenPollack(-0.1), ValueError, r"decay must be in \[0, 1\), got -0.1"),
    (lambda: fb.SyntheticGradient(0), ValueError, "lr must be a finite number > 0, got 0"),
    (lambda: fb.Linear(3, 4, activation="swish"), ValueError, "activation must be one of .*, got 'swish'"),
    (lambda: fb.Conv2d(3, 4, 3, activation=None), ValueError, "activation must be one of .*, got None"),
]


@pytest.mark.parametrize(("make", "error", "message"), RULES, ids=[m for _, _, m in RULES])
def test_arguments_of_rules_and_layers(make: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_an_update_that_is_missing() -> None:
    class Mine(fb.Rule):
        pass

    net = fb.convert(mlp(), rule=Mine())
    with pytest.raises(NotImplementedError, match="Mine does not update B"):
        fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(X), Y)


# the criterion


@pytest.mark.parametrize("net", [mlp(), None, "net"], ids=["module", "None", "str"])
def test_a_network_that_is_not_converted(net: Any) -> None:
    uses = [lambda: fb.PerturbedLoss(nn.CrossEntropyLoss(), net), lambda: fb.points(net), lambda: fb.flush(net), lambda: fb.revert(net)]
    for use in (*uses, lambda: fb.summary(net)):
        with pytest.raises(TypeError, match=f"net must be a network converted by fbkernels.convert, got {type(net).__name__}"):
            use()


@pytest.mark.parametrize("criterion", [3, None, "mse"])
def test_a_criterion_that_cannot_be_called(criterion: Any) -> None:
    with pytest.raises(TypeError, match=f"criterion must be .*, got {criterion!r}"):
        fb.PerturbedLoss(criterion, trained())


@pytest.mark.parametrize(
    "criterion",
    [
        lambda o, t: F.cross_entropy(o, t),
        lambda o, t: F.cross_entropy(o, t, reduction="none")[:3],
        lambda o, t: F.cross_entropy(o, t).reshape(1),
    ],
    ids=["scalar", "too few", "shape (1,)"],
)
def test_a_criterion_without_per_sample_losses(criterion: Any) -> None:
    net = trained()
    out = net(X)
    with (
        untouched(net),
        pytest.raises(ValueError, match=r"criterion must give one loss per sample, got shape \(.*\) for 6 samples: pass a module"),
    ):
        fb.PerturbedLoss(criterion, net)(out, Y)


def test_a_criterion_with_parameters() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(ValueError, match="criterion has parameters that require a gradient"):
        fb.PerturbedLoss(Learned(), trained())
    with pytest.raises((ValueError, TypeError), match="criterion"):
        fb.PerturbedLoss(trained(), nn.CrossEntropyLoss())  # the arguments swapped


def test_a_criterion_with_reduction_none_and_a_loss_an_element() -> None:
    net = trained()
    out = net(X)
    with untouched(net), pytest.raises(ValueError, match=r"reduction='none' must return shape \(6,\), got \(6, 5\): use 'mean' or 'sum'"):
        fb.PerturbedLoss(nn.MSELoss(reduction="none"), net)(out, torch.zeros(6, 5))


TARGETS: dict[str, Callable[[], Any]] = {
    "too few": lambda: Y[:4],
    "a class out of range": lambda: torch.full((6,), 5),
    "float classes": lambda: Y.float(),
    "another device": lambda: Y.to("meta"),
    "a list": lambda: Y.tolist(),
}


@pytest.mark.parametrize("target", TARGETS)
def test_wrong_targets_write_nothing(target: str) -> None:
    net = trained()
    criterion, out = fb.PerturbedLoss(nn.CrossEntropyLoss(), net), net(X)
    with untouched(net), pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
        criterion(out, TARGETS[target]())
    criterion(out, Y).backward()  # and the step can still be done
    assert int(net.state_dict()["0.feedback.shared.step"]) == 2


def test_other_logits() -> None:
    net, other = trained(), trained()
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    message = "must be called once, with the output of its own network's last training forward"
    first, second = net(X), net(X)
    foreign = other(X)
    for logits in (first, second.exp(), second.detach(), foreign, torch.zeros(6, 5), None):
        with untouched(net, other), pytest.raises((ValueError, TypeError), match=message):
            criterion(logits, Y)
    criterion(second, Y).backward()
    net.zero_grad()
    with untouched(net), pytest.raises(ValueError, match=message):
        criterion(second, Y)
    net.eval()
    out = net(X)
    net.train()
    with pytest.raises(ValueError, match=message):
        criterion(out, Y)


# the forward


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.out(torch.tanh(self.b(h)))


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_a_named_point_that_runs_twice(feedback: str) -> None:
    net = fb.convert(Twice(), feedback=feedback, points=["a", "b"])
    with untouched(net), pytest.raises(ValueError, match=r"point 'b' runs twice in one forward.*let convert find the points"):
        net(X)
    net.eval()(X)


class Unused(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


def test_points_that_do_not_run() -> None:
    with pytest.raises(ValueError, match="no feedback point was reached in the forward pass"):
        fb.convert(Unused())(X)


def test_points_are_numbered_in_running_order() -> None:
    class Reversed(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.a(torch.tanh(self.b(x)))))

    for options in ({}, {"points": ["a", "b"]}, {"feedback": "layerwise"}):
        net = fb.convert(Reversed(), **options)
        assert [(n, p.index) for n, p in fb.points(net).items()] == [("a", 0), ("b", 1)]
        fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(X), Y).backward()
        assert [(n, p.index) for n, p in fb.points(net).items()] == [("b", 0), ("a", 1)]


class HeadFirst(nn.Module):
    """The output layer is registered first, so convert takes it for a hidden one."""

    def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.body, self.last = nn.Linear(6, 5), nn.Linear(4, 6), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(torch.tanh(self.body(x))))


@pytest.mark.parametrize(
    "last",
    [lambda z: z, lambda z: F.log_softmax(z, -1), lambda z: z.flatten(1), lambda z: 2 * z],
    ids=["", "log_softmax", "flatten", "2 z"],
)
def test_the_output_is_never_perturbed(last: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"'head'.*output"):
        fb.convert(HeadFirst(last), points=["head"])(X)
    # the output layer is the one that leads nowhere else, in whatever order the model holds its layers
    for options in ({}, {"points": ["body"]}, {"feedback": "layerwise"}):
        net = fb.convert(HeadFirst(last), **options)
        fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(X), Y).backward()
        assert net.head.weight.grad is not None
        assert len(fb.points(net)) == 1


def test_inputs_and_outputs_that_are_no_batch() -> None:
    class Wrong(nn.Module):
        def __init__(self, result: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.a, self.b, self.result = nn.Linear(4, 4), nn.Linear(4, 5), result

        def forward(self, x: Any) -> Any:
            return self.result(self.b(self.a(x)))

    for result, name in ((lambda z: torch.zeros(6, 5), "Tensor"), (lambda z: None, "NoneType"), (lambda z: ([], {}), "tuple")):
        with pytest.raises(TypeError, match=f"forward must return tensors computed from its input, got {name}"):
            fb.convert(Wrong(result))(X)
    for bad in (torch.tensor(1.0), 3, None):
        with pytest.raises(ValueError, match="needs a tensor with a batch dimension as input"):
            fb.convert(Wrong(lambda z: z))(bad)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "features": lambda: X[:, :3],
    "dtype": lambda: X.double(),
    "integers": lambda: torch.ones(6, 4, dtype=torch.int64),
    "device": lambda: X.to("meta"),
}


@pytest.mark.parametrize("bad", INPUTS)
@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_wrong_inputs_write_nothing_and_the_next_step_is_the_same(feedback: str, bad: str) -> None:
    net = trained(feedback=feedback)
    other = copy.deepcopy(net)
    with untouched(net), pytest.raises((ValueError, TypeError, RuntimeError)):
        net(INPUTS[bad]())
    for n in (net, other):
        fb.PerturbedLoss(nn.CrossEntropyLoss(), n)(n(X), Y).backward()
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


class Fan(Twice):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.out(torch.tanh(self.b(h)) + h)


def test_layerwise_needs_a_layer_that_reads_the_point() -> None:
    class Pre(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.a(x) + self.b(x))

    with pytest.raises(ValueError, match=r"layerwise feedback: no layer reads point 'a' directly: use feedback='direct'"):
        fb.convert(Pre(), feedback="layerwise", points=["a", "b"])(X)


def test_a_supervised_layer_learns_from_its_own_part_of_a_gradient() -> None:
    net = fb.convert(Fan(), feedback="layerwise", rule=fb.SyntheticGradient(0.1))
    fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(X), Y).backward()
    assert list(fb.points(net)) == ["b.input", "out.input"]


def test_random_layers_share_their_draws() -> None:
    torch.manual_seed(0)
    net = fb.convert(nn.Sequential(nn.Linear(4, 400), nn.AlphaDropout(), nn.Linear(400, 5)).double(), rule=fb.LMS(0.1), noise_std=1e-9)
    net(X.double())
    assert net.feedback.current.changes[0].abs().max() < 1e-6


def test_random_layers_that_cannot_be_shared() -> None:
    net = fb.convert(nn.Sequential(nn.Linear(4, 4), nn.RReLU(), nn.Linear(4, 5)))
    with untouched(net), pytest.raises(ValueError, match="rrelu draws random numbers that the two streams cannot share: use dropout"):
        net(X)


class Straight(torch.autograd.Function):
    """sign with the derivative of the identity."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:  # type: ignore[override]
        return z.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g


class Binary(nn.Module):
    def __init__(self, **places: bool) -> None:
        super().__init__()
        self.a, self.b, self.out, self.point, self.places = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5), fb.FeedbackPoint(), places

    def forward(self, x: Tensor) -> Tensor:
        sign = lambda name, z: Straight.apply(z) if name in self.places else z  # noqa: E731
        h = sign("hidden", self.a(sign("input", x)))
        h = self.point(Straight.apply(h) * 1 if "scaled" in self.places else h)
        return sign("output", self.out(sign("after", h)))


@pytest.mark.parametrize("place", ["input", "hidden", "scaled", "after", "output"])
def test_a_custom_function_has_its_gradient_or_is_refused(place: str) -> None:
    """torch shows a custom autograd.Function to nobody, so the second stream may be lost in it, but never without a word."""
    model = Binary(**{place: True})
    net = fb.convert(model, rule=fb.Fixed())
    try:
        fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(X), Y).backward()
    except (TypeError, ValueError) as error:
        assert "custom autograd.Function" in str(error)  # noqa: PT017
        return
    x = X.sign() if place == "input" else X
    z = model.a(x).detach()
    h = z.sign() if place in ("hidden", "scaled", "after") else z
    r = model.out(h).detach()
    e = ((r.sign() if place == "output" else r).softmax(1) - F.one_hot(Y, 5)) / 6
    B = fb.points(net)["point"].B
    torch.testing.assert_close(model.out.weight.grad, e.T @ h, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.a.weight.grad, (e @ B.T).T @ x, rtol=0, atol=1e-6)


# B


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(7, 4), ValueError, r"B of point '0' must have shape \(7, 5\), got \(7, 4\)"),
        (torch.zeros(7, 5, dtype=torch.int64), (ValueError, TypeError), "B of point '0' must .*int64"),
        (torch.zeros(7, 5, device="meta"), (ValueError, TypeError), "B of point '0' must .*meta"),
        (torch.full((7, 5), NAN), ValueError, "B of point '0' must .*finite"),
        ("B", (ValueError, TypeError), "B of point '0' must .*'B'"),
        (None, (ValueError, TypeError), "B of point '0' must .*None"),
    ],
    ids=["shape", "dtype", "device", "nan", "str", "None"],
)
def test_assigning_a_wrong_B(value: Any, error: Any, message: str) -> None:
    net = trained()
    with untouched(net), pytest.raises(error, match=message):
        fb.points(net)["0"].B = value


def test_a_new_B_keeps_the_networks_dtype() -> None:
    net = trained()
    fb.points(net)["0"].B = torch.ones(7, 5, dtype=torch.float64)
    assert fb.points(net)["0"].B.dtype == torch.float32
    fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(X), Y).backward()


def test_an_assigned_B_stays_what_was_assigned() -> None:
    """A pending update belongs to the B of before, and the caller's tensor stays the caller's."""
    net = trained()
    point, mine = fb.points(net)["0"], torch.ones(7, 5)
    point.B = mine  # trained() leaves an update pending
    assert torch.equal(point.B, torch.ones(7, 5))
    fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(X), Y)
    assert not torch.equal(point.B, torch.ones(7, 5))
    assert torch.equal(mine, torch.ones(7, 5))


def test_B_of_a_point_without_a_network() -> None:
    point = fb.FeedbackPoint()
    assert point.B is None
    assert torch.equal(point(X), X)
    with pytest.raises(ValueError, match="the point is not part of a converted network"):
        point.B = torch.zeros(4, 5)


def trained_wide() -> nn.Module:
    net = fb.convert(nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 5)))
    fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(X), Y)
    return net


def test_statistics_of_another_network_are_refused_before_anything_is_written() -> None:
    net, other = trained(), trained_wide()
    with untouched(net), pytest.raises((ValueError, RuntimeError)):
        net.load_state_dict(other.state_dict())


def test_a_rule_that_learns_from_layerwise_errors_says_that_it_cannot_be_compiled() -> None:
    net = fb.convert(mlp(), feedback="layerwise")
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    step = torch.compile(lambda x, y: criterion(net(x), y), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"Ridge in layerwise feedback cannot be compiled: use feedback='direct'"):
        step(X, Y)


# a user's mistakes


@pytest.mark.parametrize(("rule", "feedback"), [(fb.Joint(signal="output"), "direct"), (fb.WeightMirror(), "layerwise")], ids=str)
def test_a_plain_criterion_in_training_warns_once(rule: fb.Rule, feedback: str) -> None:
    net = fb.convert(mlp(), rule=rule, feedback=feedback)
    with pytest.warns(UserWarning, match=r"no PerturbedLoss.*: write criterion = fbkernels.PerturbedLoss\(criterion, net\)") as caught:
        sum(nn.CrossEntropyLoss()(net(X), Y) for _ in range(3)).backward()
    assert len(caught) == 1


def test_a_copied_loss_is_the_networks_and_one_pickled_alone_says_what_to_do() -> None:
    net = fb.convert(mlp())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    expected = nn.CrossEntropyLoss()(net.eval()(X), Y)
    alone = pickle.loads(pickle.dumps(criterion))
    assert torch.equal(copy.deepcopy(criterion)(net(X), Y), expected) and torch.equal(alone(net(X), Y), expected)
    net.train()
    copy.deepcopy(criterion)(net(X), Y).backward()
    with pytest.raises(ValueError, match=r"pickle it together with the network, or make another, PerturbedLoss\(criterion, net\)"):
        pickle.loads(pickle.dumps(criterion))(net(X), Y)
    both, loss = pickle.loads(pickle.dumps((net, criterion)))
    loss(both(X), Y).backward()
    assert int(both.feedback.step) == 2


def test_a_converted_network_is_not_scripted() -> None:
    net = trained().eval()
    with pytest.raises(TypeError, match=r"torch.jit.script\(fbkernels.revert\(net\)\)"):
        torch.jit.script(net)
    assert torch.equal(torch.jit.script(fb.revert(net))(X), net(X))
