"""Every known way in which an adapter, a base, a backend or a merge goes wrong in silence, one small function each.

A function takes a good artefact and breaks it. With it stands what `mindprint verify` must say (a code of
`mindprint.trust.report`, or the words of a refusal), and where it was seen: a public report, or why it can happen.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from artefacts import Artefact, Tensors, change_of, edit_config, edit_factors, edit_json, edit_tensors, make_base

from mindprint.adapter.mlx_lm_format import WEIGHTS_FILE as MLX_LM_FILE
from mindprint.adapter.peft_format import CONFIG_FILE, WEIGHTS_FILE
from mindprint.contract import AdapterFacts, AdapterState, Float32, LoadedModel, LoraFactors, ModelSpec, TokenBatch
from mindprint.plugins.backend import Backend
from mindprint.trust.fingerprint import FILE_NAME
from mindprint.trust.report import Code

Kind = Literal["adapter", "adapter, no fingerprint", "base", "backend", "conversion", "merge"]


@dataclass(frozen=True)
class Fault:
    """One way to go wrong. `finds` is the code that verify must fail with, `refusal` the words of an error instead.

    `factor` is what a `scale` finding must estimate. A fault of a backend wraps the backend; one of a conversion breaks
    an adapter that was converted to mlx-lm's format.
    """

    name: str
    kind: Kind
    source: str
    apply: Callable[[Any], Any]
    finds: Code | None = None
    refusal: str = ""
    factor: float | None = None


FAULTS: list[Fault] = []


def fault(
    kind: Kind, source: str, finds: Code | None = None, *, refusal: str = "", factor: float | None = None
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Enter a function into the catalogue under its own name."""

    def enter(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        name = function.__name__.replace("_", " ")
        FAULTS.append(Fault(name, kind, source, function, finds, refusal, factor))
        return function

    return enter


# --- an adapter's strength -------------------------------------------------------------------------------------------


@fault("adapter", "Blaizzy/mlx-vlm#841: alpha multiplies the update, not alpha / r", "scale", factor=4.0)
def alpha_is_taken_for_the_scale(it: Artefact) -> None:
    edit_config(it, lora_alpha=32)


@fault("adapter", "NVIDIA/TensorRT-LLM#1477: lora_alpha left out in a conversion", "scale", factor=0.5)
def alpha_is_lost(it: Artefact) -> None:
    edit_config(it, lora_alpha=4)


@fault("adapter", "sgl-project/sglang#40835, NVIDIA/TensorRT-LLM#1668: use_rslora ignored, or set", "scale", factor=2.0)
def rslora_is_misread(it: Artefact) -> None:
    edit_config(it, use_rslora=True)


@fault("adapter", "huggingface/diffusers#14409: mixed ranks or alphas get one scale for all", "scale", factor=0.25)
def some_modules_have_another_alpha(it: Artefact) -> None:
    edit_config(it, alpha_pattern={"self_attn.q_proj": 2})


@fault(
    "adapter", "ml-explore/mlx-examples#622: the scale was multiplied into B and is applied again", "scale", factor=2.0
)
def the_scale_is_applied_twice(it: Artefact) -> None:
    edit_factors(it, lambda name, values: values * 2 if "lora_B" in name else values)


@fault("adapter", "an adapter subtracted instead of added (PEFT's unmerge, a negated B)", "scale", factor=-1.0)
def the_sign_is_turned(it: Artefact) -> None:
    edit_factors(it, lambda name, values: -values if "lora_B" in name else values)


# --- an adapter's values ---------------------------------------------------------------------------------------------


@fault("adapter", "Goekdeniz-Guelmez/mlx-lm-lora#68: trained without updating anything; B is still zero", "no_effect")
def nothing_was_trained(it: Artefact) -> None:
    edit_factors(it, lambda name, values: values * 0 if "lora_B" in name else values)


@fault(
    "adapter",
    "huggingface/peft#2500 and huggingface/trl#4416: ZeRO-3 saves part of the tensors empty",
    "partly_applied",
)
def a_layer_is_zero(it: Artefact) -> None:
    edit_factors(it, lambda name, values: values * 0 if ".layers.1." in name else values)


@fault("adapter", "huggingface/peft#2500: ZeRO-3 saves tensors of shape [0]", refusal="contradict")
def tensors_are_empty(it: Artefact) -> None:
    edit_factors(it, lambda name, values: values[:0] if ".layers.1." in name else values)


@fault("adapter", "ml-explore/mlx-examples#1328: --num-layers; only the last layers are saved", "layers_missing")
def the_first_layer_is_left_out(it: Artefact) -> None:
    _keep(it, lambda site: ".layers.0." not in site)


@fault("adapter", "vllm-project/vllm#55193: what a tool's own target list leaves out is dropped", "layers_missing")
def the_mlp_is_left_out(it: Artefact) -> None:
    _keep(it, lambda site: ".mlp." not in site)


@fault(
    "adapter",
    "huggingface/transformers#34068: missing keys are left at their start, with a warning",
    refusal="has no tensors for",
)
def tensors_are_missing(it: Artefact) -> None:
    def without(found: Tensors) -> Tensors:
        return {name: values for name, values in found.items() if ".layers.2.mlp.up_proj" not in name}

    edit_tensors(it.adapter / WEIGHTS_FILE, without)


@fault(
    "adapter",
    "vllm-project/vllm#34186: names under another prefix match no module",
    refusal="is not part of a LoRA adapter",
)
def names_have_another_prefix(it: Artefact) -> None:
    def renamed(found: Tensors) -> Tensors:
        return {name.replace("base_model.model.", "language_model."): values for name, values in found.items()}

    edit_tensors(it.adapter / WEIGHTS_FILE, renamed)


@fault("adapter", "osaurus-ai/vmlx-swift#320: mlx-lm's layout under PEFT's names", "transposed")
def factors_are_transposed(it: Artefact) -> None:
    edit_factors(it, lambda _, values: values.T)


@fault("adapter", "osaurus-ai/vmlx-swift#320: transposed bytes read in the shape that was expected", "transposed")
def factors_are_reshaped_instead_of_transposed(it: Artefact) -> None:
    edit_factors(it, lambda _, values: values.T.contiguous().reshape(values.shape))


@fault("adapter", "down and up named the wrong way round (kohya's lora_down and lora_up)", "transposed")
def the_factors_have_each_others_names(it: Artefact) -> None:
    def exchanged(found: Tensors) -> Tensors:
        return {name.translate(str.maketrans("AB", "BA")): values for name, values in found.items()}

    edit_tensors(it.adapter / WEIGHTS_FILE, exchanged)


@fault("adapter", "getainode/ainode#186: an adapter of nothing but NaN, recorded as a success", "not_finite")
def every_value_is_nan(it: Artefact) -> None:
    edit_factors(it, lambda _, values: values * float("nan"))


@fault("adapter", "unslothai/unsloth#3690: single values overflow", "not_finite")
def one_value_is_infinite(it: Artefact) -> None:
    edit_factors(it, lambda name, values: _with(values, float("inf")) if ".layers.2.mlp.down_proj" in name else values)


@fault(
    "adapter", "huggingface/nanotron#427, conversions that permute or rename: gate and up exchanged", "sites_swapped"
)
def gate_and_up_are_exchanged(it: Artefact) -> None:
    _rename(it, {"gate_proj": "up_proj", "up_proj": "gate_proj"})


@fault("adapter", "layers counted from 1 in one tool and from 0 in the other", "sites_swapped")
def layers_are_shifted(it: Artefact) -> None:
    _rename(it, {f".layers.{n}.": f".layers.{(n + 1) % 3}." for n in range(3)})


@fault("adapter", "huggingface/nanotron#427: rows of q permuted for another rotary embedding", "adapter_changed")
def rows_of_q_are_permuted(it: Artefact) -> None:
    def permuted(name: str, values: torch.Tensor) -> torch.Tensor:
        return values.view(4, 2, 8, -1).transpose(1, 2).reshape(values.shape) if "q_proj.lora_B" in name else values

    edit_factors(it, permuted)


@fault(
    "adapter",
    "unslothai/unsloth-zoo#751: a resumed run starts anew; another step's adapter is in its place",
    "adapter_changed",
)
def another_checkpoint_is_in_its_place(it: Artefact) -> None:
    generator = torch.Generator().manual_seed(1)
    edit_factors(it, lambda _, values: values + 0.01 * torch.randn(values.shape, generator=generator))


@fault("adapter", "one bit of one value, from a bad disk or a broken download", "adapter_changed")
def one_value_is_changed(it: Artefact) -> None:
    edit_factors(it, lambda name, values: _with(values, 0.5) if ".layers.1.mlp.up_proj.lora_B" in name else values)


@fault("adapter", "huggingface/peft#2450: a download or a save that was cut off", refusal="truncated")
def the_file_is_truncated(it: Artefact) -> None:
    file = it.adapter / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-1000])


