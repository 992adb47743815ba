"""Quantized bases: the numbers of each format, what is refused, and merges into full precision."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized_base import DOWN, SHAPES, Q, affine_tensors, edit_tensors, write_quantized, write_tensors

from mindprint.adapter import rewriting
from mindprint.adapter.base_facts import read_base_facts
from mindprint.adapter.file_threads import FileThreads
from mindprint.adapter.merging import merged_folder
from mindprint.adapter.weight_changes import weight_changes
from mindprint.contract import CAPABILITIES, QUANTIZED_FORMATS, AdapterSite, AdapterState, LoraConfig, LoraFactors
from mindprint.errors import ModelError
from mindprint.models.folder import INDEX_FILE, ModelFolder, model_config, tensors
from mindprint.models.quantized import (
    METHODS,
    Scheme,
    affine,
    bitsandbytes,
    dense_weights,
    load_dense,
    microscaled,
    quantized_weights,
    read_quantization,
)
from mindprint.models.tensor_files import from_float32, read_float32, to_float32
from mindprint.models.token_ids import embedding_rows
from mindprint.training.later_use import refused_uses
from mindprint.trust.bases import other_quantization
from mindprint.trust.digests import base_settings, computed_settings, differences, digest_weights
from mindprint.trust.effects import kept_effect
from mindprint.trust.fingerprint import BaseRecord
from mindprint.trust.merged import merge_findings


def adapter(**shapes: tuple[int, int]) -> AdapterState:
    random = np.random.default_rng(2)
    sites = shapes or {Q: (64, 64), DOWN: (64, 128), "lm_head": (12, 64)}
    factors = {
        site: LoraFactors(
            random.normal(0, 0.1, (2, columns)).astype(np.float32), random.normal(0, 0.1, (rows, 2)).astype(np.float32)
        )
        for site, (rows, columns) in sites.items()
    }
    return AdapterState(LoraConfig(2, 4.0, tuple(sites)), factors)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_packing_is_a_stream_of_bits(bits: int) -> None:
    elements = np.random.default_rng(0).integers(0, 1 << bits, (3, 64)).astype(np.uint8)
    packed = affine.pack(elements, bits)
    assert packed.shape == (3, 2 * bits)
    assert np.array_equal(affine.unpack(packed, bits), elements)
    # Element i is in the bits from i * bits on, of the row as one number.
    number = int.from_bytes(packed[1].tobytes(), "little")
    assert [(number >> (bits * i)) & ((1 << bits) - 1) for i in range(64)] == elements[1].tolist()


def test_affine_values_by_hand() -> None:
    packed = np.array([0x76543210], np.uint32)
    values = affine.dequantize(packed, np.float32([0.5, -2.0]), np.float32([-1.0, 3.0]), 4, 4)
    assert values.tolist() == [-1.0, -0.5, 0.0, 0.5, -5.0, -7.0, -9.0, -11.0]


def test_microscaled_codes_by_hand() -> None:
    assert microscaled.E2M1.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    # E4M3: the smallest subnormal, the smallest normal, one, the greatest, and NaN.
    assert microscaled.E4M3[[1, 8, 0x38, 0x7E]].tolist() == [2.0**-9, 2.0**-6, 1.0, 448.0]
    assert np.isnan(microscaled.E4M3[[0x7F, 0xFF]]).all()
    assert microscaled.E8M0[[0, 127, 254]].tolist() == [2.0**-127, 1.0, 2.0**127]
    assert np.isnan(microscaled.E8M0[255])


def test_4bit_elements_are_upper_half_first_and_blocks_may_end_within_a_row() -> None:
    code = np.arange(16, dtype=np.float32)
    values = bitsandbytes.dequantize_4bit(np.uint8([0x12, 0x34, 0x56]), code, np.float32([10, 100]), 4, 0)
    assert values.tolist() == [10, 20, 30, 40, 500, 600]
    scales = bitsandbytes.block_scales(np.uint8([0, 1]), np.float32([2, 3]), np.float32([5, 7]), 0.5, 256, 255)
    assert scales.tolist() == [10.5, 21.5]


def test_weights_have_their_names_and_shapes_in_full_precision(tmp_path: Path) -> None:
    base = write_quantized(tmp_path / "base", bits=3)
    found = quantized_weights(base.path)
    assert {name: weight.shape for name, weight in found.items()} == {
        f"{module}.weight": SHAPES[module] for module in ("model.embed_tokens", Q, DOWN)
    }
    assert set(dense_weights(base.path)) == {f"{module}.weight" for module in SHAPES} | {"model.norm.weight"}
    assert embedding_rows(base.path) == 12
    weight = found[f"{Q}.weight"]
    assert (weight.scheme, weight.dtype) == (Scheme("affine", 3, 32), "BF16")
    assert weight.rows(5, 9).tobytes() == weight.values()[5:9].tobytes()
    assert b"".join(block.tobytes() for _, block in weight.blocks(100)) == weight.values().tobytes()
    assert load_dense(base.path)[f"{Q}.weight"].tobytes() == weight.values().tobytes()


def test_layers_may_have_other_bits_or_none(tmp_path: Path) -> None:
    section = {DOWN: {"group_size": 64, "bits": 8}, "lm_head": False}
    base = write_quantized(tmp_path / "base", **section)
    values = np.random.default_rng(3).normal(size=SHAPES[DOWN]).astype(np.float32)
    edit_tensors(base.path, lambda stored: stored | affine_tensors(DOWN, values, 8, 64, "F16"))
    found = quantized_weights(base.path)
    assert found[f"{DOWN}.weight"].scheme == Scheme("affine", 8, 64)
    assert found[f"{Q}.weight"].scheme == Scheme("affine", 4, 32)
    stated = read_quantization(base.path)
    assert stated is not None and stated.scheme_of("lm_head") is None
    assert str(stated) == "affine, 4 bits, groups of 32, some layers affine, 8 bits, groups of 64"


def without(name: str) -> Any:
    return lambda stored: {key: value for key, value in stored.items() if key != name}


def with_nan(stored: dict[str, Any]) -> None:
    stored[f"{Q}.scales"][1][7, 1] = 0x7FC0


def shorter(role: str) -> Any:
    def cut(stored: dict[str, Any]) -> None:
        dtype, bits = stored[f"{Q}.{role}"]
        stored[f"{Q}.{role}"] = dtype, bits[:, :-1]

    return cut


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (without(f"{Q}.scales"), {}, "q_proj.weight is packed and has no scales"),
        (without(f"{Q}.biases"), {}, "q_proj has scales and no biases"),
        (without(f"{Q}.weight"), {}, "q_proj.scales are the scales of no weight"),
        (shorter("scales"), {}, r"q_proj.biases \[64, 2\] are not as many as its scales \[64, 1\]"),
        (None, {"bits": 4, "group_size": 64}, r"does not fit affine, 4 bits, groups of 64 \(expected scales"),
        (None, {"bits": 8, "group_size": 32}, "does not fit affine, 8 bits, groups of 32"),
        (None, {"bits": 7, "group_size": 32}, r"affine with 7 bits is not known here \(known: 1, 2, 3, 4, 5, 6, 8\)"),
        (None, {"bits": 4, "group_size": 32, "mode": "mxfp4"}, "mxfp4 has scales of U8 and no biases"),
        (None, {"bits": 4, "group_size": 32, "mode": "int3"}, "mode 'int3' is not known here; formats that are read"),
        (None, {"bits": 4, "group_size": 32, Q: False}, "states model.layers.0.self_attn.q_proj as not quantized"),
        (None, {"bits": 4, "group_size": 32, "lm_head": True}, "states lm_head as affine, 4 bits.* is not quantized"),
        (None, {"bits": "four", "group_size": 32}, "quantization.bits: 'four' is not a positive whole number"),
        (None, {"quant_method": "awq", "bits": 4}, "quant_method 'awq' is not known here; formats that are read"),
        (None, None, "q_proj.weight is quantized, and config.json has no section|embed_tokens.weight is quantized"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, change: Any, config: dict[str, Any] | None, words: str
) -> None:
    base = write_quantized(tmp_path / "base")
    if change is not None:
        edit_tensors(base.path, change)
    if config != {}:
        values = {"model_type": "llama"} | ({} if config is None else {"quantization": config})
        (base.path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=words) as caught:
        quantized_weights(base.path)
    assert "\n" not in str(caught.value)


def test_a_section_without_a_quantized_tensor_is_refused(tmp_path: Path) -> None:
    base = write_quantized(tmp_path / "base")
    edit_tensors(base.path, lambda stored: {"lm_head.weight": stored["lm_head.weight"]})
    with pytest.raises(ModelError, match="states a quantization .*, and no tensor is quantized"):
        quantized_weights(base.path)


def test_scales_that_are_nan_are_found_where_they_are_read(tmp_path: Path) -> None:
    base = write_quantized(tmp_path / "base")
    edit_tensors(base.path, with_nan)
    weight = quantized_weights(base.path)[f"{Q}.weight"]
    assert np.isfinite(weight.rows(0, 7)).all()
    with pytest.raises(ModelError, match=r"q_proj.scales holds values that are NaN or infinite \(near row 7\)"):
        weight.values()


def bitsandbytes_base(folder: Path, state: dict[str, Any], **parts: Any) -> Path:
    """Write one NF4 weight of `[4, 64]` without double quantization, with parts replaced."""
    stored = {
        "a.weight": ("U8", np.zeros((128, 1), np.uint8)),
        "a.weight.absmax": ("F32", np.ones(4, np.float32)),
        "a.weight.quant_map": ("F32", np.linspace(-1, 1, 16, dtype=np.float32)),
        "a.weight.quant_state.bitsandbytes__nf4": ("U8", np.frombuffer(json.dumps(state).encode(), np.uint8)),
        **parts,
    }
    write_tensors(folder / "model.safetensors", {name: part for name, part in stored.items() if part is not None})
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": section}))
    return folder


STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 64]}


@pytest.mark.parametrize(
    ("state", "parts", "words"),
    [
        ({**STATE, "shape": [4, 65]}, {}, r"weight is U8\[128, 1\], which does not fit nf4 of \[4, 65\]"),
        ({**STATE, "shape": [4, -64]}, {}, "the quantization state of a.weight cannot be read"),
        ({**STATE, "dtype": "int4"}, {}, "the quantization state of a.weight cannot be read"),
        (STATE, {"a.weight.absmax": None}, "a.weight is nf4 and has no absmax"),
        (STATE, {"a.weight.absmax": ("F32", np.ones(3, np.float32))}, r"absmax is F32\[3\], which does not fit nf4"),
        (STATE, {"b.weight": ("U8", np.zeros(4, np.uint8))}, "b.weight is packed and has no scales"),
        (STATE, {"b.SCB": ("F32", np.ones(4, np.float32))}, "has scales .SCB. for b.weight, which is missing"),
        (STATE, {"b.weight": ("I8", np.zeros((4, 2), np.int8)), "b.SCB": ("F32", np.ones(4, np.float32))},
         "states nf4, and b.weight is int8"),
    ],
)  # fmt: skip
def test_bitsandbytes_weights_that_do_not_fit(
    tmp_path: Path, state: dict[str, Any], parts: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        quantized_weights(bitsandbytes_base(tmp_path, state, **parts))


def test_blocks_and_bytes_of_4_bits_may_begin_within_a_row(tmp_path: Path) -> None:
    shape, random = (7, 33), np.random.default_rng(4)
    parts = {
        "a.weight": ("U8", random.integers(0, 256, (116, 1)).astype(np.uint8)),
        "a.weight.absmax": ("F32", random.random(4).astype(np.float32)),
    }
    (weight,) = quantized_weights(bitsandbytes_base(tmp_path, {**STATE, "shape": shape}, **parts)).values()
    pairs = np.stack([parts["a.weight"][1] >> 4, parts["a.weight"][1] & 15], -1).reshape(-1)[:231]
    code, scales = np.linspace(-1, 1, 16, dtype=np.float32), parts["a.weight.absmax"][1]
    expected = (code[pairs] * scales[np.arange(231) // 64]).reshape(shape)
    for start, stop in ((0, 7), (0, 1), (1, 2), (3, 6), (6, 7)):
        assert weight.rows(start, stop).tobytes() == expected[start:stop].tobytes()


def test_packed_bytes_may_have_the_name_of_a_float_dtype(tmp_path: Path) -> None:
    """bitsandbytes' `bnb_4bit_quant_storage`, for FSDP."""
    folder = bitsandbytes_base(tmp_path, STATE, **{"a.weight": ("BF16", np.zeros((64, 1), np.uint16))})
    (weight,) = quantized_weights(folder).values()
    assert weight.values().tolist() == np.full((4, 64), -1.0).tolist()


