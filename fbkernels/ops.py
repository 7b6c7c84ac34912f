"""The operators behind ``torch.ops.fbkernels`` and the choice of their backend."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fbkernels import reference, tuning
from fbkernels._check import in_interval, integer, non_negative, one_of, positive
from fbkernels._compile import constant

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
_TRITON = importlib.util.find_spec("triton") is not None
_DTYPES = {
    "cpp": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32,),
}
_COMPILED = ("cpp", "cuda")  # the same calls of _C, which looks where its tensors are


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU: for tests, a thousand times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def emulating() -> bool:
    """Whether the CUDA kernels are compiled for the CPU: for tests, a thousand times slower."""
    return _BUILD.get("nvcc") == "emulated"


def _for_gpus_from(arch: int) -> str:
    """Why this GPU is too old, or nothing."""
    capability = torch.cuda.get_device_capability()
    if capability >= divmod(arch, 10):
        return ""
    return f"for GPUs from compute capability {arch // 10}.{arch % 10} on, this one has {'.'.join(map(str, capability))}"


def backends() -> dict[str, str]:
    """Each backend with ``"available"``, or what is missing for it here."""
    if not _TRITON:
        triton = "not installed: `pip install triton`"
    elif interpreting():
        triton = "available in Triton's interpreter, for tests"
    elif not torch.cuda.is_available():
        triton = "installed, but torch sees no CUDA device"
    else:
        triton = _for_gpus_from(80) or "available"
    if not _BUILD["cuda"]:
        cuda = f"not compiled in ({_BUILD['cuda_off']}): install the CUDA toolkit and run `FBK_CUDA=1 pip install .`"
    elif emulating():
        cuda = "available on the CPU, emulated, for tests"
    elif not torch.cuda.is_available():
        cuda = "compiled in, but torch sees no CUDA device"
    else:
        lowest = min(int(arch.rstrip("af")) for arch in _BUILD["cuda_archs"].split(";"))
        cuda = _for_gpus_from(lowest) or "available for float32"
    return {"reference": "available", "cpp": "available", "triton": triton, "cuda": cuda}


@constant  # Dynamo traces into a cached function
@functools.cache
def _native(device: str) -> tuple[str, ...]:
    """The backends for tensors on a device, the best first."""
    states = backends()
    usable = ("cpp",) if device == "cpu" else ("triton", "cuda") if device == "cuda" else ()
    found = [name for name in usable if states[name].startswith("available")]
    tested = [name for name, here in (("triton", interpreting()), ("cuda", emulating())) if device == "cpu" and here]
    return (*found, "reference", *tested)


def choose(backend: str, device: torch.device) -> str:
    """The backend for tensors on ``device``; ``RuntimeError`` where one is asked for by name and cannot be had."""
    native: tuple[str, ...] = _native(device.type)
    if backend == "auto":
        return native[0]
    one_of("backend", backend, ("auto", *BACKENDS))
    if backend in native:
        return backend
    state = backends()[backend]
    if not state.startswith("available"):
        raise RuntimeError(f"backend {backend!r} is {state}")
    raise RuntimeError(f"backend {backend!r} cannot take tensors on {device}: move them, or use backend='auto'")


@functools.cache
def _kernels() -> Any:
    """The launchers of the Triton kernels, imported at their first use."""
    return importlib.import_module("fbkernels.kernels")


def check_noise(step: Tensor, point: int, samples: int, units: int, std: float, kind: str, offset: int) -> None:
    if step.dtype != torch.int64 or step.ndim != 0:
        raise ValueError(f"step must be a 0-dim int64 tensor, got {step.dtype} of shape {tuple(step.shape)}")
    integer("point", point, 0, 2**32 - 1)
    integer("samples", samples, 0)
    integer("units", units, 0)
    integer("offset", offset, 0, max((2**63 - 1) // max(-(-units // 4), 1) - samples, 0))
    non_negative("std", std)
    one_of("kind", kind, KINDS)


class Op:
    """``torch.ops.fbkernels.<name>``. A call from here leaves the dispatcher out where nothing needs it, which saves 5 us.

    define/impl and not custom_op: 5 to 7 against 19 to 32 us a call.
    """

    library = torch.library.Library("fbkernels", "DEF")

    def __init__(self, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
        name = schema.partition("(")[0]
        signature = inspect.signature(run)

        def shaped(*args: Any, **kwargs: Any) -> Any:  # a fake names what it reads, out of up to thirty arguments
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            update = bound.arguments.pop("update", {})
            return fake(**bound.arguments, **update)

        self.library.define(schema)
        self.library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fbkernels::{name}", shaped, lib=self.library)
        self.run, self.registered = run, getattr(torch.ops.fbkernels, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        direct = type(first) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
        return (self.run if direct else self.registered)(*args, **kwargs)


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
    if chosen != "cpp" or dtype == torch.float64:
        check_noise(step, point, samples, units, std, kind, offset)
    if chosen == "reference" or dtype == torch.float64:
        return reference.noise(seed, step, point, samples, units, std, kind, dtype, step.device, offset)
    out = torch.empty(samples, units, device=step.device)
    if chosen == "triton":
        _kernels().noise(out, step, seed, point, std, kind, offset)
    else:
        _C.noise(out, step, seed, point, std, kind, offset, torch.get_num_threads())
    return out if dtype == torch.float32 else out.to(dtype)


def _noise_fake(step: Tensor, samples: int, units: int, dtype: torch.dtype, **_: Any) -> Tensor:
    return step.new_empty(samples, units, dtype=dtype)


_philox_noise = Op(
    "philox_noise(Tensor step, int seed, int point, SymInt samples, SymInt units, float std, str kind, *, "
    'SymInt offset=0, ScalarType dtype=float, str backend="auto") -> Tensor',
    _noise,
    _noise_fake,
)


def noise(step: Tensor, seed: int, *args: Any, **kwargs: Any) -> Tensor:
    """The noise of SPEC 6, [samples, units], on the device of ``step``."""
    out: Tensor = _philox_noise(step, int64(seed), *args, **kwargs)
    return out


def int64(seed: int) -> int:
    """The seed as schemas know it."""
    return seed - 2**64 if seed >= 2**63 else seed


def _backend(t: Tensor, backend: str) -> str:
    """Who computes on the tensor; where a backend is named, TypeError for a dtype that it does not take."""
    chosen = choose(backend, t.device)
    if chosen in _DTYPES and t.dtype not in _DTYPES[chosen]:
        if backend != "auto":
            takes = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES[chosen])
            raise TypeError(f"backend {backend!r} takes {takes}, got {t.dtype}: use backend='auto' or 'reference'")
        return "reference"
    return chosen


def fuses(backend: str, device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes of the layers that run as one block with their activation, pooling and noise."""
    chosen = choose(backend, device)
    # autocast on the CPU takes some functions to float32 that a block would run in bfloat16
    return () if chosen == "cpp" and torch.is_autocast_enabled("cpu") else _DTYPES.get(chosen, ())


