"""An operator: its schema, what it returns, and who computes it where."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
from collections import namedtuple
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fbkernels._check import one_of
from fbkernels._compile import constant
from fbkernels._version import version

try:
    from fbkernels import _C
except ImportError as error:
    raise ImportError(
        f"fbkernels._C, the compiled part, cannot be imported ({error}). "
        "Either `pip install .` and run Python outside the source folder, or `pip install -e .`"
    ) from error


def digest(csrc: Path) -> str:
    """What setup.py compiles in of the sources."""
    files = sorted(p for p in csrc.iterdir() if p.suffix in (".cpp", ".cu", ".h"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]


def stale(build: Mapping[str, Any], csrc: Path) -> bool:
    """Whether the compiled part is of another version, or of other sources than those that lie beside the package."""
    if build["version"] != version:
        return True
    return (csrc / "fused_mlp.h").exists() and build.get("sources") != digest(csrc)


if stale(_C.build_info(), Path(__file__).parents[2] / "csrc"):
    raise ImportError(f"{_C.__file__} was not compiled from the sources of fbkernels {version} that are here: run `pip install` again")

C: Any = _C  # tests put an emulated one here
BACKENDS = ("reference", "cpp", "triton", "cuda")
COMPILED = ("cpp", "cuda")  # the same calls of C, which looks where its tensors are, and checks what it is given
DTYPES: Mapping[str, tuple[torch.dtype, ...]] = {
    "cpp": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32,),
}
TRITON = importlib.util.find_spec("triton") is not None
EAGER = (Tensor, torch.nn.Parameter)


def build_info() -> dict[str, Any]:
    """What this build of the compiled part contains: version, compiler, CUDA and its architectures or why not, SIMD paths."""
    return C.build_info()  # type: ignore[no-any-return]


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU: for tests, a thousand times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def emulating() -> bool:
    """Whether the CUDA kernels are compiled for the CPU: for tests, a thousand times slower."""
    return build_info().get("nvcc") == "emulated"


def backends() -> dict[str, str]:
    """Each backend with ``"available"``, or what is missing for it here."""
    build = build_info()
    if not TRITON:
        triton = "not installed: `pip install triton`"
    elif interpreting():
        triton = "available in Triton's interpreter, for tests"
    elif not torch.cuda.is_available():
        triton = "installed, but torch sees no CUDA device"
    else:
        triton = _for_gpus_from(80) or "available"
    if not build["cuda"]:
        cuda = f"not compiled in ({build['cuda_off']}): install the CUDA toolkit and run `FBK_CUDA=1 pip install .`"
    elif emulating():
        cuda = "available on the CPU, emulated, for tests"
    elif not torch.cuda.is_available():
        cuda = "compiled in, but torch sees no CUDA device"
    else:
        lowest = min(int(arch.rstrip("af")) for arch in build["cuda_archs"].split(";"))
        cuda = _for_gpus_from(lowest) or "available for float32"
    return {"reference": "available", "cpp": "available", "triton": triton, "cuda": cuda}


def _for_gpus_from(arch: int) -> str:
    """Why this GPU is too old, or nothing."""
    capability = torch.cuda.get_device_capability()
    if capability >= divmod(arch, 10):
        return ""
    return f"for GPUs from compute capability {arch // 10}.{arch % 10} on, this one has {'.'.join(map(str, capability))}"


@functools.cache
def native(device: str) -> tuple[str, ...]:
    """The backends for tensors on a device, the best first."""
    states = backends()
    usable = ("cpp",) if device == "cpu" else ("triton", "cuda") if device == "cuda" else ()
    found = [name for name in usable if states[name].startswith("available")]
    tested = [name for name, here in (("triton", interpreting()), ("cuda", emulating())) if device == "cpu" and here]
    return (*found, "reference", *tested)


@constant  # Dynamo traces into a cached function
def choose(backend: str, device: torch.device) -> str:
    """The backend for tensors on ``device``; ``RuntimeError`` where one is asked for by name and cannot be had."""
    usable: tuple[str, ...] = native(device.type)
    if backend == "auto":
        return usable[0]
    one_of("backend", backend, ("auto", *BACKENDS))
    if backend in usable:
        return backend
    state = backends()[backend]
    if not state.startswith("available"):
        raise RuntimeError(f"backend {backend!r} is {state}")
    raise RuntimeError(f"backend {backend!r} cannot take tensors on {device}: move them, or use backend='auto'")


def backend_for(backend: str, device: torch.device, dtype: torch.dtype | None) -> str:
    """The backend for tensors there of the dtype, None for any; where one is named, TypeError for a dtype that it does not take."""
    chosen = choose(backend, device)
    if dtype is not None and chosen in DTYPES and dtype not in DTYPES[chosen]:
        if backend != "auto":
            takes = ", ".join(str(d).removeprefix("torch.") for d in DTYPES[chosen])
            raise TypeError(f"backend {backend!r} takes {takes}, got {dtype}: use backend='auto' or 'reference'")
        return "reference"
    return chosen


def backend_of(t: Tensor, backend: str) -> str:
    return backend_for(backend, t.device, t.dtype)


chosen_for = functools.cache(backend_for)


def forget() -> None:
    """What was found out about backends, for tests."""
    native.cache_clear()
    chosen_for.cache_clear()


def fuses(backend: str, device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes of the layers that run as one block with their activation, pooling and noise."""
    chosen = choose(backend, device)
    # autocast on the CPU takes some functions to float32 that a block would run in bfloat16
    return () if chosen == "cpp" and torch.is_autocast_enabled("cpu") else DTYPES.get(chosen, ())