def test_a_merge_is_the_dequantized_weight_and_the_change_rounded_once(tmp_path: Path) -> None:
    base, state = write_quantized(tmp_path / "base"), adapter()
    with merged_folder(tmp_path / "out", base, state, tmp_path):
        pass
    before, after = dense_weights(base.path), tensors(tmp_path / "out")
    assert list(after) == list(before)
    for name, info in after.items():
        site = name.removesuffix(".weight")
        exact = quantized_weights(base.path)[name].values() if site != "lm_head" and "norm" not in site else None
        if exact is None:
            exact = read_float32(tensors(base.path)[name])
        if site in state.tensors:
            a, b = state.tensors[site]
            exact = exact + (b * np.float32(2.0)) @ a
        assert info.dtype == "BF16" and info.shape == exact.shape
        assert read_float32(info).tobytes() == to_float32(from_float32(exact, "BF16"), "BF16").tobytes()
    assert "quantization" not in model_config(tmp_path / "out")
    assert "quantization_config" not in model_config(tmp_path / "out")
    assert list(merge_findings(tmp_path / "out", base.path, state)) == []


def test_a_merge_does_not_depend_on_blocks_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, state = write_quantized(tmp_path / "base"), adapter()
    with merged_folder(tmp_path / "whole", base, state, tmp_path):
        pass
    monkeypatch.setattr(rewriting, "BLOCK_ELEMENTS", 300)
    monkeypatch.setattr(rewriting, "SHARD_BYTES", 10_000)
    with merged_folder(tmp_path / "parts", base, state, tmp_path):
        pass
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert len({info.file for info in parts.values()}) > 1 and (tmp_path / "parts" / INDEX_FILE).is_file()
    assert whole.keys() == parts.keys()
    assert all(read_float32(info).tobytes() == read_float32(parts[name]).tobytes() for name, info in whole.items())


