"""Files of rows: JSON Lines, JSON arrays, CSV and Parquet, plain or compressed, and datasets on the hub.

Every mistake is named with file and line, and no file makes the reader take more memory than its rows need: a line has
a longest length, and a compressed file a greatest ratio. `datasets` is imported only for Parquet and the hub.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import importlib
import io
import json
import os
import secrets
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from mindprint.errors import DataError, first_line
from mindprint.input_files import parse_json

Record = Mapping[str, Any]

LONGEST_ROW = 2**24
"""Bytes of the longest line or object: some millions of tokens. A longer one is not a row, and fills the memory."""

FREE_BYTES, LARGEST_RATIO = 2**24, 100
"""A compressed file may unpack to the larger of these many bytes and this multiple of its own size.

Text shrinks to a third or a tenth, and rows that repeat each other to a fiftieth. Files that are made to fill a memory
(decompression bombs) shrink to a thousandth.
"""

CHUNK = 2**20
"""Bytes of a JSON array that are read at a time."""

FILE_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".zst")

_MAGIC: Mapping[bytes, str] = {
    b"\x1f\x8b": "is compressed with gzip: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed with zstandard: let its name end in .zst",
    b"PK\x03\x04": "is a zip archive: unpack it, and name the files in it",
    b"PAR1": "is a Parquet file: let its name end in .parquet",
    b"\xff\xfe": "is UTF-16 and not UTF-8: save the file as UTF-8",
    b"\xfe\xff": "is UTF-16 and not UTF-8: save the file as UTF-8",
}
"""The first bytes of files that are something else than their names say."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CURLY_QUOTES = "“”„‟‘’"


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a row: `sft.jsonl: line 3`. Parquet files and datasets count rows, quizzes questions.

    Rows from memory have their index: `rows[3]`.
    """

    file: str
    line: int
    unit: Literal["line", "row", "question", "index"] = "line"

    def __str__(self) -> str:
        if self.unit == "index":
            return f"{self.file}[{self.line}]"
        return f"{self.file}: {self.unit} {self.line}"


PlacedRecords = Iterator[tuple[Origin, Record]]


def shown_path(path: str | Path) -> str:
    """Return a path as a person at this prompt would write it."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def kind_of(value: object) -> str:
    """Return the kind of a JSON value in words."""
    # By exact type, because a boolean is also an instance of int.
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")


def is_row_file(name: str) -> bool:
    """Return whether a name has the ending of a file of rows."""
    return _kind(Path(name)) in FILE_KINDS


def file_records(path: Path) -> PlacedRecords:
    """Yield the records of a file, each with its place. Raise `DataError` for a file that cannot be read."""
    kind = _kind(path)
    if kind not in FILE_KINDS:
        known = f"{', '.join(FILE_KINDS)}, and these with {' or '.join(COMPRESSIONS)}"
        raise DataError(f"{shown_path(path)}: unknown kind of file: known are {known}")
    if kind == ".parquet":
        if path.suffix.lower() in COMPRESSIONS:
            raise DataError(f"{shown_path(path)}: Parquet is compressed already: unpack the file, and name it .parquet")
        return _parquet_records(path)
    return _csv_records(path) if kind == ".csv" else _json_records(path, kind)


@dataclass(frozen=True)
class RowSource:
    """A file or dataset of rows, not yet read. `size` is in bytes, and `digest` reads all of its content."""

    shown: str
    size: int
    digest: Callable[[], str]
    records: Callable[[], PlacedRecords]


def file_source(path: Path) -> RowSource:
    """Return a file as a source of rows."""
    return RowSource(shown_path(path), path.stat().st_size, lambda: _file_digest(path), lambda: file_records(path))


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise DataError(f"{shown_path(path)}: cannot be read: {error.strerror or first_line(error)}") from error


RETRY_PAUSES = (1.0, 4.0)
"""Seconds before a dataset is asked for again after a connection broke off. Files that have arrived are kept."""


def hub_source(repo: str, split: str, part: str) -> RowSource:
    """Return a dataset on the hub as a source of rows, downloaded. Raise `DataError` if it cannot be loaded."""
    import datasets  # noqa: PLC0415 (a second to import, and most data needs none of it)

    for pause in (*RETRY_PAUSES, None):
        try:
            rows = datasets.load_dataset(repo, split=split)
            break
        except Exception as error:  # datasets, huggingface_hub, httpx and fsspec each raise their own errors
            if pause is not None and _broke_off(error):
                time.sleep(pause)
                continue
            raise DataError(
                f"dataset {repo} (split {split}) of data.{part} is not a file here and could not be loaded from the "
                f"hub: {first_line(error)}"
            ) from error
    name = f"{repo}:{split}"
    # A digest of the dataset's files and of how they were read. What has none is never taken for something else.
    fingerprint = getattr(rows, "_fingerprint", None) or secrets.token_hex(16)
    size = getattr(rows, "dataset_size", None) or 0
    return RowSource(
        name,
        size,
        lambda: fingerprint,
        lambda: ((Origin(name, number, "row"), record) for number, record in enumerate(rows, 1)),
    )