def _compiled(t: Tensor, backend: str, having: Sequence[str]) -> bool:
    """Whether the compiled part takes the tensor, where not each backend has a kernel."""
    chosen = _backend(t, backend)
    if chosen not in (*having, "reference") and backend != "auto":
        hint = "; feedback(winner=...) unpools in its launch" if chosen == "triton" else ""
        raise RuntimeError(f"backend {chosen!r} has no kernel for this alone: use backend='auto'{hint}")
    return chosen in having


def _maps(t: Tensor) -> Tensor:
    """An activity as the compiled part reads it: [samples, height, width, channels]."""
    return t.permute(0, 2, 3, 1) if t.ndim == 4 else t[:, None, None]


def _dense(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t.contiguous()


def _behind(z: Tensor, rows: int, pool: str, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """An empty tensor for ``rows`` rows of the activity behind a pooling."""
    if z.ndim != 4:
        return z.new_empty(rows, *z.shape[1:])
    size: Sequence[int] = z.shape[2:]
    if pool != "none":
        size = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel_size, stride, padding, strict=True)]
    return torch.empty(rows, z.shape[1], *size, dtype=z.dtype, device=z.device, memory_format=torch.channels_last)


_TILE_UNITS = 64  # BU of kernels/feedback_update.py, FeedbackUpdateParams::block_units
# B's update and the joint rules' prediction ride in the launch of the layer whose rows of B they are (SPEC 5)
_UPDATE = (
    "Tensor? B=None, Tensor? M=None, Tensor? G=None, Tensor? R=None, Tensor? Q=None, Tensor? w=None, Tensor? learned_step=None, "
    "bool predicts=False"
)


