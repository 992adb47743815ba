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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Literal

import numpy as np

from mindprint.config import ConfigFile, DataConfig
from mindprint.contract import Bool
from mindprint.data.quizzes import Question, Quizzes, read_quizzes
from mindprint.data.render import trained_turns
from mindprint.data.rows import Messages, PreferenceRow, Rows, SftRow, Text, read_rows
from mindprint.errors import DataError
from mindprint.text.near_duplicates import THRESHOLD, Ints, OnProgress, joined, near_duplicate_groups, normalised

RULE = (
    "blake2b-16 of the prompt without case, punctuation and runs of whitespace (NFKC, UTF-8); the smallest of a group "
    "of near-duplicates (weighted by how rare their text is) decides by its second half; held out where that / 2^64 < "
    "fraction"
)
"""The rule in words, for the manifest. Another rule is another split: change the words with it."""

Kind = Literal["sft", "preferences"]
Side = Literal["train", "held_out", "removed"]


@dataclass(frozen=True)
class HeldOut:
    """Rows that are only scored: pairs (those of `data.heldout` first), texts to be read or continued, questions."""

    pairs: tuple[PreferenceRow, ...] = ()
    texts: tuple[SftRow, ...] = ()
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
    trained: tuple[str, ...] = field(repr=False)
    held_out: tuple[str, ...] = field(repr=False)
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
    return hashlib.blake2b("\n".join(hashes).encode(), digest_size=16).hexdigest()


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
    groups = _groups(table, data.heldout_fraction)
    sides = _sides(table, groups, data.heldout_fraction)
    kept = _keep_something(table, groups, sides)
    held = _on(rows, sides, "held_out")
    return Split(
        _on(rows, sides, "train"),
        HeldOut(rows.heldout + held.preferences, held.sft, quizzes.questions),
        _facts(table, groups, sides, kept, data.heldout_fraction),
        tuple(_notes(sides.count("removed"))),
    )


def nearly_trained(rows: Sequence[PreferenceRow], train: Rows, data: DataConfig) -> Bool:
    """Return which held-out rows have the prompt of a training row, exactly or nearly: bool `[rows]`."""
    table = _Table.of(Rows(train.sft, train.preferences, tuple(rows)), Quizzes(), data)
    labels = table.labels
    # All prompts of a row are in one group, so the first of them tells which.
    trained = {int(labels[places[0]]) for places in table.rows}
    return np.array([label in trained for label in labels[table.explicit].tolist()], dtype=np.bool_)


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


@dataclass(frozen=True, eq=False)
class _Table:
    """All prompts, one after another: `texts`, each in a group (`labels`, int64 `[texts]`).

    A row of `owners` (kind and topic, training rows only) has the places `rows` in them: a conversation has one for
    each answer that is trained. `explicit` are the places of text that is held out by definition.
    """

    texts: tuple[str, ...]
    labels: Ints
    owners: tuple[tuple[Kind, str], ...]
    rows: tuple[range, ...]
    explicit: range
    pairs: Mapping[str, int]
    questions: Mapping[str, int]

    @classmethod
    def of(cls, rows: Rows, quizzes: Quizzes, data: DataConfig, on_progress: OnProgress | None = None) -> _Table:
        prompts = [*(prompts_of(row, data) for row in rows.sft), *([spoken(row.prompt)] for row in rows.preferences)]
        owners: list[tuple[Kind, str]] = [("sft", row.topic) for row in rows.sft]
        owners += [("preferences", row.topic) for row in rows.preferences]
        ends = np.cumsum([0, *map(len, prompts)]).tolist()
        places = tuple(map(range, ends, ends[1:]))
        texts = (*chain(*prompts), *(spoken(row.prompt) for row in rows.heldout), *quizzes.held_out)
        # All prompts of a conversation are joined to one group: its tokens cannot be split between the sides.
        within = np.array([(row[0], other) for row in places for other in row[1:]], dtype=np.int64).reshape(-1, 2)
        labels = joined(near_duplicate_groups(texts, on_progress), within)
        return cls(
            texts=texts,
            labels=labels,
            owners=tuple(owners),
            rows=places,
            explicit=range(ends[-1], len(texts)),
            pairs=Counter(row.topic for row in rows.heldout),
            questions=Counter(question.topic for question in quizzes.questions),
        )

    @property
    def topics(self) -> tuple[str, ...]:
        """Return the topics in the order of their first row."""
        return tuple(dict.fromkeys([*(topic for _, topic in self.owners), *self.pairs, *self.questions]))

    def group(self, row: int) -> int:
        return int(self.labels[self.rows[row][0]])


@dataclass(frozen=True, eq=False)
class _Groups:
    """`fixed` groups have explicit held-out text, `drawn` ones the hash decides on.

    `leaders` is where the leader of each group of training rows lies in [0, 1]. `several` counts groups of more than
    one prompt; `moved` are those in which a member alone would lie on the other side.
    """

    fixed: frozenset[int]
    drawn: frozenset[int]
    leaders: Mapping[int, float]
    several: int
    moved: frozenset[int]


