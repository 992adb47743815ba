"""Merging an adapter into a GGUF file: the base's own file, or one that is written from the base's folder.

In the base's own file every key and every other tensor stays as it is. An adapted weight becomes `W + scale · B @ A`,
summed in float32 and rounded once to its type. Rounding to few bits can drown a small change, because most weights
return to the value that they had. That is measured while the file is written, and a file that lost the change is
refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from mindprint import atomic
from mindprint._version import __version__
from mindprint.adapter.base_facts import BaseFacts, read_base_facts
from mindprint.adapter.gguf_files import (
    FileType,
    GgufFile,
    GgufTensor,
    PlannedTensor,
    bits_of,
    copy_keys,
    file_type,
    gguf_package,
    quantization_type,
    quantized,
    read_gguf,
    rounded,
    type_for,
    write_gguf,
)
from mindprint.adapter.gguf_format import Architecture, Heads, architecture_of, heads_of, name_map
from mindprint.adapter.gguf_models import base_keys, extra_tensors, require_family
from mindprint.adapter.merging import refuse_taken
from mindprint.adapter.peft_format import adapter_digest
from mindprint.adapter.targets import is_stack
from mindprint.adapter.weight_changes import weight_changes
from mindprint.contract import AdapterState, Float32, LoraFactors
from mindprint.errors import AdapterError, ModelError
from mindprint.models.folder import ModelFolder, base_digest
from mindprint.models.layer_names import is_embedding, is_lm_head
from mindprint.models.quantized import StoredTensor, dense_weights, read_quantization, read_rows

LEAST_KEPT = 0.95
"""The share of the change that the written weights must have, as `mindprint verify` asks of an adapter's effect."""

RECORD = "mindprint."
"""The start of the keys in which a merged file says where it comes from. llama.cpp ignores them."""

LIKE_FLOATS, LIKE_8_BITS, LIKE_FEWER = 1e-2, 3e-2, 0.5
"""Greatest relative distances between a weight in a GGUF file and the base's own, by the bits of the file. bfloat16
rounds by up to 0.004, Q8_0 on a real model by 0.006, four bits by 0.1. Another model's weights are 1.4 away."""


@dataclass
class _Kept:
    """The change that was to be written, and the part of it that the rounded weights have."""

    product: float = 0.0
    squared: float = 0.0
    coarsest: set[str] = field(default_factory=set)

    def add(self, before: Float32, after: Float32, change: Float32, kind: Any) -> None:
        # Both sides are rounded, so that the rounding of the base itself is not taken for a change.
        found = rounded(after, kind) - rounded(before, kind)
        self.product += float(np.vdot(found, change))
        self.squared += float(np.vdot(change, change))
        self.coarsest.add(kind.name)

    @property
    def share(self) -> float:
        return self.product / self.squared if self.squared else 1.0


@dataclass(frozen=True)
class MergedGguf:
    """A merged file that was written, not yet under its name: the tensors that it changed, and the share they kept."""

    path: Path
    changed: tuple[str, ...]
    kept: float


@dataclass(frozen=True)
class _Merge:
    """An adapter and its base, ready to be written as GGUF."""

    base: ModelFolder
    facts: BaseFacts
    architecture: Architecture
    heads: Heads
    weights: Mapping[str, StoredTensor]
    changes: Mapping[str, Sequence[tuple[LoraFactors, float]]]
    """By llama.cpp's name of a weight, in the layout that llama.cpp has it in."""
    sources: Mapping[str, str]
    """The base's names of the same weights."""
    record: Mapping[str, str]

    def change(self, name: str) -> Float32:
        """Return the sum of the changes of a weight, `[out, in]`."""
        parts = [(pair.b * np.float32(scale)) @ pair.a for pair, scale in self.changes[name]]
        return np.sum(parts, axis=0, dtype=np.float32) if len(parts) > 1 else parts[0].astype(np.float32, copy=False)

    def laid_out(self, name: str, values: Float32) -> Float32:
        """Return a tensor of the base's in the layout of llama.cpp."""
        module, _, part = name.rpartition(".")
        if self.facts.transposed_linears and values.ndim == 2 and not (is_embedding(module) or is_lm_head(module)):
            values = values.T
        if self.architecture.layout is None or part not in ("weight", "bias"):
            return values
        rows = values if values.ndim == 2 else values[:, None]
        return self.architecture.layout(module, rows, self.heads).reshape(values.shape)


