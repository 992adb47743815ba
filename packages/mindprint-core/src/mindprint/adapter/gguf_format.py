"""An adapter for llama.cpp and Ollama: `adapter.gguf`, and a `Modelfile` for Ollama.

llama.cpp keeps a LoRA adapter as `{weight}.lora_a` `[r, in]` and `{weight}.lora_b` `[out, r]`, both float32, under the
names of its own weights (`blk.0.attn_q.weight`). It has one alpha for the whole file and divides it by the rank that it
finds in each B. Everything else that a scale can be is multiplied into B here, which rounds B once.

The layout of B follows the layout that llama.cpp's converter gives to the base's weight: `Layout` says which.
`nox -s gguf` holds the files against those of llama.cpp's own converter, and against its log-probs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindprint.adapter.base_facts import BaseFacts
from mindprint.adapter.gguf_files import gguf_package, read_gguf
from mindprint.adapter.targets import is_stack
from mindprint.contract import AdapterState, Float32, LoraConfig, LoraFactors
from mindprint.errors import AdapterError
from mindprint.models.folder import model_config, tensors
from mindprint.models.layer_names import is_embedding, is_lm_head

ADAPTER_FILE = "adapter.gguf"
MODELFILE = "Modelfile"

BASE_FILE = "base.gguf"
"""The base model's file, as the Modelfile calls it: Mindprint does not know where a person keeps it."""


Heads = Mapping[str, int]
"""Numbers of heads by the name of their projection: `q_proj` and `k_proj`."""

Layout = Callable[[str, Float32, Heads], Float32]
"""A function from a site, its B `[out, r]` and the numbers of heads to B with the rows in llama.cpp's order."""


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp: its name in the file, and the order that its converter gives to a weight's rows."""

    name: str
    layout: Layout | None = None