@fault("adapter", "a pickle can run code when it is loaded", refusal="is a pickle, which can run code")
def the_weights_are_a_pickle(it: Artefact) -> None:
    torch.save({"a": torch.zeros(1)}, it.adapter / "adapter_model.bin")
    (it.adapter / WEIGHTS_FILE).unlink()


@fault("adapter", "magnitudes of DoRA dropped by a tool that reads A and B alone", refusal="DoRA")
def it_is_dora(it: Artefact) -> None:
    edit_config(it, use_dora=True)


@fault(
    "adapter",
    "huggingface/peft#2450: trained embeddings in addition to LoRA, dropped by a reader of A and B",
    refusal="whole modules",
)
def it_has_whole_modules_beside(it: Artefact) -> None:
    edit_config(it, modules_to_save=["embed_tokens"])


@fault("adapter", "an edited rank", refusal="contradict")
def the_rank_contradicts_the_tensors(it: Artefact) -> None:
    edit_config(it, r=8)


@fault("adapter", "huggingface/peft#2898: PEFT saves embeddings along and puts them into the base", "adapter_changed")
def it_brings_an_embedding_of_its_own(it: Artefact) -> None:
    name = "base_model.model.model.embed_tokens.weight"
    edit_tensors(it.adapter / WEIGHTS_FILE, lambda found: found | {name: torch.randn(400, 64)})


@fault("adapter", "an earlier checkpoint of the same run, taken for a rounded copy", "adapter_changed")
def an_earlier_checkpoint_is_in_its_place(it: Artefact) -> None:
    edit_factors(it, lambda name, values: _moved(values, 1e-3))


@fault("adapter", "an earlier checkpoint, stored in bfloat16 as published adapters are", "adapter_changed")
def an_earlier_checkpoint_is_there_in_bfloat16(it: Artefact) -> None:
    edit_factors(it, lambda name, values: _moved(values, 3e-3).bfloat16())


@fault("adapter", "an earlier checkpoint, stored in float16", "adapter_changed")
def an_earlier_checkpoint_is_there_in_float16(it: Artefact) -> None:
    edit_factors(it, lambda name, values: _moved(values, 1e-3).half())


@fault("adapter", "noise a hundred times smaller than the rounding of bfloat16", "adapter_changed")
def noise_is_far_below_bfloat16(it: Artefact) -> None:
    edit_factors(it, lambda name, values: _moved(values, 1e-5))


@fault("adapter", "bfloat16 by cutting digits off, not by rounding (a broken converter)", "adapter_changed")
def factors_are_cut_to_bfloat16(it: Artefact) -> None:
    edit_factors(it, lambda name, values: (values.contiguous().view(torch.int32) & -65536).view(torch.float32))


@fault("adapter", "factors quantized to 8 bits and back", "adapter_changed")
def factors_went_through_8_bits(it: Artefact) -> None:
    edit_factors(it, lambda name, values: (values / values.abs().max() * 127).round() * (values.abs().max() / 127))


@fault("adapter", "PEFT obeys layers_to_transform: other layers' tensors are ignored", refusal="layers_to_transform in")
def layers_to_transform_leaves_tensors_out(it: Artefact) -> None:
    edit_config(it, target_modules=_endings(it), layers_to_transform=[0, 1])


@fault("adapter", "PEFT obeys layers_pattern: no layer has that name", refusal="layers_to_transform in")
def layers_pattern_fits_no_layer(it: Artefact) -> None:
    edit_config(it, target_modules=_endings(it), layers_to_transform=[0, 1, 2], layers_pattern="blocks")


@fault("adapter", "PEFT obeys exclude_modules: excluded tensors are ignored", refusal="exclude_modules in")
def exclude_modules_leaves_tensors_out(it: Artefact) -> None:
    edit_config(it, exclude_modules=["down_proj"])


