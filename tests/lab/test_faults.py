"""What goes wrong while a job runs: numbers that are not finite, kill -9, full disks, damaged and hostile files, a second process."""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from experiments import ask, die, few, images, longer, watch
from poison import one_warning
from test_cli import same, same_results
from torch import nn

import fbkernels as fb
from fbkernels.lab import cli, files
from fbkernels.lab import train as job
from fbkernels.lab.paper import driver, fig2
from fbkernels.lab.paper.driver import Watch

SMALL = ("--epochs", "2", "--train-images", "300", "--threads", "1", "--compare", "")
RULES = [
    ("direct", fb.Ridge()), ("direct", fb.Ridge(forgetting=0.9)), ("direct", fb.LMS(0.1)), ("direct", fb.NormalizedLMS(0.5)),
    ("direct", fb.Joint()), ("direct", fb.Joint(signal="output")), ("direct", fb.SyntheticGradient(0.1)),
    ("layerwise", fb.Ridge()), ("layerwise", fb.Ridge(forgetting=0.9)), ("layerwise", fb.LMS(0.1)), ("layerwise", fb.NormalizedLMS(0.5)),
    ("layerwise", fb.Joint(signal="loss")), ("layerwise", fb.WeightMirror()), ("layerwise", fb.SyntheticGradient(0.1)),
]  # fmt: skip  # all that learn B; those whose B follows W lose it with W
pytestmark = pytest.mark.usefixtures("one_thread")


def learned(net: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items() if ".feedback." in k and v.is_floating_point()}


@pytest.mark.parametrize(("feedback", "rule"), RULES, ids=str)
def test_diverging_training_leaves_b_finite(feedback: str, rule: fb.Rule) -> None:
    """lr 1e38: W is infinite or nan after a step or two. Then every sample is skipped, and B stands still."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))
    net = fb.convert(model, feedback=feedback, rule=copy.deepcopy(rule))
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    optimizer = torch.optim.SGD(net.parameters(), 1e38)
    x, y = torch.randn(8, 2, 4, 4), torch.arange(8) % 3
    with one_warning():
        for step in range(8):
            loss = criterion(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step == 5:
                before = learned(net)
    assert not all(p.isfinite().all() for p in net.parameters())
    assert int(net.feedback.skipped) >= 2 * 8
    assert int(net.feedback.step) == 8
    for name, t in learned(net).items():
        assert t.isfinite().all(), name
        decays = isinstance(rule, fb.Ridge) and rule.forgetting < 1 and name.endswith(".V")
        assert decays or torch.equal(t, before[name]), name


@pytest.mark.parametrize(("feedback", "rule"), RULES, ids=str)
def test_infinite_gradients_of_one_step_pass(feedback: str, rule: fb.Rule) -> None:
    """A loss scale that overflows: W's gradients are infinite, the optimiser's step is left out, and B goes on."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    net = fb.convert(model, feedback=feedback, rule=copy.deepcopy(rule))
    criterion = fb.PerturbedLoss(nn.CrossEntropyLoss(), net)
    x, y = torch.randn(8, 5), torch.arange(8) % 3
    for scale in (1.0, float("inf"), 1e38, float("nan"), 1.0, 1.0):
        before = learned(net)
        net.zero_grad()
        with torch.no_grad():
            for p in net.parameters():  # a mirror's B is W until W moves
                p.mul_(0.99)
        (criterion(net(x), y) * scale).backward()
        assert all(t.isfinite().all() for t in learned(net).values()), scale
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert any(not torch.equal(t, before[k]) for k, t in learned(net).items() if k.endswith(".B"))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize(("feedback", "rule"), [r for r in RULES if type(r[1]) in (fb.Ridge, fb.LMS, fb.Joint)], ids=str)
def test_diverging_fused_training_leaves_b_finite(feedback: str, rule: fb.Rule, loss: str) -> None:
    """Rates at which the losses are finite for a while, and numbers overflow; a ridge may say so."""
    x, y = torch.randn(64, 12), torch.randint(4, (64,))
    for lr in (10.0, 1e3, 1e38):
        net = fb.FusedMLP((12, 8, 6, 4), activations="tanh", loss=loss, feedback=feedback, rule=copy.deepcopy(rule), lr=lr)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(60):
                try:
                    net.fit(x, y, steps=1, batch_size=8)
                except RuntimeError as error:
                    assert "beyond float64" in str(error)  # noqa: PT017
        assert len(caught) == (net.skipped > 0)
        assert all(t.isfinite().all() for t in (*net.B, *net._V)), lr
    assert net.skipped > 0


