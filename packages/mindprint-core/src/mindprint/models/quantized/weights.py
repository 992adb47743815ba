"""Quantized weights in a base's files: which tensors belong to each, whether they fit, and their values.

Everything that a header can tell is checked when the weights are listed. Values are read block by block of rows, so
that memory does not grow with a weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import Float32
from mindprint.errors import ModelError
from mindprint.input_files import MALFORMED
from mindprint.models.folder import model_config, tensors
from mindprint.models.quantized import affine, bitsandbytes, microscaled
from mindprint.models.quantized.scheme import Quantization, Scheme, read_quantization
from mindprint.models.tensor_files import FLOATS, INTEGERS, TensorFileError, TensorInfo, to_float32

BLOCK_ELEMENTS = 2**20
"""Elements of a block that `QuantizedWeight.blocks` reads at a time."""

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in few bits, and everything that is needed to read it.

    Args:
        name: The name that the weight has in full precision, such as `model.layers.0.self_attn.q_proj.weight`.
        shape: Its shape in full precision: `[out, in]`, or `[experts, out, in]` for stacked experts.
        scheme: The format, and its sizes for this weight.
        dtype: The dtype of the weight before it was quantized, as safetensors writes it (`BF16`). Values are rounded to
            it once where a weight of 16 bits is asked for.
        parts: The tensors that it consists of, by their role: `weight`, `scales`, `biases` and `global_scale` for MLX's
            formats, `weight`, `absmax`, `quant_map`, `nested_absmax`, `nested_quant_map` and `state` for NF4 and FP4,
            `weight`, `SCB` and perhaps `weight_format` for int8.
        state: Facts that are stored as numbers in a file: `nested_blocksize` and `nested_offset`.
    """

    name: str
    shape: tuple[int, ...]
    scheme: Scheme
    dtype: str
    parts: Mapping[str, TensorInfo]
    state: Mapping[str, float] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """The file that has the packed elements."""
        return self.parts["weight"].file

    @property
    def row_count(self) -> int:
        """The number of rows, those of all experts together."""
        return math.prod(self.shape[:-1])

    @property
    def stored_bytes(self) -> int:
        """The bytes that it takes in the files, scales included."""
        return sum(info.end - info.start for info in self.parts.values())

    def rows(self, start: int, stop: int) -> Float32:
        """Return the values of rows `start` to `stop`, float32 `[stop - start, in]`. Experts follow one another.

        Raises `ModelError` for a scale that is NaN or infinite.
        """
        stop = min(stop, self.row_count)
        with np.errstate(invalid="ignore"):
            if self.scheme.method == "affine":
                return self._affine_rows(start, stop)
            if self.scheme.method in microscaled.GROUP_SIZES:
                return self._microscaled_rows(start, stop)
            if self.scheme.method == "int8":
                scales = self._scales("SCB", start, stop)
                return bitsandbytes.dequantize_int8(self._read("weight", start, stop), scales)
            return self._4bit_rows(start, stop)

    def expert(self, number: int) -> QuantizedWeight:
        """Return one matrix of a stack of experts."""
        shapes = {role: info.shape for role, info in self.parts.items()}
        # A scale of the whole stack is not cut: it has no row for each expert.
        parts = {
            role: _slice(info, number) if shapes[role][:1] == self.shape[:1] else info
            for role, info in self.parts.items()
        }
        return replace(self, name=f"{self.name}[{number}]", shape=self.shape[1:], parts=parts)

    def blocks(self, elements: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, Float32]]:
        """Yield the whole weight as blocks of rows, each with the number of its first row."""
        step = max(1, elements // self.shape[-1])
        for start in range(0, self.row_count, step):
            yield start, self.rows(start, start + step)

    def values(self) -> Float32:
        """Return the whole weight, float32. This takes eight times the memory of 4-bit elements, and more."""
        return self.rows(0, self.row_count).reshape(self.shape)

    def _affine_rows(self, start: int, stop: int) -> Float32:
        scales, biases = (self._scales(part, start, stop) for part in ("scales", "biases"))
        packed = self._read("weight", start, stop)
        return affine.dequantize(packed, scales, biases, self.scheme.bits, self.scheme.group_size)

    def _microscaled_rows(self, start: int, stop: int) -> Float32:
        method = cast("microscaled.Microscaled", self.scheme.method)
        codes = self._read("scales", start, stop)
        # A scale of the whole tensor, or one for each expert.
        factor: Any = None
        if "global_scale" in self.parts:
            every = self._whole("global_scale").reshape(-1)
            factor = np.repeat(every, self.row_count // every.size)[start:stop, None]
        scales = microscaled.scales_of(codes, method, factor)
        self._require_finite(scales, "scales", start)
        return microscaled.dequantize(self._read("weight", start, stop), scales, method)

    def _4bit_rows(self, start: int, stop: int) -> Float32:
        size, columns = self.scheme.group_size, self.shape[-1]
        first, last = start * columns, stop * columns
        # Rows may begin in the middle of a block. Reading starts at the block, which is a whole number of bytes.
        begin = first // size * size
        blocks = begin // size, -(-last // size)
        absmax = self._flat("absmax", *blocks)
        if self.scheme.double:
            nested, code = self._whole("nested_absmax"), self._whole("nested_quant_map")
            offset, nested_size = self.state["nested_offset"], int(self.state["nested_blocksize"])
            scales = bitsandbytes.block_scales(absmax, nested, code, offset, nested_size, blocks[0])
        else:
            scales = to_float32(absmax, self.parts["absmax"].dtype)
        self._require_finite(scales, "absmax", start)
        packed = self._bytes("weight", begin // 2, -(-last // 2))
        values = bitsandbytes.dequantize_4bit(packed, self._whole("quant_map"), scales, size, 0)
        return values[first - begin : last - begin].reshape(stop - start, columns)

    def _scales(self, part: str, start: int, stop: int) -> Float32:
        scales = to_float32(self._read(part, start, stop), self.parts[part].dtype)
        self._require_finite(scales, part, start)
        return scales

    def _require_finite(self, scales: Float32, part: str, start: int) -> None:
        if not np.isfinite(scales).all():
            row = start + int(np.argwhere(~np.isfinite(scales))[0][0]) if scales.ndim > 1 else start
            raise ModelError(
                f"{self.parts[part].file}: {_stored_name(self, part)} holds values that are NaN or infinite (near row "
                f"{row}): download the model again"
            )

    def _read(self, part: str, start: int, stop: int) -> NDArray[Any]:
        """Return rows of a part as its file has them, with the leading dimensions of experts flattened."""
        shape = self.parts[part].shape
        width = 1 if len(shape) == len(self.shape) - 1 else shape[-1]
        flat = self._flat(part, start * width, stop * width)
        return flat if len(shape) == len(self.shape) - 1 else flat.reshape(stop - start, width)

    def _flat(self, part: str, start: int, stop: int) -> NDArray[Any]:
        kind = _KINDS[self.parts[part].dtype]
        return self._bytes(part, start * kind.itemsize, stop * kind.itemsize).view(kind)

    def _whole(self, part: str) -> Float32:
        """Return a small part in whole, float32."""
        cached: Float32 | None = self._small.get(part)
        if cached is None:
            info = self.parts[part]
            cached = self._small[part] = to_float32(self._flat(part, 0, math.prod(info.shape)), info.dtype)
            self._require_finite(cached, part, 0)
        return cached

    def _bytes(self, part: str, start: int, stop: int) -> NDArray[np.uint8]:
        info = self.parts[part]
        with info.file.open("rb") as file:
            file.seek(info.start + start)
            content = np.fromfile(file, np.uint8, stop - start)
        if content.size < stop - start:
            raise ModelError(f"{info.file}: became shorter while it was read")
        return content

    @cached_property
    def _small(self) -> dict[str, Float32]:
        return {}


_KINDS: Mapping[str, np.dtype[Any]] = {**FLOATS, **INTEGERS}


StoredTensor = TensorInfo | QuantizedWeight
"""A weight as a base's files have it."""


def _slice(info: TensorInfo, number: int) -> TensorInfo:
    size = (info.end - info.start) // info.shape[0]
    start = info.start + number * size
    return info._replace(shape=info.shape[1:], start=start, end=start + size)


def read_rows(weight: StoredTensor, start: int, stop: int) -> Float32:
    """Return rows of a weight in float32, `[stop - start, columns]`. The rows of a stack's matrices follow one another.

    Raises `TensorFileError` for a dtype that holds no floats, and `ModelError` for scales that are not finite.
    """
    if isinstance(weight, QuantizedWeight):
        return weight.rows(start, stop)
    if weight.dtype not in FLOATS:
        raise TensorFileError(f"holds {weight.dtype}, no floating-point numbers")
    columns, kind = weight.shape[-1] if weight.shape else 1, FLOATS[weight.dtype]
    with weight.file.open("rb") as file:
        file.seek(weight.start + start * columns * kind.itemsize)
        bits = np.fromfile(file, kind, (stop - start) * columns)
    return to_float32(bits, weight.dtype).reshape(-1, columns)


def quantized_weights(folder: Path) -> dict[str, QuantizedWeight]:
    """Return the quantized weights of a base by the name that each has in full precision. Empty for full precision.

    Raises `ModelError` where config.json and tensors do not fit each other: an unknown format, a shape that does not
    fit bits and group size, scales that are missing or of another length, packed tensors without a section.
    """
    return _quantized(folder, tensors(folder))


def dense_weights(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a base by its name in full precision, a quantized weight in place of its parts."""
    stored = tensors(folder)
    found = _quantized(folder, stored)
    parts = {info for weight in found.values() for info in weight.parts.values()}
    # In the order of the files, so that a copy has the order of the original.
    return {name: found.get(name, info) for name, info in stored.items() if name in found or info not in parts}


def load_dense(folder: str | Path) -> dict[str, Float32]:
    """Return every weight of a base in float32, dequantized: for a backend that computes with no packed weights."""
    return {
        name: read_rows(weight, 0, math.prod(weight.shape[:-1])).reshape(weight.shape)
        for name, weight in dense_weights(Path(folder)).items()
    }


def _quantized(folder: Path, stored: Mapping[str, TensorInfo]) -> dict[str, QuantizedWeight]:
    stated = read_quantization(folder)
    if stated is None:
        _refuse_unstated(stored)
        return {}
    found = _of_mlx(folder, stated, stored) if stated.family == "mlx" else _of_bitsandbytes(folder, stated, stored)
    if not found:
        raise ModelError(
            f"{folder / 'config.json'}: states a quantization ({stated}), and no tensor is quantized: remove the "
            "section, or download the model again"
        )
    return found


def _of_mlx(folder: Path, stated: Quantization, stored: Mapping[str, TensorInfo]) -> dict[str, QuantizedWeight]:
    found = {}
    for name, info in stored.items():
        module = name.removesuffix(".scales")
        if module != name:
            if f"{module}.weight" not in stored:
                raise ModelError(f"{info.file}: {name} are the scales of no weight: download the model again")
            scheme = stated.scheme_of(module)
            if scheme is None:
                raise ModelError(f"{_section(folder)}: states {module} as not quantized, and the files have its scales")
            found[f"{module}.weight"] = _mlx_weight(folder, module, scheme, stored)
        elif (
            name.endswith(".weight") and info.dtype == "U32" and f"{name.removesuffix('.weight')}.scales" not in stored
        ):
            raise ModelError(f"{info.file}: {name} is packed and has no scales: download the model again")
    for module, scheme in stated.overrides.items():
        if scheme and f"{module}.weight" in stored and f"{module}.weight" not in found:
            raise ModelError(f"{_section(folder)}: states {module} as {scheme}, and its weight is not quantized")
    return found


def _mlx_weight(folder: Path, module: str, scheme: Scheme, stored: Mapping[str, TensorInfo]) -> QuantizedWeight:
    roles = ("weight", "scales", "biases", "global_scale")
    parts = {role: stored[f"{module}.{role}"] for role in roles if f"{module}.{role}" in stored}
    weight, scales = parts["weight"], parts["scales"]
    if weight.dtype != "U32" or len(weight.shape) < 2:
        raise ModelError(
            f"{weight.file}: {module}.weight has scales, and is {weight.dtype}{list(weight.shape)} where packed "
            f"elements are U32: {_section(folder)} and tensors do not fit"
        )
    if scheme.method == "affine":
        _require_affine(module, parts)
    else:
        _require_microscaled(module, scheme, parts)
    columns, rest = divmod(weight.shape[-1] * 32, scheme.bits)
    if rest or scales.shape[:-1] != weight.shape[:-1] or scales.shape[-1] * scheme.group_size != columns:
        raise ModelError(
            f"{weight.file}: {module}.weight {list(weight.shape)} with scales {list(scales.shape)} does not fit "
            f"{scheme} (expected scales {[*weight.shape[:-1], columns // scheme.group_size]}): the quantization in "
            f"{folder / 'config.json'} is of another model, or a file is"
        )
    # The microscaled formats do not say what they were made of. mlx computes with them in bfloat16.
    dtype = scales.dtype if scheme.method == "affine" else _configured_dtype(folder)
    return QuantizedWeight(f"{module}.weight", (*weight.shape[:-1], columns), scheme, dtype, parts)


def _require_affine(module: str, parts: Mapping[str, TensorInfo]) -> None:
    scales, biases = parts["scales"], parts.get("biases")
    if biases is None:
        raise ModelError(f"{scales.file}: {module} has scales and no biases, which the affine format needs")
    for role, info in (("scales", scales), ("biases", biases)):
        if info.dtype not in FLOATS:
            raise ModelError(
                f"{info.file}: {module}.{role} is {info.dtype}, and the affine format has floats there: the "
                "quantization in config.json is of another format"
            )
    if biases.shape != scales.shape:
        raise ModelError(
            f"{biases.file}: {module}.biases {list(biases.shape)} are not as many as its scales {list(scales.shape)}"
        )


def _require_microscaled(module: str, scheme: Scheme, parts: Mapping[str, TensorInfo]) -> None:
    scales = parts["scales"]
    if scales.dtype != "U8" or "biases" in parts:
        detail = "has biases" if "biases" in parts else f"has scales of {scales.dtype}"
        raise ModelError(
            f"{scales.file}: {module} {detail}, and {scheme} has scales of U8 and no biases: the quantization in "
            "config.json is of another format"
        )
    if (factor := parts.get("global_scale")) is not None:
        lead = parts["weight"].shape[:-2]
        if factor.dtype != "F32" or math.prod(factor.shape) not in (1, math.prod(lead)):
            raise ModelError(f"{factor.file}: {module}.global_scale is not one float32 for each matrix")


def _of_bitsandbytes(
    folder: Path, stated: Quantization, stored: Mapping[str, TensorInfo]
) -> dict[str, QuantizedWeight]:
    found: dict[str, QuantizedWeight] = {}
    for name, info in stored.items():
        weight, state, method = name.partition(_STATE)
        if state:
            found[weight] = _4bit_weight(weight, method, stored)
        elif name.endswith(".SCB"):
            weight = f"{name.removesuffix('.SCB')}.weight"
            found[weight] = _int8_weight(folder, weight, stored)
        elif name.endswith(".weight") and info.dtype in ("U8", "I8") and not _has_scales(name, stored):
            raise ModelError(f"{info.file}: {name} is packed and has no scales: download the model again")
    wrong = next((weight for weight in found.values() if weight.scheme.bits != stated.default.bits), None)
    if wrong is not None:
        raise ModelError(
            f"{_section(folder)}: states {stated}, and {wrong.name} is {wrong.scheme} in {wrong.file.name}"
        )
    return found


def _has_scales(name: str, stored: Mapping[str, TensorInfo]) -> bool:
    return f"{name.removesuffix('.weight')}.SCB" in stored or any(
        f"{name}{_STATE}{method}" in stored for method in ("nf4", "fp4")
    )


def _4bit_weight(name: str, method: str, stored: Mapping[str, TensorInfo]) -> QuantizedWeight:
    state_info = stored[f"{name}{_STATE}{method}"]
    if method not in ("nf4", "fp4"):
        raise ModelError(f"{state_info.file}: {name} is {method!r}, which is not known here (known: nf4, fp4)")
    state = _state(state_info, name)
    double = "nested_offset" in state
    needed = ("absmax", "quant_map") + (("nested_absmax", "nested_quant_map") if double else ())
    parts = {"state": state_info}
    for role, stored_name in {"weight": name, **{role: f"{name}.{role}" for role in needed}}.items():
        if stored_name not in stored:
            raise ModelError(f"{state_info.file}: {name} is {method} and has no {role}: download the model again")
        parts[role] = stored[stored_name]
    shape, size = tuple(state["shape"]), state["blocksize"]
    elements = math.prod(shape)
    blocks = -(-elements // size)
    nested_size = state["nested_blocksize"] if double else 0
    expected = {
        # FSDP wants packed bytes under the name of a float dtype, so that only their number is fixed.
        "weight": (None, -(-elements // 2)),
        "absmax": ("U8", blocks) if double else ("F32", 4 * blocks),
        "quant_map": ("F32", 4 * 16),
        **(
            {"nested_absmax": ("F32", 4 * -(-blocks // nested_size)), "nested_quant_map": ("F32", 4 * 256)}
            if double
            else {}
        ),
    }
    for role, (dtype, length) in expected.items():
        info = parts[role]
        if dtype not in (None, info.dtype) or info.end - info.start != length:
            raise ModelError(
                f"{info.file}: {name}: {role} is {info.dtype}{list(info.shape)}, which does not fit {method} of "
                f"{list(shape)} in blocks of {size}: download the model again"
            )
    facts = {"nested_blocksize": nested_size, "nested_offset": float(state["nested_offset"])} if double else {}
    scheme = Scheme(method, 4, size, double)  # type: ignore[arg-type]
    return QuantizedWeight(name, shape, scheme, _DTYPES[state["dtype"]], parts, facts)


def _state(info: TensorInfo, name: str) -> dict[str, Any]:
    """Return the facts that bitsandbytes keeps as JSON in a tensor, checked."""
    with info.file.open("rb") as file:
        file.seek(info.start)
        content = file.read(min(info.end - info.start, 2**16))
    try:
        state = json.loads(content)
        sizes = [*state["shape"], state["blocksize"]]
        if "nested_offset" in state:
            sizes.append(state["nested_blocksize"])
            float(state["nested_offset"])
        if not all(type(size) is int and size > 0 for size in sizes) or len(state["shape"]) != 2:
            raise ValueError("sizes are whole numbers")
        if state["dtype"] not in _DTYPES or not math.isfinite(state.get("nested_offset", 0)):
            raise ValueError("not a dtype of weights")
    except MALFORMED as error:
        raise ModelError(f"{info.file}: the quantization state of {name} cannot be read: download it again") from error
    return dict(state)


def _int8_weight(folder: Path, name: str, stored: Mapping[str, TensorInfo]) -> QuantizedWeight:
    scales = stored[f"{name.removesuffix('.weight')}.SCB"]
    if name not in stored:
        raise ModelError(f"{scales.file}: has scales (SCB) for {name}, which is missing: download the model again")
    weight = stored[name]
    if weight.dtype != "I8" or len(weight.shape) != 2 or scales.shape != weight.shape[:1] or scales.dtype != "F32":
        raise ModelError(
            f"{weight.file}: {name} {weight.dtype}{list(weight.shape)} with SCB {scales.dtype}{list(scales.shape)} "
            "does not fit int8, which has a float32 scale for each row: download the model again"
        )
    parts = {"weight": weight, "SCB": scales}
    # bitsandbytes saves the layout of the elements as a number. Since version 0.45 there is one, rows.
    if (layout := stored.get(f"{name}_format")) is not None:
        parts["weight_format"] = layout
    return QuantizedWeight(name, weight.shape, Scheme("int8", 8, 0), _configured_dtype(folder), parts)


def _configured_dtype(folder: Path) -> str:
    """Return the dtype that config.json states for the model, bfloat16 if it states none."""
    config = model_config(folder)
    return _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")


def _refuse_unstated(stored: Mapping[str, TensorInfo]) -> None:
    """Raise for packed tensors in a folder whose config.json says nothing of a quantization."""
    for name, info in stored.items():
        packed = info.dtype == "U32" and f"{name.removesuffix('.weight')}.scales" in stored
        if name.endswith(".weight") and (packed or _has_scales(name, stored)):
            raise ModelError(
                f"{info.file}: {name} is quantized, and config.json has no section `quantization` that says how: "
                "copy the config.json that came with these weights"
            )


def _stored_name(weight: QuantizedWeight, part: str) -> str:
    module = weight.name.removesuffix(".weight")
    if part in ("scales", "biases", "global_scale", "SCB"):
        return f"{module}.{part}"
    return weight.name if part == "weight" else f"{weight.name}.{part}"


def _section(folder: Path) -> str:
    return f"{folder / 'config.json'}: quantization"
