"""Quantized bases: their packed weights go into transformers' classes tensor by tensor, and nothing dense is made.

The network is built without memory. Layers whose weights the files have packed are turned into packed ones before
transformers reads the rest, and get their tensors afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mindprint.errors import ModelError
from mindprint.models.folder import model_config
from mindprint.models.quantized import Quantization, QuantizedWeight, dense_weights
from mindprint.models.quantized.mlx_names import Change, MlxNames, mlx_names
from mindprint.models.tensor_files import TensorInfo
from mindprint_torch.packed import AffineWeight, BlockWeight, Int8Weight, MicroscaledWeight, PackedWeight
from mindprint_torch.packed_layers import PackedEmbedding, PackedLinear, can_pack, prepare_packed

STORED_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    # torch computes little with unsigned words. Their bits are what counts.
    "U32": torch.int32,
}
"""The dtypes of files as torch reads them."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read from its file when transformers indexes it, as transformers does with its own files."""

    info: TensorInfo
    change: Change = "none"

    def __getitem__(self, _: EllipsisType) -> Tensor:
        values = read_tensor(self.info)
        if self.change == "turned":
            return values.transpose(1, 2)
        return values.float() - 1 if self.change == "plus_one" else values


class ReadableWeight(Protocol):
    """A weight that packs itself when it is read."""

    @property
    def name(self) -> str: ...

    @property
    def file(self) -> Path: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def packed_bytes(self) -> int: ...

    def read(self, dtype: torch.dtype, device: torch.device) -> PackedWeight: ...


@dataclass(frozen=True)
class QuantizedBase:
    """A quantized base's tensors: packed ones by the name of their module, and the others by their own names."""

    packed: Mapping[str, QuantizedWeight | ReadableWeight]
    dense: Mapping[str, LazyTensor]

    def class_with_places(self, kind: Any) -> Any:
        """Return a subclass of transformers' class for the base, whose layers are ready for the packed weights."""

        def initialize(network: PreTrainedModel, config: Any, *args: Any, **named: Any) -> None:
            kind.__init__(network, config, *args, **named)
            self._prepare(network)

        # transformers looks up facts by the class's name and module, which stay the same.
        return type(kind.__name__, (kind,), {"__init__": initialize, "__module__": kind.__module__})

    def fill(self, network: Any, dtype: torch.dtype, device_of: Callable[[str], torch.device]) -> None:
        """Read every packed weight into its layer, on the device for the layer's path."""
        for path, layer in packed_layers(network):
            if path in self.packed:
                weight, device = self.packed[path], device_of(path)
                if isinstance(weight, QuantizedWeight):
                    layer.packed = read_weight(weight, dtype, device)
                else:
                    layer.packed = weight.read(dtype, device)
        for target, source in network.packed_ties.items():
            network.get_submodule(target).packed = network.get_submodule(source).packed

    def packed_bytes(self) -> dict[str, int]:
        """Return the bytes of each packed weight, by the path of its module."""
        return {path: packed_size(weight) for path, weight in self.packed.items()}

    def unused(self, network: PreTrainedModel) -> list[str]:
        """Return the names of packed weights that the network has no layer for."""
        used = {path for path, _ in packed_layers(network)}
        return [f"{path}.weight" for path in self.packed if path not in used]

    def _prepare(self, network: Any) -> None:
        modules = dict(network.named_modules())
        for path, weight in self.packed.items():
            if path in modules:
                _require_place(modules[path], weight)
                prepare_packed(modules[path])
        # These files have no tensor for a head that is the embedding.
        ties = dict(network.all_tied_weights_keys)
        packed = {f"{path}.weight" for path in self.packed}
        network.packed_ties = {
            target.removesuffix(".weight"): source.removesuffix(".weight")
            for target, source in ties.items()
            if source in packed
        }
        for target in network.packed_ties:
            if not isinstance(modules[target], PackedLinear):
                prepare_packed(modules[target])
        network.all_tied_weights_keys = {
            target: source for target, source in ties.items() if source not in packed and target not in packed
        }


