"""Merging into GGUF on a small model, read back with the package gguf. `nox -s gguf` compares with llama.cpp itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import pre_tokenizers

import mindprint
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from mindprint.adapter import peft_format
from mindprint.cli import main
from mindprint.contract import AdapterState, LoraConfig, LoraFactors
from mindprint.errors import AdapterError, BackendError, ConfigError, MindprintError, ModelError, RunError
from mindprint.plugins.entries import DISABLE

HEADS, KEYS, WIDTH, HEAD, INNER = 4, 2, 64, 16, 96
Q, K, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"
SITES = {Q: "blk.0.attn_q.weight", K: "blk.0.attn_k.weight", UP: "blk.0.ffn_up.weight"}


@pytest.fixture(autouse=True)
def _without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    # These models are too small a part of a Llama for it to load.
    monkeypatch.setenv(DISABLE, "llamacpp")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def write_base(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """Write a random Llama of one layer, with a tokenizer that knows every byte."""
    folder.mkdir()
    vocabulary = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    config = {
        "model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": KEYS,
        "hidden_size": WIDTH, "intermediate_size": INNER, "tie_word_embeddings": True, "vocab_size": 260,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 5000.0},
        "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | settings))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "model": {"type": "BPE", "vocab": {token: n for n, token in enumerate(vocabulary)}, "merges": [["a", "b"]]},
        "added_tokens": [{"id": 0, "content": "<|end|>", "special": True}], "pre_tokenizer": byte_level,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": "{{ x }}"}))
    shapes = {
        "model.embed_tokens": (260, WIDTH), Q: (HEADS * HEAD, WIDTH), K: (KEYS * HEAD, WIDTH), UP: (INNER, WIDTH),
        "model.layers.0.self_attn.v_proj": (KEYS * HEAD, WIDTH), "model.norm": (WIDTH,),
    }  # fmt: skip
    random = np.random.default_rng(seed)
    weights = {f"{name}.weight": random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def write_adapter(folder: Path, size: float = 1.0) -> Path:
    random = np.random.default_rng(1)
    shapes = {Q: (HEADS * HEAD, WIDTH), K: (KEYS * HEAD, WIDTH), UP: (INNER, WIDTH)}
    factors = {}
    for site, (rows, columns) in shapes.items():
        a, b = random.standard_normal((2, columns)), size * random.standard_normal((rows, 2))
        factors[site] = LoraFactors(a.astype(np.float32), b.astype(np.float32))
    folder.mkdir()
    peft_format.write_adapter(folder, AdapterState(LoraConfig(2, 3.0, tuple(SITES)), factors), "base")
    return folder


def expected(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    """Return the merged weights under llama.cpp's names, computed from the two folders' files alone."""
    weights, factors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    merged = {}
    for site, name in SITES.items():
        a, b = (factors[f"base_model.model.{site}.lora_{part}.weight"] for part in "AB")
        merged[name] = weights[f"{site}.weight"] + np.float32(1.5) * (b @ a)
    for name, heads in (("blk.0.attn_q.weight", HEADS), ("blk.0.attn_k.weight", KEYS)):
        # Row i of a head's first half becomes row 2i, and its partner of the second half row 2i + 1.
        halves = merged[name].reshape(heads, 2, HEAD // 2, WIDTH)
        merged[name] = np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(heads * HEAD, WIDTH)
    return merged


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in GGUFReader(file).tensors
    }


def key_of(file: Path, name: str) -> Any:
    return GGUFReader(file).fields[name].contents()


def into_file(base: Path, kind: str = "F32", **changes: Any) -> Path:
    """Write the base's own GGUF file as another tool would, with a key that Mindprint does not know."""
    weights = load_file(base / "model.safetensors")
    file = base.parent / f"base-{kind}.gguf"
    writer = GGUFWriter(file, changes.get("architecture", "llama"))
    writer.add_uint32("general.file_type", 99)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("other.numbers", [1.5, 2.5])
    writer.add_bool("other.flag", True)
    kind_of = GGMLQuantizationType[kind]
    for site, name in SITES.items():
        values = weights[f"{site}.weight"]
        if site in (Q, K):
            heads = HEADS if site == Q else KEYS
            values = values.reshape(heads, 2, HEAD // 2, WIDTH).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(name, quants.quantize(np.ascontiguousarray(values), kind_of), raw_dtype=kind_of)
    writer.add_tensor("blk.0.attn_v.weight", weights["model.layers.0.self_attn.v_proj.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_file_from_the_folder_has_every_weight_and_key(base: Path, adapter: Path) -> None:
    out = base.parent / "voice.gguf"
    result = mindprint.merge(adapter, out, model=str(base), to="gguf", file_type="f32")
    assert set(result.changed) == set(SITES.values())
    written, wanted = tensors_of(out), expected(base, adapter)
    for name, values in wanted.items():
        np.testing.assert_allclose(written[name], values, rtol=1e-6, atol=1e-6)
    weights = load_file(base / "model.safetensors")
    np.testing.assert_array_equal(written["token_embd.weight"], weights["model.embed_tokens.weight"])
    keys = {
        "general.architecture": "llama", "llama.block_count": 1, "llama.attention.head_count_kv": KEYS,
        "llama.rope.freq_base": 5000.0, "llama.rope.dimension_count": HEAD, "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.merges": ["a b"], "tokenizer.chat_template": "{{ x }}",
    }  # fmt: skip
    assert {name: key_of(out, name) for name in keys} == keys
    # Rows of the embedding that no token has: 258 tokens, 260 rows.
    assert key_of(out, "tokenizer.ggml.tokens")[-1] == "[PAD259]"
    assert key_of(out, "tokenizer.ggml.token_type")[0] == 3


@pytest.mark.parametrize(("kind", "bound"), [("f16", 5e-4), ("bf16", 4e-3), ("q8_0", 1e-2)])
def test_the_types_round_as_little_as_they_have_to(base: Path, adapter: Path, kind: Any, bound: float) -> None:
    out = base.parent / "voice.gguf"
    mindprint.merge(adapter, out, model=str(base), to="gguf", file_type=kind)
    for name, values in expected(base, adapter).items():
        found = tensors_of(out)[name]
        assert 0 < np.linalg.norm(found - values) / np.linalg.norm(values) < bound
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(out).tensors}
    assert types["blk.0.ffn_up.weight"] == kind.upper()
    assert types["output_norm.weight"] == "F32"


def test_the_bases_own_file_keeps_its_keys_and_other_tensors(base: Path, adapter: Path) -> None:
    file, out = into_file(base), base.parent / "voice.gguf"
    mindprint.merge(adapter, out, model=str(base), into=str(file), to="gguf")
    for name, values in expected(base, adapter).items():
        np.testing.assert_allclose(tensors_of(out)[name], values, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(tensors_of(out)["blk.0.attn_v.weight"], tensors_of(file)["blk.0.attn_v.weight"])
    for name in ("general.file_type", "tokenizer.ggml.tokens", "other.numbers", "other.flag"):
        assert key_of(out, name) == key_of(file, name)
    assert GGUFReader(out).fields["other.numbers"].types == GGUFReader(file).fields["other.numbers"].types
    assert key_of(out, "mindprint.adapter") == "adapter"


def test_a_small_change_is_lost_in_a_file_of_8_bits_and_kept_in_16(base: Path) -> None:
    small, file, out = write_adapter(base.parent / "small", 1e-4), into_file(base, "Q8_0"), base.parent / "voice.gguf"
    with pytest.raises(AdapterError, match=r"rounding to Q8_0 leaves 0\.\d\d of the adapter's change") as caught:
        mindprint.merge(small, out, model=str(base), into=str(file), to="gguf")
    assert "--type f16" in str(caught.value)
    assert not out.exists()
    # From the folder, whose weights are on no grid, the rounding keeps it on average, and F16 keeps it everywhere.
    mindprint.merge(small, out, model=str(base), into=str(file), to="gguf", file_type="f32")
    assert key_of(out, "general.file_type") == 0


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda base: into_file(base, "Q4_0"), AdapterError, "is Q4_0 in this file"),
        (
            lambda base: into_file(write_base(base.parent / "other", seed=7)),
            ModelError,
            "is not a file of .*differs by",
        ),
        (lambda base: into_file(base, architecture="qwen2"), ModelError, "its architecture is 'qwen2'"),
        (lambda base: base.parent / "missing.gguf", ModelError, "no such file"),
        (lambda base: broken(base, 40), ModelError, "is not a whole GGUF file"),
        (lambda base: broken(base, -4000), ModelError, "is not a whole GGUF file"),
        (lambda base: broken(base, 0), ModelError, "is not a whole GGUF file"),
    ],
    ids=["4 bits", "another base", "another architecture", "missing", "cut in its header", "cut in its data", "empty"],
)
def test_files_that_are_refused_in_a_line(base: Path, adapter: Path, make: Any, error: type, says: str) -> None:
    out = base.parent / "voice.gguf"
    with pytest.raises(error, match=says) as caught:
        mindprint.merge(adapter, out, model=str(base), into=str(make(base)), to="gguf")
    assert isinstance(caught.value, MindprintError)
    assert "\n" not in str(caught.value)
    assert not [path for path in base.parent.iterdir() if "voice" in path.name]