def _broke_off(error: Exception) -> bool:
    """Return whether a later attempt may succeed: the connection failed, and not for want of one."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 8:
        chain.append(cause)
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    names = ("RemoteProtocolError", "ReadError", "ReadTimeout", "ConnectTimeout", "ChunkedEncodingError",
             "IncompleteRead", "ClientPayloadError")  # fmt: skip
    return not offline and any(
        isinstance(link, ConnectionResetError | TimeoutError) or type(link).__name__ in names for link in chain
    )


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


class Readable(Protocol):
    """A stream that can be read."""

    def read(self, size: int = -1, /) -> bytes:
        """Read at most `size` bytes, nothing at the end."""


class _Decompressed(io.RawIOBase):
    """The content of a compressed file, up to a limit that its own size sets."""

    def __init__(self, content: Readable, size: int, shown: str) -> None:
        self._content = content
        self._left = max(FREE_BYTES, LARGEST_RATIO * size)
        self._shown = shown

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        read = self._content.read(len(buffer))
        self._left -= len(read)
        if self._left < 0:
            raise DataError(
                f"{self._shown}: unpacks to more than {LARGEST_RATIO} times its size, as no file of texts does: "
                "unpack it yourself if you trust it"
            )
        buffer[: len(read)] = read
        return len(read)


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file to read its content, decompressed where its name says so. Raise `DataError` if that fails."""
    shown = shown_path(path)
    try:
        with path.open("rb") as file:
            unpack = _UNPACK.get(path.suffix.lower())
            if unpack is None:
                yield file
            else:
                yield io.BufferedReader(_Decompressed(unpack(file, shown), path.stat().st_size, shown))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{shown}: cannot be unpacked: {first_line(error)}: is it damaged, or cut off?") from error
    except OSError as error:
        raise DataError(f"{shown}: cannot be read: {error.strerror or first_line(error)}") from error


def _gunzipped(file: IO[bytes], shown: str) -> Readable:  # noqa: ARG001
    return gzip.GzipFile(fileobj=file)


def _unzstandard(file: IO[bytes], shown: str) -> Readable:
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        raise DataError(f"{shown}: needs zstandard to be read: pip install zstandard, or unpack it: zstd -d") from None
    reader: Readable = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return _Errors(reader, zstandard.ZstdError)


class _Errors:
    """A stream whose own kind of error is raised as `EOFError`, as gzip does for a file that is cut off."""

    def __init__(self, stream: Readable, error: type[Exception]) -> None:
        self._stream = stream
        self._error = error

    def read(self, size: int = -1, /) -> bytes:
        """Read at most `size` bytes."""
        try:
            return self._stream.read(size)
        except self._error as error:
            raise EOFError(str(error)) from error


_UNPACK: Mapping[str, Callable[[IO[bytes], str], Readable]] = {".gz": _gunzipped, ".zst": _unzstandard}


def _json_records(path: Path, kind: str) -> PlacedRecords:
    shown = shown_path(path)
    with _opened(path) as file:
        start = file.peek(4)
        for magic, words in _MAGIC.items():
            if start.startswith(magic):
                raise DataError(f"{shown}: {words}")
        # Only `.json` can be an array: the other endings promise one object a line.
        if kind == ".json" and file.peek(CHUNK).removeprefix(_BYTE_ORDER_MARK).lstrip()[:1] == b"[":
            yield from _Array(file, shown).records()
            return
        for number, line in enumerate(_lines(file, shown), 1):
            # Some editors begin a UTF-8 file with a byte order mark, which JSON does not allow.
            content = line.removeprefix(_BYTE_ORDER_MARK)
            if content.strip():
                origin = Origin(shown, number)
                yield origin, _line_object(content, origin)


def _lines(file: IO[bytes], shown: str) -> Iterator[bytes]:
    number = 0
    while line := file.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW:
            raise DataError(_too_long(Origin(shown, number)))
        yield line


def _too_long(origin: Origin) -> str:
    return f"{origin}: is longer than {LONGEST_ROW // 2**20} MB: a row is one text or conversation, not a whole file"