@fault("adapter", "the same by a regular expression", refusal="exclude_modules in")
def exclude_modules_is_a_pattern(it: Artefact) -> None:
    edit_config(it, exclude_modules=r".*\.layers\.1\..*")


@fault("adapter", "an edited alpha_pattern: PEFT takes the first key that matches", "scale", factor=8.0)
def alpha_pattern_is_edited(it: Artefact) -> None:
    edit_config(it, alpha_pattern={r"layers\.2\..*": 64, "layers.2.mlp.up_proj": 1})


@fault("adapter", "an edited rank_pattern contradicts the tensors", refusal="contradict")
def rank_pattern_is_edited(it: Artefact) -> None:
    edit_config(it, rank_pattern={"q_proj": 2})


@fault("adapter", "KaSA with its defaults: an empty object turns it on", refusal="KaSA")
def it_is_kasa(it: Artefact) -> None:
    edit_config(it, kasa_config={})


@fault("adapter", "QA-LoRA pools the inputs of a layer", refusal="QA-LoRA")
def it_is_qalora(it: Artefact) -> None:
    edit_config(it, use_qalora=True)


@fault("adapter", "activated LoRA: on for some tokens only", refusal="activated LoRA")
def it_is_activated_lora(it: Artefact) -> None:
    edit_config(it, alora_invocation_tokens=[5, 6])


@fault("adapter", "LoRA with a bias in B, dropped by a reader of A and B", refusal="a bias in B")
def it_has_a_bias_in_b(it: Artefact) -> None:
    edit_config(it, lora_bias=True)


@fault("adapter", "PiSSA changes the base before training", refusal="changes the base's weights")
def it_was_started_by_pissa(it: Artefact) -> None:
    edit_config(it, init_lora_weights="pissa_niter_4")


@fault("adapter", "layers of the base repeated by layer_replication", refusal="layers that the base has not")
def layers_are_replicated(it: Artefact) -> None:
    edit_config(it, layer_replication=[[0, 2], [1, 3]])


@fault("adapter", "PEFT starts a targeted module without tensors at random values", refusal="random values")
def missing_tensors_would_start_at_random(it: Artefact) -> None:
    _keep(it, lambda site: ".layers.1.mlp.up_proj" not in site)
    edit_config(it, target_modules=_endings(it), init_lora_weights=False)


@fault("adapter", "a download that was appended to: PEFT cannot open the file", refusal="bytes follow the last tensor")
def bytes_follow_the_last_tensor(it: Artefact) -> None:
    file = it.adapter / WEIGHTS_FILE
    file.write_bytes(file.read_bytes() + bytes(64))


@fault("adapter", "two tensors share bytes: PEFT cannot open the file", refusal="overlaps the tensor before it")
def tensors_overlap(it: Artefact) -> None:
    _edit_offsets(it.adapter / WEIGHTS_FILE, -16)


@fault("adapter", "a gap between tensors: PEFT cannot open the file", refusal="does not follow the tensor before it")
def tensors_have_a_gap(it: Artefact) -> None:
    _edit_offsets(it.adapter / WEIGHTS_FILE, 16)


@fault("adapter", "one log-prob of the fingerprint edited", refusal="does not have the digest that it states")
def a_log_prob_of_the_fingerprint_is_edited(it: Artefact) -> None:
    _edit_fingerprint(it, lambda found: found["measurements"][0]["adapter"].__setitem__(7, -1.5))


@fault("adapter", "the noise edited so that everything is within it", refusal="does not have the digest that it states")
def the_noise_of_the_fingerprint_is_edited(it: Artefact) -> None:
    _edit_fingerprint(it, lambda found: found["measurements"][0]["noise"].update(mean=1.0, greatest=9.0))


@fault("adapter", "a part of the probe edited", refusal="does not have the digest that it states")
def the_probe_of_the_fingerprint_is_edited(it: Artefact) -> None:
    _edit_fingerprint(it, lambda found: found["probe"]["rows"][0].__setitem__(3, 11))


@fault("adapter", "the base's settings edited", refusal="does not have the digest that it states")
def a_setting_of_the_fingerprint_is_edited(it: Artefact) -> None:
    _edit_fingerprint(it, lambda found: found["base"]["settings"].update(rms_norm_eps=1e-9))


@fault("adapter", "the digests of the base's weights edited", refusal="does not have the digest that it states")
def a_digest_of_the_fingerprint_is_edited(it: Artefact) -> None:
    def edited(found: dict[str, Any]) -> None:
        next(iter(found["base"]["weights"]["parts"].values()))["values"] = "0" * 32

    _edit_fingerprint(it, edited)


@fault("adapter", "the stop tokens edited", refusal="does not have the digest that it states")
def the_stop_tokens_of_the_fingerprint_are_edited(it: Artefact) -> None:
    _edit_fingerprint(it, lambda found: found["tokenizer"].update(stop_token_ids=[1]))


@fault("adapter", "a change of one module edited", refusal="does not have the digest that it states")
def a_change_of_the_fingerprint_is_edited(it: Artefact) -> None:
    def edited(found: dict[str, Any]) -> None:
        next(iter(found["adapter"]["changes"].values()))["norm"] *= 1.5

    _edit_fingerprint(it, edited)


@fault("adapter", "the fingerprint of a newer Mindprint", refusal="is in fingerprint format 9")
def the_fingerprint_is_of_another_format(it: Artefact) -> None:
    _edit_fingerprint(it, lambda found: found.update(format=9))


@fault("adapter", "half of a fingerprint", refusal="is truncated or edited")
def the_fingerprint_is_truncated(it: Artefact) -> None:
    file = it.adapter / FILE_NAME
    file.write_text(file.read_text()[:3000])


# --- an adapter without a fingerprint --------------------------------------------------------------------------------


@fault("adapter, no fingerprint", "unslothai/unsloth#2142: an adapter that changes nothing", "no_effect")
def without_fingerprint_nothing_was_trained(it: Artefact) -> None:
    (it.adapter / FILE_NAME).unlink()
    nothing_was_trained(it)


@fault("adapter, no fingerprint", "openvla/openvla#53: NaN after fine-tuning", "not_finite")
def without_fingerprint_values_are_nan(it: Artefact) -> None:
    (it.adapter / FILE_NAME).unlink()
    every_value_is_nan(it)


