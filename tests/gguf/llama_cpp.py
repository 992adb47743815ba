"""llama.cpp as a witness: the logits of every position, through its C library in the release that is pinned here.

The structures are those of `include/llama.h` of llama.cpp v0.5.0, which the npm packages `node-llama-cpp` and
`@node-llama-cpp/linux-x64` of version 3.22.1 hold. Fields that this file does not set keep the library's defaults.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

FLOAT32 = 0
"""GGML_TYPE_F32, for the cache of keys and values."""

NO_FLASH_ATTENTION = 0


def _structure(name: str, *groups: tuple[Any, str]) -> type[c.Structure]:
    """Make a structure of groups of fields that share a type."""
    fields = [(field, kind) for kind, names in groups for field in names.split()]
    return type(name, (c.Structure,), {"_fields_": fields})


_ModelParameters = _structure(
    "_ModelParameters",
    (c.c_void_p, "devices buffer_overrides"),
    (c.c_int32, "n_gpu_layers split_mode load_mode lazy_mode main_gpu"),
    (c.c_void_p, "tensor_split progress progress_data key_overrides"),
    (c.c_bool, "vocab_only check_tensors extra_buffers no_host no_alloc load_mtp"),
)
_ContextParameters = _structure(
    "_ContextParameters",
    (c.c_uint32, "n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq"),
    (c.c_int32, "n_threads n_threads_batch context_type rope_scaling pooling attention flash_attention"),
    (c.c_float, "rope_base rope_scale yarn_ext yarn_attn yarn_beta_fast yarn_beta_slow"),
    (c.c_uint32, "yarn_original"),
    (c.c_float, "defragment"),
    (c.c_void_p, "callback callback_data"),
    (c.c_int32, "type_k type_v"),
    (c.c_void_p, "abort abort_data"),
    (c.c_bool, "embeddings offload_kqv no_perf op_offload swa_full kv_unified"),
    (c.c_void_p, "samplers"),
    (c.c_size_t, "n_samplers"),
    (c.c_void_p, "other"),
)
_Batch = _structure(
    "_Batch",
    (c.c_int32, "n_tokens"),
    (c.POINTER(c.c_int32), "token"),
    (c.c_void_p, "embd"),
    (c.POINTER(c.c_int32), "pos n_seq_id"),
    (c.POINTER(c.POINTER(c.c_int32)), "seq_id"),
    (c.POINTER(c.c_int8), "logits"),
)
_LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
_messages: list[str] = []


@_LOG
def _keep(level: int, text: bytes, data: int | None) -> None:
    _messages.append(text.decode("utf-8", "replace"))


@cache
def _library(folder: Path) -> c.CDLL:
    for name in ("ggml-base", "ggml.v0.5.0"):
        ggml = c.CDLL(str(folder / f"lib{name}.so"), mode=c.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    llama = c.CDLL(str(folder / "libllama.v0.5.0.so"), mode=c.RTLD_GLOBAL)
    pointers = c.POINTER(c.c_void_p), c.POINTER(c.c_float)
    signatures: dict[str, tuple[Any, Sequence[Any]]] = {
        "llama_log_set": (None, (_LOG, c.c_void_p)),
        "llama_model_default_params": (_ModelParameters, ()),
        "llama_context_default_params": (_ContextParameters, ()),
        "llama_model_load_from_file": (c.c_void_p, (c.c_char_p, _ModelParameters)),
        "llama_init_from_model": (c.c_void_p, (c.c_void_p, _ContextParameters)),
        "llama_model_get_vocab": (c.c_void_p, (c.c_void_p,)),
        "llama_vocab_n_tokens": (c.c_int32, (c.c_void_p,)),
        "llama_batch_init": (_Batch, (c.c_int32, c.c_int32, c.c_int32)),
        "llama_batch_free": (None, (_Batch,)),
        "llama_decode": (c.c_int32, (c.c_void_p, _Batch)),
        "llama_get_logits_ith": (c.POINTER(c.c_float), (c.c_void_p, c.c_int32)),
        "llama_adapter_lora_init": (c.c_void_p, (c.c_void_p, c.c_char_p)),
        "llama_set_adapters_lora": (c.c_int32, (c.c_void_p, pointers[0], c.c_size_t, pointers[1])),
        "llama_free": (None, (c.c_void_p,)),
        "llama_model_free": (None, (c.c_void_p,)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(llama, name)
        function.restype, function.argtypes = result, list(arguments)
    llama.llama_log_set(_keep, None)
    return llama


class LlamaCppError(RuntimeError):
    """A file that llama.cpp refuses, with the end of what it printed."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: {''.join(_messages[-8:]).strip()}")


def logits(library: Path, model: Path, tokens: Sequence[int], adapter: Path | None = None) -> np.ndarray:
    """Return llama.cpp's logits `[tokens, vocabulary]` of one sequence, float32 throughout."""
    llama = _library(library)
    loaded = llama.llama_model_load_from_file(str(model).encode(), llama.llama_model_default_params())
    if not loaded:
        raise LlamaCppError(f"{model.name} was not loaded")
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max(256, len(tokens))
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.flash_attention = NO_FLASH_ATTENTION
    parameters.type_k = parameters.type_v = FLOAT32
    context = llama.llama_init_from_model(loaded, parameters)
    try:
        if not context:
            raise LlamaCppError(f"{model.name} got no context")
        if adapter is not None:
            handle = llama.llama_adapter_lora_init(loaded, str(adapter).encode())
            if not handle:
                raise LlamaCppError(f"{adapter.name} was not loaded")
            if llama.llama_set_adapters_lora(context, (c.c_void_p * 1)(handle), 1, (c.c_float * 1)(1.0)):
                raise LlamaCppError(f"{adapter.name} was not set")
        return _decoded(llama, loaded, context, tokens)
    finally:
        llama.llama_free(context)
        llama.llama_model_free(loaded)


def _decoded(llama: c.CDLL, model: int, context: int, tokens: Sequence[int]) -> np.ndarray:
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position], batch.pos[position], batch.logits[position] = int(token), position, 1
        batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
    try:
        if llama.llama_decode(context, batch):
            raise LlamaCppError("decoding failed")
        rows = [llama.llama_get_logits_ith(context, position) for position in range(len(tokens))]
        return np.stack([np.ctypeslib.as_array(row, (size,)).copy() for row in rows])
    finally:
        llama.llama_batch_free(batch)
