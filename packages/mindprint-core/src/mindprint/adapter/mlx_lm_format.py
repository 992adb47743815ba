"""mlx-lm's adapter folder: `adapter_config.json` and `adapters.safetensors`.

Its factors of a linear layer are the transposes of PEFT's, `lora_a` `[in, r]` and `lora_b` `[r, out]`; those of a stack
of experts are not, `[experts, r, in]` and `[experts, out, r]`. One rank, one scale and one dropout hold for all
modules. mlx-lm has no alpha: `scale` is what multiplies the product.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from mindprint.adapter.base_facts import BaseFacts
from mindprint.adapter.module_names import Experts, from_mlx_lm, split_expert, split_stack, to_mlx_lm
from mindprint.adapter.peft_format import CONFIG_FILE, adapter_tensors
from mindprint.adapter.peft_settings import read_config
from mindprint.adapter.targets import in_order
from mindprint.contract import AdapterState, Float32, LoraConfig, LoraFactors
from mindprint.errors import AdapterError
from mindprint.models.layer_names import is_embedding, is_lm_head
from mindprint.models.tensor_files import TensorFileError, TensorInfo, read_float32

WEIGHTS_FILE = "adapters.safetensors"

HEAD = "lm_head"
"""What transformers calls the head of every family whose head can be tied."""

_LAYER = re.compile(r"\D+\.(\d+)\.(.+)")


def read_adapter(folder: Path, base: BaseFacts | None = None) -> tuple[AdapterState, str]:
    """Read an adapter that `mlx_lm.lora` wrote: the adapter, and the base model it names (empty if it names none).

    `base` is needed where names or meaning depend on it: experts, embeddings, and modules that lie outside
    `model.layers`. Raises `AdapterError` naming the file and the fault in it.
    """
    rank, scale, dropout, keys, model = _read_config(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    try:
        pairs = _pairs(adapter_tensors(folder, WEIGHTS_FILE))
        _require_keys(keys, pairs)
        factors = {path: _read_factors(path, pair, rank) for path, pair in pairs.items()}
        return _state(_sites(factors, base), rank, scale, dropout), model
    except (TensorFileError, AdapterError, OSError) as error:
        raise AdapterError(f"{weights}: {error}") from error


def named_base(folder: Path) -> str:
    """Return the name of the base model that an adapter of mlx-lm's states, empty if it states none."""
    return str(read_config(folder / CONFIG_FILE).get("model") or "")