@fault("adapter, no fingerprint", "Blaizzy/mlx-vlm#841 at a usual alpha: stronger than the base itself", "scale")
def without_fingerprint_it_is_far_too_strong(it: Artefact) -> None:
    (it.adapter / FILE_NAME).unlink()
    edit_config(it, lora_alpha=400)


@fault("adapter, no fingerprint", "osaurus-ai/vmlx-swift#320", "transposed")
def without_fingerprint_factors_are_transposed(it: Artefact) -> None:
    (it.adapter / FILE_NAME).unlink()
    factors_are_transposed(it)


@fault(
    "adapter, no fingerprint", "unslothai/unsloth#237: an adapter of a base of another size", refusal="the model needs"
)
def without_fingerprint_it_is_of_another_base(it: Artefact) -> None:
    (it.adapter / FILE_NAME).unlink()
    shutil.rmtree(it.base)
    make_base(it.base, "qwen2", hidden_size=96, intermediate_size=80)


# --- a base ----------------------------------------------------------------------------------------------------------


@fault("base", "unslothai/unsloth#877: base and instruct model taken for each other", "wrong_base")
def it_is_another_model(it: Artefact) -> None:
    shutil.rmtree(it.base)
    make_base(it.base, "qwen2", seed=1, tie_word_embeddings=False)


@fault("base", "huggingface/peft#1040: the base has the adapter merged in already", "wrong_base")
def it_has_the_adapter_already(it: Artefact) -> None:
    edit_tensors(it.base / "model.safetensors", lambda found: found | _added(found, change_of(it)))


@fault("base", "huggingface/diffusers#13227: some tensors corrupted while loading or saving", "base_changed")
def one_tensor_is_damaged(it: Artefact) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(it.base / "model.safetensors", lambda found: found | {name: _with(found[name], 9.0)})


@fault("base", "pytorch/pytorch#85230: weights loaded as zero", "base_changed")
def the_norm_is_zero(it: Artefact) -> None:
    name = "model.norm.weight"
    edit_tensors(it.base / "model.safetensors", lambda found: found | {name: found[name] * 0})


@fault("base", "sorryhyun in unslothai/unsloth#3690: infinite elements in a weight", "not_finite")
def a_weight_of_the_base_is_nan(it: Artefact) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(it.base / "model.safetensors", lambda found: found | {name: _with(found[name], float("nan"))})


@fault("base", "vllm-project/vllm#42624: another rope_theta than in training", "rope_differs")
def rope_theta_is_another(it: Artefact) -> None:
    edit_json(it.base / "config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})


@fault("base", "Open-Athena/MarinFold#184: rope_parameters dropped, the default taken", "rope_differs")
def rope_is_not_mentioned(it: Artefact) -> None:
    edit_json(it.base / "config.json", {}, ("rope_parameters",))


@fault("base", "MakazhanAlpamys/Soup#793: rotary scaling that was not there, or no longer is", "rope_differs")
def rope_is_scaled(it: Artefact) -> None:
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}
    edit_json(it.base / "config.json", {"rope_parameters": scaled})


@fault("base", "an old name beside the new one: lyogavin/airllm#368", "rope_differs")
def rope_theta_is_under_its_old_name(it: Artefact) -> None:
    edit_json(it.base / "config.json", {"rope_theta": 20000.0}, ("rope_parameters",))


@fault("base", "another epsilon in a re-written config.json", "config_differs")
def epsilon_is_another(it: Artefact) -> None:
    edit_json(it.base / "config.json", {"rms_norm_eps": 0.1})


@fault("base", "a setting that was dropped, its default another value", "config_differs")
def epsilon_is_not_mentioned(it: Artefact) -> None:
    edit_json(it.base / "config.json", {}, ("rms_norm_eps",))


@fault("base", "gelu for silu in a re-written config.json", "config_differs")
def the_activation_is_another(it: Artefact) -> None:
    edit_json(it.base / "config.json", {"hidden_act": "gelu"})


@fault("base", "huggingface/transformers#45127: tied again on loading", "config_differs")
def the_head_is_tied(it: Artefact) -> None:
    edit_json(it.base / "config.json", {"tie_word_embeddings": True})


@fault("base", "a limit of positions beyond what the probe reaches: only config.json can tell", "config_differs")
def the_context_is_longer(it: Artefact) -> None:
    edit_json(it.base / "config.json", {"max_position_embeddings": 4096})


@fault("base", "unslothai/unsloth#978: the vocabulary was extended and the embedding with it", "config_differs")
def the_vocabulary_is_extended(it: Artefact) -> None:
    def longer(found: Tensors) -> Tensors:
        rows = {
            name: torch.cat([found[name], found[name][:8]]) for name in ("model.embed_tokens.weight", "lm_head.weight")
        }
        return found | rows

    edit_tensors(it.base / "model.safetensors", longer)
    edit_json(it.base / "config.json", {"vocab_size": 408})


@fault("base", "huggingface/peft#2898: tokens added, or ids exchanged", "tokenizer_changed")
def ids_are_exchanged(it: Artefact) -> None:
    def exchanged(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        first, second = list(vocabulary)[10:12]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    _edit_tokenizer(it.base, exchanged)


@fault("base", "merges lost in a conversion of the tokenizer", "tokenizer_changed")
def merges_are_lost(it: Artefact) -> None:
    _edit_tokenizer(it.base, lambda tokenizer: tokenizer["model"].update(merges=tokenizer["model"]["merges"][:-5]))


@fault("base", "unslothai/unsloth#880: an outdated chat template in a copy of the model", "template_changed")
def the_template_is_outdated(it: Artefact) -> None:
    file = it.base / "chat_template.jinja"
    file.write_text(file.read_text() + "{{ '<|im_start|>assistant\\n' }}")


@fault("base", "a tokenizer saved without its chat template", "template_changed")
def the_template_is_lost(it: Artefact) -> None:
    (it.base / "chat_template.jinja").unlink()


@fault(
    "base", "huggingface/open-r1#663, hiyouga/LlamaFactory#7454: end-of-sequence is another token", "stop_tokens_differ"
)
def answers_end_at_another_token(it: Artefact) -> None:
    edit_json(it.base / "generation_config.json", {"eos_token_id": [2, 7]})


@fault("base", "half of a download", refusal="truncated")
def the_base_is_truncated(it: Artefact) -> None:
    file = it.base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@fault("base", "ml-explore/mlx-lm#1564: trained in full precision, run on a quantized base", refusal="quantized")
def the_base_is_quantized(it: Artefact) -> None:
    edit_json(it.base / "config.json", {"quantization": {"group_size": 64, "bits": 4}})


@fault("base", "a shard's name that leads out of the folder", refusal="leads out of the folder")
def a_shard_lies_elsewhere(it: Artefact) -> None:
    (it.base / "model.safetensors").rename(it.root / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (it.base / "model.safetensors.index.json").write_text(json.dumps(index))


@fault("base", "one-sided rope scaling: dropped from config.json, and the probe is too short for it", "rope_differs")
def yarn_is_added(it: Artefact) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 500000.0}
    edit_json(it.base / "config.json", {"rope_parameters": yarn})


@fault("base", "dynamic scaling, which acts beyond the trained positions alone", "rope_differs")
def dynamic_rope_is_added(it: Artefact) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500000.0}
    edit_json(it.base / "config.json", {"rope_parameters": dynamic})


