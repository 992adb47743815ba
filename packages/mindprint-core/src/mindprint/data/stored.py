"""Rows on disk: sequences that are read item by item, and the cache that keeps them for the next run.

Items lie one after another in one file. Three arrays next to it, memory-mapped, hold where each item ends, its topic
and its tokens. A sequence is this file and a list of places in it, so the rows of a topic or of one side of the split
are another list of places. Items are read with `pread` and not through a memory map: mapped pages count as memory of
the process until somebody else needs them, and after an epoch that would be the whole file.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from mindprint import atomic
from mindprint._version import __version__
from mindprint.config import ConfigFile
from mindprint.errors import DataError, RunError
from mindprint.input_files import MALFORMED, read_json

FORMAT = 1
"""The format of an entry of the cache, in its key and in its meta.json."""

IN_MEMORY = 20_000
"""Rows up to which a part of the data stays in memory: some ten megabytes, and nothing is gained on disk."""

AT_ONCE = 1024
"""Items that are read or written together."""

CACHE_VARIABLE = "MINDPRINT_DATA_CACHE"
"""The environment variable that names another folder for the cache."""

_PLACE = f"rows that do not fit in memory are kept there; {CACHE_VARIABLE} names another folder"

META, ITEMS, ENDS, TOPICS, SIZES = "meta.json", "items.bin", "ends.i8", "topics.i4", "sizes.i4"
_ARRAYS: Mapping[str, Any] = {ENDS: np.int64, TOPICS: np.int32, SIZES: np.int32}


class HasTopic(Protocol):
    """An item with a topic."""

    @property
    def topic(self) -> str:
        """Return its topic."""


Item = TypeVar("Item", bound=HasTopic)
Places = NDArray[np.int32]


@dataclass(frozen=True)
class Encoded:
    """An item as bytes, with its topic, and the tokens that the model reads of it (0 before it is tokenized)."""

    content: bytes
    topic: str
    size: int = 0


class DamagedError(Exception):
    """An entry of the cache differs from the one that was written."""


@dataclass(frozen=True, eq=False)
class _Entry:
    """An opened folder of the cache."""

    folder: Path
    handle: int
    names: tuple[str, ...]
    facts: Mapping[str, Any]
    ends: NDArray[np.int64]
    topics: NDArray[np.int32]
    sizes: NDArray[np.int32]

    def __del__(self) -> None:
        os.close(self.handle)


class Stored(Sequence[Item], Generic[Item]):
    """Items on disk, each decoded whenever it is asked for. `key` digests which items these are, and their order."""

    def __init__(self, entry: _Entry, decode: Callable[[bytes], Item], key: str, places: Places | None = None) -> None:
        self._entry = entry
        self._decode = decode
        self._places = places
        self.key = key

    @property
    def cache(self) -> Path:
        """The folder of the cache that the items are in."""
        return self._entry.folder.parent

    @property
    def facts(self) -> Mapping[str, Any]:
        """The facts that the items were stored with."""
        return self._entry.facts

    def __len__(self) -> int:
        return len(self._entry.ends if self._places is None else self._places)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Item, ...]: ...
    def __getitem__(self, index: int | slice) -> Item | tuple[Item, ...]:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        return self._decode(self.content(range(len(self))[index]))

    def __iter__(self) -> Iterator[Item]:
        return (self._decode(self.content(index)) for index in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens the files itself.
        return _reopened, (self._entry.folder, self._decode, self.key, self._places)

    def content(self, index: int) -> bytes:
        """Return an item as it is stored."""
        place = index if self._places is None else int(self._places[index])
        start, end = int(self._entry.ends[place - 1]) if place else 0, int(self._entry.ends[place])
        return os.pread(self._entry.handle, end - start, start)

    @property
    def sizes(self) -> NDArray[np.int32]:
        """The tokens that the model reads of each item, int32 `[items]`."""
        return self._entry.sizes if self._places is None else self._entry.sizes[self._places]

    @property
    def topic_codes(self) -> NDArray[np.int32]:
        """The topic of each item as a number: the index in `topic_names`, int32 `[items]`."""
        return self._entry.topics if self._places is None else self._entry.topics[self._places]

    @property
    def topic_names(self) -> tuple[str, ...]:
        """All topics of the entry."""
        return self._entry.names

    def select(self, indices: NDArray[np.integer[Any]]) -> Stored[Item]:
        """Return some of the items, in the order of their indices."""
        places: Places | None
        if len(indices) == len(self) and np.array_equal(indices, np.arange(len(self))):
            # All of them, as if there is one topic. A million places and sizes would take 8 MB.
            places = self._places
        else:
            places = (indices if self._places is None else self._places[indices]).astype(np.int32)
        digest = hashlib.blake2b(self.key.encode(), digest_size=16)
        digest.update(indices.astype(np.int64).tobytes())
        return Stored(self._entry, self._decode, digest.hexdigest(), places)


def evenly_chosen(items: Sequence[Item], most: int) -> Sequence[Item]:
    """Return at most `most` items at even distances, in memory. Items that are in memory already are all kept."""
    if not isinstance(items, Stored) or len(items) <= most:
        return items if not isinstance(items, Stored) else tuple(items)
    return tuple(items[index * len(items) // most] for index in range(most))


def count_topics(items: Sequence[HasTopic]) -> Counter[str]:
    """Count the items of each topic, in the order of their first item."""
    if not isinstance(items, Stored):
        return Counter(item.topic for item in items)
    codes, first, counts = np.unique(items.topic_codes, return_index=True, return_counts=True)
    order = np.argsort(first)
    return Counter({items.topic_names[codes[place]]: int(counts[place]) for place in order})


def topic_numbers(items: Sequence[HasTopic], topics: Sequence[str]) -> NDArray[np.int32]:
    """Return the index in `topics` of each item's topic, int32 `[items]`."""
    numbers = {topic: number for number, topic in enumerate(topics)}
    if not isinstance(items, Stored):
        return np.fromiter((numbers[item.topic] for item in items), dtype=np.int32, count=len(items))
    # A topic of the entry that none of the items has need not be in `topics`.
    return np.array([numbers.get(name, -1) for name in items.topic_names], dtype=np.int32)[items.topic_codes]


