"""Packed weights compute what core defines: in layers, in their gradients, and after loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_samples import lora, token_batch
from safetensors.numpy import save_file

from mindprint.contract import LoadedModel, ModelSpec, Update
from mindprint.errors import ModelError
from mindprint.models.quantized import Scheme, load_dense
from mindprint_mlx import adapter, packed, steps
from mindprint_mlx.digest import base_digest
from mindprint_mlx.model import load_model
from mindprint_mlx.packed import Format, multiply, take_rows
from mindprint_mlx.packed_layers import PackedEmbedding, PackedLinear, packed_layer
from mindprint_mlx.quantized import packed_layers

FORMATS = [("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)] + [
    ("affine", 4, 64),
    ("mxfp4", 4, 32),
    ("mxfp8", 8, 32),
    ("nvfp4", 4, 16),
]
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def _on_cpu() -> None:
    mx.set_default_device(mx.cpu)


def random_weight(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def quantized(weight: mx.array, method: str, bits: int, group_size: int) -> dict[str, mx.array]:
    settings: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": method}
    parts = mx.quantize(weight.astype(mx.bfloat16), **settings)
    return dict(zip(("weight", "scales", "biases"), parts, strict=False))


def write_base(folder: Path, method: str = "affine", bits: int = 4, group_size: int = 32, **section: Any) -> Path:
    """Write a llama with quantized linear layers and a quantized embedding, which is also its head."""
    random = np.random.default_rng(1)
    tensors: dict[str, mx.array] = {}
    sizes = {"embed_tokens": (61, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)}
    sizes |= {f"self_attn.{name}_proj": (rows, 64) for name, rows in (("q", 64), ("k", 32), ("v", 32), ("o", 64))}
    for name, shape in sizes.items():
        path = "model.embed_tokens" if name == "embed_tokens" else f"model.layers.0.{name}"
        values = mx.array(0.3 * random.standard_normal(shape).astype(np.float32))
        # Rows of 96 are no whole groups of 64: such layers are left as they are.
        whole = shape[1] % group_size == 0
        parts = quantized(values, method, bits, group_size) if whole else {"weight": values}
        tensors |= {f"{path}.{role}": part for role, part in parts.items()}
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        tensors[f"model.{name}.weight"] = mx.ones(64)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    stated = {"group_size": group_size, "bits": bits, "mode": method, **section}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization": stated, "quantization_config": stated}))
    return folder


def write_dense(folder: Path, source: Path) -> Path:
    """Write the same base with dequantized weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(load_dense(source), folder / "model.safetensors")
    return folder


def loaded(folder: Path, dtype: Any = "float32") -> LoadedModel:
    return load_model(ModelSpec(str(folder), "cpu", dtype))


def edit(folder: Path, **tensors: mx.array | None) -> Path:
    """Replace tensors by the ends of their names, written with underscores. None removes one."""
    path = folder / "model.safetensors"
    stored: dict[str, mx.array] = {name: values + 0 for name, values in dict(mx.load(str(path))).items()}  # type: ignore[arg-type, union-attr]
    mx.eval(stored)
    for end, values in tensors.items():
        (name,) = (name for name in stored if name.replace(".", "_").endswith(end))
        if values is None:
            del stored[name]
        else:
            stored[name] = values
    mx.save_safetensors(str(path), stored)
    return folder


@pytest.mark.parametrize(("method", "bits", "group_size"), FORMATS)
def test_a_training_step_on_packed_weights_is_that_on_dequantized_ones(
    tmp_path: Path, method: str, bits: int, group_size: int
) -> None:
    source = write_base(tmp_path / "packed", method, bits, group_size)
    models = [loaded(source), loaded(write_dense(tmp_path / "dense", source))]
    assert list(packed_layers(models[0].handle.module)) and not list(packed_layers(models[1].handle.module))
    dense = load_dense(source)
    for path, layer in packed_layers(models[0].handle.module):
        assert np.array(layer._format.values(layer.packed)).tobytes() == dense[f"{path}.weight"].tobytes()
    assert models[0].handle.sites == models[1].handle.sites
    assert models[0].parameters == models[1].parameters
    assert "stays packed" in models[0].notes[-1] and not models[1].notes
    batch = token_batch()
    losses = []
    for model in models:
        adapter.inject(model.handle, lora(model.handle.sites))
        update = Update(learning_rate=3e-3, tokens=int(batch.loss_mask.sum()))
        losses.append([steps.sft_step(model.handle, [batch], update).loss for _ in range(3)])
    # The same products of the same numbers.
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_are_rounded_once_to_the_dtype_of_the_computation(tmp_path: Path, dtype: Any) -> None:
    source = write_base(tmp_path / "packed")
    dense = load_dense(source)
    for path, layer in packed_layers(loaded(source, dtype).handle.module):
        expected = mx.array(dense[f"{path}.weight"]).astype(getattr(mx, dtype))
        assert mx.array_equal(layer._format.dense(layer.packed), expected).item()
        assert layer.packed["scales"].dtype == mx.bfloat16


