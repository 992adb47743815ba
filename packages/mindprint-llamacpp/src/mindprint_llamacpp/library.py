"""llama.cpp's C library, as the wheel xllamacpp holds it or as any other file, through ctypes.

xllamacpp's own Python interface offers llama.cpp's server, which gives no log-probs of given tokens. Its extension
module exports the C interface as well, and that is called here. The structures of the C interface change between
releases. A structure is therefore taken only if the library's own default values are where they are expected.
"""

from __future__ import annotations

import ctypes as c
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mindprint.errors import BackendError

REMEDY = "pip install 'xllamacpp>=2026.10.11549'"

FLOAT32 = 0
"""GGML_TYPE_F32, for the cache of keys and values."""

NO_FLASH_ATTENTION = 0

KEPT_MESSAGES = 20

_SPACE = 512
"""Bytes behind a structure's known fields. The library fills the whole structure, also the fields that a newer release
has added at its end."""


def _structure(name: str, *groups: tuple[Any, str]) -> type[c.Structure]:
    """Make a structure of groups of fields that share a type."""
    fields: list[tuple[str, Any]] = [(field, kind) for kind, names in groups for field in names.split()]
    return type(name, (c.Structure,), {"_fields_": [*fields, ("later_fields", c.c_uint8 * _SPACE)]})


# The fields of `include/llama.h`. Those that nobody sets here keep the library's defaults.
_ModelParameters = _structure(
    "_ModelParameters",
    (c.c_void_p, "devices buffer_overrides"),
    (c.c_int32, "n_gpu_layers split_mode load_mode lazy_mode main_gpu"),
    (c.c_void_p, "tensor_split progress progress_data key_overrides"),
    (c.c_bool, "vocab_only check_tensors extra_buffers no_host no_alloc load_mtp"),
)
_SIZES = (
    (c.c_uint32, "n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq"),
    (c.c_int32, "n_threads n_threads_batch context_type rope_scaling pooling attention flash_attention"),
    (c.c_float, "rope_base rope_scale yarn_ext yarn_attn yarn_beta_fast yarn_beta_slow"),
    (c.c_uint32, "yarn_original"),
    (c.c_float, "defragment"),
    (c.c_void_p, "callback callback_data"),
    (c.c_int32, "type_k type_v"),
)
_SWITCHES = (c.c_bool, "embeddings offload_kqv no_perf op_offload swa_full kv_unified")
_CONTEXT_LAYOUTS = (
    _structure("_ContextParameters6", *_SIZES, (c.c_void_p, "abort abort_data added"), _SWITCHES),
    _structure("_ContextParameters5", *_SIZES, (c.c_void_p, "abort abort_data"), _SWITCHES),
)
"""Of llama.cpp 0.6 and of 0.5, which differ by a pointer before the switches."""

_CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "flash_attention": -1, "yarn_ext": -1.0,
    "type_k": 1, "type_v": 1, "embeddings": False, "offload_kqv": True, "swa_full": True, "kv_unified": False,
}  # fmt: skip
_MODEL_DEFAULTS = {"split_mode": 1, "main_gpu": 0, "vocab_only": False, "extra_buffers": True, "no_alloc": False}


class _Batch(c.Structure):
    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


_LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
_messages: list[str] = []


def _keep(_level: int, text: bytes, _data: int | None) -> None:
    _messages.append(text.decode("utf-8", "replace"))
    del _messages[:-KEPT_MESSAGES]


_KEEP = _LOG(_keep)
"""llama.cpp calls it as long as the process lasts, so it has to be kept."""


@dataclass(frozen=True)
class Library:
    """The functions of the library, with their signatures, and the layout of its context's parameters."""

    functions: c.CDLL
    version: str

    def model_parameters(self) -> Any:
        """Return the parameters of a model on the CPU."""
        parameters = self.functions.llama_model_default_params()
        parameters.n_gpu_layers = 0
        # Repacked weights are multiplied by other kernels, with other rounding.
        parameters.extra_buffers = False
        return parameters

    def context_parameters(self, rows: int, length: int) -> Any:
        """Return the parameters of a context for `rows` sequences of `length` tokens, computed in float32."""
        parameters = self.functions.llama_context_default_params()
        parameters.n_ctx = rows * length
        parameters.n_seq_max = rows
        # Without an upper limit of outputs there is one for each token of a batch.
        parameters.n_batch = parameters.n_ubatch = min(length, 512)
        parameters.n_threads = parameters.n_threads_batch = thread_count()
        parameters.flash_attention = NO_FLASH_ATTENTION
        parameters.type_k = parameters.type_v = FLOAT32
        return parameters


