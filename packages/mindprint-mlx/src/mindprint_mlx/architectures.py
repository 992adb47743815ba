"""From a config.json to one of mlx-lm's model classes that computes as transformers does, or a refusal.

mlx-lm builds a class from the fields it knows and says nothing about the others. Here every field of the configuration
is accounted for. The class reads it, or we set it into the built model (rotary embeddings, windows, activations), or it
cannot change the computation, or its value is the one that the class computes anyway. Any other field is refused by
name, for any family. Fields that show in the weights (biases, sizes, tied heads) need no table: loading is strict.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from dataclasses import fields as dataclass_fields
from functools import cache
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx import nn

from mindprint.errors import ModelError
from mindprint_mlx.calls import replace_call, wrap_call
from mindprint_mlx.configuration import ROPE_FIELDS, WINDOW_FIELDS, Configuration, interpret
from mindprint_mlx.families import family, own_module
from mindprint_mlx.imports import mlx_lm_module
from mindprint_mlx.rope import Rope, frequencies
from mindprint_mlx.towers import WRAPPERS
from mindprint_mlx.windows import windowed

MODULES = {"mistral": "llama", "qwen2_5_vl_text": "qwen2", "qwen3_5_text": "qwen3_5", "qwen3_vl_text": "qwen3"}
"""mlx-lm's module for a model type, where it is not of the same name."""

COMPARED = frozenset(
    {
        "apertus", "bitnet", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "exaone4", "gemma",
        "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode",
        "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid", "helium", "hunyuan_v1_dense",
        "internlm3", "lfm2", "llama", "mamba2", "ministral3", "mistral", "mixtral", "nemotron", "nemotron_h", "olmo",
        "olmo2", "olmo3", "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_text", "qwen3_moe",
        "qwen3_next", "seed_oss", "smollm3", "stablelm", "starcoder2",
    }
)  # fmt: skip
"""The families whose logits `tests/parity/test_architectures.py` compares with transformers'."""

INERT = frozenset(
    {
        # the names of the model, and who wrote the file
        "model_type", "architectures", "_name_or_path", "name_or_path", "transformers_version", "auto_map", "dtype",
        "torch_dtype", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "_commit_hash",
        "_num_labels", "task_specific_params", "license", "unsloth_version", "unsloth_fixed", "trl_version",
        # tokens, which the tokenizer and the caller decide
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id",
        "eod_token_id", "unk_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
        # generation, kept in the model's configuration by old versions
        "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
        "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "num_return_sequences", "return_dict_in_generate", "output_scores",
        "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
        "use_cache", "cache_implementation", "prefix",
        # outputs, and heads that a language model does not have
        "output_hidden_states", "output_attentions", "return_dict", "torchscript", "id2label", "label2id",
        "num_labels", "problem_type", "finetuning_task", "tokenizer_class", "output_router_logits",
        "classifier_dropout", "pruned_heads", "chunk_size_feed_forward", "summary_type", "summary_use_proj",
        "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
        # initialisation and training only; training on a base means without its own dropout
        "initializer_range", "initializer_factor", "init_std", "attention_dropout", "hidden_dropout", "dropout",
        "attn_pdrop", "embd_pdrop", "resid_pdrop", "emb_pdrop", "embedding_dropout", "residual_dropout",
        "hidden_dropout_prob", "attention_probs_dropout_prob", "attn_dropout", "router_aux_loss_coef",
        "router_jitter_noise", "router_z_loss_coef", "gradient_checkpointing",
        # not part of the computation where rotary embeddings are, whose limits rope.py knows
        "max_position_embeddings",
        # encoders' and multimodal models' fields in every old configuration
        "is_decoder", "bos_token", "eos_token", "pad_token", "tf_legacy_loss", "use_bfloat16",
    }
)  # fmt: skip
"""Fields that cannot change a forward pass over whole sequences, in any family."""

IN_THE_WEIGHTS = frozenset(
    {
        "attention_bias", "mlp_bias", "use_bias", "qkv_bias", "use_qkv_bias", "attention_out_bias", "lm_head_bias",
        "bias", "head_dim", "intermediate_size", "vocab_size", "tie_word_embeddings", "qk_layernorm", "use_qk_norm",
        "num_local_experts", "num_experts", "n_inner", "num_key_value_heads",
    }
)  # fmt: skip
"""Fields that decide the tensors and their shapes: a class that misread one could not be loaded."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "pretraining_tp": (None, 0, 1),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
    "clip_qkv": (None,),
    "norm_topk_prob": (False,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": (None, []),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "quantization_config": (None,),
    "quantization": (None,),
    "text_config": (None,),
    "vision_config": (None,),
}
"""Values for which a field that the class does not read changes nothing."""

OURS_ALONE = frozenset({"rope_traditional", "rope_scaling", "layer_norm_bias"})
"""Parameters of mlx-lm's classes that no configuration states: constants of the family, or set by us."""

ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate"),
    "relu": ("relu",),
    "relu2": ("relu2",),
    "xielu": ("xielu",),
}
"""Activation functions, and transformers' names for each."""

