"""The one mapping from a LoRA site to the tensors of a base's files: merging, verification and conversion all use it.

A site has transformers' name for a module and PEFT's layout of factors, `A [r, in]` and `B [out, r]`. A file may have
another name for the module, keep its weight as `[in, out]`, keep a stack of experts as one tensor or as three for each
expert, or have no tensor for an LM head that is the embedding. All of that is decided here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mindprint.adapter.base_facts import BaseFacts
from mindprint.adapter.module_names import file_names, split_stack
from mindprint.contract import AdapterState, LoraFactors
from mindprint.errors import AdapterError
from mindprint.models.layer_names import is_embedding, is_lm_head
from mindprint.models.quantized import QuantizedWeight, StoredTensor

HALVES = "gate_up_proj"
"""The stacked parameter that files keep as two, gate before up."""

_UNTIE = (
    "embedding and LM head are one tensor in this base (tied), and merging would change both; save the base untied "
    "first (transformers: load it, set config.tie_word_embeddings = False, give the head a copy of the weight, save it)"
)


class NotStoredError(AdapterError):
    """An adapted module whose weight a base's files do not have under any name that is known."""


@dataclass(frozen=True)
class StoredWeight:
    """A matrix in a model's files: a whole tensor, or the part of one that belongs to one expert."""

    tensor: str
    expert: int | None = None

    def locate(self, info: StoredTensor) -> StoredTensor:
        """Return where the matrix is in the file of its tensor `info`."""
        if self.expert is None:
            return info
        if isinstance(info, QuantizedWeight):
            return info.expert(self.expert)
        size = (info.end - info.start) // info.shape[0]
        start = info.start + self.expert * size
        return info._replace(shape=info.shape[1:], start=start, end=start + size)

    def __str__(self) -> str:
        return self.tensor if self.expert is None else f"{self.tensor}[{self.expert}]"


@dataclass(frozen=True)
class WeightChange:
    """A sum `scale · B @ A` that an adapter adds to one stored matrix, with factors in the layout of that matrix."""

    site: str
    weight: StoredWeight
    factors: LoraFactors
    scale: float


def weight_changes(
    adapter: AdapterState, tensors: Mapping[str, StoredTensor], base: BaseFacts
) -> dict[str, tuple[WeightChange, ...]]:
    """Return, by tensor name, the changes to write when `adapter` is merged into a base with these `tensors`.

    Raises:
        AdapterError: A site has no weight in the base (`NotStoredError`), a shape does not fit, a value is not finite,
            or a weight cannot be changed without changing something else.
    """
    changes: dict[StoredWeight, WeightChange] = {}
    for site, pair in adapter.tensors.items():
        if not all(np.isfinite(part).all() for part in pair):
            raise AdapterError(f"{site}: the adapter holds values that are NaN or infinite; it cannot be merged")
        for change in site_changes(adapter, site, tensors, base):
            other = changes.setdefault(change.weight, change)
            if not _is_same_change(other, change):
                raise AdapterError(f"{change.weight} is changed by {other.site} and {site}, differently: {_UNTIE}")
    _refuse_half_tied(adapter, tensors, base)
    by_tensor: dict[str, list[WeightChange]] = {}
    for weight, change in changes.items():
        by_tensor.setdefault(weight.tensor, []).append(change)
    return {name: tuple(parts) for name, parts in by_tensor.items()}


def site_changes(
    adapter: AdapterState, site: str, tensors: Mapping[str, StoredTensor], base: BaseFacts
) -> tuple[WeightChange, ...]:
    """Return what `adapter` changes at one site, matrix by matrix of a base with these `tensors`.

    Raises:
        NotStoredError: The files have no weight of the site's.
        AdapterError: The adapter's shapes are not those of the weight.
    """
    pair, scale = adapter.tensors[site], adapter.config.scale(site)
    placed = _placed_stack(site, pair, tensors, base) if pair.a.ndim == 3 else _placed(site, pair, tensors, base)
    changes = tuple(WeightChange(site, weight, factors, scale) for weight, factors in placed)
    for change in changes:
        _require_shape(change, tensors[change.weight.tensor])
    return changes


def stored_tensors(site: str, tensors: Collection[str], base: BaseFacts) -> tuple[str, ...]:
    """Return the names of the tensors that hold a module's weight, none if the files have it under no known name.

    A tied base has one tensor for embedding and LM head. Some of them store it twice, and transformers ties the two
    after reading only if they are equal: whoever changes one has to change the other.
    """
    own = next((name for name in file_names(site, base.family) if name in tensors), None)
    if not base.tied or not (is_embedding(site) or is_lm_head(site)):
        return () if own is None else (own,)
    tables = [name for name in tensors if is_embedding(_module_of(name))]
    table = own if own is not None and is_embedding(site) else next(iter(tables), None)
    heads = [name for name in tensors if _is_stored_head(name)]
    return tuple(name for name in (table, *heads) if name is not None)