def by_topic(items: Sequence[Item]) -> dict[str, Sequence[Item]]:
    """Divide items into topics, in the order of their first item."""
    if isinstance(items, Stored):
        # One stable sort puts the items of every topic together, whatever the number of topics.
        order = np.argsort(items.topic_codes, kind="stable")
        counts = count_topics(items)
        codes = {name: code for code, name in enumerate(items.topic_names)}
        ends = np.cumsum(np.bincount(items.topic_codes, minlength=len(codes)))
        return {
            name: items.select(order[ends[codes[name]] - count : ends[codes[name]]]) for name, count in counts.items()
        }
    topics: dict[str, list[Item]] = {}
    for item in items:
        topics.setdefault(item.topic, []).append(item)
    return {topic: tuple(rows) for topic, rows in topics.items()}


class StoreWriter:
    """The files of one entry while they are written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._codes: dict[str, int] = {}
        self._end = 0
        self._files = {name: (folder / name).open("wb") for name in (ITEMS, *_ARRAYS)}
        # Digests grow while the content is in memory anyway.
        self._digests = {name: hashlib.blake2b(digest_size=16) for name in self._files}

    def add(self, items: Sequence[Encoded]) -> None:
        """Append items."""
        ends, topics, sizes = array("q"), array("i"), array("i")
        for item in items:
            self._end += len(item.content)
            ends.append(self._end)
            topics.append(self._codes.setdefault(item.topic, len(self._codes)))
            sizes.append(item.size)
        content = b"".join(item.content for item in items)
        for name, part in (
            (ITEMS, content),
            (ENDS, ends.tobytes()),
            (TOPICS, topics.tobytes()),
            (SIZES, sizes.tobytes()),
        ):
            self._files[name].write(part)
            self._digests[name].update(part)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write meta.json, which tells a whole entry from a part of one."""
        files = {}
        for name, file in self._files.items():
            files[name] = [file.tell(), self._digests[name].hexdigest()]
            file.close()
        meta = {"format": FORMAT, "topics": list(self._codes), "files": files, "facts": dict(facts)}
        (self._folder / META).write_text(json.dumps(meta), encoding="utf-8")

    def close(self) -> None:
        """Close all files. Nothing happens to those that are closed."""
        for file in self._files.values():
            file.close()


