"""Writing the weights of a base in another form with an adapter in them: dequantized, or quantized again.

In constant memory: the files are laid out first, and then blocks of rows are read, changed and written in their place.
A dequantized weight is `W + scale · B @ A`, summed in float32 and rounded once to the dtype that W had before it was
quantized.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindprint.adapter.file_threads import FileThreads, write_at
from mindprint.adapter.weight_changes import WeightChange
from mindprint.contract import Float32
from mindprint.errors import ModelError
from mindprint.models.folder import INDEX_FILE, SINGLE_FILE, model_config
from mindprint.models.quantized import (
    QuantizedWeight,
    Scheme,
    StoredTensor,
    affine,
    quantized_weights,
    read_quantization,
    read_rows,
)
from mindprint.models.quantized.mlx_names import MlxNames, mlx_names
from mindprint.models.tensor_files import FLOATS, INTEGERS, TensorInfo, from_float32

SHARD_BYTES = 5 * 10**9
"""Bytes of a file of weights, as transformers writes them. A larger weight has a file for itself."""

BLOCK_ELEMENTS = 2**20
"""Elements that a thread reads at a time."""

SERIAL_PRODUCTS = 2**19
"""Multiplications in a product that is too small for BLAS to start threads for it."""

SECTIONS = ("quantization", "quantization_config")
"""The sections of config.json that state a quantization."""


@dataclass(frozen=True)
class _Output:
    """A tensor of the new files."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return {**FLOATS, **INTEGERS}[self.dtype].itemsize * (self.shape[-1] if self.shape else 1)

    @property
    def row_count(self) -> int:
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class _Rewritten:
    """A weight, the tensors that it becomes, and the scheme in which it is quantized again."""

    weight: StoredTensor
    outputs: tuple[_Output, ...]
    scheme: Scheme | None
    changes: Sequence[WeightChange] = ()

    @property
    def size(self) -> int:
        if self.copied is not None:
            return self.copied.end - self.copied.start
        return sum(output.row_bytes * output.row_count for output in self.outputs)

    @property
    def copied(self) -> TensorInfo | None:
        """Return the tensor if its bytes stay as they are."""
        stays = isinstance(self.weight, TensorInfo) and not self.changes and self.scheme is None
        return self.weight if stays and isinstance(self.weight, TensorInfo) else None


