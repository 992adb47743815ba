"""Quantized bases: a packed base computes, trains and generates as its dequantized weights do, in a fraction of memory.

Both sides multiply the same numbers. The tolerances are for the order of sums alone, and most differences are 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_bases import save_pair
from safetensors.numpy import load_file, save_file

from mindprint.contract import AdapterState, LoadedModel, LoraConfig, LoraFactors, ModelSpec, Sampling, TokenBatch
from mindprint.contract import Update as Step
from mindprint.errors import ModelError
from mindprint.models.quantized import affine, quantized_weights
from mindprint.plugins.backend import Backend
from mindprint_torch import packed
from mindprint_torch.packed import PackedWeight
from mindprint_torch.packed_layers import PackedEmbedding, PackedLinear
from mindprint_torch.quantized import packed_layers, read_weight

FORMATS = (*(f"affine {bits}" for bits in (2, 3, 4, 5, 6, 8)), "mxfp4", "mxfp8", "nvfp4", "nf4", "nf4 double", "int8")

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder with a quantized base of a format and its dequantized twin, made once."""
    made: dict[tuple[str, str], Path] = {}

    def folder(kind: str, architecture: str = "qwen2") -> Path:
        method, _, bits = kind.partition(" ") if kind.startswith("affine") else (kind, "", "")
        if (kind, architecture) not in made:
            place = tmp_path_factory.mktemp("pair")
            made[kind, architecture] = save_pair(place, method, architecture, **({"bits": int(bits)} if bits else {}))
        return made[kind, architecture]

    return folder


def opened(backend: Backend, folder: Path, dtype: Any = "float32") -> LoadedModel:
    return backend.load_model(ModelSpec(str(folder), "cpu", dtype))


@pytest.mark.parametrize("kind", FORMATS)
def test_ten_steps_on_packed_weights_are_those_on_dense_ones(
    kind: str, backend: Backend, pair: Callable[..., Path], make_adapter: Make, token_batch: Make
) -> None:
    folder = pair(kind)
    both = [opened(backend, folder / name) for name in ("packed", "dense")]
    assert both[0].parameters == both[1].parameters
    sites = [backend.adapter_sites(model) for model in both]
    assert sites[0] == sites[1]
    digest = backend.base_digest(both[0])
    batch: TokenBatch = token_batch()
    results = []
    for model in both:
        bare = backend.log_probs(model, batch, adapter=False)
        backend.inject_adapter(model, make_adapter(model))
        update = Step(3e-3, tokens=batch.loss_tokens)
        losses = [backend.sft_step(model, [batch], update).loss for _ in range(10)]
        tuned = backend.log_probs(model, batch, adapter=True)
        assert np.array_equal(backend.log_probs(model, batch, adapter=False), bare)
        answers = backend.generate(model, [batch.tokens[0, :5], batch.tokens[1, :3]], Sampling(4, ()), adapter=True)
        results.append((np.array(losses), bare, tuned, [answer.tokens.tolist() for answer in answers]))
    (losses, bare, tuned, answers), expected = results
    assert (np.abs(losses - expected[0]) <= 1e-5 * (1 + expected[0])).all()
    assert np.abs(bare - expected[1]).max() < 1e-5 and np.abs(tuned - expected[2]).max() < 1e-4
    assert answers == expected[3]
    # The steps did something, and nothing to the base.
    assert losses[-1] < losses[0] - 0.01 and np.abs(tuned - bare).max() > 0.01
    assert backend.base_digest(both[0]) == digest


@pytest.mark.parametrize("kind", FORMATS)
def test_packed_rows_are_core_s_numbers_bit_for_bit(kind: str, pair: Callable[..., Path]) -> None:
    for weight in quantized_weights(pair(kind) / "packed").values():
        numbers = read_weight(weight, torch.float32, torch.device("cpu"))
        assert numbers.rows(0, weight.shape[0]).numpy().tobytes() == weight.values().tobytes()
        assert torch.equal(numbers.rows(3, 7), torch.from_numpy(weight.rows(3, 7)))
        chosen = torch.tensor([5, 0, 5])
        assert torch.equal(numbers.rows_at(chosen), torch.from_numpy(weight.values()[[5, 0, 5]]))
        rounded = read_weight(weight, torch.bfloat16, torch.device("cpu")).rows(0, weight.shape[0])
        assert torch.equal(rounded, torch.from_numpy(weight.values()).to(torch.bfloat16))


