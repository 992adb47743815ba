"""The texts by which the base model is asked for prompts, and those that become prompts. A folder can replace each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from mindprint.errors import ConfigError
from mindprint.input_files import read_text

NAMES: Mapping[str, str] = {
    "answer-1": "passage",
    "answer-2": "passage",
    "answer-3": "passage",
    "topic-1": "passage",
    "topic-2": "passage",
    "rewrite": "passage",
    "ask-topic": "topic",
    "ask-rewrite": "plain",
    "ask-continue": "before",
    "ask-nothing": "",
}
"""Each template, and the word in braces that it must have."""


class Templates:
    """The templates that come with Mindprint, or a person's own under the same names (`answer-1.txt`)."""

    def __init__(self, folder: Path | None = None) -> None:
        self._texts: dict[str, str] = {}
        unknown = sorted(path.name for path in folder.glob("*.txt") if path.stem not in NAMES) if folder else []
        if folder is not None and (unknown or not folder.is_dir()):
            problem = f"{unknown[0]} is no template" if unknown else "is not a folder"
            raise ConfigError(f"{folder}: {problem}; templates are {', '.join(f'{name}.txt' for name in NAMES)}")
        for name, word in NAMES.items():
            own = folder / f"{name}.txt" if folder else None
            if own is not None and own.is_file():
                text = read_text(own)
            else:
                text = files("mindprint").joinpath("resources", "prepare", f"{name}.txt").read_text(encoding="utf-8")
            if word and f"{{{word}}}" not in text:
                raise ConfigError(f"{own}: has no {{{word}}}, where the text goes")
            self._texts[name] = text.strip()

    def fill(self, name: str, text: str = "") -> str:
        """Return a template with a text in the place of its word."""
        # Not `format`: braces in the person's text, or in another place of the template, mean themselves.
        return self._texts[name].replace(f"{{{NAMES[name]}}}", text) if NAMES[name] else self._texts[name]

    def proposals(self, kind: str) -> Sequence[str]:
        """Return the names of the templates that propose prompts of a kind."""
        return tuple(name for name in NAMES if name.rpartition("-")[0] == kind)

    @property
    def texts(self) -> Mapping[str, str]:
        """Return all texts by name."""
        return self._texts