@fault("base", "scaling under its old name next to the new one", "rope_differs")
def rope_scaling_is_added_under_its_old_name(it: Artefact) -> None:
    edit_json(it.base / "config.json", {"rope_scaling": {"type": "linear", "factor": 2.0}})


@fault(
    "base", "max_position_embeddings dropped: its default is another, and the probe has 192 tokens", "config_differs"
)
def the_context_is_not_mentioned(it: Artefact) -> None:
    edit_json(it.base / "config.json", {}, ("max_position_embeddings",))


@fault("base", "a shorter context than trained with", "config_differs")
def the_context_is_shorter(it: Artefact) -> None:
    edit_json(it.base / "config.json", {"max_position_embeddings": 200})


@fault("base", "a sliding window that only one side states", "config_differs")
def a_sliding_window_is_added(it: Artefact) -> None:
    edit_json(it.base / "config.json", {"sliding_window": 224, "use_sliding_window": True, "max_window_layers": 0})


@fault("base", "the template's bos_token is another token (a re-saved tokenizer_config.json)", "template_changed")
def a_token_of_the_template_is_another(it: Artefact) -> None:
    edit_json(it.base / "tokenizer_config.json", {"bos_token": "<|pad|>"})


@fault("base", "the tokenizer's decoder is another: the same tokens, other text", "tokenizer_changed")
def the_decoder_is_another(it: Artefact) -> None:
    _edit_tokenizer(it.base, lambda tokenizer: tokenizer.update(decoder={"type": "Fuse"}))


@fault("base", "the decoder is lost", "tokenizer_changed")
def the_decoder_is_lost(it: Artefact) -> None:
    _edit_tokenizer(it.base, lambda tokenizer: tokenizer.update(decoder=None))


@fault("base", "a normalizer is added: text becomes other tokens", "tokenizer_changed")
def a_normalizer_is_added(it: Artefact) -> None:
    _edit_tokenizer(it.base, lambda tokenizer: tokenizer.update(normalizer={"type": "Lowercase"}))


@fault("base", "a token is added behind the vocabulary", "tokenizer_changed")
def a_token_is_added(it: Artefact) -> None:
    def added(tokenizer: dict[str, Any]) -> None:
        token = {"id": 399, "content": "<|new|>", "single_word": False, "lstrip": False, "rstrip": False}
        tokenizer["added_tokens"].append({**token, "normalized": False, "special": True})

    _edit_tokenizer(it.base, added)


@fault("base", "a special token is no longer one", "tokenizer_changed")
def a_token_is_no_longer_special(it: Artefact) -> None:
    _edit_tokenizer(it.base, lambda tokenizer: tokenizer["added_tokens"][1].update(special=False))


@fault("base", "trailing bytes: transformers cannot open the file", refusal="bytes follow the last tensor")
def bytes_follow_the_bases_last_tensor(it: Artefact) -> None:
    file = it.base / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")


@fault("base", "overlapping tensors: transformers cannot open the file", refusal="overlaps the tensor before it")
def tensors_of_the_base_overlap(it: Artefact) -> None:
    _edit_offsets(it.base / "model.safetensors", -16)


@fault("base", "rows of the embedding exchanged with ids that stayed", "base_changed")
def rows_of_the_embedding_are_exchanged(it: Artefact) -> None:
    name = "model.embed_tokens.weight"
    edit_tensors(it.base / "model.safetensors", lambda found: found | {name: found[name].roll(1, 0)})


@fault("base", "heads of attention in another order", "base_changed")
def heads_are_in_another_order(it: Artefact) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensors(it.base / "model.safetensors", lambda found: found | {name: found[name].roll(16, 0)})


@fault("base", "a bias is lost (set to zero)", "base_changed")
def a_bias_is_zero(it: Artefact) -> None:
    name = "model.layers.2.self_attn.k_proj.bias"
    edit_tensors(it.base / "model.safetensors", lambda found: found | {name: found[name] * 0})


@fault("base", "cast to bfloat16 since: digits are lost", "wrong_base")
def the_base_was_cast_down_and_up_again(it: Artefact) -> None:
    edit_tensors(it.base / "model.safetensors", lambda found: {n: v.bfloat16().float() for n, v in found.items()})


# --- a backend -------------------------------------------------------------------------------------------------------


class Wrapped(Backend):
    """A backend that does everything as another does, but for what a subclass overrides."""

    def __init__(self, inner: Backend) -> None:
        self.__dict__.update(vars(inner))


@fault(
    "backend",
    "vllm-project/vllm#34186, turboderp-org/exllamav2#169: the adapter is accepted and not applied",
    "no_effect",
)
def the_adapter_is_not_applied(backend: Backend) -> Backend:
    class NotApplied(Wrapped):
        def log_probs(self, model: LoadedModel, batch: TokenBatch, *, adapter: bool = True) -> Float32:
            return super().log_probs(model, batch, adapter=False)

    return NotApplied(backend)


@fault("backend", "hao-ai-lab/FastVideo#870: the scale is left out when the adapter is applied", "scale")
def the_scale_is_left_out(backend: Backend) -> Backend:
    return _injecting(backend, lambda adapter: replace(adapter, config=replace(adapter.config, alpha=4.0)))


