"""Output of the commands: results on standard output, as text or one JSON object, everything else on standard error."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, cast

import click

from mindprint.printing import PROGRAM, LossyStream, tell, visible
from mindprint.printing import text_table as table

if TYPE_CHECKING:
    from mindprint.api.results import Result
    from mindprint.events import Notice

__all__ = [
    "PROGRAM",
    "Failure",
    "emit",
    "json_only",
    "json_option",
    "lossy_streams",
    "notice",
    "say",
    "show",
    "table",
    "tell",
    "tell_notice",
]

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
"""The option that every command has."""

LONGEST_LINE = 2000
"""Characters of an error's line."""

_out: list[TextIO] = []
"""Where the JSON object goes while standard output itself is turned to standard error."""


@dataclass(frozen=True)
class Failure:
    """A command's failure: the error's kind, its message, and the exit code."""

    kind: str
    message: str
    exit_code: int

    @property
    def line(self) -> str:
        prefix = f"{PROGRAM}: " if self.exit_code == 130 else f"{PROGRAM}: error: "
        line = " ".join(self.message.splitlines())
        if len(line) > LONGEST_LINE:
            # The problem comes first and the remedy last. The long part is a value that somebody wrote in between.
            line = f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 4 :]}"
        return prefix + line


@contextmanager
def lossy_streams() -> Iterator[None]:
    """Let no output end a command's work: drop what standard error cannot take, replace what an encoding lacks.

    Results on standard output still fail where they cannot be written: whoever reads them must know.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            # The shell closed it (`2>&-`). Left free, its number would go to the next file that is opened, and a
            # library that writes to standard error would write into that file.
            handle = os.open(os.devnull, os.O_WRONLY)
            if handle != number:
                os.dup2(handle, number)
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
    with redirect_stderr(cast(TextIO, LossyStream(sys.stderr))):
        yield


@contextmanager
def json_only(*, enabled: bool) -> Iterator[Callable[[Failure], None]]:
    """With `--json`, send a library's output to standard error. Give a function that reports a failure."""

    def failed(failure: Failure) -> None:
        if not failure.message:
            return
        if enabled:
            emit({"error": {"type": failure.kind, "message": failure.message, "exit_code": failure.exit_code}})
        tell(failure.line)

    if not enabled:
        yield failed
        return
    _out.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield failed
    finally:
        _out.pop()


def emit(result: Mapping[str, Any]) -> None:
    """Print the command's one JSON object."""
    out = _out[-1] if _out else sys.stdout
    out.write(json.dumps(_strict(result), indent=2) + "\n")
    out.flush()


def say(text: str = "") -> None:
    """Print a line of the result."""
    sys.stdout.write(visible(text) + "\n")


def show(result: Result, *, as_json: bool) -> None:
    """Print a result of the API as text or as one JSON object."""
    if as_json:
        emit(result.to_dict())
    else:
        say(str(result))


def notice(message: str, *, warning: bool = False) -> None:
    """Write a message that the user should hear on standard error."""
    tell(f"{PROGRAM}: {'warning: ' if warning else ''}{message}")


def tell_notice(event: Notice) -> None:
    """Write a notice of the API on standard error."""
    notice(event.message, warning=event.warning)


def _strict(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not know, by null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value
