"""Flushing, checkpoints, copies: B's deferred update is never seen (SPEC 5)."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fbkernels as fb

X, Y = torch.linspace(-2, 2, 4 * 6 * 3 * 36).sin().view(4, 6, 3, 6, 6), torch.arange(24).view(4, 6) % 5

DIRECT: dict[str, fb.Rule] = {
    "ridge": fb.Ridge(),
    "ridge forgetting": fb.Ridge(forgetting=0.99),
    "lms": fb.LMS(0.05),
    "nlms": fb.NormalizedLMS(0.5),
    "joint loss": fb.Joint(),
    "joint output": fb.Joint(signal="output"),
    "fixed": fb.Fixed(),
    "synthetic": fb.SyntheticGradient(0.05),
    "node": fb.NodePerturbation(),
}
LAYERWISE: dict[str, fb.Rule] = {
    "ridge": fb.Ridge(),
    "lms": fb.LMS(0.05),
    "nlms": fb.NormalizedLMS(0.5),
    "joint loss": fb.Joint(),
    "mirror": fb.WeightMirror(),
    "fixed": fb.Fixed(),
    "kolen": fb.KolenPollack(0.01),
    "synthetic": fb.SyntheticGradient(0.05),
    "sign": fb.SignSymmetric(),
    "transport": fb.WeightTransport(),
    "node": fb.NodePerturbation(),
}
ALL = [("direct", r) for r in DIRECT] + [("layerwise", r) for r in LAYERWISE]


def rule_of(feedback: str, name: str) -> fb.Rule:
    return copy.deepcopy((DIRECT if feedback == "direct" else LAYERWISE)[name])


def cnn(seed: int = 0, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 6, 2), nn.Tanh(), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5),
    )  # fmt: skip


def convert(feedback: str, rule: str, model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = cnn() if model is None else model
    return fb.convert(model, feedback=feedback, rule=rule_of(feedback, rule), **{"noise_std": 0.1, "seed": 4, **options})


def train(net: nn.Module, first: int, last: int, read: Any = None) -> list[float]:
    criterion, optimizer = fb.PerturbedLoss(nn.CrossEntropyLoss(), net), torch.optim.SGD(net.parameters(), 0.2)
    read = read or (lambda when: None)
    losses = []
    for step in range(first, last):
        torch.manual_seed(100 + step)  # dropout's masks are the user's to resume
        loss = criterion(net(X[step % 4]), Y[step % 4])
        optimizer.zero_grad()
        read("before backward")
        loss.backward()
        read("before step")
        optimizer.step()
        read("after step")
        losses.append(loss.item())
    return losses


def state(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    assert [k for k in a if not torch.equal(a[k], b[k]) or a[k].dtype != b[k].dtype] == []


# when a pending update is flushed


@pytest.mark.parametrize("when", ["before backward", "before step", "after step"])
@pytest.mark.parametrize(("feedback", "rule"), [pair for pair in ALL if pair[1] not in ("fixed", "node", "sign", "transport")])
def test_when_the_update_is_flushed_changes_no_bit(feedback: str, rule: str, when: str) -> None:
    never, often = convert(feedback, rule), convert(feedback, rule)

    def read(now: str) -> None:
        if now == when:
            fb.flush(often)
            _ = [p.B for p in fb.points(often).values()], often.state_dict()

    assert train(never, 0, 4) == train(often, 0, 4, read)
    same(state(never), state(often))
    B = [p.B for p in fb.points(never).values()]
    assert all(b is not None and b.isfinite().all() for b in B)
    fb.flush(never)
    assert all(torch.equal(a, p.B) for a, p in zip(B, fb.points(never).values(), strict=True))


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_an_evaluation_between_steps_changes_no_bit(feedback: str) -> None:
    plain, evaluated = convert(feedback, "ridge"), convert(feedback, "ridge")

    def read(now: str) -> None:
        if now != "before backward":
            evaluated.eval()
            evaluated(X[3])
            evaluated.train()

    assert train(plain, 0, 4) == train(evaluated, 0, 4, read)
    same(state(plain), state(evaluated))


def test_the_gradient_uses_the_B_from_before_the_update() -> None:
    """SPEC 5, with B read, and so updated, between the loss and its backward."""
    grads = []
    for early in (False, True):
        net = convert("direct", "lms")
        loss = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(X[0]), Y[0])
        if early:
            fb.flush(net)
        loss.backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_two_losses_before_one_backward() -> None:
    net, twin = convert("direct", "lms"), convert("direct", "lms")
    criterion, other = (fb.PerturbedLoss(nn.CrossEntropyLoss(), n) for n in (net, twin))
    torch.manual_seed(1)
    (criterion(net(X[0]), Y[0]) + criterion(net(X[1]), Y[1])).backward()
    torch.manual_seed(1)
    for i in range(2):
        other(twin(X[i]), Y[i]).backward()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=4 * 2.0**-23 * float(b.grad.abs().max()))  # another order of one sum
    same({k: v for k, v in state(net).items() if "feedback" in k}, {k: v for k, v in state(twin).items() if "feedback" in k})


# checkpoints


@pytest.mark.parametrize(("feedback", "rule"), ALL)
def test_a_checkpoint_resumes_bit_for_bit(feedback: str, rule: str) -> None:
    net = convert(feedback, rule)
    train(net, 0, 3)
    checkpoint = state(net)
    losses = train(net, 3, 6)
    fresh = convert(feedback, rule, cnn(seed=1))
    fresh.load_state_dict(checkpoint)
    same(state(fresh), checkpoint)
    assert train(fresh, 3, 6) == losses
    same(state(fresh), state(net))


@pytest.mark.parametrize(
    "options",
    [
        {"every": 3},
        {"warmup": 4},
        {"fraction": 0.5},
        {"antithetic": True},
        {"noise": "rademacher"},
        {"every": 2, "warmup": 4, "antithetic": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_schedules_resume_bit_for_bit(feedback: str, options: dict[str, Any]) -> None:
    net = convert(feedback, "ridge", **options)
    train(net, 0, 3)
    checkpoint = state(net)
    losses = train(net, 3, 7)
    fresh = convert(feedback, "ridge", cnn(seed=1), **options)
    fresh.load_state_dict(checkpoint)
    assert train(fresh, 3, 7) == losses
    same(state(fresh), state(net))


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_going_back_in_the_same_network(feedback: str) -> None:
    net = convert(feedback, "ridge")
    train(net, 0, 2)
    checkpoint = state(net)
    losses = train(net, 2, 4)
    net.load_state_dict(checkpoint)  # a pending update is there, and must not be applied to what is loaded
    assert train(net, 2, 4) == losses


@pytest.mark.parametrize(("feedback", "rule"), ALL)
def test_keys(feedback: str, rule: str) -> None:
    net = convert(feedback, rule)
    train(net, 0, 2)
    plain = list(cnn().state_dict())
    keys = list(net.state_dict())
    assert [k for k in keys if ".feedback." not in k] == plain
    own = {k for k in keys if ".feedback." in k}
    assert {"0.feedback.shared.step", "0.feedback.shared.skipped"} <= own
    learned = rule not in ("node", "transport", "sign")
    assert {k for k in own if k.endswith(".B")} == ({"0.feedback.B", "4.feedback.B", "8.feedback.B"} if learned else set())


def test_keys_of_a_hand_written_model() -> None:
    """The point is the user's own module, so its key has the user's name; W's keys are still the plain ones."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.point, self.b = nn.Linear(3, 4), fb.FeedbackPoint(), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.point(self.a(x)))

    net = fb.convert(Net())
    fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(torch.randn(6, 3)), Y[0]).backward()
    plain = ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert [k for k in net.state_dict() if not re.search(r"(^|\.)(feedback|point)\.", k)] == plain


