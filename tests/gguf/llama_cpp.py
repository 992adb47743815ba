"""llama.cpp as a witness: the logits of every position, from its library in the release that noxfile.py pins.

The npm package `@node-llama-cpp/linux-x64` holds it in several files. The structures and signatures of the C interface
are those of the backend, which are taken only if the library's default values are where they are expected.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

from mindprint_llamacpp.library import Library, forget_messages, last_message, open_library
from mindprint_llamacpp.model import LlamaModel


class LlamaCppError(RuntimeError):
    """A file that llama.cpp refuses, with the reason that it printed."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}: {last_message()}")


@cache
def load_from(folder: Path) -> Library:
    """Load the library of the npm package once, with the parts that it needs and the kernels for this processor."""
    for name in ("ggml-base", "ggml.v0.5.0"):
        ggml = c.CDLL(str(folder / f"lib{name}.so"), mode=c.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    return open_library(folder / "libllama.v0.5.0.so")


@contextmanager
def loaded(library: Path, file: Path, adapter: Path | None = None) -> Iterator[LlamaModel]:
    """Load a GGUF file, and the file of an adapter, while the block lasts."""
    llama = load_from(library)
    forget_messages()
    handle = llama.functions.llama_model_load_from_file(str(file).encode(), llama.model_parameters())
    if not handle:
        raise LlamaCppError(f"{file.name} was not loaded")
    vocabulary = llama.functions.llama_vocab_n_tokens(llama.functions.llama_model_get_vocab(handle))
    model = LlamaModel(llama, handle, vocabulary, "", None, None, ())
    try:
        if adapter is not None:
            model.factors = llama.functions.llama_adapter_lora_init(handle, str(adapter).encode())
            if not model.factors:
                raise LlamaCppError(f"{adapter.name} was not loaded")
        yield model
    finally:
        model.release()


def logits(library: Path, file: Path, tokens: Sequence[int], adapter: Path | None = None) -> np.ndarray:
    """Return llama.cpp's logits `[tokens, vocabulary]` of one sequence, float32 throughout."""
    read = np.asarray(tokens, np.int32)
    with (
        loaded(library, file, adapter) as model,
        model.context(1, len(read), adapter=adapter is not None) as context,
    ):
        # Each row is a view of memory that the library overwrites.
        return np.stack([row.copy() for _, row in context.decode(0, read, 0, range(len(read)))])


def greedy_answers(
    library: Path, file: Path, prompts: Sequence[Sequence[int]], longest: int, stop: int
) -> list[list[int]]:
    """Return llama.cpp's greedy answers to prompts, each up to its stop token, which is part of it."""
    answers: list[list[int]] = []
    with loaded(library, file) as model:
        for prompt in prompts:
            tokens: list[int] = []
            with model.context(1, len(prompt) + longest, adapter=False) as context:
                read, start = np.asarray(prompt, np.int32), 0
                while len(tokens) < longest and stop not in tokens:
                    ((_, row),) = context.decode(0, read, start, [len(read) - 1])
                    tokens.append(int(row.argmax()))
                    read, start = np.asarray(tokens[-1:], np.int32), start + len(read)
            answers.append(tokens)
    return answers
