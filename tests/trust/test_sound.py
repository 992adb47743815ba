"""No alarm where nothing is wrong: architectures × dtypes × backends × saved, reloaded, re-saved, merged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import outcomes
import pytest
import torch
from artefacts import (
    Artefact,
    convert_to_mlx_lm,
    convert_to_peft,
    copy_tokenizer,
    edit_config,
    edit_factors,
    edit_json,
    make_adapter,
    make_base,
    merge_with_peft,
    placement,
)
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mindprint.adapter.merging import merged_folder
from mindprint.adapter.peft_format import CONFIG_FILE, read_adapter
from mindprint.models.folder import ModelFolder, check_model_folder
from mindprint.trust.fingerprint import FILE_NAME, read_fingerprint
from mindprint.trust.report import Report
from mindprint.trust.verify import TELLING, verify_adapter, verify_merged


@dataclass(frozen=True)
class Family:
    """A family of bases, the dtype that one is stored in, and the backend that trained its adapter."""

    model_type: str
    dtype: torch.dtype
    trained_on: str
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.model_type} {self.dtype}".replace("torch.", "")


FAMILIES = (
    Family("llama", torch.float32, "torch", {}),
    Family("qwen2", torch.bfloat16, "mlx", {"tie_word_embeddings": True}),
    Family("qwen3", torch.float16, "torch", {"head_dim": 24}),
    Family("gemma2", torch.float32, "mlx", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}),
    Family("phi3", torch.bfloat16, "torch", {}),
    Family("gpt_neox", torch.float32, "torch", {"intermediate_size": 256}),
)


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    family: Family = request.param
    artefact = Artefact(tmp_path_factory.mktemp("sound"))
    make_base(artefact.base, family.model_type, family.dtype, **family.settings)
    make_adapter(artefact, family.trained_on)
    return artefact


def as_it_was(_: Artefact) -> None:
    pass


def base_in_shards(it: Artefact) -> None:
    """Loaded and saved by transformers, in several files."""
    model = AutoModelForCausalLM.from_pretrained(it.base, dtype="auto")
    again = it.root / "again"
    model.save_pretrained(again, max_shard_size="100KB")
    copy_tokenizer(it.base, again)
    shutil.rmtree(it.base)
    again.rename(it.base)


def base_in_float32(it: Artefact) -> None:
    """Every value is as it was, the files are twice as large."""
    model = AutoModelForCausalLM.from_pretrained(it.base, dtype=torch.float32)
    model.save_pretrained(it.base)


def adapter_through_peft(it: Artefact) -> None:
    """Loaded and saved by PEFT, which writes its own configuration."""
    model = AutoModelForCausalLM.from_pretrained(it.base, dtype=torch.float32)
    fingerprint = (it.adapter / FILE_NAME).read_text()
    tuned = PeftModel.from_pretrained(model, it.adapter)
    shutil.rmtree(it.adapter)
    tuned.save_pretrained(it.adapter)
    (it.adapter / FILE_NAME).write_text(fingerprint)


def adapter_in_bfloat16(it: Artefact) -> None:
    edit_factors(it, lambda _, values: values.bfloat16())


def converted_to_mlx_lm(it: Artefact) -> None:
    convert_to_mlx_lm(it)


def converted_there_and_back(it: Artefact) -> None:
    convert_to_mlx_lm(it)
    convert_to_peft(it)


def without_fingerprint(it: Artefact) -> None:
    (it.adapter / FILE_NAME).unlink()


def merged_by_mindprint(it: Artefact) -> None:
    adapter, _ = read_adapter(it.adapter)
    with merged_folder(it.merged, ModelFolder(it.base, "base"), adapter, it.adapter):
        pass


def merged_in_float32(it: Artefact) -> None:
    merge_with_peft(it, torch.float32)


def merged_in_bfloat16(it: Artefact) -> None:
    merge_with_peft(it, torch.bfloat16)


def adapter_in_float16(it: Artefact) -> None:
    edit_factors(it, lambda _, values: values.half())


def a_target_that_the_base_lacks(it: Artefact) -> None:
    """As tools write them that have one list for many families."""
    config = json.loads((it.adapter / CONFIG_FILE).read_text())
    edit_config(it, target_modules=[*config["target_modules"], "c_attn", "query_key_value_of_another"])


def defaults_are_left_out(it: Artefact) -> None:
    """As tools write config.json that state only what differs from the class."""
    file = it.base / "config.json"
    values = json.loads(file.read_text())
    defaults = CONFIG_MAPPING[values["model_type"]]().to_dict()
    edit_json(file, {}, tuple(n for n in values if n != "model_type" and n in defaults and values[n] == defaults[n]))


def fingerprint_of_format_1(it: Artefact) -> None:
    file = it.adapter / FILE_NAME
    content = json.loads(file.read_text())
    del content["digest"], content["adapter"]["rounded"]
    del content["tokenizer"]["decoder"], content["tokenizer"]["variables"]
    file.write_text(json.dumps({**content, "format": 1}))


def a_pad_token_is_set(it: Artefact) -> None:
    """As tools do that pad: the template does not write it."""
    edit_json(it.base / "tokenizer_config.json", {"pad_token": "<|im_start|>"})


NOTES: Mapping[str, set[str]] = {
    "adapter_in_bfloat16": {"precision"},
    "adapter_in_float16": {"precision"},
    "a_target_that_the_base_lacks": {"unmatched_targets"},
    "without_fingerprint": {"no_fingerprint"},
}
"""What the report must say of a treatment though nothing is wrong."""

TREATMENTS: tuple[Callable[[Artefact], None], ...] = (
    as_it_was,
    base_in_shards,
    base_in_float32,
    adapter_through_peft,
    adapter_in_bfloat16,
    converted_to_mlx_lm,
    converted_there_and_back,
    without_fingerprint,
    merged_by_mindprint,
    merged_in_float32,
    merged_in_bfloat16,
)


THOROUGH = os.environ.get("MINDPRINT_TRUST") == "all"
"""`nox -s trust` sets it. Plain nox runs a part that has every kind."""

MORE = (
    adapter_in_float16,
    a_target_that_the_base_lacks,
    defaults_are_left_out,
    fingerprint_of_format_1,
    a_pad_token_is_set,
)

EVERYWHERE = (*TREATMENTS, *MORE) if THOROUGH else (as_it_was, converted_to_mlx_lm, merged_by_mindprint)
"""Verified on both backends; the others on the one that did not train the adapter."""

BACKENDS = ("torch", "mlx")


def other_than(trained_on: str) -> list[str]:
    return [name for name in BACKENDS if name != trained_on]


def verified(it: Artefact, backend: str) -> Report:
    base = ModelFolder(check_model_folder(it.base), "base")
    if not it.merged.exists():
        return verify_adapter(it.adapter, base, placement(backend))
    merged, (adapter, _) = ModelFolder(check_model_folder(it.merged), "merged"), read_adapter(it.adapter)
    return verify_merged(merged, base, adapter, placement(backend), read_fingerprint(it.adapter))


@pytest.mark.parametrize(
    "treatment", [*TREATMENTS, *(MORE if THOROUGH else ())], ids=lambda treatment: treatment.__name__
)
def test_what_is_sound_raises_no_alarm(treatment: Callable[[Artefact], None], sound: Artefact, tmp_path: Path) -> None:
    it = sound.copy(tmp_path)
    treatment(it)
    fingerprint = read_fingerprint(sound.adapter)
    assert fingerprint is not None
    trained_on = fingerprint.measurements[0].backend
    for backend in BACKENDS if treatment in EVERYWHERE else other_than(trained_on):
        report = verified(it, backend)
        outcomes.sound(treatment.__name__.replace("_", " "), report)
        assert report.ok, report.findings
        assert {finding.code for finding in report.findings} >= NOTES.get(treatment.__name__, set())
        assert all(comparison.within for comparison in report.comparisons)
        assert report.effect is not None
        assert report.effect.found > 0.01


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_in_bfloat16_the_files_decide(backend: str, sound: Artefact) -> None:
    """The dtype's noise hides the effect, and the report says so; a scale that is wrong is found all the same."""
    report = verify_adapter(sound.adapter, ModelFolder(sound.base, "base"), placement(backend, "bfloat16"))
    outcomes.sound("computed in bfloat16", report)
    assert report.ok, report.findings
    effect, allowed = report.effect, report.comparisons[-1].tolerance
    assert effect is not None and effect.recorded is not None
    told = {finding.code for finding in report.findings}
    assert ("probe_cannot_tell" in told) == (effect.recorded < TELLING * allowed.mean)