def thread_count() -> int:
    """Return the threads to compute with: `OMP_NUM_THREADS` where it is set, otherwise one for each core."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    return int(stated) if stated.isdigit() and int(stated) > 0 else os.cpu_count() or 1


def last_message() -> str:
    """Return the last line that llama.cpp wrote about an error."""
    lines = [line.strip() for line in "".join(_messages).splitlines() if line.strip()]
    wrong = [line for line in lines if "error" in line.lower() or "failed" in line.lower() or "missing" in line.lower()]
    # The first of several lines has the cause. The lines after it say what could not be done because of it.
    return (wrong or lines or ["llama.cpp gave no reason"])[0]


def forget_messages() -> None:
    """Forget what llama.cpp has written so far."""
    _messages.clear()


@cache
def load_library() -> Library:
    """Load the library of the wheel, once.

    Raises:
        BackendError: It is missing, or its structures are not those that are known.
    """
    found = importlib.util.find_spec("xllamacpp")
    folders = list(found.submodule_search_locations or ()) if found else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("xllamacpp*.so"))]
    if not files:
        raise BackendError(f"backend 'llamacpp' needs llama.cpp's library: {REMEDY}")
    return open_library(files[0])


def open_library(file: Path) -> Library:
    """Load llama.cpp from a shared library. Other libraries that it needs must have been loaded.

    Raises:
        BackendError: It is not a llama.cpp, or its structures are not those that are known.
    """
    try:
        functions = c.CDLL(str(file))
        context = _declare(functions)
    except (OSError, AttributeError) as error:
        raise BackendError(f"{file}: is not a llama.cpp that is known here ({error}): {REMEDY}") from error
    if context is None:
        raise BackendError(f"{file}: this release of llama.cpp has other structures than are known here: {REMEDY}")
    functions.llama_log_set(_KEEP, None)
    functions.llama_backend_init()
    return Library(functions, functions.llama_version().decode())


def _declare(functions: c.CDLL) -> type[c.Structure] | None:
    """State the signatures. Return the layout of the context's parameters, None if no known layout fits."""
    context = None
    for layout in _CONTEXT_LAYOUTS:
        _signature(functions, "llama_context_default_params", layout, ())
        defaults = functions.llama_context_default_params()
        if all(getattr(defaults, name) == value for name, value in _CONTEXT_DEFAULTS.items()):
            context = layout
            break
    _signature(functions, "llama_model_default_params", _ModelParameters, ())
    model = functions.llama_model_default_params()
    if context is None or any(getattr(model, name) != value for name, value in _MODEL_DEFAULTS.items()):
        return None
    pointers = c.POINTER(c.c_void_p), c.POINTER(c.c_float)
    for name, result, arguments in (
        ("llama_version", c.c_char_p, ()),
        ("llama_backend_init", None, ()),
        ("llama_log_set", None, (_LOG, c.c_void_p)),
        ("llama_model_load_from_file", c.c_void_p, (c.c_char_p, _ModelParameters)),
        ("llama_model_free", None, (c.c_void_p,)),
        ("llama_model_n_params", c.c_uint64, (c.c_void_p,)),
        ("llama_model_get_vocab", c.c_void_p, (c.c_void_p,)),
        ("llama_vocab_n_tokens", c.c_int32, (c.c_void_p,)),
        ("llama_init_from_model", c.c_void_p, (c.c_void_p, context)),
        ("llama_free", None, (c.c_void_p,)),
        ("llama_get_memory", c.c_void_p, (c.c_void_p,)),
        ("llama_memory_clear", None, (c.c_void_p, c.c_bool)),
        ("llama_batch_init", _Batch, (c.c_int32, c.c_int32, c.c_int32)),
        ("llama_batch_free", None, (_Batch,)),
        ("llama_decode", c.c_int32, (c.c_void_p, _Batch)),
        ("llama_get_logits_ith", c.POINTER(c.c_float), (c.c_void_p, c.c_int32)),
        ("llama_adapter_lora_init", c.c_void_p, (c.c_void_p, c.c_char_p)),
        ("llama_adapter_lora_free", None, (c.c_void_p,)),
        ("llama_set_adapters_lora", c.c_int32, (c.c_void_p, pointers[0], c.c_size_t, pointers[1])),
    ):
        _signature(functions, name, result, arguments)
    return context


def _signature(functions: c.CDLL, name: str, result: Any, arguments: Sequence[Any]) -> None:
    function = getattr(functions, name)
    function.restype, function.argtypes = result, list(arguments)
