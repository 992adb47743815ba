"""Which tensors of a base's files an adapter changes, and by what: from sites to stored weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from mindprint.adapter.base_facts import BaseFacts
from mindprint.adapter.module_names import file_names, split_stack
from mindprint.adapter.targets import LM_HEADS, is_embedding, is_stack
from mindprint.contract import AdapterState, Float32, LoraFactors
from mindprint.errors import AdapterError
from mindprint.models.tensor_files import TensorInfo

HALVES = "gate_up_proj"
"""The stacked parameter that files keep as two, gate before up."""


@dataclass(frozen=True)
class WeightChange:
    """What is added to one stored tensor: `scale · b @ a`, in the layout of the tensor.

    `a` is `[r, columns]` and `b` `[rows, r]`, or of a stored stack `[experts, ...]` each.
    """

    site: str
    factors: LoraFactors
    scale: float


def weight_changes(
    adapter: AdapterState, tensors: Mapping[str, TensorInfo], base: BaseFacts
) -> dict[str, WeightChange]:
    """By tensor name, what `adapter` changes in a base with these `tensors`.

    Raises `AdapterError` naming the site that the base has no weight for, whose shape does not fit, or that cannot be
    changed without changing something else.
    """
    found: dict[str, WeightChange] = {}
    for site, pair in adapter.tensors.items():
        if not all(np.isfinite(part).all() for part in pair):
            raise AdapterError(f"{site}: the adapter holds values that are NaN or infinite; it cannot be merged")
        for name, factors in _placed(site, pair, tensors, base):
            change = WeightChange(site, factors, adapter.config.scale(site))
            if name in found and not _same(found[name], change):
                raise AdapterError(f"{name} is changed by {found[name].site} and {site}, differently: {_UNTIE}")
            _require_shape(name, tensors[name], change)
            found[name] = change
    _refuse_half_tied(adapter, tensors, base)
    return found


_UNTIE = (
    "embedding and LM head are one tensor in this base (tied), and merging would change both; save the base untied "
    "first (transformers: load it, set config.tie_word_embeddings = False, give the head a copy of the weight, save it)"
)


def _placed(
    site: str, pair: LoraFactors, tensors: Mapping[str, TensorInfo], base: BaseFacts
) -> Iterator[tuple[str, LoraFactors]]:
    if pair.a.ndim == 3:
        yield from _placed_stack(site, pair, tensors, base)
        return
    name = next((name for name in file_names(site, base.family) if name in tensors), None)
    if name is None and base.tied and site.rpartition(".")[2] in LM_HEADS:
        name = next((name for name in tensors if is_embedding(name.removesuffix(".weight"))), None)
    if name is None:
        raise AdapterError(f"{site}: the base has no weight {file_names(site, base.family)[0]}; is it another base?")
    table = is_embedding(site)
    flipped = table or (base.family.transposed and site.rpartition(".")[2] not in LM_HEADS)
    yield name, LoraFactors(pair.b.T, pair.a.T) if flipped else pair


def _placed_stack(
    site: str, pair: LoraFactors, tensors: Mapping[str, TensorInfo], base: BaseFacts
) -> Iterator[tuple[str, LoraFactors]]:
    """A stack of experts as the files have it: as the same stack, or each expert for itself, gate and up apart."""
    if site in tensors:
        yield site, _oriented(site, pair, tensors[site])
        return
    experts = base.family.experts
    split = split_stack(site, experts) if experts else None
    if experts is None or split is None:
        raise AdapterError(f"{site}: how the files of model_type {base.model_type!r} keep their experts is not known")
    layer, parameter = split
    parts = {"down_proj": (experts.down,), "gate_proj": (experts.gate,), "up_proj": (experts.up,)}
    names = (experts.gate, experts.up) if parameter == HALVES else parts[parameter]
    for number, (a, b) in enumerate(zip(*pair, strict=True)):
        for part, rows in zip(names, np.split(b, len(names)), strict=True):
            name = f"{layer}.{experts.file}.{number}.{part}.weight"
            if name not in tensors:
                raise AdapterError(f"{site}: the base has no weight {name}; is it another base?")
            yield name, LoraFactors(a, rows)
    if f"{layer}.{experts.file}.{len(pair.a)}.{names[0]}.weight" in tensors:
        raise AdapterError(f"{site}: the adapter has {len(pair.a)} experts, the base has more; is it another base?")


def _oriented(site: str, pair: LoraFactors, info: TensorInfo) -> LoraFactors:
    """Some families store a stack as `[experts, in, out]`; where the shape cannot tell, nothing does."""
    experts, columns, rows = len(pair.a), pair.a.shape[2], pair.b.shape[1]
    if rows == columns:
        raise AdapterError(f"{site}: is square, and whether the file keeps it transposed is not known; not merged")
    if info.shape == (experts, columns, rows):
        return LoraFactors(pair.b.transpose(0, 2, 1), pair.a.transpose(0, 2, 1))
    return pair


def _require_shape(name: str, info: TensorInfo, change: WeightChange) -> None:
    a, b = change.factors
    shape = (*b.shape[:-1], a.shape[-1])
    if info.shape != shape:
        raise AdapterError(
            f"{change.site}: the adapter is for a weight {list(shape)}, {name} of the base is {list(info.shape)}; "
            "is it another base?"
        )


def _same(first: WeightChange, second: WeightChange) -> bool:
    """Whether two changes are one: of a tied embedding by way of both its names, as mlx-lm's adapters make it."""
    return first.scale == second.scale and all(map(np.array_equal, first.factors, second.factors))