def test_a_plain_checkpoint_loads() -> None:
    net, plain = convert("direct", "ridge"), cnn(seed=1)
    found = net.load_state_dict(plain.state_dict(), strict=False)
    assert found.unexpected_keys == []
    assert all(".feedback." in k for k in found.missing_keys)
    same({k: v for k, v in state(net).items() if ".feedback." not in k}, dict(plain.state_dict()))
    train(net, 0, 2)


@pytest.mark.parametrize("assign", [True, False])
def test_a_plain_checkpoint_fills_a_network_on_meta(assign: bool) -> None:
    plain, want = cnn(seed=1), fb.convert(cnn(seed=1), rule=fb.Ridge())
    with torch.device("meta"):
        net = fb.convert(cnn(), rule=fb.Ridge())
    if not assign:
        net.to_empty(device="cpu")
    net.load_state_dict(plain.state_dict(), assign=assign)
    train(net, 0, 2)
    train(want, 0, 2)
    same(state(net), state(want))


def test_a_plain_checkpoint_leaves_B_and_the_step_together() -> None:
    """Loading W alone into a network in training must not leave a B that belongs to another step."""
    net = convert("direct", "ridge")
    train(net, 0, 3)
    before = {k: v for k, v in state(net).items() if ".feedback." in k}
    net.load_state_dict(cnn(seed=1).state_dict(), strict=False)
    same({k: v for k, v in state(net).items() if ".feedback." in k}, before)


