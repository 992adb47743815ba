"""Every field of PEFT's `adapter_config.json`: honoured, refused, or without a meaning, which PEFT itself shows."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from mindprint.adapter.formats import read_any_adapter, unmatched_targets
from mindprint.adapter.peft_settings import HELD, NEUTRAL, REFUSED, WITHOUT_MEANING
from mindprint.contract import AdapterState
from mindprint.errors import AdapterError

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"

TARGETS = ["q_proj", "v_proj"]


@cache
def _loaded(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def base_model(base: Path) -> Any:
    # A copy of a model this small takes a hundredth of the time of loading it.
    return deepcopy(_loaded(base))


@pytest.fixture(scope="module")
def saved(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that PEFT wrote."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=TARGETS, init_lora_weights=False)
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    get_peft_model(base_model(qwen2), lora).save_pretrained(folder)
    return folder


def edited(saved: Path, folder: Path, **change: Any) -> Path:
    shutil.copytree(saved, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return folder


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        tuned = PeftModel.from_pretrained(base_model(base), adapter).eval()
        return tuned(torch.arange(24)[None]).logits


def merged_logits(base: Path, adapter: AdapterState) -> torch.Tensor:
    """The base with the adapter, as Mindprint understands it, added to its weights."""
    model = base_model(base).eval()
    with torch.no_grad():
        for site, (a, b) in adapter.tensors.items():
            change = adapter.config.scale(site) * (torch.from_numpy(b) @ torch.from_numpy(a))
            model.get_submodule(site).weight += change
        return model(torch.arange(24)[None]).logits


def test_every_field_of_peft_is_in_a_table() -> None:
    """PEFT has added a field if this fails: find out what it does, and enter it."""
    known = HELD | WITHOUT_MEANING | NEUTRAL.keys() | REFUSED.keys()
    assert {field.name for field in fields(LoraConfig)} <= known
    assert not (HELD & WITHOUT_MEANING or HELD & REFUSED.keys() or WITHOUT_MEANING & REFUSED.keys())


def test_the_page_lists_every_field() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    named = {word for row in rows for word in row.split("`")[1::2]}
    assert {field.name for field in fields(LoraConfig)} <= named


HONOURED = (
    {"lora_alpha": 3},
    {"use_rslora": True},
    {"alpha_pattern": {r"layers\.0\..*": 32, "v_proj": 1}},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": [*TARGETS, "query_key_value"]},
    {"target_modules": "all-linear", "init_lora_weights": True},
    {"exclude_modules": ["k_proj"]},
    {"exclude_modules": r".*\.mlp\..*"},
    {"layers_to_transform": [0, 1, 2, 3, 4, 5], "layers_pattern": "layers"},
    {"layers_to_transform": []},
)

HARMLESS = (
    {"fan_in_fan_out": True},
    {"lora_dropout": 0.5},
    {"inference_mode": False},
    {"loftq_config": {"loftq_bits": 4}},
    {"eva_config": {"rho": 2.0}},
    {"corda_config": {}},
    {"lora_ga_config": {}},
    {"runtime_config": {"ephemeral_gpu_offload": True}},
    {"qalora_group_size": 4},
    {"auto_mapping": {"base_model_class": "X", "parent_library": "y"}},
    {"peft_version": "0.1"},
    {"megatron_core": "other.core"},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"revision": "main"},
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [*HONOURED, *HARMLESS], ids=json.dumps)
def test_a_field_that_is_read_or_harmless_computes_as_in_peft(
    change: dict[str, Any], saved: Path, qwen2: Path, tmp_path: Path
) -> None:
    folder = edited(saved, tmp_path / "a", **change)
    adapter, _ = read_any_adapter(folder, qwen2)
    torch.testing.assert_close(merged_logits(qwen2, adapter), peft_logits(qwen2, folder), atol=2e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"exclude_modules": ["v_proj"]}, "v_proj, which exclude_modules in adapter_config.json leaves out"),
        ({"exclude_modules": r".*\.0\..*"}, "which exclude_modules in adapter_config.json leaves out"),
        ({"layers_to_transform": [0]}, "which layers_to_transform in adapter_config.json leaves out"),
        ({"layers_to_transform": 1}, "which layers_to_transform in adapter_config.json leaves out"),
        (
            {"layers_to_transform": [0, 1, 2, 3], "layers_pattern": ["blocks"]},
            "which layers_to_transform in adapter_config.json leaves out",
        ),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_tensors_that_peft_leaves_aside_are_refused(
    change: dict[str, Any], words: str, saved: Path, qwen2: Path, tmp_path: Path
) -> None:
    folder = edited(saved, tmp_path / "a", **change)
    with pytest.raises(AdapterError, match=words):
        read_any_adapter(folder, qwen2)
    # PEFT loads the same folder, and computes something else than all of its tensors.
    try:
        elsewhere = peft_logits(qwen2, folder)
    except ValueError:
        return
    assert not torch.allclose(elsewhere, peft_logits(qwen2, saved), atol=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(({name: {"x": 1} if name.endswith("_config") or name == "use_bdlora" else True}, name)
          for name in sorted(REFUSED.keys() - NEUTRAL.keys())),
        ({"target_modules": "all-linear"}, "PEFT would start it at random values"),
        ({"kasa_config": {}}, "kasa_config"),
        ({"velora_config": {}}, "velora_config"),
        ({"alora_invocation_tokens": []}, "alora_invocation_tokens"),
        ({"layers_pattern": "layers"}, "layers_pattern is there without layers_to_transform"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "layers_to_transform needs a list of names"),
        ({"layers_to_transform": "0"}, "layers_to_transform must be a number or a list of numbers"),
    ],
    ids=str,
)  # fmt: skip
def test_a_field_that_is_more_than_lora_is_refused(
    change: dict[str, Any], words: str, saved: Path, qwen2: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=words):
        read_any_adapter(edited(saved, tmp_path / "a", **change), qwen2)


def test_a_target_that_the_base_lacks_is_accepted_and_named(saved: Path, qwen2: Path, tmp_path: Path) -> None:
    folder = edited(saved, tmp_path / "a", target_modules=[*TARGETS, "query_key_value", "c_attn"])
    assert sorted(unmatched_targets(folder, qwen2)) == ["c_attn", "query_key_value"]
    assert unmatched_targets(saved, qwen2) == ()
    # One that the base has and the file does not is missing.
    incomplete = edited(saved, tmp_path / "b", target_modules=[*TARGETS, "o_proj"])
    with pytest.raises(AdapterError, match="has no tensors for o_proj, which adapter_config.json targets"):
        read_any_adapter(incomplete, qwen2)
