"""Adapters for llama.cpp, read back with the package gguf. `nox -s gguf` compares them with llama.cpp itself."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gguf import GGUFReader
from mindprint.adapter import gguf_format, peft_format
from mindprint.adapter.base_facts import BaseFacts
from mindprint.cli import main
from mindprint.contract import AdapterState, LoraConfig, LoraFactors
from mindprint.errors import AdapterError

HEADS, KEYS, WIDTH, HEAD = 4, 2, 12, 8

Q, K = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    config = {
        "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": KEYS,
        "hidden_size": WIDTH, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter_of(*sites: str, **settings: Any) -> AdapterState:
    random = np.random.default_rng(0)
    config = LoraConfig(r=2, alpha=3.0, target_modules=sites, **settings)
    rows = {"q_proj": HEADS * HEAD, "k_proj": KEYS * HEAD}
    factors = {}
    for site in sites:
        rank, out = config.rank(site), rows.get(site.rpartition(".")[2], 10)
        shapes = (rank, WIDTH), (out, rank)
        factors[site] = LoraFactors(*(random.standard_normal(shape).astype(np.float32) for shape in shapes))
    return AdapterState(config, factors)


def written(base: Path, adapter: AdapterState, model_type: str = "llama", tied: bool = True) -> dict[str, np.ndarray]:
    out = base.parent / "out"
    out.mkdir()
    gguf_format.write_adapter(out, adapter, BaseFacts(model_type, 2, tied), base, "org/base")
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(out / "adapter.gguf").tensors}


def test_rows_of_q_and_k_follow_the_rotation_of_neighbours(base: Path) -> None:
    adapter = adapter_of(Q, K)
    tensors = written(base, adapter)
    assert set(tensors) == {f"blk.1.attn_{name}.weight.lora_{part}" for name in "qk" for part in "ab"}
    for site, name in ((Q, "attn_q"), (K, "attn_k")):
        a, b = adapter.tensors[site]
        np.testing.assert_array_equal(tensors[f"blk.1.{name}.weight.lora_a"], a)
        found = tensors[f"blk.1.{name}.weight.lora_b"]
        for row in range(len(b)):
            head, within = divmod(row, HEAD)
            half, pair = divmod(within, HEAD // 2)
            # Row `pair` of the first half becomes an even row, its partner of the second half the odd row after it.
            np.testing.assert_array_equal(found[head * HEAD + 2 * pair + half], b[row])


def test_gpt_neox_has_all_of_q_before_all_of_k(base: Path) -> None:
    site = "gpt_neox.layers.0.attention.query_key_value"
    rows = HEADS * 3 * HEAD
    b = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)
    adapter = AdapterState(LoraConfig(2, 3.0, (site,)), {site: LoraFactors(np.ones((2, WIDTH), np.float32), b)})
    found = written(base, adapter, "gpt_neox")["blk.0.attn_qkv.weight.lora_b"]
    for row in range(rows):
        head, within = divmod(row, 3 * HEAD)
        part, inside = divmod(within, HEAD)
        np.testing.assert_array_equal(found[part * HEADS * HEAD + head * HEAD + inside], b[row])


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {Q: 5}}, {"alpha_pattern": {K: 7.0}}],
    ids=["plain", "rslora", "ranks", "alphas"],
)
def test_llama_cpps_scale_gives_the_same_change(base: Path, settings: dict[str, Any]) -> None:
    """The file's alpha over the rank of its B, as llama.cpp divides, times B·A is the adapter's change."""
    adapter = adapter_of(Q, K, **settings)
    tensors = written(base, adapter)
    alpha = GGUFReader(base.parent / "out" / "adapter.gguf").fields["adapter.lora.alpha"].contents()
    for site, name, heads in ((Q, "attn_q", HEADS), (K, "attn_k", KEYS)):
        a, b = (tensors[f"blk.1.{name}.weight.lora_{part}"] for part in "ab")
        found = alpha / b.shape[1] * b @ a
        plain = adapter.tensors[site]
        wanted = adapter.config.scale(site) * plain.b @ plain.a
        # Undo the order of rows on the product, so that this does not repeat the function under test.
        found = found.reshape(heads, HEAD // 2, 2, WIDTH).swapaxes(1, 2).reshape(wanted.shape)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {Q: 5}}], ids=["plain", "ranks"])
def test_a_file_is_read_back_as_it_was(base: Path, settings: dict[str, Any]) -> None:
    adapter = adapter_of(Q, K, **settings)
    written(base, adapter)
    weights = {f"{site}.weight": np.ones((2, 2), np.float32) for site in (Q, K)}
    save_file(weights, base / "model.safetensors")
    found = gguf_format.read_adapter(base.parent / "out" / "adapter.gguf", BaseFacts("llama", 2, True), base)
    for site, pair in adapter.tensors.items():
        np.testing.assert_array_equal(found.tensors[site].a, pair.a)
        # Other ranks have another scale, whose rest is in B.
        ratio = adapter.config.scale(site) / found.config.scale(site)
        np.testing.assert_allclose(found.tensors[site].b, pair.b * ratio, rtol=1e-6)
    with pytest.raises(AdapterError, match="is not a LoRA adapter for the architecture 'qwen2'"):
        gguf_format.read_adapter(base.parent / "out" / "adapter.gguf", BaseFacts("qwen2", 2, True), base)


def test_an_alpha_of_0_changes_nothing(base: Path) -> None:
    """llama.cpp reads an alpha of 0 as a factor of 1."""
    adapter = adapter_of(Q)
    tensors = written(base, AdapterState(replace(adapter.config, alpha=0.0), adapter.tensors))
    assert not tensors["blk.1.attn_q.weight.lora_b"].any()
    assert tensors["blk.1.attn_q.weight.lora_a"].any()


@pytest.mark.parametrize(
    ("model_type", "site", "says"),
    [
        ("helium", Q, "model_type 'helium' cannot be written as GGUF"),
        ("llama", "lm_head", "one tensor in this base"),
        ("llama", "model.embed_tokens", "one tensor in this base"),
        ("llama", "model.layers.0.mlp.nothing", "has no such part"),
        ("llama", "model.layers.7.mlp.up_proj", "has no such part"),
        ("mixtral", "model.layers.0.mlp.experts.down_proj", "stacked experts"),
    ],
)
def test_refused_by_name(base: Path, model_type: str, site: str, says: str) -> None:
    with pytest.raises(AdapterError, match=says):
        written(base, adapter_of(site), model_type)


def test_rows_that_the_heads_do_not_divide(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_attention_heads": 5}))
    with pytest.raises(AdapterError, match=r"q_proj: has 32 rows"):
        written(base, adapter_of(Q))


def test_the_command(base: Path) -> None:
    source, out = base.parent / "peft", base.parent / "for-llama"
    source.mkdir()
    peft_format.write_adapter(source, adapter_of(Q), "org/base")
    (base / "tokenizer.json").write_text("{}")
    save_file({"model.norm.weight": np.ones(WIDTH, np.float32)}, base / "model.safetensors")
    words = ["convert", str(source), str(out), "--to", "gguf", "--model", str(base)]
    assert main(words) == 0
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "adapter.gguf"]
    modelfile = (out / "Modelfile").read_text()
    assert "FROM ./base.gguf\nADAPTER ./adapter.gguf\n" in modelfile
    assert "org/base" in modelfile


def test_without_the_package_the_extra_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(AdapterError, match=r"pip install 'mindprint-core\[gguf\]'"):
        written(base, adapter_of(Q))