@fault("backend", "vllm-project/vllm#55545: rank-stabilised scaling forgotten, the effect too weak", "scale")
def the_adapter_is_a_tenth_too_weak(backend: Backend) -> Backend:
    return _injecting(backend, lambda adapter: replace(adapter, config=replace(adapter.config, alpha=7.2)))


@fault("backend", "ml-explore/mlx-lm#1119, mlx-examples#1328: only the last layers are adapted", "partly_applied")
def only_the_last_layer_is_adapted(backend: Backend) -> Backend:
    def silenced(adapter: AdapterState) -> AdapterState:
        tensors = {
            site: pair if ".layers.2." in site else LoraFactors(pair.a, np.zeros_like(pair.b))
            for site, pair in adapter.tensors.items()
        }
        return replace(adapter, tensors=tensors)

    return _injecting(backend, silenced)


@fault(
    "backend", "ml-explore/mlx-lm 0.32.2 ignores rope_parameters (26 of 27 architectures, DESIGN.md)", "backend_differs"
)
def rope_parameters_are_ignored(backend: Backend) -> Backend:
    class OtherRope(Wrapped):
        def load_model(self, spec: ModelSpec) -> LoadedModel:
            copy = Path(spec.path).with_name("as-loaded")
            shutil.copytree(spec.path, copy, dirs_exist_ok=True)
            edit_json(copy / "config.json", {}, ("rope_parameters",))
            return super().load_model(replace(spec, path=str(copy)))

    return OtherRope(backend)


@fault("backend", "huggingface/peft#2438: dropout is left on", "backend_differs")
def log_probs_are_noisy(backend: Backend) -> Backend:
    class Noisy(Wrapped):
        def log_probs(self, model: LoadedModel, batch: TokenBatch, *, adapter: bool = True) -> Float32:
            values = super().log_probs(model, batch, adapter=adapter)
            noise = np.random.default_rng(0).normal(0, 0.02, values.shape)
            return np.where(batch.loss_mask, values + noise, 0).astype(np.float32)

    return Noisy(backend)


@fault("backend", "huggingface/peft#1355: merged in place, so that the base is no longer the base", "backend_differs")
def the_base_alone_has_the_adapter(backend: Backend) -> Backend:
    class AlwaysOn(Wrapped):
        def log_probs(self, model: LoadedModel, batch: TokenBatch, *, adapter: bool = True) -> Float32:
            values = super().log_probs(model, batch, adapter=True)
            return values if adapter else (values - 0.1 * batch.loss_mask).astype(np.float32)

    return AlwaysOn(backend)


# --- a conversion to mlx-lm ------------------------------------------------------------------------------------------


@fault(
    "conversion",
    "mzbac in ml-explore/mlx-examples#623: alpha, not alpha / r, becomes the scale",
    "scale",
    factor=4.0,
)
def alpha_becomes_mlx_lms_scale(it: Artefact) -> None:
    _edit_lora_parameters(it, scale=8.0)


@fault(
    "conversion",
    "ml-explore/mlx-examples#622: the tool's default scale, 20, for the one trained with",
    "scale",
    factor=10.0,
)
def the_default_scale_is_taken(it: Artefact) -> None:
    _edit_lora_parameters(it, scale=20.0)


@fault("conversion", "ml-explore/mlx-examples#1328: only the last layers go along", "layers_missing")
def only_the_last_layers_are_converted(it: Artefact) -> None:
    edit_tensors(it.adapter / MLX_LM_FILE, lambda found: {n: v for n, v in found.items() if ".layers.0." not in n})


@fault("conversion", "ml-explore/mlx-lm#1119: factors copied without transposing them", refusal="contradict")
def factors_are_copied_as_they_lie(it: Artefact) -> None:
    edit_tensors(it.adapter / MLX_LM_FILE, lambda found: {name: values.T for name, values in found.items()})


@fault("conversion", "osaurus-ai/vmlx-swift#320: reshaped where it should be transposed", "transposed")
def factors_are_reshaped_in_the_conversion(it: Artefact) -> None:
    edit_tensors(
        it.adapter / MLX_LM_FILE,
        lambda found: {name: values.T.contiguous().reshape(values.shape) for name, values in found.items()},
    )


@fault(
    "conversion",
    "unslothai/unsloth-zoo#957: keys that name no module",
    refusal="does not name in lora_parameters.keys",
)
def keys_leave_modules_out(it: Artefact) -> None:
    _edit_lora_parameters(it, keys=["self_attn.q_proj"])


@fault("conversion", "vllm-project/vllm#34186 for mlx-lm: values lost on the way, the names there", "no_effect")
def values_are_lost_in_the_conversion(it: Artefact) -> None:
    edit_tensors(
        it.adapter / MLX_LM_FILE,
        lambda found: {name: values * (0 if "lora_b" in name else 1) for name, values in found.items()},
    )


# --- a merge ---------------------------------------------------------------------------------------------------------


@fault(
    "merge",
    "huggingface/peft#918, unslothai/unsloth#869, verl-project/verl#7285: the merged model is the base",
    "merge_lost",
)
def the_merge_is_the_base(it: Artefact) -> None:
    shutil.copy(it.base / "model.safetensors", it.merged / "model.safetensors")


@fault("merge", "ml-explore/mlx-lm#1564, ARahim3/mlx-tune#15: rounding takes the change away", "merge_lost")
def rounding_swallows_the_change(it: Artefact) -> None:
    edit_factors(it, lambda name, values: values * 1e-6 if "lora_B" in name else values)
    edit_tensors(it.base / "model.safetensors", lambda found: {name: v.bfloat16() for name, v in found.items()})
    shutil.copy(it.base / "model.safetensors", it.merged / "model.safetensors")
    (it.adapter / FILE_NAME).unlink()


@fault("merge", "OpenBMB/MiniCPM-V#559, and tools that know some module names only", "partly_applied")
def only_attention_is_merged(it: Artefact) -> None:
    _restore(it, lambda name: ".mlp." in name)


@fault("merge", "huggingface/peft#1355: merging twice adds the change twice", "scale", factor=2.0)
def it_is_merged_twice(it: Artefact) -> None:
    _add(it, 2.0)


@fault("merge", "Blaizzy/mlx-vlm#841: merged with alpha for the scale", "scale", factor=4.0)
def it_is_merged_with_alpha(it: Artefact) -> None:
    _add(it, 6.0)


