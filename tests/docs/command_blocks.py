"""The command blocks of a page: indented or fenced, each run by a test or marked with the reason why not.

    <!-- not run: REASON -->             the block below is not run
    <!-- after: COMMAND; COMMAND -->     these are run before the block below, in the same folder

The blocks of a page run in order, in one folder.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

PROGRAMS = ("mindprint", "nox", "pip", "pytest", "python", "twine")
_COMMAND = re.compile(rf"({'|'.join(PROGRAMS)}) ")
_SHELLS = ("", "bash", "console", "sh", "text")
_FENCED = re.compile(r"```(\w*)\n(.*?)```\n", re.DOTALL)
_MARK = re.compile(r"<!-- (not run|after): (.*?) -->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Command lines that stand together; `reason` says why they are not run (None: they are)."""

    lines: tuple[str, ...]
    reason: str | None = None
    after: tuple[str, ...] = ()

    def commands(self) -> tuple[tuple[str, ...], ...]:
        """The words of each command, those that come before included."""
        return tuple(tuple(shlex.split(line, comments=True)) for line in (*self.after, *self.lines))


def command_blocks(page: str) -> tuple[Block, ...]:
    """Every command block of a page of Markdown, in order."""
    return tuple(_block(lines, mark) for lines, mark in _paragraphs(_with_fences_indented(page)) if _is_command(lines))


def _with_fences_indented(page: str) -> str:
    def indented(match: re.Match[str]) -> str:
        language, body = match.groups()
        return "\n" + re.sub(r"(?m)^(?=.)", "    ", body) + "\n" if language in _SHELLS else "\n"

    return _FENCED.sub(indented, page)


def _paragraphs(page: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Paragraphs of indented lines, each with the paragraph above it if that is a comment."""
    above = ""
    for paragraph in re.split(r"\n\s*\n", page):
        comment, _, rest = paragraph.rpartition("-->\n")
        lines = [line for line in rest.splitlines() if line.strip()]
        if lines and all(line.startswith("    ") for line in lines):
            yield tuple(line.strip() for line in lines), f"{comment}-->" if comment else above
        above = paragraph.strip() if paragraph.strip().startswith("<!--") else ""


def _is_command(lines: tuple[str, ...]) -> bool:
    return any(_COMMAND.match(line) for line in lines)


def _block(lines: tuple[str, ...], mark: str) -> Block:
    found = {kind: " ".join(text.split()) for kind, text in _MARK.findall(mark)}
    after = tuple(command.strip() for command in found.get("after", "").split(";") if command.strip())
    return Block(lines, found.get("not run"), after)
