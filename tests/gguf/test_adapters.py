"""Adapters in GGUF against llama.cpp: its own converter writes the same tensors, and its log-probs are those of PEFT.

`nox -s gguf` fetches llama.cpp's converters and its library, and says where they are in two variables.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_cpp import logits
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import architectures
from architectures import MATRIX, saved
from gguf import GGUFReader
from mindprint.adapter import gguf_format
from mindprint.adapter.base_facts import read_base_facts
from mindprint.adapter.formats import read_any_adapter
from mindprint.contract import AdapterState

SOURCE = Path(os.environ["LLAMA_CPP_SOURCE"])
LIBRARY = Path(os.environ["LLAMA_CPP_LIBRARY"])

ATTENTION = r".*self_attn\.[qkvo]_proj"

CHANGES: Mapping[str, Mapping[str, Any]] = {
    # llama.cpp reads no window from the files of these families, or has another pattern for it.
    **{family: {"sliding_window": 128} for family in ("exaone4", "mistral", "starcoder2")},
    # llama.cpp's olmoe and phi2 have as many heads of k and v as of q, and phi2 has four times the width inside.
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "phi": {"num_key_value_heads": 4, "intermediate_size": 256},
    # llama.cpp's qwen3moe always scales the chosen experts' weights to a sum of 1, as every published model states.
    "qwen3_moe": {"norm_topk_prob": True},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
}
KEYS_OF_EARLIER_TRANSFORMERS: Mapping[str, Mapping[str, Any]] = {
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt2": {"n_ctx": 256},
}
"""Settings that the converters ask for and transformers 5 does not have under these names any longer."""

MIXTURES = ("mixtral", "qwen3_moe", "olmoe")
"""The converters cannot read an adapter on stacked experts, so only attention is adapted."""

TRANSPOSED_BY_CONVERTER = "gpt2"
"""The converter transposes the factors of GPT-2 along with the base's weights, and swaps A and B by it."""

DEFAULT_ROPE_BASE = ("gemma", "gemma2", "gpt_neox", "phi", "stablelm")
"""Families whose converters write no base of the rotary embedding: llama.cpp computes with 10000, whatever it is."""

WITH_GELU = ("gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi", "starcoder2")
"""Families whose GELU llama.cpp reads from a table in float16 on the CPU (`ggml_vec_gelu_f32`)."""


@dataclass(frozen=True)
class Converted:
    """A base and PEFT's adapter on it, as both converters wrote them."""

    base: Path
    adapter: Path
    base_gguf: Path
    theirs: Path
    ours: Path
    errors: Mapping[str, str]


FAMILIES = sorted(gguf_format.ARCHITECTURES)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converted]:
    folder = tmp_path_factory.mktemp("gguf")
    jobs = [make_job(folder / family, family) for family in FAMILIES]
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    script = Path(__file__).with_name("convert_with_llama_cpp.py")
    done = subprocess.run(
        [sys.executable, str(script), str(SOURCE), str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = [json.loads(line) for line in done.stdout.splitlines()]
    made = {}
    for family, job, error in zip(FAMILIES, jobs, errors, strict=True):
        ours = folder / family / "ours"
        ours.mkdir()
        adapter, _ = read_any_adapter(Path(job["adapter"]), Path(job["base"]))
        write(ours, adapter, Path(job["base"]))
        paths = {key: Path(job[key]) for key in ("base", "adapter", "base_gguf")}
        made[family] = Converted(**paths, theirs=Path(job["adapter_gguf"]), ours=ours, errors=error)
    return made


def make_job(folder: Path, family: str) -> dict[str, Any]:
    """Save a random model of a family, and an adapter that PEFT made on it."""
    names = {"base": "base", "adapter": "adapter", "base_gguf": "base.gguf", "adapter_gguf": "theirs.gguf"}
    job = {key: str(folder / name) for key, name in names.items()}
    base = Path(job["base"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architectures, "MATRIX", {"gpt2": {}, "olmoe": {}, **MATRIX})
        layers = {} if family == "gpt2" else {"num_hidden_layers": 2}
        rope_base = 10000.0 if family in DEFAULT_ROPE_BASE else 500000.0
        saved(base, family, rope_base, **layers, **CHANGES.get(family, {}))
    network = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    torch.manual_seed(1)
    targets = ATTENTION if family in MIXTURES else "all-linear"
    lora = LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", target_modules=targets,
        fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    get_peft_model(network, lora).save_pretrained(job["adapter"])
    # The converters count the tokens of Gemma 3 in this file, also where no vocabulary is written.
    (base / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": dict.fromkeys(range(131))}, "added_tokens": []})
    )
    return job | {"settings": dict(KEYS_OF_EARLIER_TRANSFORMERS.get(family, {}))}


def write(folder: Path, adapter: AdapterState, base: Path) -> tuple[str, ...]:
    return gguf_format.write_adapter(folder, adapter, read_base_facts(base), base, "base")


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(file).tensors}


def keys_of(file: Path) -> dict[str, Any]:
    keys = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
    return {key: GGUFReader(file).fields[key].contents() for key in keys}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != TRANSPOSED_BY_CONVERTER])
