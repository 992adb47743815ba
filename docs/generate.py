"""Write the parts of the documentation that are facts of the code: `python docs/generate.py`. A test runs it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import mindprint
from mindprint import events, hookspecs
from mindprint.config import BackendConfig, Config

HEADER = """# Configuration

Write your settings into one YAML file, `mindprint.yaml`. Every setting has a default, so you only name those that you
change. A setting that does not exist is refused with the nearest known name, a setting given twice is a mistake, and
`3e-4` is a number. Override the file with `key=value` on the command line:
`mindprint train my-voice backend.type=mlx sft.learning_rate=1e-4`. Paths start at the folder of the file.

You can write `backend: mlx` instead of `backend: {type: mlx}`. If you leave out `backend`, or set it to null, you get
`auto`: the best installed backend for your hardware, printed with the reason. A stage may name another backend:
`sft: {backend: torch}`.

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
    # The thresholds of four levels are of one class, and one table is enough for them.
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
        # Asked by identity below, because 1 and 0 equal True and False as keys.
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
    # Annotations are texts there (`from __future__ import annotations`), which `inspect` shows in quotes.
    return f"{name}{inspect.signature(function)}".replace("'", "")


API_HEADER = """# Python API

You can call everything that the commands do. `import mindprint` is all you need, and it loads no framework. Each
function returns a frozen result. You can print it, a notebook shows it as a table, and `to_dict()` gives you the values
that the command prints with `--json`.

The examples below belong to one project, which `mindprint init my-voice` made. They run in the tests.

<!-- Generated from the docstrings by docs/generate.py; do not edit. -->
"""

FUNCTIONS = (
    "load_config",
    "prepare",
    "plan",
    "train",
    "open_adapter",
    "generate",
    "evaluate",
    "verify",
    "merge",
    "convert",
    "compare",
)
RESULTS = (
    "PrepareResult",
    "PlanResult",
    "TrainResult",
    "GenerateResult",
    "AnsweredPrompt",
    "EvaluateResult",
    "VerifyResult",
    "MergeResult",
    "ConvertResult",
    "CompareResult",
)
INHERITED_METHODS = ("to_dict", "cautions")

EVENTS_HEADER = """
## Events and observers

A run tells you what happens in it. Pass a function as `on_event`, or an object with an `on_event` method in
`observers`. Each event is one of these classes.
"""

PIECES_HEADER = """
## The pieces

`train` is made of these. [step_by_step.py](step_by_step.py) uses them one by one.
"""


def api() -> str:
    """Return the reference of the Python API, Markdown."""
    sections = [API_HEADER, "\n## Functions\n"]
    for name in FUNCTIONS:
        function = getattr(mindprint, name)
        called = f"mindprint.{call_signature(name, function)}"
        sections.append(f"\n### {name}\n\n```python\n{called}\n```\n\n{_documented(function)}")
    sections.append("\n## Results\n")
    results = {name: getattr(mindprint, name) for name in RESULTS}
    sections += [f"\n### {name}\n\n{_documented(result)}{_methods(result)}" for name, result in results.items()]
    sections.append(EVENTS_HEADER)
    sections += [f"\n### {event.__name__}\n\n{_documented(event)}\n{_fields(event)}" for event in _event_classes()]
    sections.append(f"\n### Observer\n\n{_documented(events.Observer)}")
    rest = [name for name in mindprint.__all__ if name not in (*FUNCTIONS, *RESULTS, "Observer", "__version__")]
    rest = [name for name in rest if getattr(mindprint, name) not in _event_classes()]
    rows = "".join(f"| `{name}` | {_summary(getattr(mindprint, name))} |\n" for name in rest)
    sections.append(f"{PIECES_HEADER}\n| name | meaning |\n|---|---|\n{rows}")
    return "".join(sections)


def call_signature(name: str, function: Callable[..., object]) -> str:
    """Return a function as it is called, one argument a line."""
    lines: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in lines:
            lines.append("*")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"{stars}{parameter.name}: {parameter.annotation}{default}")
    return f"{name}(\n" + "".join(f"    {line},\n" for line in lines) + ")"


def _event_classes() -> list[type[events.Event]]:
    classes = [value for value in vars(events).values() if isinstance(value, type)]
    return [value for value in classes if issubclass(value, events.Event) and value is not events.Event]


def _summary(documented: object) -> str:
    doc = inspect.getdoc(documented) or ""
    return " ".join(doc.split("\n\n", maxsplit=1)[0].split()).replace("|", "\\|")


def _documented(documented: object) -> str:
    """Turn a docstring with Google's sections into Markdown: lists for the named entries, a code block for examples."""
    doc = inspect.getdoc(documented) or ""
    prose, *parts = re.split(r"^(Args|Returns|Raises|Attributes|Example):\n", doc, flags=re.MULTILINE)
    # reStructuredText announces a code block by two colons.
    written = [re.sub(r"::\n\n((?: {4}.*\n?|\n)+)", lambda match: f":\n\n{_code(match[1])}\n", f"{prose.strip()}\n")]
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        text = textwrap.dedent(body).strip("\n")
        if title == "Example":
            written.append(f"```pycon\n{re.sub(r' +# doctest:.*', '', text)}\n```\n")
        elif title == "Returns":
            written.append(f"**Returns:** {' '.join(text.split())}\n")
        else:
            written.append(f"**{title}:**\n\n{''.join(_items(text))}")
    return "\n".join(written)


def _code(body: str) -> str:
    return f"```python\n{textwrap.dedent(body).strip()}\n```"


def _items(text: str) -> Iterator[str]:
    """The entries `name: meaning` of a section, which continue on lines that are set in."""
    for entry in re.split(r"\n(?=\S)", text):
        name, meaning = entry.split(":", maxsplit=1)
        yield f"- `{name}`: {' '.join(meaning.split())}\n"


def _methods(result: type[object]) -> str:
    """The methods that only this result has."""
    written = []
    for name, member in vars(result).items():
        hidden = name.startswith("_") or name in ("blocks", "document_tables", *INHERITED_METHODS)
        if inspect.isfunction(member) and not hidden:
            written.append(f"\n`{name}{inspect.signature(member)}`: ".replace("(self)", "()"))
            written.append(f"{_summary(member)}\n")
    return "".join(written).replace("'", "")


def _fields(event: type[events.Event]) -> str:
    names = ", ".join(f"`{field.name}`" for field in dataclasses.fields(event))
    return f"Fields: {names}.\n"


if __name__ == "__main__":
    folder = Path(__file__).parent
    (folder / "configuration.md").write_text(configuration(), encoding="utf-8")
    (folder / "hooks.md").write_text(hooks(), encoding="utf-8")
    (folder / "api.md").write_text(api(), encoding="utf-8")