def test_in_bfloat16_a_small_effect_cannot_be_told_and_a_wrong_scale_is_found(tmp_path: Path) -> None:
    """An effect far below the noise (a prototype saw 0.0065 nats a token against 0.06): digests decide."""
    artefact = Artefact(tmp_path)
    make_base(artefact.base, "llama")
    make_adapter(artefact, size=0.002)
    place, base = placement("torch", "bfloat16"), ModelFolder(artefact.base, "base")
    report = verify_adapter(artefact.adapter, base, place)
    assert report.effect is not None and report.effect.recorded is not None
    assert report.effect.recorded < 0.02
    assert [(finding.code, finding.fails) for finding in report.findings] == [("probe_cannot_tell", False)]
    edit_config(artefact, lora_alpha=32)
    report = verify_adapter(artefact.adapter, base, place)
    assert report.codes == {"scale"}
    assert report.findings[0].factor == pytest.approx(4.0)


def test_there_are_sixty_combinations_and_150_in_the_thorough_session() -> None:
    in_bfloat16 = 1
    if THOROUGH:
        assert len(FAMILIES) * 2 * (len(EVERYWHERE) + in_bfloat16) >= 150
    else:
        assert len(FAMILIES) * (len(TREATMENTS) + len(EVERYWHERE) + 2 * in_bfloat16) >= 60
