"""Every document in the files and folders that a person names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pluggy

from mindprint.contract import Document
from mindprint.errors import DataError, MindprintError
from mindprint.plugins.entries import READERS, Plugin, installed
from mindprint.plugins.hooks import plugin_hooks
from mindprint.plugins.loading import call_plugin, load_plugin
from mindprint.readers.encodings import HEAD

CORE = "mindprint-core"
HOOK = "mindprint_read_documents"

IGNORED = frozenset((".git", ".hg", ".svn", "node_modules", "__pycache__", "__MACOSX"))
"""Folders in which nobody keeps writing."""

OnFile = Callable[[Path], None]


@dataclass
class Reading:
    """The files that were read, with their numbers of documents, and those that were not, with the reasons.

    `broken` are readers that could not be used, with the reasons.
    """

    read: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def read_documents(paths: Sequence[Path], reading: Reading, on_file: OnFile = lambda _: None) -> Iterator[Document]:
    """Yield the documents of files, and of all files in folders, in the order of their names.

    A file that cannot be read is noted in `reading`, and the others are read. Raises `DataError` for a path that does
    not exist, because it was named.
    """
    readers = Readers()
    reading.broken = readers.broken
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
    for path in paths:
        for file in _files(path, readers):
            on_file(file)
            count = 0
            try:
                documents = readers.read(file)
                if documents is None:
                    raise DataError("is of a format that no reader knows")
                for document in documents:
                    count += 1
                    yield document
            except (MindprintError, OSError) as error:
                reading.skipped[str(file)] = str(error).removeprefix(f"{file}: ")
            if count or str(file) not in reading.skipped:
                reading.read[str(file)] = count


class Readers:
    """The readers that are installed: those of other distributions first. `broken` says why some are left out."""

    def __init__(self) -> None:
        self.broken: dict[str, str] = {}
        self._hooks: list[tuple[Plugin, pluggy.HookRelay]] = []
        for plugin in sorted(installed(READERS), key=lambda plugin: (plugin.distribution == CORE, plugin.name)):
            try:
                self._hooks.append((plugin, plugin_hooks(plugin, load_plugin(plugin))))
            except MindprintError as error:
                # Nobody chose it by name: a broken reader must not keep the others from their files.
                self.broken[plugin.name] = str(error)

    def read(self, path: Path) -> Iterator[Document] | None:
        """Return the documents of a file or of a folder that is one thing, None if no reader knows it.

        Raises a `MindprintError` for a file that is broken, perhaps only while its documents are read.
        """
        head = _head(path) if path.is_file() else b""
        for plugin, hooks in self._hooks:
            # Each step of a generator runs code of the plugin, so each is a guarded call.
            call = partial(call_plugin, plugin, HOOK)
            documents = call(partial(hooks.mindprint_read_documents, path=path, head=head))
            if documents is not None:
                return iter(partial(call, partial(next, iter(documents), None)), None)
        return None


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        raise DataError(f"{path}: is empty")
    return head


def _files(path: Path, readers: Readers) -> Iterator[Path]:
    """Yield a file, or those within a folder, but for hidden ones and links that lead out of it."""
    # A folder that a reader knows is one thing, such as a mailbox.
    if not path.is_dir() or readers.read(path) is not None:
        yield path
        return
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name in IGNORED or entry.is_symlink():
            continue
        # Pipes and devices are not files that somebody wrote.
        if entry.is_dir() or entry.is_file():
            yield from _files(entry, readers)
