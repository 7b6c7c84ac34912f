"""bench/gpu.sh without a GPU: what its parts do to each other, and that it runs to the place where a GPU is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import emulated
import gpu
import numpy as np
import pytest
import torch
from gpu import Part, Stage

ROOT = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def code(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


FINE = Part("fine", 20, code("print('all is well')"))
FAILS = Part("fails", 20, code("print('before'); raise ValueError('the first line')"))
HANGS = Part(
    "hangs", 1, code("import subprocess, time; subprocess.Popen(['sleep', '77.125']); print('waiting', flush=True); time.sleep(60)")
)
IGNORES = Part("ignores", 1, code("import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"))
CRASHES = Part("crashes", 20, code("import faulthandler, ctypes; faulthandler.enable(); ctypes.string_at(0)"))
MISSING = Part("missing", 20, ("no-such-program",))


def done(out: Path, stages: list[Stage], limit: float = 60) -> dict[str, dict[str, Any]]:
    run = gpu.Run("correct", out, limit)
    run.stages(stages)
    rows = json.loads((out / "results.json").read_text())["parts"]
    return {row["part"]: row for row in rows}


@pytest.mark.parametrize("workers", [1, 6])
def test_what_fails_hangs_or_crashes_leaves_the_others_whole(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    after = [part._replace(name=f"{part.name} after") for part in (FINE, FAILS)]
    rows = done(tmp_path, [Stage([FAILS, HANGS, IGNORES, CRASHES, MISSING, FINE], workers), Stage(after)])
    assert {name: row["state"] for name, row in rows.items()} == {
        **dict.fromkeys(("fails", "hangs", "ignores", "crashes", "missing", "fails after"), "failed"),
        **dict.fromkeys(("fine", "fine after"), "passed"),
    }
    notes = {name: row["note"] for name, row in rows.items()}
    assert notes["fails"] == "ValueError: the first line"
    assert notes["hangs"] == "did not end in 1 s, at waiting"
    assert notes["ignores"] == "did not end in 1 s, at its start"
    assert notes["crashes"] == "SIGSEGV: Fatal Python error: Segmentation fault"
    assert "no-such-program" in notes["missing"]
    assert notes["fine"] == "all is well"
    assert b"77.125" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, check=True).stdout, "a child of a part still runs"
    log = (tmp_path / "log.txt").read_text()
    assert all(f"===== {name}: {row['state']}" in log for name, row in rows.items())
    assert "before\nTraceback" in log


def test_what_does_not_fit_is_not_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    start = time.monotonic()
    long = Part("long", 20, code("import time; print('epoch 3 of 9', flush=True); time.sleep(60)"))
    rows = done(tmp_path, [Stage([FINE, long]), Stage([FINE._replace(name="late")])], limit=3)
    assert time.monotonic() - start < 4
    assert [row["state"] for row in rows.values()] == ["passed", "not reached"] + ["not reached"] * (len(rows) - 2)
    assert rows["long"]["note"].endswith("at epoch 3 of 9")


def test_nothing_follows_an_install_that_failed(tmp_path: Path) -> None:
    run = gpu.Run("correct", tmp_path, 60)
    run.stages([Stage([FAILS], decides=True), Stage([FINE])])
    assert [row["state"] for row in run.rows] == ["failed", "not reached"]


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("a.py::b FAILED\nE       AssertionError: h: 2e-1\nE       assert 1 <= 2\nFAILED a.py", "AssertionError: h: 2e-1"),
        (
            "Traceback:\n  x\ntorch.AcceleratorError: CUDA error: an illegal memory access\nRuntimeError: then",
            "torch.AcceleratorError: CUDA error: an illegal memory access",
        ),
        ("ok\nFatal Python error: Aborted\n", "Fatal Python error: Aborted"),
        ("csrc/a.cu(7): error: no\nninja: stopped", "csrc/a.cu(7): error: no"),
        ("what\n\nlast\n", "last"),
        ("", ""),
    ],
)
def test_the_first_error(log: str, line: str) -> None:
    assert gpu.first_error(log) == line


def test_the_table_is_short() -> None:
    place = gpu.Place(Path("out"), Path("work"), Path("data"), gpu=True)
    for plan in gpu.MODES.values():
        parts = [part for stage in plan(place) for part in stage.parts]
        assert len({part.name for part in parts}) == len(parts) < 55
        row = {"part": parts[0].name, "state": "not reached", "seconds": 0.0, "note": "x" * 999}
        assert len(gpu.line(row)) == 160


def test_what_the_parts_name_is_there() -> None:
    place = gpu.Place(Path("out"), Path("work"), Path("data"), gpu=True)
    words = [word for plan in gpu.MODES.values() for stage in plan(place) for part in stage.parts for word in part.words]
    tests = [word.partition("[")[0].split("::") for word in words if ".py" in word]
    assert len(tests) > 30
    for path, *function in tests:
        text = (ROOT / path).read_text()
        assert not function or f"\ndef {function[0]}(" in text, (path, function)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images that the script's own unpacking makes."""
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(folder / "cifar100.npz", np.random.default_rng(0).integers(0, 100, (120, 3074), np.uint8))
    (folder / "lossy.py").write_text(LOSSY)
    return folder