def test_large_weights_are_multiplied_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # 10 rows of 64 elements at a time, of 61.
    scheme, parts = Scheme("affine", 4, 32), quantized(random_weight(61, 64), "affine", 4, 32)
    format_ = Format(scheme, (61, 64), mx.float32)
    x, ahead = random_weight(5, 64), random_weight(5, 61)
    dense = format_.dense(parts)
    monkeypatch.setattr(packed, "ELEMENTS_AT_ONCE", 640)
    (product,), (gradient,) = mx.vjp(lambda x: multiply(x, format_, parts), [x], [ahead])
    assert mx.allclose(product, x @ dense.T, rtol=1e-6, atol=1e-5).item()
    assert mx.allclose(gradient, ahead @ dense, rtol=1e-6, atol=1e-5).item()


def test_a_gradient_keeps_no_dense_weight() -> None:
    scheme = Scheme("affine", 4, 64)
    layers = [quantized(0.05 * random_weight(256, 256), "affine", 4, 64) for _ in range(80)]
    format_ = Format(scheme, (256, 256), mx.float32)
    x = 0.1 * random_weight(4, 256)
    mx.eval(layers, x)

    def through_all(x: mx.array) -> mx.array:
        for parts in layers:
            x = multiply(x, format_, parts)
        return mx.sum(x)

    def with_plain_products(x: mx.array) -> mx.array:
        for parts in layers:
            x = x @ mx.stop_gradient(format_.dense(parts)).T
        return mx.sum(x)

    peaks = []
    for function in (through_all, with_plain_products):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(function)(x))
        peaks.append(mx.get_peak_memory() - before)
    dense_bytes = 256 * 256 * 4
    # MLX has some operations under way at once, of which each holds its arrays.
    assert peaks[1] > 60 * dense_bytes > 2 * peaks[0]


def test_a_table_gives_the_rows_that_are_asked_for() -> None:
    parts = quantized(random_weight(61, 64), "mxfp4", 4, 32)
    format_ = Format(Scheme("mxfp4", 4, 32), (61, 64), mx.float32)
    rows = mx.array([[3, 60], [0, 3]])
    assert mx.array_equal(take_rows(format_, parts, rows), format_.dense(parts)[rows]).item()


@pytest.mark.parametrize("group_size", [16, 24, 256])
def test_group_sizes_that_mlx_does_not_know(group_size: int) -> None:
    random = np.random.default_rng(0)
    columns = 2 * group_size
    levels = random.integers(0, 16, (3, columns), dtype=np.uint8)
    content = (levels[:, ::2] | levels[:, 1::2] << 4).view(np.uint32)
    scales, biases = random.standard_normal((2, 3, 2)).astype(np.float32)
    parts = {"weight": mx.array(content), "scales": mx.array(scales), "biases": mx.array(biases)}
    values = Format(Scheme("affine", 4, group_size), (3, columns), mx.float32).values(parts)
    expected = levels.reshape(3, 2, -1).astype(np.float32) * scales[..., None] + biases[..., None]
    assert np.array_equal(np.array(values), expected.reshape(3, columns))


