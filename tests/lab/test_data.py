"""Data files: what is published loads exactly, everything else is a ValueError that names the file, and no pickle is executed."""

import gzip
import os
import pickle
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fbkernels.lab import data

pytestmark = pytest.mark.filterwarnings("ignore:.*were published")
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def images(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


# --- Writers of the published formats


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder: Path, sep: str = "-", end: str = "") -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    out = {}
    for split, n in (("train", 6), ("t10k", 3)):
        out[split] = x = images(n, 28, 28, seed=n)
        for kind, a in ((f"images{sep}idx3", x), (f"labels{sep}idx1", np.arange(n, dtype=np.uint8))):
            raw = gzip.compress(idx(a)) if end else idx(a)
            (folder / f"{split}-{kind}-ubyte{end}").write_bytes(raw)
    return out


def py2_string(s: bytes) -> bytes:
    return b"U" + bytes([len(s)]) + s if len(s) < 256 else b"T" + struct.pack("<i", len(s)) + s


def py2_pickle(x: np.ndarray, labels: list[int], key: bytes) -> bytes:
    """What cPickle.dump(batch, file, 2) of Python 2 wrote: opcode for opcode the beginning of the published data_batch_1."""
    n, pixels = x.reshape(len(x), -1).shape
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\t(K\x01"
    array += b"M" + struct.pack("<H", n) + b"M" + struct.pack("<H", pixels) + b"\x86"
    array += b"cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    array += py2_string(x.tobytes()) + b"tb"
    names = b"".join(py2_string(b"camion_s_%06d.png" % i) + b"q" + bytes([20 + i]) for i in range(n))
    head = b"\x80\x02}q\x01(" + py2_string(b"batch_label") + b"q\x02" + py2_string(b"training batch 1 of 5") + b"q\x03"
    label_list = b"]q\x05(" + b"".join(b"K" + bytes([v]) for v in labels) + b"e"
    items = py2_string(key) + b"q\x04" + label_list + py2_string(b"data") + b"q\x06" + array
    return head + items + py2_string(b"filenames") + b"q\x0c]q\r(" + names + b"eu."


def py3_pickle(protocol: int):
    def write(x: np.ndarray, labels: list[int], key: bytes) -> bytes:
        return pickle.dumps({b"data": x.reshape(len(x), -1), key: labels, b"filenames": [b"a.png"] * len(x)}, protocol)

    return write


def binary(x: np.ndarray, labels: list[int], key: bytes) -> bytes:
    coarse = b"\x13" if key == b"fine_labels" else b""
    return b"".join(coarse + bytes([v]) + i.tobytes() for i, v in zip(x, labels, strict=True))


WRITERS = {"binary": binary, "python2": py2_pickle, "protocol2": py3_pickle(2), "protocol3": py3_pickle(3), "protocol4": py3_pickle(4)}


def write_cifar(folder: Path, name: str, writer: str) -> dict[str, tuple[np.ndarray, list[int]]]:
    folder.mkdir(parents=True, exist_ok=True)
    stems = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if name == "cifar10" else ["train", "test"]
    out = {}
    for i, stem in enumerate(stems):
        x = images(2, 3, 32, 32, seed=i)
        labels = [i, 9] if name == "cifar10" else [i, 99]
        key = b"labels" if name == "cifar10" else b"fine_labels"
        (folder / (stem + (".bin" if writer == "binary" else ""))).write_bytes(WRITERS[writer](x, labels, key))
        out[stem] = x, labels
    return out


def check(d: data.Dataset) -> None:
    """The conventions that hold for every data set."""
    for x, y in ((d.train_x, d.train_y), (d.test_x, d.test_y)):
        assert x.dtype == torch.uint8
        assert x.ndim == 4
        assert x.is_contiguous()
        assert len(x) == len(y) > 0
        assert y.dtype == torch.int64
        assert y.ndim == 1
        assert y.min() >= 0
        assert y.max() < d.classes
        assert x.max() <= d.scale
        x.add_(0)  # memory of its own, writable
        f = d.to_float(x[:2])
        assert f.dtype == torch.float32
        assert f.min() >= 0
        assert f.max() <= 1
        assert torch.equal((f * d.scale).round(), x[:2].float())


# --- What is published loads exactly


def test_digits():
    d = data.load("digits")
    check(d)
    assert d.train_x.shape == (1442, 1, 8, 8)
    assert d.test_x.shape == (355, 1, 8, 8)
    assert d.classes == 10
    assert d.scale == 16
    assert d.test_y.bincount().min() >= 34
    assert d.train_x.max() == 16
    both = torch.cat([d.train_x, d.test_x]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)  # no image in both splits
    assert torch.equal(d.test_x, data.load("digits", "anything").test_x)


@pytest.mark.parametrize("folder", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("sep", "-.")
@pytest.mark.parametrize("end", ["", ".gz"])
def test_mnist(tmp_path, folder, sep, end):
    x = write_mnist(tmp_path / folder, sep, end)
    d = data.load("mnist", str(tmp_path))
    check(d)
    assert d.classes == 10
    assert d.scale == 255
    assert np.array_equal(d.train_x[:, 0], x["train"])
    assert np.array_equal(d.test_x[:, 0], x["t10k"])
    assert d.train_y.tolist() == [0, 1, 2, 3, 4, 5]
    assert d.test_y.tolist() == [0, 1, 2]


def test_mnist_unpacked_under_its_gz_name(tmp_path):
    write_mnist(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(f"{path}.gz")
    check(data.load("mnist", tmp_path))


@pytest.mark.parametrize("in_subfolder", [True, False])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, name, writer, in_subfolder):
    sub = {"cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py"), "cifar100": ("cifar-100-binary", "cifar-100-python")}[name]
    files = write_cifar(tmp_path / sub[writer != "binary"] if in_subfolder else tmp_path, name, writer)
    d = data.load(name, tmp_path)
    check(d)
    *train, test = files.values()
    assert np.array_equal(d.train_x, np.concatenate([x for x, _ in train]))
    assert np.array_equal(d.test_x, test[0])
    assert d.train_y.tolist() == [v for _, y in train for v in y]
    assert d.test_y.tolist() == test[1]
    assert d.classes == (10 if name == "cifar10" else 100)


def test_python_version_in_fortran_order(tmp_path):
    write_cifar(tmp_path, "cifar100", "python2")
    x = images(2, 3072)
    (tmp_path / "test").write_bytes(pickle.dumps({"data": np.asfortranarray(x), "fine_labels": [1, 2]}, 2))
    assert np.array_equal(data.load("cifar100", tmp_path).test_x.flatten(1), x)


@pytest.mark.filterwarnings("default")
def test_fewer_images_than_published_warn(tmp_path):
    write_cifar(tmp_path, "cifar100", "binary")
    with pytest.warns(UserWarning, match="published") as record:
        data.load("cifar100", tmp_path)
    assert [str(r.message) for r in record] == [
        f"cifar100 in {tmp_path} has 2 train images, 50000 were published",
        f"cifar100 in {tmp_path} has 2 test images, 10000 were published",
    ]


# --- What is missing


def test_arguments():
    with pytest.raises(ValueError, match="name='imagenet': expected one of digits, mnist, cifar10, cifar100"):
        data.load("imagenet")
    with pytest.raises(ValueError, match="data_dir=None: mnist is read from files, expected the folder"):
        data.load("mnist")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mnist", ["train-images-idx3-ubyte or train-images.idx3-ubyte or", "t10k-labels-idx1-ubyte", "MNIST/raw", "LeCun"]),
        (
            "cifar10",
            ["data_batch_5.bin", "test_batch.bin in", "cifar-10-batches-bin", "test_batch in", "cifar-10-batches-py", "Krizhevsky"],
        ),
        ("cifar100", ["train.bin, test.bin in", "cifar-100-binary", "train, test in", "cifar-100-python", "Krizhevsky"]),
    ],
)
def test_missing(tmp_path, name, expected):
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, tmp_path)
    assert all(text in str(error.value) for text in [*expected, str(tmp_path), "none of these files is there"])
    with pytest.raises(FileNotFoundError, match="absent is not a folder"):
        data.load(name, tmp_path / "absent")


