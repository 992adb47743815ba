"""Files and folders that appear whole or not at all: written under a temporary name, flushed to the disk, renamed.

Temporary names are unique and made exclusively, so that two processes never write into each other's, and a link that
somebody planted under such a name is never followed. Whoever writes one holds a lock on it. A temporary file or folder
without a lock belongs to a process that was killed: the next write in the same folder removes it.

On Linux a folder takes the place of another in one step of the kernel. Elsewhere two renames do it, and between them
nothing is at its path. The older folder then has a name from which it is put back, if the process is killed there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from mindprint.errors import RunError

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.mindprint-[0-9a-f]{16}\.(?P<kind>partial|replaced)")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Of linux/fcntl.h and linux/fs.h, for renameat2(2)."""
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


@contextmanager
def new_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Fill a folder under another name. It becomes `path` when the block ends well.

    With `replace` it takes the place of an older one. Without, whatever appeared at `path` in the meantime stays.
    Raises `RunError` in one line when the disk is full or not writable, or `path` is taken. Then nothing is left.
    """
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside, lock = _make_folder(path)
        try:
            yield aside
            for file in sorted(aside.rglob("*")):
                sync(file)
            _move_folder(aside, path, replace=replace)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        finally:
            os.close(lock)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a file under another name. It becomes `path` when the block ends well.

    Raises `RunError` in one line when the disk is full or not writable, or `path` is taken. Then nothing is left.
    """
    with _disk_errors(path):
        aside, handle = _make_file(path)
        try:
            yield aside
            sync(aside)
            _move_file(aside, path)
            sync(path.parent)
        except BaseException:
            with suppress(OSError):
                aside.unlink()
            raise
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) whole, replacing an older one. Raises `RunError` as `new_folder` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole, replacing an older one. Raises `RunError` as `new_folder` does."""
    with _disk_errors(path):
        aside, handle = _make_file(path)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                # The content is on the disk before the name is. A power cut between the two would otherwise leave a cut
                # file.
                os.fsync(file.fileno())
                # While the lock is held: a temporary name without one may be removed by anyone.
                aside.replace(path)
            sync(path.parent)
        except BaseException:
            with suppress(OSError):
                aside.unlink()
            raise


def sync(path: Path) -> None:
    """Have a file or folder on the disk before this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tidy(parent: Path) -> None:
    """Remove what killed processes left in a folder, and put back a folder that one of them was replacing."""
    with suppress(OSError):
        for entry in os.scandir(parent):
            matched = _TEMPORARY.fullmatch(entry.name)
            # A link is never ours: whoever planted it must not have its target touched.
            if matched and not entry.is_symlink():
                replaced = Path(parent, matched["name"]) if matched["kind"] == "replaced" else None
                _remove_if_abandoned(Path(entry.path), replaced)


def _move_file(new: Path, path: Path) -> None:
    # A rename would replace a file that another process made in the meantime.
    if os.path.lexists(path):
        raise RunError(f"{path}: exists already, another process made it meanwhile; name a new file")
    new.rename(path)


def _move_folder(new: Path, path: Path, *, replace: bool) -> None:
    # A folder's rename fails where the target is a file or holds anything: that makes it exclusive.
    try:
        new.rename(path)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        if not replace:
            raise RunError(f"{path}: exists already, another process made it meanwhile; name a new folder") from error
    else:
        return
    if _exchange(new, path):
        # The older folder has the temporary name now. A process that is killed here leaves it to the next write.
        _remove(new)
    else:
        _replace_in_two_steps(new, path)


def _exchange(new: Path, path: Path) -> bool:
    """Exchange two paths in one step. Return False where the system or the file system cannot."""
    rename = _renameat2()
    if rename is None:
        return False
    # Any error leaves both as they were. The two renames that follow meet the same error, and Python names it.
    return rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE) == 0


@cache
def _renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    """Return the function of the C library, which Python does not offer. None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes  # noqa: PLC0415 (most commands replace no folder)

    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return None  # glibc before 2.28
    rename.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    rename.restype = ctypes.c_int
    call: Callable[[int, bytes, int, bytes, int], int] = rename
    return call


def _replace_in_two_steps(new: Path, path: Path) -> None:
    # POSIX renames no folder over one that holds anything. Between the two renames nothing is at `path`.
    old = temporary_name(path, "replaced")
    # While the lock is held, `tidy` of another process knows that this one will finish. A link cannot be locked.
    lock = None if path.is_symlink() else os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if lock is not None:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
        path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            old.rename(path)
            raise
        _remove(old)
    finally:
        if lock is not None:
            os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def temporary_name(path: Path, kind: str = "partial") -> Path:
    """Return a name next to `path` that nobody else uses."""
    return path.with_name(f".{path.name}.mindprint-{secrets.token_hex(8)}.{kind}")


def _make_folder(path: Path) -> tuple[Path, int]:
    """Make a temporary folder for `path`, and hold its lock."""
    tidy(path.parent)
    while True:
        aside = temporary_name(path)
        aside.mkdir()
        try:
            handle = os.open(aside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # another process took it for abandoned before it could be opened
        if _locked_in_place(aside, handle):
            return aside, handle


def _make_file(path: Path) -> tuple[Path, int]:
    """Make a temporary file for `path`, and hold its lock."""
    tidy(path.parent)
    while True:
        aside = temporary_name(path)
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        if _locked_in_place(aside, handle):
            return aside, handle


def _locked_in_place(aside: Path, handle: int) -> bool:
    """Lock a temporary name. Return False, with the handle closed, if it was removed before it was locked."""
    # Not every file system has locks. Without them nothing is ever taken for abandoned, see `_remove_if_abandoned`.
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        # Between the making of a name and its lock, another process could take it for abandoned and remove it.
        if os.path.samestat(aside.lstat(), os.fstat(handle)):
            return True
    except FileNotFoundError:
        pass
    os.close(handle)
    return False


def _remove_if_abandoned(path: Path, replaced: Path | None) -> None:
    """Remove what no living process holds, or put it back where nothing took the place that it was moved from."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if replaced is not None and not os.path.lexists(replaced):
            # A folder's rename fails if something appears there now. The next look then removes this one.
            path.rename(replaced)
            return
        # The lock is kept until it is gone: a process that has only just made it waits, sees that, and makes another.
        _remove(path)
    except OSError:
        return  # a living process holds it, or this file system has no locks
    finally:
        os.close(handle)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"{path}: cannot be written: {reason}; free space, or choose another place") from error