def interleaved(site: str, b: Float32, heads: Heads) -> Float32:
    """Return the rows of q and k in the order that llama.cpp's rotation of neighbouring rows needs.

    transformers rotates row i of a head together with row i + d/2, llama.cpp's `llama` architecture row 2i together
    with row 2i + 1. Its converter reorders the weights of q and k, so B's rows follow.
    """
    count = heads.get(site.rpartition(".")[2])
    if count is None:
        return b
    rows, rank = b.shape
    return b.reshape(count, 2, rows // count // 2, rank).swapaxes(1, 2).reshape(rows, rank)


def parts_after_heads(site: str, b: Float32, heads: Heads) -> Float32:
    """Return the rows of GPT-NeoX's fused projection as all of q, then all of k, then all of v.

    transformers keeps q, k and v of one head together.
    """
    if not site.endswith(".query_key_value"):
        return b
    rows, rank = b.shape
    count = heads["q_proj"]
    return b.reshape(count, 3, rows // count // 3, rank).swapaxes(0, 1).reshape(rows, rank)


ARCHITECTURES: Mapping[str, Architecture] = {
    **dict.fromkeys(("llama", "mistral", "mixtral"), Architecture("llama", interleaved)),
    "granite": Architecture("granite", interleaved),
    "smollm3": Architecture("smollm3", interleaved),
    "gpt_neox": Architecture("gptneox", parts_after_heads),
    "apertus": Architecture("apertus"),
    "cohere": Architecture("command-r"),
    "ernie4_5": Architecture("ernie4_5"),
    "exaone4": Architecture("exaone4"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
    "glm4": Architecture("glm4"),
    "gpt2": Architecture("gpt2"),
    "hunyuan_v1_dense": Architecture("hunyuan-dense"),
    "nemotron": Architecture("nemotron"),
    "olmo2": Architecture("olmo2"),
    "olmoe": Architecture("olmoe"),
    "phi": Architecture("phi2"),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "seed_oss": Architecture("seed_oss"),
    "stablelm": Architecture("stablelm"),
    "starcoder2": Architecture("starcoder2"),
}
"""The families whose files were compared with those of llama.cpp's converter, by transformers' `model_type`."""


def write_adapter(
    folder: Path, adapter: AdapterState, base: BaseFacts, base_folder: Path, base_name: str
) -> tuple[str, ...]:
    """Write `adapter.gguf` and `Modelfile` into an existing folder. Return notes for a person.

    `base_folder` is read for its config.json only. Raises `AdapterError` naming what llama.cpp cannot hold: a family
    that it does not have, stacked experts, a tied LM head, or the package `gguf` where it is missing.
    """
    gguf = gguf_package("writing GGUF")
    architecture = architecture_of(base, "merge the adapter (mindprint merge)")
    _refuse_tied(adapter, base)
    names = _weight_names(architecture, adapter, base)
    heads = heads_of(base_folder) if architecture.layout else {}
    alpha = _file_alpha(adapter)
    writer = gguf.GGUFWriter(folder / ADAPTER_FILE, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    multiplied = []
    for site, pair in adapter.tensors.items():
        # llama.cpp multiplies by alpha / r in float32, with the file's one alpha.
        factor = adapter.config.scale(site) / (alpha / pair.a.shape[0])
        multiplied += [site] if factor != 1.0 else []
        a, b = _laid_out(site, pair, factor, architecture, heads)
        writer.add_tensor(f"{names[site]}.lora_a", a)
        writer.add_tensor(f"{names[site]}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / MODELFILE).write_text(_modelfile(base_name), encoding="utf-8")
    return tuple(_notes(multiplied, alpha, base_name))


def read_adapter(file: Path, base: BaseFacts, base_folder: Path) -> AdapterState:
    """Read an adapter file of llama.cpp's back, under transformers' names and in its order of rows.

    Raises:
        AdapterError: It is not an adapter for this base, or holds something that is not LoRA on linear layers.
    """
    opened = read_gguf(file)
    architecture = architecture_of(base, "name the adapter's own folder")
    if opened.architecture != architecture.name or opened.key("adapter.type") != "lora":
        raise AdapterError(f"{file}: is not a LoRA adapter for the architecture {architecture.name!r}")
    names = name_map(architecture, base)
    heads = heads_of(base_folder) if architecture.layout else {}
    weights = {
        names.get_name(tensor, try_suffixes=(".weight",)): tensor.removesuffix(".weight")
        for tensor in tensors(base_folder)
        if tensor.endswith(".weight")
    }
    factors = {}
    for name, tensor in opened.tensors.items():
        weight, _, part = name.rpartition(".lora_")
        other = opened.tensors.get(f"{weight}.lora_{'b' if part == 'a' else 'a'}")
        if part not in ("a", "b") or other is None or weight not in weights or is_embedding(weights[weight]):
            raise AdapterError(f"{file}: {name} is not a LoRA factor of a linear layer of this base")
        if part == "b":
            continue
        site, b = weights[weight], other.values()
        # The layout of the rows' own numbers says where each row of B is in the file.
        if architecture.layout is not None:
            places = architecture.layout(site, np.arange(len(b), dtype=np.float32)[:, None], heads)[:, 0]
            b = b[np.argsort(places)]
        factors[site] = LoraFactors(np.array(tensor.values(), np.float32), np.array(b, np.float32))
    ranks = {site: len(pair.a) for site, pair in factors.items()}
    rank = max(ranks.values(), default=1)
    pattern = {site: own for site, own in ranks.items() if own != rank}
    alpha = float(opened.key("adapter.lora.alpha") or 0.0)
    return AdapterState(LoraConfig(rank, alpha, tuple(factors), rank_pattern=pattern), factors)


def architecture_of(base: BaseFacts, remedy: str) -> Architecture:
    """Return the architecture of a base. Raises `AdapterError` with a remedy for a family that was not compared."""
    known = ARCHITECTURES.get(base.model_type)
    if known is None:
        raise AdapterError(
            f"model_type {base.model_type!r} cannot be written as GGUF: the names and the order of rows of this "
            f"family's weights in llama.cpp were not compared; {remedy} and convert the merged model with llama.cpp's "
            "convert_hf_to_gguf.py, if that knows the family"
        )
    return known


def name_map(architecture: Architecture, base: BaseFacts) -> Any:
    """Return the package's map from transformers' names to llama.cpp's. Raises `AdapterError` without a layer count."""
    gguf = gguf_package("writing GGUF")
    if base.layers is None:
        raise AdapterError("the base's config.json does not say how many layers there are (num_hidden_layers)")
    number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    return gguf.get_tensor_name_map(number, base.layers)


def _refuse_tied(adapter: AdapterState, base: BaseFacts) -> None:
    """Refuse embedding and LM head where they are one tensor: llama.cpp looks adapters up by the tensor's name."""
    for site in adapter.tensors:
        if (is_embedding(site) or is_lm_head(site)) and base.tied is not False:
            raise AdapterError(
                f"{site}: embedding and LM head are one tensor in this base (tied), and llama.cpp has one adapter for "
                "both; merge the adapter instead (mindprint merge)"
            )


def _weight_names(architecture: Architecture, adapter: AdapterState, base: BaseFacts) -> dict[str, str]:
    """Return the name in llama.cpp of the weight of each site."""
    known = name_map(architecture, base)
    names = {}
    for site in adapter.tensors:
        if is_stack(site):
            raise AdapterError(f"{site}: an adapter on stacked experts cannot be written as GGUF; merge it instead")
        name = known.get_name(site)
        if name is None:
            raise AdapterError(
                f"{site}: llama.cpp's architecture {architecture.name!r} has no such part; is it an adapter for "
                "another base?"
            )
        names[site] = f"{name}.weight"
    return names


def heads_of(folder: Path) -> Heads:
    """Return the numbers of heads that config.json states. Raises `AdapterError` where they are no numbers."""
    config = model_config(folder)
    queries = config.get("num_attention_heads")
    keys = config.get("num_key_value_heads", queries)
    if not isinstance(queries, int) or not isinstance(keys, int) or queries < 1 or keys < 1:
        raise AdapterError(f"{folder / 'config.json'}: num_attention_heads must be a positive whole number")
    return {"q_proj": queries, "k_proj": keys}


def _file_alpha(adapter: AdapterState) -> float:
    """Return the alpha of the whole file: that of the settings, as far as float32 can hold it.

    llama.cpp reads an alpha of 0 as "no scale", so that a file of alpha 0 would multiply by 1.
    """
    alpha = float(np.float32(adapter.config.alpha))
    return alpha if alpha and np.isfinite(alpha) else float(adapter.config.r)


def _laid_out(
    site: str, pair: LoraFactors, factor: float, architecture: Architecture, heads: Heads
) -> tuple[Float32, Float32]:
    a, b = pair
    if factor != 1.0:
        b = (b * factor).astype(np.float32)
    if architecture.layout is not None and not is_embedding(site):
        rows = len(b)
        try:
            b = architecture.layout(site, b, heads)
        except ValueError as error:
            unequal = f"{site}: has {rows} rows, which config.json's numbers of heads do not divide"
            raise AdapterError(unequal) from error
    if is_embedding(site):
        # llama.cpp looks rows of A up by token, so it keeps A as [tokens, r].
        a = a.T
    return np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)


def _modelfile(base_name: str) -> str:
    return (
        f"# Written by Mindprint for the base model {base_name}.\n"
        f"# FROM names the same base: its GGUF file (best in F16 or Q8_0), or a model that Ollama has.\n"
        f"FROM ./{BASE_FILE}\n"
        f"ADAPTER ./{ADAPTER_FILE}\n"
    )


def _notes(multiplied: list[str], alpha: float, base_name: str) -> Iterator[str]:
    if multiplied:
        yield (
            f"llama.cpp has one alpha for all modules: it is {alpha:g}, and the rest of the scale of "
            f"{len(multiplied)} modules is in their B, rounded once to float32"
        )
    yield (
        f"put the GGUF file of {base_name} next to {ADAPTER_FILE} as {BASE_FILE}, or name it in {MODELFILE}; then: "
        f"llama-cli -m {BASE_FILE} --lora {ADAPTER_FILE}, or ollama create my-voice"
    )