def test_weights_larger_than_a_block_give_the_same(
    backend: Backend, pair: Callable[..., Path], token_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(backend, pair("affine 4") / "packed")
    whole = backend.log_probs(model, token_batch(), adapter=False)
    monkeypatch.setattr(packed, "ELEMENTS_AT_ONCE", 5 * 64)
    monkeypatch.setattr(packed, "ELEMENTS_IN_CACHE", 2 * 64)
    assert np.abs(backend.log_probs(model, token_batch(), adapter=False) - whole).max() < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gemma2", "mistral"])
def test_families(
    architecture: str, backend: Backend, pair: Callable[..., Path], make_adapter: Make, token_batch: Make
) -> None:
    """Gemma's embedding scales what it looks up. Every linear layer is packed, and trained as a dense one is."""
    both = [opened(backend, pair("affine 4", architecture) / name) for name in ("packed", "dense")]
    layers = dict(packed_layers(both[0].handle.network))
    assert sum(isinstance(layer, PackedLinear) for layer in layers.values()) == 15
    assert sum(isinstance(layer, PackedEmbedding) for layer in layers.values()) == 1
    values = []
    for model in both:
        backend.inject_adapter(model, make_adapter(model))
        batch = token_batch()
        backend.sft_step(model, [batch], Step(3e-3, tokens=batch.loss_tokens))
        values.append(backend.log_probs(model, batch, adapter=True))
    assert np.abs(values[0] - values[1]).max() < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_of_16_bits_round_each_weight_once(
    dtype: Any, backend: Backend, pair: Callable[..., Path], token_batch: Make
) -> None:
    folder = pair("affine 3")
    values = [
        backend.log_probs(opened(backend, folder / name, dtype), token_batch(), adapter=False)
        for name in ("packed", "dense")
    ]
    assert np.array_equal(*values)


def test_lora_on_the_embedding_and_the_head(backend: Backend, tmp_path: Path, token_batch: Make) -> None:
    folder = save_pair(tmp_path, "affine", "llama", tie_word_embeddings=False)
    random, values = np.random.default_rng(0), []
    names = ("model.embed_tokens", "lm_head")
    for name in ("packed", "dense"):
        model = opened(backend, folder / name)
        sites = {site.name: site for site in backend.adapter_sites(model)}
        random = np.random.default_rng(0)
        factors = {
            site: LoraFactors(
                random.normal(0, 0.1, (2, sites[site].in_features)).astype(np.float32),
                random.normal(0, 0.1, (sites[site].out_features, 2)).astype(np.float32),
            )
            for site in names
        }
        backend.inject_adapter(model, AdapterState(LoraConfig(2, 4.0, names), factors))
        batch = token_batch()
        losses = [backend.sft_step(model, [batch], Step(1e-2, tokens=batch.loss_tokens)).loss for _ in range(3)]
        values.append(losses)
    assert np.abs(np.subtract(*values)).max() < 1e-5


def test_a_checkpoint_is_continued_on_packed_weights(
    backend: Backend, pair: Callable[..., Path], make_adapter: Make, token_batch: Make
) -> None:
    batch = token_batch()
    update = Step(3e-3, tokens=batch.loss_tokens, gradient_checkpointing=True)
    model = opened(backend, pair("affine 4") / "packed")
    backend.inject_adapter(model, make_adapter(model))
    backend.sft_step(model, [batch], update)
    state = backend.save(model)
    expected = backend.sft_step(model, [batch], update).loss
    other = opened(backend, pair("affine 4") / "packed")
    backend.inject_adapter(other, state.adapter)
    backend.restore(other, state)
    assert backend.sft_step(other, [batch], update).loss == expected


def test_memory_is_that_of_the_packed_tensors(backend: Backend, pair: Callable[..., Path]) -> None:
    model = opened(backend, pair("affine 4") / "packed")
    held = {
        id(tensor): tensor.untyped_storage().nbytes()
        for layer in model.handle.network.modules()
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    }
    parts = [tensor for _, layer in packed_layers(model.handle.network) for tensor in layer.packed.parts.values()]
    held |= {id(tensor): tensor.untyped_storage().nbytes() for tensor in parts}
    # 4 bits, and 16 for each scale and bias of 32 elements. Norms and biases are the rest, in float32.
    assert sum(held.values()) <= 5 / 8 * model.parameters + 4 * 1100
    assert all(isinstance(layer.packed, PackedWeight) for _, layer in packed_layers(model.handle.network))
    assert torch.isnan(dict(packed_layers(model.handle.network))["lm_head"].weight).all()


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    return save_pair(tmp_path, "affine") / "packed"


def edit(folder: Path, change: Callable[[dict[str, Any]], object], **config: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stated, **config}))


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (lambda tensors: tensors[f"{DOWN}.scales"].fill(np.nan), {}, "scales that are NaN or infinite"),
        (lambda tensors: tensors.pop(f"{DOWN}.scales"), {}, "down_proj"),
        (lambda _: None, {"intermediate_size": 64}, "config.json implies"),
        (lambda _: None, {"quantization": {"group_size": 64, "bits": 4}}, "does not fit"),
        (lambda _: None, {"model_type": "mixtral"}, "mixtral is quantized in MLX's format"),
        (lambda _: None, {"quantization": None}, "no section `quantization`"),
        (lambda _: None, {"quantization": {"quant_method": "awq", "bits": 4}}, "'awq' is not known"),
        (lambda tensors: tensors.update({"model.other.weight": tensors.pop("model.norm.weight")}), {}, "norm.weight"),
    ],
    ids=["nan", "no scales", "shape", "group size", "family", "unstated", "awq", "name"],
)
def test_bases_that_are_refused(
    backend: Backend, broken: Path, change: Callable[[dict[str, Any]], object], config: dict[str, Any], words: str
) -> None:
    edit(broken, change, **config)
    with pytest.raises(ModelError, match=words) as caught:
        opened(backend, broken)
    assert str(broken) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["nf4", "4bit", "8bit"])
