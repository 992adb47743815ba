"""Small quantized bases, and next to each a full-precision one with the same weights, dequantized by core."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch_samples import COMMON
from transformers import AutoConfig, AutoModelForCausalLM

from mindprint.models.quantized import affine, load_dense

SIZES: dict[str, Any] = {**COMMON, "hidden_size": 64, "intermediate_size": 96}
"""Rows of 64 and 96 elements fill whole words at any number of bits, in groups of 32."""

GROUPS = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip

Tensors = dict[str, np.ndarray[Any, Any]]


def save_pair(folder: Path, method: str, architecture: str = "qwen2", bits: int = 4, **settings: Any) -> Path:
    """Save `folder/packed` and `folder/dense`."""
    source = folder / "source"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(architecture, **{**SIZES, "tie_word_embeddings": True, **settings})
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(source)
    weights = load_file(source / "model.safetensors")
    packed, section = _packed(weights, method, bits)
    _save(folder / "packed", source, packed, {section[0]: section[1]})
    _save(folder / "dense", source, load_dense(folder / "packed"), {})
    return folder


def _save(folder: Path, source: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    shutil.copytree(source, folder)
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, folder / "model.safetensors")
    stated = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**stated, **config}), encoding="utf-8")


def _packed(weights: Tensors, method: str, bits: int) -> tuple[Tensors, tuple[str, dict[str, Any]]]:
    random = np.random.default_rng(3)
    matrices = {name for name, values in weights.items() if values.ndim == 2}
    if method in ("nf4", "nf4 double", "int8"):
        matrices = {name for name in matrices if "_proj" in name}
    tensors = {name: values for name, values in weights.items() if name not in matrices}
    for name in matrices:
        tensors |= _parts(name, weights[name], method, bits, random)
    if method == "affine":
        # As mlx-lm writes it for a mixture of bits.
        other = {"model.layers.1.mlp.down_proj": {"group_size": 32, "bits": bits}}
        return tensors, ("quantization", {"group_size": 32, "bits": bits, "mode": "affine", **other})
    if method in GROUPS:
        stated = {"group_size": GROUPS[method], "bits": 8 if method == "mxfp8" else 4, "mode": method}
        return tensors, ("quantization", stated)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": method != "nf4"}
    return tensors, (
        "quantization_config",
        {"quant_method": "bitsandbytes", **({"load_in_8bit": True} if method == "int8" else four)},
    )


def _parts(name: str, values: Any, method: str, bits: int, random: np.random.Generator) -> Tensors:
    """Return the stored tensors of a weight. Only the affine format keeps its values, the others get random ones."""
    module = name.removesuffix(".weight")
    rows, columns = values.shape
    if method == "affine":
        packed, scales, biases = affine.quantize(values, bits, 32)
        halves = {f"{module}.scales": scales.astype(np.float16), f"{module}.biases": biases.astype(np.float16)}
        return {name: packed, **halves}
    if method == "int8":
        largest = np.abs(values).max(1)
        return {
            name: np.rint(values / largest[:, None] * 127).astype(np.int8),
            f"{module}.SCB": largest.astype(np.float32),
        }
    if method in GROUPS:
        codes = random.integers(0, 0x70, (rows, columns // (1 if method == "mxfp8" else 2)), np.uint8)
        # Scales near 2^-5 (E8M0) and 2^-3 (E4M3), so that weights are of a usual size.
        low, high = (0x20, 0x28) if method == "nvfp4" else (117, 120) if method == "mxfp8" else (122, 125)
        scales = random.integers(low, high, (rows, columns // GROUPS[method]), np.uint8)
        return {name: codes.view(np.uint32), f"{module}.scales": scales}
    return _block_parts(name, rows, columns, random, double=method == "nf4 double")


def _block_parts(name: str, rows: int, columns: int, random: np.random.Generator, *, double: bool) -> Tensors:
    # 96 columns are no whole number of blocks of 64: those begin within rows.
    blocks = -(-rows * columns // 64)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [rows, columns]}
    parts: Tensors = {name: random.integers(0, 256, (rows * columns // 2, 1), np.uint8)}
    parts[f"{name}.quant_map"] = np.array(NF4, np.float32)
    if double:
        state |= {"nested_blocksize": 32, "nested_offset": 0.2, "nested_dtype": "float32"}
        parts[f"{name}.absmax"] = random.integers(0, 256, blocks, np.uint8)
        parts[f"{name}.nested_absmax"] = random.uniform(0.05, 0.1, -(-blocks // 32)).astype(np.float32)
        parts[f"{name}.nested_quant_map"] = np.linspace(-1, 1, 256, dtype=np.float32)
    else:
        parts[f"{name}.absmax"] = random.uniform(0.1, 0.3, blocks).astype(np.float32)
    parts[f"{name}.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return parts
