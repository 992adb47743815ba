"""Adapters of PEFT and mlx-lm as files: what is read, what is refused and by which name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import mindprint
from mindprint.adapter import mlx_lm_format, peft_format
from mindprint.adapter.base_facts import BaseFacts
from mindprint.adapter.formats import read_any_adapter
from mindprint.contract import AdapterState, LoraConfig, LoraFactors
from mindprint.errors import AdapterError

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
TABLE, GATE_UP = "model.embed_tokens", "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.0.mlp.experts.down_proj"
LLAMA, MOE = BaseFacts("llama", 2, tied=False), BaseFacts("qwen3_moe", 1, tied=False)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def adapter(*sites: str, **config: Any) -> AdapterState:
    tensors = {site: LoraFactors(draw(2, 6, seed=i), draw(4, 2, seed=i)) for i, site in enumerate(sites)}
    return AdapterState(LoraConfig(2, 4.0, sites, **config), tensors)


def experts() -> AdapterState:
    tensors = {DOWN: LoraFactors(draw(3, 2, 5), draw(3, 6, 2)), GATE_UP: LoraFactors(draw(3, 2, 6), draw(3, 10, 2))}
    return AdapterState(LoraConfig(2, 4.0, tuple(tensors)), tensors)


def peft_folder(folder: Path, state: AdapterState, **changes: Any) -> Path:
    folder.mkdir()
    peft_format.write_adapter(folder, state, "org/base")
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def same(one: AdapterState, other: AdapterState) -> bool:
    if one.tensors.keys() != other.tensors.keys():
        return False
    return all(all(map(np.array_equal, pair, other.tensors[site])) for site, pair in one.tensors.items())


def test_an_embedding_lies_under_pefts_names(tmp_path: Path) -> None:
    state = adapter(Q, TABLE)
    assert peft_format.tensor_names(TABLE) == (
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.lora_embedding_B",
    )
    assert same(peft_format.read_adapter(peft_folder(tmp_path / "a", state))[0], state)


def test_stacked_experts_lie_flat_and_nested(tmp_path: Path) -> None:
    """A `[r·E, in]` expert by expert, B `[out, r·E]` with experts fastest; the parameter declared last is outside."""
    state = experts()
    flat = peft_format.to_tensors(state.tensors)
    host = "base_model.model.model.layers.0.mlp.experts"
    a, b = flat[f"{host}.base_layer.lora_A.weight"], flat[f"{host}.base_layer.lora_B.weight"]
    assert (a.shape, b.shape, flat[f"{host}.lora_A.weight"].shape) == ((6, 6), (10, 6), (6, 5))
    expert, row, rank = 1, 7, 1
    assert a[expert * 2 + rank, 3] == state.tensors[GATE_UP].a[expert, rank, 3]
    assert b[row, rank * 3 + expert] == state.tensors[GATE_UP].b[expert, row, rank]
    read, _ = peft_format.read_adapter(peft_folder(tmp_path / "a", state))
    assert same(read, state)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.(q|v)_proj", "all-linear"])
def test_targets_may_be_endings_a_pattern_or_a_shorthand(targets: object, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", adapter(Q, V), target_modules=targets)
    assert peft_format.read_adapter(folder)[0].config.target_modules == (Q, V)


def test_patterns_are_regular_expressions_on_the_ends_of_names(tmp_path: Path) -> None:
    state = adapter(Q, V)
    state.tensors[V] = LoraFactors(draw(3, 6), draw(4, 3))  # type: ignore[index]
    patterns = {"rank_pattern": {"v_proj": 3, r"layers\.1\..*": 9}, "alpha_pattern": {r"layers\.[0].*": 1}}
    folder = peft_folder(tmp_path / "a", state, target_modules=["q_proj", "v_proj"], **patterns)
    read, _ = peft_format.read_adapter(folder)
    assert (read.config.rank_pattern, read.config.alpha_pattern) == ({V: 3}, {Q: 1.0})
    assert (read.config.scale(Q), read.config.scale(V)) == (0.5, 4 / 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora = true is not plain LoRA: DoRA, whose magnitudes"),
        ({"bias": "all"}, 'bias = "all" is not plain LoRA: trained biases'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .* whole modules in addition to LoRA"),
        ({"peft_type": "LOHA"}, 'peft_type = "LOHA" is not plain LoRA'),
        ({"task_type": "SEQ_CLS"}, 'task_type = "SEQ_CLS" is not plain LoRA'),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = .* changes the base's weights"),
        ({"some_new_variant": {"x": 1}}, "some_new_variant = .* is not plain LoRA"),
        ({"lora_alpha": None}, "lora_alpha must be a number, found None"),
        ({"r": 3}, "A is \\[2, 6\\] and B \\[4, 2\\], and adapter_config.json says rank 3"),
        ({"target_modules": ["q_proj"]}, "has tensors for .*v_proj, which adapter_config.json does not target"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "has no tensors for o_proj, which adapter_config.json"),
        ({"lora_parameters": {}}, "names both of peft_type"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_no_plain_lora_is_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=words):
        read_any_adapter(peft_folder(tmp_path / "a", adapter(Q, V), **changes))


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", adapter(Q))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="adapter_model.bin is a pickle, which can run code"):
        read_any_adapter(folder)


def mlx_folder(folder: Path, state: AdapterState, base: BaseFacts = LLAMA) -> tuple[Path, tuple[str, ...]]:
    folder.mkdir()
    return folder, mlx_lm_format.write_adapter(folder, state, base, "org/base")


def lora_parameters(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text())["lora_parameters"])


def test_mlx_lm_has_the_transposes_and_a_scale(tmp_path: Path) -> None:
    folder, notes = mlx_folder(tmp_path / "a", adapter(Q, V))
    assert notes == ()
    assert lora_parameters(folder) == {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": [Q, V]}
    read, named = mlx_lm_format.read_adapter(folder)
    assert (same(read, adapter(Q, V)), named, read.config.scale(Q)) == (True, "org/base", 2.0)


def test_layers_that_are_alike_are_named_once(tmp_path: Path) -> None:
    upper = (V.replace("v_proj", "k_proj"), V)
    folder, _ = mlx_folder(tmp_path / "a", adapter(*upper))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["num_layers"], config["lora_parameters"]["keys"]) == (1, ["self_attn.k_proj", "self_attn.v_proj"])


def test_ranks_are_filled_up_and_scales_go_into_b(tmp_path: Path) -> None:
    state = adapter(Q, V, rank_pattern={V: 1}, alpha_pattern={V: 1.0})
    state.tensors[V] = LoraFactors(draw(1, 6), draw(4, 1))  # type: ignore[index]
    folder, notes = mlx_folder(tmp_path / "a", state)
    assert len(notes) == 2
    assert (lora_parameters(folder)["rank"], lora_parameters(folder)["scale"]) == (2, 2.0)
    read, _ = mlx_lm_format.read_adapter(folder)
    a, b = read.tensors[V]
    assert a.shape == (2, 6) and not a[1].any() and not b[:, 1].any()
    assert np.array_equal(2.0 * (b @ a), 1.0 * (state.tensors[V].b @ state.tensors[V].a))


def test_experts_become_three_stacks_and_come_back(tmp_path: Path) -> None:
    folder, _ = mlx_folder(tmp_path / "a", experts(), MOE)
    assert lora_parameters(folder)["keys"] == [f"mlp.switch_mlp.{part}_proj" for part in ("down", "gate", "up")]
    (tmp_path / "base").mkdir()
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "tie_word_embeddings": False}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert same(read_any_adapter(folder, tmp_path / "base")[0], experts())
    with pytest.raises(AdapterError, match="switch_mlp.* depends on the base; name the base with --model"):
        read_any_adapter(folder)


def test_gate_and_up_that_were_trained_apart_need_both_ranks() -> None:
    gate, up = LoraFactors(draw(3, 2, 6), draw(3, 5, 2)), LoraFactors(draw(3, 2, 6, seed=1), draw(3, 5, 2, seed=1))
    a, b = mlx_lm_format._fused(gate, up)
    assert (a.shape, b.shape) == ((3, 4, 6), (3, 10, 4))
    assert np.allclose(b @ a, np.concatenate([gate.b @ gate.a, up.b @ up.a], axis=1), atol=1e-5)


def test_a_tied_embedding_is_the_head_too(tmp_path: Path) -> None:
    tied = BaseFacts("llama", 2, tied=True)
    with pytest.raises(AdapterError, match="embed_tokens is the LM head as well .* mlx-lm would change both"):
        mlx_folder(tmp_path / "a", adapter(TABLE), tied)
    a, b = draw(2, 6), draw(4, 2)
    both = {"lm_head": LoraFactors(b.T, a.T), TABLE: LoraFactors(a, b)}
    state = AdapterState(LoraConfig(2, 4.0, tuple(both)), both)
    folder, _ = mlx_folder(tmp_path / "b", state, tied)
    assert lora_parameters(folder)["keys"] == [TABLE]
    assert same(mlx_lm_format.read_adapter(folder, tied)[0], state)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type = 'dora' is DoRA"),
        ({"fine_tune_type": "full"}, "is whole weights, no adapter"),
        ({"lora_parameters": {"rank": 2, "alpha": 4}}, "scale is missing: it says alpha, which mlx-lm does not read"),
        ({"lora_parameters": {"rank": 4, "scale": 2.0}}, "lora_a is .* and adapter_config.json says rank 4"),
        ({"lora_parameters": {"rank": 2, "scale": 2.0, "keys": ["o_proj"]}}, "which adapter_config.json does not name"),
    ],
)
def test_what_mlx_lm_means_otherwise_is_refused(config: Mapping[str, Any], words: str, tmp_path: Path) -> None:
    lora = {"rank": 2, "scale": 2.0, "dropout": 0.0}
    save_file({f"{Q}.lora_a": draw(6, 2), f"{Q}.lora_b": draw(2, 4)}, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_parameters": lora, **config}))
    with pytest.raises(AdapterError, match=words):
        read_any_adapter(tmp_path)


def test_training_goes_on_from_an_adapter(toy: str, toy_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 2
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "model": {"name": str(toy_model)},
        "backend": toy,
        "data": {"path": str(tmp_path)},
        "adapter": {"r": 2, "alpha": 4},
        "sft": {"steps_per_topic": 2, "learning_rate": 1e-2},
        "dpo": {"enabled": False},
    }
    first = mindprint.train(config, run=tmp_path / "first").adapter
    config["adapter"] = {"r": 2, "alpha": 4, "start_from": str(first)}
    second = mindprint.train(config, run=tmp_path / "second")
    start = read_any_adapter(tmp_path / "second" / "checkpoints" / "000000")[0]
    assert same(start, read_any_adapter(first)[0])
    assert not same(start, read_any_adapter(second.adapter)[0])
    with pytest.raises(AdapterError, match="adapter.r is 4 and this adapter has 2: set adapter.r=2"):
        mindprint.train(config | {"adapter": {"r": 4, "start_from": str(first)}}, run=tmp_path / "third")
