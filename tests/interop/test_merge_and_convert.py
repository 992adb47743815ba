"""Merges and conversions in other tools' hands: PEFT merges the same, mlx-lm and transformers compute the same.

Every architecture of the matrix, in small: PEFT makes an adapter on every linear layer (and on stacked experts), and
what PEFT computes with it is what everything else must compute.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers.models
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes as mlx_lm_classes
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from architectures import MATRIX, SMALL, loaded, rewritten, saved
from mindprint.adapter import mlx_lm_format, peft_format
from mindprint.adapter.base_facts import read_base_facts
from mindprint.adapter.formats import read_any_adapter
from mindprint.adapter.merging import merged_folder
from mindprint.adapter.module_names import FAMILIES, TRANSPOSED_LINEARS, TRANSPOSED_STACKS
from mindprint.errors import AdapterError
from mindprint.models import folder as models
from mindprint.models.folder import ModelFolder
from mindprint.models.layer_names import FUSED_OUTPUTS
from mindprint.models.tensor_files import add_float32, from_float32, read_float32, to_float32
from mindprint.trust.bases import Doubt
from mindprint.trust.merged import merge_findings
from mindprint.trust.report import Finding

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe"}

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning",  # PEFT's, of embeddings and of transposed layers
    "ignore:The following (rank|alpha)_pattern:RuntimeWarning",  # PEFT's, of patterns for parameters, which it applies
)


@dataclass(frozen=True)
class Case:
    """A base, an adapter of PEFT's on it, and the logits of both."""

    base: Path
    adapter: Path
    tokens: np.ndarray
    bare: np.ndarray
    wanted: np.ndarray


def make_case(folder: Path, model_type: str, peft: dict[str, Any] | None = None, **changes: Any) -> Case:
    base = folder / "base"
    reference = saved(base, model_type, num_hidden_layers=2, **changes)
    (base / "tokenizer.json").write_text("{}")
    settings: dict[str, Any] = peft or {"target_modules": "all-linear"}
    if peft is None and model_type in FUSED_OUTPUTS:
        # PEFT's own all-linear names layers that PEFT then refuses.
        settings["target_modules"] = sorted({name.rpartition(".")[2] for name in reference.linears} - {"lm_head"})
    if peft is None and model_type in EXPERTS:
        settings["target_parameters"] = STACKS
    network = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    wrapped = get_peft_model(network, lora)
    wrapped.save_pretrained(folder / "adapter")
    return Case(base, folder / "adapter", reference.tokens, reference.logits, torch_logits(wrapped, reference.tokens))


def torch_logits(network: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(network.eval()(torch.tensor(tokens)).logits.float().numpy())


def logits_of(folder: Path, tokens: np.ndarray) -> np.ndarray:
    return torch_logits(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"), tokens)


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def merged(case: Case, out: Path) -> Path:
    adapter, _ = read_any_adapter(case.adapter, case.base)
    with merged_folder(out, ModelFolder(case.base, "base"), adapter, case.adapter):
        pass
    return out


@pytest.mark.parametrize("model_type", sorted(FAMILIES.keys() & MATRIX.keys()))
def test_merged_and_converted(model_type: str, tmp_path: Path) -> None:
    """Ours and PEFT's own `merge_and_unload` agree tensor by tensor, and every reader computes what PEFT computed."""
    case = make_case(tmp_path, model_type)
    assert distance(case.wanted, case.bare) > 1e-2
    out = merged(case, tmp_path / "merged")
    assert distance(logits_of(out, case.tokens), case.wanted) < 1e-5
    same_tensors_as_peft(case, out, tmp_path / "peft")
    handle = loaded(out).handle
    with handle.in_use():
        assert distance(np.array(handle.module(mx.array(case.tokens))), case.wanted) < 1e-4
    converted_and_back(case, tmp_path)


def same_tensors_as_peft(case: Case, out: Path, folder: Path) -> None:
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(case.base), case.adapter)
    wrapped.merge_and_unload().save_pretrained(folder)
    theirs, ours, before = (models.tensors(path) for path in (folder, out, case.base))
    assert theirs.keys() == ours.keys()
    changed = 0
    for name, info in ours.items():
        found, wanted = read_float32(info), read_float32(theirs[name])
        assert np.abs(found - wanted).max() <= 2e-6 * max(1.0, np.abs(wanted).max()), name
        changed += not np.array_equal(found, read_float32(before[name]))
    adapter, _ = read_any_adapter(case.adapter)
    assert changed >= len(adapter.tensors)


def converted_and_back(case: Case, folder: Path) -> None:
    """mlx-lm's own `load_adapters` on the model that this backend computes right, and back into PEFT."""
    from mlx_lm.tuner.utils import load_adapters

    adapter, _ = read_any_adapter(case.adapter, case.base)
    (folder / "mlx").mkdir()
    mlx_lm_format.write_adapter(folder / "mlx", adapter, read_base_facts(case.base), "base")
    handle = loaded(case.base).handle
    with handle.in_use():
        load_adapters(handle.module, str(folder / "mlx")).eval()
        assert distance(np.array(handle.module(mx.array(case.tokens))), case.wanted) < 1e-4
    again, named = read_any_adapter(folder / "mlx", case.base)
    assert named == "base"
    (folder / "again").mkdir()
    peft_format.write_adapter(folder / "again", again, "base")
    network = AutoModelForCausalLM.from_pretrained(case.base, attn_implementation="eager")
    wrapped = PeftModel.from_pretrained(network, folder / "again")
    assert distance(torch_logits(wrapped, case.tokens), case.wanted) < 1e-6


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("llama", {"target_modules": r".*layers\.1\..*(q|v)_proj", "use_rslora": True}),
        ("qwen2", {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"1.*": 9}}),
        ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
        ("qwen3_moe", {"target_modules": ["v_proj"], "target_parameters": [*STACKS, "mlp.gate.weight"]}),
        ("gpt_neox", {"target_modules": ["query_key_value", "embed_in", "lm_head"]}),
    ],
    ids=["embedding and head", "regex and rslora", "patterns", "old names of experts", "router", "other names"],
)
def test_other_ways_to_name_targets(model_type: str, settings: dict[str, Any], tmp_path: Path) -> None:
    case = make_case(tmp_path, model_type, settings)
    out = merged(case, tmp_path / "merged")
    assert distance(logits_of(out, case.tokens), case.wanted) < 1e-5
    converted_and_back(case, tmp_path)


