from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fbkernels.functional as fn
from fbkernels import _C, ops, reference
from fbkernels.ops import _op

# Random123's kat_vectors for philox4x32 10: counter, key, words
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
KINDS = ("gaussian", "rademacher")
# The portable path is a loop over the threads of the CUDA kernel, in the same code.
SIMD = _C.simd_paths()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the other backends
# Of the Gaussian, in float32: std rounds (1/2 ulp), radius 1.1 and sine 1.7 (found over all 2^24 inputs of each), two products (1/2 each).
RELATIVE = (0.5 + 1.1 + 1.7 + 0.5 + 0.5) * 2.0**-23

keys = {
    "seed": st.integers(0, 2**64 - 1),
    "step": st.integers(0, 2**63 - 1),
    "point": st.integers(0, 2**32 - 1),
    "samples": st.integers(1, 9),
    "units": st.integers(1, 400),
}


def check(call: dict[str, Any], backend: str) -> None:
    device = "cpu" if backend == "cpp" else DEVICE
    step, options = torch.tensor(call["step"], device=device), {k: v for k, v in call.items() if k != "step"}
    got = ops.noise(step, **options, backend=backend).cpu()
    expected = reference.noise(**call, dtype=torch.float64)
    # an ulp more than RELATIVE where a GPU's sqrt is approximate; at a quarter turn the cosine is exactly 0 here and 6e-17 in the reference
    bound = {"rtol": RELATIVE + 2.0**-23, "atol": 1e-15} if call["kind"] == "gaussian" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(got.double(), expected.float().double() if call["kind"] == "rademacher" else expected, **bound)


kinds, offsets = st.sampled_from(KINDS), st.integers(0, 2**50)
CASES = {"philox_noise": (lambda _: st.fixed_dictionaries(keys | {"std": st.just(0.3), "kind": kinds, "offset": offsets}), check)}


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


def native(seed: int, step: int, point: int, samples: int, units: int, std: float, kind: str, **options: Any) -> torch.Tensor:
    out = torch.full((samples, units), math.nan)
    _C.noise(out, torch.tensor(step), signed(seed), point, std, kind, **options)
    return out


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    low, high = words(key)
    python = reference.philox(tuple(torch.tensor([word]) for word in words(counter)), (low, high))
    assert [int(word) for word in python] == words(expected)
    assert _C.philox(words(counter), (low, high)) == words(expected)