@contextmanager
def merged_gguf(
    out: Path, base: ModelFolder, adapter: AdapterState, source: Path, *, into: Path | None, kind: FileType | None
) -> Iterator[MergedGguf]:
    """Write the base with `adapter` in it as GGUF under another name. It becomes `out` when the block ends well.

    Args:
        out: The new file.
        base: The folder of the base that the adapter was trained on.
        adapter: The adapter.
        source: The adapter's folder, for messages and for the record.
        into: The base's own GGUF file, or None to write one from the folder.
        kind: The type of the weights. None keeps the type of each weight of `into`, and is F16 without one.

    Raises:
        AdapterError: The adapter cannot be merged, or rounding loses its change.
        ModelError: A file is broken, or `into` is of another base.
        RunError: `out` exists already.
    """
    gguf_package("writing GGUF")
    refuse_taken(out)
    if into is None:
        require_family(base.path)
    try:
        merge = _prepared(out, base, adapter, source)
    except AdapterError as error:
        raise AdapterError(f"{source}: {error}") from error
    kept = _Kept()
    if into is None:
        planned, keys = _from_folder(merge, quantization_type(kind or "f16"), kept)
    else:
        opened = read_gguf(into)
        _require_same_base(opened, merge)
        planned, keys = _into_file(opened, merge, None if kind is None else quantization_type(kind), kept)
    with atomic.new_file(out) as aside:
        write_gguf(aside, merge.architecture.name, keys, planned)
        if kept.share < LEAST_KEPT:
            raise AdapterError(
                f"{out}: was not kept, for rounding to {', '.join(sorted(kept.coarsest))} leaves {kept.share:.2f} of "
                f"the adapter's change of the weights, where {LEAST_KEPT} is asked; write finer weights (--type f16), "
                "or merge into a finer file of the base"
            )
        yield MergedGguf(aside, tuple(sorted(merge.changes)), kept.share)


def merged_share(opened: GgufFile, base: ModelFolder, adapter: AdapterState) -> float:
    """Return the share of an adapter's change of the weights that a merged file has: near 1 for a sound merge.

    Raises:
        AdapterError: The adapter cannot be merged into GGUF.
        ModelError: The file is of another base.
    """
    merge = _prepared(opened.path, base, adapter, base.path)
    _require_same_shapes(opened, merge)
    product = squared = 0.0
    for name in merge.changes:
        change = merge.change(name)
        found = opened.tensors[name].values() - _folder_values(merge, merge.sources[name])
        product += float(np.vdot(found, change))
        squared += float(np.vdot(change, change))
    return product / squared if squared else 1.0


def write_base(out: Path, folder: Path) -> None:
    """Write a base's folder as a GGUF file in float32 without a vocabulary, for a library that is given token ids.

    Raises:
        AdapterError: The family cannot be written, or the package `gguf` is missing.
        ModelError: A weight of the folder has no place in llama.cpp's architecture, or cannot be read.
    """
    gguf_package("computing with llama.cpp")
    require_family(folder, vocabulary=False)
    facts = read_base_facts(folder)
    architecture = architecture_of(facts, "merge it")
    heads = heads_of(folder) if architecture.layout else {}
    base = ModelFolder(folder, str(folder))
    merge = _Merge(base, facts, architecture, heads, dense_weights(folder), {}, {}, {})
    planned, _ = _from_folder(merge, quantization_type("f32"), _Kept())

    def keys(writer: Any) -> None:
        base_keys(writer, folder, folder.name, facts, vocabulary=False)
        writer.add_file_type(file_type(quantization_type("f32")))

    write_gguf(out, architecture.name, keys, planned)


