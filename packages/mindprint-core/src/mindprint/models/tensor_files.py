"""Safetensors files, tensor by tensor: the header by our own few lines, and the float dtypes that files have.

The format is a length, a JSON header and bytes. NumPy has no bfloat16: its bits are handled as unsigned integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Dtype, Float32
from mindprint.input_files import MALFORMED, parse_json

FLOATS: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""The float dtypes of the format that are read here, and the NumPy dtype of their bits."""

INTEGERS: Mapping[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
}
"""The integer dtypes in which quantized weights are stored."""

FLOAT_DTYPES: Mapping[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Those that a base can be computed in, by their names in the contract."""

NAN_BF16 = 0x7FC0
"""The bits of torch's own NaN."""

LARGEST_HEADER = 100_000_000
"""The limit of the format's own reader."""


class TensorFileError(ValueError):
    """A file that is not a whole safetensors file. The message has the fault, and not the file."""


class TensorInfo(NamedTuple):
    """A tensor as a safetensors header has it; `start` and `end` are its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return a file's tensors by name, after checking that the file is as long as its header says.

    Raises `TensorFileError` for anything else than a whole safetensors file, `OSError` where it cannot be opened.
    """
    with path.open("rb") as file:
        entries, offset = _entries(file)
        length = file.seek(0, 2)
    try:
        found = {name: _info(entry, path, offset) for name, entry in entries.items() if name != "__metadata__"}
    except MALFORMED as error:
        raise TensorFileError("has a broken safetensors header") from error
    # Tensors may be in any order in the file, so the greatest end decides.
    expected = max((info.end for info in found.values()), default=offset)
    if length < expected:
        raise TensorFileError(f"is truncated ({length} of {expected} bytes)")
    _require_no_gaps(found, offset, length)
    return found


def read_float32(info: TensorInfo) -> Float32:
    """Return a tensor's values, float32. Raises `TensorFileError` for a dtype that holds no floats."""
    if info.dtype not in FLOATS:
        raise TensorFileError(f"holds {info.dtype}, no floating-point numbers")
    with info.file.open("rb") as file:
        file.seek(info.start)
        bits = np.fromfile(file, FLOATS[info.dtype], math.prod(info.shape))
    return to_float32(bits, info.dtype).reshape(info.shape)


def to_float32(bits: NDArray[Any], dtype: str) -> Float32:
    """Return values of a float dtype of the format in float32, which is exact except for F64."""
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float32)


def from_float32(values: Float32, dtype: str) -> NDArray[Any]:
    """Return the bits of float32 values in a float dtype of the format, rounded to nearest, ties to even."""
    if dtype != "BF16":
        return values.astype(FLOATS[dtype])
    bits = values.view(np.uint32)
    # Round to nearest, ties to even: add half a unit less one, and one more if the kept part is odd. Then cut.
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    # The sum above would carry a NaN's payload into its sign; torch's own NaN is this one.
    rounded[np.isnan(values)] = NAN_BF16
    return rounded


def add_float32(bits: NDArray[Any], change: Float32, dtype: str) -> None:
    """Add `change` in place to the values that `bits` are in `dtype`, rounded as by `from_float32`. Uses `change` up.

    For bfloat16 this is the same arithmetic with half the passes through memory, which is what merging spends time on.
    """
    if dtype != "BF16":
        change += to_float32(bits, dtype)
        bits[...] = from_float32(change, dtype)
        return
    scratch = np.empty(change.shape, np.uint32)
    scratch[...] = bits
    np.left_shift(scratch, 16, out=scratch)
    change += scratch.view(np.float32)
    total = change.view(np.uint32)
    np.right_shift(total, 16, out=scratch)
    scratch &= 1
    scratch += 0x7FFF
    scratch += total
    np.right_shift(scratch, 16, out=scratch)
    bits[...] = scratch
    odd = np.isnan(change)
    if odd.any():
        bits[odd] = NAN_BF16


def _require_no_gaps(tensors: Mapping[str, TensorInfo], start: int, length: int) -> None:
    """Raise unless the tensors fill the file from `start` to its end, one after the other.

    The format's own reader opens no other file, and so neither do PEFT and transformers.
    """
    at = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            fault = "overlaps the tensor before it" if info.start < at else "does not follow the tensor before it"
            raise TensorFileError(f"is not a valid safetensors file: {name} {fault}")
        at = info.end
    if length > at:
        raise TensorFileError(f"is not a valid safetensors file: {length - at} bytes follow the last tensor")


def _entries(file: BinaryIO) -> tuple[Mapping[str, Any], int]:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    # A clone without LFS leaves a small text file under the name of the weights.
    if start == b"version ":
        raise TensorFileError("is not a safetensors file but a Git LFS pointer: run `git lfs pull`")
    if len(start) < 8 or length > LARGEST_HEADER:
        raise TensorFileError("is not a safetensors file")
    text = file.read(length)
    if len(text) < length:
        raise TensorFileError(f"is truncated ({8 + len(text)} of at least {8 + length} bytes)")
    try:
        header = parse_json(text)
    except ValueError as error:
        raise TensorFileError("has a broken safetensors header") from error
    if not isinstance(header, dict):
        raise TensorFileError("has a broken safetensors header")
    return header, 8 + length


def _info(entry: Mapping[str, Any], path: Path, offset: int) -> TensorInfo:
    dtype, shape, (start, end) = entry["dtype"], tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
    bits = {**FLOATS, **INTEGERS}.get(dtype)
    if not 0 <= start <= end or (bits is not None and end - start != bits.itemsize * math.prod(shape)):
        raise ValueError(f"{dtype}{list(shape)} does not fit its bytes")
    return TensorInfo(dtype, shape, path, offset + start, offset + end)