def _line_object(line: bytes, origin: Origin) -> Record:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: is not UTF-8 (byte {error.start + 1}): save the file as UTF-8") from None
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        advice = _advice(text, error.pos, error.msg, Path(origin.file))
        raise DataError(f"{origin}: not valid JSON: {error.msg} at column {error.pos + 1}{advice}") from None
    except ValueError as error:
        raise DataError(f"{origin}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{origin}: must be an object {{...}}, found {kind_of(value)}{_array_advice(text)}")
    return value


def _array_advice(text: str) -> str:
    array = text.lstrip().startswith("[")
    return ": one object a line, without an array around them (or let the file's name end in .json)" if array else ""


def _advice(text: str, at: int, message: str, path: Path) -> str:
    """Return how to fix text that is not JSON: the mistakes that people make, told by what is at the place."""
    start, rest = text.lstrip()[:1], text[at:].strip()
    # Python 3.13 points at the comma itself, and earlier versions behind it.
    comma = text[:at].rstrip().endswith(",") or rest[:1] == ","
    behind_comma = rest.lstrip(", \t\r\n")[:1]
    # A curly quote inside a string is text. Where a string should begin or end it is a mistake.
    curly = rest[:1] in tuple(_CURLY_QUOTES) or (
        any(quote in text for quote in _CURLY_QUOTES) and ("delimiter" in message or "Unterminated" in message)
    )
    unended = (
        ": the object does not end in this line: write each object on one line "
        f"(`jq -c . {path.name}` does), or is the file cut off?"
    )
    # The first that holds is said.
    mistakes = (
        (start == "[", _array_advice(text)),
        (comma and behind_comma in tuple("}]"), ": remove the comma before the closing bracket"),
        (message == "Extra data", _extra_advice(rest)),
        (curly, ": curly quotes (“ ”), as word processors write them, do not quote in JSON: write straight ones"),
        (rest[:1] == "'", ": strings have double quotes in JSON, and this is Python's form: write it with json.dumps"),
        (rest.startswith(("None", "True", "False")), ": JSON has null, true and false: write it with json.dumps"),
        (
            start not in tuple('{"') and any(sign in text for sign in ",;\t"),
            f": is it CSV? Then let the name end in .csv (not {path.suffix})",
        ),
        (start == "{" and not rest, unended),
        ("Unterminated" in message, ': does a quote in the text lack its backslash (\\"), or is the file cut off?'),
    )
    return next((advice for applies, advice in mistakes if applies), "")


def _extra_advice(rest: str) -> str:
    if rest[:1] == ",":
        return ": remove the comma behind the object: each line holds one object, and nothing else"
    return ": write each object on a line by itself" if rest[:1] == "{" else ""