def _prepared(out: Path, base: ModelFolder, adapter: AdapterState, source: Path) -> _Merge:
    facts = read_base_facts(base.path)
    if stacks := [site for site in adapter.tensors if is_stack(site)]:
        raise AdapterError(f"{stacks[0]}: an adapter on stacked experts cannot be merged into GGUF")
    architecture = architecture_of(facts, "merge the adapter into a folder (mindprint merge without --to)")
    weights = dense_weights(base.path)
    heads = heads_of(base.path) if architecture.layout else {}
    names = name_map(architecture, facts)
    changes, sources = {}, {}
    for tensor, parts in weight_changes(adapter, weights, facts).items():
        # Of a tied base that stores its table twice, llama.cpp has it once.
        if facts.tied and is_lm_head(tensor.removesuffix(".weight")):
            continue
        name = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise AdapterError(f"{tensor}: llama.cpp's architecture {architecture.name!r} has no such weight")
        sources[name] = tensor
        changes[name] = [(_laid_out(tensor, part.factors, facts, architecture, heads), part.scale) for part in parts]
    record = {
        "version": __version__,
        "base": base.name,
        "base_digest": base_digest(base.path),
        "adapter": os.path.relpath(source.resolve(), out.resolve().parent),
        "adapter_digest": adapter_digest(adapter),
    }
    return _Merge(base, facts, architecture, heads, weights, changes, sources, record)


def _laid_out(
    tensor: str, factors: LoraFactors, facts: BaseFacts, architecture: Architecture, heads: Heads
) -> LoraFactors:
    """Return factors of a stored matrix `[rows, columns]` as factors of llama.cpp's."""
    module = tensor.removesuffix(".weight")
    if facts.transposed_linears and not (is_embedding(module) or is_lm_head(module)):
        factors = LoraFactors(factors.b.T, factors.a.T)
    b = factors.b if architecture.layout is None else architecture.layout(module, factors.b, heads)
    return LoraFactors(np.ascontiguousarray(factors.a, np.float32), np.ascontiguousarray(b, np.float32))


def _into_file(
    opened: GgufFile, merge: _Merge, kind: Any, kept: _Kept
) -> tuple[list[PlannedTensor], Callable[[Any], None]]:
    """Plan the tensors of the base's own file: changed, rounded to `kind` where that is smaller, or as they are."""
    planned = []
    for name, tensor in opened.tensors.items():
        target = _target_type(tensor, kind, changed=name in merge.changes)
        if name in merge.changes:
            data = partial(_changed, tensor.values, merge, name, target, kept)
        elif target != tensor.kind:
            data = partial(_requantized, tensor, target)
        else:
            data = partial(_as_it_is, tensor)
        planned.append(PlannedTensor(name, target, tensor.shape, data))

    def keys(writer: Any) -> None:
        # The type of the file is that of most weights. Those of another base type stay as they are.
        states = kind is not None and _is_written(opened.tensors[next(iter(merge.changes))].kind)
        copy_keys(writer, opened, without=["general.file_type"] if states else [])
        if states:
            writer.add_file_type(file_type(kind))
        _add_record(writer, merge.record)

    return planned, keys


def _target_type(tensor: GgufTensor, kind: Any, *, changed: bool) -> Any:
    if changed:
        if kind is None and not _is_written(tensor.kind):
            raise AdapterError(
                f"{tensor.name} is {tensor.kind.name} in this file, and rounding to so few bits again would lose the "
                "adapter's change; write the adapted weights finer (--type f16 or q8_0), or merge into a file in F16 "
                "and quantize the result with llama-quantize"
            )
        return tensor.kind if kind is None else type_for(tensor.name, tensor.shape, kind)
    if kind is None or not _is_written(tensor.kind):
        return tensor.kind
    target = type_for(tensor.name, tensor.shape, kind)
    return target if bits_of(target) < bits_of(tensor.kind) else tensor.kind


def _is_written(kind: Any) -> bool:
    return kind.name.lower() in get_args(FileType)


