"""Adapters with other numbers than those that were trained."""

from __future__ import annotations

import torch
from artefacts import Artefact, Tensors, edit_factors, edit_tensors

from catalogue.edits import with_noise, with_value
from catalogue.entry import fault
from mindprint.adapter.peft_format import WEIGHTS_FILE


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
    edit_factors(
        it, lambda name, values: with_value(values, float("inf")) if ".layers.2.mlp.down_proj" in name else values
    )


@fault("adapter", "huggingface/nanotron#427: rows of q permuted for another rotary embedding", "adapter_changed")
def rows_of_q_are_permuted(it: Artefact) -> None:
    def permuted(name: str, values: torch.Tensor) -> torch.Tensor:
        return values.view(4, 2, 8, -1).transpose(1, 2).reshape(values.shape) if "q_proj.lora_B" in name else values

    edit_factors(it, permuted)


@fault(
    "adapter",
    "unslothai/unsloth-zoo#751: a resumed run starts from scratch; another step's adapter is in its place",
    "adapter_changed",
)
def another_checkpoint_is_in_its_place(it: Artefact) -> None:
    generator = torch.Generator().manual_seed(1)
    edit_factors(it, lambda _, values: values + 0.01 * torch.randn(values.shape, generator=generator))


@fault("adapter", "one bit of one value, from a bad disk or a broken download", "adapter_changed")
def one_value_is_changed(it: Artefact) -> None:
    edit_factors(it, lambda name, values: with_value(values, 0.5) if ".layers.1.mlp.up_proj.lora_B" in name else values)


@fault("adapter", "an earlier checkpoint of the same run, taken for a rounded copy", "adapter_changed")
def an_earlier_checkpoint_is_in_its_place(it: Artefact) -> None:
    edit_factors(it, lambda name, values: with_noise(values, 1e-3))


@fault("adapter", "an earlier checkpoint, stored in bfloat16 as published adapters are", "adapter_changed")
def an_earlier_checkpoint_is_there_in_bfloat16(it: Artefact) -> None:
    edit_factors(it, lambda name, values: with_noise(values, 3e-3).bfloat16())


@fault("adapter", "an earlier checkpoint, stored in float16", "adapter_changed")
def an_earlier_checkpoint_is_there_in_float16(it: Artefact) -> None:
    edit_factors(it, lambda name, values: with_noise(values, 1e-3).half())


@fault("adapter", "noise a hundred times smaller than the rounding of bfloat16", "adapter_changed")
def noise_is_far_below_bfloat16(it: Artefact) -> None:
    edit_factors(it, lambda name, values: with_noise(values, 1e-5))


@fault("adapter", "bfloat16 by cutting digits off, not by rounding (a broken converter)", "adapter_changed")
def factors_are_cut_to_bfloat16(it: Artefact) -> None:
    edit_factors(it, lambda name, values: (values.contiguous().view(torch.int32) & -65536).view(torch.float32))


@fault("adapter", "factors quantized to 8 bits and back", "adapter_changed")
def factors_went_through_8_bits(it: Artefact) -> None:
    edit_factors(it, lambda name, values: (values / values.abs().max() * 127).round() * (values.abs().max() / 127))
