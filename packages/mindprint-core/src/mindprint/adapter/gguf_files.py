"""GGUF files, read and written one tensor at a time with the package `gguf`."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Float32
from mindprint.errors import AdapterError, ModelError, RunError, first_line
from mindprint.input_files import MALFORMED

INSTALL = "needs the package gguf: pip install 'mindprint-core[gguf]'"

FileType = Literal["f32", "f16", "bf16", "q8_0"]
"""The types in which weights are written here. Those of fewer bits are left to llama.cpp's own tool."""

KEPT_IN_FLOAT32 = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight")
"""Endings of the matrices that llama.cpp reads in float32 whatever the type of the file is."""


def gguf_package(purpose: str) -> ModuleType:
    """Return the package `gguf`. Raises `AdapterError` with the command that installs it where it is missing."""
    try:
        import gguf  # noqa: PLC0415 (an optional extra)
    except ModuleNotFoundError as error:
        raise AdapterError(f"{purpose} {INSTALL}") from error
    module: ModuleType = gguf
    return module


def quantization_type(type_name: FileType) -> Any:
    """Return the package's constant for a type."""
    return gguf_package("writing GGUF").GGMLQuantizationType[type_name.upper()]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file. `data` are its bytes as the file has them, in rows, and they stay on the disk."""

    name: str
    kind: Any
    shape: tuple[int, ...]
    data: NDArray[Any]

    def values(self) -> Float32:
        """Return the values, dequantized. Raises `ModelError` for a type that the package cannot dequantize."""
        quants = gguf_package("reading GGUF").quants
        try:
            values: Float32 = quants.dequantize(self.data, self.kind).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise ModelError(f"{self.name} is {self.kind.name}, which cannot be dequantized here") from error
        return values.reshape(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """A file that was opened: its tensors by name, in the order of the file, and its keys."""

    path: Path
    tensors: Mapping[str, GgufTensor]
    fields: Mapping[str, Any]

    def key(self, name: str) -> Any:
        """Return the value of a key, None where the file does not have it."""
        field = self.fields.get(name)
        return None if field is None else field.contents()

    @property
    def architecture(self) -> str:
        return str(self.key("general.architecture"))


def read_gguf(path: Path) -> GgufFile:
    """Open a GGUF file and check that it is whole.

    Raises:
        ModelError: There is no such file, it is broken, or it is one part of several.
    """
    gguf = gguf_package("reading GGUF")
    # Opened by name, a pipe would be waited for.
    if not path.is_file():
        raise ModelError(f"{path}: no such file" if not path.exists() else f"{path}: is not a file")
    try:
        reader = gguf.GGUFReader(path)
        tensors = {
            tensor.name: GgufTensor(
                tensor.name, tensor.tensor_type, tuple(map(int, reversed(tensor.shape.tolist()))), tensor.data
            )
            for tensor in reader.tensors
        }
        opened = GgufFile(path, tensors, reader.fields)
        parts = opened.key("split.count")
        architecture = opened.key("general.architecture")
    except (OSError, MemoryError, struct.error, *MALFORMED) as error:
        raise ModelError(f"{path}: is not a whole GGUF file ({first_line(error)}): download it again") from error
    if not isinstance(architecture, str):
        raise ModelError(f"{path}: does not say its architecture (general.architecture): download it again")
    if isinstance(parts, int) and parts > 1:
        raise ModelError(f"{path}: is one of {parts} parts; join them with llama-gguf-split --merge")
    return opened


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: its type and shape are known now, and its values are made when it is its turn."""

    name: str
    kind: Any
    shape: tuple[int, ...]
    data: Callable[[], NDArray[Any]]


def write_gguf(path: Path, architecture: str, keys: Callable[[Any], None], tensors: Sequence[PlannedTensor]) -> None:
    """Write a file, one tensor in memory, then read it and compare every tensor with the bytes that were made.

    Args:
        path: The new file.
        architecture: llama.cpp's name of the architecture.
        keys: A function that adds the keys to the package's writer.
        tensors: The tensors, in the order of the file.

    Raises:
        RunError: The file on the disk does not hold what was written.
    """
    gguf = gguf_package("writing GGUF")
    writer = gguf.GGUFWriter(path, architecture)
    keys(writer)
    for tensor in tensors:
        block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
        count = int(np.prod(tensor.shape, dtype=np.int64)) // block * size
        # With a dtype other than uint8 the writer takes the shape as it is given, in elements.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), count, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    digests = {}
    for tensor in tensors:
        data = np.ascontiguousarray(tensor.data())
        digests[tensor.name] = _digest(data)
        writer.write_tensor_data(data)
    writer.close()
    written = read_gguf(path)
    # The package takes tensors in the order of their headers. A mistake there would exchange weights in silence.
    wrong = [name for name, tensor in written.tensors.items() if digests.get(name) != _digest(tensor.data)]
    if wrong or len(written.tensors) != len(digests):
        raise RunError(f"{path}: {wrong[0] if wrong else 'a tensor'} is not in the file as it was written; try again")


def copy_keys(writer: Any, source: GgufFile, without: Sequence[str]) -> None:
    """Add every key of a file to a writer, with its type."""
    array = gguf_package("writing GGUF").GGUFValueType.ARRAY
    for name, field in source.fields.items():
        # The reader lists the counts of the header as keys. The writer adds the architecture itself.
        if name.startswith("GGUF.") or name == "general.architecture" or name in without:
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, sub_type=field.types[-1] if kind == array else None)


def quantized(values: Float32, kind: Any) -> NDArray[Any]:
    """Return values in a type, as llama.cpp's own quantization gives them."""
    data: NDArray[Any] = gguf_package("writing GGUF").quants.quantize(values, kind)
    return data


def rounded(values: Float32, kind: Any) -> Float32:
    """Return the values that are left of others in a type."""
    back: Float32 = gguf_package("writing GGUF").quants.dequantize(quantized(values, kind), kind)
    return back.astype(np.float32, copy=False).reshape(values.shape)


def type_for(name: str, shape: tuple[int, ...], kind: Any) -> Any:
    """Return the type of a tensor in a file of type `kind`, by the rules of llama.cpp's converter."""
    gguf = gguf_package("writing GGUF")
    types = gguf.GGMLQuantizationType
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith(KEPT_IN_FLOAT32):
        return types.F32
    # A row that is no whole number of blocks cannot be quantized.
    return types.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def bits_of(kind: Any) -> float:
    """Return the bits of a weight in a type."""
    block, size = gguf_package("reading GGUF").GGML_QUANT_SIZES[kind]
    return float(8 * size / block)


def file_type(kind: Any) -> Any:
    """Return the constant for a file whose weights are of a type."""
    types = gguf_package("writing GGUF").LlamaFileType
    return types.ALL_F32 if kind.name == "F32" else types[f"MOSTLY_{kind.name}"]


def _digest(data: NDArray[Any]) -> str:
    digest = blake2b(digest_size=16)
    for block in _blocks(data):
        digest.update(block.tobytes())
    return digest.hexdigest()


def _blocks(data: NDArray[Any]) -> Iterator[NDArray[Any]]:
    # A mapped tensor is read in pieces: in one it would be in memory twice.
    flat = data.reshape(-1)
    yield from (flat[start : start + 2**22] for start in range(0, max(len(flat), 1), 2**22))
