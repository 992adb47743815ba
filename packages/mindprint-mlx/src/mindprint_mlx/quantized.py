"""Quantized bases: which tensors of the files belong together, and how they get into the layers of a model.

A class may rename, split or join tensors when it loads them (`sanitize`). It is given a dense array in place of each
packed weight, which is not computed yet. Weights that come out untouched stay packed. The others are computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn

from mindprint.errors import ModelError
from mindprint.models.quantized import Quantization, QuantizedWeight, quantized_weights, read_quantization
from mindprint_mlx.arrays import parameters_of
from mindprint_mlx.packed import Format, Parts
from mindprint_mlx.packed_layers import PACKED, packed_layer

FIELDS = ("quantization", "quantization_config")


@dataclass(frozen=True)
class StoredWeight:
    """A packed weight of the files: its format, and its tensors, which are not read yet."""

    weight: QuantizedWeight
    packed: Format
    parts: Parts
    stays_packed: bool = True


@dataclass(frozen=True)
class PackedWeights:
    """The packed weights of a base, by the dense array that replaces each while names are sorted out."""

    stated: Quantization | None
    by_array: dict[int, tuple[mx.array, StoredWeight]]

    def place(self, module: nn.Module, weights: dict[str, mx.array]) -> None:
        """Put packed layers into the module, and their tensors among the weights in place of dense arrays.

        `by_array` is empty afterwards, so that nothing is kept of weights that are computed in full precision.
        """
        modules = dict(module.named_modules())
        for name, values in list(weights.items()):
            path = name.removesuffix(".weight")
            _, stored = self.by_array.get(id(values), (None, None))
            if stored is None or not stored.stays_packed or path not in modules:
                continue
            layer = packed_layer(modules[path], stored.packed, stored.parts)
            if layer is not None:
                _put(module, path, layer)
                del weights[name]
                weights |= {f"{path}.{PACKED}.{role}": part for role, part in stored.parts.items()}
        self.by_array.clear()

    def note(self, dtype: str) -> tuple[str, ...]:
        """Return a note for the user about a quantized base."""
        if self.stated is None:
            return ()
        return (f"the base is quantized ({self.stated}), stays packed, and is computed with in {dtype}",)


def is_packed(name: str) -> bool:
    """Return whether a parameter is part of a packed weight, whose dtype is fixed."""
    return f".{PACKED}." in name


def full_precision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without its quantization, from which the dense class is built."""
    bare = {name: value for name, value in config.items() if name not in FIELDS}
    if isinstance(bare.get("text_config"), dict):
        bare["text_config"] = {name: value for name, value in bare["text_config"].items() if name not in FIELDS}
    return bare


def split_packed(folder: Path, weights: dict[str, mx.array], dtype: mx.Dtype, device: mx.Device) -> PackedWeights:
    """Replace the tensors of each packed weight by one dense array under its name, which is not computed.

    Raises:
        ModelError: If config.json and tensors do not fit each other.
    """
    stated = read_quantization(folder)
    by_array = {}
    for name, weight in quantized_weights(folder).items():
        files = {role: _file_name(weight, role) for role in weight.parts}
        if name not in weights:
            continue
        tensors = {role: weights.pop(file) for role, file in files.items() if role != "state"}
        stored = _stored_weight(weight, tensors, dtype, device)
        for file in files.values():
            weights.pop(file, None)
        values = stored.packed.values(stored.parts).reshape(-1)[: math.prod(weight.shape)]
        weights[name] = values.reshape(weight.shape)
        by_array[id(weights[name])] = weights[name], stored
    return PackedWeights(stated, by_array)


def check_scales(folder: Path, module: nn.Module) -> None:
    """Raise `ModelError` if a packed layer has scales that are NaN or infinite."""
    for path, layer in packed_layers(module):
        if not layer._format.scales_are_finite(layer.packed):
            raise ModelError(
                f"{folder}: the packed weight of {path} has scales that are NaN or infinite: download the model again"
            )


def packed_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers over packed weights with their paths."""
    for path, layer in module.named_modules():
        if PACKED in layer:
            yield path, layer


def _stored_weight(
    weight: QuantizedWeight, tensors: dict[str, mx.array], dtype: mx.Dtype, device: mx.Device
) -> StoredWeight:
    scheme = weight.scheme
    if scheme.method in ("nf4", "fp4"):
        parts, aligned = _block_parts(weight, tensors)
        return StoredWeight(weight, Format(scheme, weight.shape, dtype), parts, stays_packed=aligned)
    if scheme.method == "int8":
        parts = {"weight": tensors["weight"], "scales": tensors["SCB"][:, None]}
        return StoredWeight(weight, Format(scheme, weight.shape, dtype), parts)
    on_metal = mx.metal.is_available() and device == mx.Device(mx.gpu)
    kernel = on_metal and "global_scale" not in tensors and _has_kernel(weight)
    return StoredWeight(weight, Format(scheme, weight.shape, dtype, has_kernel=kernel), tensors)


def _has_kernel(weight: QuantizedWeight) -> bool:
    """Return whether the installed MLX multiplies weights of this scheme in packed form."""
    scheme = weight.scheme
    if len(weight.shape) != 2:
        return False
    try:
        mx.eval(mx.quantize(mx.zeros((8, 512)), group_size=scheme.group_size, bits=scheme.bits, mode=scheme.method))
    except (ValueError, RuntimeError, TypeError):
        return False
    return True


def _block_parts(weight: QuantizedWeight, tensors: dict[str, mx.array]) -> tuple[dict[str, mx.array], bool]:
    """Return bitsandbytes' blocks as rows, with float32 scales, and whether each row begins with a block."""
    rows, columns = weight.shape
    size = weight.scheme.group_size
    scales = tensors["absmax"]
    if weight.scheme.double:
        # The scales of scales: computed here, since they are a sixty-fourth of the weight, and blocks do not know rows.
        outer = mx.repeat(tensors["nested_absmax"], int(weight.state["nested_blocksize"]))[: scales.size]
        scales = mx.take(tensors["nested_quant_map"], scales) * outer + weight.state["nested_offset"]
    content = tensors["weight"].view(mx.uint8).reshape(-1)
    aligned = columns % size == 0
    if aligned:
        content, scales = content.reshape(rows, columns // 2), scales.reshape(rows, columns // size)
    else:
        # A scale for each element. The last byte may have one that is not of the weight.
        scales = mx.repeat(scales.reshape(-1), size)[: 2 * content.size]
    return {"weight": content, "scales": scales, "code": tensors["quant_map"]}, aligned


def _file_name(weight: QuantizedWeight, role: str) -> str:
    """Return the name under which the files have a part of a weight."""
    if role == "weight":
        return weight.name
    if role == "weight_format":
        return f"{weight.name}_format"
    if role == "state":
        return f"{weight.name}.quant_state.bitsandbytes__{weight.scheme.method}"
    bare = role in ("scales", "biases", "global_scale", "SCB")
    return f"{weight.name.removesuffix('.weight') if bare else weight.name}.{role}"


def _put(module: nn.Module, path: str, layer: nn.Module) -> None:
    parent_path, _, attribute = path.rpartition(".")
    parent: Any = module
    for name in filter(None, parent_path.split(".")):
        parent = parent[int(name) if isinstance(parent, list) else name]
    parent[int(attribute) if isinstance(parent, list) else attribute] = layer


def dense_elements(module: nn.Module) -> int:
    """Return the number of a model's parameters, counted as if no weight were packed."""
    plain = sum(values.size for name, values in parameters_of(module) if not is_packed(name))
    packed: int = sum(layer.weight.size for _, layer in packed_layers(module))
    return plain + packed
