"""The split into training rows and held-out rows, decided by the text of the prompts.

A prompt is normalised (`near_duplicates.normalised`) and hashed; near-duplicates form a group, and the member whose
hash ranks first decides for all of it, by another part of its hash: below `data.heldout_fraction`, the group is held
out. So a prompt stays where it is when rows are added, unless one that nearly equals it ranks before it; and the
same prompt lies on the same side in every topic and every file. Pairs of `data.heldout` and questions of quizzes are
held out by definition, and rows near to them are not trained. docs/data-formats.md states the rules.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from operator import eq
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from mindprint.config import ConfigFile, DataConfig
from mindprint.contract import Bool, Float64
from mindprint.data import processes
from mindprint.data.processes import Worker
from mindprint.data.quizzes import Question, Quizzes, read_quizzes
from mindprint.data.render import trained_turns
from mindprint.data.rows import Messages, PreferenceRow, Rows, SftRow, Text, read_rows
from mindprint.data.stored import Stored, content_key, count_topics, evenly_chosen, kept_arrays, topic_numbers
from mindprint.errors import DataError
from mindprint.text.near_duplicates import (
    BANDS,
    THRESHOLD,
    Candidates,
    Hashes,
    Ints,
    OnProgress,
    PromptSearch,
    joined,
    near_duplicates,
    normalised,
    prompt_digest,
)

RULE = (
    "blake2b-16 of the prompt without case, punctuation and runs of whitespace (NFKC, UTF-8); the smallest of a group "
    "of near-duplicates (weighted by how rare their text is) decides by its second half; held out where that / 2^64 < "
    "fraction"
)
"""The rule in words, for the manifest. Another rule is another split: change the words with it."""

_Row = TypeVar("_Row", SftRow, PreferenceRow)
Kind = Literal["sft", "preferences"]
Side = Literal["train", "held_out", "removed"]


MOST_SCORED = 5_000
"""Held-out rows of a kind that are scored where rows are on disk, at even distances. All are kept from training."""


@dataclass(frozen=True)
class HeldOut:
    """Rows that are only scored: pairs (those of `data.heldout` first), texts to be read or continued, questions."""

    pairs: Sequence[PreferenceRow] = ()
    texts: Sequence[SftRow] = ()
    questions: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Share:
    """The number of rows of a topic and kind on each side. `removed` ones nearly equal explicit held-out text."""

    train: int = 0
    held_out: int = 0
    removed: int = 0


@dataclass(frozen=True)
class TopicSplit:
    """A topic's rows. `explicit` are its pairs in `data.heldout`, `prompts` its different prompts in training files."""

    sft: Share
    preferences: Share
    explicit: int
    questions: int
    prompts: int


@dataclass(frozen=True)
class SplitFacts:
    """The facts that the manifest states. `trained` and `held_out` are sorted hashes of prompts, 16 hex digits each.

    `groups` counts groups of near-duplicates with more than one prompt, `groups_moved` those of which a member alone
    would lie on the other side, `kept` groups that are trained because a topic would have nothing left.
    """

    fraction: float
    topics: Mapping[str, TopicSplit]
    trained: Sequence[str] = field(repr=False)
    held_out: Sequence[str] = field(repr=False)
    groups: int = 0
    groups_moved: int = 0
    kept: int = 0

    def stated(self) -> dict[str, object]:
        """Return the facts as manifest.json has them, with digests of the prompts that RUN/split.json lists."""
        return {
            "rule": RULE,
            "fraction": self.fraction,
            "prompts": {"trained": len(self.trained), "held_out": len(self.held_out)},
            "digests": {"trained": _list_digest(self.trained), "held_out": _list_digest(self.held_out)},
            "near_duplicates": {"jaccard": THRESHOLD, "groups": self.groups, "moved": self.groups_moved},
            "kept_for_training": self.kept,
            "topics": {topic: asdict(counts) for topic, counts in self.topics.items()},
        }


