"""Bases that are not those that an adapter was trained on."""

from __future__ import annotations

import json
import shutil
from typing import Any

import torch
from artefacts import Artefact, Tensors, change_of, edit_json, edit_tensors, make_base

from catalogue.edits import add_changes, edit_tokenizer, move_last_tensor, with_value
from catalogue.entry import fault


@fault("base", "unslothai/unsloth#877: base and instruct model taken for each other", "wrong_base")
def it_is_another_model(it: Artefact) -> None:
    shutil.rmtree(it.base)
    make_base(it.base, "qwen2", seed=1, tie_word_embeddings=False)


@fault("base", "huggingface/peft#1040: the base has the adapter merged in already", "wrong_base")
def it_has_the_adapter_already(it: Artefact) -> None:
    edit_tensors(it.base / "model.safetensors", lambda found: found | add_changes(found, change_of(it)))


@fault("base", "huggingface/diffusers#13227: some tensors corrupted while loading or saving", "base_changed")
def one_tensor_is_damaged(it: Artefact) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(it.base / "model.safetensors", lambda found: found | {name: with_value(found[name], 9.0)})


@fault("base", "pytorch/pytorch#85230: weights loaded as zero", "base_changed")
def the_norm_is_zero(it: Artefact) -> None:
    name = "model.norm.weight"
    edit_tensors(it.base / "model.safetensors", lambda found: found | {name: found[name] * 0})


@fault("base", "sorryhyun in unslothai/unsloth#3690: infinite elements in a weight", "not_finite")
def a_weight_of_the_base_is_nan(it: Artefact) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(it.base / "model.safetensors", lambda found: found | {name: with_value(found[name], float("nan"))})


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


@fault("base", "an old name next to the new one: lyogavin/airllm#368", "rope_differs")
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

    edit_tokenizer(it.base, exchanged)


@fault("base", "merges lost in a conversion of the tokenizer", "tokenizer_changed")
def merges_are_lost(it: Artefact) -> None:
    edit_tokenizer(it.base, lambda tokenizer: tokenizer["model"].update(merges=tokenizer["model"]["merges"][:-5]))


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
    edit_tokenizer(it.base, lambda tokenizer: tokenizer.update(decoder={"type": "Fuse"}))


@fault("base", "the decoder is lost", "tokenizer_changed")
def the_decoder_is_lost(it: Artefact) -> None:
    edit_tokenizer(it.base, lambda tokenizer: tokenizer.update(decoder=None))


@fault("base", "a normalizer is added: text becomes other tokens", "tokenizer_changed")
def a_normalizer_is_added(it: Artefact) -> None:
    edit_tokenizer(it.base, lambda tokenizer: tokenizer.update(normalizer={"type": "Lowercase"}))


@fault("base", "a token is added behind the vocabulary", "tokenizer_changed")
def a_token_is_added(it: Artefact) -> None:
    def added(tokenizer: dict[str, Any]) -> None:
        token = {"id": 399, "content": "<|new|>", "single_word": False, "lstrip": False, "rstrip": False}
        tokenizer["added_tokens"].append({**token, "normalized": False, "special": True})

    edit_tokenizer(it.base, added)


@fault("base", "a special token is no longer one", "tokenizer_changed")
def a_token_is_no_longer_special(it: Artefact) -> None:
    edit_tokenizer(it.base, lambda tokenizer: tokenizer["added_tokens"][-1].update(special=False))


@fault("base", "trailing bytes: transformers cannot open the file", refusal="bytes follow the last tensor")
def bytes_follow_the_bases_last_tensor(it: Artefact) -> None:
    file = it.base / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")


@fault("base", "overlapping tensors: transformers cannot open the file", refusal="overlaps the tensor before it")
def tensors_of_the_base_overlap(it: Artefact) -> None:
    move_last_tensor(it.base / "model.safetensors", -16)


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