def _read_config(file: Path) -> tuple[int, float, float, tuple[str, ...] | None, str]:
    values = read_config(file)
    kind = values.get("fine_tune_type", "lora")
    if kind != "lora":
        what = {"dora": "DoRA, whose magnitudes have no place in LoRA", "full": "whole weights, no adapter"}
        raise AdapterError(f"{file}: fine_tune_type = {kind!r} is {what.get(kind, 'unknown')}; only lora can be read")
    lora = values.get("lora_parameters")
    if not isinstance(lora, dict):
        raise AdapterError(f"{file}: lora_parameters is missing")
    if "scale" not in lora:
        hint = ": it says alpha, which mlx-lm does not read" if "alpha" in lora else ""
        raise AdapterError(f"{file}: lora_parameters.scale is missing{hint}")
    rank, scale, dropout, keys = lora.get("rank"), lora["scale"], lora.get("dropout", 0.0), lora.get("keys")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"{file}: lora_parameters.rank must be a positive whole number, found {rank!r}")
    for name, value in (("scale", scale), ("dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise AdapterError(f"{file}: lora_parameters.{name} must be a number, found {value!r}")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise AdapterError(f"{file}: lora_parameters.keys must be a list of names, found {keys!r}")
    model = str(values.get("model") or "")
    return rank, float(scale), float(dropout), None if keys is None else tuple(keys), model


def _pairs(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """Return `lora_a` and `lora_b` of every module."""
    for name in tensors:
        if not name.endswith((".lora_a", ".lora_b")):
            raise AdapterError(f"tensor {name} is not part of a LoRA adapter of mlx-lm's")
    modules = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    for module in modules:
        for part in ("lora_a", "lora_b"):
            if f"{module}.{part}" not in tensors:
                raise AdapterError(f"tensor {module}.{part} is missing")
    if not modules:
        raise AdapterError("has no LoRA tensors")
    return {module: (tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]) for module in modules}


def _require_keys(keys: tuple[str, ...] | None, modules: Mapping[str, Any]) -> None:
    """Raise unless tensors and `keys` name each other: mlx-lm fails over the one and ignores the other."""
    if keys is None:
        return
    for module in modules:
        if not any(module == key or module.endswith(f".{key}") for key in keys):
            raise AdapterError(f"has tensors for {module}, which {CONFIG_FILE} does not name in lora_parameters.keys")
    for key in keys:
        if not any(module == key or module.endswith(f".{key}") for module in modules):
            raise AdapterError(f"has no tensors for {key}, which {CONFIG_FILE} names in lora_parameters.keys")


def _read_factors(path: str, infos: tuple[TensorInfo, TensorInfo], rank: int) -> LoraFactors:
    """Return a module's factors in PEFT's layout."""
    a, b = (info.shape for info in infos)
    linear = len(a) == len(b) == 2 and a[1] == b[0] == rank
    stack = len(a) == len(b) == 3 and a[1] == b[2] == rank and a[0] == b[0]
    if not linear and not stack:
        raise AdapterError(
            f"{path}: lora_a is {list(a)} and lora_b {list(b)}, and {CONFIG_FILE} says rank {rank}: they contradict "
            "each other"
        )
    values = [read_float32(info) for info in infos]
    return LoraFactors(*values) if stack else LoraFactors(*(np.ascontiguousarray(part.T) for part in values))


def _sites(factors: Mapping[str, LoraFactors], base: BaseFacts | None) -> dict[str, LoraFactors]:
    """Rename mlx-lm's modules to transformers' sites."""
    if base is None:
        for path in factors:
            # Outside `model.layers` names differ between families, and a stack does not name its parts.
            if ".switch_mlp." in path or not path.startswith("model.layers."):
                raise AdapterError(f"what {path} is depends on the base; name the base with --model")
        return dict(factors)
    experts = base.family.experts
    sites: dict[str, LoraFactors] = {}
    stacks: dict[str, dict[str, LoraFactors]] = {}
    for path, pair in factors.items():
        layer, _, part = path.rpartition(".")
        if experts is not None and layer.endswith(f".{experts.mlx_lm}"):
            host = layer.removesuffix(experts.mlx_lm) + experts.module
            stacks.setdefault(host, {})[part] = pair
        elif pair.a.ndim == 3:
            raise AdapterError(f"{path}: Mindprint does not know the experts of {base.model_type!r}")
        else:
            sites[from_mlx_lm(path, base.family)] = pair
    for host, parts in stacks.items():
        sites |= _stacked(host, parts)
    return sites | _tied_head(sites, base)


def _stacked(host: str, parts: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """Return mlx-lm's three stacks as transformers' two: gate and up share one A, and B has a block for each."""
    found = {}
    if "gate_proj" in parts or "up_proj" in parts:
        found[f"{host}.gate_up_proj"] = _fused(parts.get("gate_proj"), parts.get("up_proj"))
    if "down_proj" in parts:
        found[f"{host}.down_proj"] = parts["down_proj"]
    return found


def _fused(gate: LoraFactors | None, up: LoraFactors | None) -> LoraFactors:
    """Return one adapter that changes gate and up as two do: of their rank if they share A, else of both ranks."""
    # mlx-lm may adapt gate or up alone: the other half of the stack then gets zeros, which change nothing.
    one = gate or up
    assert one is not None
    none = LoraFactors(one.a, np.zeros_like(one.b))
    gate, up = gate or none, up or none
    if np.array_equal(gate.a, up.a):
        return LoraFactors(gate.a, np.concatenate([gate.b, up.b], axis=1))
    # Two factors of unlike A side by side: [[Bg, 0], [0, Bu]] · [Ag; Au] is Bg·Ag over Bu·Au.
    # The rank is the sum of both.
    upper = np.concatenate([gate.b, np.zeros((*gate.b.shape[:2], up.b.shape[2]), np.float32)], axis=2)
    lower = np.concatenate([np.zeros((*up.b.shape[:2], gate.b.shape[2]), np.float32), up.b], axis=2)
    return LoraFactors(np.concatenate([gate.a, up.a], axis=1), np.concatenate([upper, lower], axis=1))


def _tied_head(sites: Mapping[str, LoraFactors], base: BaseFacts) -> dict[str, LoraFactors]:
    """Return the head's factors: mlx-lm's adapter on a tied embedding is on the head too, and PEFT needs a second."""
    tables = [site for site in sites if is_embedding(site)]
    if not tables or _is_tied(base) is False:
        return {}
    return {HEAD: _swapped(sites[tables[0]])}


def _state(sites: Mapping[str, LoraFactors], rank: int, scale: float, dropout: float) -> AdapterState:
    ranks = {site: pair.a.shape[-2] for site, pair in sites.items() if pair.a.shape[-2] != rank}
    targets = in_order(tuple(sites))
    config = LoraConfig(
        r=rank,
        alpha=_alpha(scale, rank),
        target_modules=targets,
        dropout=dropout,
        rank_pattern=ranks,
        alpha_pattern={site: _alpha(scale, found) for site, found in ranks.items()},
    )
    return AdapterState(config, {site: sites[site] for site in targets})


def _alpha(scale: float, rank: int) -> float:
    """Return the alpha that divided by the rank gives the scale again, to the last bit."""
    product = scale * rank
    # (scale · rank) / rank may differ from the scale in its last bit: one of the neighbours divides exactly.
    near = (product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf))
    return next((alpha for alpha in near if alpha / rank == scale), product)


def write_adapter(folder: Path, adapter: AdapterState, base: BaseFacts, base_model: str) -> tuple[str, ...]:
    """Write the two files into an existing folder, for mlx-lm's `load_adapters`. Return notes on changes.

    Ranks that differ are filled up with zeros, which is exact; scales that differ go into B, rounded once to float32.
    Raises `AdapterError` for what mlx-lm's adapters cannot hold.
    """
    if base.tied is False and not base.family.mlx_lm_head:
        raise AdapterError(
            f"mlx-lm's {base.model_type} has no LM head but the embedding, and this base has one "
            "(tie_word_embeddings is false): mlx-lm cannot compute it"
        )
    sites = _one_by_one(_without_tied_head(adapter, base), base.family.experts)
    scales = {site: adapter.config.scale(origin) for site, (origin, _) in sites.items()}
    rank = max(pair.a.shape[-2] for _, pair in sites.values())
    # The most frequent scale leaves the most factors untouched. The others are multiplied, and so rounded once.
    scale = Counter(scales.values()).most_common(1)[0][0]
    modules: dict[str, LoraFactors] = {}
    for site, (_, pair) in sites.items():
        modules |= _modules(site, _filled(_scaled(pair, scales[site] / scale), rank), base)
    (folder / WEIGHTS_FILE).write_bytes(save(_tensors(modules), metadata={"format": "mlx"}))
    layers, keys = _keys(tuple(modules), base)
    lora = {"rank": rank, "scale": scale, "dropout": adapter.config.dropout, "keys": keys}
    config = {"fine_tune_type": "lora", "model": base_model, "num_layers": layers, "lora_parameters": lora}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tuple(_changes({pair.a.shape[-2] for _, pair in sites.values()}, set(scales.values()), rank, scale))


def _without_tied_head(adapter: AdapterState, base: BaseFacts) -> dict[str, LoraFactors]:
    """Return the sites without a tied head that is adapted as its embedding is. Raise if the two differ."""
    sites = dict(adapter.tensors)
    table = next((site for site in sites if is_embedding(site)), None)
    head = next((site for site in sites if is_lm_head(site)), None)
    if (table is None and head is None) or _is_tied(base) is False:
        return sites
    if table is None:
        raise AdapterError(f"{head} is the embedding itself in this base (tied), and mlx-lm has no module for it alone")
    wanted = _swapped(sites[table])
    same = head is not None and adapter.config.scale(head) == adapter.config.scale(table)
    if head is None or not same or not all(map(np.array_equal, sites.pop(head), wanted)):
        raise AdapterError(
            f"{table} is the LM head as well in this base (tied): mlx-lm would change both, and this adapter does not"
        )
    return sites


def _is_tied(base: BaseFacts) -> bool:
    if base.tied is None:
        raise AdapterError(f"whether model_type {base.model_type!r} ties its LM head to the embedding is not known")
    return base.tied


def _swapped(pair: LoraFactors) -> LoraFactors:
    """Return the same change for the transposed weight."""
    return LoraFactors(np.ascontiguousarray(pair.b.T), np.ascontiguousarray(pair.a.T))


def _one_by_one(sites: Mapping[str, LoraFactors], experts: Experts | None) -> dict[str, tuple[str, LoraFactors]]:
    """Return sites, each with its origin. Single experts, as transformers 4 had them, become stacks."""
    result: dict[str, tuple[str, LoraFactors]] = {}
    single: dict[tuple[str, str], dict[int, str]] = {}
    for site, pair in sites.items():
        expert = split_expert(site, experts) if experts else None
        if expert is None:
            result[site] = site, pair
        else:
            layer, number, part = expert
            single.setdefault((layer, part), {})[number] = site
    for (layer, part), numbered in single.items():
        assert experts is not None
        result[f"{layer}.{experts.module}.{experts.parts[part]}"] = _put_together(numbered, sites)
    return result


def _put_together(numbered: Mapping[int, str], sites: Mapping[str, LoraFactors]) -> tuple[str, LoraFactors]:
    pairs = [sites[numbered[number]] for number in sorted(numbered)]
    first = numbered[min(numbered)]
    # mlx-lm stacks all experts into one tensor of one rank: a gap or another shape has no place in it.
    if sorted(numbered) != list(range(len(numbered))) or len({(p.a.shape, p.b.shape) for p in pairs}) > 1:
        raise AdapterError(f"{first}: mlx-lm has one adapter for all experts, and here they differ or some have none")
    return first, LoraFactors(np.stack([pair.a for pair in pairs]), np.stack([pair.b for pair in pairs]))


def _scaled(pair: LoraFactors, factor: float) -> LoraFactors:
    return pair if factor == 1.0 else LoraFactors(pair.a, (pair.b * factor).astype(np.float32))


def _filled(pair: LoraFactors, rank: int) -> LoraFactors:
    """Return the same change under a greater rank: zeros behind A's rows and B's columns."""
    missing = rank - pair.a.shape[-2]
    if not missing:
        return pair
    before = [(0, 0)] * (pair.a.ndim - 2)
    return LoraFactors(np.pad(pair.a, [*before, (0, missing), (0, 0)]), np.pad(pair.b, [*before, (0, 0), (0, missing)]))


def _modules(site: str, pair: LoraFactors, base: BaseFacts) -> dict[str, LoraFactors]:
    """Return the modules of mlx-lm's model that a site is."""
    if pair.a.ndim == 2:
        return {to_mlx_lm(site, base.family): pair}
    experts = base.family.experts
    split = split_stack(site, experts) if experts else None
    if experts is None or split is None:
        raise AdapterError(f"{site}: how mlx-lm keeps the experts of {base.model_type!r} is not known")
    layer, parameter = split
    host = f"{layer}.{experts.mlx_lm}"
    if parameter != "gate_up_proj":
        return {f"{host}.{parameter}": pair}
    # Both halves share A: transformers multiplies gate and up in one product, gate before up.
    gate, up = np.split(pair.b, 2, axis=1)
    return {f"{host}.gate_proj": LoraFactors(pair.a, gate), f"{host}.up_proj": LoraFactors(pair.a, up)}


def _tensors(modules: Mapping[str, LoraFactors]) -> dict[str, Float32]:
    flat = {}
    for path, pair in modules.items():
        for letter, values in zip("ab", pair, strict=True):
            # mlx-lm computes x @ lora_a @ lora_b for a linear layer, so its factors are the transposes of PEFT's.
            flat[f"{path}.lora_{letter}"] = np.ascontiguousarray(values if values.ndim == 3 else values.T)
    return flat


def _keys(modules: Sequence[str], base: BaseFacts) -> tuple[int, list[str]]:
    """Return `num_layers` and `keys`: short names if the last layers are adapted alike, else every name in full."""
    if base.layers is None:
        raise AdapterError("the base's config.json does not say how many layers there are (num_hidden_layers)")
    inside: dict[int, set[str]] = {}
    outside = []
    for path in modules:
        found = _LAYER.fullmatch(path)
        if found is None:
            outside.append(path)
        else:
            inside.setdefault(int(found[1]), set()).add(found[2])
    # mlx-lm counts `num_layers` from the end and adapts the same keys in each: any other choice needs full names.
    alike = all(keys == inside[max(inside)] for keys in inside.values())
    if inside and alike and sorted(inside) == list(range(base.layers - len(inside), base.layers)):
        return len(inside), sorted(inside[base.layers - 1]) + outside
    return base.layers, list(modules)


def _changes(ranks: set[int], scales: set[float], rank: int, scale: float) -> Iterator[str]:
    if len(ranks) > 1:
        yield f"mlx-lm has one rank for all modules: smaller ones are filled up with zeros to {rank}, which is exact"
    if len(scales) > 1:
        yield (
            f"mlx-lm has one scale for all modules: it is {scale:g}, and what others have more or less is in their B, "
            "rounded once to float32"
        )