def _list_digest(hashes: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for number, short in enumerate(hashes):
        digest.update(f"\n{short}".encode() if number else short.encode())
    return digest.hexdigest()


class ShortHashes(Sequence[str]):
    """Hashes of prompts as 16 hex digits, kept as numbers: of millions, strings would fill memory."""

    def __init__(self, numbers: Hashes) -> None:
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return ShortHashes(self._numbers[index])
        return f"{int(self._numbers[index]):016x}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Split:
    """Rows to train on (their `heldout` is empty), held-out rows, and the facts about both."""

    train: Rows
    held_out: HeldOut
    facts: SplitFacts
    notes: tuple[str, ...] = ()
    """Warnings for the user."""

    def nothing_held_out(self, topic: str | None = None) -> str | None:
        """Say why nothing can be scored, of a topic or at all, and how to fix it. None if there are held-out rows."""
        topics = [split for name, split in self.facts.topics.items() if topic in (None, name)]
        if any(split.explicit or split.sft.held_out or split.preferences.held_out for split in topics):
            return None
        prompts = sum(split.prompts for split in topics)
        counted = "1 prompt" if prompts == 1 else f"{prompts} prompts"
        return (
            f"no held-out rows: {counted} at {self.facts.fraction:g} hold out none; "
            "raise data.heldout_fraction or add heldout.jsonl"
        )


def read_split(file: ConfigFile) -> Split:
    """Read a configuration's rows and quizzes and split them. Raises `DataError`."""
    return split_rows(read_rows(file), read_quizzes(file), file.config.data)


def split_rows(rows: Rows, quizzes: Quizzes, data: DataConfig, on_progress: OnProgress | None = None) -> Split:
    """Put every row on a side. Raises `DataError` where explicit held-out text leaves a topic nothing to train on.

    `on_progress` hears of the search for near-duplicates, which takes seconds for tens of thousands of prompts.
    """
    table = _Table.of(rows, quizzes, data, on_progress)
    groups = _Groups.of(table, data.heldout_fraction)
    sides = _sides(table, groups, data.heldout_fraction)
    kept = _keep_something(table, groups, sides)
    held = _on(rows, sides, _HELD_OUT)
    pairs, texts = evenly_chosen(held.preferences, MOST_SCORED), evenly_chosen(held.sft, MOST_SCORED)
    return Split(
        _on(rows, sides, _TRAIN),
        HeldOut((*rows.heldout, *pairs), texts, quizzes.questions),
        _facts(table, groups, sides, kept, data.heldout_fraction),
        tuple(_notes(int((sides == _REMOVED).sum()))),
    )


def nearly_trained(rows: Sequence[PreferenceRow], train: Rows, data: DataConfig) -> Bool:
    """Return which held-out rows have the prompt of a training row, exactly or nearly: bool `[rows]`."""
    table = _Table.of(Rows(train.sft, train.preferences, tuple(rows)), Quizzes(), data)
    return np.isin(table.explicit, table.groups)


def prompt_hash(prompt: Text) -> str:
    """Return the hash of one prompt, 16 hex digits, as `SplitFacts` and RUN/split.json have it."""
    return _short(spoken(prompt))


def spoken(prompt: Text) -> str:
    """Return the user's words in a prompt. System messages and earlier answers are not part of the question."""
    if isinstance(prompt, str):
        return prompt
    asked = [message.content for message in prompt if message.role == "user"]
    return "\n".join(asked or [message.content for message in prompt])


def prompts_of(row: SftRow, data: DataConfig) -> list[str]:
    """Return the prompt before each answer that a row trains. Text without a prompt is its own prompt."""
    if isinstance(row.completion, str):
        return [spoken(row.completion if row.prompt is None else row.prompt)]
    if data.format == "raw":
        return [spoken(row.completion)]
    turns: Iterable[Messages] = (row.messages[:turn] for turn in trained_turns(row, data))
    # A row that trains no turn needs a side as well: then its whole conversation decides.
    return list(dict.fromkeys(spoken(turn) for turn in turns)) or [spoken(row.messages)]


KINDS: tuple[Kind, ...] = ("sft", "preferences")
SIDES: tuple[Side, ...] = ("train", "held_out", "removed")
_TRAIN, _HELD_OUT, _REMOVED = range(3)


@dataclass(frozen=True)
class _Texts:
    """All prompts, one after another: those of training rows, those that are held out by definition, and questions.

    They are read from the rows each time, so that they are never in memory together.
    """

    rows: Rows
    quizzes: Quizzes
    data: DataConfig

    def by_row(self) -> Iterator[list[str]]:
        """Yield the prompts of each training row: a conversation has one for each answer that is trained."""
        for row in self.rows.sft:
            yield prompts_of(row, self.data)
        for pair in self.rows.preferences:
            yield [spoken(pair.prompt)]

    def __iter__(self) -> Iterator[str]:
        yield from chain.from_iterable(self.by_row())
        yield from (spoken(row.prompt) for row in self.rows.heldout)
        yield from self.quizzes.held_out


def _compared(texts: _Texts, on_progress: OnProgress | None) -> Sequence[NDArray[Any]]:
    """Return the groups and digests of all prompts. Of rows on disk, the result of an earlier run is taken."""
    rows = [part for part in (texts.rows.sft, texts.rows.preferences) if isinstance(part, Stored)]
    if not rows:
        return near_duplicates(tuple(texts), on_progress)
    parts = (texts.rows.sft, texts.rows.preferences)
    others = [spoken(row.prompt) for row in texts.rows.heldout] + [*texts.quizzes.held_out]
    # A kind of few rows is in memory, next to one on disk.
    keys = [
        part.key
        if isinstance(part, Stored)
        else [prompts_of(row, texts.data) if isinstance(row, SftRow) else spoken(row.prompt) for row in part]
        for part in parts
    ]
    key = content_key("near-duplicates", keys, others, texts.data.format, texts.data.train_on)
    return kept_arrays(rows[0].cache, key, lambda: _compared_in_processes(texts))


def _compared_in_processes(texts: _Texts) -> tuple[Ints, Hashes]:
    """Divide the bands of the search over the cores.

    The grams of all prompts are in the memory of these processes alone, and given back when they end.
    """
    workers = [Worker(f"{__name__}:prompt_comparer", (texts,)) for _ in range(processes.available_cores())]
    try:
        for number, worker in enumerate(workers):
            worker.send(range(number, BANDS, len(workers)))
        found = [worker.receive() for worker in workers]
        for worker in workers[1:]:
            worker.end()
        workers[0].send(found)
        result: tuple[Ints, Hashes] = workers[0].receive()
        return result
    finally:
        for worker in workers:
            worker.end()


def prompt_comparer(texts: _Texts) -> Callable[[Any], Any]:
    """Return a function that returns candidates in a range of bands, and groups from the candidates in all bands."""
    search = PromptSearch(texts)

    def compare(item: range | list[Candidates]) -> Candidates | tuple[Ints, Hashes]:
        return search.candidates(item) if isinstance(item, range) else (search.groups(item), search.digests)

    return compare


@dataclass(frozen=True, eq=False)
class _Table:
    """Arrays about all prompts and all training rows, SFT rows first.

    A prompt has a group (`labels`, int64 `[prompts]`, the place of the group's first prompt) and a hash (`digests`,
    uint64 `[prompts, 2]`). A row has its kind, the number of its topic in `topics`, and its prompts from `starts[row]`
    to `starts[row + 1]`. The prompts behind the last row's are held out by definition. `pairs` and `questions` count
    those of each topic.
    """

    labels: Ints
    digests: Hashes
    kinds: NDArray[np.int8]
    codes: NDArray[np.int32]
    starts: Ints
    topics: tuple[str, ...]
    pairs: Mapping[str, int]
    questions: Mapping[str, int]

    @classmethod
    def of(cls, rows: Rows, quizzes: Quizzes, data: DataConfig, on_progress: OnProgress | None = None) -> _Table:
        texts = _Texts(rows, quizzes, data)
        counts = np.fromiter(map(len, texts.by_row()), dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(counts)])
        pairs = Counter(row.topic for row in rows.heldout)
        questions = Counter(question.topic for question in quizzes.questions)
        # In the order of their first row.
        topics = tuple(dict.fromkeys([*count_topics(rows.sft), *count_topics(rows.preferences), *pairs, *questions]))
        labels, digests = _compared(texts, on_progress)
        # All prompts of a conversation are joined to one group: its tokens cannot be split between the sides.
        others = np.setdiff1d(np.arange(starts[-1]), starts[:-1], assume_unique=True)
        owners = np.searchsorted(starts, others, side="right") - 1
        return cls(
            labels=joined(labels, np.stack([starts[owners], others], axis=1)),
            digests=digests,
            kinds=np.repeat(np.array([0, 1], dtype=np.int8), [len(rows.sft), len(rows.preferences)]),
            codes=np.concatenate([topic_numbers(rows.sft, topics), topic_numbers(rows.preferences, topics)]),
            starts=starts,
            topics=topics,
            pairs=pairs,
            questions=questions,
        )

    @property
    def explicit(self) -> Ints:
        """Return the groups of the prompts that are held out by definition."""
        return self.labels[self.starts[-1] :]

    @cached_property
    def groups(self) -> Ints:
        """Return the group of each row: all its prompts are in one."""
        return self.labels[self.starts[:-1]]