def test_what_mlx_lm_trained_computes_the_same_here(tmp_path: Path) -> None:
    """An adapter that `linear_to_lora_layers` put on, as `mlx_lm.lora` does by default, saved as it saves."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    base = tmp_path / "base"
    reference = saved(base, "qwen3_moe", num_hidden_layers=2)
    lora = {"rank": 3, "scale": 5.0, "dropout": 0.0}
    handle = loaded(base).handle
    with handle.in_use():
        handle.module.freeze()
        linear_to_lora_layers(handle.module, 1, lora)
        trained = tree_flatten(handle.module.trainable_parameters())
        drawn = [(name, mx.random.normal(part.shape, key=mx.random.key(7)) * 0.05) for name, part in trained]
        handle.module.load_weights(drawn, strict=False)
        wanted = np.array(handle.module(mx.array(reference.tokens)))
    folder = tmp_path / "adapters"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(drawn))
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": lora, "model": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    adapter, named = read_any_adapter(folder, base)
    assert named == str(base)
    (tmp_path / "peft").mkdir()
    peft_format.write_adapter(tmp_path / "peft", adapter, named)
    network = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    found = torch_logits(PeftModel.from_pretrained(network, tmp_path / "peft"), reference.tokens)
    assert distance(wanted, reference.logits) > 1e-2
    assert distance(found, wanted) < 1e-5


CONV1D = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
LINEARS = ["c_attn", "c_proj", "c_fc"]
TABLES = {"gpt2": "wte", "openai-gpt": "tokens_embed"}
TARGETS = {"linears": [], "head": ["lm_head"], "embedding": ["table"], "both": ["lm_head", "table"]}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", sorted(CONV1D))
def test_families_that_store_linears_transposed(model_type: str, tied: bool, targets: str, tmp_path: Path) -> None:
    """Merged as PEFT merges it, and verified, or refused where a tied base has no weight for the change alone."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](
        vocab_size=131, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied, **CONV1D[model_type]
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    named = LINEARS + [TABLES[model_type] if name == "table" else name for name in TARGETS[targets]]
    settings: dict[str, Any] = {"target_modules": named, "fan_in_fan_out": True, "init_lora_weights": False}
    wrapped = get_peft_model(network, LoraConfig(r=2, lora_alpha=4, **settings))
    wrapped.save_pretrained(tmp_path / "adapter")
    tokens = np.arange(3, 23).reshape(2, 10)
    case = Case(tmp_path / "base", tmp_path / "adapter", tokens, tokens, torch_logits(wrapped, tokens))
    if tied and targets != "linears":
        with pytest.raises(AdapterError, match="embedding and LM head are one tensor in this base"):
            merged(case, tmp_path / "merged")
        return
    out = merged(case, tmp_path / "merged")
    assert distance(logits_of(out, tokens), case.wanted) < 1e-5
    same_tensors_as_peft(case, out, tmp_path / "peft")
    adapter, _ = read_any_adapter(case.adapter, case.base)
    for folder in (out, tmp_path / "peft"):
        assert not [finding for finding in merge_findings(folder, case.base, adapter) if is_fault(finding)]


def is_fault(finding: Finding | Doubt) -> bool:
    return isinstance(finding, Doubt) or finding.fails


def test_every_family_of_causal_models_with_conv1d_is_in_the_table() -> None:
    """Which classes have transformers' `Conv1D` inside is read from their sources."""
    root = Path(transformers.models.__file__).parent
    with_it = {path.parent.name for path in root.glob("*/modeling_*.py") if re.search(r"\bConv1D\(", path.read_text())}
    causal = {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if model_type_to_module_name(name) in with_it}
    assert causal == TRANSPOSED_LINEARS


