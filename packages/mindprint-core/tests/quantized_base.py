"""Quantized bases of a few weights, written in NumPy: MLX's affine format, and others by their codes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindprint.models.folder import ModelFolder
from mindprint.models.quantized import affine
from mindprint.models.tensor_files import from_float32

Tensor = tuple[str, np.ndarray[Any, Any]]

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SHAPES = {
    "model.embed_tokens": (12, 64),
    Q: (64, 64),
    DOWN: (64, 128),
    "lm_head": (12, 64),
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file from the bits of each tensor."""
    header, content = {}, b""
    for name, (dtype, bits) in tensors.items():
        header[name] = {"dtype": dtype, "shape": bits.shape, "data_offsets": [len(content), len(content) + bits.nbytes]}
        content += bits.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def affine_tensors(
    module: str, values: np.ndarray[Any, Any], bits: int, group_size: int, dtype: str
) -> dict[str, Tensor]:
    packed, *scales = affine.quantize(values, bits, group_size)
    parts = {f"{module}.weight": ("U32", packed)}
    return parts | {
        f"{module}.{role}": (dtype, from_float32(part, dtype))
        for role, part in zip(("scales", "biases"), scales, strict=True)
    }


def write_quantized(
    folder: Path, bits: int = 4, group_size: int = 32, dtype: str = "BF16", **section: Any
) -> ModelFolder:
    """Write a base whose linear layers and embedding are in the affine format, and whose norm and head are not."""
    random = np.random.default_rng(1)
    tensors: dict[str, Tensor] = {"model.norm.weight": (dtype, from_float32(np.ones(64, np.float32), dtype))}
    for module, shape in SHAPES.items():
        values = random.normal(0, 0.1, shape).astype(np.float32)
        if module == "lm_head":
            tensors[f"{module}.weight"] = (dtype, from_float32(values, dtype))
        else:
            tensors |= affine_tensors(module, values, bits, group_size, dtype)
    folder.mkdir()
    write_tensors(folder / "model.safetensors", tensors)
    config = {"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": False}
    stated = {"group_size": group_size, "bits": bits, "mode": "affine", **section}
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization": stated, "quantization_config": stated}), encoding="utf-8"
    )
    (folder / "tokenizer.json").write_text("{}")
    return ModelFolder(folder, "quantized")


def edit_tensors(folder: Path, change: Any) -> None:
    """Rewrite a base's file with `change` applied to its tensors, a dict of (dtype, bits) by name."""
    from mindprint.models.folder import tensors

    kinds = {"U32": "<u4", "U8": "u1", "I8": "i1", "BF16": "<u2", "F16": "<f2", "F32": "<f4"}
    content = (folder / "model.safetensors").read_bytes()
    stored = {
        name: (info.dtype, np.frombuffer(content[info.start : info.end], kinds[info.dtype]).reshape(info.shape).copy())
        for name, info in tensors(folder).items()
    }
    write_tensors(folder / "model.safetensors", change(stored) or stored)
