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
from mindprint_mlx.configuration import ROPE_FIELDS, WINDOW_FIELDS, Configuration, interpret
from mindprint_mlx.imports import mlx_lm_module
from mindprint_mlx.rope import Rope, frequencies
from mindprint_mlx.windows import windowed

MODULES = {"mistral": "llama"}
"""mlx-lm's module for a model type, where it is not of the same name."""

COMPARED = frozenset(
    {
        "apertus", "cohere", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "gpt_neox", "granite",
        "helium", "hunyuan_v1_dense", "llama", "mistral", "mixtral", "nemotron", "olmo2", "phi", "phi3", "qwen2",
        "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
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
        "classifier_dropout", "pruned_heads", "chunk_size_feed_forward",
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
        "num_local_experts", "num_experts",
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

CONSTANTS: Mapping[str, Mapping[str, Any]] = {
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "hunyuan_v1_dense": {"use_qk_norm": True},
    "olmo2": {"head_dim": None, "mlp_bias": False},
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "smollm3": {"head_dim": None},
    "phi3": {"rope_scaling": None},
}
"""Parameters of a class that its family's configuration has no field for."""

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

TRADITIONAL = {"DynamicNTKAlphaRoPE": False}
"""The pairing of dimensions in mlx-lm's own rotary embeddings: True for neighbours, False for halves."""


def _unrounded_embedding_scale(module: nn.Module, configuration: Configuration) -> None:
    """Undo the rounding of the factor of Gemma 3's embedding."""
    # It is sqrt(hidden), which mlx-lm rounds to bfloat16 even in a float32 model.
    scale = configuration.fields["hidden_size"] ** 0.5
    rounded = mx.array(scale, mx.bfloat16).item()
    layer = module.layers[0]
    if module.model.embed_tokens.weight.dtype == mx.float32 and rounded != scale:
        _around(layer, lambda call, x, *rest, **named: call(x * (scale / rounded), *rest, **named))


REPAIRS: Mapping[str, Callable[[nn.Module, Configuration], None]] = {"gemma3_text": _unrounded_embedding_scale}
"""Corrections of the built model, by family."""


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
    configuration = interpret(config)
    module = _module(configuration.model_type)
    code = _code(module)
    for name, value in configuration.fields.items():
        _account_for(configuration, code, name, value)
    _check_activation(configuration, code)
    arguments = _arguments(configuration, module.ModelArgs)
    return Architecture(configuration, module.Model, arguments, _notes(configuration))


def complete(architecture: Architecture, module: nn.Module) -> int | None:
    """Set into the loaded module all that its class takes no argument for; return its shortest window, if any."""
    configuration = architecture.configuration
    _set_activation(configuration, module)
    for layer, parameters in zip(_layers(configuration, module), configuration.rope, strict=True):
        _set_rope(configuration, layer, parameters)
    for layer, window in zip(_layers(configuration, module), configuration.windows, strict=True):
        if window:
            _around(_attention(configuration, layer), windowed(window))
    if configuration.model_type in REPAIRS:
        REPAIRS[configuration.model_type](module, configuration)
    return min(filter(None, configuration.windows), default=None)


def _module(model_type: str) -> ModuleType:
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
def _code(module: ModuleType) -> _Code:
    # The source is read, not run: a field that is only stored in the arguments changes nothing.
    trees = [ast.parse(inspect.getsource(part)) for part in (module, *_borrowed(module))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    called = (attributes | names) & ACTIVATIONS_IN_CODE.keys()
    parameters = frozenset(field.name for field in dataclass_fields(module.ModelArgs))
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
    if name in code.reads or value in NEUTRAL.get(name, ()):
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
    if wanted is None or code.activations == {wanted} or configuration.model_type in MLP_CALLS:
        return
    has = ", ".join(sorted(code.activations)) or "none that is known"
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
    values |= _set_afterwards(configuration) | dict(CONSTANTS.get(configuration.model_type, {}))
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
        "sliding_window_pattern": _PATTERNS.get(configuration.model_type, lambda _: None)(configuration),
    }


def _rotating_pattern(configuration: Configuration) -> str | None:
    """Return EXAONE 4's pattern."""
    # It also decides which layers rotate: those that it calls local, or all without a pattern.
    if all(rope is not None for rope in configuration.rope):
        return None
    return "".join("G" if rope is None else "L" for rope in configuration.rope)


_PATTERNS: Mapping[str, Callable[[Configuration], Any]] = {
    # Every layer global: none slides by the class's pattern, and `complete` gives those that slide their windows.
    "gemma3_text": lambda _: 1,
    "exaone4": _rotating_pattern,
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


def _set_rope(configuration: Configuration, layer: nn.Module, parameters: Mapping[str, Any] | None) -> None:
    """Replace a layer's rotary embedding, keeping only how it pairs dimensions."""
    if parameters is None and not any(name in layer for name in ATTENTION):
        return
    attention = _attention(configuration, layer)
    built = {name: child for name, child in attention.items() if name in ROPE_MODULES}
    if parameters is None:
        if any(isinstance(child, nn.RoPE) for child in built.values()):
            raise ModelError(f"model_type {configuration.model_type!r}: mlx-lm rotates where its config.json does not")
        return
    computed = frequencies(parameters, configuration.head_dim, configuration.fields.get("max_position_embeddings"))
    for name, child in built.items():
        traditional = _is_traditional(child)
        if traditional is not None and child.dims == 2 * len(computed.inverse):
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
    if call is None or wanted is None or _code(_module(configuration.model_type)).activations == {wanted}:
        return
    function = FUNCTIONS[wanted]
    for layer in module.layers:
        _replace_call(layer.mlp, lambda self, x: call(self, x, function))


def _around(module: nn.Module, around: Callable[..., Any]) -> None:
    """Run `around(call, *args)` where the module is called. `call` is the call of its class."""
    kind = type(module)
    _replace_call(
        module, lambda self, *args, **named: around(lambda *a, **n: kind.__call__(self, *a, **n), *args, **named)
    )


def _replace_call(module: nn.Module, call: Callable[..., Any]) -> None:
    """Replace the call of one module, and nothing else about it."""
    # Python looks up `__call__` on the class, so that the module gets a class that differs in nothing else.
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})