def _refuse_half_tied(adapter: AdapterState, tensors: Mapping[str, TensorInfo], base: BaseFacts) -> None:
    """A change of the embedding alone, or of the head alone, where they are one tensor.

    PEFT computes with one of them changed, and merges into both.
    """
    sides = [site for site in adapter.tensors if is_embedding(site) or site.rpartition(".")[2] in LM_HEADS]
    head = any(name.removesuffix(".weight").rpartition(".")[2] in LM_HEADS for name in tensors)
    if len(sides) == 1 and (base.tied or (base.tied is None and not head)):
        raise AdapterError(f"{sides[0]}: {_UNTIE}")


@dataclass(frozen=True)
class Weight:
    """A weight in a model's files: a tensor, or one expert's part of one."""

    tensor: str
    expert: int | None = None

    def of(self, info: TensorInfo) -> TensorInfo:
        """Where the weight lies, as a matrix."""
        if self.expert is None:
            return info
        size = (info.end - info.start) // info.shape[0]
        start = info.start + self.expert * size
        return info._replace(shape=info.shape[1:], start=start, end=start + size)

    def __str__(self) -> str:
        return self.tensor if self.expert is None else f"{self.tensor}[{self.expert}]"


def stored_factors(
    adapter: AdapterState, base: BaseFacts, tensors: AbstractSet[str]
) -> Iterator[tuple[str, Weight, LoraFactors]]:
    """For every site the weights that it is in a base's files, and factors whose B · A has each one's shape.

    Tables of embeddings (`[vocabulary, out]`) and the linear layers of some families lie transposed; a stack of experts
    is one tensor, or one for each expert and part.
    """
    for site, (a, b) in adapter.tensors.items():
        if is_stack(site):
            yield from ((site, *part) for part in _experts(site, LoraFactors(a, b), base, tensors))
            continue
        name = next((name for name in file_names(site, base.family) if name in tensors), None)
        if name is not None:
            turned = is_embedding(site) or base.family.transposed
            yield site, Weight(name), LoraFactors(b.T, a.T) if turned else LoraFactors(a, b)


def _experts(
    site: str, factors: LoraFactors, base: BaseFacts, tensors: AbstractSet[str]
) -> Iterator[tuple[Weight, LoraFactors]]:
    for expert, (a, b) in enumerate(zip(*factors, strict=True)):
        if site in tensors:
            yield Weight(site, expert), LoraFactors(a, b)
            continue
        for name, rows in _parts(site, expert, b, base):
            if name in tensors:
                yield Weight(name), LoraFactors(a, rows)


def _parts(site: str, expert: int, b: Float32, base: BaseFacts) -> Iterator[tuple[str, Float32]]:
    """The tensors of one expert, and the rows of its B for each: gate and up are one in transformers, gate first."""
    experts = base.family.experts
    place = split_stack(site, experts) if experts is not None else None
    if experts is None or place is None:
        return
    layer, parameter = place
    inner = len(b) // 2
    parts = {
        "gate_up_proj": ((experts.gate, b[:inner]), (experts.up, b[inner:])),
        "gate_proj": ((experts.gate, b),),
        "up_proj": ((experts.up, b),),
        "down_proj": ((experts.down, b),),
    }
    for part, rows in parts[parameter]:
        yield f"{layer}.{experts.file}.{expert}.{part}.weight", rows