def _groups(table: _Table, fraction: float) -> _Groups:
    members: dict[int, set[bytes]] = {}
    # The labels of explicit held-out text come last, and zip ends before them: only training prompts lead a group.
    for label, text in zip(table.labels.tolist(), table.texts[: table.explicit.start], strict=False):
        members.setdefault(label, set()).add(_digest(text))
    # Text that a person holds out comes before any hash.
    fixed = frozenset(table.labels[table.explicit].tolist())
    drawn = frozenset(table.group(row) for row, (_, topic) in enumerate(table.owners) if not table.pairs.get(topic))
    several = {group: known for group, known in members.items() if len(known) > 1}
    return _Groups(
        fixed,
        drawn - fixed,
        {group: _position(min(known)) for group, known in members.items()},
        len(several),
        frozenset(
            group for group, known in several.items() if len({_position(digest) < fraction for digest in known}) > 1
        ),
    )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(normalised(text).encode(), digest_size=16).digest()


def _short(text: str) -> str:
    return _digest(text).hex()[:16]


def _position(digest: bytes) -> float:
    """Return the position of a digest in [0, 1], by its second half. The first half ranks it."""
    return int.from_bytes(digest[8:], "big") / 2**64


def _sides(table: _Table, groups: _Groups, fraction: float) -> list[Side]:
    # By the leader's hash alone, so that adding rows moves as few prompts as possible.
    held = {group for group in groups.drawn if groups.leaders[group] < fraction}
    found = [table.group(row) for row in range(len(table.rows))]
    return ["removed" if group in groups.fixed else "held_out" if group in held else "train" for group in found]


def _keep_something(table: _Table, groups: _Groups, sides: list[Side]) -> int:
    """Train the highest group of a topic that would have no row left of a kind. Return how many groups that were."""
    places: dict[tuple[Kind, str], list[int]] = {}
    for row, owner in enumerate(table.owners):
        places.setdefault(owner, []).append(row)
    kept = 0
    for (kind, topic), owned in places.items():
        if any(sides[row] == "train" for row in owned):
            continue
        held = {table.group(row) for row in owned if sides[row] == "held_out"}
        if not held:
            raise DataError(
                f"topic {topic!r}: every prompt of its {_NAMES[kind]} appears in held-out rows or a quiz, exactly or "
                "nearly: add rows with other prompts, or take those out of heldout.jsonl or quiz.json"
            )
        # The highest is the first to be trained when the fraction is lowered: the order of groups stays consistent.
        highest = max(held, key=lambda group: (groups.leaders[group], group))
        sides[:] = ["train" if table.group(row) == highest else side for row, side in enumerate(sides)]
        kept += 1
    return kept


_NAMES: Mapping[Kind, str] = {"sft": "SFT rows", "preferences": "preference pairs"}


def _on(rows: Rows, sides: Sequence[Side], side: Side) -> Rows:
    """Return the training rows on one side."""
    # `sides` has the SFT rows first and the pairs behind them.
    sft = tuple(row for row, found in zip(rows.sft, sides, strict=False) if found == side)
    pairs = zip(rows.preferences, sides[len(rows.sft) :], strict=True)
    return Rows(sft, tuple(row for row, found in pairs if found == side), ())


def _facts(table: _Table, groups: _Groups, sides: Sequence[Side], kept: int, fraction: float) -> SplitFacts:
    on: dict[Side, set[str]] = {"train": set(), "held_out": set(), "removed": set()}
    for side, places in zip(sides, table.rows, strict=True):
        on[side].update(_short(table.texts[place]) for place in places)
    on["held_out"].update(_short(table.texts[place]) for place in table.explicit)
    rows: dict[str, list[int]] = {topic: [] for topic in table.topics}
    for row, (_, topic) in enumerate(table.owners):
        rows[topic].append(row)
    return SplitFacts(
        fraction=fraction,
        topics={topic: _topic(table, sides, topic, owned) for topic, owned in rows.items()},
        trained=tuple(sorted(on["train"])),
        held_out=tuple(sorted(on["held_out"])),
        groups=groups.several,
        groups_moved=len(groups.moved & groups.drawn),
        kept=kept,
    )


def _topic(table: _Table, sides: Sequence[Side], topic: str, owned: Sequence[int]) -> TopicSplit:
    def share(kind: Kind) -> Share:
        counts = Counter(sides[row] for row in owned if table.owners[row][0] == kind)
        return Share(counts["train"], counts["held_out"], counts["removed"])

    prompts = {normalised(table.texts[place]) for row in owned for place in table.rows[row]}
    pairs, questions = table.pairs.get(topic, 0), table.questions.get(topic, 0)
    return TopicSplit(share("sft"), share("preferences"), pairs, questions, len(prompts))


def _notes(removed: int) -> Iterator[str]:
    if removed:
        rows = "1 row is" if removed == 1 else f"{removed} rows are"
        yield f"{rows} left out of training: the prompt appears, exactly or nearly, in held-out rows or in a quiz"