def test_partly_missing(tmp_path):
    write_mnist(tmp_path / "raw")
    (tmp_path / "raw/t10k-labels-idx1-ubyte").unlink()
    (tmp_path / "raw/t10k-labels-idx1-ubyte").mkdir()  # a folder is no file
    with pytest.raises(FileNotFoundError, match="raw has train-images-idx3-ubyte but lacks t10k-labels-idx1-ubyte"):
        data.load("mnist", tmp_path)


# --- What is damaged or foreign


def rejects(name: str, root: Path, path: Path, raw: bytes, message: str) -> None:
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{re.escape(message)}"):
        data.load(name, root)


HEADER = struct.pack(">4I", 0x803, 6, 28, 28)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 bytes, expected an IDX header of 16 bytes"),
        (HEADER[:9], "9 bytes, expected an IDX header of 16 bytes"),
        (b"<!DOCTYPE html><html>", "starts with 0x3c21444f, expected the IDX magic number 0x00000803"),
        (struct.pack(">4I", 0xD03, 6, 28, 28), "starts with 0x00000d03"),
        (HEADER + bytes(6 * 784 - 1), "4703 bytes after the header, expected 4704"),
        (HEADER + bytes(6 * 784 + 1), "more than 4704 bytes after the header, expected 4704"),
        (struct.pack(">4I", 0x803, 6, 28, 32) + bytes(6 * 896), "claims 6 x 28 x 32 values, expected 1..60000 x 28 x 28"),
        (struct.pack(">4I", 0x803, 2**32 - 1, 28, 28), "claims 4294967295 x 28 x 28 values"),
        (struct.pack(">4I", 0x803, 0, 28, 28), "claims 0 x 28 x 28 values"),
        (idx(images(5, 28, 28)), "6 labels, expected 5, one for each image of"),
        (gzip.compress(HEADER + bytes(6 * 784), mtime=0)[:-20], "damaged gzip data"),
        (gzip.compress(HEADER + bytes(6 * 784), mtime=0)[:-8] + bytes(8), "damaged gzip data (CRC check failed"),
        (gzip.compress(HEADER + bytes(6 * 784), mtime=0) + b"junk", "damaged gzip data"),
        (gzip.compress(HEADER, mtime=0)[:10] + b"\xff" * 40, "damaged gzip data"),
    ],
)
def test_bad_idx(tmp_path, raw, message):
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    if "one for each" in message:
        path.write_bytes(raw)
        path = tmp_path / "train-labels-idx1-ubyte"
        raw = path.read_bytes()
    rejects("mnist", tmp_path, path, raw, message)


