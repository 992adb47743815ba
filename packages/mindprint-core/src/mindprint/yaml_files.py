"""YAML as people write settings: the one reader for configurations, overrides and curricula."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from mindprint.errors import ConfigError, first_line
from mindprint.input_files import MALFORMED

LARGEST_FILE = 2**21
"""Bytes of YAML that are read: a curriculum of 20,000 topics has fewer."""

# Without bounds, a few lines of aliases to aliases expand to billions of values ("billion laughs").
_MOST_NODES = 200_000
_DEEPEST = 50
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")

Lines = dict[tuple[str, ...], int]


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `3e-4` is a number, and a key given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        # PyYAML keeps the last of two equal keys and says nothing.
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, in which a float with an exponent needs a point and a sign, so that `3e-4` would be text. The
# call copies the table of resolvers first: PyYAML's own loaders stay as they are.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d[\d_]*)(?:\.\d*)?[eE][-+]?\d+$|[-+]?\.\d+(?:[eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, source: str) -> tuple[dict[str, Any], Lines]:
    """Return settings as people write them, and the line of each key. Raises `ConfigError` with the line that is wrong.

    Deep nesting is refused, and so are aliases that expand to far more than was written.
    """
    try:
        node, values = _load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}:" if mark else ""
        raise ConfigError(f"{source}:{line} {error.problem or 'is not valid YAML'}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: is not valid YAML: {first_line(error)}") from error
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: line 1: expected `key: value` lines, found {type(values).__name__}")
    return values, dict(_key_lines(node))


def parse_yaml_value(text: str) -> Any:
    """Return one value as it is written after `key=` on the command line. Raises `yaml.YAMLError`."""
    return _load(text)[1]


def _load(text: str) -> tuple[yaml.Node | None, Any]:
    if len(text) > LARGEST_FILE:
        raise yaml.YAMLError(f"is larger than {LARGEST_FILE:,} characters")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        if _expanded(node, {}, 0) > _MOST_NODES:
            raise yaml.constructor.ConstructorError(
                None, None, "its aliases (*name) expand to too much: write the values out", node.start_mark
            )
        return node, loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("is nested too deeply") from None
    except yaml.YAMLError:
        raise
    except MALFORMED as error:  # a constructor's own: a date or a number that is none
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Count the values of a node once every alias is written out. Raises `MarkedYAMLError`.

    Each node is counted once and remembered, so that this takes as long as the text, whatever its aliases expand to.
    """
    if depth > _DEEPEST:
        raise yaml.constructor.ConstructorError(None, None, "is nested too deeply", node.start_mark)
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.constructor.ConstructorError(None, None, "an alias contains itself", node.start_mark)
        return known[id(node)]
    # 0 marks a node whose count is not finished. Meeting it again means that an alias contains itself.
    known[id(node)] = 0
    size = 1
    if isinstance(node, yaml.ScalarNode):
        if _UNWRITABLE.search(node.value):
            raise yaml.constructor.ConstructorError(
                None, None, "holds a NUL character or half a character: take it out", node.start_mark
            )
    elif isinstance(node, yaml.MappingNode):
        size += sum(_expanded(part, known, depth + 1) for pair in node.value for part in pair)
    else:
        size += sum(_expanded(part, known, depth + 1) for part in node.value)
    known[id(node)] = size
    return size


def _key_lines(node: yaml.Node | None, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], int]]:
    lines = []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            lines.append((here, key.start_mark.line + 1))
            lines.extend(_key_lines(value, here))
    return lines
