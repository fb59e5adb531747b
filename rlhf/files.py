"""Durable writes: a reader sees the old content or the new, whole, whatever is killed in between."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.errors import StorageError

_FAULTS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM,
    errno.ENOTCONN, errno.ETIMEDOUT,
}  # fmt: skip
"""What a full, lost or read-only file system answers."""

_SAID = ("inline_container", "iostream error", "PytorchStreamWriter", "PytorchFileWriter", "I/O error")
"""How torch and safetensors, which pass no error numbers on, put that their file took no more."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the file system refuses inside is a `StorageError` that names the file, or `path`; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FAULTS:
            raise
        raise _storage_error(error.filename or path, error.strerror) from error
    except Exception as error:
        if isinstance(error, StorageError) or not any(said in str(error) for said in _SAID):
            raise
        raise _storage_error(path, f"{str(error).splitlines()[0]}; {_free(path) >> 20} MiB free") from error


def _free(path: Path) -> int:
    """Bytes that are free where `path` lies, or would."""
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


def _storage_error(where: object, why: object) -> StorageError:
    return StorageError(
        f"{where}: cannot be written ({why}); make room, or make it writable again, and run the same command, which "
        "goes on from what is whole"
    )


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to a temporary neighbour, flush it to disk, rename it over `path`, flush the folder.

    Raises `StorageError` where the file system is full, lost or read-only; `path` is as it was then.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        rename_durable(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON; NaN is refused."""
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def rename_durable(source: Path, target: Path) -> None:
    """Rename a file or a folder and flush the parent folder, so that the rename survives a power cut."""
    source.rename(target)
    sync_folder(target.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file that somebody else wrote."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
