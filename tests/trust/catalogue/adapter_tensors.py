"""Adapter files that lack tensors, name them otherwise, or cannot be read as they should."""

from __future__ import annotations

import torch
from artefacts import Artefact, Tensors, edit_factors, edit_tensors

from catalogue.edits import keep_sites, move_last_tensor, rename_sites
from catalogue.entry import fault
from mindprint.adapter.peft_format import WEIGHTS_FILE


@fault("adapter", "huggingface/peft#2500: ZeRO-3 saves tensors of shape [0]", refusal="contradict")
def tensors_are_empty(it: Artefact) -> None:
    edit_factors(it, lambda name, values: values[:0] if ".layers.1." in name else values)


@fault("adapter", "ml-explore/mlx-examples#1328: --num-layers; only the last layers are saved", "layers_missing")
def the_first_layer_is_left_out(it: Artefact) -> None:
    keep_sites(it, lambda site: ".layers.0." not in site)


@fault("adapter", "vllm-project/vllm#55193: modules outside of a tool's own target list is dropped", "layers_missing")
def the_mlp_is_left_out(it: Artefact) -> None:
    keep_sites(it, lambda site: ".mlp." not in site)


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


@fault(
    "adapter", "huggingface/nanotron#427, conversions that permute or rename: gate and up exchanged", "sites_swapped"
)
def gate_and_up_are_exchanged(it: Artefact) -> None:
    rename_sites(it, {"gate_proj": "up_proj", "up_proj": "gate_proj"})


@fault("adapter", "layers counted from 1 in one tool and from 0 in the other", "sites_swapped")
def layers_are_shifted(it: Artefact) -> None:
    rename_sites(it, {f".layers.{n}.": f".layers.{(n + 1) % 3}." for n in range(3)})


@fault("adapter", "huggingface/peft#2450: a download or a save that was cut off", refusal="truncated")
def the_file_is_truncated(it: Artefact) -> None:
    file = it.adapter / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-1000])


@fault("adapter", "a pickle can run code when it is loaded", refusal="is a pickle, which can run code")
def the_weights_are_a_pickle(it: Artefact) -> None:
    torch.save({"a": torch.zeros(1)}, it.adapter / "adapter_model.bin")
    (it.adapter / WEIGHTS_FILE).unlink()


@fault("adapter", "huggingface/peft#2898: PEFT saves embeddings along and puts them into the base", "adapter_changed")
def it_brings_an_embedding_of_its_own(it: Artefact) -> None:
    name = "base_model.model.model.embed_tokens.weight"
    edit_tensors(it.adapter / WEIGHTS_FILE, lambda found: found | {name: torch.randn(400, 64)})


@fault("adapter", "a download that was appended to: PEFT cannot open the file", refusal="bytes follow the last tensor")
def bytes_follow_the_last_tensor(it: Artefact) -> None:
    file = it.adapter / WEIGHTS_FILE
    file.write_bytes(file.read_bytes() + bytes(64))


@fault("adapter", "two tensors share bytes: PEFT cannot open the file", refusal="overlaps the tensor before it")
def tensors_overlap(it: Artefact) -> None:
    move_last_tensor(it.adapter / WEIGHTS_FILE, -16)


@fault("adapter", "a gap between tensors: PEFT cannot open the file", refusal="does not follow the tensor before it")
def tensors_have_a_gap(it: Artefact) -> None:
    move_last_tensor(it.adapter / WEIGHTS_FILE, 16)