class RewrittenWeights:
    """The weights of a base as they are to be written: `size` in bytes is known before anything is."""

    def __init__(
        self,
        weights: Mapping[str, StoredTensor],
        changes: Mapping[str, Sequence[WeightChange]],
        grids: Mapping[str, QuantizedWeight],
    ) -> None:
        self._weights = [
            _rewritten(name, weight, changes.get(name, ()), grids.get(name)) for name, weight in weights.items()
        ]
        self._metadata = {"format": "mlx" if grids else "pt"}

    @property
    def size(self) -> int:
        return sum(weight.size for weight in self._weights)

    def write(self, folder: Path, threads: FileThreads) -> None:
        """Write the files of the weights, and their index if there is more than one."""
        shards = list(self._shards())
        count = len(shards)
        names = [SINGLE_FILE] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
        for name, members in zip(names, shards, strict=True):
            _write_shard(folder / name, members, self._metadata, threads)
        if count > 1:
            index = {
                output.name: file
                for file, members in zip(names, shards, strict=True)
                for weight in members
                for output in weight.outputs
            }
            content = {"metadata": {"total_size": self.size}, "weight_map": dict(sorted(index.items()))}
            (folder / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _shards(self) -> Iterator[list[_Rewritten]]:
        members: list[_Rewritten] = []
        filled = 0
        for weight in self._weights:
            if members and filled + weight.size > SHARD_BYTES:
                yield members
                members, filled = [], 0
            members.append(weight)
            filled += weight.size
        yield members


def grids_of(folder: Path) -> dict[str, QuantizedWeight]:
    """Return the weights whose grid a merge can be rounded onto. Raises `ModelError` for formats that are only read."""
    weights = quantized_weights(folder)
    other = next((weight for weight in weights.values() if weight.scheme.method != "affine"), None)
    if other is not None:
        raise ModelError(
            f"{folder}: is quantized as {other.scheme}, and a merge is quantized again in MLX's affine format only: "
            "merge into full precision, then quantize the result with the tool that made this base"
        )
    if not weights:
        raise ModelError(f"{folder}: is not quantized, so that there is no format to quantize the merge in")
    return weights


def rewritten_config(base: Path, grid: Path | None) -> dict[str, Any]:
    """Return the values of config.json without a quantization, or with that of the folder `grid`."""
    config = _without_sections(model_config(base))
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = _without_sections(config["text_config"])
    if grid is not None:
        stated = model_config(grid)
        config |= {name: stated[name] for name in SECTIONS if name in stated}
    return config


def layout_note(base: Path) -> str | None:
    """Return a note on a merge of a base whose tensors mlx-lm gave other names or values than transformers."""
    stated = read_quantization(base)
    if stated is None or stated.family != "mlx":
        return None
    try:
        names = mlx_names(model_config(base))
    except ModelError:
        names = None
    if names == MlxNames():
        return None
    return (
        "the merged model keeps the names and values that mlx-lm gave the base's tensors: load it with mlx-lm. For "
        "transformers, merge with --into and the model that the base was made of"
    )


def _without_sections(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in SECTIONS}


def _rewritten(
    name: str, weight: StoredTensor, changes: Sequence[WeightChange], grid: QuantizedWeight | None
) -> _Rewritten:
    if grid is None:
        return _Rewritten(weight, (_Output(name, weight.dtype, weight.shape),), None, changes)
    if grid.shape != weight.shape:
        raise ModelError(f"{grid.file}: {name} is {list(grid.shape)}, and {list(weight.shape)} in the other base")
    roles = {"weight": name, **{role: f"{name.removesuffix('.weight')}.{role}" for role in ("scales", "biases")}}
    outputs = tuple(
        _Output(stored_name, grid.parts[role].dtype, grid.parts[role].shape) for role, stored_name in roles.items()
    )
    return _Rewritten(weight, outputs, grid.scheme, changes)


def _write_shard(
    target: Path, members: Sequence[_Rewritten], metadata: Mapping[str, str], threads: FileThreads
) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    starts: list[list[int]] = []
    at = 0
    for weight in members:
        starts.append([])
        for output in weight.outputs:
            size = weight.size if weight.copied else output.row_bytes * output.row_count
            header[output.name] = {"dtype": output.dtype, "shape": output.shape, "data_offsets": [at, at + size]}
            starts[-1].append(at)
            at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        first = 8 + len(text)
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        file.truncate(first + at)
        for weight, places in zip(members, starts, strict=True):
            if (copied := weight.copied) is not None:
                with copied.file.open("rb") as source:
                    threads.copy(source.fileno(), file.fileno(), (copied.start, copied.end), first + places[0])
                    threads.wait()
                continue
            columns = weight.weight.shape[-1]
            step = max(1, BLOCK_ELEMENTS // columns)
            for row in range(0, math.prod(weight.weight.shape[:-1]), step):
                threads.do(_write_rows, file.fileno(), weight, row, row + step, [first + place for place in places])
        threads.wait()
    threads.flush(target)


def _write_rows(file: int, weight: _Rewritten, start: int, stop: int, places: Sequence[int]) -> None:
    """Write one block of rows of a weight, changed, into the tensors that it becomes."""
    stop = min(stop, math.prod(weight.weight.shape[:-1]))
    values = read_rows(weight.weight, start, stop)
    for change in weight.changes:
        _add(values, start, change)
    for output, place, bits in zip(weight.outputs, places, _stored(values, weight), strict=True):
        write_at(file, bits.tobytes(), place + start * output.row_bytes)


def _stored(values: Float32, weight: _Rewritten) -> Sequence[np.ndarray[Any, Any]]:
    """Return the bits of values in each of the tensors that they become."""
    if weight.scheme is None:
        return (from_float32(values, weight.outputs[0].dtype),)
    scheme, dtype = weight.scheme, weight.outputs[1].dtype
    packed, scales, biases = affine.quantize(values, scheme.bits, scheme.group_size, dtype)
    return packed, *(from_float32(part, dtype) for part in (scales, biases))


def _add(values: Float32, start: int, change: WeightChange) -> None:
    """Add a change in place to those of its rows that are in a block of rows from `start` on."""
    a, b = change.factors
    # Experts lie one after the other in the rows of their stack.
    first = (change.weight.expert or 0) * len(b)
    begin, end = max(start, first), min(start + len(values), first + len(b))
    inner = np.ascontiguousarray(a)
    scaled: Float32 = np.ascontiguousarray(b[begin - first : end - first]) * np.float32(change.scale)
    # Products small enough for one thread: BLAS would start threads for larger ones, which wait for ours.
    step = max(1, SERIAL_PRODUCTS // (len(inner) * inner.shape[1]))
    for row in range(0, end - begin, step):
        part = scaled[row : row + step]
        values[begin - start + row : begin - start + row + len(part)] += part @ inner