def test_bad_mnist_label(tmp_path):
    write_mnist(tmp_path)
    rejects(
        "mnist", tmp_path, tmp_path / "t10k-labels-idx1-ubyte", idx(np.array([1, 10, 2], np.uint8)), "label 10 of image 1, expected 0 to 9"
    )


def test_gzip_bomb_stays_packed(tmp_path):
    write_mnist(tmp_path)
    bomb = gzip.compress(HEADER + bytes(100_000_000), 1)
    tracemalloc.start()
    rejects("mnist", tmp_path, tmp_path / "train-images-idx3-ubyte", bomb, "more than 4704 bytes after the header")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 bytes, expected a whole number of records of 3074 bytes"),
        (bytes(3073), "3073 bytes, expected a whole number"),
        (bytes(3074 * 2 + 1), "6149 bytes"),
        (b"\x14" + bytes(3073), "coarse label 20 of image 0, expected 0 to 19"),
        (bytes(3074) + b"\x13\x64" + bytes(3072), "label 100 of image 1, expected 0 to 99"),
        (bytes(3074 * 10_000 + 1), "more than 30740000 bytes"),
    ],
)
def test_bad_binary(tmp_path, raw, message):
    write_cifar(tmp_path, "cifar100", "binary")
    rejects("cifar100", tmp_path, tmp_path / "test.bin", raw, message)


