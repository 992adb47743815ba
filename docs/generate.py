"""Write the parts of the documentation that are facts of the code: `python docs/generate.py`. A test runs it."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mindprint import hookspecs
from mindprint.config import BackendConfig, Config

HEADER = """# Configuration

One YAML file, `mindprint.yaml`. Every setting has a default; an unknown one is refused with the nearest known name, a
setting given twice is a mistake, and `3e-4` is a number. `key=value` on the command line overrides the file:
`mindprint train my-voice backend.type=mlx sft.learning_rate=1e-4`. Paths start at the folder of the file.

`backend: mlx` is short for `backend: {type: mlx}`; leaving `backend` out, or null, means `auto`: the best installed
backend for this hardware, said aloud with the reason. A stage may name its own: `sft: {backend: torch}`.

<!-- Generated from mindprint.config by docs/generate.py; do not edit. -->
"""


def configuration() -> str:
    """The configuration reference, Markdown."""
    sections = [HEADER]
    top = []
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections.append(f"\n## {name}\n\n{field.annotation.__doc__}\n\n{_table(field.annotation)}")
            sections.extend(_nested(name, field.annotation))
        else:
            top.append((name, field))
    rows = "".join(_row(name, field) for name, field in top)
    return "".join(sections) + f"\n## Top level\n\n{_TABLE_HEAD}{rows}"


def _nested(name: str, section: type[BaseModel]) -> Iterator[str]:
    """The sections within a section, each kind once."""
    kinds: dict[type[BaseModel], list[str]] = {}
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            kinds.setdefault(field.annotation, []).append(f"{name}.{key}")
    for kind, keys in kinds.items():
        yield f"\n### {', '.join(keys)}\n\n{kind.__doc__}\n\n{_table(kind)}"


_TABLE_HEAD = "| setting | type | default | meaning |\n|---|---|---|---|\n"


def _table(section: type[BaseModel]) -> str:
    return _TABLE_HEAD + "".join(_row(name, field) for name, field in section.model_fields.items())


def _row(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else _shown(field.default)
    return f"| `{name}` | {_type(field.annotation)} | {default} | {field.description or ''} |\n"


def _shown(value: object) -> str:
    if isinstance(value, BaseModel):
        return "`{}`"
    text = (
        {None: "null", True: "true", False: "false"}.get(value)
        if value is None or value is True or value is False
        else None
    )
    return f"`{text or value}`"


def _type(annotation: object) -> str:
    return " or ".join(dict.fromkeys(_names(annotation)))


def _names(annotation: object) -> Iterator[str]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _names(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _names(part)
    elif origin is typing.Literal:
        yield ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    elif origin is list:
        yield f"list of {_type(typing.get_args(annotation)[0])}"
    elif origin is dict:
        yield "settings by name"
    elif annotation is type(None):
        yield "null"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "backend section" if annotation is BackendConfig else "section"
    else:
        yield {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}[annotation.__name__]  # type: ignore[attr-defined]


HOOKS_HEADER = """# Hooks

This page lists every hook as `mindprint/hookspecs.py` specifies it. To implement one, write a function of that name and
mark it with `mindprint.hookspecs.hookimpl`. You may leave out arguments that you do not need. The types are in
`mindprint/contract.py`, where each field has its shape, unit and dtype. Read [write a backend](write-a-backend.md) to
learn how to write them, and [hook API versions](hook-api.md) to learn which changes a new version may bring.

<!-- Generated from mindprint.hookspecs by docs/generate.py; do not edit. -->
"""


def hooks() -> str:
    """The hook reference, Markdown, in the order of the file."""
    sections = [HOOKS_HEADER]
    for title, required in (("A backend implements all of these", True), ("Trackers and scorers", False)):
        sections.append(f"\n## {title}\n")
        for name, function in vars(hookspecs).items():
            is_hook = hasattr(function, f"{hookspecs.PROJECT}_spec")
            if is_hook and (name in hookspecs.REQUIRED_HOOKS) is required:
                doc = docstring_as_markdown(inspect.getdoc(function) or "")
                sections.append(f"\n### {name}\n\n```text\n{signature(name, function)}\n```\n\n{doc}\n")
    return "".join(sections)


def docstring_as_markdown(doc: str) -> str:
    """Return a docstring as Markdown, with its `Args:`, `Returns:` and `Raises:` as lists.

    The entries of a section are indented by four spaces, and the lines that continue an entry by more.
    """
    lines: list[str] = []
    section = ""
    for line in doc.splitlines():
        if line in ("Args:", "Returns:", "Raises:"):
            section = line
            lines += [f"**{line.removesuffix(':')}**", ""]
        elif not section or not line.strip():
            lines.append(line)
        elif line.startswith(" " * 8) or section == "Returns:":
            lines.append(line.strip() if section == "Returns:" else f"  {line.strip()}")
        else:
            name, _, text = line.strip().partition(": ")
            lines.append(f"- `{name}`: {text}")
    return "\n".join(lines)


def signature(name: str, function: Callable[..., object]) -> str:
    """A hook as it is written in Python."""
    return f"{name}{inspect.signature(function)}".replace("'", "")


if __name__ == "__main__":
    folder = Path(__file__).parent
    (folder / "configuration.md").write_text(configuration(), encoding="utf-8")
    (folder / "hooks.md").write_text(hooks(), encoding="utf-8")
