"""Merged models that are not the base plus the adapter's change."""

from __future__ import annotations

import shutil

import torch
from artefacts import Artefact, Tensors, change_of, edit_factors, edit_json, edit_tensors

from catalogue.edits import add_changes, edit_tokenizer, merge_again, restore_base_weights, store_merge_in, with_value
from catalogue.entry import fault
from mindprint.trust.fingerprint import FILE_NAME


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
    restore_base_weights(it, lambda name: ".mlp." in name)


@fault("merge", "huggingface/peft#1355: merging twice adds the change twice", "scale", factor=2.0)
def it_is_merged_twice(it: Artefact) -> None:
    merge_again(it, 2.0)


@fault("merge", "Blaizzy/mlx-vlm#841: merged with alpha for the scale", "scale", factor=4.0)
def it_is_merged_with_alpha(it: Artefact) -> None:
    merge_again(it, 6.0)


@fault("merge", "NVIDIA/TensorRT-LLM#1477, unslothai/unsloth#3091: merged without the scale", "scale", factor=0.5)
def it_is_merged_without_the_scale(it: Artefact) -> None:
    merge_again(it, -1.0)


@fault("merge", "PEFT's unmerge of what was not merged", "scale", factor=-1.0)
def the_change_is_subtracted(it: Artefact) -> None:
    merge_again(it, -4.0)


@fault("merge", "A·B for B·A where the weight is square: osaurus-ai/vmlx-swift#320", "transposed")
def the_transpose_is_merged(it: Artefact) -> None:
    change = {name: values.T - values for name, values in change_of(it).items() if values.shape[0] == values.shape[1]}
    edit_tensors(it.merged / "model.safetensors", lambda found: found | add_changes(found, change))


@fault("merge", "another adapter than the one that it is said to be", "merge_differs")
def another_adapter_is_merged(it: Artefact) -> None:
    generator = torch.Generator().manual_seed(1)

    def other(found: Tensors) -> Tensors:
        change = {name: 0.1 * torch.randn(values.shape, generator=generator) for name, values in change_of(it).items()}
        return found | add_changes(found, change)

    edit_tensors(it.merged / "model.safetensors", other)


@fault("merge", "huggingface/diffusers#14556: single tensors corrupted on MPS", "merge_differs")
def one_merged_weight_is_damaged(it: Artefact) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    edit_tensors(it.merged / "model.safetensors", lambda found: found | {name: with_value(found[name], 9.0)})


@fault("merge", "huggingface/peft#1001: float16 overflows in the merge", "not_finite")
def a_merged_weight_is_infinite(it: Artefact) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    edit_tensors(it.merged / "model.safetensors", lambda found: found | {name: with_value(found[name], float("inf"))})


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


@fault("merge", "unslothai/unsloth#3428: a tokenizer with other tokens is saved next to the merge", "tokenizer_changed")
def the_merge_has_another_tokenizer(it: Artefact) -> None:
    edit_tokenizer(it.merged, lambda tokenizer: tokenizer["model"].update(merges=tokenizer["model"]["merges"][:-5]))


@fault("merge", "a merged folder without the chat template", "template_changed")
def the_merge_has_no_template(it: Artefact) -> None:
    (it.merged / "chat_template.jinja").unlink()


@fault(
    "merge", "noise of 0.9 times the adapter in a bfloat16 merge, hidden by the rounding in the mean", "merge_differs"
)
def a_bfloat16_merge_is_noisy(it: Artefact) -> None:
    store_merge_in(it, torch.bfloat16, 0.9)


@fault("merge", "noise of a tenth of the adapter in a bfloat16 merge", "merge_differs")
def a_bfloat16_merge_is_a_little_noisy(it: Artefact) -> None:
    store_merge_in(it, torch.bfloat16, 0.1)


@fault("merge", "noise of 0.9 times the adapter in a float16 merge", "merge_differs")
def a_float16_merge_is_noisy(it: Artefact) -> None:
    store_merge_in(it, torch.float16, 0.9)


@fault("merge", "one wrong number among all of a bfloat16 merge", "merge_differs")
def one_number_of_a_bfloat16_merge_is_wrong(it: Artefact) -> None:
    store_merge_in(it, torch.bfloat16, 0.0)
    name = "model.layers.1.self_attn.v_proj.weight"
    edit_tensors(it.merged / "model.safetensors", lambda found: found | {name: with_value(found[name], 0.75)})


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
        return found | add_changes(found, pairs)

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
    edit_tokenizer(it.merged, lambda tokenizer: tokenizer.update(decoder={"type": "Fuse"}))


@fault("merge", "answers of the merged model end at another token", "stop_tokens_differ")
def answers_of_the_merge_end_elsewhere(it: Artefact) -> None:
    edit_json(it.merged / "generation_config.json", {"eos_token_id": [2, 9]})


@fault("merge", "trailing bytes in the merged weights", refusal="bytes follow the last tensor")
def bytes_follow_the_merged_weights(it: Artefact) -> None:
    file = it.merged / "model.safetensors"
    file.write_bytes(file.read_bytes() + bytes(8))
