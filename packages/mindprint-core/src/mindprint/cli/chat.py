"""`mindprint chat`: talk to an adapter and its base model in the terminal, or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mindprint.api.chatting import COMMANDS, Chat, Side
from mindprint.api.options import backend_section
from mindprint.cli.options import (
    backend_option,
    device_option,
    max_new_tokens_option,
    min_p_option,
    model_option,
    repetition_penalty_option,
    seed_option,
    temperature_option,
    top_k_option,
    top_p_option,
)
from mindprint.cli.output import emit, json_option, notice, say
from mindprint.errors import MindprintError
from mindprint.printing import printable
from mindprint.runs import opened as runs_opened

QUOTES = '"""'
"""Begins and ends a message of several lines."""

WIDE = 80
"""Columns of a terminal from which two answers are shown side by side."""

SIDES: dict[str, tuple[Side, ...]] = {"voice": ("voice",), "base": ("base",), "both": ("voice", "base")}

ReadLine = Callable[[str], str]
"""Reads a line behind a prompt. Raises `EOFError` at the end."""


@click.command("chat", short_help="Talk to an adapter.")
@click.argument("path", type=click.Path(path_type=Path), default=".")
@click.option("--with", "side", type=click.Choice(list(SIDES)), default="voice", show_default=True, help="Who answers.")
@click.option("--system", default="", help="System message at the beginning of the chat.")
@max_new_tokens_option
@temperature_option
@top_p_option
@top_k_option
@min_p_option
@repetition_penalty_option
@seed_option
@backend_option
@device_option
@model_option
@json_option
def command(
    *,
    path: Path,
    side: Literal["voice", "base", "both"],
    system: str,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int,
    backend: str | None,
    device: str | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Chat with the adapter at PATH: a project (its newest complete run), a run, an adapter, or a whole model.

    Answers appear while they are written. /help lists the commands. Put three quotes around a message of
    several lines, or a backslash at the end of each line but the last. Through a pipe, each line is a message.
    """
    is_model = runs_opened.is_model_folder(path)
    opening = runs_opened.open_model if is_model else runs_opened.open_adapter
    with opening(path, backend_section(backend, device), model=model, notice=notice) as opened:
        settings = opened.config.generation.changed(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        chat = Chat(opened, settings, SIDES[side], seed, system)
        interactive = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
        if interactive:
            notice(f"{' and '.join(chat.asked)} will answer; /help lists the commands, Ctrl-D ends the chat")
        converse(chat, terminal_lines() if interactive else piped_line, interactive=interactive, quiet=as_json)
    if as_json:
        emit(chat.to_dict())


def converse(chat: Chat, read_line: ReadLine, *, interactive: bool, quiet: bool = False) -> None:
    """Read messages and commands until the end, and show the answers.

    In a terminal a mistake is told and the chat continues. Through a pipe it ends with an error.
    """
    for text in messages(read_line, interactive=interactive):
        try:
            if text.startswith("/") and not text.startswith("//"):
                reply = chat.command(text)
                if reply is None:
                    return
                if not quiet:
                    notice(reply) if "\n" not in reply else say(reply)
            else:
                show_turn(chat, text.removeprefix("/") if text.startswith("//") else text, quiet=quiet)
        except MindprintError as error:
            if not interactive:
                raise
            notice(str(error))
        except KeyboardInterrupt:
            # Ctrl-C within an answer ends that answer. This one came just before it or just after it.
            if not interactive:
                raise


def messages(read_line: ReadLine, *, interactive: bool = True) -> Iterator[str]:
    """Yield the messages of a conversation: lines, and blocks of several lines. Empty ones are left out."""
    with suppress(EOFError):
        while True:
            try:
                line = read_line("> ")
                if line.startswith(QUOTES):
                    line = line.removeprefix(QUOTES)
                    while not line.rstrip().endswith(QUOTES):
                        line += "\n" + read_line("... ")
                    line = line.rstrip().removesuffix(QUOTES)
                while line.endswith("\\"):
                    line = line.removesuffix("\\") + "\n" + read_line("... ")
            except KeyboardInterrupt:
                # As in a shell: Ctrl-C drops the line, and Ctrl-D leaves.
                if not interactive:
                    raise
                continue
            if line.strip():
                yield line.strip()


def show_turn(chat: Chat, text: str, *, quiet: bool = False) -> None:
    """Send a message and show the answers while they are written."""
    console = Console()
    if quiet:
        chat.say(text)
    elif len(chat.asked) > 1 and console.is_terminal and console.width >= WIDE:
        answers = dict.fromkeys(chat.asked, "")
        with Live(_columns(answers), console=console, vertical_overflow="visible") as live:

            def show(side: Side, piece: str) -> None:
                answers[side] += printable(piece, lines=True)
                live.update(_columns(answers))

            chat.say(text, show)
    else:
        _show_in_turn(chat, text)


def _columns(answers: dict[Side, str]) -> Table:
    table = Table(expand=True)
    for side in answers:
        table.add_column(side, ratio=1)
    table.add_row(*(Text(answer) for answer in answers.values()))
    return table


def _show_in_turn(chat: Chat, text: str) -> None:
    """Write the answers one below the other. With two of them each has its name above it."""
    shown: list[Side] = []

    def show(side: Side, piece: str) -> None:
        if side not in shown:
            heading = f"{side}:\n" if len(chat.asked) > 1 else ""
            sys.stdout.write(("\n\n" if shown else "") + heading)
            shown.append(side)
        sys.stdout.write(printable(piece, lines=True))
        sys.stdout.flush()

    chat.say(text, show)
    sys.stdout.write("\n" if shown else "(no answer)\n")
    sys.stdout.flush()


def piped_line(_: str) -> str:
    """Read a line of standard input, without a prompt."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def terminal_lines() -> ReadLine:
    """Return a reader with line editing, history and completion, or Python's own without prompt_toolkit."""
    try:
        from prompt_toolkit import PromptSession  # noqa: PLC0415 (an extra)
        from prompt_toolkit.completion import WordCompleter  # noqa: PLC0415
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent  # noqa: PLC0415
    except ImportError:
        notice("for line editing and history: pip install 'mindprint-core[chat]'")
        return input
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    completer = WordCompleter(list(COMMANDS), sentence=True)
    session: PromptSession[str] = PromptSession(completer=completer, complete_while_typing=False, key_bindings=keys)
    return session.prompt
