"""From a person's files to a project that can be trained."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from mindprint import atomic
from mindprint.api.options import Notices, OnNotice, backend_section
from mindprint.api.project import config_text, model_from
from mindprint.api.results import Result, Table
from mindprint.config import FILE_NAME
from mindprint.contract import Dtype
from mindprint.errors import ConfigError, DataError
from mindprint.events import Notice
from mindprint.models.quantized import dense_weights
from mindprint.reports.page import as_page
from mindprint.reports.prepared import preparation_report
from mindprint.runs import opened as runs_opened
from mindprint.writing.asking import BaseModel, Kept, OnBatch
from mindprint.writing.gathering import Gathered, Options, gather
from mindprint.writing.making import KINDS, MIX, Made, RowKind, make_rows, pair_exchanges
from mindprint.writing.project import REPORT, find_project
from mindprint.writing.settings import proposed_settings
from mindprint.writing.templates import Templates
from mindprint.writing.textbook import Textbook

ANSWERS = "prepare.jsonl"
"""The base model's answers, next to the rows: they make the command resumable, and later calls quick."""

TOPIC, CHATS = "writing", "conversations"
TITLES = {TOPIC: "Writing", CHATS: "Conversations"}
ROWS = ("sft.jsonl", "preferences.jsonl", "heldout.jsonl")
OUTLINE = "curriculum.yaml"
LONGEST_PASSAGE = 1000

DPO_STEPS = "  steps_per_topic:"
DPO_OFF = "  enabled: false  # no preference pairs yet\n" + DPO_STEPS
"""A line in the `dpo` section of a new mindprint.yaml, and its replacement in a project without pairs."""


@dataclass(frozen=True)
class PrepareResult(Result):
    """The rows of a project, returned by `mindprint.prepare`.

    Attributes:
        project: The project's folder.
        gathered: The person's writing: the files that were read, and its passages.
        counts: Rows by file.
        notices: Messages, in order.
    """

    project: Path
    gathered: Gathered
    counts: Mapping[str, int]
    notices: tuple[Notice, ...]

    @property
    def report(self) -> Path:
        """The page about the files, the rows, and everything that was left out."""
        return self.project / "data" / "report.html"

    def blocks(self) -> Iterator[Table | str]:
        gathered = self.gathered
        read, skipped = len(gathered.reading.read), len(gathered.reading.skipped)
        yield Table(
            ("", ""),
            [
                ("files read", f"{read}" + (f" ({skipped} could not be read)" if skipped else "")),
                ("words", f"{gathered.words:,}"),
                ("language", gathered.language or "unknown"),
                *((name, f"{count:,} rows") for name, count in self.counts.items()),
                *([("duplicates left out", f"{gathered.duplicates:,} passages")] if gathered.duplicates else []),
                *((f"left out, in {name}", f"{count:,} passages") for name, count in gathered.other_languages.items()),
            ],
        )
        if gathered.private:
            yield f"{len(gathered.private)} private things were found, listed in {self.report}; --redact replaces them"
        yield f"look at {self.report}, then: mindprint train {self.project}"

    def to_dict(self) -> dict[str, Any]:
        gathered = self.gathered
        return {
            "project": str(self.project),
            "report": str(self.report),
            "rows": dict(self.counts),
            "words": gathered.words,
            "language": gathered.language,
            "other_languages": dict(gathered.other_languages),
            "duplicates": gathered.duplicates,
            "read": gathered.reading.read,
            "skipped": gathered.reading.skipped,
            "private": [
                {"kind": private.kind, "document": private.document, "line": private.line}
                for private in gathered.private
            ],
            "notices": [asdict(notice) for notice in self.notices],
        }


