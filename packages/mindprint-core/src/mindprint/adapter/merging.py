"""Merging an adapter into its base: from file to file, one block of one tensor in memory, without a framework.

Every shard keeps its header: names, dtypes and shapes stay. Tensors that the adapter does not touch are
copied byte for byte. A weight that it touches becomes `W + scale · B @ A`, summed in float32 and rounded to its dtype.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from mindprint import atomic
from mindprint._version import __version__
from mindprint.adapter.base_facts import read_base_facts
from mindprint.adapter.peft_format import adapter_digest
from mindprint.adapter.weight_changes import WeightChange, weight_changes
from mindprint.contract import AdapterState, Float32, LoraFactors
from mindprint.errors import AdapterError, ModelError, RunError
from mindprint.input_files import read_json, typed
from mindprint.models import folder as models
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

COPY_BYTES = 2**24
WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class MergeRecord:
    """The record of a merge, left in the merged folder so that it can be verified against base and adapter."""

    base: str
    revision: str | None
    base_digest: str
    adapter: str
    adapter_digest: str
    mindprint: str = __version__
    format: int = FORMAT


@dataclass(frozen=True)
class Merged:
    """A merge that was written: its folder (not yet under its name), and the tensors that it changed."""

    folder: Path
    changed: tuple[str, ...]


@contextmanager
def merged_folder(out: Path, base: models.ModelFolder, adapter: AdapterState, source: Path) -> Iterator[Merged]:
    """Write `base` with `adapter` in it under another name; it becomes `out` when the block ends well.

    `source` is the adapter's folder, for the record. Raises a `MindprintError` before anything is written for a base
    that is quantized, an adapter that does not fit, an `out` that exists; nothing is left behind when anything fails.
    """
    refuse_taken(out)
    tensors = models.tensors(base.path)
    _refuse_quantized(base)
    try:
        changes = weight_changes(adapter, tensors, read_base_facts(base.path))
    except AdapterError as error:
        raise AdapterError(f"{source}: {error}") from error
    _require_floats(changes, tensors)
    _require_space(out, base.path)
    record = MergeRecord(
        base=base.name,
        revision=base.revision,
        base_digest=models.base_digest(base.path),
        adapter=os.path.relpath(source.resolve(), out.resolve()),
        adapter_digest=adapter_digest(adapter),
    )
    with atomic.new_folder(out, replace=False) as aside:
        with _Threads() as threads:
            for shard in models.weight_files(base.path):
                _write_shard(aside / shard.name, shard, tensors, changes, threads)
        (aside / RECORD_FILE).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
        # config.json comes last: a folder that a killed process left without it is not taken for a model's.
        for file in sorted(_kept(base.path), key=lambda file: file.name == "config.json"):
            target = aside / file.relative_to(base.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        yield Merged(aside, tuple(sorted(changes)))


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


def _refuse_quantized(base: models.ModelFolder) -> None:
    if scheme := models.quantization(base.path):
        raise ModelError(
            f"{base.path}: is quantized ({scheme}), and rounding to so few bits would lose the adapter's change: merge "
            "into the full-precision model that it was made of, then quantize the result"
        )


def _require_floats(changes: Iterable[str], tensors: Mapping[str, TensorInfo]) -> None:
    for name in changes:
        if tensors[name].dtype not in ("F32", "F16", "BF16"):
            raise ModelError(
                f"{tensors[name].file}: {name} is {tensors[name].dtype}; an adapter is merged into float32, bfloat16 "
                "or float16: take the full-precision model"
            )


def _require_space(out: Path, base: Path) -> None:
    needed = sum(file.stat().st_size for file in models.weight_files(base))
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


class _Threads:
    """Two pools of threads: one works on parts of files, few at a time, the other flushes files in the background."""

    def __init__(self) -> None:
        self._work, self._flush = ThreadPoolExecutor(WORKERS), ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()
        self._flushed: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        for pool in (self._work, self._flush):
            # After a failure the rest of the work is dropped, because its folder is removed anyway.
            pool.shutdown(cancel_futures=failed is not None)
        if failed is None:
            for flushed in self._flushed:
                flushed.result()  # the kernel tells of a failed write once, to whoever flushes first

    def do(self, task: Callable[..., None], *arguments: Any) -> None:
        self._waiting.append(self._work.submit(task, *arguments))
        # A bounded queue: parts that wait hold copies of their factors, and a shard can have thousands.
        if len(self._waiting) > 4 * WORKERS:
            self._waiting.popleft().result()

    def wait(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()

    def flush(self, path: Path) -> None:
        self._flushed.append(self._flush.submit(atomic.sync, path))


def _write_shard(
    target: Path,
    shard: Path,
    tensors: Mapping[str, TensorInfo],
    changes: Mapping[str, Sequence[WeightChange]],
    threads: _Threads,
) -> None:
    """Write a shard with its changed weights in place. The bytes between them, header included, are copied."""
    # In the order of the file, so that the gaps between changed weights can be copied in one pass.
    changed = sorted((info.start, name) for name, info in tensors.items() if info.file == shard and name in changes)
    with shard.open("rb") as source, target.open("wb") as file:
        files = source.fileno(), file.fileno()
        # Positions are absolute (pread, pwrite), so threads need no lock on the files.
        size, at = shard.stat().st_size, 0
        for start, name in changed:
            _copy(threads, files, at, start)
            for change in changes[name]:
                place = change.weight.locate(tensors[name])
                for first, factors in _blocks(change.factors):
                    threads.do(_merge_block, files, place, first, factors, change.scale)
            at = tensors[name].end
        _copy(threads, files, at, size)
        threads.wait()
    threads.flush(target)


def _copy(threads: _Threads, files: tuple[int, int], start: int, stop: int) -> None:
    for at in range(start, stop, COPY_BYTES):
        threads.do(_copy_part, files, at, min(COPY_BYTES, stop - at))


def _copy_part(files: tuple[int, int], start: int, length: int) -> None:
    source, target = files
    _write(target, os.pread(source, length, start), start)


def _write(target: int, content: bytes | memoryview, start: int) -> None:
    while content:
        written = os.pwrite(target, content, start)
        content, start = content[written:], start + written


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
    _write(target, content, start)
