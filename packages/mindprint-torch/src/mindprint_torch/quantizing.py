"""Quantizing a full-precision base while it is loaded, one weight at a time.

`nf4` is NF4 with double quantization by bitsandbytes, as QLoRA has it (Dettmers et al. 2023, arXiv 2305.14314). `4bit`
and `8bit` are MLX's affine format in groups of 64, by the rule of `mx.quantize`, so that another framework can make the
same base. Embeddings, routers and the output layer stay as they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mindprint.adapter.base_facts import read_base_facts
from mindprint.adapter.module_names import file_names
from mindprint.adapter.targets import is_router
from mindprint.contract import QuantizeMethod
from mindprint.errors import ModelError
from mindprint.models.folder import tensors
from mindprint.models.quantized import affine
from mindprint.models.tensor_files import FLOATS, TensorInfo, read_float32
from mindprint_torch.packed import AffineWeight, BlockWeight, PackedWeight
from mindprint_torch.quantized import STORED_DTYPES, LazyTensor, QuantizedBase

GROUP_SIZE = 64
"""Elements that share a scale, in each of the methods."""

BITS = {"4bit": 4, "8bit": 8}


@dataclass(frozen=True)
class WeightToQuantize:
    """A full-precision weight of a file, which is packed as soon as it is read."""

    name: str
    info: TensorInfo
    method: QuantizeMethod

    @property
    def file(self) -> Path:
        return self.info.file

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def packed_bytes(self) -> int:
        """The bytes of the packed weight. Each group has one scale or two, of two bytes."""
        elements = self.shape[0] * self.shape[1]
        bits = BITS.get(self.method, 4)
        return elements * bits // 8 + elements // GROUP_SIZE * (1 if self.method == "nf4" else 4)

    def read(self, dtype: torch.dtype, device: torch.device) -> PackedWeight:
        """Read and pack the weight. From the stored values, so that it is the same base in every dtype."""
        shape, values = (self.shape[0], self.shape[1]), read_float32(self.info)
        if self.method == "nf4":
            return _nf4(shape, dtype, torch.from_numpy(values).to(device))
        packed, scales, biases = affine.quantize(values, BITS[self.method], GROUP_SIZE)
        # As in a folder of MLX, scales have the dtype that the weight had.
        stored = STORED_DTYPES[self.info.dtype]
        parts = {"weight": torch.from_numpy(packed.view("<i4"))}
        parts |= {name: torch.from_numpy(part).to(stored) for name, part in (("scales", scales), ("biases", biases))}
        return AffineWeight(shape, dtype, {name: part.to(device) for name, part in parts.items()}, BITS[self.method])


def base_to_quantize(folder: Path, kind: Any, config: PreTrainedConfig, method: QuantizeMethod) -> QuantizedBase:
    """Return a full-precision base's tensors, those of linear layers to be packed by `method`.

    Raises:
        ModelError: If the files hold no weight of a linear layer by its name, or bitsandbytes is needed and missing.
    """
    if method == "nf4":
        _bitsandbytes()
    stored, family = tensors(folder), read_base_facts(folder).family
    chosen = {}
    for path in _linear_layers(kind, config):
        name = next((name for name in file_names(path, family) if name in stored), None)
        if name is None or stored[name].dtype not in FLOATS or len(stored[name].shape) != 2:
            continue
        if stored[name].shape[1] % GROUP_SIZE == 0:
            chosen[path] = WeightToQuantize(name, stored[name], method)
    if not chosen:
        raise ModelError(f"{folder}: has no linear layers that `model.quantize: {method}` can pack; remove the setting")
    taken = {weight.name for weight in chosen.values()}
    return QuantizedBase(chosen, {name: LazyTensor(info) for name, info in stored.items() if name not in taken})


def _linear_layers(kind: Any, config: PreTrainedConfig) -> Iterator[str]:
    """Yield the paths of plain linear layers, without routers and the output layer."""
    with torch.device("meta"):
        network = kind(deepcopy(config))
    head = network.get_output_embeddings()
    for path, module in network.named_modules():
        if type(module) is nn.Linear and module is not head and not is_router(path):
            yield path


def _nf4(shape: tuple[int, int], dtype: torch.dtype, values: Tensor) -> PackedWeight:
    functional = _bitsandbytes()
    packed, state = functional.quantize_4bit(values, blocksize=GROUP_SIZE, compress_statistics=True, quant_type="nf4")
    parts = {
        "weight": packed,
        "absmax": state.absmax,
        "quant_map": state.code,
        "nested_absmax": state.state2.absmax,
        "nested_quant_map": state.state2.code,
        "nested_offset": state.offset.float(),
    }
    return BlockWeight(shape, dtype, parts, GROUP_SIZE, state.state2.blocksize)


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ModelError(
            "model.quantize: nf4 needs bitsandbytes, which cannot be imported here "
            f"({error}): pip install 'mindprint-torch[bitsandbytes]', or set 4bit"
        ) from error
