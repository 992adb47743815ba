"""The one reader of JSON files: every kind of file that is wrong is one line that names it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mindprint.errors import AdapterError, ModelError, first_line
from mindprint.input_files import DEEPEST, INFINITIES, LARGEST_FILE, parse_json, read_bytes, read_object

WRONG = {
    "truncated": (b'{"a": ', "Expecting value: line 1 column 7"),
    "empty": (b"", "Expecting value: line 1 column 1"),
    "latin 1": (b'{"a": "\xe4"}', "can't decode byte 0xe4 in position 7"),
    "encoded surrogate": (b'{"a": "\xed\xa0\x80"}', "can't decode byte 0xed in position 7"),
    "lone surrogate": (b'{"a": ["\\ud800"]}', "half a character"),
    "lone surrogate in a key": (b'{"\\udfff": 1}', "half a character"),
    "twice": (b'{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' is there twice"),
    "NaN": (b'{"a": NaN}', "NaN is not a number of JSON"),
    "infinity": (b'{"a": [-Infinity]}', "-Infinity is not a number of JSON"),
    "nested": (b'{"a": ' + b"[" * DEEPEST + b"]" * DEEPEST + b"}", "is nested too deeply"),
    "nested beyond the stack": (b'{"a": ' + b"[" * 100_000, "is nested too deeply"),
    "null byte": (b'{"a": "\0"}', "Invalid control character"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_text_that_is_wrong_is_one_line_that_names_the_file(kind: str, tmp_path: Path) -> None:
    content, words = WRONG[kind]
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=f"^{file}: cannot be read as JSON: .*{words}.*; restore it$") as caught:
        read_object(file, ModelError, remedy="; restore it")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "found"), [("[]", "list"), ("1", "int"), ('"a"', "str"), ("null", "NoneType")])
def test_another_value_than_an_object_is_named_by_its_type(content: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text(content)
    with pytest.raises(AdapterError, match=f"f: must hold a JSON object, found {found}"):
        read_object(tmp_path / "f", AdapterError)


def test_a_missing_file_has_a_message_that_the_caller_may_choose(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="f: no such file"):
        read_object(tmp_path / "f", ModelError)
    (tmp_path / "f").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"^no config.json: this is not a model folder$"):
        read_object(tmp_path / "f", ModelError, missing="no config.json: this is not a model folder")


def test_a_pipe_a_device_and_a_folder_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name, words in (("pipe", "not a regular file"), ("zero", "not a regular file"), ("folder", "Is a directory")):
        with pytest.raises(ModelError, match=f"{name}: cannot be read as JSON: .*{words}"):
            read_object(tmp_path / name, ModelError)


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ModelError, match=f"is larger than {LARGEST_FILE:,} bytes"):
        read_object(tmp_path / "f", ModelError)


def test_a_path_that_cannot_be_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="null byte"):
        read_object(tmp_path / "a\0b", ModelError)
    with pytest.raises(ModelError, match="cannot be read as JSON: File name too long"):
        read_object(tmp_path / ("a" * 300), ModelError)


def test_what_real_files_have_is_read(tmp_path: Path) -> None:
    values = {"max": 2**70, "list": [1.5, True, None], "text": "Grüße 😀", "deep": {"er": {}}}
    (tmp_path / "f").write_text(json.dumps(values))
    (tmp_path / "link").symlink_to(tmp_path / "f")
    assert read_object(tmp_path / "link", ModelError) == values
    assert parse_json('{"limit": [0.0, Infinity]}', INFINITIES) == {"limit": [0.0, float("inf")]}
    with pytest.raises(ValueError, match="NaN is not a number of JSON"):
        parse_json("[NaN]", INFINITIES)
    assert parse_json("[" + "[], " * 1000 + "[]]") == [[]] * 1001


def test_deep_nesting_does_not_depend_on_how_deep_the_caller_is() -> None:
    code = (
        "from mindprint.input_files import parse_json\n"
        "def call(depth):\n"
        "    if depth: return call(depth - 1)\n"
        "    try: parse_json('[' * 5000 + ']' * 5000)\n"
        "    except ValueError as error: print(error)\n"
        "call(900)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "is nested too deeply\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("\n  first \n second"), "first"), (ValueError(""), "ValueError"), (KeyError(), "KeyError")],
)
def test_the_first_line_of_an_error_says_something(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_a_folder_in_place_of_a_file_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = os.open(tmp_path, os.O_RDONLY)
    os.close(before)
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)
    after = os.open(tmp_path, os.O_RDONLY)
    os.close(after)
    # The system gives the lowest number that is free.
    assert after == before