def batch(**change: object) -> bytes:
    return pickle.dumps({"data": images(2, 3072), "fine_labels": [0, 99]} | change, 2)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not a batch of CIFAR's python version"),
        (b"\x80\x02", "not a batch of CIFAR's python version"),
        (b"<html>", "not a batch of CIFAR's python version"),
        (batch() + b"\n", "1 bytes follow its end"),
        (batch()[:-1], "pickle exhausted before seeing STOP"),
        (batch(data=None), "data is nonetype, expected an array of 1..10000 x 3072 values"),
        (batch(data=images(2, 3071)), "data is 2 x 3071 values"),
        (batch(data=images(2, 3, 1024)), "shape is not that of a matrix"),
        (batch(data=images(0, 3072)), "the global __builtin__.bytes"),
        (batch(data=images(2, 3072).astype(np.int64)), "an array of dtype 'i8', expected 'u1'"),
        (batch(data=np.array([[{}]])), "an array of dtype 'O8', expected 'u1'"),
        (batch(data=np.zeros((2, 3072), [("a", "u1")])), "an array of dtype 'V1', expected 'u1'"),
        (batch(fine_labels=[1]), "fine_labels is 1 values, expected a list of 2"),
        (batch(fine_labels=7), "fine_labels is int, expected a list of 2"),
        (batch(fine_labels=[1, 100]), "label 100 of image 1, expected 0 to 99"),
        (batch(fine_labels=[-1, 1]), "label -1 of image 0"),
        (batch(fine_labels=[True, 1]), "label bool of image 0"),
        (pickle.dumps({"data": 1, "labels": []}, 2), "a dict of data, labels, expected a dict with data and fine_labels"),
        (pickle.dumps([1, 2], 2), "a list, expected a dict"),
        (pickle.dumps({1: 2}, 2), "a int where a str belongs"),
        (batch(extra=1.5), "opcode BINFLOAT"),
    ],
)
def test_bad_python_version(tmp_path, raw, message):
    write_cifar(tmp_path, "cifar100", "python2")
    rejects("cifar100", tmp_path, tmp_path / "test", raw, message)


# --- Pickles that attack


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


ATTACKS = [
    (lambda mark: Call(os.system, f"touch {mark}"), "posix.system"),
    (lambda mark: Call(eval, f"open({mark!r}, 'w')"), "eval"),
    (lambda mark: Call(exec, f"open({mark!r}, 'w')"), "exec"),
    (lambda mark: Call(open, mark, "w"), "open"),
    (lambda mark: Call(getattr, Call(__import__, "os"), "system"), "getattr"),
    (lambda mark: Call(np.frombuffer, b"12"), "frombuffer"),
]


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize(("attack", "named"), ATTACKS)
def test_attack_is_not_executed(tmp_path, attack, named, protocol):
    write_cifar(tmp_path, "cifar100", "python2")
    mark = tmp_path / "executed"
    raw = pickle.dumps({"data": images(2, 3072) if protocol < 5 else 0, "fine_labels": [1, 2], "x": attack(str(mark))}, protocol)
    rejects("cifar100", tmp_path, tmp_path / "test", raw, "not a batch" if protocol == 0 else named)
    assert not mark.exists()
    if str(mark).encode() in raw:
        pickle.loads(raw)
        assert mark.exists()  # it was a real attack