def test_a_converted_checkpoint_loads_into_the_plain_model() -> None:
    net, plain = convert("direct", "ridge"), cnn(seed=1)
    train(net, 0, 2)
    found = plain.load_state_dict(net.state_dict(), strict=False)
    assert found.missing_keys == []
    assert all(".feedback." in k for k in found.unexpected_keys)


OTHERS: dict[str, Any] = {
    "another width": lambda: convert("direct", "ridge", cnn(width=5)),
    "another rule with statistics": lambda: convert("direct", "lms"),
    "another rule of the same keys": lambda: convert("direct", "nlms"),
    "another structure": lambda: convert("layerwise", "ridge"),
    "other points": lambda: convert("direct", "ridge", exclude="4"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("trained", [False, True])
def test_a_checkpoint_of_another_network_or_rule_is_refused_untouched(other: str, trained: bool) -> None:
    source = convert("direct", "ridge") if other != "another rule of the same keys" else convert("direct", "lms")
    target = OTHERS[other]()
    train(source, 0, 2)
    if trained:
        train(target, 0, 1)
    before = state(target)
    with pytest.raises((ValueError, RuntimeError), match=r"feedback|size mismatch|checkpoint"):
        target.load_state_dict(state(source))
    same(state(target), before)


def test_a_B_of_another_shape_is_refused_untouched() -> None:
    """The same W on larger images: only B knows."""
    net = fb.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)), points=["1"])
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    criterion(net(X[0]), Y[0]).backward()
    before = state(net)
    with pytest.raises(ValueError, match="B of point '1'"):
        criterion(net(X[0, :, :, :5]), Y[0])
    same(state(net), before)


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_safetensors_round_trip(feedback: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    net = convert(feedback, "ridge")
    train(net, 0, 2)
    safetensors.save_file(net.state_dict(), tmp_path / "net.safetensors")
    losses = train(net, 2, 4)
    fresh = convert(feedback, "ridge", cnn(seed=1))
    fresh.load_state_dict(safetensors.load_file(tmp_path / "net.safetensors"))
    assert train(fresh, 2, 4) == losses


def test_torch_save_of_the_state_loads_with_weights_only() -> None:
    net, file = convert("direct", "ridge"), io.BytesIO()
    train(net, 0, 2)
    torch.save(net.state_dict(), file)
    file.seek(0)
    same(torch.load(file, weights_only=True), state(net))


def test_the_statistics_keep_their_precision_in_any_dtype() -> None:
    net = convert("direct", "ridge")
    train(net, 0, 2)
    V = state(net)["0.feedback.shared.V"]
    assert V.dtype == torch.float64
    net.to(torch.bfloat16)
    assert torch.equal(net.state_dict()["0.feedback.shared.V"], V)


@pytest.mark.filterwarnings("ignore:.*no-op")
def test_what_is_loaded_lies_on_the_networks_device() -> None:
    net = convert("direct", "ridge")
    train(net, 0, 2)
    checkpoint = state(net)
    fresh = convert("direct", "ridge").to("meta")
    fresh.load_state_dict(checkpoint)
    assert {t.device.type for t in fresh.state_dict().values()} == {"meta"}


# copies


def pickled(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    result: nn.Module = torch.load(file, weights_only=False)
    return result


@pytest.mark.parametrize("copy_of", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(("feedback", "rule"), ALL)
def test_a_copy_continues_bit_for_bit(feedback: str, rule: str, steps: int, copy_of: Any) -> None:
    net = convert(feedback, rule)
    train(net, 0, steps)
    other = copy_of(net)
    ours, theirs = net.state_dict(), other.state_dict()
    assert not {t.data_ptr() for t in ours.values()} & {t.data_ptr() for t in theirs.values()}
    assert list(fb.points(other)) == list(fb.points(net))
    before = state(other)
    losses = train(net, steps, steps + 3)
    same(state(other), before)  # nothing is shared
    assert train(other, steps, steps + 3) == losses
    same(state(other), state(net))


def test_a_copy_between_forward_and_loss() -> None:
    net = convert("direct", "ridge")
    train(net, 0, 2)
    out = net(X[0])
    other = copy.deepcopy(net)
    fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(out, Y[0]).backward()
    assert int(state(other)["0.feedback.shared.step"]) == 2
    train(other, 2, 3)


def test_a_float64_network_has_a_float64_B() -> None:
    net = convert("direct", "ridge", cnn().double())
    criterion = fb.PerturbedLoss(F.cross_entropy, net)
    for i in range(2):
        criterion(net(X[i].double()), Y[i]).backward()
    assert {p.B.dtype for p in fb.points(net).values()} == {torch.float64}


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_a_copy_from_before_the_first_step_pairs_by_order(feedback: str) -> None:
    """As timm's ModelEma pairs the values of two state dicts."""
    net = convert(feedback, "ridge" if feedback == "direct" else "mirror")
    early = copy.deepcopy(net)
    train(net, 0, 3)
    ours, theirs = net.state_dict(), early.state_dict()
    assert list(ours)[: len(theirs)] == list(theirs)
    assert any(k.endswith(".B") for k in list(ours)[len(theirs) :])
    assert list(net.state_dict(prefix="model."))[-1] == "model." + list(ours)[-1]
    assert list(fb.revert(net).state_dict()) == [k for k in theirs if "feedback" not in k]


@pytest.mark.parametrize(("feedback", "rule"), [("direct", "joint output"), ("direct", "ridge"), ("layerwise", "mirror")])
def test_a_checkpoint_resumes_in_bfloat16_whenever_it_is_loaded(feedback: str, rule: str) -> None:
    """Lightning loads it into the float32 network and casts that."""
    net = convert(feedback, rule).bfloat16()
    half = [x.bfloat16() for x in X]

    def step(net: nn.Module, i: int) -> None:
        torch.manual_seed(100 + i)  # of dropout
        net.zero_grad()
        fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(half[i % 4]), Y[i % 4]).backward()
        with torch.no_grad():
            for p in net.parameters():
                p.sub_(0.1 * p.grad)

    for i in range(3):
        step(net, i)
    for early in (False, True):
        other = convert(feedback, rule)
        other = other if early else other.bfloat16()
        other.load_state_dict(net.state_dict())
        other.bfloat16()
        assert {p.B.dtype for p in fb.points(other).values()} == {torch.float32}
        ours = copy.deepcopy(net)
        for i in (3, 4):
            step(ours, i)
            step(other, i)
        same(state(ours), state(other))


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))  # type: ignore[no-any-return]


def test_a_checkpoint_before_the_first_step_where_the_output_layer_is_not_the_last_one_made() -> None:
    x, y = torch.randn(6, 8), torch.randint(4, (6,))
    net, other = fb.convert(HeadFirst()), fb.convert(HeadFirst())
    fb.PerturbedLoss(nn.CrossEntropyLoss(), net)(net(x), y).backward()
    other.load_state_dict(net.state_dict())
    other(x)
    assert [*fb.points(other)] == ["a", "b"]
    assert all(torch.equal(p.B, fb.points(other)[name].B) for name, p in fb.points(net).items())
