"""Every architecture of the matrix computes on MLX what transformers computes, or is refused.

`tests/architectures.py` has the models and the comparison. The logits of mlx-lm's classes, loaded as `mindprint_mlx`
loads them, against those of transformers; what can take LoRA, under which names; ten training steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from transformers import CONFIG_MAPPING

from architectures import (
    MATRIX,
    RELATIVE,
    TEN_STEPS,
    TOKENS,
    Compared,
    architectures_page,
    compare,
    distance,
    loaded,
    rewritten,
    saved,
)
from mindprint.errors import ModelError
from mindprint_mlx import architectures
from mindprint_mlx.configuration import FULL, ROPE_LAYERS, SLIDING, interpret


def test_the_matrix_is_what_the_backend_says_it_is() -> None:
    assert set(MATRIX) == architectures.COMPARED


WRAPPED = ("qwen2_5_vl_text", "qwen3_vl_text")
"""Families of models with more than text, whose text is read by the rules of one that is in the matrix."""


@pytest.mark.parametrize("model_type", sorted([*MATRIX, *WRAPPED]))
def test_absent_fields_are_what_transformers_derives(model_type: str) -> None:
    """Of a config.json that names its family alone: layers, heads, windows and rotations, and all defaults."""
    theirs, ours = CONFIG_MAPPING[model_type](), interpret({"model_type": model_type})
    kinds = list(getattr(theirs, "layer_types", None) or [""] * theirs.num_hidden_layers)
    window = getattr(theirs, "sliding_window", None)
    if getattr(theirs, "layer_types", None):
        assert ours.windows == tuple(window if kind == SLIDING else None for kind in kinds)
    else:
        assert ours.windows == (window,) * theirs.num_hidden_layers
    for layer, (kind, rope) in enumerate(zip(kinds, ours.rope, strict=True)):
        heads = theirs.per_layer_config[layer] if model_type == "gemma4_text" else theirs
        width = getattr(heads, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        assert ours.rotated_head(layer) == width
        stated = getattr(theirs, "rope_parameters", None) or {}
        wanted = stated.get(kind) or stated
        if rope is None:
            # Layers that are not attention rotate nothing.
            assert not stated or model_type in ROPE_LAYERS or kind not in (FULL, SLIDING)
            continue
        assert (rope["rope_type"], rope["rope_theta"]) == (wanted["rope_type"], wanted["rope_theta"])
        assert rope["partial_rotary_factor"] == (wanted.get("partial_rotary_factor") or 1.0)


WHOLE = {"lfm2": {"layer_types": ["conv", "full_attention"] * 16}}
"""Settings without which transformers' default of a family is a model that nobody has: LFM2 without convolutions."""


@pytest.mark.parametrize("model_type", sorted(MATRIX))
def test_a_model_of_full_size_is_accepted(model_type: str) -> None:
    """Its config.json as transformers writes it, every field stated, with as many layers as a real model has."""
    config = CONFIG_MAPPING[model_type](**WHOLE.get(model_type, {}))
    written = json.loads(config.to_json_string(use_diff=False))
    assert architectures.architecture(written).configuration.model_type == model_type


@pytest.mark.parametrize("model_type", ["bloom", "codegen", "mpt"])
def test_a_family_without_a_class_is_refused_for_that(model_type: str) -> None:
    with pytest.raises(ModelError, match=f"mlx-lm has no class for model_type '{model_type}'"):
        architectures.architecture(CONFIG_MAPPING[model_type]().to_dict())


def test_the_facts_are_those_of_the_installed_transformers() -> None:
    script = Path(__file__).parents[2] / "packages" / "mindprint-mlx" / "scripts" / "write_transformers_facts.py"
    spec = spec_from_file_location("write_transformers_facts", script)
    assert spec is not None
    assert spec.loader is not None
    written = module_from_spec(spec)
    spec.loader.exec_module(written)
    stored = json.loads(written.TARGET.read_text(encoding="utf-8"))["families"]
    for model_type in [*MATRIX, *WRAPPED]:
        now = json.loads(json.dumps(written.facts(model_type)))
        assert stored[model_type] == now, "run packages/mindprint-mlx/scripts/write_transformers_facts.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compared]:
    """Compute each row of the matrix once, whichever test asks for it first."""
    return cache(lambda model_type: compare(model_type, tmp_path_factory.mktemp(model_type)))


@pytest.mark.slow
def test_the_documented_page_is_what_the_program_prints_now(rows: Callable[[str], Compared]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    printed = architectures_page([rows(model_type) for model_type in sorted(MATRIX)])
    assert page == printed, "run python benchmarks/parity.py architectures > docs/architectures.md"


@pytest.mark.parametrize("base", [500000.0, 20000.0])
@pytest.mark.parametrize("model_type", sorted(MATRIX))
def test_logits_are_those_of_transformers(model_type: str, base: float, tmp_path: Path) -> None:
    assert distance(saved(tmp_path, model_type, base)) < RELATIVE


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(MATRIX))
def test_ten_training_steps_are_those_of_torch(model_type: str, rows: Callable[[str], Compared]) -> None:
    row = rows(model_type)
    assert row.same_sites
    assert row.ten_steps < TEN_STEPS
    assert row.right


@pytest.mark.parametrize("model_type", sorted(MATRIX))
def test_lora_attaches_to_the_same_linear_layers_under_the_same_names(model_type: str, tmp_path: Path) -> None:
    reference = saved(tmp_path, model_type)
    sites = {site.name for site in loaded(tmp_path).handle.sites if site.kind == "linear"}
    # A tied head is no layer of its own on MLX; nobody adapts it (DESIGN.md: never the LM head).
    heads = {"lm_head", "embed_out"}
    assert sites - heads == reference.linears - heads


