"""What only a GPU can run: on one, or where there is none with blocks and threads on the CPU.

csrc/*.cu are compiled by g++ then, against the cuda_runtime.h of tests/support/emulation.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

import fbkernels as fb
from fbkernels import fused_mlp
from fbkernels.ops import _op

ROOT = Path(__file__).parents[2]


@functools.cache
def compiled() -> ModuleType:
    """fbkernels._C of this source with ``FBK_CUDA=emulated``, built once by whoever comes first and kept in the temporary folder."""
    sources = sorted([ROOT / "setup.py", *(ROOT / "csrc").iterdir(), *(ROOT / "tests" / "support" / "emulation").iterdir()])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    place = hashlib.sha256(bytes(ROOT)).hexdigest()[:8]  # ninja's objects know where their sources are
    build = Path(tempfile.gettempdir()) / f"fbkernels-emulated-{os.getuid()}-{place}"
    build.mkdir(exist_ok=True)
    library = build / digest
    with open(build / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            command = [
                sys.executable,
                "setup.py",
                "-q",
                "build_ext",
                "--build-lib",
                str(build / "lib"),
                "--build-temp",
                str(build / "objects"),
            ]
            done = subprocess.run(command, cwd=ROOT, env=os.environ | {"FBK_CUDA": "emulated"}, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the emulated build failed:\n{done.stdout}{done.stderr}")
            (found,) = (build / "lib" / "fbkernels").glob("_C*.so")
            library.mkdir()
            found.rename(library / found.name)
    (found,) = library.glob("_C*.so")
    spec = importlib.util.spec_from_file_location("emulated._C", found)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def engine() -> Iterator[None]:
    """FusedMLP's steps are those of the CUDA engine; on a GPU, of networks that are there."""
    if torch.cuda.is_available():
        yield
    else:
        with mock.patch.object(fused_mlp, "_C", compiled()):
            yield


@contextmanager
def backend() -> Iterator[None]:
    """The operators have the backend "cuda"."""
    with ExitStack() as stack:
        stack.callback(_op.forget)
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch.object(_op, "C", compiled()))
        _op.forget()
        yield


def moved(net: fb.FusedMLP, *data: Tensor) -> tuple[fb.FusedMLP, *tuple[Tensor, ...]]:
    """A copy of a network, with what it learned, and its data, where ``engine`` trains it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ("activations", "loss", "feedback", "rule", "noise_std", "noise", "optimizer", "lr", "warmup", "seed")
    twin = fb.FusedMLP(net.sizes, **{name: getattr(net, name) for name in names}, device=device)
    twin.load_state_dict(net.state_dict())
    return twin, *(t.to(device) for t in data)
