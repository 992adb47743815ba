"""Files and folders that appear whole or not at all: written aside, flushed to the disk, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mindprint.errors import RunError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder under another name; it becomes `path` when the block ends well, replacing what was there.

    Raises `RunError` in one line when the disk is full or not writable; nothing is left behind then.
    """
    aside = path.with_name(f".{path.name}.partial")
    with _disk_errors(path):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
            for file in sorted(aside.rglob("*")):
                sync(file)
            _replace_folder(aside, path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) whole, replacing what was there. Raises `RunError` as `new_folder` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole, replacing what was there. Raises `RunError` as `new_folder` does."""
    aside = path.with_name(f".{path.name}.partial")
    with _disk_errors(path):
        try:
            aside.write_bytes(content)
            sync(aside)
            aside.replace(path)
            sync(path.parent)
        except BaseException:
            with suppress(OSError):
                aside.unlink()
            raise


def _replace_folder(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file or folder on the disk before this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"{path}: cannot be written: {reason}; free space, or choose another place") from error
