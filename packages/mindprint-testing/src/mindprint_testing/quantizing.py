"""Small quantized bases for the suite, in NumPy: every format that core reads, written without its library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from mindprint.contract import Float32
from mindprint.models.folder import SINGLE_FILE
from mindprint.models.quantized import Method, affine, load_dense, microscaled
from mindprint.models.quantized.bitsandbytes import FP4, NF4

GROUP = 32
"""Elements of a group, and the number that a weight's columns have to be a multiple of."""

BLOCK = 64
"""Elements of a block of bitsandbytes' formats."""

Parts = dict[str, NDArray[Any]]


def write_quantized(folder: Path, out: Path, method: Method, linear: Collection[str]) -> Path:
    """Write a copy of a float32 base with its linear layers quantized, and in `affine` its embedding as well.

    Layers whose columns are not a multiple of `GROUP` stay as they are. `linear` are the modules' names in the files.
    """
    shutil.copytree(folder, out)
    tensors: Parts = {}
    for name, values in load_file(folder / SINGLE_FILE).items():
        module = name.removesuffix(".weight")
        chosen = module in linear or (method == "affine" and "embed_tokens" in module)
        if chosen and values.ndim == 2 and values.shape[1] % GROUP == 0:
            tensors |= _quantized(module, values.astype(np.float32), method)
        else:
            tensors[name] = values
    save_file(tensors, out / SINGLE_FILE, metadata={"format": "pt" if method in _CODES or method == "int8" else "mlx"})
    _write_section(out, method)
    return out


def write_dequantized(quantized: Path, out: Path) -> Path:
    """Write a quantized base in float32, with the numbers of core's dequantizer."""
    shutil.copytree(quantized, out)
    save_file(load_dense(quantized), out / SINGLE_FILE, metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    values = {name: value for name, value in config.items() if not name.startswith("quantization")}
    (out / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return out


_CODES: Mapping[str, Float32] = {"nf4": NF4, "fp4": FP4}


def _write_section(out: Path, method: Method) -> None:
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    if method in _CODES or method == "int8":
        four = method in _CODES
        section: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four}
        if four:
            section |= {
                "bnb_4bit_quant_type": method,
                "bnb_4bit_use_double_quant": method == "nf4",
                "bnb_4bit_compute_dtype": "float32",
            }
        config["quantization_config"] = section
    else:
        sizes = {"mxfp8": (8, GROUP), "nvfp4": (4, 16)}.get(method, (4, GROUP))
        section = {"group_size": sizes[1], "bits": sizes[0], "mode": method}
        config["quantization"] = config["quantization_config"] = section
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), encoding="utf-8")


def _quantized(module: str, values: Float32, method: Method) -> Parts:
    if method == "affine":
        packed, scales, biases = affine.quantize(values, 4, GROUP)
        return {f"{module}.weight": packed, f"{module}.scales": scales, f"{module}.biases": biases}
    if method == "int8":
        greatest = np.abs(values).max(axis=1)
        elements = np.rint(values * (127 / greatest[:, None])).astype(np.int8)
        return {f"{module}.weight": elements, f"{module}.SCB": greatest.astype(np.float32)}
    if method in ("nf4", "fp4"):
        return _in_blocks(f"{module}.weight", values, method)
    return _microscaled(module, values, method)


def _microscaled(module: str, values: Float32, method: Method) -> Parts:
    """Quantize to the nearest of a format's values, under a scale that brings a group's greatest value into range."""
    elements = microscaled.E4M3 if method == "mxfp8" else microscaled.E2M1
    scales = microscaled.E4M3 if method == "nvfp4" else microscaled.E8M0
    size = microscaled.GROUP_SIZES[method]
    groups = values.reshape(len(values), -1, size)
    wanted = np.abs(groups).max(axis=-1) / np.nanmax(elements)
    codes = _nearest(np.maximum(wanted, np.nanmin(scales[scales > 0])), scales)
    chosen = _nearest(groups / scales[codes][..., None], elements).reshape(values.shape)
    packed = affine.pack(chosen, 8 if method == "mxfp8" else 4)
    return {f"{module}.weight": packed, f"{module}.scales": codes}


def _in_blocks(name: str, values: Float32, method: Method) -> Parts:
    """Quantize as bitsandbytes does. NF4 gets double quantization, FP4 none, so that both are tested."""
    code = _CODES[method]
    blocks = values.reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(axis=1).astype(np.float32)
    state: dict[str, Any] = {
        "quant_type": method,
        "blocksize": BLOCK,
        "dtype": "float32",
        "shape": list(values.shape),
    }
    parts: Parts = {f"{name}.quant_map": code}
    if method == "nf4":
        offset = absmax.mean(dtype=np.float32)
        table = np.linspace(-1, 1, 256, dtype=np.float32)
        size = -(-len(absmax) // 256)
        nested = np.array([np.abs(part).max() for part in np.array_split(absmax - offset, size)], np.float32)
        # One scale for every 256 blocks: the small bases of the suite have fewer.
        stored = _nearest((absmax - offset) / nested[np.arange(len(absmax)) // 256], table)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        parts |= {f"{name}.absmax": stored, f"{name}.nested_absmax": nested, f"{name}.nested_quant_map": table}
    else:
        parts[f"{name}.absmax"] = absmax
    chosen = _nearest(blocks / absmax[:, None], code).reshape(-1)
    parts[name] = (chosen[0::2] << 4 | chosen[1::2])[:, None]
    text = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    return {**parts, f"{name}.quant_state.bitsandbytes__{method}": text}


def _nearest(values: NDArray[Any], table: Float32) -> NDArray[np.uint8]:
    """Return the number of the table's entry that is nearest to each value."""
    # NaN entries are no neighbours of anything.
    known = np.where(np.isnan(table), np.inf, table)
    order = np.argsort(known)
    middles = (known[order][1:] + known[order][:-1]) / 2
    return order[np.searchsorted(middles, values)].astype(np.uint8)