@dataclass(frozen=True, eq=False)
class _Groups:
    """The groups of training prompts: their `labels`, ascending, and what is decided for each, `[groups]`.

    `leaders` are where the leader's hash is in [0, 1]. `fixed` groups have explicit held-out text, and the hash decides
    on `drawn` ones. `several` have more than one prompt, and in `moved` ones a member alone would be on the other side.
    """

    labels: Ints
    leaders: Float64
    fixed: Bool
    drawn: Bool
    several: Bool
    moved: Bool

    @classmethod
    def of(cls, table: _Table, fraction: float) -> _Groups:
        count = int(table.starts[-1])
        # The smallest hash of a group leads it: it is the first of the group in this order.
        ranks, positions = table.digests[:count].T
        order = np.lexsort((positions, ranks, table.labels[:count]))
        members, ranks, positions = table.labels[:count][order], ranks[order], positions[order]
        first = np.diff(members, prepend=-1) != 0
        labels, starts = members[first], np.flatnonzero(first)
        # 2^-64 is a power of two, so the product is as exact as the hash's own rounding.
        places = positions.astype(np.float64) * 2.0**-64
        # A prompt that is there twice is one member.
        differs = ~first & ((np.diff(ranks, prepend=0) != 0) | (np.diff(positions, prepend=0) != 0))
        several, below = np.zeros(len(labels), dtype=np.bool_), places < fraction
        if len(labels):
            several = np.logical_or.reduceat(differs, starts)
            moved = several & (np.logical_or.reduceat(below, starts) != np.logical_and.reduceat(below, starts))
        # Text that a person holds out comes before any hash.
        fixed = np.isin(labels, table.explicit)
        has_pairs = np.array([bool(table.pairs.get(topic)) for topic in table.topics], dtype=np.bool_)
        drawn = np.isin(labels, table.groups[~has_pairs[table.codes]]) & ~fixed
        return cls(labels, places[first], fixed, drawn, several, moved if len(labels) else several)

    def index(self, labels: Ints) -> Ints:
        """Return the places of groups in these arrays."""
        return np.searchsorted(self.labels, labels)


