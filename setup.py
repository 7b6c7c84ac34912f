from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CXX = os.environ.get("CXX", "g++")
CXXFLAGS = "-O3 -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra"
WERROR = os.environ.get("FBK_WERROR") == "1"  # another compiler than CI's may warn of more
# at -O3 it compiles for minutes; at -O1 gcc 12 warns of avx512fintrin.h again
SANITIZERS = "-O1 -Wno-uninitialized -fsanitize=address,undefined -fno-sanitize-recover=undefined"
SANITIZE = SANITIZERS if os.environ.get("FBK_SANITIZE") == "1" else ""
NVCCFLAGS = "-O3 -std=c++20 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
# each *_simd.cpp is compiled once for each of these, the rest for the baseline; gcc 12 warns of its own avx512fintrin.h (PR105593), and
# clang does not know that warning
SIMD = {"portable": ""}
if platform.machine() in ("x86_64", "AMD64"):
    SIMD |= {
        "avx2": "-mavx2 -mfma",
        "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"
        " -Wno-maybe-uninitialized -Wno-unknown-warning-option",
    }


class Nvcc(NamedTuple):
    path: str
    release: str
    libraries: tuple[str, ...]


def find_nvcc() -> Nvcc:
    """Asks nvcc itself where its libraries are: the one on PATH may be a shim, beside which there is nothing."""
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if path is None:
        raise FileNotFoundError(f"no nvcc in CUDA_HOME={home}" if home else "no nvcc on PATH and CUDA_HOME is not set")
    try:
        ask = partial(subprocess.run, capture_output=True, text=True, check=True)
        dry, version = ask([path, "--dryrun", "-x", "cu", "/dev/null", "-c", "-o", "/dev/null"]), ask([path, "--version"])
    except (OSError, subprocess.CalledProcessError) as error:
        raise FileNotFoundError(f"{path} does not run: {error}") from error
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", dry.stderr, re.MULTILINE)
    release = re.search(r"\bV(\d+\.\d+\.\d+)", version.stdout)
    if libraries is None or release is None:
        raise FileNotFoundError(f"{path} does not answer like nvcc")
    return Nvcc(path, release[1], tuple(shlex.split(libraries[1])))


def cuda_toolkit() -> Nvcc | str:
    """The toolkit that ``FBK_CUDA=0|1|auto|emulated`` asks for, or why there is none; emulated, g++ stands in for it."""
    choice = os.environ.get("FBK_CUDA", "auto")
    if choice not in ("0", "1", "auto", "emulated"):
        raise ValueError(f"FBK_CUDA must be 0, 1 or auto, got {choice!r}")
    if choice == "emulated":
        return Nvcc(CXX, "emulated", ())
    if choice == "0":
        return "FBK_CUDA=0 when it was built"
    try:
        return find_nvcc()
    except FileNotFoundError as error:
        if choice == "1":
            raise RuntimeError(f"FBK_CUDA=1, but {error}: install the CUDA toolkit, and put nvcc on PATH or set CUDA_HOME") from error
        return f"{error} when it was built"