class _Array:
    """A JSON array of objects, read piece by piece: `_text[_at:]` has been read and not yet been parsed."""

    def __init__(self, file: IO[bytes], shown: str) -> None:
        self._file = file
        self._shown = shown
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._line = "", 0, 1

    def records(self) -> PlacedRecords:
        """Yield the objects of the array, each with the line that it begins in."""
        self._expect("[")
        if self._next_sign() == "]":
            self._at += 1
        else:
            while True:
                yield self._record()
                sign = self._expect(",]")
                if sign == "]":
                    break
                if self._next_sign() == "]":
                    raise DataError(f"{self._origin()}: not valid JSON: remove the comma before the closing bracket")
        if self._next_sign():
            raise DataError(f"{self._origin()}: not valid JSON: there is more behind the array's closing bracket")

    def _origin(self) -> Origin:
        return Origin(self._shown, self._line)

    def _record(self) -> tuple[Origin, Record]:
        self._next_sign()
        origin = self._origin()
        scan = json.JSONDecoder().raw_decode
        while True:
            try:
                value, end = scan(self._text, self._at)
                break
            except json.JSONDecodeError as error:
                # Whether the object is wrong or has not been read to its end can only be told by reading on.
                if len(self._text) - self._at > LONGEST_ROW:
                    raise DataError(_too_long(origin)) from None
                if not self._more():
                    raise self._error(error) from None
            except RecursionError:
                raise DataError(f"{origin}: cannot be read as JSON: is nested too deeply") from None
        if not isinstance(value, dict):
            raise DataError(f"{origin}: must be an object {{...}}, found {kind_of(value)}")
        text = self._text[self._at : end]
        self._pass(end)
        try:
            # Again, with the checks that every JSON of somebody else's gets: keys that are there twice, and so on.
            record: Record = parse_json(text)
        except ValueError as error:
            raise DataError(f"{origin}: cannot be read as JSON: {error}") from None
        return origin, record

    def _error(self, error: json.JSONDecodeError) -> DataError:
        # The scanner was called with the text from `_at` on, and it may have been refilled since.
        try:
            json.JSONDecoder().raw_decode(self._text, self._at)
        except json.JSONDecodeError as last:
            error = last
        line = self._line + self._text.count("\n", self._at, error.pos)
        column = error.pos - self._text.rfind("\n", 0, error.pos)
        text, at = self._text[self._at :], error.pos - self._at
        advice = _advice(text, at, error.msg, Path(self._shown)) if text[at:].strip() else ": is the file cut off?"
        return DataError(f"{Origin(self._shown, line)}: not valid JSON: {error.msg} at column {column}{advice}")

    def _expect(self, signs: str) -> str:
        sign = self._next_sign()
        if not sign or sign not in signs:
            wanted = " or ".join(signs)
            found = repr(sign) if sign else "the end of the file"
            raise DataError(f"{self._origin()}: not valid JSON: expected {wanted}, found {found}")
        self._at += 1
        return sign

    def _next_sign(self) -> str:
        """Skip white space, and return the sign behind it; nothing at the end of the file."""
        while True:
            end = self._at
            while end < len(self._text) and self._text[end] in " \t\r\n":
                end += 1
            self._pass(end)
            if end < len(self._text):
                return self._text[end]
            if not self._more():
                return ""

    def _pass(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _more(self) -> bool:
        """Read a further piece. Return False at the end of the file."""
        piece = self._file.read(CHUNK)
        try:
            text = self._decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n", self._at) + piece.count(b"\n", 0, max(0, error.start))
            raise DataError(f"{Origin(self._shown, line)}: is not UTF-8: save the file as UTF-8") from None
        # What has been parsed is dropped only here: dropping it after each object would copy the rest each time.
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(piece)


def _csv_records(path: Path) -> PlacedRecords:
    """Read CSV with a header line. Every cell is text (`007` and `NA` do not change), an empty cell a missing field."""
    shown = shown_path(path)
    # A letter can be longer than the 128 KiB that the csv module allows, and the limit is global.
    before = csv.field_size_limit(LONGEST_ROW)
    try:
        # `newline=""` leaves line ends as they are: the csv module tells those in cells from those between rows.
        with _opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(_text_lines(lines, shown), strict=True)
            _check_header(reader.fieldnames or (), shown)
            for record in reader:
                # `line_num` counts the lines read so far. A record with line breaks in its cells began that many lines
                # earlier.
                within = sum(cell.count("\n") for cell in record.values() if isinstance(cell, str))
                origin = Origin(shown, reader.line_num - within)
                yield origin, _csv_record(record, origin)
    except UnicodeDecodeError:
        raise DataError(f"{shown}: line {_undecodable_line(path)}: is not UTF-8: save the file as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{shown}: line {reader.line_num + 1}: is not valid CSV: {error}") from None
    finally:
        csv.field_size_limit(before)


def _text_lines(lines: IO[str], shown: str) -> Iterator[str]:
    number = 0
    while line := lines.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW:
            raise DataError(_too_long(Origin(shown, number)))
        yield line


def _check_header(names: Any, shown: str) -> None:
    """Refuse a first line that is not a header of a CSV file with commas."""
    if names and names[0].lstrip().startswith(("{", "[")):
        raise DataError(f"{shown}: line 1: is not CSV but JSON: let the name end in .jsonl, or .json for an array")
    if len(names) == 1:
        for separator, name in ((";", "semicolons"), ("\t", "tabs")):
            if separator in names[0]:
                raise DataError(f"{shown}: line 1: the columns are separated by {name}: save the file with commas")


def _undecodable_line(path: Path) -> int:
    """Find the line of a decoding error. Text is decoded in blocks, so the error itself does not know it."""
    with _opened(path) as lines:
        # Within bounds here too: the damage may be in a line that has no end.
        bounded = enumerate(_lines(lines, shown_path(path)), 1)
        return next(number for number, line in bounded if line != line.decode(errors="ignore").encode())


def _csv_record(record: dict[str | Any, Any], origin: Origin) -> Record:
    # DictReader collects the cells that have no column under None.
    if None in record:
        raise DataError(f"{origin}: has more cells than the header has columns: quote cells that hold a comma")
    return {name: cell for name, cell in record.items() if cell}


def _parquet_records(path: Path) -> PlacedRecords:
    import datasets  # noqa: PLC0415 (a second to import, and most data needs none of it)

    shown = shown_path(path)
    try:
        # Streamed: a row is checked as it is read, and a mistake stops before the rest is loaded.
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, record in enumerate(rows, 1):
            yield Origin(shown, number, "row"), record
    except Exception as error:  # datasets, pyarrow and fsspec each raise their own errors
        raise DataError(f"{shown}: cannot be read as Parquet: {first_line(error)}") from error