def _digest(text: str) -> bytes:
    return prompt_digest(normalised(text))


def _short(text: str) -> str:
    return _digest(text).hex()[:16]


def _sides(table: _Table, groups: _Groups, fraction: float) -> NDArray[np.int8]:
    # By the leader's hash alone, so that adding rows moves as few prompts as possible.
    held = groups.drawn & (groups.leaders < fraction)
    of_group = np.where(groups.fixed, _REMOVED, np.where(held, _HELD_OUT, _TRAIN)).astype(np.int8)
    return of_group[groups.index(table.groups)]


def _keep_something(table: _Table, groups: _Groups, sides: NDArray[np.int8]) -> int:
    """Train the highest group of a topic that would have no row left of a kind. Return how many groups that were."""
    owners = table.kinds.astype(np.int64) * len(table.topics) + table.codes
    by_owner, by_group = np.argsort(owners, kind="stable"), np.argsort(table.groups, kind="stable")
    sorted_owners, sorted_groups = owners[by_owner], table.groups[by_group]
    kept = 0
    for owner in dict.fromkeys(owners[np.sort(np.unique(owners, return_index=True)[1])].tolist()):
        rows = by_owner[slice(*np.searchsorted(sorted_owners, (owner, owner + 1)))]
        if (sides[rows] == _TRAIN).any():
            continue
        held = table.groups[rows][sides[rows] == _HELD_OUT]
        if not len(held):
            kind, topic = KINDS[owner // len(table.topics)], table.topics[owner % len(table.topics)]
            raise DataError(
                f"topic {topic!r}: every prompt of its {_NAMES[kind]} appears in held-out rows or a quiz, exactly or "
                "nearly: add rows with other prompts, or take those out of heldout.jsonl or quiz.json"
            )
        # The highest is the first to be trained when the fraction is lowered: the order of groups stays consistent.
        highest = held[np.lexsort((held, groups.leaders[groups.index(held)]))[-1]]
        sides[by_group[slice(*np.searchsorted(sorted_groups, (highest, highest + 1)))]] = _TRAIN
        kept += 1
    return kept


_NAMES: Mapping[Kind, str] = {"sft": "SFT rows", "preferences": "preference pairs"}


def _on(rows: Rows, sides: NDArray[np.int8], side: int) -> Rows:
    """Return the training rows on one side."""
    # `sides` has the SFT rows first and the pairs behind them.
    at = len(rows.sft)
    return Rows(_chosen(rows.sft, sides[:at] == side), _chosen(rows.preferences, sides[at:] == side), ())


def _chosen(rows: Sequence[_Row], mask: Bool) -> Sequence[_Row]:
    indices = np.flatnonzero(mask)
    return rows.select(indices) if isinstance(rows, Stored) else tuple(rows[index] for index in indices.tolist())


def _facts(table: _Table, groups: _Groups, sides: NDArray[np.int8], kept: int, fraction: float) -> SplitFacts:
    # The side of each prompt is that of its row.
    owner = np.repeat(np.arange(len(sides)), np.diff(table.starts))
    hashes, count = table.digests[:, 0], int(table.starts[-1])
    held_out = np.concatenate([hashes[:count][sides[owner] == _HELD_OUT], hashes[count:]])
    return SplitFacts(
        fraction=fraction,
        topics=_topics(table, sides, owner),
        trained=ShortHashes(np.unique(hashes[:count][sides[owner] == _TRAIN])),
        held_out=ShortHashes(np.unique(held_out)),
        groups=int(groups.several.sum()),
        groups_moved=int((groups.moved & groups.drawn).sum()),
        kept=kept,
    )


def _topics(table: _Table, sides: NDArray[np.int8], owner: Ints) -> dict[str, TopicSplit]:
    number = len(table.topics)
    cells = (table.codes.astype(np.int64) * len(KINDS) + table.kinds) * len(SIDES) + sides
    counts = np.bincount(cells, minlength=number * len(KINDS) * len(SIDES)).reshape(number, len(KINDS), len(SIDES))
    # A prompt counts once in each topic that has it.
    codes, (ranks, positions) = table.codes[owner], table.digests[: len(owner)].T
    order = np.lexsort((positions, ranks, codes))
    new = np.zeros(len(order), dtype=np.bool_)
    for values in (codes, ranks, positions):
        new |= np.diff(values[order], prepend=values[order][:1]) != 0
    new[:1] = True
    prompts = np.bincount(codes[order][new], minlength=number)
    shares = [[Share(*counts[code, kind].tolist()) for kind in range(len(KINDS))] for code in range(number)]
    return {
        topic: TopicSplit(sft, pairs, table.pairs.get(topic, 0), table.questions.get(topic, 0), int(count))
        for topic, (sft, pairs), count in zip(table.topics, shares, prompts, strict=True)
    }


def _notes(removed: int) -> Iterator[str]:
    if removed:
        rows = "1 row is" if removed == 1 else f"{removed} rows are"
        yield f"{rows} left out of training: the prompt appears, exactly or nearly, in held-out rows or in a quiz"
