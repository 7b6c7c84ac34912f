from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fbkernels import _C, ops
from fbkernels.ops import _op

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    pytest.importorskip("setuptools", reason="setup.py imports setuptools")
    spec = importlib.util.spec_from_file_location("fbkernels_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_nvcc(folder: Path, dryrun: str = '#$ LIBRARIES=  "-L/some where/lib64"', version: str = "release 13.0, V13.0.88") -> Path:
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\ncase $1 in --dryrun) cat >&2 <<'E'\n#$ TOP=/some where\n{dryrun}\nE\n;; *) echo '{version}';; esac\n")
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH without nvcc, but with what a shim needs."""
    for name in ("CUDA_HOME", "FBK_CUDA", "FBK_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("cat", "sh"):
        path = shutil.which(tool)
        assert path is not None
        (tools / tool).symlink_to(path)
    monkeypatch.setenv("PATH", str(tools))
    return tmp_path


def test_nvcc_says_where_its_libraries_are(setup_py: ModuleType, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path, in_home = fake_nvcc(bare / "a"), fake_nvcc(bare / "b", version="release 12.9, V12.9.41")
    monkeypatch.setenv("PATH", f"{on_path.parent}:{bare / 'tools'}")
    assert setup_py.find_nvcc() == setup_py.Nvcc(str(on_path), "13.0.88", ("-L/some where/lib64",))
    monkeypatch.setenv("CUDA_HOME", str(bare / "b"))
    assert setup_py.find_nvcc() == setup_py.Nvcc(str(in_home), "12.9.41", ("-L/some where/lib64",))


def test_without_nvcc(setup_py: ModuleType, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup_py.cuda_toolkit() == "no nvcc on PATH and CUDA_HOME is not set when it was built"
    monkeypatch.setenv("FBK_CUDA", "1")
    with pytest.raises(RuntimeError, match=r"FBK_CUDA=1, but no nvcc on PATH.*: install the CUDA toolkit"):
        setup_py.cuda_toolkit()
    monkeypatch.setenv("CUDA_HOME", str(bare))
    with pytest.raises(RuntimeError, match=re.escape(f"no nvcc in CUDA_HOME={bare}")):
        setup_py.cuda_toolkit()


def test_a_broken_nvcc_is_none(setup_py: ModuleType, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(bare / "a"))
    fake_nvcc(bare / "a", dryrun="")
    assert "does not answer like nvcc" in setup_py.cuda_toolkit()
    (bare / "a" / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    assert "does not run" in setup_py.cuda_toolkit()


def test_fbk_cuda(setup_py: ModuleType, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(bare / "a"))
    fake_nvcc(bare / "a")
    for choice in ("1", "auto"):
        monkeypatch.setenv("FBK_CUDA", choice)
        assert setup_py.cuda_toolkit().release == "13.0.88"
    monkeypatch.setenv("FBK_CUDA", "0")
    assert setup_py.cuda_toolkit() == "FBK_CUDA=0 when it was built"
    monkeypatch.setenv("FBK_CUDA", "yes")
    with pytest.raises(ValueError, match="FBK_CUDA must be 0, 1 or auto, got 'yes'"):
        setup_py.cuda_toolkit()


def test_architectures(setup_py: ModuleType) -> None:
    assert setup_py.gencode("80;90") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    for bad in ("", "80,90", "sm_90", "90;"):
        with pytest.raises(ValueError, match="FBK_CUDA_ARCHS must look like '80;90'"):
            setup_py.gencode(bad)


@pytest.mark.parametrize("compiler", ["g++", "clang++", "clang++-14"])
def test_openmp_is_asked_of_the_compiler(setup_py: ModuleType, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    monkeypatch.setattr(setup_py, "CXX", compiler)
    has = subprocess.run([compiler, "-fopenmp", "-x", "c++", "-", "-o", "/dev/null"], input="#include <omp.h>\nint main() {}", text=True)
    assert setup_py.openmp() == ("-fopenmp" if has.returncode == 0 else "")


def test_a_compiler_without_openmp(setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As zig's clang: one thread."""
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\ncase $* in *-fopenmp*) exit 1;; esac\nexec g++ $*\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(setup_py, "CXX", str(compiler))
    assert setup_py.openmp() == ""
    source, program = tmp_path / "one.cpp", tmp_path / "one"
    source.write_text('#include "threads.h"\nint main() { return omp_get_num_procs() != 1 || omp_get_thread_num() != 0; }\n')
    subprocess.run([compiler, f"-I{ROOT / 'csrc'}", source, "-o", program], check=True)
    subprocess.run([program], check=True)


def test_a_compiled_part_of_other_sources_is_refused(tmp_path: Path) -> None:
    built = ops.build_info()
    assert not _op.stale(built, tmp_path / "csrc")  # an installed wheel
    assert _op.stale(built | {"version": "0.0.1"}, tmp_path / "csrc")
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    assert not _op.stale(built, csrc)
    assert _op.stale({"version": built["version"]}, csrc)  # compiled before it was asked
    with open(csrc / "noise.h", "a") as f:
        f.write("//\n")
    assert _op.stale(built, csrc)


def test_what_is_compiled_in_is_what_is_compared(setup_py: ModuleType) -> None:
    assert setup_py.digest(ROOT / "csrc") == _op.digest(ROOT / "csrc") == ops.build_info()["sources"]


@pytest.mark.parametrize("simd", [*_C.simd_paths(), "sse"])
def test_fbk_simd_is_the_best_path(simd: str) -> None:
    code = "import fbkernels as fb; from fbkernels import _C; print(fb.build_info()['simd'], *_C.simd_paths())"
    done = subprocess.run([sys.executable, "-P", "-c", code], env=os.environ | {"FBK_SIMD": simd}, capture_output=True, text=True)
    paths = _C.simd_paths()
    if simd in paths:
        assert done.stdout.split() == [simd, *paths[: paths.index(simd) + 1]]
    else:
        assert done.stderr.strip().endswith(f"ValueError: FBK_SIMD must be one of {', '.join(paths)} here, got 'sse'")


def test_build_info() -> None:
    info = ops.build_info()
    assert info["version"] == importlib.metadata.version("fbkernels")
    assert re.match(r"(gcc|clang) \d+\.\d+", info["compiler"])
    assert info["simd_compiled"] == (["portable", "avx2", "avx512"] if platform.machine() == "x86_64" else ["portable"])
    assert info["simd"] == _C.simd_paths()[-1]
    assert set(_C.simd_paths()) <= set(info["simd_compiled"])
    if info["cuda"]:
        assert re.fullmatch(r"\d+\.\d+\.\d+", info["nvcc"])
        assert re.fullmatch(r"\d+[af]?(;\d+[af]?)*", info["cuda_archs"])
    else:
        assert info["cuda_off"]


def test_backends_tell_what_is_missing() -> None:
    backends = ops.backends()
    assert list(backends) == ["reference", "cpp", "triton", "cuda"]
    assert backends["reference"] == backends["cpp"] == "available"
    if not ops.build_info()["cuda"]:
        assert "FBK_CUDA=1 pip install ." in backends["cuda"]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_the_module_needs_neither_torch_nor_a_driver() -> None:
    out = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", out)
    assert needed
    assert not [name for name in needed if re.search("torch|c10|cuda|nv", name)]
