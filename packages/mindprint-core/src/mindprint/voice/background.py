"""The background of people: prose of others, from which the person's voice is told. It is never trained.

`voice.background` names text files and folders. A model that no longer writes like its base model need not write like
the person. Only text of other people shows the difference.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mindprint.config import ConfigFile
from mindprint.data.row_files import shown_path
from mindprint.errors import DataError, first_line
from mindprint.input_files import read_text
from mindprint.text.ngrams import UInt64, grams, word_symbols
from mindprint.text.words import word_count, words

ENDINGS = (".txt", ".md")

LEAST_WORDS = 5_000
"""Words that a background needs: with fewer, the people in it are told from the person by their subjects."""

RUN = 8
"""Words of a run that the person and somebody else hardly ever both write by chance."""

QUOTED_RUNS, QUOTED_SHARE = 20, 0.01
"""A file contains the person's text if it has this number of her runs, and this share of them: not a quotation."""

MOST_FILES = 10_000


def read_background(file: ConfigFile, person: Sequence[str]) -> tuple[str, ...]:
    """Return the texts that `voice.background` names, a text for each file, and none if it names nothing.

    Args:
        file: The configuration, from whose folder relative paths start.
        person: The person's training texts, which must not be among them.

    Raises:
        DataError: A path is missing, holds no text, has too few words with all others, or contains the person's text.
    """
    paths = [path for name in file.config.voice.background for path in _text_files(file.resolve(name))]
    if not paths:
        return ()
    own = _runs(person)
    texts = []
    for path in dict.fromkeys(paths):
        text = _read(path)
        _refuse_own_text(path, text, own)
        texts.append(text)
    count = word_count(texts)
    if count < LEAST_WORDS:
        raise DataError(
            f"voice.background has {count:,} words in {len(texts)} files: at least {LEAST_WORDS:,} are needed, better "
            "20,000, by two people or more: add files, or leave the setting out"
        )
    return tuple(texts)


def _text_files(path: Path) -> Iterator[Path]:
    shown = shown_path(path)
    if path.is_dir():
        inside = [
            Path(folder, name)
            for folder, folders, names in os.walk(path)
            for name in names
            if name.endswith(ENDINGS) and not name.startswith(".") and not _hidden(Path(folder), path, folders)
        ]
        if not inside:
            raise DataError(f"{shown}: has no text files ({', '.join(ENDINGS)}) (voice.background)")
        if len(inside) > MOST_FILES:
            raise DataError(f"{shown}: has {len(inside):,} text files, and {MOST_FILES:,} are read at most: name fewer")
        # The order of a folder's files differs from machine to machine.
        yield from sorted(inside)
    elif not path.exists():
        raise DataError(f"{shown}: no such file or folder (voice.background)")
    elif path.suffix not in ENDINGS:
        raise DataError(f"{shown}: is not a text file: save it as .txt or .md (voice.background)")
    else:
        yield path


def _hidden(folder: Path, root: Path, folders: list[str]) -> bool:
    folders[:] = [name for name in folders if not name.startswith(".")]
    return any(part.startswith(".") for part in folder.relative_to(root).parts)


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except UnicodeDecodeError:
        raise DataError(f"{shown_path(path)}: is not UTF-8 text: save it as UTF-8 (voice.background)") from None
    except OSError as error:
        raise DataError(f"{shown_path(path)}: {first_line(error)} (voice.background)") from None


def _runs(texts: Sequence[str]) -> UInt64:
    """Return the different runs of `RUN` words in the texts, as sorted keys."""
    parts = [grams(word_symbols(words(text)), RUN, RUN)[0] for text in texts]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.uint64)


def _refuse_own_text(path: Path, text: str, own: UInt64) -> None:
    # Containment of runs (Broder 1997, section 2) and not resemblance: a book with three pages of the person hardly
    # resembles them. Runs survive another typesetting, and most of them a few changed words.
    shared = int(np.isin(_runs([text]), own).sum())
    if shared >= QUOTED_RUNS and shared >= QUOTED_SHARE * len(own):
        raise DataError(
            f"{shown_path(path)}: has {shared:,} runs of {RUN} words that are also in your training text "
            f"({shared / len(own):.0%} of all): the background must be other people's: remove your text from it"
        )
