"""Settings as people type them: `key=value` words, options that are settings, and the completion of their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from mindprint.config import ALIASES, nearest_settings, setting_names

SETTING = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*=\S*")
"""A word that is a setting and no prompt: a name, an equals sign, and no space between the two."""


class SettingsCommand(click.Command):
    """A command that takes settings. An option that it does not know is often one of them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            option = error.option_name
            # The value is behind the equals sign, or is the next word.
            place = next((n for n, word in enumerate(given) if word.partition("=")[0] == option), len(given))
            value = "".join(given[place : place + 1]).partition("=")[2] or "".join(given[place + 1 : place + 2])
            if not value or value.startswith("-"):
                value = "VALUE"
            name = option.lstrip("-").replace("-", "_")
            nearest = nearest_settings(name)
            exact = name in ALIASES or any(setting.endswith(f".{name}") for setting in nearest)
            # A misspelt option is likelier than a misspelt setting.
            if not nearest or (error.possibilities and not exact):
                raise
            suggested = " or ".join(f"{setting}={value}" for setting in nearest)
            raise click.UsageError(f"No such option: {option}; settings have no dashes: {suggested}") from None


def complete_setting(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Complete the name of a setting. Where no setting fits, the shell completes files and folders."""
    names = [f"{name}=" for name in setting_names() if name.startswith(incomplete)] if incomplete else []
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


def project_and_overrides(words: Sequence[str]) -> tuple[Path, list[str]]:
    """Split the words into project and settings. The first is the project, unless it is a setting and not a file."""
    # A folder may have an equals sign in its name, so an existing path wins over a setting.
    if not words or ("=" in words[0] and not Path(words[0]).exists()):
        return Path(), list(words)
    paths = [word for word in words[1:] if "=" not in word]
    if paths:
        raise click.UsageError(f"{paths[0]!r} is neither an option nor a setting: write settings as key=value")
    return Path(words[0]), list(words[1:])
