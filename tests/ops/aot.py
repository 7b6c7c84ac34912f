"""Compiles Triton kernels for GPUs that are not here, as their launchers would launch them, and reads what came out."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {"float": "fp", "bfloat": "bf", "int": "i", "uint": "u"}
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program can have on each architecture


class Recorder:
    """In its ``with`` block kernels are not launched but kept, as sources to compile."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, ASTSource, dict[str, Any]]] = []

    def __enter__(self) -> Recorder:
        recorder, self._run = self, JITFunction.run

        def run(fn: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            recorder.launches.append(source(fn, args, kwargs))

        JITFunction.run = run  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: Any) -> None:
        JITFunction.run = self._run  # type: ignore[method-assign]


def source(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ASTSource, dict[str, Any]]:
    given = dict(zip(fn.arg_names, args, strict=False)) | kwargs
    signature: dict[str, Any] = {}
    constants, attributes = {}, {}
    for i, p in enumerate(fn.params):
        v = given.pop(p.name)
        if p.is_constexpr or v is None:
            signature[p.name], constants[p.name] = "constexpr", v
        elif hasattr(v, "data_ptr"):
            signature[p.name] = pointer(v)
            if v.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(v, tuple):
            signature[p.name] = tuple(pointer(t) for t in v)
            attributes |= {(i, j): [["tt.divisibility", 16]] for j, t in enumerate(v) if t.data_ptr() % 16 == 0}
        elif isinstance(v, bool):
            signature[p.name] = "i1"
        elif isinstance(v, int):
            signature[p.name] = "i32" if -(2**31) <= v < 2**31 else "i64"
            if v % 16 == 0 and not p.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif v == 1 and not p.do_not_specialize:
                signature[p.name], constants[p.name] = "constexpr", 1
        else:
            signature[p.name] = "fp32"
    return fn.__name__, ASTSource(fn, signature, constants, attributes), given


def pointer(t: torch.Tensor) -> str:
    name = "int1" if t.dtype == torch.bool else str(t.dtype).removeprefix("torch.")
    return "*" + re.sub("^[a-z]+", lambda kind: TYPES[kind[0]], name)


def dots(text: str) -> list[int]:
    """The rows of each ``tl.dot`` that tensor cores can take: all but those of float32 in full precision."""
    found = re.findall(r"tt\.dot [^:]*?(tf32\w*)? : tensor<(\d+)x\d+x(\w+)[,>]", text)
    return [int(rows) for precision, rows, dtype in found if precision or dtype != "f32"]


def compiled(name: str, src: ASTSource, options: dict[str, Any], sm: int) -> dict[str, Any]:
    """Registers, spills, shared memory and instructions of one kernel on one architecture; how many ``tl.dot`` are for tensor cores, and
    how many of those that could be wgmma, which takes 64 rows and four warps, are not."""
    start = time.perf_counter()
    binary = triton.compile(src, target=GPUTarget("cuda", sm, 32), options=options)
    seconds = time.perf_counter() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
    text = usage.stdout + usage.stderr
    opcodes = re.findall(r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]+(?:\.\w+)*)\s", sass, re.M)
    count = lambda *names: sum(op.split(".")[0] in names for op in opcodes)  # noqa: E731
    return {
        "kernel": name,
        "sm": sm,
        "constants": {src.fn.arg_names[path[0]]: v for path, v in src.constants.items() if src.fn.arg_names[path[0]].isupper()},
        "registers": int(re.search(r"REG:(\d+)", text)[1]),  # type: ignore[index]
        "stack": int(re.search(r"STACK:(\d+)", text)[1]),  # type: ignore[index]
        "spills": count("STL", "LDL"),
        "shared": binary.metadata.shared,
        "warps": binary.metadata.num_warps,
        "instructions": len(opcodes),
        "dots": len(dots(binary.asm["ttir"])),
        "dots_past_wgmma": sum(rows >= 64 for rows in dots(binary.asm["ttgir"])) if binary.metadata.num_warps % 4 == 0 else 0,
        "wgmma": count("HGMMA"),
        "mma": count("HMMA", "HGMMA", "DMMA"),
        "seconds": round(seconds, 2),
    }


_jobs: list[tuple[Any, ...]] = []  # forked processes find them here: what Triton compiles does not pickle


def compile_all(launches: Mapping[str, Callable[[], Any]]) -> Iterator[dict[str, Any]]:
    """What each call launches, for each architecture, on all cores, as they get done: ``name`` and ``compiled``'s row, or ``error``."""
    torch.set_num_threads(1)  # a forked process would wait for the others
    for name, launch in launches.items():
        for sm in SHARED:
            with Recorder() as recorder, mock.patch("fbkernels.ops.tuning.capability", return_value=sm):
                launch()
            _jobs.extend((name, sm, *one) for one in recorder.launches)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        for done in as_completed(pool.submit(_compile, i) for i in range(len(_jobs))):
            yield done.result()


def _compile(i: int) -> dict[str, Any]:
    name, sm, *launch = _jobs[i]
    try:
        return {"name": name, **compiled(*launch, sm)}
    except Exception as error:
        return {"name": name, "sm": sm, "error": repr(error)}
