"""Each benchmark once, small, so that none rots; and that what it counts is what it says."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import bench_cnn
import bench_conv_gradient
import bench_fused_mlp
import bench_noise
import bench_pointwise
import bench_suite
import pytest
import report
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fbkernels as fb
from fbkernels.bench import rivals, suite, timing
from fbkernels.lab import cli

RATES = {"gemm_float32_gmac_s": 2.0, "gemm_float64_gmac_s": 1.0, "copy_gb_s": 4.0}
OVERHEAD = suite._overhead
pytestmark = pytest.mark.usefixtures("one_thread")


class Once:
    """pytest-benchmark's fixture, for one call."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, run, setup=None, **_):
        run()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    def once(contenders, rounds, clock=timing.seconds):
        return {name: timing.seconds(run) for name, run in contenders.items()}

    for module in (bench_cnn, bench_conv_gradient, bench_fused_mlp, bench_noise, bench_pointwise, suite):
        monkeypatch.setattr(module, "in_turns", once)
        monkeypatch.setattr(module, "roofline", lambda *_: RATES, raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(suite, "backends", lambda device: ("cpp", "reference"))  # Triton's interpreter takes minutes
    monkeypatch.setattr(suite, "_overhead", lambda case: {})


def small(problem):
    return replace(problem.small(), compiler="eager")


def test_cnn(monkeypatch):
    monkeypatch.setattr(bench_cnn, "BATCH", 2)
    monkeypatch.setattr(bench_cnn, "rate", lambda work, run: work / timing.seconds(run))
    monkeypatch.setattr(bench_cnn.subprocess, "run", lambda command, **_: SimpleNamespace(stdout=str(len(command[-1]))))
    bench_cnn.test_step(Once(), "default")
    bench_cnn.test_memory(once := Once())
    assert once.extra_info["peak_mib"]["backprop"] == len("backprop") / 2**20


def test_conv_gradient(monkeypatch):
    monkeypatch.setattr(bench_conv_gradient, "SAMPLES", 1)
    bench_conv_gradient.test_conv_gradient(Once(), "mnist-conv2", 1)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_classifier(monkeypatch, loss):
    monkeypatch.setattr(bench_fused_mlp, "CALLS", 2)
    monkeypatch.setattr(bench_fused_mlp, "EXAMPLES", 64)
    bench_fused_mlp.test_classifier(Once(), loss)


def test_autoencoder(monkeypatch):
    monkeypatch.setattr(bench_fused_mlp, "CALLS", 1)
    monkeypatch.setattr(bench_fused_mlp, "EXAMPLES", 32)
    bench_fused_mlp.test_autoencoder(Once())


def test_noise_and_pointwise(monkeypatch):
    bench_noise.test_noise(Once(), "gaussian", (2, 8), 1)
    monkeypatch.setattr(bench_pointwise, "BATCH", 1)
    bench_pointwise.test_pointwise(Once(), 1)


def rows(case):
    measured = suite.measure(case, budget=0)
    failed = [row for row in measured if "failed" in row]
    assert not failed, failed
    assert all(row["us"] > 0 and row["kb"] > 0 and row["peak_kib"] > 0 for row in measured)
    return {row["provider"]: row for row in measured}


@pytest.mark.parametrize("name", suite.op_names(bench_suite.OPS))
def test_ops(name):
    rows(suite.op(name, small(bench_suite.OPS)))


@pytest.mark.parametrize("name", bench_suite.LAYERS)
def test_layers(name):
    measured = rows(suite.layer(small(bench_suite.LAYERS[name])))
    assert measured["backprop"]["ratio"] == 1


@pytest.mark.parametrize("name", bench_suite.STEPS)
def test_steps(name):
    problem = small(bench_suite.STEPS[name])
    if name != "mlp":
        problem = replace(problem, compiler=None)  # test_bench_triton.py compiles convnets
    measured = rows(suite.step(problem))
    assert {"ours ridge, cpp", "ours joint, cpp", "backprop"} <= measured.keys()
    assert ("ours joint, compiled" in measured) == (name == "mlp")


@pytest.mark.parametrize("axis", suite.SWEEPS)
def test_sweeps(monkeypatch, axis):
    monkeypatch.setattr(suite, "_overhead", OVERHEAD)
    monkeypatch.setitem(suite.SWEEPS, axis, (2, 3))
    bench_suite.test_sweep(once := Once(), axis)
    assert [case["at"] for case in once.extra_info["cases"]] == ["2", "3"]
    assert all(row["host_us"] > 0 for case in once.extra_info["cases"] for row in case["rows"])


@pytest.mark.parametrize("problem", [suite.mlp((7, 6, 5, 4), 3), small(suite.model("paper_cnn", 2)), small(suite.model("resnet20", 2))])
def test_multiply_adds_are_what_torch_counts(problem):
    net, (x, y) = problem.net(), problem.data()
    with FlopCounterMode(display=False) as counter:
        nn.functional.cross_entropy(net(x), y).backward()
    assert 2 * suite._work(problem, 0, []).macs == counter.get_total_flops()


@pytest.mark.parametrize("cat", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_eager_layer_computes_what_ours_does(monkeypatch, kind, cat):
    problem = small(bench_suite.LAYERS[kind])
    xi = fb.reference.layout(fb.functional.noise(0, 0, 0, 2, problem.hardest.units, 1.0), (2, *problem.hardest.outputs))
    monkeypatch.setattr(torch, "randn_like", lambda t: xi.clone())
    providers = suite.layer(problem).providers
    (mine, dW, db), rival = providers["ours, cpp"].build()(), providers["eager" + ", cat" * cat].build()()
    for ours, theirs in zip((mine.h, mine.h + mine.d, dW, db, mine.B), rival, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["fa", "dfa"])
def test_biotorch_has_the_output_layers_gradient(mode):
    pytest.importorskip("biotorch")
    torch.manual_seed(0)
    net, x, y = rivals.mlp((5, 4, 3), ("tanh", "identity")), torch.rand(6, 5), torch.arange(6) % 3
    criterion = nn.CrossEntropyLoss()
    bio = rivals.biotorch(suite.copy.deepcopy(net), mode, 3, y, criterion)
    bio.module.load_state_dict(net.state_dict(), strict=False)
    for module in (net, bio):
        criterion(module(x), y).backward()
    torch.testing.assert_close(bio.module[2].weight.grad, net[2].weight.grad)
    assert not torch.allclose(bio.module[0].weight.grad, net[0].weight.grad)


def test_roofline():
    assert suite.Work(4e9, 2e9, 1e9).seconds(RATES) == 3.0  # products
    assert suite.Work(1e9, 8e9).seconds(RATES) == 2.0  # bytes


@pytest.mark.parametrize("held", [0, 3])
def test_allocated_is_what_is_held_and_the_peak(held):
    def build():
        keep = torch.empty(held * 2**20, dtype=torch.uint8)
        torch.empty(7 * 2**20, dtype=torch.uint8)  # given back before the run

        def run():
            torch.empty(2**20, dtype=torch.uint8)
            return torch.empty(2 * 2**20, dtype=torch.uint8), keep

        return run

    assert timing.allocated(build, "cpu")[1] == (held + 2) * 2**20


def test_event_clock_skips_what_lies_between(monkeypatch):
    now = iter((10.0, 13.0, 100.0, 104.0))  # ms

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = timing.EventClock()
    times = [clock() for _ in range(4)]
    assert math.isclose(times[1] - times[0], 3e-3) and math.isclose(times[3] - times[2], 4e-3)


def test_command(monkeypatch, capsys, tmp_path):
    mlp = suite.mlp
    monkeypatch.setattr(suite, "_overhead", OVERHEAD)
    monkeypatch.setattr(suite, "mlp", lambda *args: replace(mlp(*args), compiler=None))
    out = tmp_path / "bench.json"
    assert cli.main(["bench", "--op", "noise", "--step", "--sizes", "5,4,3", "--batch", "2", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [case["name"] for case in record["cases"]] == ["noise, linear 5-4, batch 2, 3 classes", "step of 5-4-3, batch 2"]
    assert all(row["host_us"] > 0 for case in record["cases"] for row in case["rows"])
    assert record["rates"] == RATES and record["threads"] == torch.get_num_threads()
    assert "ours, FusedMLP" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1"], "--batch must be an integer in [2"),
        (["--op", "unpool"], "--op must be one of 'noise'"),
        (["--sweep", "length"], "--sweep must be one of 'batch'"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--sizes", "5,x,3"], "such as 784,50,20,10, got '5,x,3'"),
    ],
)
def test_bad_input(arguments, message, capsys):
    try:
        code = cli.main(["bench", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_report_is_up_to_date_and_finds_every_target_of_the_cpu():
    assert all(math.isfinite(t.value(report.extra([report.RESULTS / "cpu.json"]))) for t in report.CPU)
    page = (report.RESULTS / "README.md").read_text()
    assert report.targets(report.extra(report.benchmarks())) in page
    assert all(report.timings(path) in page and report.lost(path) in page for path in report.benchmarks())
    assert report.targets({}).count("not measured") == len(report.CPU) + len(report.GPU)


def test_report_reads_what_the_suite_writes(tmp_path):
    record = {"gpu": None, "cpu": "a processor", "threads": 1, "torch": "2", "load": [0.5, 0, 0]}
    rows = [
        {"provider": name, "us": us, "ratio": us / 4, "launches": None}
        for name, us in (("ours ridge", 5.0), ("ours joint", 3.0), ("backprop", 4.0))
    ]
    info = {
        f"bench_suite::test_sweep[{a}]": record | {"cases": [{"at": str(n), "name": "", "rows": rows} for n in v]}
        for a, v in suite.SWEEPS.items()
    }
    info["bench_suite::test_op[x]"] = record | {
        "cases": [{"name": "x", "baseline": "backprop", "rows": [*rows, {"provider": "z", "failed": "no"}]}]
    }
    lines = list(report.cases(info))
    assert "a processor, 1 threads, torch 2, load 0.5; ratio to backprop" in lines[0]
    assert (
        lines[3].startswith("| ours ridge | 5 | 1.25 |")
        and "| z | failed: no |" in lines
        and lines[-1].endswith("BioTorch was not installed.")
    )
    report.sweeps(info, tmp_path / "sweep.png")
    report.speed(report.extra([report.RESULTS / "cpu.json"]), "a processor", tmp_path / "speed.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("speed.png", "sweep.png"))


def test_the_readme_counts_the_zoo():
    page = (report.RESULTS.parents[1] / "README.md").read_text()
    table = report.foreign(report.RESULTS / "zoo.json")
    assert table in (report.RESULTS / "README.md").read_text()
    direct, layerwise, _ = table.split("| all | ")[1].split("\n")[0].split(" |")
    assert f"**{direct}** public architectures in direct feedback and **{layerwise.strip()}** in layerwise" in page
