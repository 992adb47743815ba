"""Fields of adapter_config.json that change which adapter the tensors are."""

from __future__ import annotations

from artefacts import Artefact, edit_config

from catalogue.edits import keep_sites, target_endings
from catalogue.entry import fault


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


@fault("adapter", "PEFT obeys layers_to_transform: other layers' tensors are ignored", refusal="layers_to_transform in")
def layers_to_transform_leaves_tensors_out(it: Artefact) -> None:
    edit_config(it, target_modules=target_endings(it), layers_to_transform=[0, 1])


@fault("adapter", "PEFT obeys layers_pattern: no layer has that name", refusal="layers_to_transform in")
def layers_pattern_fits_no_layer(it: Artefact) -> None:
    edit_config(it, target_modules=target_endings(it), layers_to_transform=[0, 1, 2], layers_pattern="blocks")


@fault("adapter", "PEFT obeys exclude_modules: excluded tensors are ignored", refusal="exclude_modules in")
def exclude_modules_leaves_tensors_out(it: Artefact) -> None:
    edit_config(it, exclude_modules=["down_proj"])


@fault("adapter", "the same by a regular expression", refusal="exclude_modules in")
def exclude_modules_is_a_pattern(it: Artefact) -> None:
    edit_config(it, exclude_modules=r".*\.layers\.1\..*")


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
    keep_sites(it, lambda site: ".layers.1.mlp.up_proj" not in site)
    edit_config(it, target_modules=target_endings(it), init_lora_weights=False)
