"""The mapping from a LoRA site to stored tensors, by which merging, verification and conversion all go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mindprint.adapter import mlx_lm_format
from mindprint.adapter.base_facts import BaseFacts
from mindprint.adapter.merging import merged_folder
from mindprint.adapter.weight_changes import (
    NotStoredError,
    StoredWeight,
    WeightChange,
    site_changes,
    stored_tensors,
    weight_changes,
)
from mindprint.contract import AdapterState, Float32, LoraConfig, LoraFactors
from mindprint.errors import AdapterError
from mindprint.models import folder as models
from mindprint.models.folder import ModelFolder
from mindprint.models.tensor_files import TensorInfo, read_float32
from mindprint.trust.merged import merge_findings

STACK = "model.layers.0.mlp.experts.gate_up_proj"
VOCABULARY, WIDTH = 20, 8


def draw(*shape: int) -> Float32:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def listed(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    """Return headers of float32 tensors, by names in which `__` is a dot."""
    return {
        name.replace("__", "."): TensorInfo("F32", shape, Path("model.safetensors"), 0, 4 * int(np.prod(shape)))
        for name, shape in shapes.items()
    }


def adapter_of(**factors: LoraFactors) -> AdapterState:
    tensors = {name.replace("__", "."): pair for name, pair in factors.items()}
    return AdapterState(LoraConfig(2, 4.0, tuple(tensors)), tensors)


def products(changes: tuple[WeightChange, ...]) -> list[Float32]:
    return [change.factors.b @ change.factors.a for change in changes]


def test_a_stack_of_experts_is_one_tensor_with_a_part_for_each() -> None:
    pair = LoraFactors(draw(3, 2, 5), draw(3, 4, 2))
    adapter = AdapterState(LoraConfig(2, 1.0, (STACK,)), {STACK: pair})
    tensors = {STACK: TensorInfo("F32", (3, 4, 5), Path("f"), 0, 240)}
    changes = site_changes(adapter, STACK, tensors, BaseFacts("mixtral", 1, tied=False))
    assert [str(change.weight) for change in changes] == [f"{STACK}[0]", f"{STACK}[1]", f"{STACK}[2]"]
    np.testing.assert_array_equal(products(changes)[1], pair.b[1] @ pair.a[1])


def test_a_stack_of_experts_is_three_tensors_of_each_expert_with_the_gate_before_up() -> None:
    """One expert of rank 1 on three inputs, whose inner size is 2: B's first two rows are the gate."""
    a, b = np.arange(3, dtype=np.float32).reshape(1, 1, 3), np.arange(4, dtype=np.float32).reshape(1, 4, 1)
    adapter = AdapterState(LoraConfig(1, 1.0, (STACK,)), {STACK: LoraFactors(a, b)})
    host = "model.layers.0.block_sparse_moe.experts.0"
    names = [f"{host}.{part}.weight" for part in ("w1", "w3")]
    tensors = {name: TensorInfo("F32", (2, 3), Path("f"), 0, 24) for name in names}
    changes = site_changes(adapter, STACK, tensors, BaseFacts("mixtral", 1, tied=False))
    assert [str(change.weight) for change in changes] == names
    np.testing.assert_array_equal(products(changes)[0], b[0, :2] @ a[0])
    np.testing.assert_array_equal(products(changes)[1], b[0, 2:] @ a[0])


@pytest.mark.parametrize(("model_type", "flipped"), [("gpt_oss", True), ("qwen3_moe", False)])
@pytest.mark.parametrize("rows", [4, 5])
def test_a_stack_that_is_kept_transposed_is_told_by_its_shape_or_its_family(
    model_type: str, flipped: bool, rows: int
) -> None:
    pair = LoraFactors(draw(3, 2, 5), draw(3, rows, 2))
    adapter = AdapterState(LoraConfig(2, 1.0, (STACK,)), {STACK: pair})
    shape = (3, 5, rows) if flipped else (3, rows, 5)
    tensors = {STACK: TensorInfo("F32", shape, Path("f"), 0, 4 * 15 * rows)}
    changes = site_changes(adapter, STACK, tensors, BaseFacts(model_type, 1, tied=False))
    whole = pair.b[2] @ pair.a[2]
    np.testing.assert_allclose(products(changes)[2], whole.T if flipped else whole, rtol=1e-6)


def test_a_square_stack_of_an_unknown_family_is_not_guessed_at() -> None:
    adapter = AdapterState(LoraConfig(2, 1.0, (STACK,)), {STACK: LoraFactors(draw(3, 2, 5), draw(3, 5, 2))})
    tensors = {STACK: TensorInfo("F32", (3, 5, 5), Path("f"), 0, 300)}
    with pytest.raises(NotStoredError, match="is square, and whether the file keeps it transposed is not known"):
        site_changes(adapter, STACK, tensors, BaseFacts("unheard_of", 1, tied=False))