@pytest.mark.parametrize("model_type", sorted(MATRIX))
def test_generating_with_a_cache_gives_the_logits_of_the_whole_sequence(model_type: str, tmp_path: Path) -> None:
    reference = saved(tmp_path, model_type)
    handle = loaded(tmp_path).handle
    tokens = mx.array(reference.tokens[:1])
    cache = handle.new_cache()
    with handle.in_use():
        logits = [handle.module(tokens[:, :10], cache=cache)[0, -1]]
        logits += [handle.module(tokens[:, at : at + 1], cache=cache)[0, -1] for at in range(10, TOKENS)]
    found, wanted = np.array(mx.stack(logits)), reference.logits[0, 9:]
    assert np.linalg.norm(found - wanted) < RELATIVE * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
@pytest.mark.parametrize("model_type", ["llama", "gemma", "qwen3"])
def test_scaled_rotary_embeddings(model_type: str, rope: dict[str, Any], tmp_path: Path) -> None:
    assert distance(saved(tmp_path, model_type, rope_parameters={"rope_theta": 1.0, **rope})) < RELATIVE


@pytest.mark.parametrize("original", [16, 64], ids=["beyond", "within"])
def test_longrope_uses_short_factors_up_to_the_original_length_and_long_ones_beyond(
    original: int, tmp_path: Path
) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
    }
    reference = saved(tmp_path, "phi3", rope_parameters=rope, original_max_position_embeddings=original)
    assert distance(reference) < RELATIVE


def test_phi3_with_partial_rotation(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.5}
    assert distance(saved(tmp_path, "phi3", rope_parameters=rope)) < RELATIVE


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "granite", "starcoder2", "olmo2"])
def test_tied_and_untied_heads(model_type: str, tied: bool, tmp_path: Path) -> None:
    assert distance(saved(tmp_path, model_type, tie_word_embeddings=tied)) < RELATIVE


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("mixtral", {"sliding_window": 6}),
        ("phi3", {"sliding_window": 6}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 6}),
        ("gemma2", {"layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"]}),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"]}),
    ],
)
def test_windows_shorter_than_the_rows(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    assert distance(saved(tmp_path, model_type, **changes)) < RELATIVE


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "silu", "relu"])
@pytest.mark.parametrize(
    ("model_type", "field"), [("gemma", "hidden_act"), ("starcoder2", "hidden_act"), ("phi", "hidden_act")]
)
def test_activations_of_the_configuration(model_type: str, field: str, activation: str, tmp_path: Path) -> None:
    assert distance(saved(tmp_path, model_type, **{field: activation})) < RELATIVE


def test_an_activation_that_the_class_does_not_have_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama", hidden_act="gelu")
    with pytest.raises(ModelError, match="asks for gelu, mlx-lm's class has silu"):
        loaded(tmp_path)


class TestOldConfigurations:
    """config.json as transformers 4 wrote it: bases and scaling at the top, most fields left out."""

    def test_rope_theta_at_the_top(self, tmp_path: Path) -> None:
        reference = saved(tmp_path, "llama")
        absent = ("rope_parameters", "attention_bias", "mlp_bias", "head_dim", "pretraining_tp")
        rewritten(tmp_path, {"rope_theta": 500000.0, "rope_scaling": None}, absent)
        assert distance(reference) < RELATIVE

    def test_no_rope_theta_at_all_is_transformers_default(self, tmp_path: Path) -> None:
        reference = saved(tmp_path, "qwen2", base=10000.0)
        rewritten(tmp_path, {}, ("rope_parameters", "layer_types"))
        assert distance(reference) < RELATIVE

    def test_scaling_at_the_top(self, tmp_path: Path) -> None:
        reference = saved(tmp_path, "qwen2", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1.0})
        old = {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
        rewritten(tmp_path, old, ("rope_parameters",))
        assert distance(reference) < RELATIVE

    def test_gemma_says_gelu_and_means_its_approximation(self, tmp_path: Path) -> None:
        reference = saved(tmp_path, "gemma", hidden_act="gelu_pytorch_tanh")
        rewritten(tmp_path, {"hidden_act": "gelu"})
        assert distance(reference) < RELATIVE

    def test_apertus_scales_where_nothing_is_said(self, tmp_path: Path) -> None:
        reference = saved(tmp_path, "apertus", base=12000000.0)
        rewritten(tmp_path, {"rope_theta": 500000.0}, ("rope_parameters",))
        assert distance(reference) < RELATIVE

    def test_gpt_neox_names(self, tmp_path: Path) -> None:
        reference = saved(tmp_path, "gpt_neox")
        rewritten(tmp_path, {"rotary_emb_base": 500000, "rotary_pct": 0.25}, ("rope_parameters",))
        assert distance(reference) < RELATIVE

    def test_gemma3_bases_of_local_and_global_layers(self, tmp_path: Path) -> None:
        types = ["sliding_attention", "full_attention"] * 2
        rope = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1.0},
        }
        reference = saved(tmp_path, "gemma3_text", layer_types=types, rope_parameters=rope)
        old = {"rope_theta": 500000.0, "rope_local_base_freq": 500000.0, "sliding_window_pattern": 2}
        rewritten(tmp_path, old, ("rope_parameters", "layer_types", "_sliding_window_pattern"))
        assert distance(reference) < RELATIVE
