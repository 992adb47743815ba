"""What commands print: results on standard output, as text or one JSON object; everything else on standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any, TextIO

import click

PROGRAM = "mindprint"

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
"""The option that every command has."""

_out: list[TextIO] = []
"""Where the JSON object goes while standard output itself is turned to standard error."""


@dataclass(frozen=True)
class Failure:
    """Why a command ended: the error's kind, its message, and the exit code."""

    kind: str
    message: str
    exit_code: int

    @property
    def line(self) -> str:
        prefix = f"{PROGRAM}: " if self.exit_code == 130 else f"{PROGRAM}: error: "
        return prefix + " ".join(self.message.splitlines())


@contextmanager
def json_only(*, enabled: bool) -> Iterator[Callable[[Failure], None]]:
    """With `--json`, whatever a library prints goes to standard error. Yields what reports a failure."""

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
    """A line of the result, on standard output."""
    sys.stdout.write(text + "\n")


def tell(text: str) -> None:
    """A line about the work, on standard error; what stands before it on standard output comes before it."""
    with suppress(OSError):  # said when it is flushed for good
        sys.stdout.flush()
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def notice(message: str, *, warning: bool = False) -> None:
    """Something that the user should hear."""
    tell(f"{PROGRAM}: {'warning: ' if warning else ''}{message}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Aligned columns as plain text; the columns in `numbers` are set flush right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _strict(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value