def prepare(
    writing: Sequence[str | PathLike[str]] | str | PathLike[str],
    into: str | PathLike[str],
    *,
    model: str | None = None,
    author: str | None = None,
    passage_words: tuple[int, int] | None = None,
    mix: Mapping[RowKind, float] | None = None,
    heldout: float = 0.1,
    redact: bool = False,
    templates: str | PathLike[str] | None = None,
    seed: int = 0,
    backend: str | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
    on_notice: OnNotice | None = None,
    on_batch: OnBatch | None = None,
) -> PrepareResult:
    """Make the rows of a project from a person's own files, with the base model and nothing else.

    Args:
        writing: Files and folders: texts, Markdown, HTML, EPUB, DOCX, PDF, mailboxes, exported chats.
        into: The project's folder, which may exist. Its `mindprint.yaml` is kept if there is one.
        model: The base model. Default: the project's.
        author: The person's name as mails and chats have it.
        passage_words: The fewest and the most words of a passage. Default: 60 and 250.
        mix: Shares of the kinds of row: `answer`, `continue`, `topic`, `rewrite`.
        heldout: Share of the passages whose documents give no training row.
        redact: Replace addresses, numbers and keys.
        templates: A folder with texts that replace those by which the model is asked.
        seed: Seed of every draw.
        backend: `torch`, `mlx`, or any installed backend. Default: the project's, or the best one installed.
        device: `cpu`, `cuda`, `mps`, `metal`.
        dtype: `float32`, `bfloat16` or `float16`. Taken only with `backend` or `device`.
        on_notice: Receives messages as they come.
        on_batch: Receives the kind of work, how much of it is done, and how much there is.

    Returns:
        A `PrepareResult`. Print it, or open `result.report`.

    Raises:
        DataError: A path does not exist, it is not clear who the person is, or there is too little text.
        MindprintError: The base model cannot be loaded, or the project has rows that something else wrote.

    Example:
        >>> result = mindprint.prepare("letters", "ada", model="Qwen/Qwen3-0.6B")  # doctest: +SKIP
        >>> result.counts["sft.jsonl"]  # doctest: +SKIP
        212
    """
    notices = Notices(on_notice)
    paths = [writing] if isinstance(writing, str | PathLike) else list(writing)
    least, most = passage_words or (Options.least, Options.most)
    options = Options(author, least, most, heldout, redact, seed)
    _check_options(options)
    shares = _checked_mix(mix)
    project = find_project(Path(into), model)
    project.refuse_others_files((*ROWS, OUTLINE, REPORT))
    asking = Templates(Path(templates) if templates is not None else None)
    gathered = gather([Path(path) for path in paths], options, templates=asking)
    quizzes = _quizzes(gathered.textbook)
    project.refuse_others_files(list(quizzes))
    for note in gathered.textbook.notes:
        notices(note, warning=True)
    for name, reason in (*gathered.reading.broken.items(), *gathered.reading.skipped.items()):
        notices(f"{name}: {reason}", warning=True)
    section = backend_section(backend, device, dtype) or project.backend
    with (
        runs_opened.open_base(project.model, project.folder, section, notices) as opened,
        Kept(project.data / ANSWERS) as kept,
    ):
        # Of a tokenizer without a chat template, for example.
        for note in opened.tokenizer.notes:
            notices(note)
        base = BaseModel(opened, kept, on_batch or (lambda *_: None))
        made = make_rows([*gathered.train, *gathered.heldout], base, asking, shares, seed)
        pairs = pair_exchanges([*gathered.exchanges, *gathered.heldout_exchanges], base, gathered.textbook.topics)
        name = opened.base.name
        size = sum(math.prod(weight.shape) for weight in dense_weights(opened.base.path).values())
    rows = _rows(gathered, made, pairs)
    if not rows["sft.jsonl"]:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in made.dropped.most_common())
        raise DataError(f"{name} found no prompt for any of {len(gathered.train)} passages: {reasons}")
    counts = {name: len(lines) for name, lines in rows.items()}
    files = {name: "".join(_line(row) for row in lines).encode() for name, lines in rows.items()}
    files[OUTLINE] = _outline(rows["sft.jsonl"], gathered.textbook).encode()
    files |= quizzes
    files[REPORT] = as_page(preparation_report(gathered, made, counts)).encode()
    project.write(files, {"model": name, "seed": seed, "options": asdict(options), "mix": dict(shares)})
    topics, paired = ({row["topic"] for row in rows[file]} for file in ("sft.jsonl", "preferences.jsonl"))
    has_pairs = bool(paired) and topics == paired
    lexicon = gathered.textbook.lexicon
    if not project.exists:
        named = model_from(project.folder.resolve(), model or project.model.name)
        text = config_text(named, backend or "auto", _proposed(rows, size))
        text = text if has_pairs else text.replace(DPO_STEPS, DPO_OFF)
        # JSON is YAML.
        text += f"\nvoice:\n  scorers:\n    lexicon: {json.dumps(lexicon, ensure_ascii=False)}\n" if lexicon else ""
        atomic.write_text(project.folder / FILE_NAME, text)
    elif lexicon:
        notices(f"the style guide's phrases, for voice.scorers.lexicon: {json.dumps(lexicon, ensure_ascii=False)}")
    if not has_pairs:
        of = f" for the topic {min(topics - paired)}" if paired else ""
        notices(f"{name} gave no answer that can be the rejected one{of}: train with dpo.enabled=false", warning=True)
    return PrepareResult(project.folder, gathered, counts, notices.heard)