ENCODER = b"c_codecs\nencode\nq\x00X\x10\x27\x00\x00" + b"a" * 10_000 + b"q\x01X\x06\x00\x00\x00latin1q\x02"
NUMPY = b"cnumpy\nndarray\n"
DTYPE = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
MAKE = b"cnumpy.core.multiarray\n_reconstruct\n" + NUMPY + b"K\x00\x85U\x01b\x87R"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"(cos\nsystem\nU\x02ido.", "the global os.system"),
        (b"(U\x02idios\nsystem\n.", "opcode INST os.system"),
        (b"c__builtin__\neval\nU\x011\x85R.", "the global __builtin__.eval"),
        (b"cnumpy\nload\nU\x011\x85R.", "the global numpy.load"),
        (b"cnumpy\nndarray.tofile\nU\x011\x85R.", "the global numpy.ndarray.tofile"),
        (b"cnumpy\nndarray\nU\x06tofileR.", "a bytes where a tuple belongs"),
        (b"cnumpy ndarray\n\n.", "the global numpy.ndarray."),
        (b"U\x05numpyU\x04load\x93.", "a bytes where a str belongs"),
        (b"X\x05\x00\x00\x00numpyX\x04\x00\x00\x00load\x93.", "the global numpy.load"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "calls _codecs.encode with unexpected arguments"),
        (b"c_codecs\nencode\nK\x05X\x06\x00\x00\x00latin1\x86R.", "has no len()"),
        (NUMPY + b"K\x05\x85R.", "calls numpy.ndarray with unexpected arguments"),
        (NUMPY + b")\x81.", "opcode NEWOBJ"),
        (NUMPY + b"}U\x01aK\x01sb.", "a dict where a tuple belongs"),
        (NUMPY + b"(K\x01tb.", "an array that is not one of 'u1' values"),
        (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85U\x01b\x87R.", "unexpected arguments"),
        (b"cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R.", "dtype 'O8'"),
        (b"cnumpy\ndtype\n(K\x01K\x02tR.", "a int where a str belongs"),
        (DTYPE + b"(K\x03U\x01|" + DTYPE + b"K\x02\x86NNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.", "a structured dtype"),
        (DTYPE + DTYPE[:-1] + b".", "expected a dict"),
        (MAKE + b"(K\x01K\x01K\x01\x86" + DTYPE + b"\x89N tb.", "not a batch"),
        (MAKE + b"(K\x01K\x01K\x01\x86" + DTYPE + b"\x89Ntb.", "a NoneType where a bytes belongs"),
        (MAKE + b"(K\x01K\x01K\x01\x86U\x02O8\x89U\x01atb.", "not one of 'u1' values"),
        (MAKE + b"(K\x01J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86" + DTYPE + b"\x89U\x01atb.", "shape is not that of a matrix of 1 bytes"),
        (MAKE + b"(K\x01\x8a\x09" + b"\xff" * 8 + b"\x00K\x00\x86" + DTYPE + b"\x89U\x00tb.", "shape is not that of a matrix of 0 bytes"),
        (MAKE + b"(K\x01\x8a\x09" + b"\xff" * 8 + b"\x00K\x01\x86" + DTYPE + b"\x89U\x01atb.", "shape is not that of a matrix of 1 bytes"),
        (b"Pos.system\n.", "opcode PERSID"),
        (b"\x82\x01.", "opcode EXT1"),
        (b"K\x01h\x07.", "not a batch"),
        (b"0.", "opcode POP"),
        (b"e.", "not a batch"),
        (b"\x85\x85.", "a tuple, expected a dict"),
        (b"(t.", "a tuple, expected a dict"),
        (b"((((t.", "a tuple, expected a dict"),
        (b"K\x01K\x02K\x03s.", "a int where a str belongs"),
        (b"}(U\x01au.", "not a batch"),
        (b"N" + b"\x85" * 100_000 + b".", "a tuple, expected a dict"),
        (b"}N" + b"\x85" * 100_000 + b"K\x01s.", "a tuple where a str belongs"),
        (b"]" * 100_000 + b"a" * 99_999 + b".", "more than 161000 pickle opcodes"),
        (b"]" * 70_000 + b"a" * 69_999 + b".", "a list, expected a dict"),
        (b"\x8e" + struct.pack("<Q", 2**60) + b"a.", "not a batch"),
        (b"\x96" + struct.pack("<Q", 2**60) + b"a.", "not a batch"),
        (b"\x8d" + struct.pack("<Q", 2**60) + b"a.", "not a batch"),
        (b"T" + struct.pack("<i", 2**31 - 1) + b"a.", "not a batch"),
        (b"\x8b" + struct.pack("<i", 2**31 - 1) + b"a.", "not a batch"),
        (b"\x95" + struct.pack("<Q", 2**63) + b"].", "a list, expected a dict"),
        (b"]r\xff\xff\xff\xff.", "a list, expected a dict"),
        (ENCODER + b"h\x00h\x01h\x02\x86R" * 9000 + b".", "encode to more bytes than the file has"),
        (b"I" + b"9" * 5000 + b"\n.", "not a batch"),
    ],
)
def test_attacks_on_the_interpreter(tmp_path, body, message):
    write_cifar(tmp_path, "cifar100", "python2")
    tracemalloc.start()
    try:
        rejects("cifar100", tmp_path, tmp_path / "test", b"\x80\x02" + body, message)
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()


