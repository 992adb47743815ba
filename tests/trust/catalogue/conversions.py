"""Conversions to mlx-lm's format that lose a part of the adapter."""

from __future__ import annotations

from artefacts import Artefact, edit_tensors

from catalogue.edits import edit_lora_parameters
from catalogue.entry import fault
from mindprint.adapter.mlx_lm_format import WEIGHTS_FILE as MLX_LM_FILE


@fault(
    "conversion",
    "mzbac in ml-explore/mlx-examples#623: alpha, not alpha / r, becomes the scale",
    "scale",
    factor=4.0,
)
def alpha_becomes_mlx_lms_scale(it: Artefact) -> None:
    edit_lora_parameters(it, scale=8.0)


@fault(
    "conversion",
    "ml-explore/mlx-examples#622: the tool's default scale, 20, for the one trained with",
    "scale",
    factor=10.0,
)
def the_default_scale_is_taken(it: Artefact) -> None:
    edit_lora_parameters(it, scale=20.0)


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
    edit_lora_parameters(it, keys=["self_attn.q_proj"])


@fault("conversion", "vllm-project/vllm#34186 for mlx-lm: values lost on the way, the names there", "no_effect")
def values_are_lost_in_the_conversion(it: Artefact) -> None:
    edit_tensors(
        it.adapter / MLX_LM_FILE,
        lambda found: {name: values * (0 if "lora_b" in name else 1) for name, values in found.items()},
    )