def test_a_stack_with_another_number_of_experts_is_refused() -> None:
    adapter = AdapterState(LoraConfig(2, 1.0, (STACK,)), {STACK: LoraFactors(draw(3, 2, 5), draw(3, 4, 2))})
    tensors = {STACK: TensorInfo("F32", (6, 4, 5), Path("f"), 0, 480)}
    with pytest.raises(AdapterError, match="the adapter has 3 experts, the base has 6; is it another base"):
        site_changes(adapter, STACK, tensors, BaseFacts("mixtral", 1, tied=False))


def test_the_part_of_an_expert_is_a_third_of_the_bytes_of_three() -> None:
    part = StoredWeight("stack", 1).locate(TensorInfo("F16", (3, 4, 5), Path("f"), 100, 220))
    assert (part.shape, part.start, part.end) == ((4, 5), 140, 180)


def test_an_adapter_of_another_shape_is_refused_in_one_line_and_never_with_a_traceback() -> None:
    adapter = adapter_of(lm_head=LoraFactors(draw(2, 9), draw(20, 2)))
    with pytest.raises(
        AdapterError, match=r"lm_head: the adapter is for a weight \[20, 9\], lm_head.weight .* \[20, 8"
    ):
        site_changes(adapter, "lm_head", listed(lm_head__weight=(20, 8)), BaseFacts("gpt2", 1, tied=False))


@pytest.mark.parametrize(
    ("tensors", "site", "names"),
    [
        (("model.embed_tokens.weight", "lm_head.weight"), "lm_head", ("lm_head.weight",)),
        (("model.embed_tokens.weight",), "lm_head", ()),
        (("layers.0.mlp.up_proj.weight",), "model.layers.0.mlp.up_proj", ("layers.0.mlp.up_proj.weight",)),
        (("embed_tokens.weight",), "model.embed_tokens", ("embed_tokens.weight",)),
    ],
    ids=["head", "no head", "no prefix", "table without prefix"],
)
def test_names_in_an_untied_base(tensors: tuple[str, ...], site: str, names: tuple[str, ...]) -> None:
    assert stored_tensors(site, tensors, BaseFacts("llama", 1, tied=False)) == names


