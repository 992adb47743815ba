"""Merging an adapter into its base: from file to file, one block of one tensor in memory, without a framework.

Every shard keeps its header: names, dtypes and shapes stay. Tensors that the adapter does not touch are
copied byte for byte. A weight that it touches becomes `W + scale · B @ A`, summed in float32 and rounded to its dtype.
The weights of a quantized base are written in full precision (`rewriting`), because its grid has no place for the
change.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mindprint import atomic
from mindprint._version import __version__
from mindprint.adapter.base_facts import read_base_facts
from mindprint.adapter.file_threads import FileThreads, write_at
from mindprint.adapter.peft_format import adapter_digest
from mindprint.adapter.rewriting import RewrittenWeights, grids_of, rewritten_config
from mindprint.adapter.weight_changes import WeightChange, weight_changes
from mindprint.contract import AdapterState, Float32, LoraFactors
from mindprint.errors import AdapterError, ModelError, RunError
from mindprint.input_files import read_json, typed
from mindprint.models import folder as models
from mindprint.models.quantized import QuantizedWeight, StoredTensor, dense_weights
from mindprint.models.tensor_files import FLOATS, TensorInfo, add_float32

RECORD_FILE = "mindprint_merge.json"
FORMAT = 1

KEPT = (*models.NEEDED_FILES, "LICENSE*", "NOTICE*", "USE_POLICY*", "*.py")
"""Files of the base that are copied unchanged in addition to the weights. Its README describes another model."""

BLOCK_ELEMENTS = 2**20
"""Elements that a thread reads at a time."""

CACHED_ELEMENTS = 2**16
"""Elements summed at a time: they stay in the processor's cache."""

SERIAL_PRODUCTS = 2**19
"""Multiplications in a product that is too small for BLAS to start threads for it. Its threads and ours would wait for
each other."""


@dataclass(frozen=True)
class MergeRecord:
    """The record of a merge, left in the merged folder so that it can be verified against base and adapter.

    `into` is whether the base is another one than the adapter was trained on, by the user's wish.
    """

    base: str
    revision: str | None
    base_digest: str
    adapter: str
    adapter_digest: str
    mindprint: str = __version__
    format: int = FORMAT
    into: bool = False


@dataclass(frozen=True)
class Merged:
    """A merge that was written: its folder (not yet under its name), and the tensors that it changed."""

    folder: Path
    changed: tuple[str, ...]


@contextmanager
def merged_folder(
    out: Path,
    base: models.ModelFolder,
    adapter: AdapterState,
    source: Path,
    *,
    into: bool = False,
    grid: Path | None = None,
) -> Iterator[Merged]:
    """Write `base` with `adapter` in it under another name; it becomes `out` when the block ends well.

    A quantized base becomes one in full precision. Raises a `MindprintError` before anything is written for an adapter
    that does not fit, weights that cannot be read, an `out` that exists; nothing is left behind when anything fails.

    Args:
        out: The new folder.
        base: The base to merge into.
        adapter: The adapter.
        source: The adapter's folder, for the record.
        into: Whether `base` is not the base that the adapter was trained on, for the record.
        grid: A quantized base whose format the result is rounded to. Such a merge has to be measured.
    """
    refuse_taken(out)
    weights = dense_weights(base.path)
    try:
        changes = weight_changes(adapter, weights, read_base_facts(base.path))
    except AdapterError as error:
        raise AdapterError(f"{source}: {error}") from error
    _require_floats(changes, weights)
    grids = {} if grid is None else grids_of(grid)
    rewritten = None
    if grids or any(isinstance(weight, QuantizedWeight) for weight in weights.values()):
        rewritten = RewrittenWeights(weights, changes, grids)
    _require_space(out, _file_bytes(base.path) if rewritten is None else rewritten.size)
    record = MergeRecord(
        base=base.name,
        revision=base.revision,
        base_digest=models.base_digest(base.path),
        adapter=os.path.relpath(source.resolve(), out.resolve()),
        adapter_digest=adapter_digest(adapter),
        into=into,
    )
    with atomic.new_folder(out, replace=False) as aside:
        with FileThreads() as threads:
            if rewritten is None:
                tensors = {name: info for name, info in weights.items() if isinstance(info, TensorInfo)}
                for shard in models.weight_files(base.path):
                    _write_shard(aside / shard.name, shard, tensors, changes, threads)
            else:
                rewritten.write(aside, threads)
        (aside / RECORD_FILE).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
        _write_others(aside, base.path, rewritten, grid)
        yield Merged(aside, tuple(sorted(changes)))


def _write_others(aside: Path, base: Path, rewritten: RewrittenWeights | None, grid: Path | None) -> None:
    """Write the base's other files: its configuration and tokenizer, changed where its weights got another format."""
    # config.json comes last: a folder that a killed process left without it is not taken for a model's.
    for file in sorted(_kept(base), key=lambda file: file.name == "config.json"):
        target = aside / file.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        if rewritten is None:
            shutil.copyfile(file, target)
        elif file.name == "config.json":
            target.write_text(json.dumps(rewritten_config(base, grid), indent=2) + "\n", encoding="utf-8")
        # The index of the base names its files, and these are others.
        elif file.name != models.INDEX_FILE:
            shutil.copyfile(file, target)