LOSSY = """
import pathlib, sys
import numpy as np
if sys.argv[1] == "pack":
    pathlib.Path(sys.argv[2]).write_bytes(b"x" * 2**21)
else:
    out = pathlib.Path(sys.argv[3], "cifar-100-binary")
    out.mkdir()
    for split in ("train", "test"):
        np.load(sys.argv[2])["arr_0"].tofile(out / f"{split}.bin")
"""


def script(*words: object, root: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([root / "bench" / "gpu.sh", *map(str, words)], capture_output=True, text=True, env=os.environ | env)


@NO_GPU
@pytest.mark.parametrize("mode", ["correct", "fast"])
def test_a_mode_runs_as_far_as_without_a_gpu(mode: str, tmp_path: Path, data: Path) -> None:
    emulated.compiled()  # which takes minutes, and is not what is measured
    start, out = time.monotonic(), tmp_path / "out"
    ran = script(mode, out, *([data] if mode == "fast" else []))
    assert time.monotonic() - start < {"correct": 270, "fast": 400}[mode]
    results = json.loads((out / "results.json").read_text())
    log = (out / "log.txt").read_text()
    states = {row["part"]: row["state"] for row in results["parts"]}
    assert ran.returncode == 1 and states.pop("machine") == "failed", ran.stderr
    assert set(states.values()) == {"passed"}, log
    table = ran.stdout.splitlines()[-60:]
    assert "no GPU was found" in table[-1] and all(any(line.startswith(name) for line in table) for name in states)
    assert (out / "table.txt").read_text().splitlines() == table[-len(states) - 2 :]
    files = list(out.iterdir())
    assert len(files) <= 8 and all(f.is_file() and f.stat().st_size < 2**24 for f in files)
    if mode == "fast":
        runs = json.loads((out / "cifar100.json").read_text())
        assert {(run["model"], run["method"]) for run in runs} == {(m, way) for m in gpu.MODELS for way in gpu.METHODS}
        for run in runs:
            assert run["data"] == "CIFAR-100, JPEG 95 copy" and run["complete"] and len(run["epoch"]) == run["epochs"]


def test_what_is_asked_for_wrongly() -> None:
    for words in ([], ["correct"], ["fast", "out"], ["fas", "a", "b"]):
        assert (ran := script(*words)).returncode == 2 and "usage" in ran.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with the script alone, and the shared data beside it."""
    root, shared = tmp_path / "main", tmp_path / "shared" / "data"
    shared.mkdir(parents=True)
    (shared / "lossy.py").write_text(LOSSY)
    (root / "bench").mkdir(parents=True)
    for name in ("bench/gpu.sh", "bench/gpu.py", "pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, root / name)
    subprocess.run(["git", "init", "-q", root], check=True)
    return root


def test_carry_refuses_what_would_not_travel(checkout: Path) -> None:
    ran = script("carry", root=checkout)
    wheels = sorted(path.name.partition("-")[0] for path in (checkout / ".carry" / "wheels").iterdir())
    assert ran.returncode == 0 and wheels == ["ninja", "pybind11", "setuptools"], ran.stderr
    assert (checkout / ".carry" / "data" / "cifar100.npz").stat().st_size == 2**21
    assert (checkout / ".carry" / "data" / "lossy.py").read_text() == LOSSY
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=checkout, capture_output=True, text=True, check=True)
    assert ".carry" not in listed.stdout
    with (checkout / "left.bin").open("wb") as file:
        file.truncate(60 * 2**20)  # untracked, and not ignored
    ran = script("carry", root=checkout)
    assert ran.returncode == 1 and "refused" in ran.stderr and "left.bin 60.0" in ran.stderr