def _placed(
    site: str, pair: LoraFactors, tensors: Mapping[str, StoredTensor], base: BaseFacts
) -> Iterator[tuple[StoredWeight, LoraFactors]]:
    names = stored_tensors(site, tensors, base)
    if not names:
        raise NotStoredError(f"{site}: the base has no weight {file_names(site, base.family)[0]}; is it another base?")
    # An embedding maps tokens to vectors and is stored [tokens, width], as [in, out]. The head is a linear layer
    # that transformers keeps as [out, in] even in the families whose other linear layers are Conv1D, [in, out].
    flipped = is_embedding(site) or (base.transposed_linears and not is_lm_head(site))
    for name in names:
        weight = tensors[name]
        # bitsandbytes turns the weights of Conv1D into those of linear layers, and the files do not say that.
        if flipped and isinstance(weight, QuantizedWeight) and weight.scheme.method in ("nf4", "fp4", "int8"):
            raise NotStoredError(f"{site}: bitsandbytes keeps the weights of {base.model_type} transposed; not merged")
        yield StoredWeight(name), _transposed(pair) if flipped else pair


def _placed_stack(
    site: str, pair: LoraFactors, tensors: Mapping[str, StoredTensor], base: BaseFacts
) -> Iterator[tuple[StoredWeight, LoraFactors]]:
    """Yield each expert's matrices: parts of the same stack, or a tensor for each expert with gate and up apart."""
    if site in tensors:
        flipped = _is_transposed_stack(site, pair, tensors[site], base)
        for expert, (a, b) in enumerate(zip(*pair, strict=True)):
            factors = LoraFactors(a, b)
            yield StoredWeight(site, expert), _transposed(factors) if flipped else factors
        return
    experts = base.family.experts
    split = split_stack(site, experts) if experts else None
    if experts is None or split is None:
        raise NotStoredError(f"{site}: how the files of model_type {base.model_type!r} keep their experts is not known")
    layer, parameter = split
    parts = {"down_proj": (experts.down,), "gate_proj": (experts.gate,), "up_proj": (experts.up,)}
    names = (experts.gate, experts.up) if parameter == HALVES else parts[parameter]
    for expert, (a, b) in enumerate(zip(*pair, strict=True)):
        for part, rows in zip(names, np.split(b, len(names)), strict=True):
            name = f"{layer}.{experts.file}.{expert}.{part}.weight"
            if name not in tensors:
                raise NotStoredError(f"{site}: the base has no weight {name}; is it another base?")
            yield StoredWeight(name), LoraFactors(a, rows)
    if f"{layer}.{experts.file}.{len(pair.a)}.{names[0]}.weight" in tensors:
        raise AdapterError(f"{site}: the adapter has {len(pair.a)} experts, the base has more; is it another base?")


def _is_transposed_stack(site: str, pair: LoraFactors, info: StoredTensor, base: BaseFacts) -> bool:
    """Return whether the files keep a stack as `[experts, in, out]`: its shape tells, or for a square one the family.

    Raises `AdapterError` where neither does.
    """
    count, columns, rows = len(pair.a), pair.a.shape[2], pair.b.shape[1]
    if len(info.shape) == 3 and info.shape[0] != count:
        raise AdapterError(
            f"{site}: the adapter has {count} experts, the base has {info.shape[0]}; is it another base?"
        )
    if rows != columns:
        return info.shape == (count, columns, rows)
    if base.transposed_stacks or base.family.experts is not None:
        return base.transposed_stacks
    raise NotStoredError(f"{site}: is square, and whether the file keeps it transposed is not known; not merged")


def _require_shape(change: WeightChange, info: StoredTensor) -> None:
    a, b = change.factors
    shape = len(b), a.shape[1]
    stored = change.weight.locate(info).shape
    if stored != shape:
        raise AdapterError(
            f"{change.site}: the adapter is for a weight {list(shape)}, {change.weight} of the base is {list(stored)}; "
            "is it another base?"
        )


def _is_same_change(first: WeightChange, second: WeightChange) -> bool:
    """Return whether two changes are one: of a tied embedding under both its names, as mlx-lm's adapters make it."""
    return first.scale == second.scale and all(map(np.array_equal, first.factors, second.factors))


def _refuse_half_tied(adapter: AdapterState, tensors: Collection[str], base: BaseFacts) -> None:
    """Raise if only the embedding or only the head is adapted, and they are one tensor.

    PEFT computes with one of them changed, and merges into both.
    """
    sides = [site for site in adapter.tensors if is_embedding(site) or is_lm_head(site)]
    has_head = any(_is_stored_head(name) for name in tensors)
    if len(sides) == 1 and (base.tied or (base.tied is None and not has_head)):
        raise AdapterError(f"{sides[0]}: {_UNTIE}")


def _is_stored_head(tensor: str) -> bool:
    # A head is at the top of a model. Deeper inside, `output` is the name of a layer's linear (BERT's, for one).
    return is_lm_head(_module_of(tensor)) and tensor.count(".") <= 2


def _module_of(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _transposed(pair: LoraFactors) -> LoraFactors:
    """Return factors whose product is the transpose: (B·A)ᵀ = Aᵀ·Bᵀ."""
    return LoraFactors(pair.b.T, pair.a.T)