def broken(base: Path, length: int) -> Path:
    file = into_file(base)
    file.write_bytes(file.read_bytes()[:length])
    return file


def test_what_cannot_be_written_from_a_folder_names_the_other_way(base: Path, adapter: Path) -> None:
    def refused(says: str) -> None:
        with pytest.raises(AdapterError, match=says) as caught:
            mindprint.merge(adapter, base.parent / "voice.gguf", model=str(base), to="gguf")
        assert "--into base.gguf" in str(caught.value)

    config, tokenizer = (json.loads((base / name).read_text()) for name in ("config.json", "tokenizer.json"))
    (base / "tokenizer.json").write_text(json.dumps(tokenizer | {"pre_tokenizer": {"type": "Whitespace"}}))
    refused("splits text in a way")
    (base / "config.json").write_text(json.dumps(config | {"rope_scaling": {"type": "yarn"}, "rope_parameters": None}))
    refused("rotary embeddings of type 'yarn'")
    (base / "config.json").write_text(json.dumps(config | {"model_type": "gemma3_text"}))
    refused("a GGUF file of model_type 'gemma3_text'")


def test_options_that_do_not_go_together(base: Path, adapter: Path) -> None:
    out = base.parent / "voice.gguf"
    for options, says in [
        ({"file_type": "f16"}, "add --to gguf"),
        ({"into": str(into_file(base))}, "add --to gguf"),
        ({"to": "gguf", "quantize": True}, "--quantize is for a merged folder"),
        ({"to": "gguf", "file_type": "q4_k"}, "'q4_k' is not a type"),
    ]:
        with pytest.raises(ConfigError, match=says):
            mindprint.merge(adapter, out, model=str(base), **options)
    out.write_text("mine")
    with pytest.raises(RunError, match="exists already"):
        mindprint.merge(adapter, out, model=str(base), to="gguf")
    assert out.read_text() == "mine"


def test_a_merged_file_is_judged_by_llama_cpp_alone(base: Path, adapter: Path) -> None:
    out = base.parent / "voice.gguf"
    result = mindprint.merge(adapter, out, model=str(base), to="gguf", file_type="f16")
    assert result.verification is None
    assert "pip install mindprint-llamacpp" in result.notices[-1].message
    with pytest.raises(BackendError, match="pip install mindprint-llamacpp"):
        mindprint.verify(out, model=str(base))
    with pytest.raises(BackendError, match="backend 'torch' reads no GGUF files"):
        mindprint.verify(out, model=str(base), backend="torch")
    with pytest.raises(AdapterError, match="name it with --adapter"):
        mindprint.verify(into_file(base), model=str(base))


def test_the_command_and_the_missing_extra(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = base.parent / "voice.gguf"
    words = ["merge", str(adapter), str(out), "--to", "gguf", "--type", "q8_0", "--model", str(base)]
    assert main(words) == 0
    assert out.is_file()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main([*words[:2], str(base.parent / "other.gguf"), *words[3:]]) == 2
    assert "pip install 'mindprint-core[gguf]'" in capsys.readouterr().err