@pytest.mark.parametrize("site", ["lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("repeated", [False, True], ids=["once", "twice"])
def test_a_tied_base_has_one_weight_for_embedding_and_head_stored_once_or_twice(site: str, repeated: bool) -> None:
    tensors = ["model.layers.0.output.weight", "model.embed_tokens.weight"] + ["lm_head.weight"] * repeated
    assert stored_tensors(site, tensors, BaseFacts("llama", 1, tied=True)) == tuple(tensors[1:])


def test_a_head_that_a_tied_base_stores_a_second_time_is_changed_with_the_embedding() -> None:
    a, b = draw(2, VOCABULARY), draw(WIDTH, 2)
    tensors = listed(lm_head__weight=(VOCABULARY, WIDTH), model__embed_tokens__weight=(VOCABULARY, WIDTH))
    both = adapter_of(lm_head=LoraFactors(b.T, a.T), model__embed_tokens=LoraFactors(a, b))
    changes = weight_changes(both, tensors, BaseFacts("llama", 1, tied=True))
    assert set(changes) == set(tensors)
    for parts in changes.values():
        np.testing.assert_allclose(products(parts), [(b @ a).T], rtol=1e-6)
    other = adapter_of(lm_head=LoraFactors(b.T, 2 * a.T), model__embed_tokens=LoraFactors(a, b))
    with pytest.raises(AdapterError, match="is changed by lm_head and model.embed_tokens, differently"):
        weight_changes(other, tensors, BaseFacts("llama", 1, tied=True))


def conv1d_base(folder: Path, model_type: str, *, tied: bool, prefixed: bool) -> dict[str, Float32]:
    """Write a base of one layer whose linear layers are Conv1D, one of them square; return its tensors."""
    prefix = "transformer." if prefixed else ""
    table = "wte" if model_type == "gpt2" else "tokens_embed"
    tensors = {
        f"{prefix}{table}.weight": draw(VOCABULARY, WIDTH),
        f"{prefix}h.0.attn.c_attn.weight": draw(WIDTH, 3 * WIDTH),
        f"{prefix}h.0.attn.c_proj.weight": draw(WIDTH, WIDTH),
    }
    if not tied:
        tensors["lm_head.weight"] = draw(VOCABULARY, WIDTH) + 1
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": model_type, "n_layer": 1, "tie_word_embeddings": tied, "n_embd": WIDTH}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return tensors


def conv1d_adapter(model_type: str, *, tied: bool, embedding: bool) -> AdapterState:
    """Return an adapter on both linears and the head, and on the embedding if asked: the same change where tied."""
    table = f"transformer.{'wte' if model_type == 'gpt2' else 'tokens_embed'}"
    pairs = {
        "transformer.h.0.attn.c_attn": LoraFactors(draw(2, WIDTH), draw(3 * WIDTH, 2)),
        "transformer.h.0.attn.c_proj": LoraFactors(draw(2, WIDTH), draw(WIDTH, 2)),
    }
    a, b = draw(2, VOCABULARY), draw(WIDTH, 2)
    if not tied or embedding:
        pairs["lm_head"] = LoraFactors(b.T.copy(), a.T.copy())
    if embedding:
        pairs[table] = LoraFactors(a, b)
    return AdapterState(LoraConfig(2, 4.0, tuple(pairs)), pairs)


@pytest.mark.parametrize("prefixed", [True, False], ids=["prefix", "no prefix"])
@pytest.mark.parametrize("embedding", [True, False], ids=["embedding", "no embedding"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt"])
def test_families_that_store_linears_transposed_merge_and_verify(
    model_type: str, tied: bool, embedding: bool, prefixed: bool, tmp_path: Path
) -> None:
    """W is [in, out] for a linear, [out, in] for the head and [tokens, width] for the embedding."""
    before = conv1d_base(tmp_path / "base", model_type, tied=tied, prefixed=prefixed)
    adapter = conv1d_adapter(model_type, tied=tied, embedding=embedding)
    with merged_folder(tmp_path / "out", ModelFolder(tmp_path / "base", "base"), adapter, tmp_path):
        pass
    assert list(merge_findings(tmp_path / "out", tmp_path / "base", adapter)) == []
    after = {name: read_float32(info) for name, info in models.tensors(tmp_path / "out").items()}
    expected: dict[str, Float32] = dict(before)
    for site, (a, b) in adapter.tensors.items():
        if site == "lm_head" and tied:
            continue  # The embedding's change is the head's.
        name = f"{site if prefixed else site.removeprefix('transformer.')}.weight"
        expected[name] = before[name] + 2 * (b @ a if site == "lm_head" else (b @ a).T)
    for name, values in expected.items():
        np.testing.assert_allclose(after[name], values, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt"])
def test_a_merge_whose_head_or_square_linear_has_the_transpose_is_found(model_type: str, tmp_path: Path) -> None:
    before = conv1d_base(tmp_path / "base", model_type, tied=False, prefixed=True)
    adapter = conv1d_adapter(model_type, tied=False, embedding=False)
    out = tmp_path / "out"
    with merged_folder(out, ModelFolder(tmp_path / "base", "base"), adapter, tmp_path):
        pass
    square = "transformer.h.0.attn.c_proj"
    a, b = adapter.tensors[square]
    values = {name: read_float32(info) for name, info in models.tensors(out).items()}
    save_file({**values, f"{square}.weight": before[f"{square}.weight"] + 2 * (b @ a)}, out / "model.safetensors")
    (finding,) = merge_findings(out, tmp_path / "base", adapter)
    assert "1 of 3 adapted weights had the transpose" in finding.message  # type: ignore[union-attr]


def test_mlx_lm_is_refused_an_untied_base_of_a_family_whose_head_it_always_ties(tmp_path: Path) -> None:
    adapter = conv1d_adapter("gpt2", tied=False, embedding=False)
    with pytest.raises(AdapterError, match="mlx-lm's gpt2 has no LM head but the embedding, and this base has one"):
        mlx_lm_format.write_adapter(tmp_path, adapter, BaseFacts("gpt2", 1, tied=False), "base")


def site_shapes(adapter: AdapterState) -> Mapping[str, tuple[int, ...]]:
    return {site: (pair.b.shape[0], pair.a.shape[1]) for site, pair in adapter.tensors.items()}


def test_a_tied_head_and_embedding_of_gpt2_convert_to_one_module_of_mlx_lm_and_back(tmp_path: Path) -> None:
    adapter = conv1d_adapter("gpt2", tied=True, embedding=True)
    facts = BaseFacts("gpt2", 1, tied=True)
    mlx_lm_format.write_adapter(tmp_path, adapter, facts, "base")
    again, _ = mlx_lm_format.read_adapter(tmp_path, facts)
    assert site_shapes(again) == site_shapes(adapter)
    for site, pair in adapter.tensors.items():
        np.testing.assert_allclose(again.tensors[site].b @ again.tensors[site].a, pair.b @ pair.a, rtol=1e-6)
