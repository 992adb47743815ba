"""Core's reading of packed weights, bit for bit next to the libraries that wrote them: MLX and bitsandbytes."""

from __future__ import annotations

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mindprint.models.quantized import Scheme, affine, quantized_weights

MICROSCALED = (("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16))


@pytest.fixture(autouse=True)
def _on_cpu() -> None:
    mx.set_default_device(mx.cpu)


def weights(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return a weight with a group of zeros, a constant group, and one whose values are all negative."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    values[..., 0, :64] = 0
    values[..., 1, :32] = 0.25
    values[..., 2, :] = -np.abs(values[..., 2, :])
    return values


def mlx_folder(folder: Path, tensors: dict[str, Any], **section: Any) -> Path:
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization": section}))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_affine_weights_are_those_of_mlx(tmp_path: Path, bits: int, dtype: str) -> None:
    for group_size in (32, 64, 128):
        weight = mx.array(weights(8, 384)).astype(getattr(mx, dtype))
        packed, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
        # A negative scale is what most groups have already. An exact zero is not written by MLX, but can be.
        scales[3, 0] = 0
        parts = {"a.weight": packed, "a.scales": scales, "a.biases": biases}
        folder = mlx_folder(tmp_path, parts, group_size=group_size, bits=bits)
        (found,) = quantized_weights(folder).values()
        expected = mx.dequantize(
            packed, scales.astype(mx.float32), biases.astype(mx.float32), group_size=group_size, bits=bits
        )
        assert found.scheme == Scheme("affine", bits, group_size) and found.shape == (8, 384)
        assert found.values().tobytes() == np.array(expected).tobytes()
        assert found.rows(2, 5).tobytes() == np.array(expected)[2:5].tobytes()


@pytest.mark.parametrize(("method", "bits", "group_size"), MICROSCALED)
def test_microscaled_weights_are_those_of_mlx(tmp_path: Path, method: str, bits: int, group_size: int) -> None:
    settings = {"group_size": group_size, "bits": bits, "mode": method}
    # The scales but NaN, from 2^-127 to 2^127 or 448, and every code of an element.
    count = 255 if method != "nvfp4" else 127
    scales = mx.array(np.arange(count, dtype=np.uint8)[:, None].repeat(8, 1))
    codes = np.arange(count * 8 * group_size * bits // 8, dtype=np.uint32).astype(np.uint8)
    # Each element of 8 bits that is NaN is replaced: NaN elements are no weights.
    packed = mx.array(np.where((codes & 127 == 127) & (bits == 8), 0, codes).reshape(count, -1).view(np.uint32))
    folder = mlx_folder(tmp_path, {"a.weight": packed, "a.scales": scales}, **settings)
    (found,) = quantized_weights(folder).values()
    expected = np.array(mx.dequantize(packed, scales, dtype=mx.float32, **settings))
    assert found.scheme == Scheme(method, bits, group_size)  # type: ignore[arg-type]
    assert found.values().tobytes() == expected.tobytes()
    assert found.rows(100, 103).tobytes() == expected[100:103].tobytes()


def test_a_scale_of_the_whole_tensor_is_multiplied_in_as_by_mlx(tmp_path: Path) -> None:
    settings = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    weight = mx.array(weights(8, 128))
    largest = mx.max(mx.abs(weight))
    packed, scales = mx.quantize(weight, global_scale=largest, **settings)
    parts = {"a.weight": packed, "a.scales": scales, "a.global_scale": largest}
    (found,) = quantized_weights(mlx_folder(tmp_path, parts, **settings)).values()
    expected = np.array(mx.dequantize(packed, scales, global_scale=largest, dtype=mx.float32, **settings))
    assert found.values().tobytes() == expected.tobytes()


def test_stacked_experts_are_read_as_one_weight(tmp_path: Path) -> None:
    packed, scales, biases = mx.quantize(mx.array(weights(3, 8, 128)), group_size=64, bits=6)
    parts = {"a.weight": packed, "a.scales": scales, "a.biases": biases}
    (found,) = quantized_weights(mlx_folder(tmp_path, parts, group_size=64, bits=6)).values()
    expected = np.array(mx.dequantize(packed, scales, biases, group_size=64, bits=6))
    assert found.shape == (3, 8, 128) and found.values().tobytes() == expected.tobytes()
    assert found.rows(7, 9).tobytes() == expected.reshape(24, 128)[7:9].tobytes()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_core_quantizes_as_mlx_does(bits: int) -> None:
    weight = weights(16, 256)
    packed, scales, biases = affine.quantize(weight, bits, 64)
    expected = mx.quantize(mx.array(weight), group_size=64, bits=bits)
    for part, other in zip((packed, scales, biases), expected, strict=True):
        assert part.tobytes() == np.array(other).tobytes()


def dequantized(bnb: Any, packed: torch.Tensor, state: Any) -> np.ndarray:
    """Return bitsandbytes' numbers, with whole blocks as rows where the weight consists of whole blocks.

    Blocks are those of the flat weight. With AVX512 the kernel of 0.50.2 takes wrong scales where rows end within one.
    """
    shape, count = state.shape, math.prod(state.shape)
    if count % state.blocksize == 0:
        state.shape = torch.Size((count // state.blocksize, state.blocksize))
    return bnb.dequantize_4bit(packed, state).reshape(shape).numpy()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("method", ["nf4", "fp4"])
def test_4bit_weights_are_those_of_bitsandbytes(tmp_path: Path, method: str, double: bool) -> None:
    bnb = import_module("bitsandbytes.functional")
    section = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": method,
        "bnb_4bit_use_double_quant": double,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": section}))
    # Rows that are whole blocks, and that end within one. Odd rows are in core's tests: bitsandbytes compiles its
    # kernel for those, which takes half a minute.
    for shape, size in (((24, 64), 64), ((24, 96), 64), ((12, 100), 64), ((300, 128), 128)):
        packed, state = bnb.quantize_4bit(
            torch.from_numpy(weights(*shape)), blocksize=size, quant_type=method, compress_statistics=double
        )
        parts = {f"a.weight.{name}": part.clone() for name, part in state.as_dict(packed=True).items()}
        save_file({"a.weight": packed, **parts}, tmp_path / "model.safetensors")
        (found,) = quantized_weights(tmp_path).values()
        expected = dequantized(bnb, packed, state)
        assert found.scheme == Scheme(method, 4, size, double) and found.shape == shape  # type: ignore[arg-type]
        # Adding 0 makes -0.0 a 0: the kernel for FP4 gives code 8 a sign, and the table in the file does not.
        assert (found.values() + 0).tobytes() == (expected + 0).tobytes()
        assert (found.rows(3, 6) + 0).tobytes() == (expected[3:6] + 0).tobytes()


def test_int8_weights_are_those_of_bitsandbytes(tmp_path: Path) -> None:
    bnb = import_module("bitsandbytes.functional")
    packed, scales, _ = bnb.int8_vectorwise_quant(torch.from_numpy(weights(16, 96)).half())
    section = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": section}))
    save_file({"a.weight": packed, "a.SCB": scales}, tmp_path / "model.safetensors")
    (found,) = quantized_weights(tmp_path).values()
    expected = bnb.int8_vectorwise_dequant(packed, scales).numpy()
    assert found.values().tobytes() == expected.tobytes()
    assert found.rows(3, 6).tobytes() == expected[3:6].tobytes()
