"""Folders that mlx-lm quantized and saved, read on PyTorch: each weight gets to its place with its own values.

A small random model of each family is saved by transformers, quantized and saved by mlx-lm's own code, and opened here.
Its logits are those of transformers' class over the dequantized weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from mindprint.contract import ModelSpec
from mindprint.models.quantized.mlx_names import MLX_NAMES
from mindprint.plugins.backend import load_backend

TEXT = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 14,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
}

WRAPPERS: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **TEXT, **SLIDING, "query_pre_attn_scalar": 16},
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "image_size": 28},
        "mm_tokens_per_image": 4,
        "image_token_index": 130,
    },
    "gemma4": {
        "text_config": {
            "model_type": "gemma4_text",
            **TEXT,
            **SLIDING,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 131,
        },
        "vision_config": {**VISION, "num_key_value_heads": 2, "head_dim": 16},
        "image_token_id": 130,
        "video_token_id": 129,
        "audio_token_id": 128,
    },
    "mistral3": {
        "text_config": {"model_type": "ministral3", **TEXT},
        "vision_config": {"model_type": "pixtral", **VISION, "image_size": 28},
        "image_token_index": 130,
    },
    "qwen3_5": {
        "text_config": {"model_type": "qwen3_5_text", **TEXT, **LINEAR, "head_dim": 32},
        "vision_config": QWEN_VISION,
        "image_token_id": 130,
        "video_token_id": 129,
        "vision_start_token_id": 128,
        "vision_end_token_id": 127,
    },
}
PLAIN = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("kind", [*PLAIN, *sorted(WRAPPERS)])
def test_a_folder_of_mlx_lm_is_the_dequantized_model(kind: str, tmp_path: Path) -> None:
    mx.set_default_device(mx.cpu)
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**WRAPPERS.get(kind, {**TEXT, **(SLIDING if "gemma" in kind else {})}))
    network = (AutoModelForImageTextToText if kind in WRAPPERS else AutoModelForCausalLM).from_config(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    network.save_pretrained(tmp_path / "full")
    _state_all(tmp_path / "full", kind)
    module, settings = quantize_model(*load_model(tmp_path / "full"), 32, 4)
    save_model(tmp_path / "packed", module)
    save_config(settings, tmp_path / "packed" / "config.json")
    tokens = torch.randint(3, 120, (2, 20))
    loaded = load_backend("torch").load_model(ModelSpec(str(tmp_path / "packed"), "cpu", "float32", "mlx-4bit"))
    with torch.no_grad():
        for name, layer in network.named_modules():
            packed = getattr(_module(loaded.handle.network, name), "packed", None)
            if packed is not None:
                layer.weight.copy_(packed.rows(0, packed.shape[0]))
                # The values are those of this very layer, give or take the rounding to 16 levels.
        expected = network(input_ids=tokens).logits
        logits = loaded.handle.network(input_ids=tokens).logits
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert kind in MLX_NAMES


def test_packed_values_are_near_those_of_their_layer(tmp_path: Path) -> None:
    """A weight in the wrong place would pass above, where both sides take the values of the packed one."""
    for kind in ("qwen3_5", "gemma4"):
        mx.set_default_device(mx.cpu)
        torch.manual_seed(0)
        network = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[kind](**WRAPPERS[kind])).eval()
        network.save_pretrained(tmp_path / kind)
        _state_all(tmp_path / kind, kind)
        module, settings = quantize_model(*load_model(tmp_path / kind), 32, 8)
        save_model(tmp_path / f"{kind}-8", module)
        save_config(settings, tmp_path / f"{kind}-8" / "config.json")
        loaded = load_backend("torch").load_model(ModelSpec(str(tmp_path / f"{kind}-8"), "cpu", "float32"))
        compared = 0
        for name, layer in network.named_modules():
            packed = getattr(_module(loaded.handle.network, name), "packed", None)
            if packed is not None:
                apart = (packed.rows(0, packed.shape[0]) - layer.weight).abs().max()
                assert apart <= 0.02 * layer.weight.abs().max(), name
                compared += 1
        assert compared > 10


def _module(network: torch.nn.Module, name: str) -> Any:
    try:
        return network.get_submodule(name)
    except AttributeError:
        return None


def _state_all(folder: Path, kind: str) -> None:
    """Write the settings that mlx-lm's classes look for, and that transformers leaves out or keeps elsewhere."""
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = TEXT["vocab_size"]
    if kind in WRAPPERS:
        tied = {"tie_word_embeddings": config.get("tie_word_embeddings", False), "full_attention_interval": 2}
        config["text_config"] |= {**WRAPPERS[kind]["text_config"], **tied}
    for part in (config, config.get("text_config", {})):
        part["rope_theta"] = (part.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    (folder / "config.json").write_text(json.dumps(config))
