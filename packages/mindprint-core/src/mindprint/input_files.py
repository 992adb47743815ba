"""Bytes, text, JSON and paths that somebody else wrote: read within bounds, refused in one sentence.

Everything here but `read_object` raises `OSError` or `ValueError` and nothing else, and its caller names the file.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from mindprint.errors import MindprintError, first_line

Value = TypeVar("Value")

LARGEST_FILE = 2**28
"""Bytes of the largest file that is read whole: several times the largest tokenizer.json."""

MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""Errors that reading values of the wrong shape can raise: what catches them can take any value that JSON can hold."""

DEEPEST = 64
"""Nested lists and objects: real files of ours and of Hugging Face's have fewer than ten, and a writer that recurses
would fail on many more."""

NON_FINITE = ("NaN", "Infinity", "-Infinity")
"""The constants that Python's writer makes of values that JSON does not have."""

INFINITIES = NON_FINITE[1:]
"""Those that transformers wrote into config.json, for the `time_step_limit` of Mamba 2."""

# The bounds of 64 bits, 2^63 and 2^64, have 19 and 20 digits: a number of fewer digits is always inside them.
_LONG_NUMBER = re.compile(r"\d{19}")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_bytes(path: Path, limit: int = LARGEST_FILE) -> bytes:
    """Read a regular file of at most `limit` bytes. Never waits for a pipe, and never reads a device.

    Raises `OSError` for what cannot be opened, is not a regular file, or is larger.
    """
    # Without O_NONBLOCK, opening a pipe that nobody writes to waits for ever.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        file = os.fdopen(handle, "rb")
    except OSError:
        os.close(handle)  # a folder opens as a descriptor, but not as a file, and Python leaves it open then
        raise
    with file:
        # Asked of the open file and not of the path, which could lead to another file by now.
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        # A file can grow after its size was asked for, and files of /proc have none: the read is bounded as well.
        content = file.read(limit + 1) if status.st_size <= limit else b"\0" * (limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"is larger than {limit:,} bytes", str(path))
    return content


def read_text(path: Path, limit: int = LARGEST_FILE) -> str:
    """Read a UTF-8 text file, with or without a byte order mark. Raises `OSError` or `UnicodeDecodeError`."""
    return read_bytes(path, limit).decode("utf-8-sig")


def read_object(
    path: Path, error: type[MindprintError], *, missing: str = "", remedy: str = "", constants: Collection[str] = ()
) -> dict[str, Any]:
    """Read a file of one JSON object.

    Args:
        path: The file. A link is followed. A pipe, a device or a folder is refused.
        error: The class of error to raise, with one line that names the file.
        missing: The line if the file does not exist. The default is `PATH: no such file`.
        remedy: What to do about a file that cannot be read, put behind the reason.
        constants: Those of `NON_FINITE` that are accepted as numbers.
    """
    try:
        value = parse_json(read_bytes(path), constants)
    except FileNotFoundError:
        raise error(missing or f"{path}: no such file") from None
    except (OSError, ValueError) as reason:
        said = reason.strerror if isinstance(reason, OSError) and reason.strerror else first_line(reason)
        raise error(f"{path}: cannot be read as JSON: {said}{remedy}") from reason
    if not isinstance(value, dict):
        raise error(f"{path}: must hold a JSON object, found {type(value).__name__}{remedy}")
    return value


def parse_json(text: str | bytes, constants: Collection[str] = NON_FINITE) -> Any:
    """Parse JSON. Raises `ValueError` for anything that is not JSON or that no other part of a program could hold.

    A key that is there twice is refused, for readers differ in which of the two they take. So are NaN and the
    infinities unless `constants` names them. Whole numbers beyond 64 bits become floats, as in JSON's own model of
    numbers. Half a surrogate pair is refused as well: it is not a character, and writing it anywhere fails.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        # The hook costs a call for each number, so it is set only where a number is long.
        value = json.loads(
            text,
            parse_int=_whole_number if _LONG_NUMBER.search(text) else None,
            parse_constant=lambda name: _constant(name, constants),
            object_pairs_hook=_object,
        )
        # Only a text with that many brackets can be nested so deeply. Nearly every text is spared the walk.
        if text.count("[") + text.count("{") > DEEPEST:
            _refuse_deep(value)
        # The pattern also matches a whole pair. Encoding fails only for half of one.
        if _ESCAPED_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate such as \\ud800)") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    return value


def read_json(path: Path, limit: int = LARGEST_FILE) -> Any:
    """Read a file of one JSON value. Raises `OSError` or `ValueError`, neither naming the file in its text."""
    return parse_json(read_bytes(path, limit))


def resolve_path(folder: Path, text: str) -> Path:
    """Return the absolute path that a person means by `text`, relative to `folder`. `~` is their home.

    Raises `ValueError` for what no path can be: a NUL character, a user that does not exist, links that go in circles.
    """
    try:
        return (folder / Path(text).expanduser()).resolve()
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{text!r} is not a path: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} is there twice")
    return value


def _constant(name: str, accepted: Collection[str]) -> float:
    if name not in accepted:
        raise ValueError(f"{name} is not a number of JSON")
    return float(name)


def _refuse_deep(value: object) -> None:
    # A stack rather than recursion: this looks for exactly the depth that recursion would not survive.
    waiting = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        if isinstance(part, dict | list):
            if depth == DEEPEST:
                raise ValueError("is nested too deeply")
            waiting.extend((inner, depth + 1) for inner in (part.values() if isinstance(part, dict) else part))


def _whole_number(digits: str) -> int | float:
    # 4300 digits is where Python refuses. A float of that many digits is infinite, which is refused where it matters.
    if len(digits) > 4000:
        return float(digits)
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else float(digits)


def typed(kind: type[Value], value: object) -> Value:
    """Return a value that JSON held as a dataclass, with every field checked against its annotation.

    Fields that the dataclass lacks are ignored: a newer version may write more. Raises `ValueError` naming the field.
    """
    try:
        checked: Value = _adapters(kind).validate_python(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or kind.__name__
        raise ValueError(f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}") from error
    return checked


# An adapter compiles a schema when it is made, so each type gets one for the life of the process.
_adapters: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


def shortened(text: str, longest: int = 100) -> str:
    """Return a value's text for a message, cut where it is long."""
    return text if len(text) <= longest else f"{text[:longest]}…"