def openmp() -> str:
    """The flag, or nothing where the compiler has no OpenMP, as zig's clang has not: kernels then run in one thread."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "openmp.cpp")
        source.write_text("#include <omp.h>\nint main() { return omp_get_num_procs(); }\n")
        command = f"{CXX} -fopenmp {shlex.quote(str(source))} -o {shlex.quote(folder)}/openmp"
        return "" if subprocess.run(command, shell=True, capture_output=True).returncode else "-fopenmp"


def digest(csrc: Path) -> str:
    """Of the sources, as in fbkernels/ops/_op.py, which compares them where they lie beside it."""
    files = sorted(p for p in csrc.iterdir() if p.suffix in (".cpp", ".cu", ".h"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]


def gencode(archs: str) -> list[str]:
    """Machine code for each of ``"80;90"``, and PTX of the last for what comes after it."""
    names = archs.split(";")
    if not all(re.fullmatch(r"\d{2,3}[af]?", name) for name in names):
        raise ValueError(f"FBK_CUDA_ARCHS must look like '80;90', got {archs!r}")
    return [f"-gencode=arch=compute_{n},code=sm_{n}" for n in names] + [f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cuda = cuda_toolkit()
        archs = os.environ.get("FBK_CUDA_ARCHS", "80;90")
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        config = {"FBK_VERSION": self.distribution.get_version(), "FBK_SOURCES": digest(Path("csrc"))}
        config |= {"FBK_CUDA_OFF": cuda} if isinstance(cuda, str) else {"FBK_NVCC": cuda.release, "FBK_CUDA_ARCHS": archs}
        device = "dl_cpu" if isinstance(cuda, Nvcc) and cuda.release == "emulated" else "dl_cuda"
        defines = [f'#define {name} "{value}"\n' for name, value in config.items()]
        write_if_changed(build / "build_config.h", "".join((*defines, f"#define FBK_GPU fbk::{device}\n")))
        print(f"fbkernels: CUDA off, {cuda}" if isinstance(cuda, str) else f"fbkernels: CUDA {cuda.release}, {archs}", flush=True)

        parallel = openmp()
        if not parallel:
            print(f"fbkernels: {CXX} has no OpenMP, kernels will run in one thread", flush=True)
        cxx = f"{CXX} -MD -MF $out.d {CXXFLAGS} {parallel or '-Wno-unknown-pragmas'} {'-Werror' * WERROR} {SANITIZE}"
        include = shlex.join((f"-I{build}", "-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()))
        lines = [
            f"rule cxx\n  command = {cxx} {include} $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = {CXX} -shared {parallel} {SANITIZE} -s -Wl,--exclude-libs,ALL $in $libs -o $out",
        ]
        objects = []

        def compile(rule: str, source: Path, variant: str = "", flags: str = "") -> None:
            objects.append(f"{source.name}{variant}.o")
            lines.append(f"build {objects[-1]}: {rule} {ninja_path(source)}\n  flags = {flags}")

        for source in sorted(Path("csrc").resolve().glob("*.cpp")):
            if source.stem.endswith("_simd"):
                for name, flags in SIMD.items():
                    compile("cxx", source, f".{name}", f"{flags} -DFBK_SIMD={name}")
            else:
                compile("cxx", source)
        libs = ""
        if isinstance(cuda, Nvcc):
            if cuda.release == "emulated":  # for tests: blocks and threads on the CPU, on tensors that are there
                command = f"{cxx} -Wno-clobbered -Wno-unknown-pragmas -I{Path('tests/support/emulation').resolve()} -x c++ -c $in -o $out"
            else:
                werror = "-Werror all-warnings" * WERROR
                command = f"{shlex.quote(cuda.path)} -MD -MF $out.d {NVCCFLAGS} {werror} {' '.join(gencode(archs))} -c $in -o $out"
                # static, so that the module imports where there is no CUDA
                libs = shlex.join((*cuda.libraries, "-l:libcudart_static.a", "-ldl", "-lpthread", "-lrt"))
            lines.append(f"rule nvcc\n  command = {command}\n  depfile = $out.d\n  deps = gcc")
            for source in sorted(Path("csrc").resolve().glob("*.cu")):
                compile("nvcc", source)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}\n  libs = {libs}\n")
        write_if_changed(build / "build.ninja", "\n".join(lines))
        subprocess.run(["ninja", "-C", str(build), *(["-v"] if self.verbose else [])], check=True)


def ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


if __name__ == "__main__":
    sources, headers = (sorted(map(str, Path("csrc").glob(pattern))) for pattern in ("*.c*", "*.h"))
    setup(ext_modules=[Extension("fbkernels._C", sources, depends=headers)], cmdclass={"build_ext": NinjaBuild})
