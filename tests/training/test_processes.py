"""Two and four processes, each with a part of the batch, against one with all of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import parallel
import pytest
import torch
from parallel import STEPS, TRAININGS, build, train
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import fbkernels as fb
from fbkernels.training.processes import Part

EPS = torch.finfo(torch.float64).eps


pytestmark = pytest.mark.usefixtures("one_thread")


def distance(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference, in units of the largest entry of its tensor."""
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], t) for k, t in want.items() if not t.is_floating_point())
    real = [(got[k].double(), t.double()) for k, t in want.items() if t.is_floating_point()]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)) for a, b in real)


def tolerance(name: str, want: dict[str, Tensor]) -> float:
    """Twice what rounding does to one process, measured against float64 where it is that of float32.

    In float64 the loss change keeps eps / noise_std of its digits, w = dL / noise_std^2 twice that power, 100 eps here; sums have up to 200
    terms, sqrt(200) eps; and what four steps gather is four times as much.
    """
    training = TRAININGS[name]
    if training.dtype == torch.float64:
        return 4 * 100 * 200**0.5 * EPS
    exact = dataclasses.replace(training, dtype=torch.float64)
    return 2 * distance(train(build(exact), exact, range(STEPS)), want)


@pytest.mark.filterwarnings("ignore:1 samples had a non-finite loss")
@pytest.mark.parametrize("world", [2, 4])
def test_processes_train_as_one(world: int, tmp_path: Path) -> None:
    results = parallel.spawn(world, tmp_path)
    assert not [r["error"] for r in results if "error" in r]
    first = results[0]
    for name in parallel.of(world):
        want = train(build(TRAININGS[name]), TRAININGS[name], range(STEPS))
        assert distance(first[name], want) <= tolerance(name, want), name
        assert all(torch.equal(r[name][k], t) for r in results for k, t in first[name].items()), f"{name}: processes differ"
    training = TRAININGS["direct ridge"]
    net = build(training)
    train(net, training, range(2))
    assert distance(first["resumed"], train(net, training, range(2, STEPS))) <= tolerance("direct ridge", {})
    for name, want in parallel.SHARDED.items() if world == 2 else ():
        one = dataclasses.replace(TRAININGS[want], uneven=False)
        assert distance(first[name], train(build(one), one, range(STEPS))) <= tolerance(want, {}), name
    for result in results:
        assert {k: v.partition(" must be the same in all processes")[0] for k, v in result["refused"].items()} == {
            "seed": "seed",
            "points": "points",
            "checkpoint": "B of point '0'",
        }


class Alone:
    """A process that counts the numbers it would send."""

    rank, size, agreed = 0, 1, True

    def __init__(self) -> None:
        self.sent: list[int] = []

    def part(self, rows: int) -> Part:
        return Counted(self, (rows,))

    def sum(self, t: Tensor) -> Tensor:
        self.sent.append(t.numel())
        return t


class Counted(Part):
    def gather(self, *given: Tensor) -> list[Tensor]:
        self.processes.sent.append(sum(t.numel() for t in given))
        return list(given)


def test_what_a_step_sends() -> None:
    """Beside W's gradients: K + 1 numbers a sample, K for Joint; in layerwise as much as W. In the first step also what B explains."""

    def step(rule: fb.Rule, feedback: str = "direct") -> list[int]:
        net = fb.convert(parallel.mlp(), feedback=feedback, rule=rule)
        criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
        processes = net.feedback.processes = Alone()
        criterion(net(torch.randn(7, 3, 8, 8)), torch.randint(5, (7,))).backward()
        return sorted(processes.sent)

    skipped, share, B = 1, 2 + 2, [20 * 10, 10 * 5]
    for rule in (fb.Ridge(), fb.LMS(0.1), fb.NormalizedLMS(0.1)):
        assert step(rule) == [skipped, share, 7 * 6]
    assert step(fb.Joint(signal="output")) == [skipped, share, 7 * 5]
    assert step(fb.Joint(signal="loss")) == [skipped, 1, share, 7 * 5]  # the mean of |r|^2
    assert step(fb.Fixed()) == step(fb.KolenPollack(), "layerwise") == step(fb.WeightMirror(), "layerwise") == [skipped]
    assert step(fb.LMS(0.1), "layerwise") == sorted([skipped, share, *B])
    assert step(fb.Ridge(), "layerwise") == sorted([skipped, share, *B, 10 * 10, 5 * 5])
    assert step(fb.Joint(), "layerwise") == sorted([skipped, share, *B, 1, 1])
    assert step(fb.NormalizedLMS(0.1), "layerwise") == sorted([skipped, share, 7 * 11, 7 * 6])


def test_a_rule_of_ones_own_gets_the_samples_of_all() -> None:
    """What LMS says of its update is not said of another one."""

    class Own(fb.LMS):
        def update(self, m: fb.Measurement, state: dict[str, Tensor]) -> Any:
            return super().update(m, state)

    class Sparing(Own):
        exchanged = ("regressor",)

    assert fb.LMS.additive and not Own.additive and not Sparing.additive
    assert (Own.exchanged, Sparing.exchanged) == (("regressor", "w"), ("regressor",))


def test_what_several_processes_cannot_do_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    net = fb.convert(parallel.mlp())
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    x, y = torch.randn(7, 3, 8, 8), torch.randint(5, (7,))
    monkeypatch.setattr("fbkernels.loss.several", lambda group=None: True)
    with pytest.raises(RuntimeError, match=r"make PerturbedLoss after torch\.distributed\.init_process_group"):
        criterion(net(x), y)
    net.feedback.processes = Alone()
    with pytest.raises(Exception, match="a training step of several processes cannot be compiled yet"):
        torch.compile(net, fullgraph=True, backend="eager")(x)


class Sharded(nn.Sequential, FSDPModule):
    """What fully_shard makes of a module's class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Sharded:
        return nn.Module.__new__(cls)


def test_sharding_that_does_not_work_is_refused() -> None:
    net = fb.convert(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)))
    net[0].__class__ = Sharded
    with pytest.raises(ValueError, match="fully_shard the network as a whole, not its part '0'"):
        fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    for rule in (fb.KolenPollack(), fb.WeightTransport(), fb.SyntheticGradient(0.1)):
        net = fb.convert(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), feedback="layerwise", rule=rule)
        net.__class__ = Sharded
        with pytest.raises(ValueError, match="does not work with fully_shard, which hides W between steps"):
            fb.PerturbedLoss(nn.CrossEntropyLoss(), net)


def test_sync_batch_norm_is_torchs_again_after_revert() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)))
    net = fb.convert(model)
    x = torch.randn(6, 3)
    assert torch.equal(net.eval()(x), model.eval()(x))
    assert type(fb.revert(net)[1]) is type(model[1]) is nn.SyncBatchNorm