def test_a_merge_takes_the_memory_of_a_few_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    rows, columns = 4096, 1024
    parts = {
        f"{Q}.weight": ("U32", np.zeros((rows, columns // 8), np.uint32)),
        f"{Q}.scales": ("BF16", np.zeros((rows, columns // 64), np.uint16)),
        f"{Q}.biases": ("BF16", np.zeros((rows, columns // 64), np.uint16)),
    }
    write_tensors(folder / "model.safetensors", parts)
    section = {"bits": 4, "group_size": 64}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "tie_word_embeddings": False, "quantization": section})
    )
    monkeypatch.setattr(rewriting, "BLOCK_ELEMENTS", 2**14)
    weights = dense_weights(folder)
    changes = weight_changes(adapter(**{Q: (rows, columns)}), weights, read_base_facts(folder))
    tracemalloc.start()
    with FileThreads() as threads:
        rewriting.RewrittenWeights(weights, changes, {}).write(tmp_path, threads)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "model.safetensors").stat().st_size > 2 * rows * columns
    assert peak < 3 * 2**20, f"{peak:,} bytes for a weight of {4 * rows * columns:,} in float32"


def test_a_requantized_merge_has_the_format_of_the_base(tmp_path: Path) -> None:
    base, state = write_quantized(tmp_path / "base", bits=8, dtype="F32"), adapter(**{Q: (64, 64)})
    with merged_folder(tmp_path / "out", base, state, tmp_path, grid=base.path):
        pass
    before, after = tensors(base.path), tensors(tmp_path / "out")
    assert {name: (info.dtype, info.shape) for name, info in after.items()} == {
        name: (info.dtype, info.shape) for name, info in before.items()
    }
    assert read_quantization(tmp_path / "out") == read_quantization(base.path)
    a, b = state.tensors[Q]
    expected = quantized_weights(base.path)[f"{Q}.weight"].values() + (b * np.float32(2.0)) @ a
    found = quantized_weights(tmp_path / "out")[f"{Q}.weight"]
    steps = np.repeat(np.abs(read_float32(found.parts["scales"])), 32, axis=1)
    # Half a step of the grid, and as much again at the end of a group that the stretched scale does not reach.
    assert (np.abs(found.values() - expected) <= 1.001 * steps).all()


def test_only_formats_that_can_be_written_are_requantized(tmp_path: Path) -> None:
    base = write_quantized(tmp_path / "base")
    (tmp_path / "nf4").mkdir()
    with pytest.raises(ModelError, match="is quantized as nf4, and a merge is quantized again in MLX's affine format"):
        rewriting.grids_of(bitsandbytes_base(tmp_path / "nf4", STATE))
    full = tmp_path / "full"
    with merged_folder(full, base, adapter(), tmp_path):
        pass
    with pytest.raises(ModelError, match="is not quantized, so that there is no format"):
        rewriting.grids_of(full)


def test_an_adapter_of_a_quantized_base_can_be_merged_later(tmp_path: Path) -> None:
    base = write_quantized(tmp_path / "base")
    sites = [AdapterSite(Q, "linear", 64, 64), AdapterSite(DOWN, "linear", 128, 64)]
    assert refused_uses(base.path, sites, LoraConfig(2, 4.0, (Q, DOWN))) is None
    wrong = [AdapterSite(Q, "linear", 8, 64)]
    assert "the adapter is for a weight [64, 8]" in str(refused_uses(base.path, wrong, LoraConfig(2, 4.0, (Q,))))


def test_quantization_is_a_setting_of_the_computation(tmp_path: Path) -> None:
    four, eight = (write_quantized(tmp_path / str(bits), bits=bits).path for bits in (4, 8))
    assert computed_settings(four)["quantization"] == "affine, 4 bits, groups of 32"
    assert [str(each) for each in differences(computed_settings(four), computed_settings(eight))] == [
        "quantization is 'affine, 8 bits, groups of 32', was 'affine, 4 bits, groups of 32'"
    ]


def test_a_kept_effect_is_a_factor_and_a_likeness() -> None:
    before, effect = np.zeros(4, np.float32), np.float32([1, -2, 3, 4])
    half = kept_effect((before, effect), (before + 1, before + 1 + effect / 2))
    assert (half.share, half.likeness, half.as_strong) == (pytest.approx(0.5), pytest.approx(1.0), False)
    noisy = kept_effect((before, effect), (before, effect + np.float32([2, 1, 0, 0])))
    assert noisy.share == pytest.approx(1.0) and noisy.likeness < 0.95 and noisy.as_strong and not noisy.alike


def test_every_format_is_a_capability() -> None:
    assert METHODS == QUANTIZED_FORMATS
    assert set(METHODS) <= CAPABILITIES


def test_a_base_that_is_packed_at_loading_is_quantized_for_a_fingerprint(tmp_path: Path) -> None:
    with merged_folder(tmp_path / "full", write_quantized(tmp_path / "base"), adapter(), tmp_path):
        pass
    full = ModelFolder(tmp_path / "full", "full")
    recorded = BaseRecord("full", base_settings(replace(full, quantize="nf4")), digest_weights(full.path))
    assert recorded.settings["quantization"] == "nf4 at loading"
    assert other_quantization(replace(full, quantize="nf4"), recorded) is None
    words = "the adapter was trained on a base in nf4 at loading, and full is in full precision"
    assert other_quantization(full, recorded) == words