def _rows(gathered: Gathered, made: Made, pairs: Sequence[dict[str, Any] | None]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each file, in the order of the documents."""
    heldout = {id(passage) for passage in gathered.heldout}
    trained = [row for row in made.rows if id(row.passage) not in heldout]
    of_chats = list(zip([*gathered.exchanges, *gathered.heldout_exchanges], pairs, strict=True))
    learnt, examined = of_chats[: len(gathered.exchanges)], of_chats[len(gathered.exchanges) :]
    taught = gathered.textbook.topics
    written = any(row.rejected is not None for row in trained if row.passage.document not in taught)
    spoken = any(pair for exchange, pair in learnt if exchange.document not in taught)
    # A topic needs rows of both stages, so one without pairs becomes a part of the other.
    chats = CHATS if written and spoken else TOPIC

    def topic(document: str, other: str) -> str:
        return gathered.textbook.topics.get(document, other)

    measured = [row.pair for row in made.rows if id(row.passage) in heldout and row.rejected is not None]
    return {
        "sft.jsonl": [
            *({**row.sft, "topic": topic(row.passage.document, TOPIC)} for row in trained),
            *({**exchange.sft, "topic": topic(exchange.document, chats)} for exchange, _ in learnt),
        ],
        "preferences.jsonl": [
            *({**row.pair, "topic": topic(row.passage.document, TOPIC)} for row in trained if row.rejected is not None),
            *({**pair, "topic": topic(exchange.document, chats)} for exchange, pair in learnt if pair),
        ],
        "heldout.jsonl": [
            *({**pair, "topic": TOPIC} for pair in measured),
            *({**pair, "topic": chats} for _, pair in examined if pair),
        ],
    }


def _proposed(rows: Mapping[str, Sequence[Mapping[str, Any]]], parameters: int) -> Mapping[str, str]:
    """Return the settings that suit the rows. They hold for each topic, so the one with the fewest rows decides."""
    counts = [Counter(row["topic"] for row in rows[name]) for name in ("sft.jsonl", "preferences.jsonl")]
    fewest, fewest_pairs = (min(of.values(), default=0) for of in counts)
    return proposed_settings(fewest, fewest_pairs, parameters)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _outline(rows: Sequence[Mapping[str, Any]], book: Textbook) -> str:
    """Return curriculum.yaml: the topics that have rows, those of a textbook in its order, with their titles."""
    topics = {row["topic"] for row in rows}
    titles = {**TITLES, **book.titles}
    ordered = [topic for topic in (*book.topics.values(), *TITLES) if topic in topics]
    lines: list[str] = []
    # Below its unit and its chapter each topic is one line. The lists of a file's last level are `topics`.
    plain = [topic for topic in ordered if "/" not in topic]
    if plain:
        lines += ["topics:", *(f"  - {_entry(topic, topic, titles)}" for topic in plain)]
    units = dict.fromkeys(topic.partition("/")[0] for topic in ordered if "/" in topic)
    lines += ["units:"] if units else []
    for unit in units:
        within = [topic for topic in ordered if topic.startswith(f"{unit}/")]
        lines += _named("  - ", unit, unit, titles)
        direct = [topic for topic in within if topic.count("/") == 1]
        lines += ["    topics:"] if direct else []
        lines += [f"      - {_entry(topic.rpartition('/')[2], topic, titles)}" for topic in direct]
        chapters = dict.fromkeys(topic.rpartition("/")[0] for topic in within if topic.count("/") > 1)
        lines += ["    chapters:"] if chapters else []
        for chapter in chapters:
            lines += [*_named("      - ", chapter.partition("/")[2], chapter, titles), "        topics:"]
            inner = [topic for topic in within if topic.rpartition("/")[0] == chapter]
            lines += [f"          - {_entry(topic.rpartition('/')[2], topic, titles)}" for topic in inner]
    return "\n".join(lines) + "\n"


def _named(indent: str, name: str, full: str, titles: Mapping[str, str]) -> list[str]:
    title = [f"{' ' * len(indent)}title: {json.dumps(titles[full], ensure_ascii=False)}"] if titles.get(full) else []
    return [f"{indent}id: {json.dumps(name, ensure_ascii=False)}", *title]


def _entry(name: str, full: str, titles: Mapping[str, str]) -> str:
    """Return the line of a topic in curriculum.yaml."""
    parts = {"id": name, **({"title": titles[full]} if titles.get(full) else {})}
    return "{" + ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in parts.items()) + "}"


def _quizzes(book: Textbook) -> dict[str, bytes]:
    """Return the files of the quizzes, by their names in the data folder."""
    files = {}
    for topic, questions in book.tests.items():
        quiz = [
            {"question": q.question, "reference_answers": [q.reference], "key_concepts": list(q.concepts)}
            for q in questions
        ]
        files[f"{topic}/quiz.json"] = (json.dumps(quiz, ensure_ascii=False, indent=2) + "\n").encode()
    return files


def _check_options(options: Options) -> None:
    if not 10 <= options.least <= options.most <= LONGEST_PASSAGE:
        raise ConfigError(
            f"passages of {options.least} to {options.most} words: the first number must be at least 10 and at most "
            f"the second, and that at most {LONGEST_PASSAGE}"
        )
    if not 0 <= options.heldout <= 0.5:
        raise ConfigError(f"heldout is {options.heldout}: give a share from 0 to 0.5")


def _checked_mix(mix: Mapping[RowKind, float] | None) -> Mapping[RowKind, float]:
    if mix is None:
        return MIX
    unknown = [name for name in mix if name not in KINDS]
    if unknown or any(share < 0 for share in mix.values()) or not sum(mix.values()) > 0:
        problem = f"{unknown[0]!r} is not a kind of row" if unknown else "shares must be 0 or more, and one more than 0"
        raise ConfigError(f"mix: {problem}; kinds are {', '.join(KINDS)}")
    return mix