def test_the_tensors_are_those_of_llama_cpps_converter(family: str, converted: dict[str, Converted]) -> None:
    case = converted[family]
    assert case.errors == {}
    ours, theirs = (tensors_of(file) for file in (case.ours / gguf_format.ADAPTER_FILE, case.theirs))
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, theirs[name], err_msg=name)
    assert keys_of(case.ours / gguf_format.ADAPTER_FILE) == keys_of(case.theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_peft_computes(family: str, converted: dict[str, Converted]) -> None:
    case = converted[family]
    tokens = np.random.default_rng(0).integers(3, 131, 24)
    base, tuned = peft_logits(case.base, case.adapter, tokens)
    base_distance = distance(logits(LIBRARY, case.base_gguf, tokens), base)
    tuned_distance = distance(logits(LIBRARY, case.base_gguf, tokens, case.ours / gguf_format.ADAPTER_FILE), tuned)
    effect = distance(tuned, base)
    print(f"{family:18s} base {base_distance:.1e} tuned {tuned_distance:.1e} effect {effect:.1e}")
    # A number next to the middle of two entries of the table may be read from either.
    assert max(base_distance, tuned_distance) <= (1e-4 if family in WITH_GELU else 2e-6)
    assert effect > 0.2


def gelu_from_table(values: torch.Tensor) -> torch.Tensor:
    """Return GELU as llama.cpp has it on the CPU: of the float16 next to each number, rounded to float16."""
    rounded = torch.nn.functional.gelu(values.half().float(), approximate="tanh").half().float()
    return torch.where(values <= -10, torch.zeros_like(values), torch.where(values >= 10, values, rounded))


def set_activation(network: torch.nn.Module) -> None:
    """Replace every GELU of a network by that of llama.cpp."""
    replaced = 0
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if "gelu" in type(child).__name__.lower():
                delattr(module, name)
                setattr(module, name, gelu_from_table)
                replaced += 1
    assert replaced


def peft_logits(base: Path, adapter: Path, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    network = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    if network.config.model_type in WITH_GELU:
        set_activation(network)
    rows = torch.tensor(tokens)[None]
    with torch.no_grad():
        untuned = network(rows).logits[0].numpy()
        return untuned, PeftModel.from_pretrained(network, adapter).eval()(rows).logits[0].numpy()


def distance(logits: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(logits - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_without_the_order_of_rows_the_numbers_are_wrong(
    family: str, converted: dict[str, Converted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the test above sees rows in the wrong order."""
    case = converted[family]
    known = gguf_format.ARCHITECTURES[family]
    monkeypatch.setattr(gguf_format, "ARCHITECTURES", {family: replace(known, layout=None)})
    adapter, _ = read_any_adapter(case.adapter, case.base)
    write(tmp_path, adapter, case.base)
    tokens = np.random.default_rng(0).integers(3, 131, 24)
    _, tuned = peft_logits(case.base, case.adapter, tokens)
    assert distance(logits(LIBRARY, case.base_gguf, tokens, tmp_path / gguf_format.ADAPTER_FILE), tuned) > 1e-2


def test_scales_that_one_alpha_cannot_hold(converted: dict[str, Converted], tmp_path: Path) -> None:
    """rsLoRA with other ranks and alphas at some sites: folded into B, and the same numbers."""
    case = converted["llama"]
    network = AutoModelForCausalLM.from_pretrained(case.base, attn_implementation="eager")
    torch.manual_seed(2)
    lora = LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, rank_pattern={"q_proj": 7}, alpha_pattern={"down_proj": 11},
        init_lora_weights=False, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "down_proj"],
    )  # fmt: skip
    get_peft_model(network, lora).save_pretrained(tmp_path / "adapter")
    adapter, _ = read_any_adapter(tmp_path / "adapter", case.base)
    notes = write(tmp_path, adapter, case.base)
    assert any("one alpha for all modules" in note for note in notes)
    tokens = np.random.default_rng(0).integers(3, 131, 24)
    base, tuned = peft_logits(case.base, tmp_path / "adapter", tokens)
    found = logits(LIBRARY, case.base_gguf, tokens, tmp_path / gguf_format.ADAPTER_FILE)
    assert distance(found, tuned) < 2e-5
    assert distance(base, tuned) > 0.2