def test_experts_are_multiplied_as_dense_ones() -> None:
    from mlx_lm.models.switch_layers import SwitchLinear

    layer = SwitchLinear(64, 32, 3)
    layer.bias = random_weight(3, 32)
    parts = quantized(random_weight(3, 32, 64), "affine", 4, 32)
    format_ = Format(Scheme("affine", 4, 32), (3, 32, 64), mx.float32)
    layer.weight = format_.dense(parts)
    stack: Any = packed_layer(layer, format_, parts)
    x, chosen = random_weight(5, 1, 1, 64), mx.array([[0, 2], [1, 0], [2, 1], [1, 2], [0, 1]])
    outputs = [mx.vjp(lambda x, kind=kind: kind(x, chosen), [x], [mx.ones((5, 2, 1, 32))]) for kind in (layer, stack)]
    for expected, values in zip(*outputs, strict=True):
        assert mx.array_equal(expected[0], values[0]).item()
    assert (stack.num_experts, stack.output_dims, stack.input_dims) == (3, 32, 64)


def test_layers_of_other_classes_are_not_packed() -> None:
    format_ = Format(Scheme("affine", 4, 32), (4, 32), mx.float32)
    assert packed_layer(nn.RMSNorm(32), format_, {}) is None
    assert isinstance(packed_layer(nn.Linear(32, 4), format_, {}), PackedLinear)
    assert isinstance(packed_layer(nn.Embedding(4, 32), format_, {}), PackedEmbedding)


def test_the_digest_sees_packed_elements_and_scales(tmp_path: Path) -> None:
    source = write_base(tmp_path / "packed")
    digest = base_digest(loaded(source).handle)
    for role in ("weight", "scales"):
        other = write_base(tmp_path / role)
        stored: Any = mx.load(str(other / "model.safetensors"))
        values = stored[f"model.layers.0.mlp.down_proj.{role}"]
        changed = values + mx.array(1, values.dtype) * (mx.arange(values.size).reshape(values.shape) == 5)
        edit(other, **{f"down_proj_{role}": changed})
        assert base_digest(loaded(other).handle) != digest


def test_single_layers_in_other_bits_or_in_full_precision(tmp_path: Path) -> None:
    source = write_base(tmp_path / "packed", **{"model.layers.0.mlp.down_proj": {"group_size": 32, "bits": 8}})
    values = quantized(random_weight(64, 96), "affine", 8, 32)
    edit(source, **{f"down_proj_{role}": part for role, part in values.items()})
    model = loaded(source)
    schemes = {path: layer._format.scheme.bits for path, layer in packed_layers(model.handle.module)}
    assert schemes["model.layers.0.mlp.down_proj"] == 8 and schemes["model.layers.0.mlp.up_proj"] == 4
    assert "some layers affine, 8 bits" in model.notes[-1]


def test_scales_that_are_not_finite(tmp_path: Path) -> None:
    source = edit(write_base(tmp_path), down_proj_scales=mx.full((64, 3), float("nan"), mx.bfloat16))
    with pytest.raises(ModelError, match=r"down_proj has scales that are NaN or infinite: download the model again"):
        loaded(source)
    source = edit(write_base(tmp_path, "mxfp4"), down_proj_scales=mx.full((64, 3), 255, mx.uint8))
    with pytest.raises(ModelError, match=r"down_proj has scales that are NaN or infinite"):
        loaded(source)


def test_tensors_that_do_not_fit_the_section(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not fit affine, 4 bits, groups of 64"):
        loaded(stated(write_base(tmp_path / "groups"), 64))
    with pytest.raises(ModelError, match=r"has scales and no biases"):
        loaded(edit(write_base(tmp_path / "biases"), down_proj_biases=None))
    with pytest.raises(ModelError, match=r"is packed and has no scales"):
        loaded(edit(write_base(tmp_path / "scales"), down_proj_scales=None))
    halves = edit(write_base(tmp_path / "rows"), **{
        f"down_proj_{role}": part for role, part in quantized(random_weight(32, 96), "affine", 4, 32).items()
    })  # fmt: skip
    with pytest.raises(ModelError, match=r"down_proj\.weight is \[32, 96\], its config\.json implies \[64, 96\]"):
        loaded(halves)


def stated(folder: Path, group_size: int) -> Path:
    config = json.loads((folder / "config.json").read_text())
    for name in ("quantization", "quantization_config"):
        config[name]["group_size"] = group_size
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_formats_that_are_not_known(tmp_path: Path) -> None:
    source = write_base(tmp_path)
    config = json.loads((source / "config.json").read_text())
    del config["quantization"]
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quant_method 'gptq' is not known here; formats that are read are MLX's"):
        loaded(source)
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="config.json has no section `quantization` that says how"):
        loaded(source)
