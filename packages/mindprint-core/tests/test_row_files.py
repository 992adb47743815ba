"""Files of rows as people have them: arrays, compressed files, and what is wrong with the others, and where."""

from __future__ import annotations

import gzip
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mindprint.config import make_config
from mindprint.data import row_files
from mindprint.data.row_files import file_records
from mindprint.data.rows import read_rows
from mindprint.errors import DataError

ROWS = [{"prompt": f"Hi {number}", "completion": "Yo"} for number in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def records(path: Path) -> list[tuple[int, Any]]:
    return [(origin.line, record) for origin, record in file_records(path)]


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        records(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(str(path))


@pytest.mark.parametrize("chunk", [1, 7, row_files.CHUNK])
def test_a_json_array_is_read_piece_by_piece(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "CHUNK", chunk)
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=1).encode() + b"\n\n")
    # Each object of two fields takes four lines, behind an empty line and the bracket.
    assert records(path) == [(3 + 4 * number, row) for number, row in enumerate(ROWS)]
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    assert records(path) == [(1, row) for row in ROWS]
    path.write_text(" [ ] ", encoding="utf-8")
    assert records(path) == []


def test_a_json_file_can_hold_lines_too(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(LINES)
    assert records(tmp_path / "rows.json") == list(enumerate(ROWS, 1))


def test_compressed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(LINES))
    assert records(path) == list(enumerate(ROWS, 1))
    table = tmp_path / "rows.csv.gz"
    table.write_bytes(gzip.compress(b"prompt,completion\nHi,Yo\n"))
    assert records(table) == [(2, {"prompt": "Hi", "completion": "Yo"})]
    path.write_bytes(gzip.compress(LINES)[:-10])
    assert re.match(": cannot be unpacked: .*: is it damaged, or cut off", refused(path))
    path.write_bytes(LINES)
    assert re.match(": cannot be unpacked: ", refused(path))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "rows.jsonl.zst").write_bytes(b"")
    assert refused(tmp_path / "rows.jsonl.zst") == (
        ": needs zstandard to be read: pip install zstandard, or unpack it: zstd -d"
    )