def test_every_family_whose_stacks_are_transposed_is_in_the_table() -> None:
    root = Path(transformers.models.__file__).parent
    marked = {path.parent.name for path in root.glob("*/modeling_*.py") if "is_transposed=True" in path.read_text()}
    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    assert {name for name in names if model_type_to_module_name(name) in marked} == TRANSPOSED_STACKS


@pytest.mark.parametrize("square", [False, True], ids=["oblong", "square"])
def test_stacks_that_are_stored_transposed(square: bool, tmp_path: Path) -> None:
    """GPT-OSS keeps `[experts, in, out]`; in its 20B model the stack of `down_proj` is square."""
    sizes = {"hidden_size": 64, "intermediate_size": 64 if square else 48, "num_local_experts": 3, "head_dim": 16}
    config = CONFIG_MAPPING["gpt_oss"](**{**SMALL, **sizes, "num_hidden_layers": 1, "num_experts_per_tok": 2})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": STACKS, "init_lora_weights": False}
    wrapped = get_peft_model(network, LoraConfig(r=2, lora_alpha=4, **settings))
    wrapped.save_pretrained(tmp_path / "adapter")
    tokens = np.arange(3, 23).reshape(2, 10)
    case = Case(tmp_path / "base", tmp_path / "adapter", tokens, tokens, torch_logits(wrapped, tokens))
    out = merged(case, tmp_path / "merged")
    assert distance(logits_of(out, tokens), case.wanted) < 1e-5
    adapter, _ = read_any_adapter(case.adapter, case.base)
    assert not [finding for finding in merge_findings(out, case.base, adapter) if is_fault(finding)]


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_families_in_which_mlx_lm_has_no_head_are_marked(model_type: str) -> None:
    """Such a model computes with the embedding as the head, even where config.json says that the two are not tied."""
    model_class, _ = mlx_lm_classes({"model_type": model_type})
    source = inspect.getsource(inspect.getmodule(model_class))
    has_head = re.search(r"self\.(lm_head|embed_out)\b", source) is not None
    assert has_head == FAMILIES[model_type].mlx_lm_head


def test_reduced_dtypes_round_as_torch_does() -> None:
    """A million bit patterns, every exponent, infinities and NaN among them, and exact ties."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 2**20, dtype=np.uint32)
    bits[: 2**16] = (bits[: 2**16] & 0xFFFF0000) | 0x8000
    bits[:4] = (0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF)
    values = bits.view(np.float32)
    theirs = torch.from_numpy(values.copy()).bfloat16()
    mine = from_float32(values, "BF16")
    number = ~np.isnan(values)
    assert np.array_equal(mine[number], theirs.view(torch.int16).numpy().view(np.uint16)[number])
    assert np.isnan(to_float32(mine[~number], "BF16")).all()
    stored = theirs.view(torch.int16).numpy().view(np.uint16).copy()
    change = random.normal(0, 1, len(values)).astype(np.float32)
    wanted = (theirs.float() + torch.from_numpy(change)).bfloat16()
    add_float32(stored, change.copy(), "BF16")
    found = torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(torch.nan_to_num(found.float(), nan=1.0), torch.nan_to_num(wanted.float(), nan=1.0))
    with np.errstate(over="ignore", invalid="ignore"):
        half = from_float32(values, "F16")
    assert np.array_equal(half[number], torch.from_numpy(values.copy()).half().numpy()[number])


def test_a_converted_adapter_generates_in_mlx_lm(tmp_path: Path) -> None:
    """mlx-lm's own `load` and `generate`, on a base whose rope it reads (a rope_theta at the top)."""
    from mlx_lm import generate, load

    from random_models import save_tokenizer

    case = make_case(tmp_path, "llama", base=10000.0, vocab_size=400)
    rewritten(case.base, {"rope_theta": 10000.0})
    (case.base / "tokenizer.json").unlink()
    save_tokenizer(case.base)
    adapter, _ = read_any_adapter(case.adapter, case.base)
    (tmp_path / "mlx").mkdir()
    mlx_lm_format.write_adapter(tmp_path / "mlx", adapter, read_base_facts(case.base), str(case.base))
    out, texts = merged(case, tmp_path / "merged"), []
    for folder, adapters in ((case.base, str(tmp_path / "mlx")), (out, None), (case.base, None)):
        model, tokenizer = load(str(folder), adapter_path=adapters)[:2]
        texts.append(generate(model, tokenizer, prompt="The ferry waits", max_tokens=12))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("model_type", sorted(FAMILIES.keys() & MATRIX.keys()))
def test_names_are_those_of_mlx_lms_own_modules(model_type: str, tmp_path: Path) -> None:
    """Every path of the table is a module that mlx-lm's class has, and leads back to the site that it came from."""
    from mindprint.adapter.module_names import from_mlx_lm, to_mlx_lm

    reference = saved(tmp_path, model_type, num_hidden_layers=2)
    facts, handle = read_base_facts(tmp_path), loaded(tmp_path).handle
    modules = {name for name, _ in handle.module.named_modules()}
    heads = {"lm_head"} if facts.tied else set()
    for site in reference.linears - heads:
        path = to_mlx_lm(site, facts.family)
        assert path in modules
        assert from_mlx_lm(path, facts.family) == site