@fault("merge", "NVIDIA/TensorRT-LLM#1477, unslothai/unsloth#3091: merged without the scale", "scale", factor=0.5)
def it_is_merged_without_the_scale(it: Artefact) -> None:
    _add(it, -1.0)


@fault("merge", "PEFT's unmerge of what was not merged", "scale", factor=-1.0)
def the_change_is_subtracted(it: Artefact) -> None:
    _add(it, -4.0)


@fault("merge", "A·B for B·A where the weight is square: osaurus-ai/vmlx-swift#320", "transposed")
def the_transpose_is_merged(it: Artefact) -> None:
    change = {name: values.T - values for name, values in change_of(it).items() if values.shape[0] == values.shape[1]}
    edit_tensors(it.merged / "model.safetensors", lambda found: found | _added(found, change))


@fault("merge", "another adapter than the one that it is said to be", "merge_differs")
def another_adapter_is_merged(it: Artefact) -> None:
    generator = torch.Generator().manual_seed(1)

    def other(found: Tensors) -> Tensors:
        change = {name: 0.1 * torch.randn(values.shape, generator=generator) for name, values in change_of(it).items()}
        return found | _added(found, change)

    edit_tensors(it.merged / "model.safetensors", other)


@fault("merge", "huggingface/diffusers#14556: single tensors corrupted on MPS", "merge_differs")
def one_merged_weight_is_damaged(it: Artefact) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    edit_tensors(it.merged / "model.safetensors", lambda found: found | {name: _with(found[name], 9.0)})


@fault("merge", "huggingface/peft#1001: float16 overflows in the merge", "not_finite")
def a_merged_weight_is_infinite(it: Artefact) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    edit_tensors(it.merged / "model.safetensors", lambda found: found | {name: _with(found[name], float("inf"))})


@fault("merge", "huggingface/diffusers#13227: a weight that nothing should touch", "base_changed")
def a_norm_is_changed(it: Artefact) -> None:
    name = "model.layers.1.input_layernorm.weight"
    edit_tensors(it.merged / "model.safetensors", lambda found: found | {name: found[name] + 0.01})


@fault(
    "merge", "huggingface/peft#2018, huggingface/transformers#45127: the head re-tied or merged into", "base_changed"
)
def the_head_is_the_embedding(it: Artefact) -> None:
    edit_tensors(
        it.merged / "model.safetensors",
        lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()},
    )


@fault("merge", "unslothai/unsloth#5410: experts, or other tensors, are not written", "layers_missing")
def tensors_are_not_written(it: Artefact) -> None:
    def without(found: Tensors) -> Tensors:
        return {name: values for name, values in found.items() if ".layers.2.mlp." not in name}

    edit_tensors(it.merged / "model.safetensors", without)


@fault("merge", "vllm-project/vllm#42624: config.json re-written on the way", "rope_differs")
def the_merge_loses_its_rope(it: Artefact) -> None:
    edit_json(it.merged / "config.json", {}, ("rope_parameters",))


@fault("merge", "ml-explore/mlx-lm#1564: quantized again after merging", refusal="is quantized")
def the_merge_is_quantized(it: Artefact) -> None:
    edit_json(it.merged / "config.json", {"quantization": {"group_size": 64, "bits": 4}})


@fault("merge", "a config.json of another copy of the base", "config_differs")
def the_merge_has_another_epsilon(it: Artefact) -> None:
    edit_json(it.merged / "config.json", {"rms_norm_eps": 1e-3})


@fault("merge", "unslothai/unsloth#3428: a tokenizer with other tokens is saved beside the merge", "tokenizer_changed")
def the_merge_has_another_tokenizer(it: Artefact) -> None:
    _edit_tokenizer(it.merged, lambda tokenizer: tokenizer["model"].update(merges=tokenizer["model"]["merges"][:-5]))


@fault("merge", "a merged folder without the chat template", "template_changed")
def the_merge_has_no_template(it: Artefact) -> None:
    (it.merged / "chat_template.jinja").unlink()


@fault(
    "merge", "noise of 0.9 times the adapter in a bfloat16 merge, hidden by the rounding in the mean", "merge_differs"
)
def a_bfloat16_merge_is_noisy(it: Artefact) -> None:
    _merge_in(it, torch.bfloat16, 0.9)


@fault("merge", "noise of a tenth of the adapter in a bfloat16 merge", "merge_differs")
def a_bfloat16_merge_is_a_little_noisy(it: Artefact) -> None:
    _merge_in(it, torch.bfloat16, 0.1)


@fault("merge", "noise of 0.9 times the adapter in a float16 merge", "merge_differs")
def a_float16_merge_is_noisy(it: Artefact) -> None:
    _merge_in(it, torch.float16, 0.9)


@fault("merge", "one wrong number among all of a bfloat16 merge", "merge_differs")
def one_number_of_a_bfloat16_merge_is_wrong(it: Artefact) -> None:
    _merge_in(it, torch.bfloat16, 0.0)
    name = "model.layers.1.self_attn.v_proj.weight"
    edit_tensors(it.merged / "model.safetensors", lambda found: found | {name: _with(found[name], 0.75)})


@fault("merge", "digits cut off instead of rounded", "merge_differs")
def a_bfloat16_merge_is_cut(it: Artefact) -> None:
    cut = lambda values: (values.contiguous().view(torch.int32) & -65536).view(torch.float32).bfloat16()  # noqa: E731
    edit_tensors(it.merged / "model.safetensors", lambda found: {name: cut(values) for name, values in found.items()})


@fault("merge", "merged in bfloat16 and stored as float32", "merge_differs")
def a_float32_merge_went_through_bfloat16(it: Artefact) -> None:
    edit_tensors(it.merged / "model.safetensors", lambda found: {n: v.bfloat16().float() for n, v in found.items()})


@fault("merge", "a layer is merged with the change of its neighbour", "merge_differs")
def changes_of_layers_are_exchanged(it: Artefact) -> None:
    def exchanged(found: Tensors) -> Tensors:
        change = change_of(it)
        pairs = {name: change[name.replace(".layers.0.", ".layers.1.")] - values for name, values in change.items()
                 if ".layers.0." in name}  # fmt: skip
        return found | _added(found, pairs)

    edit_tensors(it.merged / "model.safetensors", exchanged)


