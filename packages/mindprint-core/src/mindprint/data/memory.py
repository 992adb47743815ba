"""Rows from memory: checked like those of a file, and known by a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from mindprint.data.row_files import Record, kind_of
from mindprint.errors import DataError


def check_records(rows: Iterable[Record]) -> tuple[dict[str, Any], ...]:
    """Take rows from a list of dicts, a `datasets.Dataset`, or anything else that yields mappings.

    Raises `DataError` for a collection that is something else, and for a row that is not a mapping.
    """
    if isinstance(rows, Mapping):  # a DatasetDict, or one row alone
        raise DataError(
            f"rows: must be a list of dicts or a Dataset, found a mapping with {', '.join(map(repr, rows))}"
        )
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a data frame yields its column names
        raise DataError('rows: must be a list of dicts or a Dataset; of a data frame, pass frame.to_dict("records")')
    records = []
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"rows[{index}]: must be a dict, found {kind_of(row)}")
        records.append(dict(row))
    if not records:
        raise DataError("rows: is empty")
    return tuple(records)


def records_digest(records: Iterable[Record]) -> str:
    """Return a digest of rows and their order. Fields without a value do not count, nor does the order of fields."""
    digest = hashlib.blake2b(digest_size=16)
    for record in records:
        given = {str(name): value for name, value in record.items() if value is not None}
        # `default` serves values that no reader takes (dates, arrays): the reader names them when it checks the row.
        digest.update(json.dumps(given, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
