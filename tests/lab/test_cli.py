"""The command line, on the embedded digits data set."""

import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fbkernels.lab import cli
from fbkernels.lab import train as job

TIMES = ("seconds", "images_per_second")
SMALL = ("--epochs", "2", "--train-images", "300", "--threads", "1")


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without the timings."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def same(a: object, b: object) -> bool:
    """Bitwise equality of state_dicts."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_results(a: Path, b: Path) -> bool:
    weights = sorted(p.name for p in a.glob("*.pt") if p.name != "checkpoint.pt")
    assert weights
    assert weights == sorted(p.name for p in b.glob("*.pt") if p.name != "checkpoint.pt")
    return metrics(a) == metrics(b) and all(same(torch.load(a / w), torch.load(b / w)) for w in weights)


def interrupt(settings: job.Settings, out: Path, *steps: int) -> None:
    """Run a job that is interrupted after each of these steps, counted over the whole job, and resumed."""
    for step in steps:
        state = job.load_checkpoint(out)[1] if out.exists() else None
        with pytest.raises(KeyboardInterrupt):
            job.train(settings, out, checkpoint=state, watch=lambda p, step=step: p.done == step)
    job.train(settings, out, checkpoint=job.load_checkpoint(out)[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default job, shortened, with all outputs."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert cli.main(["train", *SMALL, "--out", str(out)]) == 0
    return out


def test_outputs(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [(r["method"], r["epoch"]) for r in lines] == [(m, e) for m in ("ridge", "backprop", "fa") for e in (1, 2)]
    assert all(r["seconds"] > 0 and r["images_per_second"] > 0 and 0 <= r["test_accuracy"] <= 100 for r in lines)
    assert all(set(r["points"]) == (set() if r["method"] == "backprop" else {"fc1", "fc2"}) for r in lines)
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    summary = json.loads((whole / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["settings"]["train_images"] == 300
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["results"]["ridge"]["test_accuracy"]["final"] == {"mean": lines[1]["test_accuracy"], "standard_error": None}
    for name in ("accuracy.png", "angle.png"):
        assert (whole / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    state = torch.load(whole / "ridge-0.pt", weights_only=True)
    assert {"fc1.weight", "fc1.feedback.B", "fc1.feedback.V"} <= state.keys()


def test_default_job_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--epochs", "10", "--seeds", "2"]) == 0
    (out,) = (tmp_path / "runs").iterdir()
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("ridge", "backprop", "fa", "±", out.name))
    results = json.loads((out / "summary.json").read_text())["results"]
    accuracy = {m: r["test_accuracy"]["final"]["mean"] for m, r in results.items()}
    assert accuracy["backprop"] > 90
    assert accuracy["fa"] + 3 < accuracy["ridge"] > 90
    assert all(results["ridge"]["angle"][p]["mean"] + 10 < results["fa"]["angle"][p]["mean"] for p in ("fc1", "fc2"))


def test_rivals_share_weights_and_batches(tmp_path: Path) -> None:
    records = job.train(job.Settings(epochs=2, rule="weight-transport", compare=("backprop",), seeds=(3, 1)), tmp_path / "x")
    ours, theirs = ([r for r in records if r["method"] == m] for m in ("weight-transport", "backprop"))
    for a, b in zip(ours, theirs, strict=True):
        assert a["seed"] == b["seed"]
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["test_accuracy"] == b["test_accuracy"]
        assert all(p["angle"] < 1e-4 for p in a["points"].values())
    one, two = (torch.load(tmp_path / "x" / f"{m}-3.pt") for m in ("weight-transport", "backprop"))
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in two)
    assert records[0]["train_loss"] != records[4]["train_loss"]  # another seed


@pytest.mark.parametrize(
    ("feedback", "rule", "options"),
    [
        ("direct", "ridge", {"antithetic": True, "fraction": 0.5}),
        ("direct", "joint", {"optimizer": "sgd"}),
        ("layerwise", "joint", {"warmup": 4, "every": 2}),
        ("layerwise", "weight-mirror", {"noise": "rademacher"}),
        ("layerwise", "kolen-pollack", {"rule_args": {"decay": 1e-4}}),
        ("layerwise", "synthetic", {}),
        ("direct", "node-perturbation", {"seeds": (2,)}),
    ],
)
def test_resume_continues_bit_for_bit(tmp_path: Path, feedback: str, rule: str, options: dict) -> None:
    settings = job.Settings(epochs=2, train_images=300, feedback=feedback, rule=rule, compare=("fa",), **options)
    job.train(settings, tmp_path / "whole")
    # 5 steps an epoch: in an epoch, at its end, after the first step of the rival, before the very last evaluation
    interrupt(settings, tmp_path / "parts", 3, 5, 7, 11, 20)
    assert same_results(tmp_path / "whole", tmp_path / "parts")


def test_resume_from_the_end_of_an_epoch(tmp_path: Path) -> None:
    """What a kill leaves that comes before the next checkpoint within an epoch."""
    settings = job.Settings(epochs=3, train_images=300, rule="joint", compare=())

    def killed(progress: job.Progress) -> bool:
        if progress.done == 6:
            raise RuntimeError
        return False

    job.train(settings, tmp_path / "whole")
    with pytest.raises(RuntimeError):
        job.train(settings, tmp_path / "parts", watch=killed)
    state = job.load_checkpoint(tmp_path / "parts")[1]
    assert (state["epoch"], state["step"]) == (1, 0)
    job.train(settings, tmp_path / "parts", checkpoint=state)
    assert same_results(tmp_path / "whole", tmp_path / "parts")


def test_resume_of_a_convolutional_network(tmp_path: Path) -> None:
    settings = job.Settings(epochs=1, train_images=130, model="cnn", rule="ridge", compare=("lms", "dfa"), threads=1)
    job.train(settings, tmp_path / "whole")
    interrupt(settings, tmp_path / "parts", 2, 5)
    assert same_results(tmp_path / "whole", tmp_path / "parts")


def test_sigint_leaves_a_checkpoint_and_resume_finishes(tmp_path: Path) -> None:
    job_of = ["--epochs", "12", "--compare", "", "--threads", "1"]
    out = tmp_path / "parts"
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "fbkernels", "train", *job_of, "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    path = out / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == f"interrupted; continue with: fbkernels train --resume {out}"
    assert 0 < len(metrics(out)) < 12
    assert cli.main(["train", "--resume", str(out)]) == 0
    assert cli.main(["train", *job_of, "--out", str(tmp_path / "whole")]) == 0
    assert same_results(tmp_path / "whole", out)
    assert cli.main(["train", "--resume", str(out)]) == 0  # nothing is left to do


def test_kill_9_loses_what_came_after_the_last_checkpoint(tmp_path: Path) -> None:
    """A checkpoint after every step, and killed at three moments, in the middle of writing one for all we know."""
    job_of = ["--epochs", "4", "--compare", "", "--train-images", "600", "--threads", "1"]
    out, rng = tmp_path / "parts", random.Random(0)
    code = "import sys, fbkernels.lab.train as t, fbkernels.lab.cli as c; t.SAVE_EVERY = 0.0; sys.exit(c.main(sys.argv[1:]))"
    for how in ([*job_of, "--out", str(out)], ["--resume", str(out)], ["--resume", str(out)]):
        before = (out / "checkpoint.pt").stat().st_mtime_ns if out.exists() else 0
        process = subprocess.Popen([sys.executable, "-P", "-c", code, "train", *how], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        path = out / "checkpoint.pt"
        while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns > before):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate(timeout=60)
    reached = job.load_checkpoint(out)[1]
    assert 0 < reached["epoch"] * 19 + reached["step"] < 4 * 19
    assert cli.main(["train", "--resume", str(out)]) == 0
    assert cli.main(["train", *job_of, "--out", str(tmp_path / "whole")]) == 0
    assert same_results(tmp_path / "whole", out)


def test_lines_newer_than_the_checkpoint_are_replaced(whole: Path, tmp_path: Path) -> None:
    """As after a crash between the two writes."""
    settings = job.load_checkpoint(whole)[0]
    with pytest.raises(KeyboardInterrupt):
        job.train(settings, tmp_path / "x", watch=lambda p: p.done == 8)
    with (tmp_path / "x" / "metrics.jsonl").open("a") as file:
        file.write('{"half a li')
    (tmp_path / "x" / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    assert cli.main(["train", "--resume", str(tmp_path / "x")]) == 0
    assert same_results(whole, tmp_path / "x")


@pytest.mark.filterwarnings("ignore:.*non-finite loss")
def test_a_diverged_method_does_not_stop_the_job(tmp_path: Path) -> None:
    assert cli.main(["train", *SMALL, "--optimizer", "sgd", "--lr", "1e38", "--compare", "backprop", "--out", str(tmp_path / "x")]) == 0
    summary = json.loads((tmp_path / "x" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["results"]["ridge"]["train_loss"]["final"]["mean"] is None


def test_a_runaway_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"epochs": 3, "train_images": 300, "optimizer": "sgd", "lr": 30.0, "feedback": "direct", "rule": "ridge", "threads": 1}
    settings = job.Settings(**given, compare=("backprop",))
    records = job.train(settings, tmp_path / "whole")
    assert all(math.log(10) < r["train_loss"] for r in records[1:])
    # of ridge the first epoch begins with a warm-up
    assert [bool(r["warning"]) for r in records] == [False, True, False, True, False, False]
    assert "a normalisation behind each hidden layer" in records[1]["warning"]
    interrupt(settings, tmp_path / "parts", 7, 10, 13, 22)
    assert same_results(tmp_path / "whole", tmp_path / "parts")
    options = ["--epochs", "2", "--optimizer", "sgd", "--lr", "30", "--feedback", "direct", "--compare", "", "--train-images", "300"]
    assert cli.main(["train", *options, "--out", str(tmp_path / "x")]) == 0
    assert "".join(capsys.readouterr().err.split()).count("ridge:thenetworkhasrunaway:") == 1


def test_what_B_explains_is_in_the_records(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all((r["explained"] is None) == (r["method"] != "ridge") for r in lines)
    assert all(isinstance(p["explained"], float) for r in lines if r["method"] == "ridge" for p in r["points"].values())
    assert json.loads((whole / "summary.json").read_text())["results"]["ridge"]["explained"]["mean"] == lines[1]["explained"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "mnist"], r"data_dir=None: mnist is read from files, expected the folder that holds them"),
        (["--data", "mnist", "--data-dir", "/nowhere"], r"mnist was not found: .*/nowhere is not a folder"),
        (["--rule", "magic"], r"rule must be one of 'ridge', .*, got 'magic'"),
        (["--compare", "backprop,magic"], r"compare must be one of 'ridge', .*, got 'magic'"),
        (["--data", "imagenet"], r"argument --data: invalid choice: 'imagenet'"),
        (["--rule", "weight-mirror", "--feedback", "direct"], r"feedback must be 'layerwise' with WeightMirror\(.*\), got 'direct'"),
        (["--rule", "joint-output"], r"feedback must be 'direct' with Joint\(.*\), got 'layerwise'"),
        (["--rule-arg", "delta=1"], r"rule_args: ridge has no argument 'delta', it has gamma, forgetting"),
        (["--rule-arg", "gamma=-1"], r"gamma must be a finite number > 0, got -1.0"),
        (["--rule-arg", "gamma"], r"argument --rule-arg: expected NAME=NUMBER, got 'gamma'"),
        (["--noise-std", "-1"], r"noise_std must be a finite number > 0, got -1.0"),
        (["--warmup", "soon"], r"argument --warmup: expected auto or a number of steps, got 'soon'"),
        (["--lr", "0"], r"lr must be a finite number > 0, got 0.0"),
        (["--epochs", "0"], r"epochs must be an integer in \[1, .*\], got 0"),
        (["--train-images", "5000"], r"train_images must be 1 to 1314, .*, got 5000"),
        (["--seeds", "0"], r"argument --seeds: expected a number of seeds, 1 to 1000, or a list of seeds such as 0,3,7, got '0'"),
        (["--seeds", "3,3"], r"seeds must be different numbers, at least one, got \(3, 3\)"),
        (["--device", "abacus"], r"device 'abacus' cannot be used"),
        (["--device", "meta"], r"device 'meta' cannot be used"),
        (["--out", "full"], r"out: full is not an empty folder; name another, or continue the run there with --resume full"),
        (["--resume", "full"], r"full has no checkpoint.pt to resume from"),
        (["--resume", "damaged"], r"damaged/checkpoint.pt is damaged, or no checkpoint of fbkernels"),
        (["--resume", "done", "--lr", "3"], r"--resume cannot change lr: the run in done was started with None, got 3.0"),
        (["--resume", "done", "--out", "x"], r"argument --out: not allowed with argument --resume"),
    ],
)
def test_bad_input(
    options: list[str], message: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that says what is wrong, exit code 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    for folder, content in (("full", b"x"), ("damaged", b"PK not a checkpoint"), ("done", (whole / "checkpoint.pt").read_bytes())):
        Path(folder).mkdir()
        Path(folder, "x" if folder == "full" else "checkpoint.pt").write_bytes(content)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    try:
        code = cli.main(["train", *options])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert re.search(message, errors[0])
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_foreign_checkpoint_executes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"settings": Path("x")}, tmp_path / "checkpoint.pt")
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    assert "is damaged, or no checkpoint of fbkernels" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("torch", "reference", "cpp", "compiler", "ridge_gain", torch.__version__))
