"""Adapters: written as GGUF by core, and loaded by llama.cpp."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mindprint.adapter.gguf_format import ADAPTER_FILE, write_adapter
from mindprint.contract import AdapterFacts, AdapterState
from mindprint.errors import AdapterError
from mindprint_llamacpp.library import forget_messages, last_message
from mindprint_llamacpp.model import LlamaModel


def inject(model: LlamaModel, adapter: AdapterState) -> AdapterFacts:
    """Attach an adapter to a model that has none.

    Raises:
        AdapterError: It does not fit the base, or llama.cpp has no place for it. The model is as it was.
    """
    if model.adapter is not None:
        raise AdapterError("the model has an adapter already")
    if model.folder is None or model.facts is None:
        raise AdapterError("a GGUF file does not say which modules of transformers it holds: load the base's folder")
    _require_fitting(model, adapter)
    with tempfile.TemporaryDirectory(prefix="mindprint-llamacpp-") as scratch:
        write_adapter(Path(scratch), adapter, model.facts, model.folder, model.folder.name)
        forget_messages()
        file = str(Path(scratch) / ADAPTER_FILE).encode()
        factors = model.library.functions.llama_adapter_lora_init(model.model, file)
    if not factors:
        raise AdapterError(f"llama.cpp does not take the adapter: {last_message()}")
    model.adapter, model.factors = adapter, factors
    return AdapterFacts(tuple(adapter.tensors), adapter.elements)


def _require_fitting(model: LlamaModel, adapter: AdapterState) -> None:
    if set(adapter.tensors) != set(adapter.config.target_modules):
        raise AdapterError("the adapter's tensors are not those of its target modules")
    shapes = {site.name: (site.out_features, site.in_features) for site in model.sites}
    for site, (a, b) in adapter.tensors.items():
        if site not in shapes:
            raise AdapterError(f"{site}: the base has no such linear layer")
        rank = adapter.config.rank(site)
        if (a.shape, b.shape) != ((rank, shapes[site][1]), (shapes[site][0], rank)):
            raise AdapterError(f"{site}: the adapter is for a layer of another shape than {list(shapes[site])}")
    # A trained adapter states the dropout of its training, which has no part in evaluation.