ACTIVATIONS_IN_CODE = {
    "silu": "silu",
    "swiglu": "silu",
    "SwiGLU": "silu",
    "SwitchGLU": "silu",
    "gelu": "gelu",
    "gelu_approx": "gelu_tanh",
    "geglu": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "relu_squared": "relu2",
    "XieLU": "xielu",
    "xielu": "xielu",
}
"""Names under which mlx-lm's modules call them."""

ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act")

MLP_CALLS: Mapping[str, Callable[[Any, mx.array, Any], mx.array]] = {
    "gemma": lambda mlp, x, act: mlp.down_proj(act(mlp.gate_proj(x)) * mlp.up_proj(x)),
    "gemma2": lambda mlp, x, act: mlp.down_proj(act(mlp.gate_proj(x)) * mlp.up_proj(x)),
    "starcoder2": lambda mlp, x, act: mlp.c_proj(act(mlp.c_fc(x))),
    "gpt_bigcode": lambda mlp, x, act: mlp.c_proj(act(mlp.c_fc(x))),
    "gpt_neox": lambda mlp, x, act: mlp.dense_4h_to_h(act(mlp.dense_h_to_4h(x))),
    "phi": lambda mlp, x, act: mlp.fc2(act(mlp.fc1(x))),
}
"""MLPs of families that can be given the configuration's activation where mlx-lm's class has another in its code."""

FUNCTIONS: Mapping[str, Callable[[mx.array], mx.array]] = {
    "silu": nn.silu,
    "gelu": nn.gelu,
    "gelu_tanh": nn.gelu_approx,
    "relu": nn.relu,
    "relu2": nn.relu2,
}
"""The activation functions that an MLP can be given."""

ATTENTION = ("self_attn", "attention", "attn")
"""Layers' names for their attention."""

ROPE_MODULES = ("rope", "rotary_emb")
"""Attentions' names for their rotary embedding."""

MAY_ROTATE = ("cohere2",)
"""Families whose layers are told after they were built that they do not rotate."""

TRADITIONAL = {"DynamicNTKAlphaRoPE": False}
"""The pairing of dimensions in mlx-lm's own rotary embeddings: True for neighbours, False for halves."""


@dataclass(frozen=True)
class Architecture:
    """A model class of mlx-lm, and its arguments. `notes` are for the user."""

    configuration: Configuration
    model_class: Any
    arguments: Any
    notes: tuple[str, ...] = ()


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the class for a config.json.

    Raises:
        ModelError: Names the first field that the class would get wrong.
    """
    # First the class: where there is none, a field that is missed would be a poor reason.
    module = _module(str(config["model_type"]))
    configuration = interpret(config)
    model_class, arguments_class = (getattr(module, name) for name in family(configuration.model_type).classes)
    code = _code(module, arguments_class)
    for name, value in configuration.fields.items():
        _account_for(configuration, code, name, value)
    _check_activation(configuration, code)
    arguments = _arguments(configuration, arguments_class)
    return Architecture(configuration, model_class, arguments, _notes(configuration))


def complete(architecture: Architecture, module: nn.Module) -> int | None:
    """Set into the loaded module all that its class takes no argument for; return its shortest window, if any."""
    configuration = architecture.configuration
    _set_activation(configuration, module)
    facts = family(configuration.model_type)
    for index, layer in enumerate(_layers(configuration, module)):
        if not facts.fixed_rope:
            _set_rope(configuration, layer, index)
        window = configuration.windows[index]
        if window and not facts.own_windows:
            attention = _attention(configuration, layer)
            wrap_call(attention, windowed(window, type(attention).__call__))
    if facts.repair:
        facts.repair(module, configuration)
    return min(filter(None, configuration.windows), default=None)


def is_known(model_type: str) -> bool:
    """Return whether there is a class for a model type, alone or as part of a model with more than text."""
    if model_type in WRAPPERS:
        return True
    try:
        _module(model_type)
    except ModelError:
        return False
    return True


def build(architecture: Architecture) -> nn.Module:
    """Return the model, without weights.

    Raises:
        Exception: Whatever the class raises when its arguments do not fit.
    """
    configuration = architecture.configuration
    module: nn.Module = architecture.model_class(architecture.arguments)
    prepare = family(configuration.model_type).prepare
    if prepare:
        prepare(module, configuration)
    return module


def _module(model_type: str) -> ModuleType:
    ours = own_module(model_type)
    if ours is not None:
        return ours
    try:
        return mlx_lm_module(f"models.{MODULES.get(model_type, model_type)}")
    except ModuleNotFoundError as error:
        raise ModelError(f"mlx-lm has no class for model_type {model_type!r} ({error})") from error
    except ImportError as error:
        raise ModelError(f"mlx-lm's class for model_type {model_type!r} cannot be used: {error}") from error


def _notes(configuration: Configuration) -> tuple[str, ...]:
    if configuration.model_type in COMPARED:
        return ()
    note = (
        f"model_type {configuration.model_type!r} passed every check of its configuration, but its logits on MLX are "
        "not among those that Mindprint's tests compare with transformers'"
    )
    return (note,)


@dataclass(frozen=True)
class _Code:
    """Facts from a class's source: its parameters, those that it reads, and activation functions that it calls."""

    parameters: frozenset[str]
    reads: frozenset[str]
    activations: frozenset[str]


