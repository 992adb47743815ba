"""Adapters that are applied too strongly, too weakly, or the wrong way round."""

from __future__ import annotations

from artefacts import Artefact, edit_config, edit_factors

from catalogue.entry import fault


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


@fault("adapter", "an edited alpha_pattern: PEFT takes the first key that matches", "scale", factor=8.0)
def alpha_pattern_is_edited(it: Artefact) -> None:
    edit_config(it, alpha_pattern={r"layers\.2\..*": 64, "layers.2.mlp.up_proj": 1})
