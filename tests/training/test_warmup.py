"""Warm-up that ends by itself, the share of the noise's effect that B explains, and the message about a runaway."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fbkernels as fb
from fbkernels.loss import network_of
from fbkernels.training.network import BOUND

pytestmark = pytest.mark.usefixtures("one_thread")
STRUCTURES = ("direct", "layerwise")
SIZES, N = (6, 8, 7, 5), 10
STEPS = math.ceil(BOUND * sum(SIZES[1:-1]) / N)  # of a warm-up that goes to its bound


def mlp(activation: type[nn.Module] = nn.Tanh, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [m for a, b in itertools.pairwise(SIZES) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def batch(step: int, n: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, SIZES[0], dtype=torch.float64, generator=generator).to(dtype), torch.randint(5, (n,), generator=generator)


def gradients(net: nn.Module) -> list[bool]:
    """Whether each is there and not zero."""
    return [p.grad is not None and bool(p.grad.any()) for p in net.parameters()]


def steps(net: nn.Module, which: range, optimizer: torch.optim.Optimizer | None = None, run: Any = None) -> list[bool]:
    """Whether the parameters got a gradient, by step."""
    criterion, moved = fb.PerturbedLoss(nn.CrossEntropyLoss(), net), []
    for t in which:
        x, y = batch(t, dtype=next(net.parameters()).dtype)
        loss = criterion(net(x), y) if run is None else run(net, criterion, x, y)
        net.zero_grad()
        loss.backward()
        moved.append(any(gradients(net)))
        if optimizer is not None:
            optimizer.step()
    return moved


@pytest.mark.parametrize("feedback", STRUCTURES)
@pytest.mark.parametrize("options", [{}, {"every": 3}, {"fraction": 0.5}, {"antithetic": True}], ids=str)
def test_it_ends_after_two_samples_a_unit(feedback: str, options: dict[str, Any]) -> None:
    """Ridge is noise for so long: until then gradients are there and zero, then they are the plain ones."""
    net = fb.convert(mlp(), feedback=feedback, warmup="auto", noise_std=0.1, **options)
    every, rows = options.get("every", 1), math.ceil(options.get("fraction", 1) * N)
    last = every * (math.ceil(BOUND * 15 / rows) - 1)  # the step that shows the last samples
    assert steps(net, range(last + 1)) == [False] * (last + 1)
    (a, b), given = (copy.deepcopy(net) for _ in range(2)), batch(99)
    network_of(b).settings = network_of(fb.convert(mlp(), feedback=feedback, warmup=0, noise_std=0.1, **options)).settings
    network_of(b).warming = False
    grads = []
    for one in (a, b):
        fb.PerturbedLoss(nn.CrossEntropyLoss(), one)(one(given[0]), given[1]).backward()
        grads.append([p.grad for p in one.parameters()])
    assert all(g.any() and torch.equal(g, h) for g, h in zip(*grads, strict=True))


def curve(shares: list[float], rows: int, bound: int) -> int | None:
    """After how many steps of these shares the warm-up has ended."""
    model = fb.convert(mlp(), warmup="auto")
    network = network_of(model)
    for i, share in enumerate(shares):
        network.warm(torch.tensor(share, dtype=torch.float64), rows, bound)
        if not network.holds:
            return i + 1
    return None


def test_it_ends_when_the_share_stops_rising() -> None:
    rng = torch.Generator().manual_seed(0)
    noise = (0.02 * torch.randn(512, generator=rng)).tolist()
    rising = [0.001 * t for t in range(512)]
    assert curve(rising, 10, 10**9) is None  # each stretch has twice the share of the one before
    assert curve(rising, 10, 1000) == 100
    # B that learns within 8 steps: steps 9 to 16 are the first stretch that counts, 17 to 32 are no better
    assert curve([0.5 * (1 - math.exp(-t / 8)) + noise[t] for t in range(512)], 10, 10**9) == 32
    assert curve(noise, 10, 10**9) is None  # it explains nothing yet
    assert curve([-1.0 + v for v in noise], 10, 10**9) is None  # B is noise


def test_rules_that_need_none() -> None:
    rules = {"direct": [fb.LMS(0.1), fb.Fixed(), fb.NodePerturbation(), fb.SyntheticGradient(0.1)]}
    rules["layerwise"] = [fb.WeightMirror(), fb.Fixed(), fb.KolenPollack(), fb.SignSymmetric(), fb.WeightTransport(), fb.LMS(0.1)]
    for feedback, several in rules.items():
        for rule in several:
            net = fb.convert(mlp(), feedback=feedback, rule=rule, warmup="auto")
            assert steps(net, range(1)) == [True]
            assert "warmup" not in network_of(net).state
    for rule in (fb.Ridge(), fb.Joint(), fb.Joint(signal="output"), fb.NormalizedLMS(0.1)):
        assert steps(fb.convert(mlp(), rule=rule, warmup="auto"), range(1)) == [False]
        assert steps(fb.convert(mlp(), rule=rule, warmup=0), range(1)) == [True]


@pytest.mark.parametrize("feedback", STRUCTURES)
def test_resume_bit_for_bit(feedback: str) -> None:
    def run(*parts: range) -> dict[str, Tensor]:
        state: dict[str, Any] = {}
        for part in parts:
            net = fb.convert(mlp(), feedback=feedback, rule=fb.Joint(), warmup="auto", noise_std=0.1)
            optimizer = torch.optim.Adam(net.parameters(), 0.01)
            if state:
                net.load_state_dict(state["net"])
                optimizer.load_state_dict(state["optimizer"])
            steps(net, part, optimizer)
            state = copy.deepcopy({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
        return dict(state["net"])

    whole = run(range(12))
    for parts in ((range(2), range(2, 12)), (range(STEPS), range(STEPS, 12)), (range(7), range(7, 12))):
        again = run(*parts)
        assert again.keys() == whole.keys()
        assert all(torch.equal(again[k], t) for k, t in whole.items())


def test_checkpoints_from_before_load_and_go_on_without_one() -> None:
    net = fb.convert(mlp(), warmup="auto")
    steps(net, range(2))
    state = {k: t for k, t in net.state_dict().items() if not k.endswith(".shared.warmup")}
    assert len(state) == len(net.state_dict()) - 1
    for there in (fb.convert(mlp(), warmup="auto"), net):
        there.load_state_dict(state)
        assert steps(there, range(2, 3)) == [True]


@pytest.mark.parametrize("feedback", STRUCTURES)
def test_accumulation_ends_it_after_as_many_samples(feedback: str) -> None:
    net = fb.convert(mlp(), feedback=feedback, warmup="auto")
    criterion, seen = fb.PerturbedLoss(nn.CrossEntropyLoss(), net), 0
    while True:
        net.zero_grad()
        for x, y in zip(*(t.split(N // 2) for t in batch(seen)), strict=True):
            (criterion(net(x), y) / 2).backward()
        if any(gradients(net)):
            break
        seen += N
    assert seen == STEPS * N


def test_a_plain_state_dict_does_not_end_it() -> None:
    net = fb.convert(mlp(), warmup="auto")
    net.load_state_dict(mlp().state_dict())
    assert network_of(net).holds
    assert steps(net, range(STEPS + 1)) == [False] * STEPS + [True]


def test_adam_counts_no_step_of_it() -> None:
    net = fb.convert(mlp(), warmup="auto")
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.1)
    before = [p.detach().clone() for p in net.parameters()]
    assert not any(steps(net, range(STEPS), optimizer))
    assert not optimizer.state
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("feedback", STRUCTURES)
def test_grad_scaler_finds_gradients(feedback: str) -> None:
    net = fb.convert(mlp(dtype=torch.float32), feedback=feedback, warmup="auto")
    before = [p.detach().clone() for p in net.parameters()]
    criterion, optimizer = fb.PerturbedLoss(nn.CrossEntropyLoss(), net), torch.optim.Adam(net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(STEPS + 1):
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
        x, y = batch(t, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(net(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert not any(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_a_compiled_step_sees_it_end() -> None:
    eager, compiled = (fb.convert(mlp(dtype=torch.float32), rule=fb.Joint(signal="output"), warmup="auto") for _ in range(2))
    run = torch.compile(lambda net, criterion, x, y: criterion(net(x), y), fullgraph=True, dynamic=False, backend="aot_eager")
    one = steps(eager, range(STEPS + 4), torch.optim.SGD(eager.parameters(), 0.1))
    two = steps(compiled, range(STEPS + 4), torch.optim.SGD(compiled.parameters(), 0.1), run)
    assert one == two == [False] * STEPS + [True] * 4
    ours, theirs = eager.state_dict(), compiled.state_dict()
    assert all(torch.allclose(ours[k].double(), theirs[k].double(), atol=1e-5) for k in ours)
    assert torch.equal(ours["0.feedback.shared.warmup"][[0, -1]], torch.tensor([STEPS * N, 1.0]).double())


# the share


def jacobians(net: nn.Sequential) -> list[Tensor]:
    """d output / d h_l of a linear network, units x outputs."""
    above = [m.weight.detach().T for m in net if isinstance(m, nn.Linear)][1:]
    return [above[0] @ above[1], above[1]]


def measured(net: nn.Module, B: list[Tensor], x: Tensor, y: Tensor) -> tuple[float, dict[str, float]]:
    """What ``explained`` says of one step with these B."""
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    criterion(net(x), y).backward()
    for point, value in zip(fb.points(net).values(), B, strict=True):
        point.B = value
    network_of(net).state["explained"].zero_()
    network_of(net).steps = 0
    criterion(net(x), y).backward()
    fb.flush(net)
    return fb.metrics.explained(net)


@pytest.mark.parametrize("warmup", [0, "auto"])
def test_the_share_of_a_linear_network(warmup: int | str) -> None:
    """There ``y~ - y = sum xi_l J_l``, so the share is ``1 - sum |J_l - B_l|^2 / sum |J_l|^2``, and a layer's part
    ``(2 <J_l, B_l> - |B_l|^2) / sum |J|^2``, in the mean over Gaussian noise. n samples have a standard deviation of at most
    ``sqrt(2 / n) E`` in a mean of squares E, and ``sqrt(2 / n E F)`` in one of products."""
    n = 20_000
    net = fb.convert(mlp(nn.Identity), rule=fb.Joint(1e-9, "output"), warmup=warmup)
    J = jacobians(net)
    B = [0.7 * J[0] + 0.1 * torch.randn_like(J[0]), 0.4 * J[1] - 0.05]
    share, parts = measured(net, B, *batch(0, n))
    whole = sum(float(j.square().sum()) for j in J)
    left = sum(float((j - b).square().sum()) for j, b in zip(J, B, strict=True)) / whole
    assert abs(share - (1 - left)) < 5 * math.sqrt(2 / n) * 2 * left
    assert left < 0.6
    for (name, part), j, b in zip(parts.items(), J, B, strict=True):
        square = float(b.square().sum()) / whole
        expected = 2 * float((j * b).sum()) / whole - square
        assert abs(part - expected) < 5 * math.sqrt(2 / n) * (2 * math.sqrt(square) + square + abs(expected)), name


@pytest.mark.parametrize("rule", [fb.Ridge(), fb.Joint()], ids=["ridge", "joint"])
@pytest.mark.parametrize("feedback", STRUCTURES)
def test_the_true_B_explains_all(feedback: str, rule: fb.Rule) -> None:
    """In a linear network ``dL = e . (y~ - y) + O(|y~ - y|^2)``, the second term no more than sigma |J| / |e|, and the share's fault its
    square."""
    net = fb.convert(mlp(nn.Identity), feedback=feedback, rule=rule, noise_std=1e-5, warmup="auto")
    above = [m.weight.detach().T for m in net if isinstance(m, nn.Linear)][1:]
    share, parts = measured(net, jacobians(net) if feedback == "direct" else above, *batch(0, 200))
    assert 1 - 1e-6 < share <= 1
    assert list(parts) == list(fb.points(net))
    # of a sample half the cross terms of the two layers' parts are negative: they cancel in the mean, to 5 in sqrt(200)
    assert abs(sum(parts.values()) - 1) < 2 * 5 / math.sqrt(200)
    table = fb.summary(net)
    assert table.explained == share
    assert [row.explained for row in table] == list(parts.values())
    assert f"B explains {share:.1%}" in str(table)


def test_the_share_is_the_same_of_a_batch_and_of_its_backends() -> None:
    shares = []
    for backend in ("reference", "auto"):
        net = fb.convert(mlp(dtype=torch.float32), rule=fb.Joint(signal="output"), warmup="auto", backend=backend)
        steps(net, range(STEPS))
        shares.append(fb.metrics.explained(net)[0])
    assert shares[0] == pytest.approx(shares[1], abs=1e-4)  # float32 products of a few terms


def test_nothing_is_explained_without_noise() -> None:
    for feedback, rule in (("direct", fb.Fixed()), ("layerwise", fb.WeightMirror()), ("direct", fb.NodePerturbation())):
        net = fb.convert(mlp(), feedback=feedback, rule=rule)
        steps(net, range(2))
        assert math.isnan(fb.metrics.explained(net)[0])
        assert "explains" not in str(fb.summary(net))
    fresh = fb.convert(mlp())
    assert math.isnan(fb.metrics.explained(fresh)[0])
    with pytest.raises(TypeError, match="net must be a network converted"):
        fb.metrics.explained(mlp())


def test_metrics_leave_it_alone() -> None:
    net = fb.convert(mlp(), rule=fb.Joint(), warmup="auto")
    steps(net, range(2))
    before = copy.deepcopy(net.state_dict())
    fb.metrics.alignment(net, nn.CrossEntropyLoss(), *batch(5))
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


@pytest.mark.parametrize("warmup", ["auto", 2])
@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_its_gradients_are_zero(feedback: str, warmup: str | int) -> None:
    """For hooks, torch.autograd.grad and loops by hand too, whatever affine stands between the network and its loss."""
    net = fb.convert(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)), feedback=feedback, rule=fb.Ridge(), warmup=warmup)
    criterion, x, y = fb.PerturbedLoss(nn.MSELoss(), net), torch.randn(9, 8), torch.randn(9)
    heard: list[Tensor] = []
    net[0].weight.register_hook(heard.append)
    zeros = [torch.zeros_like(p) for p in net.parameters()]
    criterion(net(x).squeeze(1), y).backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], zeros, rtol=0, atol=0)
    torch.testing.assert_close(heard, zeros[:1], rtol=0, atol=0)
    gradients = torch.autograd.grad(criterion(net(x).squeeze(1), y), [*net.parameters()])
    torch.testing.assert_close(gradients, tuple(zeros), rtol=0, atol=0)


def test_a_penalty_on_the_weights_counts_in_it() -> None:
    net = fb.convert(mlp(), rule=fb.Joint(), warmup="auto")
    criterion, optimizer = fb.PerturbedLoss(nn.CrossEntropyLoss(), net), torch.optim.SGD(net.parameters(), 0.1)
    x, y = batch(0)
    first, *_, last = net.parameters()
    before = first.detach().clone(), last.detach().clone()
    (criterion(net(x), y) + first.square().sum()).backward()
    optimizer.step()
    torch.testing.assert_close(first.detach(), 0.8 * before[0])
    assert torch.equal(last, before[1])
    assert not last.grad.any()


def test_a_plain_criterion_is_told_in_it() -> None:
    net = fb.convert(mlp(), rule=fb.Joint(), warmup="auto")
    x, y = batch(0)
    with pytest.warns(UserWarning, match="got its gradient from a loss that is no PerturbedLoss"):
        nn.CrossEntropyLoss()(net(x), y).backward()


# a runaway


def test_the_constant_guess() -> None:
    y = torch.tensor([0, 0, 1, 2])
    entropy = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert fb.metrics.constant_guess(nn.CrossEntropyLoss(), y) == pytest.approx(entropy)
    assert fb.metrics.constant_guess(nn.CrossEntropyLoss(), torch.arange(100)) == pytest.approx(math.log(100))
    smooth = nn.CrossEntropyLoss(label_smoothing=0.3)
    best = (0.7 * torch.tensor([0.5, 0.25, 0.25]) + 0.1).log()
    assert fb.metrics.constant_guess(smooth, y) == pytest.approx(float(smooth(best.expand(4, 3), y)))
    t = torch.randn(50, 3)
    assert fb.metrics.constant_guess(nn.MSELoss(), t) == pytest.approx(float(nn.MSELoss()(t.mean(0).expand(50, 3), t)), rel=1e-5)
    unknown = (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(weight=torch.ones(3)), nn.L1Loss(), lambda a, b: a)
    assert [fb.metrics.constant_guess(c, y) for c in unknown] == [None] * 4
    assert fb.metrics.constant_guess(nn.CrossEntropyLoss(), y[:0]) is None
    assert fb.metrics.runaway(nn.Linear(2, 2), [], None) is None


def test_a_runaway_is_named_once() -> None:
    guess = math.log(5)
    net = fb.convert(mlp(), warmup=0)
    for fine in ([guess], [9.0, 1.2 * guess], [1.2 * guess]):
        assert fb.metrics.runaway(net, fine, guess) is None
    said = fb.metrics.runaway(net, [5489.0], guess)
    assert said is not None
    seen, helps = said.split("What helps, in this order: ")
    assert "5489" in seen
    assert "1.609" in seen
    assert [h.split()[1] for h in helps.split("; ")] == ["normalisation", "warm-up,", "lower"]
    assert fb.metrics.runaway(net, [6000.0], guess) is None

    warming = fb.convert(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)).double(), warmup="auto")
    assert fb.metrics.runaway(warming, [9.0], guess) is None  # its parameters stand still
    steps(warming, range(3))
    assert (fb.metrics.runaway(warming, [9.0], guess) or "").endswith("in this order: a lower learning rate")

    other = fb.convert(mlp(), rule=fb.LMS(0.1), warmup=1)
    assert fb.metrics.runaway(other, [math.nan], None) is None
    fb.PerturbedLoss(nn.CrossEntropyLoss(), other)(other(batch(0)[0]), batch(0)[1]).backward()
    assert fb.metrics.runaway(other, [1e30], None) is None  # nothing is known to compare it with
    assert "is nan" in (fb.metrics.runaway(other, [math.nan], None) or "")
    assert fb.metrics.runaway(mlp(), [1.2 * guess, 1.2 * guess], guess)  # it stays
    assert "is 7, and" in (fb.metrics.runaway(mlp(), [7.0], guess) or "")  # a plain one, too