@functools.cache
def kernels() -> Any:
    """The launchers of the Triton kernels, imported at their first use."""
    return importlib.import_module("fbkernels.kernels")


class Op:
    """``torch.ops.fbkernels.<name>``, the name that the schema has.

    Args:
        outputs: empty tensors for what the op returns: the fake kernel, and what kernels fill.
        backends: who computes it, by the backend's name.
        arguments: makes of a call's arguments the tuple that the other functions take; it has the ``backend`` that was asked for. Default:
            a namedtuple of the schema's.
        check: what kernels do not check for themselves; the compiled part does.
        by: the place in the tuple of the tensor whose device and dtype choose the backend.
        any_dtype: whether its dtype does not count.

    A call from here leaves the dispatcher out where nothing needs it, which saves 5 us. define/impl and not custom_op: 5 to 7 against 19 to
    32 us a call.
    """

    library = torch.library.Library("fbkernels", "DEF")
    all: ClassVar[dict[str, Op]] = {}

    def __init__(
        self,
        schema: str,
        outputs: Callable[[Any], Any],
        backends: Mapping[str, Callable[[Any], Any]],
        check: Callable[[Any], None] | None = None,
        arguments: Callable[..., Any] | None = None,
        by: int = 0,
        any_dtype: bool = False,
    ) -> None:
        self.name = schema.partition("(")[0]
        self.arguments: Callable[..., Any] = arguments or named(schema)
        self.outputs, self.backends, self.check, self.by, self.any_dtype = outputs, backends, check, by, any_dtype
        self.library.define(schema)
        self.library.impl(self.name, self.run, "CompositeExplicitAutograd")
        fake = lambda *args, **kwargs: outputs(self.arguments(*args, **kwargs))  # noqa: E731
        torch.library.register_fake(f"fbkernels::{self.name}", fake, lib=self.library)
        self.registered = getattr(torch.ops.fbkernels, self.name)
        self.all[self.name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        first = first[0] if isinstance(first, list) and first else first
        direct = type(first) in EAGER and not torch.compiler.is_compiling()
        return (self.run if direct else self.registered)(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(self.arguments(*args, **kwargs))

    def compute(self, a: Any) -> Any:
        t = a[self.by]
        chosen = chosen_for(a.backend, t.device, None if self.any_dtype else t.dtype)
        if chosen not in self.backends:
            if a.backend != "auto":
                raise RuntimeError(f"backend {chosen!r} has no kernel for {self.name}: use backend='auto'")
            chosen = "reference"
        return self.on(chosen, a)

    def on(self, backend: str, a: Any) -> Any:
        """What a backend makes of it, whatever the call asks for."""
        if self.check is not None and backend not in COMPILED:
            self.check(a)
        return self.backends[backend](a)


def named(schema: str) -> Callable[..., Any]:
    """A namedtuple of the schema's arguments and their defaults."""
    listed = torch._C.parse_schema(schema).arguments
    defaults = [v.default_value for v in listed if v.has_default_value()]
    return namedtuple("arguments", [v.name for v in listed], defaults=defaults)


def table() -> dict[str, tuple[str, ...]]:
    """The backends that have each op."""
    return {name: tuple(b for b in BACKENDS if b in op.backends) for name, op in Op.all.items()}


def maps(t: Tensor) -> Tensor:
    """An activity as the compiled part reads it: [samples, height, width, channels]."""
    return t.permute(0, 2, 3, 1) if t.ndim == 4 else t[:, None, None]


def dense(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t.contiguous()


def given(h: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    """Outputs as kernels take them: None for those that are not wanted."""
    return h, *(t if t.numel() else None for t in others)


def expect(name: str, t: Tensor | None, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> None:
    """A Triton kernel reads what it is given. ``dtype``: None for any float."""
    if t is None:
        return
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {t.device}")
    if t.dtype != dtype if dtype is not None else not t.is_floating_point():
        raise TypeError(f"{name} must have dtype {dtype or 'of a float'}, got {t.dtype}")