# --- Any damage: loads, within the conventions, or ValueError


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("samples")
    write_mnist(root / "idx")
    write_mnist(root / "gz", end=".gz")
    for writer in WRITERS:
        write_cifar(root / writer, "cifar100", writer)
    return root


def damaged(root: Path, kind: str, change) -> None:
    name, stem = {"idx": ("mnist", "train-images-idx3-ubyte"), "gz": ("mnist", "t10k-labels-idx1-ubyte.gz")}.get(kind, ("cifar100", "test"))
    path = root / kind / (stem + ".bin" if kind == "binary" else stem)
    original = path.read_bytes()
    try:
        path.write_bytes(change(original))
        try:
            check(data.load(name, root / kind))
        except ValueError as error:
            if str(path.parent) not in str(error):
                raise AssertionError(f"{error} does not name the file") from error
    finally:
        path.write_bytes(original)


KINDS = pytest.mark.parametrize("kind", ["idx", "gz", *WRITERS])
# Both ends of a file hold its structure, the middle mostly pixels.
positions = st.one_of(st.integers(0, 400), st.integers(-200, -1), st.integers(0, 10_000))


@KINDS
@FUZZ
@given(cut=positions)
def test_truncation(samples, kind, cut):
    damaged(samples, kind, lambda raw: raw[:cut])


@KINDS
@FUZZ
@given(flips=st.lists(st.tuples(positions, st.integers(1, 255)), min_size=1, max_size=4))
def test_byte_flips(samples, kind, flips):
    def change(raw: bytes) -> bytes:
        out = bytearray(raw)
        for at, mask in flips:
            out[at % len(out)] ^= mask
        return bytes(out)

    damaged(samples, kind, change)


@KINDS
@FUZZ
@given(at=positions, extra=st.binary(min_size=1, max_size=20))
def test_inserted_bytes(samples, kind, at, extra):
    damaged(samples, kind, lambda raw: raw[: at % len(raw)] + extra + raw[at % len(raw) :])


# --- The published files


REAL = os.environ.get("FBK_DATA_DIR")


@pytest.mark.skipif(not REAL, reason="FBK_DATA_DIR names no folder with the published data")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "image", "train", "test", "means"),
    [
        ("mnist", (1, 28, 28), (5421, 6742), (892, 1135), [0.1307]),
        ("cifar10", (3, 32, 32), (5000, 5000), (1000, 1000), [0.4914, 0.4822, 0.4465]),
        ("cifar100", (3, 32, 32), (500, 500), (100, 100), [0.5071, 0.4865, 0.4409]),
    ],
)
def test_published(name, image, train, test, means):
    d = data.load(name, REAL)
    check(d)
    assert d.train_x.shape == (50_000 + 10_000 * (name == "mnist"), *image)
    assert d.test_x.shape == (10_000, *image)
    assert [d.train_y.bincount().aminmax(), d.test_y.bincount().aminmax()] == [train, test]
    mean = torch.stack([d.train_x[:, c].double().mean() / d.scale for c in range(image[0])])
    assert torch.allclose(mean, torch.tensor(means).double(), atol=1e-4)


@pytest.mark.skipif(not REAL, reason="FBK_DATA_DIR names no folder with the published data")
@pytest.mark.filterwarnings("error")
def test_published_size_of_the_python_version(tmp_path):
    d = data.load("cifar100", REAL)
    for stem, x, y in (("train", d.train_x, d.train_y), ("test", d.test_x, d.test_y)):
        names = [b"camion_s_%06d.png" % i for i in range(len(y))]
        content = {b"data": x.flatten(1).numpy(), b"fine_labels": y.tolist(), b"coarse_labels": [0] * len(y), b"filenames": names}
        (tmp_path / stem).write_bytes(pickle.dumps(content, 2))
    again = data.load("cifar100", tmp_path)
    assert torch.equal(again.train_x, d.train_x)
    assert torch.equal(again.train_y, d.train_y)
    assert torch.equal(again.test_x, d.test_x)