def read_quantized_base(folder: Any, stated: Quantization) -> QuantizedBase:
    """Return the tensors of a quantized base under transformers' names. Nothing but headers is read.

    Raises:
        ModelError: If config.json and tensors do not fit each other, or the names of such a folder are not known.
    """
    names = mlx_names(model_config(folder)) if stated.family == "mlx" else MlxNames()
    packed, dense = {}, {}
    for stored, content in dense_weights(folder).items():
        name = names.in_transformers(stored)
        if name is None:
            continue
        if isinstance(content, QuantizedWeight):
            if len(content.shape) != 2:
                raise ModelError(f"{content.file}: {stored} is a stack of experts, which is not trained in packed form")
            packed[name.removesuffix(".weight")] = content
        else:
            dense[name] = LazyTensor(content, names.change(stored, content.shape))
    return QuantizedBase(packed, dense)


def packed_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers over packed weights with their paths."""
    for path, module in network.named_modules():
        if isinstance(module, (PackedLinear, PackedEmbedding)):
            yield path, module


def packed_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of all packed weights by name, shared ones once."""
    weights: dict[int, tuple[str, PackedWeight]] = {}
    for path, layer in packed_layers(network):
        weights.setdefault(id(layer.packed), (path, layer.packed))
    return {f"{path}.{part}": tensor for path, weight in weights.values() for part, tensor in weight.parts.items()}


def packed_elements(network: nn.Module) -> int:
    """Return the number of elements of all packed weights, shared ones once."""
    weights = {id(layer.packed): layer.packed for _, layer in packed_layers(network)}
    return sum(weight.shape.numel() for weight in weights.values())


def packed_size(weight: QuantizedWeight | ReadableWeight) -> int:
    """Return the bytes of a weight in packed form."""
    if isinstance(weight, QuantizedWeight):
        return sum(info.end - info.start for info in weight.parts.values())
    return weight.packed_bytes


def read_weight(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> PackedWeight:
    """Return a packed weight, read onto a device."""
    shape, method = (weight.shape[0], weight.shape[1]), weight.scheme.method
    parts = {name: read_tensor(info).to(device) for name, info in weight.parts.items() if name != "state"}
    packed: PackedWeight
    if method == "affine":
        packed = AffineWeight(shape, dtype, parts, weight.scheme.bits)
    elif method in ("mxfp4", "mxfp8", "nvfp4"):
        packed = MicroscaledWeight(shape, dtype, parts, method)
    elif method == "int8":
        packed = Int8Weight(shape, dtype, parts)
    else:
        # FSDP wants these bytes under the name of a float dtype.
        parts["weight"] = parts["weight"].view(torch.uint8)
        nested_size = int(weight.state.get("nested_blocksize", 0))
        if nested_size:
            parts["nested_offset"] = torch.tensor(weight.state["nested_offset"], dtype=torch.float32, device=device)
        packed = BlockWeight(shape, dtype, parts, weight.scheme.group_size, nested_size)
    if not packed.scales_are_finite():
        raise ModelError(f"{weight.file}: {weight.name} has scales that are NaN or infinite: download the model again")
    return packed


def read_tensor(info: TensorInfo) -> Tensor:
    """Return a tensor of a file, in its own memory."""
    dtype = STORED_DTYPES.get(info.dtype)
    if dtype is None:
        raise ModelError(f"{info.file}: holds {info.dtype}, which is not read here")
    size = math.prod(info.shape) * dtype.itemsize
    with info.file.open("rb") as file:
        file.seek(info.start)
        content = np.fromfile(file, np.uint8, info.end - info.start)
    if len(content) != size:
        raise ModelError(f"{info.file}: does not hold as many bytes as its header says: download the model again")
    return torch.from_numpy(content).view(dtype).view(info.shape)


def _require_place(module: nn.Module, weight: QuantizedWeight | ReadableWeight) -> None:
    """Raise `ModelError` unless a layer can compute with a packed weight of this shape."""
    if not can_pack(module):
        raise ModelError(
            f"{weight.file}: {weight.name} is quantized, and a {type(module).__name__} is not computed from packed "
            "weights"
        )
    dense: Any = module.weight
    if tuple(dense.shape) != weight.shape:
        raise ModelError(
            f"{weight.name} is {list(weight.shape)} when it is unpacked, and config.json implies {list(dense.shape)}"
        )
