"""What bench/gpu.sh does: parts, each a process group with a limit of its own, so that none takes another with it.

OUT gets results.json and table.txt (a line a part), log.txt (all that the parts said), and of ``fast`` gpu.json (as ``pytest bench
--benchmark-json`` writes it), cifar100.json (a row a training run) and tuning.json.

Where no GPU is nothing is installed and each part runs at its smallest size, those of one program in one process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CARRY = ROOT / ".carry"
MOST = 60 * 2**20  # bytes that travel; 64 MiB is refused there
LIMITS = {"correct": 262.0, "fast": 392.0}  # seconds; a part that does not end has GRACE more, and the reply is under 270 and 400
GRACE, LEAST = 4.0, 8.0  # a part is not started with less
LOG = 300_000  # bytes of a part's log that are kept: OUT's files may have 16 MiB

# what each backend has; tests/ops/test_gpu_kernels.py launches them
KERNELS = {
    "triton": ("linear", "conv2d", "pointwise", "noise", "update", "feedback", "gain", "loss"),
    "cuda": ("noise", "linear", "pointwise", "update", "feedback", "gain"),
}
Words = tuple[str, ...]
MODELS, METHODS = ("paper_cnn", "resnet18"), ("backprop", "joint", "weight-mirror", "dfa")


class Part(NamedTuple):
    """``command`` and what it is to do, ``words``: parts of one command can be done by one process too."""

    name: str
    seconds: float
    command: Words
    words: Words = ()


class Stage(NamedTuple):
    """Parts that run side by side, in this order, up to ``workers`` at once. ``decides``: without it the next stages are not reached."""

    parts: list[Part]
    workers: int = 1
    decides: bool = False


class Place(NamedTuple):
    """Where things are: the results, the working folder, CIFAR-100; whether there is a GPU."""

    out: Path
    work: Path
    data: Path | None
    gpu: bool


def python(*words: str) -> Words:
    return (sys.executable, "-P", *words)


def pytest(*words: str) -> Words:
    return python("-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60", *words)


def install(at: Place) -> list[Part]:
    wheels = CARRY / "wheels"
    isolated = ["--no-index", "--find-links", str(wheels)] if wheels.is_dir() else ["--no-build-isolation"]
    pip = ("env", "FBK_CUDA_ARCHS=90", sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", *isolated)
    how = ("--target", str(at.work / "site")) if at.gpu else ("--dry-run",)
    versions = "; ".join(
        (
            "import platform, torch, triton, fbkernels; from importlib.metadata import version",
            "print({name: version(name) for name in ('setuptools', 'pybind11', 'ninja', 'numpy')})",
            "print(platform.python_version(), torch.__version__, torch.version.cuda, triton.__version__)",
            "print(fbkernels.build_info())",
            "print(fbkernels.backends())",
            "torch.cuda.is_available() and print(torch.cuda.get_device_properties(0))",
        )
    )
    return [Part("install", 110, (*pip, *how, ".")), Part("versions", 40, python("-c", versions))]


def correct(at: Place) -> list[Stage]:
    build, versions = install(at)
    kernel, mlp = "tests/ops/test_gpu_kernels.py::test_kernel[{}-{}]", "tests/ops/test_fused_mlp_cuda.py::test_"
    thousand, cutting = f"{mlp}a_thousand_steps_are_those_of_the_cpp_engine", f"{mlp}cutting_a_run_changes_no_bit[sgd-V-cuts0]"
    launches = ("tests/bench/test_gpu.py::test_a_layer_is_one_launch", "tests/bench/test_gpu.py::test_noise_is_one_launch")
    few = (*(kernel.format("cuda", name) for name in ("linear", "update", "gain")), cutting)
    blocking: Words = ()
    memory: Words = ()
    race: Words = ()
    if at.gpu:
        blocking = ("env", "CUDA_LAUNCH_BLOCKING=1")  # an error is that of the launch where it is raised
        sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
        # without torch's allocator, which hides what is read behind a tensor
        memory, race = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *sanitizer, "memcheck"), (*sanitizer, "racecheck")
    parts = [
        versions,
        *(Part(f"{b} {name}", 90, blocking + pytest(), (kernel.format(b, name),)) for b, names in KERNELS.items() for name in names),
        Part("one launch a layer", 90, pytest(), launches),
        Part("a replayed step", 90, pytest(), ("tests/ops/test_gpu_kernels.py::test_a_replayed_step_is_the_eager_one",)),
        Part("FusedMLP, 1,000 steps", 60, pytest(), (thousand if at.gpu else cutting,)),  # emulated it takes a minute
        Part("memcheck, CUDA", 90, memory + pytest(), few),
        Part("racecheck, CUDA", 90, race + pytest(), few),
        Part("memcheck, Triton", 90, memory + pytest(), (kernel.format("triton", "noise"), kernel.format("triton", "update"))),
    ]
    if at.gpu:  # as far as the time goes; elsewhere CI runs them
        mirror = "tests/ops/test_conformance.py::test_the_backend_is_the_reference[mirror-{}]"
        parts += [Part(f"{b} mirror", 90, blocking + pytest(), (mirror.format(b),)) for b in KERNELS]
        files = ("bench/test_gpu", "ops/test_fused_mlp_cuda", "ops/test_cuda_ops")
        parts += [Part(f"all of {name}", 120, pytest("-n", "4"), (f"tests/{name}.py",)) for name in files]
    return [Stage([build], decides=True), Stage(parts, workers=8)]


def fast(at: Place) -> list[Stage]:
    build, versions = install(at)
    triton = "bench/bench_triton.py::test_"
    measured = {  # in order of worth
        "step of the CNN": (50, (f"{triton}step[cnn]",)),
        "step of ResNet-18": (55, (f"{triton}step[resnet18]",)),
        "FusedMLP": (45, ("bench/bench_fused_mlp_cuda.py::test_step",)),
        "B's update, noise": (30, (f"{triton}update", f"{triton}noise")),
        "layers": (45, (f"{triton}layer",)),
        "launches": (25, (f"{triton}launches",)),
        "ops and the roofline": (45, ("bench/bench_suite.py::test_op",)),
    }
    everything = tuple(word for _, words in measured.values() for word in words)
    # compiles what is measured afterwards, beside the first training runs; measures nothing
    compiling = Part("compiling", 100, ("env", "TORCHINDUCTOR_COMPILE_THREADS=2", *pytest("-n", "12")), everything)
    alone = [
        Part(name, seconds, ("env", f"FBK_TUNING={at.out}/tuning.json", *pytest(f"--benchmark-json={at.work}/{i}.benchmark")), words)
        for i, (name, (seconds, words)) in enumerate(measured.items())
    ]
    if not at.gpu:
        compiling, alone = Part("benchmarks", 150, pytest("--collect-only", "-q"), everything), []
    cnn, resnet = ([Part(f"{model} {method}", 100, train(at), (f"{model}/{method}",)) for method in METHODS] for model in MODELS)
    return [
        Stage([build, *unpack(at)], workers=2, decides=True),
        Stage([versions, compiling, *cnn], workers=6),
        Stage(alone),
        Stage(resnet, workers=4),
    ]


def train(at: Place) -> Words:
    size = () if at.gpu else ("--small",)
    name = "CIFAR-100" if images(at) == at.data else "CIFAR-100, JPEG 95 copy"
    return python("bench/gpu_train.py", *size, "--name", name, str(images(at)), str(at.work))


def images(at: Place) -> Path:
    """The folder that has cifar-100-binary."""
    assert at.data is not None
    return at.data if (at.data / "cifar-100-binary").is_dir() else at.work


def unpack(at: Place) -> list[Part]:
    assert at.data is not None
    if images(at) == at.data:
        return []
    return [Part("unpacking", 60, (sys.executable, str(at.data / "lossy.py"), "unpack", str(at.data / "cifar100.npz"), str(at.work)))]


MODES = {"correct": correct, "fast": fast}


def merged(parts: Iterable[Part]) -> Stage:
    """One process a command."""
    commands: dict[Words, list[Part]] = {}
    for part in parts:
        commands.setdefault(part.command, []).append(part)
    few: list[Part] = []
    for command, same in commands.items():
        words = dict.fromkeys(word for part in same for word in part.words)
        name = same[0].name if len(same) == 1 else f"{same[0].name} and {len(same) - 1} more"
        few.append(Part(name, sum(part.seconds for part in same), command, tuple(words)))
    return Stage(few)


def first_error(log: str) -> str:
    """The line that says what went wrong first."""
    log = re.sub(r"\x1b\[[0-9;]*m", "", log)
    wanted = (
        r"^E\s+(\w.*)",
        r"^(Fatal Python error.*)",
        r"^(=+ (?:Invalid|Error|Race|Hazard).*)",
        r"^([\w.]*(?:Error|Exception|Interrupt)\b.*)",
        r"(?i)^(.*\berror\b.*)",
    )
    for pattern in wanted:
        if found := re.search(pattern, log, re.MULTILINE):
            return found[1].strip()
    return (log.strip().splitlines() or [""])[-1].strip()


class Run:
    """The parts of a mode, one after the other or side by side, and what became of each."""

    def __init__(self, mode: str, out: Path, limit: float) -> None:
        self.mode, self.out, self.begun = mode, out, time.monotonic()
        self.until = self.begun + limit
        self.rows: list[dict[str, Any]] = []
        self.running: set[int] = set()
        self.lock = threading.Lock()
        self.work = Path(tempfile.mkdtemp())
        self.gpu = False
        self.env = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(self.work / "site"), os.environ.get("PYTHONPATH")))),
            # ninja, nvcc and compute-sanitizer
            "PATH": os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/local/cuda/bin")),
            "PYTHONUNBUFFERED": "1",
            "FBK_TUNING": str(self.work / "tuning.json"),
        }

    def stop(self, *_: Any) -> None:
        """Kill what runs and start nothing more."""
        self.until = 0.0
        for group in list(self.running):
            kill(group, signal.SIGKILL)

    def stages(self, stages: Iterable[Stage]) -> None:
        reached = True
        for stage in stages:
            for part in stage.parts:
                self.rows.append({"part": part.name, "state": "not reached", "seconds": 0.0, "note": ""})
            if not reached:
                continue
            rows = self.rows[-len(stage.parts) :]
            with ThreadPoolExecutor(stage.workers) as pool:
                list(pool.map(self.part, stage.parts, rows))
            reached = not stage.decides or all(row["state"] == "passed" for row in rows)
            self.gather()

    def part(self, part: Part, row: dict[str, Any]) -> None:
        limit = min(part.seconds, self.until - time.monotonic())
        if limit < min(LEAST, part.seconds):
            return
        log, start = self.work / f"{re.sub(r'[^A-Za-z0-9]+', '-', part.name)}.log", time.monotonic()
        ended: int | str  # its exit status, or what it said last before it was killed
        try:
            ended = self.wait(part, limit, log)
        except OSError as error:
            ended = -1
            log.write_text(str(error))
        text = log.read_text(errors="replace")
        row["seconds"] = round(time.monotonic() - start, 1)
        if ended == 0:
            row |= {"state": "passed", "note": said(text)}
        elif isinstance(ended, str) and limit < part.seconds:
            row |= {"state": "not reached", "note": f"the time was up after {limit:.0f} s, at {ended}"}
        elif isinstance(ended, str):
            row |= {"state": "failed", "note": f"did not end in {limit:.0f} s, at {ended}"}
        else:
            died = f"{signal.Signals(-ended).name}: " if ended < -1 else ""
            row |= {"state": "failed", "note": died + (first_error(text) or f"exit status {ended}")}
        with self.lock:
            print(f"{time.monotonic() - self.begun:5.0f} s  {line(row)}", flush=True)
            with (self.out / "log.txt").open("a") as file:
                file.write(f"\n===== {part.name}: {row['state']} after {row['seconds']} s: {' '.join((*part.command, *part.words))}\n")
                file.write(text if len(text) <= LOG else f"{text[: LOG // 3]}\n[...]\n{text[-2 * LOG // 3 :]}")
            self.write()

    def wait(self, part: Part, limit: float, log: Path) -> int | str:
        with log.open("wb") as file:
            command = [*part.command, *part.words]
            process = subprocess.Popen(command, cwd=ROOT, env=self.env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, process_group=0)
        self.running.add(process.pid)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            at = last(log.read_text(errors="replace"))
            kill(process.pid, signal.SIGINT)  # a benchmark writes what it has
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return at
        finally:
            kill(process.pid, signal.SIGKILL)  # and all that it has started
            self.running.discard(process.pid)

    def gather(self) -> None:
        """Benchmarks into gpu.json, training runs into cifar100.json."""
        if found := read(self.work.glob("*.benchmark")):
            whole = found[0] | {"benchmarks": [b for file in found for b in file["benchmarks"]]}
            (self.out / "gpu.json").write_text(json.dumps(whole, indent=1) + "\n")
        if runs := read(self.work.glob("*.run")):
            (self.out / "cifar100.json").write_text(json.dumps(runs, indent=1) + "\n")

    def write(self) -> None:
        seconds = round(time.monotonic() - self.begun, 1)
        whole = {"mode": self.mode, "gpu": self.gpu, "seconds": seconds, "parts": self.rows}
        (self.out / "results.json").write_text(json.dumps(whole, indent=1) + "\n")


def read(files: Iterable[Path]) -> list[Any]:
    """What was written whole."""
    found = []
    for file in sorted(files):
        with suppress(ValueError):
            found.append(json.loads(file.read_text()))
    return found


def said(log: str) -> str:
    """Its last word on what it did."""
    found = re.findall(r"^=+ (.*\d (?:passed|skipped).*?) =+$", log, re.MULTILINE)
    return found[-1] if found else last(log)


def last(log: str) -> str:
    return re.sub(r"\s+", " ", (log.strip().splitlines() or ["its start"])[-1])


def line(row: dict[str, Any]) -> str:
    return f"{row['part']:<32} {row['state']:<12} {row['seconds']:6.1f} s  {row['note']}"[:160].rstrip()


def kill(group: int, with_: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, with_)


def run(mode: str, out: Path, data: Path | None) -> int:
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").unlink(missing_ok=True)
    job = Run(mode, out, LIMITS[mode])
    for which in (signal.SIGTERM, signal.SIGINT):
        signal.signal(which, job.stop)
    try:
        job.stages([Stage([Part("machine", 10, ("nvidia-smi",))])])
        job.gpu = job.rows[0]["state"] == "passed"
        if not job.gpu:
            job.rows[0]["note"] = "no GPU was found"
        first, *rest = MODES[mode](Place(out, job.work, data, job.gpu))
        if not job.gpu:
            rest = [merged(part for stage in rest for part in stage.parts)]
        job.stages([first, *rest])
    finally:
        job.write()
        shutil.rmtree(job.work, ignore_errors=True)
    table = "\n".join(map(line, job.rows)) + "\n"
    if not job.gpu:
        table += "no GPU was found: what ran, ran without one, at its smallest size\n"
    (out / "table.txt").write_text(table)
    print(f"\n{table}", end="")
    return int(any(row["state"] != "passed" for row in job.rows))


def travels() -> dict[Path, int]:
    """The files that go to that machine with every call, and their bytes."""
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True).stdout
    paths = {ROOT / os.fsdecode(name) for name in listed.split(b"\0") if name}
    return sizes(paths | set((ROOT / "shared").rglob("*")))


def sizes(paths: Iterable[Path]) -> dict[Path, int]:
    return {path: path.lstat().st_size for path in paths if path.is_file() or path.is_symlink()}


def carry() -> int:
    """The wheels that build fbkernels there, which go with the first call, and CIFAR-100 as JPEGs, which leaves no room for them."""
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    lossy, data, wheels = ROOT.parent / "shared" / "data" / "lossy.py", CARRY / "data", CARRY / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--only-binary=:all:")
    subprocess.run([*pip, "-d", str(wheels), *requires], check=True)
    data.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(lossy, data / "lossy.py")
    if not (data / "cifar100.npz").exists():  # two minutes
        subprocess.run([sys.executable, str(lossy), "pack", str(data / "part.npz")], check=True)
        (data / "part.npz").rename(data / "cifar100.npz")
    for mode, folder in (("correct", wheels), ("fast", data)):
        files = travels() | sizes(folder.rglob("*"))
        total = sum(files.values())
        print(f"{mode}: {total / 2**20:.1f} MiB would travel with carry=[{str(folder.relative_to(ROOT))!r}]")
        if total > MOST:
            largest = sorted(files, key=lambda path: -files[path])[:5]
            names = ", ".join(f"{path.relative_to(ROOT)} {files[path] / 2**20:.1f}" for path in largest)
            print(f"refused: more than {MOST / 2**20:.0f} MiB; the largest: {names}", file=sys.stderr)
            return 1
    return 0


def main(words: Sequence[str]) -> int:
    match words:
        case ["correct", out]:
            return run("correct", Path(out).resolve(), None)
        case ["fast", out, data]:
            return run("fast", Path(out).resolve(), Path(data).resolve())
        case ["carry"]:
            return carry()
    print("usage: bench/gpu.sh correct OUT | fast OUT DATA | carry", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