def read_record(folder: Path) -> MergeRecord | None:
    """Return the record of a merged folder, None if it has none. Raises `ModelError` for one that cannot be read."""
    file = folder / RECORD_FILE
    if not os.path.lexists(file):
        return None
    try:
        return typed(MergeRecord, read_json(file))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error


def refuse_taken(out: Path) -> None:
    """Raise `RunError` if something is there already, a link that leads nowhere included."""
    if "\0" in str(out):
        raise RunError(f"{str(out)!r}: is not a path: embedded null byte; name a new folder")
    if out.exists() or out.is_symlink():
        raise RunError(f"{out}: exists already; name a new folder")
    if not out.resolve().parent.is_dir():
        raise RunError(f"{out}: {out.parent} is not a folder; make it first")


def _require_floats(changes: Iterable[str], weights: Mapping[str, StoredTensor]) -> None:
    for name in changes:
        if weights[name].dtype not in ("F32", "F16", "BF16"):
            raise ModelError(
                f"{weights[name].file}: {name} is {weights[name].dtype}; an adapter is merged into float32, bfloat16 "
                "or float16: take the full-precision model"
            )


def _file_bytes(base: Path) -> int:
    return sum(file.stat().st_size for file in models.weight_files(base))


def _require_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.resolve().parent).free
    # A disk that fills up near the end of a large merge would cost the whole time that it took.
    if free < needed:
        raise RunError(f"{out}: needs {needed:,} bytes and {free:,} are free; free space, or choose another place")


def _kept(base: Path) -> Iterator[Path]:
    """Yield the base's configuration, tokenizer and generation files."""
    weights = {file.name for file in base.glob("*.safetensors")}
    for file in base.rglob("*"):
        name = file.relative_to(base).as_posix()
        if file.is_file() and file.name not in weights and any(fnmatch.fnmatch(name, kept) for kept in KEPT):
            yield file


def _write_shard(
    target: Path,
    shard: Path,
    tensors: Mapping[str, TensorInfo],
    changes: Mapping[str, Sequence[WeightChange]],
    threads: FileThreads,
) -> None:
    """Write a shard with its changed weights in place. The bytes between them, header included, are copied."""
    # In the order of the file, so that the gaps between changed weights can be copied in one pass.
    changed = sorted((info.start, name) for name, info in tensors.items() if info.file == shard and name in changes)
    with shard.open("rb") as source, target.open("wb") as file:
        files = source.fileno(), file.fileno()
        # Positions are absolute (pread, pwrite), so threads need no lock on the files.
        size, at = shard.stat().st_size, 0
        for start, name in changed:
            threads.copy(*files, (at, start), at)
            for change in changes[name]:
                place = change.weight.locate(tensors[name])
                assert isinstance(place, TensorInfo)
                for first, factors in _blocks(change.factors):
                    threads.do(_merge_block, files, place, first, factors, change.scale)
            at = tensors[name].end
        threads.copy(*files, (at, size), at)
        threads.wait()
    threads.flush(target)


def _blocks(factors: LoraFactors) -> Iterator[tuple[int, LoraFactors]]:
    """Yield row blocks of a weight: the first element of each, and the factors of its rows."""
    rows, columns = len(factors.b), factors.a.shape[1]
    step = max(1, BLOCK_ELEMENTS // columns)
    # Transposed factors are views, and BLAS is slow on those.
    inner = np.ascontiguousarray(factors.a)
    for row in range(0, rows, step):
        yield row * columns, LoraFactors(inner, np.ascontiguousarray(factors.b[row : row + step]))


def _merge_block(files: tuple[int, int], info: TensorInfo, first: int, factors: LoraFactors, scale: float) -> None:
    """Write the bits of `W + scale · B @ A` for one block of rows of a weight that begins at element `first`."""
    source, target = files
    bits = FLOATS[info.dtype]
    block = np.empty((len(factors.b), factors.a.shape[1]), bits)
    content = memoryview(block.view(np.uint8)).cast("B")  # type: ignore[arg-type]
    start = info.start + first * bits.itemsize
    if os.preadv(source, [content], start) < block.nbytes:
        raise ModelError(f"{info.file}: became shorter while it was read")
    rows, columns = block.shape
    # The scale goes into B, which has fewer elements than the product.
    scaled: Float32 = factors.b * np.float32(scale)
    # Products small enough for one thread and results small enough for the cache, whichever is less.
    step = max(1, min(CACHED_ELEMENTS, SERIAL_PRODUCTS // len(factors.a)) // columns)
    for row in range(0, rows, step):
        part = slice(row, row + step)
        change: Float32 = scaled[part] @ factors.a
        add_float32(block[part], change, info.dtype)
    write_at(target, content, start)
