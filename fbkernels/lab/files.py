"""The files of a job: replaced as a whole, read without executing anything, by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if need be. A process that dies loses its lock.

    Raises:
        ValueError: another process is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out: another process is at work in {folder}; wait until it has ended, or name another folder") from None
        yield


def replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that there is the old one or the new one at any time.

    Raises:
        OSError: naming ``path``, such as a full disk; the old file is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides the file's own error
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


def save(path: Path, state: Any) -> None:
    """``torch.save``, as ``replace`` does it."""
    replace(path, lambda file: torch.save(state, file))


def write(path: Path, text: str) -> None:
    replace(path, lambda file: file.write(text.encode()))


def load(path: Path) -> dict[str, Any]:
    """The dict that ``save`` has written, on the CPU; checksums are compared, which torch does not.

    Raises:
        ValueError: naming ``path``: damaged, or another program's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError
    except OSError:
        raise
    except Exception as error:  # torch.load has no exception of its own for damaged files
        raise ValueError(f"{path} is damaged, or no checkpoint of fbkernels ({type(error).__name__})") from error
    return state