@fault("merge", "rope scaling is added to the merged model", "rope_differs")
def the_merge_has_rope_scaling(it: Artefact) -> None:
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500000.0}
    edit_json(it.merged / "config.json", {"rope_parameters": scaled})


@fault("merge", "the merged model's context is another", "config_differs")
def the_merge_has_another_context(it: Artefact) -> None:
    edit_json(it.merged / "config.json", {"max_position_embeddings": 131072})


@fault("merge", "the merged model's decoder is another", "tokenizer_changed")
def the_merge_has_another_decoder(it: Artefact) -> None:
    _edit_tokenizer(it.merged, lambda tokenizer: tokenizer.update(decoder={"type": "Fuse"}))


@fault("merge", "answers of the merged model end at another token", "stop_tokens_differ")
def answers_of_the_merge_end_elsewhere(it: Artefact) -> None:
    edit_json(it.merged / "generation_config.json", {"eos_token_id": [2, 9]})


@fault("merge", "trailing bytes in the merged weights", refusal="bytes follow the last tensor")
def bytes_follow_the_merged_weights(it: Artefact) -> None:
    file = it.merged / "model.safetensors"
    file.write_bytes(file.read_bytes() + bytes(8))


# --- how -------------------------------------------------------------------------------------------------------------


def _moved(values: torch.Tensor, size: float) -> torch.Tensor:
    """Values with relative noise of this size, as an earlier or a later step has them."""
    generator = torch.Generator().manual_seed(values.numel())
    return values * (1 + size * torch.randn(values.shape, generator=generator))


def _endings(it: Artefact) -> list[str]:
    targets = json.loads((it.adapter / CONFIG_FILE).read_text())["target_modules"]
    return sorted({target.rpartition(".")[2] for target in targets})


def _edit_offsets(file: Path, step: int) -> None:
    """Move the last tensor of a safetensors file by some bytes, and the end of the file with it."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    header[last]["data_offsets"] = [offset + step for offset in header[last]["data_offsets"]]
    data = content[8 + length :]
    data = data[:step] if step < 0 else data + bytes(step)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _edit_fingerprint(it: Artefact, change: Callable[[dict[str, Any]], Any]) -> None:
    file = it.adapter / FILE_NAME
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def _merge_in(it: Artefact, dtype: torch.dtype, noise: float) -> None:
    """Round the merged model to a dtype, with noise of a given multiple of the change in its adapted weights."""
    generator = torch.Generator().manual_seed(2)

    def noisy(found: Tensors) -> Tensors:
        change = change_of(it)
        random = {n: noise * v.std() * torch.randn(v.shape, generator=generator) for n, v in change.items()}
        return {name: values.to(dtype) for name, values in (found | _added(found, random)).items()}

    edit_tensors(it.merged / "model.safetensors", noisy)


def _with(values: torch.Tensor, value: float) -> torch.Tensor:
    changed = values.clone()
    changed.view(-1)[7] = value
    return changed


def _edit_lora_parameters(it: Artefact, **change: Any) -> None:
    config = json.loads((it.adapter / CONFIG_FILE).read_text())
    edit_config(it, lora_parameters=config["lora_parameters"] | change)


def _keep(it: Artefact, keep: Callable[[str], bool]) -> None:
    """Leave modules out of an adapter, its tensors and its configuration alike."""
    config = json.loads((it.adapter / CONFIG_FILE).read_text())
    edit_config(it, target_modules=[site for site in config["target_modules"] if keep(site)])
    edit_tensors(it.adapter / WEIGHTS_FILE, lambda found: {name: v for name, v in found.items() if keep(name)})


def _rename(it: Artefact, words: dict[str, str]) -> None:
    def renamed(found: Tensors) -> Tensors:
        return {_replaced(name, words): values for name, values in found.items()}

    edit_tensors(it.adapter / WEIGHTS_FILE, renamed)


def _replaced(name: str, words: dict[str, str]) -> str:
    return next((name.replace(old, new) for old, new in words.items() if old in name), name)


def _added(found: Tensors, change: Tensors) -> Tensors:
    return {name: found[name] + values.to(found[name].dtype) for name, values in change.items()}


def _add(it: Artefact, scale: float) -> None:
    """Add the change once more to the merged model, `scale` instead of the adapter's 2 times."""
    edit_tensors(it.merged / "model.safetensors", lambda found: found | _added(found, change_of(it, scale)))


def _restore(it: Artefact, lost: Callable[[str], bool]) -> None:
    """Put the base's weights back into the merged model."""
    from safetensors.torch import load_file

    base = load_file(it.base / "model.safetensors")
    edit_tensors(
        it.merged / "model.safetensors",
        lambda found: {name: base[name] if lost(name) else values for name, values in found.items()},
    )


def _edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def _injecting(backend: Backend, change: Callable[[AdapterState], AdapterState]) -> Backend:
    """The backend, with another adapter put in than the one given."""

    class Changed(Wrapped):
        def inject_adapter(self, model: LoadedModel, adapter: AdapterState) -> AdapterFacts:
            return super().inject_adapter(model, change(adapter))

    return Changed(backend)


THOROUGH = frozenset(
    {
        "a bfloat16 merge is a little noisy",
        "a bfloat16 merge is cut",
        "a bias is zero",
        "a float16 merge is noisy",
        "a float32 merge went through bfloat16",
        "a normalizer is added",
        "a sliding window is added",
        "a token is added",
        "a token is no longer special",
        "alpha pattern is edited",
        "an earlier checkpoint is in its place",
        "an earlier checkpoint is there in float16",
        "answers of the merge end elsewhere",
        "changes of layers are exchanged",
        "dynamic rope is added",
        "factors are cut to bfloat16",
        "factors went through 8 bits",
        "heads are in another order",
        "noise is far below bfloat16",
        "one number of a bfloat16 merge is wrong",
        "rope scaling is added under its old name",
        "rows of the embedding are exchanged",
        "the base was cast down and up again",
        "the context is shorter",
        "the decoder is lost",
        "the merge has another context",
        "the merge has another decoder",
        "the merge has rope scaling",
    }
)
"""Faults that plain nox leaves to `nox -s trust`: each has a sibling of its kind in the rest."""


def of_kind(*kinds: Kind) -> Sequence[Fault]:
    """The faults of these kinds."""
    return [one for one in FAULTS if one.kind in kinds]
