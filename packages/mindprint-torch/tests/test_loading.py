"""Loading a base: its state afterwards, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindprint.contract import Dtype, LoadedModel, ModelSpec
from mindprint.errors import ModelError
from mindprint.plugins.backend import Backend

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture
def copy(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder of a qwen2 model that a test may spoil."""
    return Path(shutil.copytree(folders("qwen2"), tmp_path / "model"))


def refusal(backend: Backend, folder: Path, **spec: Any) -> str:
    with pytest.raises(ModelError) as caught:
        backend.load_model(ModelSpec(**{"path": str(folder), "device": "cpu", "dtype": "float32", **spec}))
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_loaded_base_is_frozen_and_in_the_dtype_asked_for(load: Callable[..., LoadedModel], dtype: Dtype) -> None:
    model = load("llama", dtype)
    network = model.handle.network
    assert {parameter.dtype for parameter in network.parameters()} == {TORCH_DTYPES[dtype]}
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.modules())
    assert model.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert (model.vocab_size, model.device, model.dtype) == (61, "cpu", dtype)


def test_tied_output_weights_are_not_missing_and_count_once(load: Callable[..., LoadedModel]) -> None:
    tied, untied = load("qwen2"), load("llama")
    biases = 2 * (32 + 16 + 16)
    assert untied.parameters - (tied.parameters - biases) == 61 * 32


def test_loading_says_nothing(load: Callable[..., LoadedModel], capfd: pytest.CaptureFixture[str]) -> None:
    load("qwen2")
    assert capfd.readouterr() == ("", "")


def test_missing_weights_are_named(backend: Backend, copy: Path) -> None:
    edit_weights(copy, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert "1 weights are missing from the files: model.layers.1.mlp.up_proj.weight" in refusal(backend, copy)


def test_weights_of_another_shape_are_named(backend: Backend, copy: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_weights(copy, lambda weights: weights.update({name: weights[name][:7].clone()}))
    assert f"another shape than config.json: {name}" in refusal(backend, copy)


def test_weights_that_belong_to_nothing_are_noted(backend: Backend, copy: Path) -> None:
    edit_weights(copy, lambda weights: weights.update({"vision.tower": torch.ones(3)}))
    model = backend.load_model(ModelSpec(str(copy), "cpu", "float32"))
    assert model.notes == ("1 weights in the files are not part of the model: vision.tower",)


def test_no_weights_at_all(backend: Backend, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "has no weights (model.safetensors" in refusal(backend, copy)


def test_truncated_weights(backend: Backend, copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "is truncated" in refusal(backend, copy)


def test_no_config(backend: Backend, tmp_path: Path) -> None:
    assert "no config.json there" in refusal(backend, tmp_path)


def test_config_that_is_not_json(backend: Backend, copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert "JSON" in refusal(backend, copy)


def test_unknown_architecture(backend: Backend, copy: Path) -> None:
    edit_config(copy, model_type="nobody_wrote_this", architectures=["NobodyForCausalLM"])
    assert "nobody_wrote_this" in refusal(backend, copy)


def test_architecture_that_is_no_language_model(backend: Backend, copy: Path) -> None:
    edit_config(copy, model_type="vit", architectures=["ViTModel"])
    assert "cannot load it" in refusal(backend, copy)


def test_encoder_decoder(backend: Backend, copy: Path) -> None:
    edit_config(copy, model_type="t5", architectures=["T5ForConditionalGeneration"])
    assert "encoder-decoder" in refusal(backend, copy)


def test_quantized_base_by_its_config(backend: Backend, copy: Path) -> None:
    edit_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quant_method 'gptq' is not known here" in refusal(backend, copy)


def test_quantized_base_by_the_spec(backend: Backend, copy: Path) -> None:
    assert "quantized (awq)" in refusal(backend, copy, quantization="awq")


def test_adapter_folder_instead_of_a_base(backend: Backend, copy: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refusal(backend, copy)


def test_weights_that_are_not_finite(backend: Backend, copy: Path) -> None:
    edit_weights(copy, lambda weights: weights["model.norm.weight"].fill_(torch.nan))
    assert "not finite" in refusal(backend, copy)


def test_release_drops_the_weights(backend: Backend, copy: Path) -> None:
    model = backend.load_model(ModelSpec(str(copy), "cpu", "float32"))
    backend.release(model)
    assert vars(model.handle) == {}
