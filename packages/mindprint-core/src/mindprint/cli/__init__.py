"""The command line: one module a command, imported when its command is invoked."""

from __future__ import annotations

import difflib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from mindprint._version import __version__
from mindprint.cli.output import PROGRAM, Failure, json_only, lossy_streams
from mindprint.errors import MindprintError
from mindprint.plugins.entries import COMMANDS as THIRD_PARTY
from mindprint.plugins.entries import installed

COMMANDS = {
    "init": "Make a project: configuration, sample data, and a README of what goes where.",
    "prepare": "Make a project of a person's own files: texts, books, mails, chats.",
    "plan": "State the memory that a run needs, before anything is loaded.",
    "train": "Train SFT, then DPO, topic by topic, and write one adapter.",
    "launch": "Train one adapter in several processes, with the launcher of PyTorch or MLX.",
    "generate": "Answer prompts without and with the adapter.",
    "chat": "Talk to the adapter, to its base model, or to both.",
    "serve": "Serve the adapter and its base model with OpenAI's API, and a page to chat with both.",
    "eval": "Measure the voice on held-out pairs, before and after training.",
    "compare": "Train on two backends, or take two runs, and say whether they are equivalent.",
    "report": "Write report.md and report.html of a run again.",
    "verify": "Prove that an adapter, or a merged model, still does what it did in training.",
    "merge": "Write the base with the adapter in it, and verify it.",
    "convert": "Write an adapter in PEFT's or mlx-lm's format.",
    "migrate": "Write a configuration from a training_pipeline.yaml.",
    "plugins": "List the installed plugins; --check says what is usable here.",
    "doctor": "Check versions, devices, and that training really trains here.",
}
"""The commands that ship with core, with their line of help: listing them imports none of them."""


DEBUG = "MINDPRINT_DEBUG"
"""Set to 1 in the environment, this shows the traceback of every error."""

WRONG_INPUT = 2
INTERNAL = 70
"""A mistake in Mindprint itself, as sysexits.h numbers it: no input should lead to it."""
# Shells report a process that a signal ended as 128 plus its number: 2 is SIGINT, 13 is SIGPIPE.
INTERRUPTED = 130
BROKEN_PIPE = 141

# Some libraries put whole tensors or files into their messages.
LONGEST_CAUSE = 300