def _expect(name: str, t: Tensor | None, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> None:
    """A Triton kernel reads what it is given. ``dtype``: None for any float."""
    if t is None:
        return
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {t.device}")
    if t.dtype != dtype if dtype is not None else not t.is_floating_point():
        raise TypeError(f"{name} must have dtype {dtype or 'of a float'}, got {t.dtype}")


def _plan(
    like: Tensor,
    units: int,
    rows: int,
    kind: str,
    B: Tensor | None = None,
    M: Tensor | None = None,
    G: Tensor | None = None,
    R: Tensor | None = None,
    Q: Tensor | None = None,
    w: Tensor | None = None,
    learned_step: Tensor | None = None,
    predicts: bool = False,
) -> Any:
    """B's update as a Triton launch takes it."""
    if B is not None:
        m = B.shape[-1] if B.ndim else 0
        _expect("B", B, like, units, m)
        if (R is None) != (Q is None) or (R is None) != (w is None) or (R is not None and G is not None) or (M is not None and G is None):
            raise ValueError("G must be given, with or without M, or R, Q and w")
        if (G is None and R is None) != (learned_step is None):
            raise ValueError("learned_step goes together with G, or R, Q and w")
        first = R if G is None else G
        learned = first.shape[0] if first is not None and first.ndim else 0
        for name, t in (("G", G), ("R", R), ("Q", Q)):
            _expect(name, t, like, learned, m)
        _expect("M", M, like, m, m)
        _expect("w", w, like, learned)
        _expect("learned_step", learned_step, like, dtype=torch.int64)
        B, M, G, R, Q, w = (None if t is None else t.float().contiguous() for t in (B, M, G, R, Q, w))
    return _kernels().plan(B, M, G, R, Q, w, learned_step, rows if predicts else 0, kind, like)


def _ride(
    z: Tensor,
    key: tuple[Any, ...],
    offset: int,
    backend: str,
    B: Tensor | None = None,
    M: Tensor | None = None,
    G: Tensor | None = None,
    R: Tensor | None = None,
    Q: Tensor | None = None,
    w: Tensor | None = None,
    learned_step: Tensor | None = None,
    predicts: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same beside the layer, where no launch does both."""
    if B is None:
        return z.new_empty(0, dtype=torch.float32), z.new_empty(0, dtype=torch.float32)
    step, seed, point, rows, std, kind = key
    predicted, rows = (step, rows) if predicts else (None, 0)
    return _feedback_update(B, M, G, R, Q, w, learned_step, predicted, seed, point, rows, std, kind, offset=offset, backend=backend)


def _ride_fake(
    z: Tensor, rows: int, backend: str, B: Tensor | None = None, learned_step: Tensor | None = None, predicts: bool = False, **_: Any
) -> tuple[Tensor, Tensor]:
    none = z.new_empty(0, dtype=torch.float32)
    if B is None:
        return none, none.clone()
    return _feedback_update_fake(B=B, step=learned_step, predicted_step=z if predicts else None, predicted_rows=rows, backend=backend)


def _pointwise(
    z: Tensor,
    q: Tensor | None,
    bias: Tensor | None,
    activation: str,
    pool: str,
    pool_first: bool,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    step: Tensor,
    seed: int,
    point: int,
    rows: int,
    std: float,
    kind: str,
    *,
    scale: Tensor | None = None,
    antithetic: bool = False,
    offset: int = 0,
    backend: str = "auto",
    **update: Any,
) -> tuple[Tensor, ...]:
    if z.ndim not in (2, 4) or (z.ndim == 2 and pool != "none"):
        raise ValueError(f"z must be [samples, channels, height, width], or [samples, units] without pooling, got shape {tuple(z.shape)}")
    one_of("activation", activation, reference.ACTIVATIONS)
    one_of("pool", pool, ("none", "max", "avg"))
    integer("rows", rows, 0, len(z))
    for s in stride:
        integer("stride", s, 1)
    if pool == "none":
        kernel_size, stride, padding = (1, 1), (1, 1), (0, 0)
    window = (pool, pool_first, kernel_size, stride, padding)
    key: tuple[Any, ...] = (step, seed, point, rows, std, kind)
    chosen = _backend(z, backend)
    if chosen == "reference":
        h, kept, winner = reference.pointwise(z, bias, activation, *window, scale)
        perturbed = z.new_empty(0)
        if rows:
            exact = z.dtype if z.dtype == torch.float64 else torch.float32
            xi = noise(step, seed, point, rows, h[:1].numel(), std, kind, offset=offset, dtype=exact, backend=backend)
            xi = reference.layout(xi, (rows, *h.shape[1:])).to(z.dtype)
            clean = h[:rows] if q is None else reference.pointwise(q, bias, activation, *window, scale)[0]
            perturbed = (torch.cat((clean, clean)) if antithetic and q is None else clean) + (torch.cat((xi, -xi)) if antithetic else xi)
        # an op may not return its input
        h, kept = (_dense(t).clone() if t.data_ptr() == z.data_ptr() else _dense(t) for t in (h, kept))
        return h, _dense(perturbed), kept, _dense(winner), *_ride(z, key, offset, backend, **update)
    z, q = _dense(z), None if q is None else _dense(q)
    h, perturbed, kept, winner = _pointwise_outputs(z, activation, pool, kernel_size, stride, padding, rows * (1 + antithetic))
    given = [t if t.numel() else None for t in (perturbed, kept, winner)]
    bias, scale = None if bias is None else bias.float().contiguous(), None if scale is None else scale.float().contiguous()
    if chosen == "triton":
        units = h[:1].numel()
        check_noise(step, point, rows, units, std, kind, offset)
        _expect("step", step, z, dtype=torch.int64)
        _expect("q", q, z, rows * (1 + antithetic), *z.shape[1:], dtype=z.dtype)
        _expect("scale", scale, z, z.shape[1])
        _expect("bias", bias, z, z.shape[1])
        _check_window(z, pool, kernel_size, padding)
        plan = _plan(z, units, rows, kind, **update)
        _kernels().perturbed_pointwise(z, q, scale, bias, activation, *window, *key, antithetic, offset, h, *given, plan)
        return h, perturbed, kept, winner, plan.new, plan.parts
    p, k, won = (None if t is None else _maps(t) for t in given)
    _C.pointwise(
        _maps(z),
        None if q is None else _maps(q),
        scale,
        bias,
        _maps(h),
        p,
        k,
        won,
        activation,
        pool,
        pool_first,
        (*kernel_size, *stride, *padding),
        step,
        seed,
        point,
        std,
        kind,
        rows,
        antithetic,
        offset,
        torch.get_num_threads(),
    )
    return h, perturbed, kept, winner, *_ride(z, key, offset, backend, **update)


def _pointwise_outputs(
    z: Tensor, activation: str, pool: str, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors for h, the perturbed activity, what phi' is read from where h does not do, and the winners."""
    h = _behind(z, z.shape[0], pool, kernel_size, stride, padding)
    perturbed = _behind(z, rows, pool, kernel_size, stride, padding) if rows else z.new_empty(0)
    kept = torch.empty_like(h) if activation == "gelu" and pool != "avg" else z.new_empty(0)
    return h, perturbed, kept, torch.empty_like(h, dtype=torch.uint8) if pool == "max" else z.new_empty(0, dtype=torch.uint8)


def _pointwise_fake(
    z: Tensor,
    activation: str,
    pool: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    rows: int,
    antithetic: bool,
    backend: str,
    **rest: Any,
) -> tuple[Tensor, ...]:
    outputs = _pointwise_outputs(z, activation, pool, kernel_size, stride, padding, rows * (1 + antithetic))
    return *outputs, *_ride_fake(z, rows, backend, **rest)


perturbed_pointwise = Op(
    "perturbed_pointwise(Tensor z, Tensor? q, Tensor? bias, str activation, str pool, bool pool_first, int[] kernel_size, int[] stride, "
    "int[] padding, Tensor step, int seed, int point, SymInt rows, float std, str kind, *, Tensor? scale=None, bool antithetic=False, "
    f'SymInt offset=0, str backend="auto", {_UPDATE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
    _pointwise,
    _pointwise_fake,
)


def _two(name: str, sizes: Sequence[int], low: int) -> None:
    if len(sizes) != 2:
        raise ValueError(f"{name} must have two numbers, got {tuple(sizes)}")
    for n in sizes:
        integer(name, n, low)


def _check_window(z: Tensor, pool: str, kernel_size: Sequence[int], padding: Sequence[int]) -> None:
    """What _C says of a pooling, for the backends that do not ask it."""
    if pool == "none":
        return
    for n, k, p in zip(z.shape[2:], kernel_size, padding, strict=True):
        integer("kernel_size", k, 1)
        integer("padding", p, 0, k // 2)
        if k > n + 2 * p:
            raise ValueError(f"kernel_size must not be larger than the padded map, {n + 2 * p}, got {k}")
    if pool == "max" and kernel_size[0] * kernel_size[1] > 256:
        raise ValueError(f"kernel_size of max-pooling must cover at most 256 places, which a byte can number, got {tuple(kernel_size)}")


_NO_POOL: tuple[Any, ...] = ("none", False, (1, 1), (1, 1), (0, 0))
_LINEAR = ((1, 1), (0, 0), (1, 1), 1)  # as a convolution of maps of one place


def _linear(
    x: Tensor,
    p: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    step: Tensor,
    seed: int,
    point: int,
    rows: int,
    std: float,
    kind: str,
    *,
    antithetic: bool = False,
    offset: int = 0,
    backend: str = "auto",
    **update: Any,
) -> tuple[Tensor, ...]:
    if x.ndim != 2:
        raise ValueError(f"x must be [samples, units], got shape {tuple(x.shape)}")
    key: tuple[Any, ...] = (step, seed, point, rows, std, kind)

    def library() -> tuple[Tensor, ...]:
        linear = torch.nn.functional.linear
        if p is not None and weight.numel() >= 2**18:
            # a weight larger than the cache is read once for both streams: 8.5 against 10.1 ms at 4096 x 2048, 64 samples
            z, q = linear(torch.cat((x, p)), weight, bias).split((len(x), len(p)))
        else:
            z, q = linear(x, weight, bias), None if p is None else linear(p, weight, bias)
        return _pointwise(z, q, None, activation, *_NO_POOL, *key, antithetic=antithetic, offset=offset, backend=backend, **update)

    def kernel() -> tuple[Tensor, ...]:
        like = x.new_empty(1).expand(len(x), len(weight))
        h, perturbed, kept, winner = _pointwise_outputs(like, activation, "none", (), (), (), rows * (1 + antithetic))
        out, k = (t if t.numel() else None for t in (perturbed, kept))
        q, b = (None if t is None else t.contiguous() for t in (p, bias))
        given = (x.contiguous(), q, weight.contiguous(), b)
        _C.linear(*given, h, out, k, activation, step, seed, point, std, kind, rows, antithetic, offset)
        return h, perturbed, kept, winner, *_ride(x, key, offset, backend, **update)

    chosen = _backend(x, backend)
    if chosen == "triton":
        out = _fused("perturbed_linear", x, p, weight, bias, _LINEAR, activation, key, antithetic, offset, update, library)
    elif chosen == "cuda":
        integer("rows", rows, 0, len(x))
        shapes = (*x.shape, *weight.shape, 0 if p is None else len(p))
        run = {"kernel": kernel, "library": library}
        out = run[tuning.fastest("perturbed_linear_cuda", (activation, kind, *shapes), tuple(run), lambda name: run[name]())]()
    else:
        out = library()
    return *out[:3], *out[4:]


def _linear_fake(x: Tensor, weight: Tensor, activation: str, rows: int, antithetic: bool, backend: str, **rest: Any) -> tuple[Tensor, ...]:
    z = x.new_empty(x.shape[0], weight.shape[0])
    h, perturbed, kept, _ = _pointwise_outputs(z, activation, "none", (1, 1), (1, 1), (0, 0), rows * (1 + antithetic))
    return h, perturbed, kept, *_ride_fake(z, rows, backend, **rest)


perturbed_linear = Op(
    "perturbed_linear(Tensor x, Tensor? p, Tensor weight, Tensor? bias, str activation, Tensor step, int seed, int point, SymInt rows, "
    f'float std, str kind, *, bool antithetic=False, SymInt offset=0, str backend="auto", {_UPDATE}) '
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear,
    _linear_fake,
)


def _conv2d(
    x: Tensor,
    p: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    pool: str,
    pool_first: bool,
    kernel_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    step: Tensor,
    seed: int,
    point: int,
    rows: int,
    std: float,
    kind: str,
    *,
    antithetic: bool = False,
    offset: int = 0,
    backend: str = "auto",
    **update: Any,
) -> tuple[Tensor, ...]:
    if x.ndim != 4:
        raise ValueError(f"x must be [samples, channels, height, width], got shape {tuple(x.shape)}")
    key: tuple[Any, ...] = (step, seed, point, rows, std, kind)
    layer = (stride, padding, dilation, groups)
    x, weight = _dense(x), _dense(weight)

    def library() -> tuple[Tensor, ...]:
        convolve = torch.nn.functional.conv2d
        z, q = convolve(x, weight, bias, *layer), None if p is None else convolve(p, weight, bias, *layer)
        window = (pool, pool_first, kernel_size, pool_stride, pool_padding)
        return _pointwise(z, q, None, activation, *window, *key, antithetic=antithetic, offset=offset, backend=backend, **update)

    if _backend(x, backend) != "triton" or pool != "none":
        return library()
    return _fused("perturbed_conv2d", x, p, weight, bias, layer, activation, key, antithetic, offset, update, library)


def _conv2d_fake(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    pool: str,
    kernel_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    rows: int,
    antithetic: bool,
    backend: str,
    **rest: Any,
) -> tuple[Tensor, ...]:
    z = x.new_empty(x.shape[0], weight.shape[0], *reference.conv_size(x.shape[2:], weight, stride, padding, dilation))
    outputs = _pointwise_outputs(z, activation, pool, kernel_size, pool_stride, pool_padding, rows * (1 + antithetic))
    return *outputs, *_ride_fake(z, rows, backend, **rest)


perturbed_conv2d = Op(
    "perturbed_conv2d(Tensor x, Tensor? p, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, "
    "str activation, str pool, bool pool_first, int[] kernel_size, int[] pool_stride, int[] pool_padding, Tensor step, int seed, "
    f'int point, SymInt rows, float std, str kind, *, bool antithetic=False, SymInt offset=0, str backend="auto", {_UPDATE}) '
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _conv2d,
    _conv2d_fake,
)


def _fused(
    name: str,
    x: Tensor,
    p: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    layer: tuple[Any, ...],
    activation: str,
    key: tuple[Any, ...],
    antithetic: bool,
    offset: int,
    update: dict[str, Any],
    library: Callable[[], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """One launch of Triton, or the library's layer and one launch of what follows it: what is faster on this GPU."""
    step, _, point, rows, std, kind = key
    stride, padding, dilation, groups = layer
    one_of("activation", activation, reference.ACTIVATIONS)
    integer("rows", rows, 0, len(x))
    integer("groups", groups, 1)
    for argument, pair, low in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        _two(argument, pair, low)
    if weight.ndim != x.ndim or weight.shape[1] * groups != x.shape[1] or weight.shape[0] % groups or weight.dtype != x.dtype:
        expected = f"{x.ndim} dimensions, {x.shape[1]} / {groups} input channels and dtype {x.dtype}"
        raise ValueError(f"weight must have {expected}, got shape {tuple(weight.shape)} and {weight.dtype}")
    size = reference.conv_size(x.shape[2:], weight, stride, padding, dilation) if x.ndim == 4 else []
    if any(n < 1 for n in size):
        raise ValueError(f"weight must not be larger than the padded map, got shape {tuple(weight.shape)} for {tuple(x.shape)}")
    outputs = weight.shape[0]
    _expect("weight", weight, x, *weight.shape)
    _expect("bias", bias, x, outputs)
    _expect("p", p, x, rows * (1 + antithetic), *x.shape[1:], dtype=x.dtype)
    units = outputs * math.prod(size)
    check_noise(step, point, rows, units, std, kind, offset)
    _expect("step", step, x, dtype=torch.int64)
    plan = _plan(x, units, rows, kind, **update)
    like = x.new_empty(1).expand(len(x), outputs, *size)
    h, perturbed, kept, winner = _pointwise_outputs(like, activation, "none", (), (), (), rows * (1 + antithetic))
    tensors = (_dense(x), None if p is None else _dense(p), _dense(weight), None if bias is None else bias.contiguous())
    outs = (h, *(t if t.numel() else None for t in (perturbed, kept)))

    def run(configuration: dict[str, int] | str) -> tuple[Tensor, ...]:
        if isinstance(configuration, str):
            return library()
        _kernels().perturbed_conv2d(*tensors, *layer, activation, *key, antithetic, offset, *outs, plan, configuration)
        return h, perturbed, kept, winner, plan.new, plan.parts

    candidates = [*_kernels().configurations(x.dtype), "library"]
    shapes = (*x.shape, *weight.shape, *stride, *padding, *dilation, groups, 0 if p is None else len(p), *plan.shape)
    return run(_kernels().fastest(name, (str(x.dtype), activation, kind, _kernels().precision(), *shapes), candidates, run))


def _unpool(
    delta: Tensor,
    winner: Tensor,
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    backend: str = "auto",
) -> Tensor:
    if not _compiled(delta, backend, _COMPILED):
        return _dense(reference.unpool(delta, winner, size, kernel_size, stride, padding))
    out = _unpool_fake(delta, size)
    _C.unpool(_maps(_dense(delta)), _maps(_dense(winner)), _maps(out), (*kernel_size, *stride, *padding), torch.get_num_threads())
    return out


def _unpool_fake(delta: Tensor, size: Sequence[int], **_: Any) -> Tensor:
    return torch.empty(*delta.shape[:2], *size, dtype=delta.dtype, device=delta.device, memory_format=torch.channels_last)


unpool = Op(
    'unpool(Tensor delta, Tensor winner, SymInt[] size, int[] kernel_size, int[] stride, int[] padding, *, str backend="auto") -> Tensor',
    _unpool,
    _unpool_fake,
)


def _pooled_weight_gradient(
    delta: Tensor,
    winner: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    kernel_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    if not _compiled(delta, backend, ("cpp",)):
        window = (kernel_size, pool_stride, pool_padding)
        exact, bias = reference.pooled_weight_gradient(delta, winner, x, weight, stride, padding, dilation, *window)
        return torch.empty_like(weight).copy_(exact), bias.to(weight.dtype)
    gradient, bias = torch.empty_like(weight, dtype=torch.float32), torch.empty(weight.shape[0])
    delta, winner, x = (_maps(_dense(t)) for t in (delta.float(), winner, x))
    sizes = (*kernel_size, *pool_stride, *pool_padding)
    _C.conv_gradient(delta, winner, x, gradient, bias, (*stride, *padding, *dilation), sizes, torch.get_num_threads())
    return gradient.to(weight.dtype), bias.to(weight.dtype)


def _pooled_weight_gradient_fake(weight: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), weight.new_empty(weight.shape[0])


pooled_weight_gradient = Op(
    "pooled_weight_gradient(Tensor delta, Tensor winner, Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, "
    'int[] kernel_size, int[] pool_stride, int[] pool_padding, *, str backend="auto") -> (Tensor, Tensor)',
    _pooled_weight_gradient,
    _pooled_weight_gradient_fake,
)


def _feedback(
    e: Tensor,
    B: Tensor,
    kept: Tensor,
    activation: str,
    *,
    winner: Tensor | None = None,
    size: Sequence[int] = (),
    kernel_size: Sequence[int] = (1, 1),
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    backend: str = "auto",
) -> Tensor:
    one_of("activation", activation, reference.ACTIVATIONS)
    if kept.ndim not in (2, 4):
        raise ValueError(f"kept must be an activity [samples, units] or [samples, channels, height, width], got shape {tuple(kept.shape)}")
    chosen = _backend(kept, backend)
    window = (size, kernel_size, stride, padding)
    if chosen == "triton" and B.dtype == torch.float32:
        units, m = kept[0].numel() if len(kept) else len(B), e.shape[-1] if e.ndim else 0
        _expect("e", e, kept, len(kept), m)
        _expect("B", B, kept, units, m)
        _expect("winner", winner, kept, *kept.shape, dtype=torch.uint8)
        if winner is not None:
            if kept.ndim != 4:
                raise ValueError(f"kept must be [samples, channels, height, width] where there is a winner, got shape {tuple(kept.shape)}")
            for name, pair, low in (("size", size, 1), ("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0)):
                _two(name, pair, low)
        delta = _feedback_fake(kept, winner, size)
        if winner is not None:
            _check_window(delta, "max", kernel_size, padding)
            if tuple(winner.shape) != tuple(_behind(delta, len(delta), "max", *window[1:]).shape):
                raise ValueError(f"size {tuple(size)} pooled does not have the shape of winner, {tuple(winner.shape)}")
        read = None if activation == "identity" else _dense(kept)
        won = None if winner is None else _dense(winner)
        _kernels().feedback(e.float().contiguous(), B.contiguous(), read, won, activation, delta, *window[1:])
        return delta
    if chosen not in _COMPILED or B.dtype != torch.float32:
        delta = reference.layout(e.to(B.dtype) @ B.T, kept.shape)
        delta = _dense((delta * reference.derivative(kept, activation)).to(kept.dtype))
    else:
        kept = _dense(kept)
        delta = torch.empty_like(kept)
        flat = [_maps(t).flatten(1) for t in (kept, delta)]
        read = None if activation == "identity" else flat[0]
        _C.feedback(e.float().contiguous(), B.contiguous(), read, flat[1], activation, torch.get_num_threads())
    return delta if winner is None else _unpool(delta, winner, *window, backend=backend)


def _feedback_fake(kept: Tensor, winner: Tensor | None, size: Sequence[int], **_: Any) -> Tensor:
    if winner is not None:
        return _unpool_fake(kept, size)
    return torch.empty_like(kept, memory_format=torch.channels_last if kept.ndim == 4 else torch.contiguous_format)


feedback = Op(
    "feedback(Tensor e, Tensor B, Tensor kept, str activation, *, Tensor? winner=None, SymInt[] size=[], int[] kernel_size=[1, 1], "
    'int[] stride=[1, 1], int[] padding=[0, 0], str backend="auto") -> Tensor',
    _feedback,
    _feedback_fake,
)


_TASK_UNITS = 1024  # FeedbackUpdateParams::task_units


def _feedback_update(
    B: Tensor,
    M: Tensor | None,
    G: Tensor | None,
    R: Tensor | None,
    Q: Tensor | None,
    w: Tensor | None,
    step: Tensor | None,
    predicted_step: Tensor | None,
    seed: int,
    point: int,
    predicted_rows: int,
    std: float,
    kind: str,
    *,
    offset: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    chosen = _backend(B, backend)
    if chosen == "triton" and B.dtype == torch.float32:
        if step is None and predicted_step is None:
            raise ValueError("G, or R, Q and w, or prediction must be given")
        for name, t, rows in (("step", step, 0), ("predicted_step", predicted_step, predicted_rows)):
            if t is not None:
                check_noise(t, point, rows, len(B), std, kind, offset)
                _expect(name, t, B, dtype=torch.int64)
        predicted = predicted_rows if predicted_step is not None else 0
        plan = _plan(B, len(B), predicted, kind, B, M, G, R, Q, w, step, predicted > 0)
        _kernels().feedback_update(plan, predicted_step, seed, point, len(B), std, kind, offset)
        return plan.new, plan.parts
    if chosen not in _COMPILED or B.dtype != torch.float32:
        new, key = B, (seed, point)
        draw: dict[str, Any] = {"dtype": B.dtype, "backend": backend}
        gain = (R, Q) if R is not None and Q is not None else M
        target = G if w is None else w
        if target is not None and step is not None:
            new = reference.feedback_update(B, noise(step, *key, len(target), len(B), std, kind, **draw), gain, target)
        if predicted_step is None:
            return new, B.new_empty(0)
        prediction = (noise(predicted_step, *key, predicted_rows, len(B), std, kind, offset=offset, **draw) @ new)[None]
        return (B.new_empty(0) if step is None else new), prediction
    M, G, R, Q, w = (None if t is None else t.float().contiguous() for t in (M, G, R, Q, w))
    B = B.contiguous()
    out = None if step is None else torch.empty_like(B)
    count = -(-len(B) // _TILE_UNITS) if chosen == "cuda" else -(-len(B) // _TASK_UNITS) + 1
    parts = None if predicted_step is None else B.new_empty(count, predicted_rows, B.shape[1])
    _C.feedback_update(B, out, M, G, R, Q, w, parts, step, predicted_step, seed, point, std, kind, offset, torch.get_num_threads())
    if parts is not None and chosen == "cpp":
        parts = parts[:1].clone()
    return B.new_empty(0) if out is None else out, B.new_empty(0) if parts is None else parts


def _feedback_update_fake(
    B: Tensor, step: Tensor | None, predicted_step: Tensor | None, predicted_rows: int, backend: str, **_: Any
) -> tuple[Tensor, Tensor]:
    new = B.new_empty(0) if step is None else B.new_empty(B.shape)
    parts = -(-B.shape[0] // _TILE_UNITS) if _backend(B, backend) in ("triton", "cuda") and B.dtype == torch.float32 else 1
    return new, B.new_empty(0) if predicted_step is None else B.new_empty(parts, predicted_rows, B.shape[1])


feedback_update = Op(
    "feedback_update(Tensor B, Tensor? M, Tensor? G, Tensor? R, Tensor? Q, Tensor? w, Tensor? step, Tensor? predicted_step, int seed, "
    'int point, SymInt predicted_rows, float std, str kind, *, SymInt offset=0, str backend="auto") -> (Tensor, Tensor)',
    _feedback_update,
    _feedback_update_fake,
)


def check_gain(R: Tensor, w: Tensor, V: Tensor, gamma: float, forgetting: float) -> None:
    if R.ndim not in (2, 3):
        raise ValueError(f"R must be [samples, regressors] or [groups, samples, regressors], got shape {tuple(R.shape)}")
    *groups, samples, m = R.shape
    if w.shape != (samples,):
        raise ValueError(f"w must have shape ({samples},), got {tuple(w.shape)}")
    if V.dtype != torch.float64:
        raise ValueError(f"V has the wrong dtype: expected torch.float64, got {V.dtype}")
    if V.shape != (*groups, m, m):
        raise ValueError(f"V must have shape {(*groups, m, m)}, got {tuple(V.shape)}")
    positive("gamma", gamma)
    in_interval("forgetting", forgetting, 0, 1, open_low=True)


def _ridge_gain(
    R: Tensor, w: Tensor, V: Tensor, gamma: float, forgetting: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = _backend(R, backend)
    # above 256 on the CPU, LAPACK is faster
    compiled = chosen == "cuda" or (chosen == "cpp" and R.ndim == 2 and R.shape[1] <= 256)
    if not compiled or R.dtype != torch.float32 or R.ndim < 2:
        check_gain(R, w, V, gamma, forgetting)
        V, Q, M, G = (_kernels() if chosen == "triton" else reference).ridge_gain(R, w, V, gamma, forgetting)
        return V, Q.contiguous(), M.contiguous(), G.contiguous()
    *groups, n, m = R.shape
    new = R.new_empty
    out = V.new_empty(*groups, m, m), new(*groups, n, m), new(*groups, m, m), new(*groups, n, m)
    scratch = V.new_empty(*groups, 3 * n + 2 * m, m)
    _C.ridge_gain(R.contiguous(), w.float().contiguous(), V.contiguous(), *out, scratch, gamma, forgetting)
    return out


def _ridge_gain_fake(R: Tensor, V: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return V.new_empty(V.shape), R.new_empty(R.shape), R.new_empty(V.shape), R.new_empty(R.shape)


ridge_gain = Op(
    'ridge_gain(Tensor R, Tensor w, Tensor V, float gamma, float forgetting, *, str backend="auto") -> (Tensor, Tensor, Tensor, Tensor)',
    _ridge_gain,
    _ridge_gain_fake,
)


def _perturbed_cross_entropy(
    logits: Tensor, perturbed: Tensor | None, target: Tensor, antithetic: bool, *, scale: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"logits must be [samples, classes], got shape {tuple(logits.shape)}")
    samples, K = logits.shape
    if target.dtype != torch.int64 or target.shape != (samples,):
        raise ValueError(f"target must be int64 of shape ({samples},), got {target.dtype} of shape {tuple(target.shape)}")
    if perturbed is None and antithetic:
        raise ValueError("perturbed must be given where antithetic is True, got None")
    parts = 1 + antithetic
    if perturbed is not None and (
        perturbed.ndim != 2 or perturbed.shape[1] != K or len(perturbed) % parts or len(perturbed) > parts * samples
    ):
        rows = f"an even number up to {2 * samples}" if antithetic else f"up to {samples}"
        raise ValueError(f"perturbed must be [rows, {K}], rows {rows}, got shape {tuple(perturbed.shape)}")
    if scale is not None and scale.ndim:
        raise ValueError(f"scale must be 0-dim, got shape {tuple(scale.shape)}")
    if _backend(logits, backend) == "triton":
        given = None if scale is None else scale.float()
        return _kernels().perturbed_cross_entropy(logits, perturbed, target, antithetic, given)  # type: ignore[no-any-return]
    *exact, ok = reference.perturbed_cross_entropy(logits, perturbed, target, antithetic, scale)
    losses, e, dL, dy = (t.to(torch.promote_types(logits.dtype, torch.float32)) for t in exact)
    return losses, e, dL, dy, ok


def _perturbed_cross_entropy_fake(
    logits: Tensor, perturbed: Tensor | None, antithetic: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    samples, K = logits.shape
    rows = samples if perturbed is None else perturbed.shape[0] // (1 + antithetic)
    new = functools.partial(logits.new_empty, dtype=torch.promote_types(logits.dtype, torch.float32))
    return new(samples), new(samples, K), new(rows), new(rows, K), logits.new_empty(rows, dtype=torch.bool)


perturbed_cross_entropy = Op(
    "perturbed_cross_entropy(Tensor logits, Tensor? perturbed, Tensor target, bool antithetic, *, Tensor? scale=None, "
    'str backend="auto") -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    _perturbed_cross_entropy,
    _perturbed_cross_entropy_fake,
)


def _mirror(
    B: Sequence[Tensor],
    W: Sequence[Tensor],
    step: Tensor,
    seed: int,
    points: Sequence[int],
    samples: int,
    kind: str,
    *,
    draws: int = 1,
    offset: int = 0,
    backend: str = "auto",
) -> tuple[list[Tensor], Tensor]:
    check_mirror(B, W, step, points, samples, kind, draws, offset)
    new = list(B)
    residual = step.new_empty(len(new), dtype=torch.float32)
    for draw in range(draws):
        made: dict[tuple[int, int], Tensor] = {}  # layers with one point and one fan-in share their noise
        for i, (b, w, point) in enumerate(zip(new, W, points, strict=True)):
            units, exact = b[:1].numel(), torch.promote_types(b.dtype, torch.float32)
            if (point, units) not in made:
                first = offset + draw * samples
                made[point, units] = _noise(step, seed, point, samples, units, 1, kind, offset=first, dtype=exact, backend=backend)
            learned, residual[i] = reference.mirror(b.to(exact), w.to(exact), made[point, units].to(exact), kind)
            new[i] = torch.empty_like(b).copy_(learned)
    return new, residual


def check_mirror(
    B: Sequence[Tensor], W: Sequence[Tensor], step: Tensor, points: Sequence[int], samples: int, kind: str, draws: int, offset: int
) -> None:
    if not len(B) == len(W) == len(points):
        raise ValueError(f"B, W and points must be of one length, got {len(B)}, {len(W)} and {len(points)}")
    integer("samples", samples, 1)
    integer("draws", draws, 1)
    for b, w, point in zip(B, W, points, strict=True):
        if b.ndim < 2:
            raise ValueError(f"B must be [outputs, inputs, ...], got shape {tuple(b.shape)}")
        check_noise(step, point, samples * draws, b[:1].numel(), 1, kind, offset)
        _expect("B", b, step, *b.shape)
        _expect("W", w, b, *b.shape)


def _mirror_fake(B: Sequence[Tensor], step: Tensor, **_: Any) -> tuple[list[Tensor], Tensor]:
    return [torch.empty_like(b) for b in B], step.new_empty(len(B), dtype=torch.float32)


mirror = Op(
    "mirror(Tensor[] B, Tensor[] W, Tensor step, int seed, int[] points, SymInt samples, str kind, *, int draws=1, SymInt offset=0, "
    'str backend="auto") -> (Tensor[], Tensor)',
    _mirror,
    _mirror_fake,
)