def cache_folder(file: ConfigFile) -> Path:
    """Return the folder of the cache: `.mindprint` next to the configuration, or the one that the environment names.

    It holds the project's texts, so it lies with the project and not in a folder that all projects share.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).absolute()
    # A run's own copy of the configuration lies in PROJECT/runs/NAME.
    holds_run = (file.folder / "manifest.json").is_file() and file.folder.parent.name == "runs"
    return (file.folder.parents[1] if holds_run else file.folder) / ".mindprint"


def content_key(*parts: Any) -> str:
    """Digest everything that an entry depends on. Another version of Mindprint may read or render differently."""
    return hashlib.blake2b(
        json.dumps([FORMAT, __version__, *parts], sort_keys=True).encode(), digest_size=16
    ).hexdigest()


def find_entry(cache: Path, key: str, decode: Callable[[bytes], Item]) -> Stored[Item] | None:
    """Return the entry of a key, None where there is none or it is damaged: then it is built again."""
    try:
        return Stored(_open_entry(cache / key), decode, key)
    except (DamagedError, OSError, *MALFORMED):
        return None


def build_entry(
    cache: Path, key: str, decode: Callable[[bytes], Item], build: Callable[[StoreWriter], Mapping[str, Any]]
) -> Stored[Item]:
    """Write an entry and return it. `build` adds the items and returns the facts to keep with them.

    Where another process is building the same entry, such as another rank on this machine, wait for it and return what
    it wrote. If that process failed, this one builds the entry. Raises `DataError` in one line when the disk is full;
    then nothing is left.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not (ignore := cache / ".gitignore").exists():
            ignore.write_text("*\n", encoding="ascii")
        with _sole_builder(cache / f"{key}.lock"):
            if (built := find_entry(cache, key, decode)) is not None:
                return built
            with atomic.new_folder(cache / key) as aside:
                writer = StoreWriter(aside)
                try:
                    writer.finish(build(writer))
                finally:
                    writer.close()
    except (RunError, OSError) as error:
        raise DataError(f"{error} ({_PLACE})") from error
    return Stored(_open_entry(cache / key), decode, key)


@contextmanager
def _sole_builder(file: Path) -> Iterator[None]:
    """Wait until no other process builds what this lock file is named after, and hold the lock.

    The kernel releases the lock of a process that ends, however it ends, so that nobody waits for a dead one. Without
    the lock two processes would do the same work. The entry that the later one writes then replaces the other's.
    """
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        # Not every file system has locks.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        # Those that wait hold the removed file. They find the entry, or build it without excluding a new process.
        file.unlink(missing_ok=True)
        os.close(handle)


def _reopened(folder: Path, decode: Callable[[bytes], Item], key: str, places: Places | None) -> Stored[Item]:
    return Stored(_open_entry(folder), decode, key, places)


def kept_arrays(cache: Path, key: str, make: Callable[[], Sequence[NDArray[Any]]]) -> list[NDArray[Any]]:
    """Return arrays from the cache, or make them and keep them. Damaged ones are made again.

    Where another process is making the same arrays, wait for it and return what it kept.
    """
    file = cache / f"{key}.npz"
    if (kept := _read_arrays(file)) is not None:
        return kept
    try:
        with _sole_builder(cache / f"{key}.lock"):
            if (kept := _read_arrays(file)) is not None:
                return kept
            arrays = make()
            content = io.BytesIO()
            np.savez(content, *arrays)
            atomic.write_bytes(file, content.getvalue())
    except (RunError, OSError) as error:
        raise DataError(f"{error} ({_PLACE})") from error
    return list(arrays)


def _read_arrays(file: Path) -> list[NDArray[Any]] | None:
    # A zip archive has a checksum of each of its parts.
    with suppress(OSError, zipfile.BadZipFile, zlib.error, *MALFORMED), np.load(file, allow_pickle=False) as kept:
        return [kept[name] for name in sorted(kept.files)]
    return None


def _open_entry(folder: Path) -> _Entry:
    meta = read_json(folder / META)
    if meta["format"] != FORMAT:
        raise DamagedError
    for name, (size, digest) in meta["files"].items():
        file = folder / name
        if file.stat().st_size != size or _file_digest(file) != digest:
            raise DamagedError
    arrays = {name: _mapped(folder / name, kind) for name, kind in _ARRAYS.items()}
    handle = os.open(folder / ITEMS, os.O_RDONLY)
    return _Entry(folder, handle, tuple(meta["topics"]), meta["facts"], arrays[ENDS], arrays[TOPICS], arrays[SIZES])


def _mapped(file: Path, kind: Any) -> NDArray[Any]:
    # An empty file cannot be mapped.
    return np.memmap(file, kind, "r") if file.stat().st_size else np.zeros(0, kind)


def _file_digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def in_portions(items: Iterable[Any], size: int = AT_ONCE) -> Iterator[list[Any]]:
    """Yield lists of at most `size` items."""
    portion: list[Any] = []
    for item in items:
        portion.append(item)
        if len(portion) == size:
            yield portion
            portion = []
    if portion:
        yield portion