def test_a_full_precision_base_is_packed_while_it_is_loaded(
    method: Any, backend: Backend, pair: Callable[..., Path], make_adapter: Make, token_batch: Make
) -> None:
    """Linear layers are packed, but for the head and those whose rows are no whole number of groups of 64."""
    folder = pair("affine 4") / "dense"
    model = backend.load_model(ModelSpec(str(folder), "cpu", "float32", quantize=method))
    layers, stored = dict(packed_layers(model.handle.network)), load_file(folder / "model.safetensors")
    assert len(layers) == 12 and not any("down_proj" in path or "embed" in path for path in layers)
    for path, layer in layers.items():
        weight = stored[f"{path}.weight"]
        if method == "nf4":
            functional = import_module("bitsandbytes.functional")
            settings = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4"}
            expected = functional.dequantize_4bit(*functional.quantize_4bit(torch.from_numpy(weight), **settings))
        else:
            bits = int(method[0])
            expected = torch.from_numpy(affine.dequantize(*affine.quantize(weight, bits, 64), bits, 64))
        assert torch.equal(layer.packed.rows(0, len(weight)), expected)
    backend.inject_adapter(model, make_adapter(model))
    batch = token_batch()
    losses = [backend.sft_step(model, [batch], Step(3e-3, tokens=batch.loss_tokens)).loss for _ in range(3)]
    assert losses[2] < losses[0]
    dense = opened(backend, folder)
    assert model.parameters == dense.parameters
    far = np.abs(backend.log_probs(model, batch, adapter=False) - backend.log_probs(dense, batch, adapter=False)).max()
    assert 0 < far < 2
