"""Edits of a file that a person, a broken disk or an enemy might make, as Hypothesis strategies."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Edit = Callable[[Path], None]

HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 0.5, 10**30, -(2**31), 2**31, 2**63, 10**400, 1e308, float("inf"), float("nan"), "",
    " ", "\0", "a\0b", "~nosuchuser/x", "\ud800", "../outside", "../../outside/precious", "/dev/zero", "/dev/stdin",
    "a" * 10_000, "\x1b[31mred\x1b]0;title\x07", "\u202egnp", [], {}, [[]], [None], {"a": 1}, ["a", 1], "NaN", "-1",
    "(a+)+$", "((a|a)*)*b", "(.*)*(.*)*(.*)*x", "(?P<a", "main", "sft", "9" * 5000, list(range(50)), ["x"] * 5_000,
    {f"k{number}": 1 for number in range(5_000)}, "{{ 7 }}", "[bold]", "<script>", "a/b/../../c", 1.5, ["\0"], "٣",
)  # fmt: skip
"""Values that no field expects."""

DEEP = {
    "[": "[" * 100_000,
    "[]": "[" * 100_000 + "]" * 100_000,
    "{}": '{"a":' * 50_000 + "1" + "}" * 50_000,
}
"""Nesting deeper than any reader's stack."""

TEMPLATES = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'a' * 10000000000 }}",
    "{{ 10 ** 100000000 }}",
    "{{ ('a' * 100000000)|replace('a', 'b' * 100) }}",
    "{{ 'a'|center(2000000000) }}",
    "{{ '%2000000000d' % 1 }}",
    "{{ '{:2000000000}'.format(1) }}",
    "{{ messages[0].content.ljust(4000000000) }}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ messages",
    "{% if %}",
    "{{ raise_exception('\x1b[31mno\x1b[0m') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch ../outside/made') }}",
    "{% include '/etc/passwd' %}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{% for a in 'a' %}" * 40 + "x" + "{% endfor %}" * 40,
    "",
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    "{{ messages[5].content }}",
    "{{ 1 / 0 }}",
    "{{ messages|map(attribute='content')|join('x' * 1000000)|length }}",
    "{{ range(10)|batch(1000000000, 0)|list }}",
    "{{ [0] * 2000000000 }}",
    "{{ messages[0].content.zfill(3000000000) }}",
    "{{ dict(a=1).update }}{{ lipsum(n=100000) }}",
)
"""Chat templates that take time or memory, that break, or that want out of their sandbox."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the path of every value in a JSON document; of long lists the first two."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[:60]:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(2, len(value))):
            yield from places(value[index], (*path, index))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a document with another value at a path."""
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


def without(value: Any, path: tuple[Any, ...]) -> Any:
    """Return a document without the value at a path."""
    value = copy.copy(value)
    if len(path) == 1:
        del value[path[0]]
    else:
        value[path[0]] = without(value[path[0]], path[1:])
    return value


@st.composite
def json_edits(draw: st.DrawFn, document: Any) -> bytes:
    """Draw the bytes of a JSON document with one or two values replaced or removed."""
    for _ in range(draw(st.integers(1, 2))):
        paths = list(places(document))
        path = draw(st.sampled_from(paths))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if kind == "remove" and path:
            document = without(document, path)
        elif kind == "add" and path:
            key = draw(st.sampled_from(["unknown", "__class__", "", "\0", "(a+)+$", "format"]))
            document = {**document, key: draw(st.sampled_from(HOSTILE))} if isinstance(document, dict) else document
        else:
            document = replaced(document, path, draw(st.sampled_from(HOSTILE)))
    return json.dumps(document, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@st.composite
def raw_edits(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw bytes that are damaged without regard to what they mean."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "deep", "empty", "bytes", "utf16", "bom", "twice"]))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    ways: dict[str, Callable[[], bytes]] = {
        "cut": lambda: content[:at],
        "flip": lambda: content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :],
        "insert": lambda: content[:at] + draw(st.binary(max_size=20)) + content[at:],
        "deep": DEEP[draw(st.sampled_from(sorted(DEEP)))].encode,
        "empty": lambda: b"",
        "bytes": lambda: draw(st.binary(max_size=200)),
        "utf16": lambda: content.decode("utf-8", "replace").encode("utf-16"),
        "bom": lambda: b"\xef\xbb\xbf" + content,
        "twice": lambda: content + content,
    }
    return ways[kind]()


def special(kind: str, path: Path) -> None:
    """Put something else than a regular file in a file's place."""
    path.unlink()
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "zero":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "nowhere":
            path.symlink_to("nowhere/at/all")
        case "circle":
            path.symlink_to(path.name)
        case "sparse":
            with path.open("wb") as file:
                file.truncate(20 * 2**30)
        case "secret":
            path.touch(mode=0o000)
        case _:
            pass  # gone


SPECIAL = ("pipe", "zero", "folder", "nowhere", "circle", "sparse", "secret", "gone")


@st.composite
def file_edits(draw: st.DrawFn, content: bytes) -> Edit:
    """Draw an edit of one file, whatever is in it: JSON, JSON lines, YAML or text."""
    kind = draw(st.sampled_from(["values", "values", "values", "raw", "special"]))
    if kind == "special":
        what = draw(st.sampled_from(SPECIAL))
        return lambda path: special(what, path)
    if kind == "values":
        try:
            new = draw(json_edits(json.loads(content)))
        except ValueError:
            new = draw(line_edits(content))
    else:
        new = draw(raw_edits(content))
    return lambda path: rewrite(path, new)


@st.composite
def line_edits(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw an edit of one line: its JSON, or its text where it is not JSON."""
    lines = content.splitlines()
    if not lines:
        return draw(st.binary(max_size=20))
    number = draw(st.integers(0, len(lines) - 1))
    try:
        lines[number] = draw(json_edits(json.loads(lines[number])))
    except ValueError:
        lines[number] = draw(raw_edits(lines[number]))
    return b"\n".join(lines) + b"\n"


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)