@cache
def _code(module: ModuleType, arguments: Any) -> _Code:
    # The source is read, not run: a field that is only stored in the arguments changes nothing.
    trees = [ast.parse(inspect.getsource(part)) for part in (module, *_borrowed(module))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    called = (attributes | names) & ACTIVATIONS_IN_CODE.keys()
    parameters = frozenset(field.name for field in dataclass_fields(arguments))
    activations = {ACTIVATIONS_IN_CODE[name] for name in called}
    if "relu2" in activations:
        activations.discard("relu")  # which the square is written with
    return _Code(parameters, frozenset(attributes | strings) & parameters, frozenset(activations))


def _borrowed(module: ModuleType) -> Iterator[ModuleType]:
    """Yield other families' modules that this one builds on."""
    shared = ("base", "cache", "rope_utils", "activations", "pipeline", "switch_layers", "mla", "ssm", "gated_delta")
    for value in vars(module).values():
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "")
        package, _, last = str(name).rpartition(".")
        if package == "mlx_lm.models" and last not in shared and name != module.__name__:
            yield mlx_lm_module(f"models.{last}")


def _account_for(configuration: Configuration, code: _Code, name: str, value: Any) -> None:
    if name in INERT | IN_THE_WEIGHTS | ROPE_FIELDS | WINDOW_FIELDS or name in ACTIVATION_FIELDS:
        return
    harmless = family(configuration.model_type).harmless.get(name, ())
    if name in code.reads or value in harmless or value in NEUTRAL.get(name, ()):
        return
    alias = _other_name(configuration, name)
    if alias in code.reads:
        return
    why = "reads it in but never uses it" if name in code.parameters else "does not know it"
    raise ModelError(
        f"model_type {configuration.model_type!r}: config.json says {name} = {value!r}, and mlx-lm's class {why}; it "
        "may compute something else than transformers does"
    )


def _other_name(configuration: Configuration, name: str) -> str | None:
    return next((other for other, own in configuration.aliases.items() if own == name), None)


def _check_activation(configuration: Configuration, code: _Code) -> None:
    wanted = _activation(configuration)
    stated = family(configuration.model_type).activation
    computed = {stated} if stated else code.activations
    if wanted is None or computed == {wanted} or configuration.model_type in MLP_CALLS:
        return
    has = ", ".join(sorted(computed)) or "none that is known"
    raise ModelError(
        f"model_type {configuration.model_type!r}: config.json asks for {wanted}, mlx-lm's class has {has}"
    )


def _activation(configuration: Configuration) -> str | None:
    """Return the function that the configuration's activation computes, or None if it names none."""
    stated = {configuration.fields[name] for name in ACTIVATION_FIELDS if configuration.fields.get(name)}
    meant = {computes for computes, names in ACTIVATIONS.items() if stated & set(names)}
    if odd := sorted(stated - {name for names in ACTIVATIONS.values() for name in names}):
        raise ModelError(f"model_type {configuration.model_type!r}: activation {odd[0]!r} is not supported on MLX")
    if len(meant) > 1:
        raise ModelError(f"model_type {configuration.model_type!r}: config.json names several activations ({stated})")
    return next(iter(meant), None)