def test_zstandard_reads_through_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the library where it is installed, else against a stand-in with its names."""
    path = tmp_path / "rows.jsonl.zst"
    try:
        import zstandard

        path.write_bytes(zstandard.ZstdCompressor().compress(LINES))
    except ImportError:
        opened = types.SimpleNamespace(stream_reader=lambda file, read_across_frames: file)
        library = types.SimpleNamespace(ZstdDecompressor=lambda: opened, ZstdError=RuntimeError)
        monkeypatch.setitem(sys.modules, "zstandard", library)
        path.write_bytes(LINES)
    assert records(path) == list(enumerate(ROWS, 1))


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(LINES[:37] * 2**19, 9))
    assert refused(path) == (
        ": unpacks to more than 100 times its size, as no file of texts does: unpack it yourself if you trust it"
    )


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_line_without_end_is_refused_with_the_name_of_the_file(tmp_path: Path, name: str) -> None:
    """A sparse file of 4 GB: the reader must not hold more than its longest line."""
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**32)
    assert refused(tmp_path / name).startswith(": line 1: is longer than 16 MB: ")
    if name == "rows.json":
        with (tmp_path / name).open("r+b") as file:
            file.write(b'[{"prompt": "Hi", "completion": "')
        assert refused(tmp_path / name).startswith(": line 1: ")


def test_rows_that_fill_the_memory_name_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    config = make_config({"data": {"sft": "rows.jsonl"}, "dpo": {"enabled": False}}, tmp_path)

    def fill(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("mindprint.data.rows.sft_row", fill)
    with pytest.raises(DataError, match=r"rows.jsonl: needs more memory than there is: split it"):
        read_rows(config)


CURLY = "curly quotes"
PRETTY = json.dumps(ROWS[0], indent=2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{“prompt”: “Hi”, “completion”: “Yo”}", f": line 1: not valid JSON: .*: {CURLY}"),
        ("a.jsonl", '{"prompt": "Hi", "completion": “Yo”}', f": line 1: .*: {CURLY}"),
        ("a.jsonl", '{"prompt": "Hi", "completion": "Yo”}', f": line 1: .*: {CURLY}"),
        ("a.jsonl", '\n{"prompt": "Hi", "completion": "Yo",}', ": line 2: .*: remove the comma before the closing"),
        ("a.jsonl", '{"prompt": "Hi", "completion": "Yo"},\n{}', ": line 1: .*: remove the comma behind the object"),
        ("a.jsonl", '{"prompt": "Hi"} {"prompt": "Hi"}', ": line 1: .*: write each object on a line by itself"),
        ("a.jsonl", "{'prompt': 'Hi'}", ": line 1: .*: strings have double quotes in JSON"),
        ("a.jsonl", '{"prompt": "Hi", "completion": None}', ": line 1: .*: JSON has null, true and false"),
        ("a.jsonl", "prompt,completion\nHi,Yo", ": line 1: .*: is it CSV. Then let the name end in .csv"),
        ("a.jsonl", PRETTY, r": line 1: .*: the object does not end in this line: .*`jq -c . a.jsonl`"),
        ("a.json", PRETTY, ": line 1: .*: the object does not end in this line"),
        ("a.jsonl", "[\n{}]", r": line 1: .*: one object a line, without an array .*\.json"),
        ("a.json", '[{"prompt": "Hi"},\n{"prompt": "Ho",}]', ": line 2: .*: remove the comma before the closing"),
        ("a.json", '[{"prompt": "Hi"},\n]', ": line 2: .*: remove the comma before the closing bracket"),
        ("a.json", '[{"prompt": "Hi"}\n{"prompt": "Ho"}]', r": line 2: not valid JSON: expected , or \], found '{'"),
        ("a.json", '[{"prompt": "Hi"},\n{"prompt": "H', ": line 2: .*or is the file cut off"),
        ("a.json", '[{"prompt": "Hi"},\n{"prompt": "H",', ": line 2: .*: is the file cut off"),
        ("a.json", '[{"prompt": "Hi"}', ": line 1: .*found the end of the file"),
        ("a.json", '[\n\n{“prompt”: "Hi"}]', f": line 3: .*: {CURLY}"),
        ("a.json", "[1]", ": line 1: must be an object {...}, found a number"),
        ("a.json", '[{"a": 1, "a": 2}]', ": line 1: cannot be read as JSON: the key 'a' is there twice"),
        ("a.json", "[" * 100_000, ": line 1: cannot be read as JSON: is nested too deeply"),
        ("a.json", "[] x", ": line 1: .*there is more behind the array"),
        ("a.csv", '{"prompt": "Hi"}\n', ": line 1: is not CSV but JSON: let the name end in .jsonl"),
        ("a.csv", "prompt;completion\nHi;Yo\n", ": line 1: the columns are separated by semicolons: save"),
        ("a.jsonl", "\x1f\x8b", ": is compressed with gzip: let its name end in .gz"),
        ("a.jsonl", "\xff\xfe{\0", ": is UTF-16 and not UTF-8: save the file as UTF-8"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_and_where(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1" if content[0] in "\x1f\xff" else "utf-8"))
    assert re.match(message, refused(path)), refused(path)


def test_a_byte_order_mark_is_skipped_wherever_files_were_joined(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + LINES + mark + LINES)
    assert [record for _, record in records(tmp_path / "a.jsonl")] == ROWS * 2


def test_a_link_to_a_device_is_refused_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to("/dev/zero")
    config = make_config({"data": {"sft": "rows.jsonl"}, "dpo": {"enabled": False}}, tmp_path)
    with pytest.raises(DataError, match=r"^rows.jsonl: is not a regular file \(data.sft\)"):
        read_rows(config)