def test_diverging_train_job(tmp_path: Path) -> None:
    out = tmp_path / "x"
    rules = ["--rule", "ridge", "--compare", "joint,lms,weight-mirror,dfa"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cli.main(["train", *SMALL[:-2], *rules, "--optimizer", "sgd", "--lr", "1e38", "--out", str(out)]) == 0
    assert sum("non-finite" in str(w.message) for w in caught) == 5 == len(caught)  # one for each network
    for method in ("ridge", "joint", "lms", "weight-mirror", "dfa"):
        state = torch.load(out / f"{method}-0.pt", weights_only=True)
        assert all(t.isfinite().all() for k, t in state.items() if ".feedback." in k and t.is_floating_point()), method
        assert int(state["fc1.feedback.shared.skipped"]) > 0
        assert int(state["fc1.feedback.shared.step"]) == 10


# kill -9

KILLER = """
import os, random, signal, sys, time
from fbkernels.lab import cli, train
train.SAVE_EVERY = 0.0
out, seed, *options = sys.argv[1:]
rng, kills, longest = random.Random(seed), 0, 0.1
while True:
    child = os.fork()
    if not child:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        has = os.path.exists(os.path.join(out, "checkpoint.pt"))
        os._exit(cli.main(["train", *(["--resume", out] if has else [*options, "--out", out])]))
    time.sleep(rng.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status) or print(kills))
    kills, longest = kills + 1, longest * 1.15
"""


@pytest.mark.parametrize("seed", range(int(os.environ.get("KILL_SEEDS", "1"))))
def test_kill_9_at_random_moments_of_train(tmp_path: Path, seed: int) -> None:
    """Killed in start-up, in a step, in the middle of a write, each life a little longer, until one has finished: the same results."""
    options = ["--epochs", "3", "--train-images", "300", "--threads", "1", "--compare", "fa"]
    command = [sys.executable, "-P", "-c", KILLER, str(tmp_path / "parts"), str(seed), *options]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert killed.returncode == 0, killed.stderr
    print("kills survived:", killed.stdout)
    assert int(killed.stdout) >= 5
    assert cli.main(["train", *options, "--out", str(tmp_path / "whole")]) == 0
    assert same_results(tmp_path / "whole", tmp_path / "parts")
    assert not list((tmp_path / "parts").glob("*.tmp"))


def alive(group: int) -> list[int]:
    """Processes of a group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
            found += [int(stat.parent.name)] if int(pgrp) == group and state != "Z" else []
    return found


def test_kill_9_of_reproduce(tmp_path: Path) -> None:
    """All processes at once, then the parent alone, whose trainings end with it; asked for again, the same results."""
    rng, here = random.Random(0), os.pathsep.join(p for p in sys.path if p)
    states = [tmp_path / "jobs" / f"{kind.name}.pt" for kind in longer("smoke", range(1), False)]
    for kill in (os.killpg, os.kill):
        before = {path: path.stat().st_mtime_ns for path in states if path.exists()}
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", "import sys, experiments; experiments.ask(sys.argv[1])", str(tmp_path)],
            env=os.environ | {"PYTHONPATH": here}, start_new_session=True, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while process.poll() is None and not any(p.exists() and p.stat().st_mtime_ns != before.get(p) for p in states):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        assert process.poll() is None, process.communicate()
        kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        end = time.monotonic() + 60
        while alive(process.pid) and time.monotonic() < end:
            time.sleep(0.01)
        assert not alive(process.pid)
    assert any(0 < files.load(path)["done"] < 200 for path in states)
    ask(str(tmp_path))
    for run, kind in zip(json.loads((tmp_path / "results.json").read_text())["results"], longer("smoke", range(1), False), strict=True):
        whole = kind.run(images(), watch(tmp_path / f"whole-{kind.name}"))
        assert run["records"] == whole["records"]
    assert not [path for path in (tmp_path / "jobs").iterdir() if path.suffix in (".tmp", ".pt")]


def test_a_training_that_is_killed(tmp_path: Path) -> None:
    """As the system does when memory is short: an error of one line, and no result."""
    experiment = driver.Experiment("", 1, few, die, fig2.tables, fig2.figures)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="a training was killed, for want of memory perhaps; the same command goes on from here"):
        driver.reproduce(
            "fig2", experiment, tmp_path, scale="smoke", seeds=(0,), faithful=False, methods=None, data_dir="", device="cpu", processes=1,
            command=[],
        )  # fmt: skip
    assert not list((tmp_path / "jobs").glob("*.json"))


# full disks


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A write beyond that many bytes fails, as on a full disk (Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train job that was interrupted after a few steps."""
    out = tmp_path_factory.mktemp("run") / "stopped"
    settings = job.Settings(epochs=2, train_images=300, compare=(), threads=1)
    with pytest.raises(KeyboardInterrupt):
        job.train(settings, out, watch=lambda p: p.done == 3)
    return out


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_full_disk_stops_train(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float) -> None:
    """The last checkpoint stays, nothing is left beside it, and when there is room again the job goes on from there."""
    out = tmp_path / "x"
    shutil.copytree(stopped, out)
    checkpoint = (out / "checkpoint.pt").read_bytes()
    with files_of_at_most(int(share * len(checkpoint))):
        assert cli.main(["train", "--resume", str(out)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert lines == [f"fbkernels train: error: [Errno 27] File too large: '{out}/checkpoint.pt'"]
    assert (out / "checkpoint.pt").read_bytes() == checkpoint
    assert not list(out.glob("*.tmp"))
    assert cli.main(["train", "--resume", str(out)]) == 0
    job.train(job.load_checkpoint(stopped)[0], tmp_path / "whole")
    assert same_results(tmp_path / "whole", out)


def test_a_full_disk_stops_reproduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "SAVE_EVERY", 0.0)
    kind, path = few("smoke", range(1), False)[0], tmp_path / "state.pt"
    with pytest.raises(driver.Interrupted):
        kind.run(images(), watch(path, stop_at=4))
    before = path.read_bytes()
    with files_of_at_most(len(before) // 2), pytest.raises(OSError, match=r"File too large: '.*state\.pt'"):
        kind.run(images(), watch(path))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


# damaged and hostile files


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def damaged(good: bytes, hostile: Path) -> Iterator[bytes]:
    rng = random.Random(0)
    yield b""
    yield b"not a checkpoint"
    yield pickle.dumps(Hostile(hostile))
    for value in (Hostile(hostile), {"done": Hostile(hostile)}, [1, 2], torch.zeros(3)):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        yield buffer.getvalue()
    for _ in range(30):
        yield good[: rng.randrange(1, len(good))]
    for _ in range(100):
        at = rng.randrange(len(good))
        yield good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :]


def check_damaged(path: Path, good: bytes, load: Callable[[], object], state: object) -> None:
    """Whatever is done to the file, it is refused by name or loads what it held, and executes nothing."""
    messages: list[str] = []
    executed = path.with_name("executed")
    for content in damaged(good, executed):
        path.write_bytes(content)
        try:
            loaded = load()
        except ValueError as error:
            messages.append(str(error))
        else:
            assert same(loaded, state)
    assert len(messages) > 37
    assert all(str(path) in message for message in messages)
    assert not executed.exists()


def test_damaged_checkpoints_of_train(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused by name, or, where what a file's bit says is nothing that counts, exactly what was saved; nothing is executed."""
    good, state = (stopped / "checkpoint.pt").read_bytes(), job.load_checkpoint(stopped)[1]
    path = tmp_path / "checkpoint.pt"
    check_damaged(path, good, lambda: job.load_checkpoint(tmp_path)[1], state)
    path.write_bytes(good[:1000])
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{path} is damaged, or no checkpoint of fbkernels" in error


def test_damaged_files_of_reproduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, path = few("smoke", range(1), False)[0], tmp_path / "jobs" / "backprop-0.pt"
    path.parent.mkdir()
    with pytest.raises(driver.Interrupted):
        kind.run(images(), watch(path, stop_at=4))
    good, state = path.read_bytes(), watch(path).load()
    check_damaged(path, good, lambda: watch(path).load(), state)
    path.write_bytes(good)
    with pytest.raises(ValueError, match=r"backprop-0\.pt is of another experiment, scale or version; name another folder"):
        Watch(path, {"lr": 1}, lambda done: None, lambda: False).load()
    path.with_suffix(".json").write_text('{"method": "backprop", "se')
    with pytest.raises(ValueError, match=r"backprop-0\.json is damaged: remove it, and that training is done again"):
        ask(str(tmp_path))


def test_every_file_is_loaded_without_executing_it() -> None:
    """Each torch.load says weights_only=True, and pickle is not imported."""
    root, calls = Path(fb.__file__).parent, 0
    for source in [*root.rglob("*.py"), *(root / "bench").rglob("*.py")]:
        for node in ast.walk(ast.parse(source.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "dill", "joblib", "shelve"} & set(names), source
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                calls += 1
                assert "weights_only=True" in ast.unparse(node), source
    assert calls


# two processes in one folder


def test_two_processes_cannot_have_one_folder(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "error: out: another process is at work in {}; wait until it has ended, or name another folder\n"
    (tmp_path / "mnist").mkdir()
    for command, out in (
        (["train", *SMALL, "--out"], tmp_path / "new"),
        (["train", "--resume"], stopped),
        (["reproduce", "fig2", "--data-dir", str(tmp_path / "mnist"), "--out"], tmp_path / "paper"),
    ):
        with files.locked(out):
            before = {p: p.read_bytes() for p in out.iterdir()}
            assert cli.main([*command, str(out)]) == 2
            assert capsys.readouterr().err.lstrip("\n") == f"fbkernels {command[0]}: " + message.format(out)
            assert {p: p.read_bytes() for p in out.iterdir()} == before
    assert cli.main(["train", *SMALL, "--out", str(tmp_path / "new")]) == 0  # once it is free


def test_what_a_killed_start_leaves_is_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    (tmp_path / files.LOCK).touch()
    assert cli.main(["train", *SMALL, "--out", str(tmp_path)]) == 0
    assert not list(tmp_path.glob("*.tmp"))