@given(**keys)
@settings(max_examples=25, deadline=None)
def test_words_are_those_of_the_compiled_philox(seed: int, step: int, point: int, samples: int, units: int) -> None:
    got = fn.philox_words(seed, step, point, samples, units)
    assert got.dtype == torch.int64
    assert got.shape == (samples, units)
    per_sample = -(-units // 4)
    expected = [
        _C.philox((n * per_sample + u // 4, 0, step % 2**32, point), (seed % 2**32, seed >> 32))[u % 4]
        for n in range(samples)
        for u in range(units)
    ]
    assert got.flatten().tolist() == expected


@given(**keys, offset=st.integers(0, 2**50), threads=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_rademacher_is_the_reference_bit_for_bit(
    seed: int, step: int, point: int, samples: int, units: int, offset: int, threads: int
) -> None:
    expected = reference.noise(seed, step, point, samples, units, 0.3, "rademacher", offset=offset)
    for simd in SIMD:
        assert torch.equal(
            native(seed, step, point, samples, units, 0.3, "rademacher", offset=offset, threads=threads, simd=simd), expected
        )


@given(**keys, offset=st.integers(0, 2**50), threads=st.integers(1, 4), std=st.floats(1e-6, 1e6))
@settings(max_examples=100, deadline=None)
def test_gaussian_is_the_reference_to_rounding(
    seed: int, step: int, point: int, samples: int, units: int, offset: int, threads: int, std: float
) -> None:
    expected = reference.noise(seed, step, point, samples, units, std, dtype=torch.float64, offset=offset)
    paths = [native(seed, step, point, samples, units, std, "gaussian", offset=offset, threads=threads, simd=simd) for simd in SIMD]
    # at a quarter turn the cosine is exactly 0 here and 6e-17 in the reference
    torch.testing.assert_close(paths[0].double(), expected, rtol=RELATIVE, atol=1e-15 * std)
    assert all(torch.equal(path, paths[0]) for path in paths)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("units", [1024, 1027])
def test_large_noise_is_the_same_for_any_path_and_thread_count(kind: str, units: int) -> None:
    base = native(3, 5, 7, 301, units, 0.5, kind, simd="portable")
    expected = reference.noise(3, 5, 7, 301, units, 0.5, kind, torch.float64)
    torch.testing.assert_close(base.double(), expected, rtol=RELATIVE, atol=1e-15)
    for simd in SIMD:
        for threads in (1, 2, 3):
            assert torch.equal(native(3, 5, 7, 301, units, 0.5, kind, simd=simd, threads=threads), base)


@pytest.mark.parametrize("kind", KINDS)
def test_counters_past_32_bits(kind: str) -> None:
    offset, units = 2**33 - 1, 256
    shared = 4 if kind == "gaussian" else 128
    per_sample = units // shared
    index = (offset + 2) * per_sample + 1
    assert index >> 32 != 0
    word = _C.philox((index % 2**32, index >> 32, 5, 7), (3, 0))
    for simd in SIMD:
        got = native(3, 5, 7, 4, units, 1.0, kind, offset=offset, simd=simd)[2, shared]
        if kind == "rademacher":
            assert got == 1 - 2 * (word[0] & 1)
        else:
            radius = math.sqrt(-2 * math.log(((word[0] >> 8) + 1) / 2**24))
            assert got.item() == pytest.approx(radius * math.cos(2 * math.pi * (word[1] >> 8) / 2**24), rel=RELATIVE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_batch_gets_the_same_noise(kind: str) -> None:
    step = torch.tensor(11)
    whole = ops.noise(step, 1, 2, 10, 77, 0.1, kind)
    parts = [ops.noise(step, 1, 2, rows, 77, 0.1, kind, offset=offset) for offset, rows in ((0, 3), (3, 1), (4, 6))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_low_32_bits_of_the_step_count(kind: str) -> None:
    assert torch.equal(fn.noise(1, 2**32 + 9, 0, 2, 50, 1.0, kind), fn.noise(1, 9, 0, 2, 50, 1.0, kind))
    assert not torch.equal(fn.noise(1, 10, 0, 2, 50, 1.0, kind), fn.noise(1, 9, 0, 2, 50, 1.0, kind))


def test_gaussian_moments() -> None:
    n = 2**22
    z = fn.noise(123, 4, 5, 2**10, 2**12, 1.0).double()
    # five standard errors: the variances of z, z^2, z^3 and z^4 are 1, 2, 15 and 96
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean().item() - moment) < 5 * math.sqrt(variance / n)
    assert z.abs().max().item() <= math.sqrt(48 * math.log(2)) * (1 + RELATIVE)  # u >= 2^-24
    for lag in (1, 2, 4, 2**12):  # within a pair, between pairs, counters and samples
        flat = z.flatten()
        assert abs((flat[lag:] * flat[:-lag]).mean().item()) < 5 / math.sqrt(n - lag)
    sorted_z = z.flatten().sort().values
    distance = (torch.special.ndtr(sorted_z) - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, p = 0.001


def test_rademacher_balance() -> None:
    z = fn.noise(123, 4, 5, 2**10, 2**12, 0.25, "rademacher")
    assert torch.equal(z.abs(), torch.full_like(z, 0.25))
    z = z.double() / 0.25
    assert abs(z.mean().item()) < 5 / math.sqrt(z.numel())
    per_bit = z.view(-1, 128).mean(0).abs().max().item()
    assert per_bit < 5 / math.sqrt(z.numel() / 128)
    for lag in (1, 4, 128, 2**12):
        flat = z.flatten()
        assert abs((flat[lag:] * flat[:-lag]).mean().item()) < 5 / math.sqrt(flat.numel() - lag)


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind: str) -> None:
    step = torch.tensor(3)
    single = ops.noise(step, 1, 2, 5, 70, 0.25, kind)
    assert single.dtype == torch.float32
    assert torch.equal(ops.noise(step, 1, 2, 5, 70, 0.25, kind, dtype=torch.bfloat16), single.bfloat16())
    double = reference.noise(1, 3, 2, 5, 70, 0.25, kind, torch.float64)
    assert torch.equal(ops.noise(step, 1, 2, 5, 70, 0.25, kind, dtype=torch.float64), double)
    assert torch.equal(ops.noise(step, 1, 2, 5, 70, 0.25, kind, backend="reference"), reference.noise(1, 3, 2, 5, 70, 0.25, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_zero_std_and_empty_shapes(kind: str) -> None:
    assert fn.noise(1, 2, 3, 4, 130, 0.0, kind).abs().max() == 0
    for samples, units in ((0, 5), (5, 0), (0, 0)):
        assert fn.noise(1, 2, 3, samples, units, 1.0, kind).shape == (samples, units)
        assert fn.philox_words(1, 2, 3, samples, units).shape == (samples, units)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 5), (0, 4)])
def test_op(kind: str, shape: tuple[int, int]) -> None:
    torch.library.opcheck(torch.ops.fbkernels.philox_noise.default, (torch.tensor(3), -1, 2, *shape, 0.1, kind))
    options = {"offset": 2**40, "dtype": torch.bfloat16, "backend": "reference"}
    torch.library.opcheck(torch.ops.fbkernels.philox_noise.default, (torch.tensor(3), 1, 2, *shape, 0.1, kind), options)


@pytest.mark.parametrize("seed", [1, 2**64 - 1])
def test_compiles_to_one_graph(seed: int) -> None:
    def doubled(step: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x + 2 * ops.noise(step, seed, 2, x.shape[0], x.shape[1], 0.1, "gaussian")

    compiled = torch.compile(doubled, fullgraph=True, dynamic=True)
    for step, rows in ((3, 5), (4, 7)):
        x = torch.zeros(rows, 9)
        assert torch.equal(compiled(torch.tensor(step), x), doubled(torch.tensor(step), x))


def test_fake_tensors_stay_fake() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        out = ops.noise(torch.tensor(3), 1, 2, 3, 5, 0.1, "gaussian", dtype=torch.bfloat16)
    assert isinstance(out, FakeTensor)
    assert (out.shape, out.dtype) == ((3, 5), torch.bfloat16)


def test_backends_asked_for_by_name() -> None:
    cpu = torch.device("cpu")
    assert ops.choose("auto", cpu) == "cpp"
    assert ops.choose("reference", cpu) == "reference"
    assert ops.choose("auto", torch.device("meta")) == "reference"
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'reference', 'cpp', 'triton', 'cuda', got 'fast'"):
        ops.choose("fast", cpu)
    with pytest.raises(RuntimeError, match=r"backend 'cuda' (is not compiled in|is compiled in, but|cannot take tensors on cpu)"):
        ops.choose("cuda", cpu)


def test_triton_on_a_cpu_is_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _op.forget()
    assert ops.backends()["triton"].startswith("available in Triton's interpreter")
    assert (ops.choose("triton", torch.device("cpu")), ops.choose("auto", torch.device("cpu"))) == ("triton", "cpp")
    monkeypatch.delenv("TRITON_INTERPRET")
    _op.forget()
    with pytest.raises(RuntimeError, match=r"backend 'triton' (is installed, but torch sees no|cannot take tensors on cpu)"):
        ops.choose("triton", torch.device("cpu"))
    monkeypatch.setattr(_op, "TRITON", False)
    assert ops.backends()["triton"] == "not installed: `pip install triton`"
    monkeypatch.undo()
    _op.forget()


GOOD = {"seed": 1, "step": 2, "point": 3, "samples": 4, "units": 5, "std": 0.1, "kind": "gaussian"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be an integer in .*, got -1"),
        ({"seed": 2**64}, ValueError, "seed must be"),
        ({"seed": 1.0}, TypeError, "seed must be an integer .*, got 1.0"),
        ({"step": -3}, ValueError, "step must be .*, got -3"),
        ({"step": True}, TypeError, "step must be .*, got True"),
        ({"step": torch.tensor(1.0)}, ValueError, "step must be a 0-dim int64 tensor, got torch.float32"),
        ({"step": torch.tensor([1])}, ValueError, r"step must be a 0-dim int64 tensor, got torch.int64 of shape \(1,\)"),
        ({"point": 2**32}, ValueError, "point must be"),
        ({"samples": -1}, ValueError, "samples must be"),
        ({"units": 2.5}, TypeError, "units must be"),
        ({"std": -0.1}, ValueError, "std must be a finite number >= 0, got -0.1"),
        ({"std": math.nan}, ValueError, "std must be .*, got nan"),
        ({"std": math.inf}, ValueError, "std must be .*, got inf"),
        ({"std": "big"}, TypeError, "std must be .*, got 'big'"),
        ({"kind": "uniform"}, ValueError, "kind must be one of 'gaussian', 'rademacher', got 'uniform'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fn.noise(**(GOOD | change))
    if not change.keys() & {"std", "kind"}:
        with pytest.raises(error, match=message):
            fn.philox_words(**{name: value for name, value in (GOOD | change).items() if name not in ("std", "kind")})


def call(**change: Any) -> None:
    good = {"out": torch.empty(3, 5), "step": torch.tensor(1), "seed": 1, "point": 2, "std": 0.1, "kind": "gaussian"}
    _C.noise(**(good | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": 3}, TypeError, "expected a torch.Tensor"),
        ({"out": None}, TypeError, "expected a torch.Tensor"),
        ({"out": torch.empty(3, 5, device="meta")}, TypeError, "expected a dense tensor with storage"),
        ({"out": torch.eye(3).to_sparse()}, TypeError, "expected a dense tensor with storage"),
        ({"out": torch.empty(3, 5, dtype=torch.float64)}, ValueError, "out must be float32"),
        ({"out": torch.empty(3, 5, dtype=torch.int32)}, ValueError, "out must be float32"),
        ({"out": torch.empty(5)}, ValueError, "out must be a contiguous"),
        ({"out": torch.empty(3, 5).T}, ValueError, "out must be a contiguous"),
        ({"out": torch.empty(3, 10)[:, ::2]}, ValueError, "out must be a contiguous"),
        ({"out": torch.empty(1, 5).expand(3, 5)}, ValueError, "out must be a contiguous"),
        ({"step": 1}, TypeError, "expected a torch.Tensor"),
        ({"step": torch.tensor(1.0)}, ValueError, "step must be"),
        ({"step": torch.tensor([1])}, ValueError, "step must be"),
        ({"step": torch.tensor(1, dtype=torch.int32)}, ValueError, "step must be"),
        ({"seed": 2**63}, TypeError, "incompatible function arguments"),
        ({"seed": 0.5}, TypeError, "incompatible function arguments"),
        ({"point": -1}, ValueError, "point must be"),
        ({"point": 2**32}, ValueError, "point must be"),
        ({"std": -1.0}, ValueError, "std must be"),
        ({"std": math.nan}, ValueError, "std must be"),
        ({"std": 1e39}, ValueError, "std must be"),
        ({"kind": "uniform"}, ValueError, "kind must be"),
        ({"offset": -1}, ValueError, "offset must be"),
        ({"offset": 2**62}, ValueError, "offset must be"),
        ({"threads": 0}, ValueError, "threads must be"),
        ({"simd": "mmx"}, ValueError, "simd must be"),
    ],
)
def test_the_compiled_part_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**change)


def test_the_compiled_part_takes_any_thread_count_and_place() -> None:
    call(threads=2**31 - 1)
    buffer = torch.full((1 + 301 * 132 + 1,), math.nan)
    out = buffer[1:-1].view(301, 132)  # 4 bytes off alignment
    for kind in KINDS:
        for simd in SIMD:
            out.fill_(math.nan)
            call(out=out, kind=kind, simd=simd)
            assert torch.equal(out, native(1, 1, 2, 301, 132, 0.1, kind))
            assert buffer[[0, -1]].isnan().all()
