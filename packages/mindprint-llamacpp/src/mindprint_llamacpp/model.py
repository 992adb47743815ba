"""A model in llama.cpp: loaded from a GGUF file, which is written from the base's folder unless the folder has one."""

from __future__ import annotations

import ctypes as c
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np

from mindprint.adapter.base_facts import BaseFacts, read_base_facts
from mindprint.adapter.gguf_merging import write_base
from mindprint.contract import AdapterSite, AdapterState, Float32, Int32, LoadedModel, ModelSpec
from mindprint.errors import AdapterError, BackendError, ModelError
from mindprint.models.folder import tensors
from mindprint.models.layer_names import is_embedding, is_lm_head
from mindprint.models.token_ids import embedding_rows
from mindprint_llamacpp.library import Library, forget_messages, last_message, load_library

GRAIN = 256
"""The length of a context is a multiple of this many tokens, so that few contexts are made."""


@dataclass
class LlamaModel:
    """The handle: llama.cpp's model, the facts of its folder, and the adapter once there is one."""

    library: Library
    model: int
    vocabulary: int
    digest: str
    folder: Path | None
    facts: BaseFacts | None
    sites: tuple[AdapterSite, ...]
    adapter: AdapterState | None = None
    factors: int | None = None
    """llama.cpp's adapter."""
    _contexts: dict[tuple[int, int], int] = field(default_factory=dict)

    @contextmanager
    def context(self, rows: int, length: int, *, adapter: bool) -> Iterator[Context]:
        """Make or reuse an empty context for `rows` sequences of up to `length` tokens."""
        functions = self.library.functions
        size = rows, -(-max(length, 1) // GRAIN) * GRAIN
        if size not in self._contexts:
            self._free_contexts()
            made = functions.llama_init_from_model(self.model, self.library.context_parameters(*size))
            if not made:
                raise BackendError(f"llama.cpp made no context of {size[0]} times {size[1]} tokens: {last_message()}")
            self._contexts[size] = made
        context = self._contexts[size]
        functions.llama_memory_clear(functions.llama_get_memory(context), False)
        used = [self.factors] if adapter and self.factors is not None else []
        handles, scales = (c.c_void_p * 1)(*used), (c.c_float * 1)(1.0)
        if functions.llama_set_adapters_lora(context, handles, len(used), scales):
            raise BackendError(f"llama.cpp did not take the adapter: {last_message()}")
        yield Context(self, context, min(size[1], 512))

    def release(self) -> None:
        """Free everything."""
        self._free_contexts()
        if self.factors is not None:
            self.library.functions.llama_adapter_lora_free(self.factors)
        self.library.functions.llama_model_free(self.model)
        self.model, self.factors, self.adapter = 0, None, None

    def _free_contexts(self) -> None:
        for context in self._contexts.values():
            self.library.functions.llama_free(context)
        self._contexts.clear()


@dataclass(frozen=True)
class Context:
    """A context of llama.cpp's that holds the tokens of its rows so far."""

    owner: LlamaModel
    handle: int
    most: int

    def decode(self, row: int, tokens: Int32, start: int, wanted: Sequence[int]) -> Iterator[tuple[int, Float32]]:
        """Read tokens of a row from position `start`. Yield the logits `[vocabulary]` at each wanted index of `tokens`.

        The logits are a view of llama.cpp's memory, which the next call overwrites.
        """
        functions = self.owner.library.functions
        asked = frozenset(wanted)
        for first in range(0, len(tokens), self.most):
            part = tokens[first : first + self.most]
            batch = functions.llama_batch_init(len(part), 0, 1)
            try:
                batch.n_tokens = len(part)
                for place, token in enumerate(part.tolist()):
                    batch.token[place], batch.pos[place] = token, start + first + place
                    batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
                    batch.logits[place] = first + place in asked
                if functions.llama_decode(self.handle, batch):
                    raise BackendError(f"llama.cpp could not compute {len(part)} tokens: {last_message()}")
            finally:
                functions.llama_batch_free(batch)
            for place in range(len(part)):
                if first + place in asked:
                    values = functions.llama_get_logits_ith(self.handle, place)
                    yield first + place, np.ctypeslib.as_array(values, (self.owner.vocabulary,))


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load a base's folder, or a GGUF file.

    Raises:
        ModelError: The folder's family cannot be written as GGUF, or llama.cpp refuses the file.
    """
    path = Path(spec.path)
    if spec.quantization is not None or spec.quantize is not None:
        raise ModelError(f"{path}: backend 'llamacpp' takes a full-precision folder, or a GGUF file of any type")
    library = load_library()
    if path.is_file():
        return _loaded(library, path, spec, None)
    facts = read_base_facts(path)
    own = sorted(path.glob("*.gguf"))
    if len(own) == 1:
        return _loaded(library, own[0], spec, facts, notes=(f"computed with {own[0].name}, as that file rounds it",))
    with tempfile.TemporaryDirectory(prefix="mindprint-llamacpp-") as scratch:
        file = Path(scratch) / "base.gguf"
        try:
            write_base(file, path)
        except AdapterError as error:
            raise ModelError(f"{error}: or put the base's GGUF file into the folder") from error
        # llama.cpp maps the file, which lasts until the model is freed, also when its name is gone.
        return _loaded(library, file, spec, facts)


def _loaded(
    library: Library, file: Path, spec: ModelSpec, facts: BaseFacts | None, notes: tuple[str, ...] = ()
) -> LoadedModel:
    functions = library.functions
    folder = Path(spec.path) if facts is not None else None
    forget_messages()
    handle = functions.llama_model_load_from_file(str(file).encode(), library.model_parameters())
    if not handle:
        raise ModelError(f"{spec.path}: llama.cpp does not load it: {last_message()}")
    vocabulary = functions.llama_vocab_n_tokens(functions.llama_model_get_vocab(handle))
    rows = embedding_rows(folder) if folder is not None else None
    if rows is not None and rows != vocabulary:
        functions.llama_model_free(handle)
        raise ModelError(f"{file}: has {vocabulary} tokens, and the embedding of {folder} has {rows} rows")
    sites = tuple(_sites(folder)) if folder is not None else ()
    model = LlamaModel(library, handle, vocabulary, _digest(file), folder, facts, sites)
    parameters = functions.llama_model_n_params(handle)
    if folder is not None:
        parameters = sum(math.prod(info.shape) for info in tensors(folder).values())
    return LoadedModel(model, spec.device, spec.dtype, parameters, vocabulary, notes)


def _sites(folder: Path) -> Iterator[AdapterSite]:
    """Yield the linear layers of a folder, from the headers of its files."""
    stored = {name.removesuffix(".weight"): info for name, info in tensors(folder).items() if name.endswith(".weight")}
    for name, info in stored.items():
        if len(info.shape) == 2 and not is_embedding(name):
            yield AdapterSite(name, "linear", info.shape[1], info.shape[0])
    table = next((info for name, info in stored.items() if is_embedding(name)), None)
    if table is not None and not any(is_lm_head(name) for name in stored):
        yield AdapterSite("lm_head", "linear", table.shape[1], table.shape[0])


def _digest(file: Path) -> str:
    digest = blake2b(digest_size=16)
    with file.open("rb") as content:
        while block := content.read(2**22):
            digest.update(block)
    return digest.hexdigest()
