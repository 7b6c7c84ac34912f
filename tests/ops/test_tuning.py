from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fbkernels.ops import tuning

KEY = (64, 100, "float32")
SMALL, LARGE = {"BM": 16, "stages": [2, 3]}, {"BM": 64, "stages": [2, 3]}


class GPU:
    """A device whose clock moves by what a candidate costs."""

    def __init__(self, costs: dict[str, float | Exception]) -> None:
        self.costs, self.now, self.ran, self.capturing, self.name, self.index = costs, 0.0, [], False, "NVIDIA H200", 0

    def run(self, candidate: Any) -> None:
        cost = self.costs[json.dumps(candidate)]
        self.ran.append(candidate)
        if isinstance(cost, Exception):
            raise cost
        self.now += cost

    def event(self, enable_timing: bool) -> Any:
        class Event:
            def record(event) -> None:
                event.time = self.now

            def elapsed_time(event, end: Any) -> float:
                return end.time - event.time

        return Event()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., GPU]:
    """A process with a GPU: each call starts a new one over the same file."""
    monkeypatch.setenv("FBK_TUNING", str(tmp_path / "new" / "choices.json"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")

    def start(small: float | Exception = 2.0, large: float | Exception = 1.0, library: float | Exception = 3.0) -> GPU:
        gpu = GPU({json.dumps(SMALL): small, json.dumps(LARGE): large, json.dumps("library"): library})
        monkeypatch.setattr(tuning, "_known", {})
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: gpu.index)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu.name)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
        monkeypatch.setattr(torch.cuda, "Event", gpu.event)
        return gpu

    return start


def choose(gpu: GPU, key: tuple[Any, ...] = KEY, candidates: tuple[Any, ...] = (SMALL, LARGE, "library")) -> Any:
    return tuning.fastest("linear", key, candidates, gpu.run)


def test_the_fastest_is_remembered(device: Callable[..., GPU]) -> None:
    gpu = device()
    assert choose(gpu) is LARGE
    assert all(gpu.ran.count(c) == 3 + tuning.ROUNDS for c in (SMALL, LARGE, "library"))
    gpu.costs[json.dumps(SMALL)] = 0.1
    assert choose(gpu) is LARGE
    assert len(gpu.ran) == 3 * (3 + tuning.ROUNDS)
    assert choose(gpu, (64, 101, "float32")) is SMALL


def test_one_slow_run_is_no_reason(device: Callable[..., GPU]) -> None:
    gpu = device()
    run, gpu.run = gpu.run, lambda c: setattr(gpu, "now", gpu.now + 50 * (len(gpu.ran) in (11, 20))) or run(c)
    assert choose(gpu) is LARGE
    assert gpu.now > 100


def test_the_next_process_takes_the_same(device: Callable[..., GPU]) -> None:
    assert choose(device()) is LARGE
    gpu = device(small=0.1)
    assert choose(gpu) is LARGE
    assert gpu.ran == []
    gpu = device(small=0.1)
    gpu.name = "NVIDIA H100"
    assert choose(gpu) is SMALL
    assert choose(device(library=0.1), (7,)) == "library"
    assert choose(device(), (7,)) == "library"
    assert choose(device(small=0.1)) is LARGE  # what was there before stays


def test_devices_of_a_process_are_told_apart(device: Callable[..., GPU]) -> None:
    gpu = device()
    assert choose(gpu) is LARGE
    gpu.index, gpu.name = 1, "NVIDIA A100"
    gpu.costs[json.dumps(SMALL)] = 0.1
    assert choose(gpu) is SMALL
    gpu.index, gpu.name = 0, "NVIDIA H200"
    assert choose(gpu) is LARGE


def test_a_choice_that_is_no_candidate_any_more_is_made_again(device: Callable[..., GPU]) -> None:
    assert choose(device()) is LARGE
    assert choose(device(), candidates=("library", SMALL)) is SMALL
    assert choose(device(large=0.1)) is SMALL


@pytest.mark.parametrize("text", ["", '{"a": ', "[1, 2]", "\x00\xff"])
def test_a_corrupt_file_is_as_none(device: Callable[..., GPU], tmp_path: Path, text: str) -> None:
    file = tmp_path / "new" / "choices.json"
    file.parent.mkdir()
    file.write_bytes(text.encode("latin-1"))
    assert choose(device()) is LARGE
    assert list(json.loads(file.read_text()).values()) == [LARGE]
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_warns(device: Callable[..., GPU], tmp_path: Path) -> None:
    (tmp_path / "new").write_text("a file where the folder should be")
    gpu = device()
    with pytest.warns(UserWarning, match="the choice for NVIDIA H200, linear, 64, 100, float32 lasts for this process only"):
        assert choose(gpu) is LARGE
    ran = len(gpu.ran)
    assert choose(gpu) is LARGE and len(gpu.ran) == ran


def test_capture_takes_the_first_or_the_recorded(device: Callable[..., GPU]) -> None:
    gpu = device()
    gpu.capturing = True
    assert choose(gpu) is SMALL
    gpu.capturing = False
    assert gpu.ran == [] and choose(gpu) is LARGE
    gpu.capturing = True
    assert choose(gpu) is LARGE
    gpu = device()
    gpu.capturing = True
    assert choose(gpu) is LARGE and gpu.ran == []


def test_without_a_gpu_or_in_the_interpreter_the_first(device: Callable[..., GPU], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = device()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(gpu) is SMALL
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert choose(gpu) is SMALL
    assert gpu.ran == [] and not (tmp_path / "new").exists()


def test_what_raises_is_left_out(device: Callable[..., GPU]) -> None:
    gpu = device(large=RuntimeError("out of shared memory"))
    assert choose(gpu) is SMALL
    assert gpu.ran.count(LARGE) == 1


def test_where_all_raise_so_does_the_choice(device: Callable[..., GPU], tmp_path: Path) -> None:
    gpu = device(RuntimeError("first"), RuntimeError("second"), MemoryError("last"))
    with pytest.raises(MemoryError, match="last"):
        choose(gpu)
    assert not (tmp_path / "new").exists()


def test_the_file_of_a_gpu(device: Callable[..., GPU], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import triton

    monkeypatch.delenv("FBK_TUNING")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose(device()) is LARGE
    assert (tmp_path / ".cache" / "fbkernels" / f"NVIDIA-H200-triton{triton.__version__}.json").exists()
