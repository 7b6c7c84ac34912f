"""The command line's data: scikit-learn's embedded digits, and MNIST, CIFAR-10 and CIFAR-100 from the files their authors published.

Files are taken for hostile. What a header claims is checked before memory is asked for, and the pickles of CIFAR's python version are never
executed: a small interpreter of our own builds the few kinds of values they hold, and calls nothing that a file names.
"""

import gzip
import os
import pickletools
import struct
import warnings
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["NAMES", "Dataset", "crop_and_flip", "draw_crops", "load"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images as uint8 tensors [N, C, H, W] in the published order, labels as int64 tensors [N] in 0 .. classes - 1.

    Images stay uint8 in memory (60,000 CIFAR images are 184 MB; as float32 they would be 737 MB); turn each batch into floats with
    `to_float`. `scale` is the largest pixel value: 255, or 16 for digits.
    """

    name: str
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    classes: int
    scale: int

    def to_float(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 images of this data set, any shape and device -> float32 in [0, 1]; no standardisation."""
        return x.to(torch.float32) / self.scale


class _Layout(NamedTuple):
    """One way a data set is published: where its files lie and, for each file, the spellings of its name; the test files come last."""

    version: str
    folders: tuple[str, ...]
    files: tuple[tuple[str, ...], ...]


class _Published(NamedTuple):
    title: str
    classes: int
    train: int
    test: int
    layouts: tuple[_Layout, ...]


def _idx_names(split: str, kind: str) -> tuple[str, ...]:
    return tuple(f"{split}-{kind}{sep}idx{3 if kind == 'images' else 1}-ubyte{end}" for end in ("", ".gz") for sep in "-.")


def _cifar(folder: str, stems: tuple[str, ...], binary: str) -> tuple[_Layout, ...]:
    return (
        _Layout("binary version", ("", binary), tuple((stem + ".bin",) for stem in stems)),
        _Layout("python version", ("", folder), tuple((stem,) for stem in stems)),
    )


_MNIST_FILES = tuple(_idx_names(split, kind) for split in ("train", "t10k") for kind in ("images", "labels"))
_CIFAR10_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_KRIZHEVSKY = "by A. Krizhevsky, V. Nair and G. Hinton (University of Toronto)"
_PUBLISHED = {
    "mnist": _Published(
        "The MNIST database of handwritten digits by Y. LeCun, C. Cortes and C. Burges",
        10,
        60_000,
        10_000,
        (_Layout("IDX, plain or gzipped", ("", "MNIST/raw", "raw"), _MNIST_FILES),),
    ),
    "cifar10": _Published(
        f"CIFAR-10 {_KRIZHEVSKY}", 10, 50_000, 10_000, _cifar("cifar-10-batches-py", _CIFAR10_FILES, "cifar-10-batches-bin")
    ),
    "cifar100": _Published(
        f"CIFAR-100 {_KRIZHEVSKY}", 100, 50_000, 10_000, _cifar("cifar-100-python", ("train", "test"), "cifar-100-binary")
    ),
}
NAMES = ("digits", *_PUBLISHED)


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Read a data set: "digits" (needs no files), "mnist", "cifar10" or "cifar100" (fine labels) from `data_dir` or its usual subfolder.

    Accepted: MNIST as IDX, plain or gzipped; CIFAR's binary and python versions. The split is the published one; of digits, every fifth
    image of each class is a test image (1,442 to train on, 355 to test). Warns if there are fewer images than were published.

    Raises FileNotFoundError if files are missing, ValueError if one is not what was published (or for an unknown name); both name the file.
    """
    if name not in NAMES:
        raise ValueError(f"name={name!r}: expected one of {', '.join(NAMES)}")
    if name == "digits":
        return _digits()
    if data_dir is None:
        raise ValueError(
            f"data_dir=None: {name} is read from files, expected the folder that holds them ({_PUBLISHED[name].title}): --data-dir"
        )
    published = _PUBLISHED[name]
    layout, paths = _find(name, Path(data_dir))
    if name == "mnist":
        train, test = _mnist(paths[0], paths[1], published.train), _mnist(paths[2], paths[3], published.test)
    else:
        read = _cifar_binary if layout.version == "binary version" else _cifar_python
        limit = published.train // len(paths[:-1])
        parts = [read(path, published.classes, limit) for path in paths[:-1]]
        train = np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])
        test = read(paths[-1], published.classes, published.test)
    for split, (_, labels), expected in (("train", train, published.train), ("test", test, published.test)):
        if len(labels) < expected:
            warnings.warn(f"{name} in {paths[0].parent} has {len(labels)} {split} images, {expected} were published", stacklevel=2)
    return _dataset(name, train, test, published.classes, 255)


def draw_crops(n: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [n, 3] for `crop_and_flip`, each uniform and independent: row 0..8, column 0..8, mirrored 0..1."""
    return torch.cat((torch.randint(9, (n, 2), generator=generator), torch.randint(2, (n, 1), generator=generator)), 1)


def crop_and_flip(x: torch.Tensor, crops: torch.Tensor) -> torch.Tensor:
    """The usual augmentation of CIFAR: each image in a frame of 4 black pixels, cut out again, half of them mirrored (He et al. 2016).

    Image n of the result is ``padded[n, :, i : i + H, j : j + W]`` with i, j = crops[n, :2], left and right exchanged where crops[n, 2]
    is 1: (4, 4, 0) leaves an image as it is. Any dtype and device; the result is channels_last in memory.

    Args:
        x: [N, C, H, W].
        crops: of `draw_crops`, on x's device.
    """
    height, width = x.shape[2:]
    columns = torch.arange(width, device=x.device)
    columns = torch.where(crops[:, 2:] == 1, columns.flip(0), columns) + crops[:, 1:2]
    rows = torch.arange(height, device=x.device) + crops[:, :1]
    images = torch.arange(len(x), device=x.device)[:, None, None]
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    return padded[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


_Arrays = tuple[np.ndarray, np.ndarray]


def _dataset(name: str, train: _Arrays, test: _Arrays, classes: int, scale: int) -> Dataset:
    x, y, tx, ty = (torch.from_numpy(a) for a in (train[0], train[1].astype(np.int64), test[0], test[1].astype(np.int64)))
    return Dataset(name, x, y, tx, ty, classes, scale)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = x.astype(np.uint8).reshape(-1, 1, 8, 8)
    test = np.sort(np.concatenate([np.flatnonzero(y == c)[4::5] for c in range(10)]))
    train = np.setdiff1d(np.arange(len(y)), test)
    return _dataset("digits", (x[train], y[train]), (x[test], y[test]), 10, 16)


def _find(name: str, root: Path) -> tuple[_Layout, list[Path]]:
    """The first layout with all of its files, and their paths; FileNotFoundError says what was looked for and what of it was there."""
    wanted, partial = [], []
    published = _PUBLISHED[name]
    for layout in published.layouts:
        for folder in (root / sub for sub in layout.folders):
            hits = [next((p for n in names if (p := folder / n).is_file()), None) for names in layout.files]
            paths = [p for p in hits if p]
            if len(paths) == len(hits):
                return layout, paths
            if paths:
                missing = [names[0] for names, p in zip(layout.files, hits, strict=True) if p is None]
                partial.append(f"{folder} has {paths[0].name} but lacks {', '.join(missing)}")
        spellings = [" or ".join(names) if layout.files[0] is names else names[0] for names in layout.files]
        folders = " or ".join(str(root / sub) for sub in layout.folders)
        wanted.append(f"{layout.version}: {', '.join(spellings)} in {folders}")
    there = "; ".join(partial) or ("none of these files is there" if root.is_dir() else f"{root} is not a folder")
    raise FileNotFoundError(f"{name} was not found: {there}. Expected, {'; or '.join(wanted)}. Published as: {published.title}.")


def _check_labels(path: Path, labels: np.ndarray, classes: int, what: str = "label") -> None:
    if labels.max() >= classes:
        i = int(np.argmax(labels >= classes))
        raise ValueError(f"{path}: {what} {labels[i]} of image {i}, expected 0 to {classes - 1}")


def _mnist(images: Path, labels: Path, limit: int) -> _Arrays:
    x = _idx(images, 0x803, (28, 28), limit)
    y = _idx(labels, 0x801, (), limit)
    if len(x) != len(y):
        raise ValueError(f"{labels}: {len(y)} labels, expected {len(x)}, one for each image of {images}")
    _check_labels(labels, y, 10)
    return x[:, None], y


def _idx(path: Path, magic: int, item: tuple[int, ...], limit: int) -> np.ndarray:
    """uint8 [N, *item], 1 <= N <= limit, from an IDX file. Its first bytes, not its name, say if it is gzipped."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        source = gzip.GzipFile(fileobj=file) if zipped else file
        try:
            header = source.read(8 + 4 * len(item))
            if len(header) < 8 + 4 * len(item):
                raise ValueError(f"{path}: {len(header)} bytes, expected an IDX header of {8 + 4 * len(item)} bytes")
            found, n, *shape = struct.unpack(f">{len(header) // 4}I", header)
            if found != magic:
                raise ValueError(f"{path}: starts with 0x{found:08x}, expected the IDX magic number 0x{magic:08x}")
            if not 1 <= n <= limit or tuple(shape) != item:
                claim, expected = (" x ".join(map(str, s)) for s in ((n, *shape), (f"1..{limit}", *item)))
                raise ValueError(f"{path}: its header claims {claim} values, expected {expected}")
            size = n * prod(item)
            body = source.read(size + 1)  # never more: a gzip bomb stays packed; the one byte too many also makes gzip check its CRC
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip data ({error}), expected an IDX file") from error
    if len(body) != size:
        found_size = f"{len(body)} bytes" if len(body) < size else f"more than {size} bytes"
        raise ValueError(f"{path}: {found_size} after the header, expected {size} as it claims")
    return np.frombuffer(bytearray(body), np.uint8).reshape(n, *item)


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        raw = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    if len(raw) > limit:
        raise ValueError(f"{path}: more than {limit} bytes, expected at most that")
    return raw


def _cifar_binary(path: Path, classes: int, limit: int) -> _Arrays:
    """uint8 [N, 3, 32, 32] and labels uint8 [N] from records of (coarse, fine) or (label) and 3072 pixel bytes."""
    heads = 2 if classes == 100 else 1
    raw = _read(path, limit * (heads + 3072))
    if not raw or len(raw) % (heads + 3072):
        raise ValueError(f"{path}: {len(raw)} bytes, expected a whole number of records of {heads + 3072} bytes, at least one")
    records = np.frombuffer(raw, np.uint8).reshape(-1, heads + 3072)
    if heads == 2:
        _check_labels(path, records[:, 0], 20, "coarse label")
    _check_labels(path, records[:, heads - 1], classes)
    return records[:, heads:].copy().reshape(-1, 3, 32, 32), records[:, heads - 1].copy()


def _cifar_python(path: Path, classes: int, limit: int) -> _Arrays:
    """uint8 [N, 3, 32, 32] and labels int64 [N] from a pickled dict of "data", uint8 [N, 3072], and a list of labels."""
    # Published files hold 3,105 bytes and 3 to 4 opcodes an image. Python 3 may write twice the bytes and, for each file name, 8 opcodes.
    raw = _read(path, limit * 6500 + 10_000)
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # pickletools meets escapes in hostile strings
            batch = _unpickle(raw, max_opcodes=limit * 16 + 1000)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: not a batch of CIFAR's python version: {error}") from error
    key = "fine_labels" if classes == 100 else "labels"
    if type(batch) is not dict or not {"data", key} <= batch.keys():
        found = f"a dict of {', '.join(list(batch)[:8]) or 'nothing'}"[:200] if type(batch) is dict else f"a {type(batch).__name__}"
        raise ValueError(f"{path}: {found}, expected a dict with data and {key}")
    data, labels = batch["data"], batch[key]
    x = data.value if type(data) is _Array else None
    if x is None or x.shape[1] != 3072 or len(x) > limit:
        found = type(data).__name__.lstrip("_").lower() if x is None else f"{x.shape[0]} x {x.shape[1]} values"
        raise ValueError(f"{path}: data is {found}, expected an array of 1..{limit} x 3072 values")
    if type(labels) is not list or len(labels) != len(x):
        found = f"{len(labels)} values" if type(labels) is list else type(labels).__name__
        raise ValueError(f"{path}: {key} is {found}, expected a list of {len(x)}, one for each image")
    for i, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < classes:
            found = str(label) if type(label) is int else type(label).__name__
            raise ValueError(f"{path}: label {found} of image {i}, expected 0 to {classes - 1}")
    return np.array(x, order="C").reshape(-1, 3, 32, 32), np.array(labels, np.int64)


# --- Pickles, read without pickle. Even a restricted pickle.Unpickler runs numpy's own __setstate__ on the file's values, sizes its memo
# by an index in the file and hashes nested tuples until the C stack ends; here each opcode that CIFAR needs is spelled out instead.


class _Global(str):
    """A name a pickle may mention, "module name". It is only ever compared, never imported or called."""


class _Array:
    """What numpy's _reconstruct makes: filled by BUILD, after it may have been memoised."""

    value: np.ndarray | None = None


_RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_GLOBALS = frozenset((*_RECONSTRUCT, "numpy ndarray", "numpy dtype", "_codecs encode"))
_UINT8 = _Global("numpy dtype u1")


def _unpickle(raw: bytes, max_opcodes: int) -> Any:
    """The value of a pickle (protocols 2 to 4) of ints, None, bools, bytes, strings, tuples, lists, dicts with string keys, uint8 matrices.

    Strings of Python 2 come out as bytes, dict keys as str, matrices as `_Array`. Anything else: ValueError, TypeError, LookupError or
    AttributeError, without the file's name.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}  # a dict, so that a huge index costs nothing
    to_encode = len(raw)

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    op: Any
    arg: Any
    pos: Any  # typed as optional, yet given for bytes
    for count, (op, arg, pos) in enumerate(pickletools.genops(raw)):
        if count >= max_opcodes:
            raise ValueError(f"more than {max_opcodes} pickle opcodes")
        match op.name:
            case "BININT1" | "BININT" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINBYTES" | "SHORT_BINBYTES":
                stack.append(arg)
            case "SHORT_BINSTRING" | "BINSTRING":
                stack.append(arg.encode("latin-1"))
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op.name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[op.name]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                marks.append(len(stack) - int(op.name[-1]))
                stack.append(tuple(since_mark()))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "APPEND" | "APPENDS":
                items = since_mark() if op.name == "APPENDS" else [stack.pop()]
                _expect(list, stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                if op.name == "SETITEM":
                    marks.append(len(stack) - 2)
                items = since_mark()
                keys = [_text(k) for k in items[::2]]
                _expect(dict, stack[-1]).update(zip(keys, items[1::2], strict=True))
            case "GLOBAL" | "STACK_GLOBAL":
                if op.name == "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    arg = f"{_expect(str, module)} {_expect(str, attribute)}"
                if arg not in _GLOBALS:
                    raise ValueError(
                        f"it names the global {str(arg).replace(' ', '.')[:100]} at byte {pos}, only numpy arrays are accepted"
                    )
                stack.append(_Global(arg))
            case "REDUCE":
                args, function = _expect(tuple, stack.pop()), _expect(_Global, stack.pop())
                if function == "_codecs encode" and len(args) == 2 and args[1] == "latin1":
                    to_encode -= len(args[0])
                    if to_encode < 0:  # one long string, encoded over and over
                        raise ValueError("its strings encode to more bytes than the file has")
                    stack.append(_expect(str, args[0]).encode("latin-1"))
                elif function == "numpy dtype" and args:
                    if _text(args[0]) != "u1":
                        raise ValueError(f"it holds an array of dtype {_text(args[0])[:50]!r}, expected 'u1'")
                    stack.append(_UINT8)
                elif function in _RECONSTRUCT and len(args) == 3 and _expect(_Global, args[0]) == "numpy ndarray":
                    stack.append(_Array())
                else:
                    raise ValueError(f"it calls {function.replace(' ', '.')} with unexpected arguments at byte {pos}")
            case "BUILD":
                state, target = _expect(tuple, stack.pop()), stack[-1]
                if target is _UINT8:
                    # version, byte order, then subarray, names and fields, which would make it another dtype
                    if len(state) < 5 or _text(state[1]) != "|" or any(s is not None for s in state[2:5]):
                        raise ValueError("it holds an array of a structured dtype, expected 'u1'")
                else:
                    _expect(_Array, target).value = _array(state)
            case "STOP":
                if pos + 1 != len(raw):
                    raise ValueError(f"{len(raw) - pos - 1} bytes follow its end at byte {pos}")
                return stack.pop()
            case other:
                detail = f" {arg.replace(' ', '.')[:100]}" if isinstance(arg, str) else ""
                raise ValueError(f"it uses the pickle opcode {other}{detail} at byte {pos}, which no published file does")
    raise ValueError("it has no end")  # genops raises first


def _expect(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _text(value: Any) -> str:
    return value.decode("latin-1") if type(value) is bytes else _expect(str, value)


def _array(state: tuple[Any, ...]) -> np.ndarray:
    """The state numpy pickles: version, shape, dtype, whether in Fortran order, the bytes."""
    if len(state) != 5 or state[2] is not _UINT8:
        raise ValueError("it holds an array that is not one of 'u1' values")
    shape, data = _expect(tuple, state[1]), _expect(bytes, state[4])
    if len(shape) != 2 or not all(type(d) is int and 0 < d <= len(data) for d in shape) or prod(shape) != len(data):
        raise ValueError(f"it holds an array whose shape is not that of a matrix of {len(data)} bytes")
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if state[3] else "C")
