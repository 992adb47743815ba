"""Digests of a base: what must change them, what must not, and config.json in one spelling."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindprint.trust.bases import Doubt, settings_findings
from mindprint.trust.digests import STRIDE, computed_settings, differences, digest_weights, part_of
from mindprint.trust.report import Finding

ROPE = {"rope_type": "default", "rope_theta": 5e5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "toy"}))
    random = np.random.default_rng(0)
    names = ["embed.weight", "layers.0.up.weight", "layers.0.down.weight", "layers.1.up.weight"]
    tensors = {name: random.normal(size=(3, STRIDE // 4)).astype(np.float32) for name in names}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def edit(folder: Path, name: str, at: int, value: float) -> None:
    tensors = {key: values.copy() for key, values in load_file(folder / "model.safetensors").items()}
    tensors[name].reshape(-1)[at] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("model.layers.10.mlp.up_proj.weight", "model.layers.10"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("scale", "scale"),
    ],
)
def test_parts(tensor: str, part: str) -> None:
    assert part_of(tensor) == part


def test_reading_everything_sees_one_number_and_names_its_part(folder: Path) -> None:
    before = digest_weights(folder)
    assert (before.method, before.dtype, list(before.parts)) == ("whole", "F32", ["embed", "layers.0", "layers.1"])
    edit(folder, "layers.0.down.weight", 100_000, 7.0)
    after = digest_weights(folder)
    assert [part for part in before.parts if before.parts[part] != after.parts[part]] == ["layers.0"]
    assert before.parts["layers.0"].layout == after.parts["layers.0"].layout


def test_samples_see_a_changed_mebibyte_and_the_end_but_not_every_number(folder: Path) -> None:
    before = digest_weights(folder, "sampled")
    edit(folder, "layers.1.up.weight", 100_000, 7.0)
    assert digest_weights(folder, "sampled") == before  # what docs/fingerprint.md says of large bases
    edit(folder, "layers.1.up.weight", 3 * STRIDE // 4 - 1, 7.0)
    assert digest_weights(folder, "sampled").parts["layers.1"] != before.parts["layers.1"]
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.0.up.weight"] = tensors["layers.0.up.weight"] * np.float32(1.001)
    save_file(tensors, folder / "model.safetensors")
    assert digest_weights(folder, "sampled").parts["layers.0"] != before.parts["layers.0"]


def test_shards_do_not_matter(folder: Path) -> None:
    before = digest_weights(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-{n}.safetensors": names[n::2] for n in range(2)}
    for file, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    index = {"weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert digest_weights(folder) == before


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16", "use_cache": True},
        {"rope_theta": 5e5, "transformers_version": "4.40.0"},
        {"rope_parameters": {**ROPE, "factor": None}},
    ],
)
def test_old_and_new_spellings_say_the_same(old: dict[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "rope_parameters": ROPE}))
    new = computed_settings(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", **old}))
    assert differences(new, computed_settings(folder)) == ()


def test_a_difference_says_both_sides_and_whether_one_is_silent() -> None:
    found = differences({"rope.rope_theta": 5e5, "eps": 1e-6, "kept": 1}, {"rope.rope_theta": 1e4, "kept": 1})
    assert [(one.setting, one.one_sided, one.of_rope) for one in found] == [
        ("eps", True, False),
        ("rope.rope_theta", False, True),
    ]
    assert str(found[1]) == "rope.rope_theta is 10000.0, was 500000.0"


def test_scaling_by_layer_type_is_told_apart(folder: Path) -> None:
    nested = {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}}
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "rope_parameters": nested}))
    assert computed_settings(folder) == {
        "model_type": "toy",
        "rope.full_attention.rope_theta": 1e6,
        "rope.sliding_attention.rope_theta": 1e4,
    }


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100,
    "intermediate_size": 128, "max_position_embeddings": 2048,
}  # fmt: skip


@pytest.mark.parametrize(
    ("recorded", "found", "settings"),
    [
        # One side is silent, and means the default that the other one states.
        ({"rope_theta": 10000.0}, {}, set()),
        ({"rms_norm_eps": 1e-6, "hidden_act": "silu", "head_dim": 16}, {}, set()),
        ({"max_position_embeddings": 2048}, {"max_position_embeddings": None}, set()),
        ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}, {}, set()),
        # One side is silent, and means something else.
        ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0}}, {},
         {"rope.factor", "rope.rope_type"}),
        ({}, {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope.factor", "rope.rope_type"}),
        ({"max_position_embeddings": 8192}, {"max_position_embeddings": None}, {"max_position_embeddings"}),
        ({"rms_norm_eps": 1e-5}, {}, {"rms_norm_eps"}),
    ],
)  # fmt: skip
def test_a_setting_that_one_side_leaves_out_has_its_default(
    recorded: dict[str, Any], found: dict[str, Any], settings: set[str], tmp_path: Path
) -> None:
    def read(values: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **values}))
        return computed_settings(tmp_path)

    different = differences(read(recorded), read(found))
    assert {difference.setting for difference in different} >= settings
    assert bool(different) == bool(settings)
    assert all(not isinstance(each, Doubt) for each in settings_findings(different, "its"))


def test_a_setting_that_nobody_knows_is_left_to_the_probe_unless_it_acts_beyond_it() -> None:
    known = {"model_type": "no_such_model"}
    (short,) = settings_findings(differences(known, {**known, "some_scale": 2}), "its")
    (long,) = settings_findings(differences(known, {**known, "sliding_window": 256}), "its")
    assert isinstance(short, Doubt)
    assert isinstance(long, Finding)
    assert long.fails


def test_the_old_and_the_new_name_of_a_rope_base_may_both_be_there(tmp_path: Path) -> None:
    """Both libraries read such a file: `--fix-config` writes it."""
    by_layer = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    new = {"model_type": "gemma3_text", "rope_parameters": by_layer}
    (tmp_path / "config.json").write_text(json.dumps(new))
    alone = computed_settings(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**new, "rope_theta": 1e6, "rope_local_base_freq": 1e4}))
    assert computed_settings(tmp_path) == alone
