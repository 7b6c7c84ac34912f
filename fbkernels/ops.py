"""The operators behind ``torch.ops.fbkernels`` and the choice of their backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fbkernels import reference
from fbkernels._check import integer, non_negative, one_of

try:
    from fbkernels import _C
except ImportError as error:
    raise ImportError(
        f"fbkernels._C, the compiled part, cannot be imported ({error}). "
        "Either `pip install .` and run Python outside the source folder, or `pip install -e .`"
    ) from error

BACKENDS = ("reference", "cpp", "triton", "cuda")
KINDS = ("gaussian", "rademacher")


def build_info() -> dict[str, Any]:
    """What this build of the compiled part contains: version, compiler, CUDA and its architectures or why not, SIMD paths."""
    return _C.build_info()


_BUILD = build_info()
_NATIVE = {"cpu": "cpp", "cuda": "cuda"} if _BUILD["cuda"] else {"cpu": "cpp"}


def backends() -> dict[str, str]:
    """Each backend with ``"available"``, or what is missing for it here."""
    if not _BUILD["cuda"]:
        cuda = f"not compiled in ({_BUILD['cuda_off']}): install the CUDA toolkit and run `FBK_CUDA=1 pip install .`"
    elif not torch.cuda.is_available():
        cuda = "compiled in, but torch sees no CUDA device"
    else:
        cuda = "available for the noise alone: the layers run in torch"
    return {"reference": "available", "cpp": "available", "triton": "not implemented in this version", "cuda": cuda}


def choose(backend: str, device: torch.device) -> str:
    """The backend for tensors on ``device``; ``RuntimeError`` where one is asked for by name and cannot be had."""
    native = _NATIVE.get(device.type)
    if backend == "auto":
        return native or "reference"
    one_of("backend", backend, ("auto", *BACKENDS))
    state = backends()[backend]
    if not state.startswith("available"):
        raise RuntimeError(f"backend {backend!r} is {state}")
    if backend != "reference" and backend != native:
        raise RuntimeError(f"backend {backend!r} cannot take tensors on {device}: move them, or use backend='auto'")
    return backend


def check_noise(step: Tensor, point: int, samples: int, units: int, std: float, kind: str, offset: int) -> None:
    if step.dtype != torch.int64 or step.ndim != 0:
        raise ValueError(f"step must be a 0-dim int64 tensor, got {step.dtype} of shape {tuple(step.shape)}")
    integer("point", point, 0, 2**32 - 1)
    integer("samples", samples, 0)
    integer("units", units, 0)
    integer("offset", offset, 0, max((2**63 - 1) // max(-(-units // 4), 1) - samples, 0))
    non_negative("std", std)
    one_of("kind", kind, KINDS)


def _noise(
    step: Tensor,
    seed: int,
    point: int,
    samples: int,
    units: int,
    std: float,
    kind: str,
    *,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    chosen = choose(backend, step.device)
    if chosen == "reference" or dtype == torch.float64:
        check_noise(step, point, samples, units, std, kind, offset)
        return reference.noise(seed, step, point, samples, units, std, kind, dtype, step.device, offset)
    out = torch.empty(samples, units, device=step.device)
    _C.noise(out, step, seed, point, std, kind, offset, torch.get_num_threads())
    return out if dtype == torch.float32 else out.to(dtype)


def _noise_fake(
    step: Tensor,
    seed: int,
    point: int,
    samples: int,
    units: int,
    std: float,
    kind: str,
    *,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    return step.new_empty(samples, units, dtype=dtype)


# define/impl and not custom_op: 5 to 7 against 19 to 32 us a call
_library = torch.library.Library("fbkernels", "DEF")
_library.define(
    "philox_noise(Tensor step, int seed, int point, SymInt samples, SymInt units, float std, str kind, *, "
    'SymInt offset=0, ScalarType dtype=float, str backend="auto") -> Tensor'
)
_library.impl("philox_noise", _noise, "CompositeExplicitAutograd")
torch.library.register_fake("fbkernels::philox_noise", _noise_fake, lib=_library)


def noise(
    step: Tensor,
    seed: int,
    point: int,
    samples: int,
    units: int,
    std: float,
    kind: str,
    *,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """The noise of SPEC 6, [samples, units], on the device of ``step``; the dispatcher is left out where nothing needs it."""
    seed -= 2**64 if seed >= 2**63 else 0  # schemas know int64 alone
    direct = type(step) is Tensor and not torch.compiler.is_compiling()
    op = _noise if direct else torch.ops.fbkernels.philox_noise
    return op(step, seed, point, samples, units, std, kind, offset=offset, dtype=dtype, backend=backend)