class Commands(click.Group):
    """A group that loads a command when it is invoked, and lists all of them without loading any."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        # A plugin cannot replace a command of core, because core's name wins here and in `get_command`.
        return [*COMMANDS, *sorted(_third_party().keys() - COMMANDS)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name in COMMANDS:
            command: click.Command = import_module(f"mindprint.cli.{name}").command
            return command
        return _load(name) if name in _third_party() else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in known and not ctx.resilient_parsing:
            nearest = difflib.get_close_matches(args[0], known, n=1, cutoff=0.5)
            # Whoever names a project first wants to train it, or to look what can be done with it.
            if nearest:
                hint = f"did you mean {nearest[0]!r}?"
            elif Path(args[0]).exists():
                hint = f"the command comes first: {PROGRAM} train {args[0]}"
            else:
                hint = f"known: {', '.join(known)}"
            raise click.UsageError(f"No such command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # Not by click's way, which imports every command for its line of help.
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [*(CompletionItem(name, help=COMMANDS.get(name)) for name in names), *options]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        plugins = {name: f"from {origin}" for name, origin in _third_party().items()}
        # Plugins are described by their origin: their own help would need an import of each.
        rows = [(name, COMMANDS.get(name) or plugins[name]) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
def group() -> None:
    """Teach a language model one person's voice, with the same numbers on every backend."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 a check failed, 2 the input is wrong, 70 an internal
    error, 130 interrupted.
    """
    if instruction := os.environ.get("_MINDPRINT_COMPLETE"):
        from mindprint.cli.completion import complete  # noqa: PLC0415 (only where a shell asks)

        return complete(group, PROGRAM, instruction)
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    with lossy_streams(), json_only(enabled="--json" in arguments) as failed:
        try:
            code = _run(arguments)
            # A full disk or a closed pipe shows only when the buffer is written, and has to become an exit code.
            sys.stdout.flush()
        except Exception as error:
            # The error leaves as it is, so that Python prints its traceback.
            if os.environ.get(DEBUG) == "1":
                raise
            failure = _failure(error) or _internal(error)
            # Python flushes again at exit, and would print a second error there.
            _drain()
            failed(failure)
            return failure.exit_code
        except KeyboardInterrupt:
            failed(Failure("Interrupted", "interrupted", INTERRUPTED))
            return INTERRUPTED
    return code


def _run(arguments: list[str]) -> int:
    """Invoke a command. A number that it returns is the exit code."""
    try:
        with group.make_context(PROGRAM, arguments) as context:
            result = group.invoke(context)
    except click.exceptions.Exit as ended:  # --help and --version
        return ended.exit_code
    return result if isinstance(result, int) else 0


def _failure(error: Exception) -> Failure | None:
    """Return the user's message for an expected error, and None for one that is a mistake of ours."""
    kind = type(error).__name__
    if isinstance(error, MindprintError):
        # The class states its exit code, so that new errors need no change here.
        return Failure(kind, str(error), error.exit_code)
    if isinstance(error, click.ClickException):
        # click puts each choice on a separate line, after a tab: a message is one line
        return Failure(kind, error.format_message().replace("\n\t", " "), WRONG_INPUT)
    if isinstance(error, click.Abort):
        return Failure("Interrupted", "interrupted", INTERRUPTED)
    if isinstance(error, BrokenPipeError):
        # The reader of a pipe left on purpose, as `head` does. That deserves no message.
        return Failure(kind, "", BROKEN_PIPE)
    reason = _system_reason(error)
    # A refusal of the system is mostly about the user's files. Everything else is a mistake of ours.
    return None if reason is None else Failure(kind, reason, WRONG_INPUT)


def _system_reason(error: Exception) -> str | None:
    """Return the system's reason for refusing something, None for an error of another kind."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # Path.resolve, before Python 3.13
        return f"{error}: the link leads to itself"
    return "needs more memory than there is" if isinstance(error, MemoryError) else None


def _internal(error: Exception) -> Failure:
    """Return the message for a mistake of ours, with the traceback in a file that can go along with a report."""
    try:
        handle, log = tempfile.mkstemp(prefix="mindprint-", suffix=".log")
        # A message may hold surrogates from undecodable file names, which UTF-8 refuses to write.
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"mindprint {__version__}, Python {sys.version}, {sys.platform}\n")
            file.writelines(traceback.format_exception(error))
        how = f"please report it with {log}"
    except OSError:
        how = f"please report it with the traceback that {DEBUG}=1 shows"
    name = type(error).__name__
    said = str(error)[:LONGEST_CAUSE]
    return Failure(name, f"{name}: {said}: this is a mistake in Mindprint, not in your input; {how}", INTERNAL)


def _drain() -> None:
    """Drop output that can no longer be written (a closed pipe, a full disk), so that Python can exit."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                # The text that is still in the buffer goes to the null device when Python exits.
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _third_party() -> dict[str, str]:
    """Return the commands of other distributions with their origins, from metadata alone."""
    origins: dict[str, str] = {}
    for plugin in installed(THIRD_PARTY):
        # The list takes the first where two distributions share a name. Loading it then reports the conflict.
        origins.setdefault(plugin.name, plugin.origin)
    return origins


def _load(name: str) -> click.Command:
    from mindprint.plugins.loading import failure, find_plugin, load_plugin  # noqa: PLC0415 (help needs none of it)

    plugin = find_plugin(THIRD_PARTY, name)
    loaded = load_plugin(plugin)
    if not isinstance(loaded, click.Command):
        raise failure(plugin, f": {plugin.module} is of type {type(loaded).__name__}, not a click.Command")
    return loaded