def _arguments(configuration: Configuration, kind: Any) -> Any:
    """Return the class's arguments: constants, fields of the configuration, and placeholders for parts set later."""
    values = dict(configuration.fields)
    values |= {name: values[own] for name, own in configuration.aliases.items() if own in values}
    facts = family(configuration.model_type)
    values |= _set_afterwards(configuration) | dict(facts.constants)
    values |= facts.arguments(configuration) if facts.arguments else {}
    given = {}
    for parameter in dataclass_fields(kind):
        if parameter.name in values:
            given[parameter.name] = values[parameter.name]
        elif parameter.default is MISSING and parameter.default_factory is MISSING:
            raise ModelError(f"model_type {configuration.model_type!r}: config.json does not say {parameter.name}")
        elif parameter.name not in OURS_ALONE:
            raise ModelError(
                f"model_type {configuration.model_type!r}: config.json does not say {parameter.name}, and what mlx-lm "
                f"assumes ({parameter.default!r}) need not be what transformers does"
            )
    return kind(**given)


def _set_afterwards(configuration: Configuration) -> dict[str, Any]:
    """Return placeholders for rotary embeddings and windows, with which any class builds its plain layers."""
    partial = next((rope["partial_rotary_factor"] for rope in configuration.rope if rope), 1.0)
    return {
        "rope_theta": 10000.0,
        "rotary_emb_base": 10000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_parameters": None,
        "partial_rotary_factor": partial,
        "rotary_pct": partial,
        "original_max_position_embeddings": 4096,
        "layer_types": None,
        "sliding_window": None,
        "sliding_window_pattern": None,
    }


def _layers(configuration: Configuration, module: nn.Module) -> list[nn.Module]:
    layers = list(module.layers)
    if len(layers) != len(configuration.rope):
        raise ModelError(
            f"model_type {configuration.model_type!r}: mlx-lm builds {len(layers)} layers, config.json says "
            f"{len(configuration.rope)}"
        )
    return layers


def _attention(configuration: Configuration, layer: nn.Module) -> nn.Module:
    attentions: list[nn.Module] = [layer[name] for name in ATTENTION if name in layer]
    if len(attentions) != 1:
        raise ModelError(f"model_type {configuration.model_type!r}: its layers have no attention that is known here")
    return attentions[0]


def _set_rope(configuration: Configuration, layer: nn.Module, index: int) -> None:
    """Replace a layer's rotary embedding, keeping only how it pairs dimensions."""
    parameters = configuration.rope[index]
    if parameters is None and not any(name in layer for name in ATTENTION):
        return
    attention = _attention(configuration, layer)
    built = {name: child for name, child in attention.items() if name in ROPE_MODULES}
    if parameters is None:
        if any(isinstance(child, nn.RoPE) for child in built.values()) and configuration.model_type not in MAY_ROTATE:
            raise ModelError(f"model_type {configuration.model_type!r}: mlx-lm rotates where its config.json does not")
        return
    head_dim = configuration.rotated_head(index)
    own = family(configuration.model_type).rope_parameters
    computed = frequencies(parameters, head_dim, configuration.value("max_position_embeddings"), own)
    for name, child in built.items():
        traditional = _is_traditional(child)
        # A class that rotates whole heads takes a rotation of their first dimensions as well.
        if traditional is not None and child.dims in (2 * len(computed.inverse), head_dim):
            attention[name] = Rope(computed, traditional=traditional)
            return
    raise ModelError(f"model_type {configuration.model_type!r}: mlx-lm has another rotary embedding for it")


def _is_traditional(rope: nn.Module) -> bool | None:
    """Return whether a rotary embedding pairs neighbouring dimensions, or None for an unknown class."""
    return bool(rope.traditional) if type(rope) is nn.RoPE else TRADITIONAL.get(type(rope).__name__)


def _set_activation(configuration: Configuration, module: nn.Module) -> None:
    """Give MLPs the configuration's activation where the class has another one in its code."""
    call = MLP_CALLS.get(configuration.model_type)
    wanted = _activation(configuration)
    if call is None or wanted is None:
        return
    code = _module(configuration.model_type)
    if _code(code, code.ModelArgs).activations == {wanted}:
        return
    function = FUNCTIONS[wanted]
    for layer in module.layers:
        replace_call(layer.mlp, lambda self, x: call(self, x, function))