def _from_folder(merge: _Merge, kind: Any, kept: _Kept) -> tuple[list[PlannedTensor], Callable[[Any], None]]:
    """Plan the tensors of a file that is written from the base's folder, in the order of the folder's files."""
    names = name_map(merge.architecture, merge.facts)
    planned = [
        PlannedTensor(name, quantization_type("f32"), values.shape, partial(_same, values))
        for name, values in extra_tensors(merge.base.path).items()
    ]
    for tensor, weight in merge.weights.items():
        if merge.facts.tied and is_lm_head(tensor.removesuffix(".weight")):
            continue
        name = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise AdapterError(f"{tensor}: llama.cpp's architecture {merge.architecture.name!r} has no such tensor")
        values = partial(_folder_values, merge, tensor)
        target = type_for(name, weight.shape, kind)
        if name in merge.changes:
            data = partial(_changed, values, merge, name, target, kept)
        else:
            data = partial(_quantized_values, values, target)
        planned.append(PlannedTensor(name, target, weight.shape, data))

    def keys(writer: Any) -> None:
        base_keys(writer, merge.base.path, merge.base.name, merge.facts)
        writer.add_file_type(file_type(kind))
        _add_record(writer, merge.record)

    return planned, keys


def _folder_values(merge: _Merge, tensor: str) -> Float32:
    weight = merge.weights[tensor]
    rows = math.prod(weight.shape[:-1])
    return merge.laid_out(tensor, read_rows(weight, 0, rows).reshape(weight.shape))


def _changed(values: Callable[[], Float32], merge: _Merge, name: str, kind: Any, kept: _Kept) -> NDArray[Any]:
    before, change = values(), merge.change(name)
    after = before + change
    kept.add(before, after, change, kind)
    return quantized(after, kind)


def _quantized_values(values: Callable[[], Float32], kind: Any) -> NDArray[Any]:
    return quantized(values(), kind)


def _requantized(tensor: GgufTensor, kind: Any) -> NDArray[Any]:
    return quantized(tensor.values(), kind)


def _as_it_is(tensor: GgufTensor) -> NDArray[Any]:
    return tensor.data


def _same(values: Float32) -> NDArray[Any]:
    return values


def _add_record(writer: Any, record: Mapping[str, str]) -> None:
    for name, value in record.items():
        writer.add_string(f"{RECORD}{name}", value)


def _require_same_shapes(opened: GgufFile, merge: _Merge) -> None:
    """Raise `ModelError` unless a file has the base's architecture and the shapes of its adapted weights."""
    wrong = f"{opened.path}: is not a file of {merge.base.name}"
    if opened.architecture != merge.architecture.name:
        raise ModelError(
            f"{wrong}: its architecture is {opened.architecture!r}, and the base's is {merge.architecture.name!r}"
        )
    for name in merge.changes:
        if name not in opened.tensors:
            raise ModelError(f"{wrong}: it has no {name}")
        weight = merge.weights[merge.sources[name]]
        expected = merge.laid_out(merge.sources[name], np.empty(weight.shape, np.float32)).shape
        if opened.tensors[name].shape != expected:
            raise ModelError(f"{wrong}: {name} is {list(opened.tensors[name].shape)} there, and here {list(expected)}")


def _require_same_base(opened: GgufFile, merge: _Merge) -> None:
    """Raise `ModelError` unless a file has the base's architecture, shapes and weights."""
    _require_same_shapes(opened, merge)
    wrong = f"{opened.path}: is not a file of {merge.base.name}"
    names = list(merge.changes)
    # Three weights tell two models apart, and reading all of them would take as long as the merge.
    for name in dict.fromkeys((names[0], names[len(names) // 2], names[-1])):
        tensor = opened.tensors[name]
        values, expected_values = tensor.values(), _folder_values(merge, merge.sources[name])
        length = float(np.linalg.norm(expected_values))
        distance = float(np.linalg.norm(values - expected_values)) / max(length, 1e-30)
        packed = read_quantization(merge.base.path) is not None
        limit = LIKE_FEWER if packed or not _is_written(tensor.kind) else LIKE_FLOATS
        if tensor.kind.name == "Q8_0" and not packed:
            limit = LIKE_8_BITS
        if not distance <= limit:
            raise ModelError(f"{wrong}: {name} differs by {distance:.2g} of its size, where {limit:g} is rounding")
