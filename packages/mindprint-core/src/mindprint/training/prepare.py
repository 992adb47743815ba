"""Preparation of a run: all input is read and checked before any model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from mindprint import atomic
from mindprint._version import __version__
from mindprint.adapter.formats import read_any_adapter, unmatched_note
from mindprint.adapter.initial import initial_adapter, started_adapter
from mindprint.adapter.peft_format import adapter_digest
from mindprint.adapter.targets import resolve_targets
from mindprint.collection import collection_paused
from mindprint.config import AdapterConfig, Config, ConfigFile, dump_config
from mindprint.contract import AdapterSite, AdapterState, LoraConfig, StageName, TrainingState
from mindprint.curriculum.outline import Outline, read_outline
from mindprint.curriculum.policy import idle_settings
from mindprint.data.order import ORDER_VERSION
from mindprint.data.quizzes import Quizzes, read_quizzes
from mindprint.data.render import PreferenceExample, Rendered, SftExample, render_preferences
from mindprint.data.rows import PreferenceRow, Rows, check_topics, read_rows
from mindprint.data.split import Split, split_rows
from mindprint.data.stored import Stored, by_topic, count_topics
from mindprint.data.tokenizer import Tokenizer, load_tokenizer
from mindprint.errors import AdapterError, DataError, RunError
from mindprint.events import Notice
from mindprint.hookspecs import HOOK_API
from mindprint.models import folder as models
from mindprint.models.engine import Placement
from mindprint.models.positions import has_learned_positions, longest_sequence
from mindprint.models.token_ids import check_padding, check_token_ids, held_out_ids, placed_ids
from mindprint.runs.folder import RUN_FORMAT, RunFolder, portable
from mindprint.training.auto import with_most_memory
from mindprint.training.objectives import OBJECTIVES
from mindprint.training.plan import RowLengths, StagePlan, plan_run
from mindprint.trust.adapters import copy_findings
from mindprint.trust.probe import Probe, heldout_probe, synthetic_probe
from mindprint.voice.answers import training_voice
from mindprint.voice.background import read_background

ROW_NAMES: Mapping[str, str] = {"sft": "SFT rows", "preferences": "preference pairs"}

SECONDS_BETWEEN_NOTICES = 5.0

MANY_TOPICS, TOPICS_PER_ROW = 10, 0.5
"""Topics from which on, and of rows from which share on, a person probably did not mean topics."""


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs, read and checked before any model is loaded."""

    config_file: ConfigFile
    model: models.ModelFolder
    tokenizer: Tokenizer
    examples: Mapping[StageName, Mapping[str, Sequence[Any]]]
    """The rendered rows of each stage, by topic."""
    plans: tuple[StagePlan, ...]
    identity: Mapping[str, str]
    probe: Probe
    split: Split
    outline: Outline
    notes: tuple[Notice, ...]
    start: AdapterState | None = None
    """The adapter that training continues from, if the configuration names one."""
    people: tuple[str, ...] = ()
    """Texts of other people, which no stage trains on: the voice is told from them."""
    order: int = ORDER_VERSION
    """The version of the order in which the stages read their rows."""

    @property
    def config(self) -> Config:
        return self.config_file.config

    def examples_of(self, plan: StagePlan) -> Sequence[Any]:
        """Return the examples that a planned stage trains on."""
        return self.examples[plan.stage][plan.topic]

    def in_order_of(self, folder: RunFolder) -> Prepared:
        """Return a copy that reads rows in the order of a run's first start. Raises `RunError` for an unknown one."""
        version = folder.order_version() or self.order
        if version > ORDER_VERSION:
            raise RunError(
                f"{folder.manifest}: reads rows in order {version} of a newer Mindprint; this one knows orders up to "
                f"{ORDER_VERSION}: pip install --upgrade mindprint-core"
            )
        return self.in_order(version)

    def with_note(self, line: str) -> Prepared:
        """Return a copy that says one line more as the run begins."""
        return replace(self, notes=(*self.notes, Notice(line)))

    def in_order(self, version: int) -> Prepared:
        """Return a copy that reads rows in an order, by its version."""
        return replace(self, plans=tuple(plan.for_order(version) for plan in self.plans), order=version)


@collection_paused()
def prepare(file: ConfigFile, tell: Callable[[Notice], None] | None = None) -> Prepared:
    """Read model folder, tokenizer and data, and plan the stages. Raises a `MindprintError` for wrong input.

    `tell` hears what takes long, while it does. Settings that are `auto` are taken as if memory were no limit.
    """
    # With `auto`, the greatest need. `choose_settings` decides once the memory of that is known.
    file = with_most_memory(file)
    config = file.config
    model = models.resolve_model(config.model, file.folder)
    rows = read_rows(file)
    check_topics(rows, config)
    quizzes = _readable(read_quizzes(file))
    split = split_rows(rows, quizzes, config.data, _search_progress(tell) if tell else None)
    tokenizer = load_tokenizer(model.path, config.data.chat_template_kwargs)
    # Held-out rows are not rendered: nothing can train on them by mistake.
    rendered = {stage: objective.render(split.train, tokenizer, config.data) for stage, objective in OBJECTIVES.items()}
    _check_tokens([stage_rows.examples for stage_rows in rendered.values()], split, model, tokenizer, config)
    examples = {stage: by_topic(stage_rows.examples) for stage, stage_rows in rendered.items()}
    named = read_outline(file, list(dict.fromkeys(chain.from_iterable(examples.values()))))
    outline = named.chosen(config.curriculum.topics, config.curriculum.max_topics)
    plans = plan_run(config, outline.topics, _row_lengths(examples))
    start = _start(file, model)
    identity = _identity(config, model, tokenizer, rendered, start)
    probe = _probe(file, model, tokenizer, split.held_out.pairs)
    notes = (
        *_as_notices([*file.notes, *tokenizer.notes, *rows.notes, *_notes_of(rendered.values())]),
        *_as_notices(dict.fromkeys(chain.from_iterable(part.warnings for part in rendered.values())), warning=True),
        *_as_notices(_of_positions(model, examples, config), warning=True),
        *_as_notices(_of_topics(rows), warning=True),
        *_of_start(file, model),
        *_of_levels(config),
        *_of_split(split, quizzes, named),
        *_publishes(probe),
        Notice(_row_counts(config, split, rendered)),
    )
    people = read_background(file, training_voice(split.train, tokenizer.without_thoughts).own)
    return Prepared(file, model, tokenizer, examples, plans, identity, probe, split, outline, notes, start, people)


def _search_progress(tell: Callable[[Notice], None]) -> Callable[[int, int], None]:
    """Return a listener that says every few seconds how far the search for near-duplicate prompts is."""
    said = perf_counter()

    def on_progress(done: int, total: int) -> None:
        nonlocal said
        if perf_counter() - said > SECONDS_BETWEEN_NOTICES:
            said = perf_counter()
            tell(Notice(f"compares prompts for near-duplicates, for the split: {done / total:.0%} done"))

    return on_progress


def _check_tokens(
    stages: Iterable[Sequence[SftExample | PreferenceExample]],
    split: Split,
    model: models.ModelFolder,
    tokenizer: Tokenizer,
    config: Config,
) -> None:
    """Raise `DataError` for a token of data, prompts or padding that the base has no embedding for."""
    check_padding(model, tokenizer)

    check_token_ids(chain.from_iterable(map(placed_ids, stages)), model, tokenizer)
    check_token_ids(held_out_ids(split.held_out, tokenizer, config.data), model, tokenizer)


def lora_config(settings: AdapterConfig, sites: Sequence[AdapterSite]) -> LoraConfig:
    """Return the LoRA configuration that the settings mean on a base with these sites."""
    targets = resolve_targets(sites, settings.target_modules, settings.target_parameters)
    return LoraConfig(settings.r, settings.alpha, targets, settings.dropout, settings.use_rslora)


def initial_state(prepared: Prepared, sites: Sequence[AdapterSite]) -> TrainingState:
    """Return the state that training begins with: a new adapter, or the one that the configuration names."""
    settings = prepared.config.adapter
    lora = lora_config(settings, sites)
    if settings.start_from is not None and prepared.start is not None:
        return TrainingState(started_adapter(prepared.start, lora, Path(settings.start_from)))
    return TrainingState(initial_adapter(sites, lora, prepared.config.seed))


def write_facts(prepared: Prepared, placements: Sequence[Placement], folder: RunFolder) -> None:
    """Write config.yaml, split.json and manifest.json, before the run trains."""
    # The manifest comes last: a folder without one does not count as a run.
    atomic.write_text(folder.config, dump_config(portable(prepared.config_file, folder.path)))
    facts = prepared.split.facts
    folder.write_split(facts.trained, facts.held_out)
    folder.write_manifest(
        {
            "format": RUN_FORMAT,
            "mindprint": __version__,
            "hook_api": HOOK_API,
            # When it was started for the first time: a run that is resumed stays where it is among the others.
            "started": folder.started() or datetime.now(UTC).isoformat(timespec="microseconds"),
            "model": {"name": prepared.model.name, "revision": prepared.model.revision},
            "identity": dict(prepared.identity),
            "rows": {
                objective.rows: {topic: len(rows) for topic, rows in prepared.examples[stage].items()}
                for stage, objective in OBJECTIVES.items()
            },
            "order": prepared.order,
            "rows_from_memory": prepared.config.data.rows_digest,
            "splits": facts.stated(),
            "curriculum": prepared.outline.stated(),
            "stages": [
                {"topic": plan.topic, "stage": plan.stage, "steps": plan.steps, "backend": place.backend.name,
                 "device": place.device, "dtype": place.dtype}
                for plan, place in zip(prepared.plans, placements, strict=True)
            ],
            "environment": {place.backend.name: place.environment() for place in placements},
        }
    )  # fmt: skip


def _of_levels(config: Config) -> Iterator[Notice]:
    if idle := idle_settings(config):
        yield Notice(idle, warning=True)


def _readable(quizzes: Quizzes) -> Quizzes:
    """Raise `DataError` for a quiz that cannot be read: nothing tells which prompts it would hold out."""
    if quizzes.unreadable:
        first, *more = quizzes.unreadable
        raise DataError(f"{first} (and {len(more)} more)" if more else first)
    return quizzes


def _of_split(split: Split, quizzes: Quizzes, outline: Outline) -> Iterator[Notice]:
    for words in (*split.notes, *quizzes.without_references):
        yield Notice(words, warning=True)
    for topic in dict.fromkeys(question.topic for question in quizzes.questions):
        if topic not in outline.topics:
            yield Notice(
                f"the quiz of topic {topic!r} is not asked while training: no row has this topic", warning=True
            )
    if why := split.nothing_held_out():
        yield Notice(why)


def _start(file: ConfigFile, model: models.ModelFolder) -> AdapterState | None:
    if file.config.adapter.start_from is None:
        return None
    folder = file.resolve(file.config.adapter.start_from)
    start, _ = read_any_adapter(folder, model.path)
    for finding in copy_findings(folder, model):
        raise AdapterError(f"{folder}: {finding.message}; LoRA cannot continue from it")
    return start


def _of_start(file: ConfigFile, model: models.ModelFolder) -> Iterator[Notice]:
    if file.config.adapter.start_from is not None:
        note = unmatched_note(file.resolve(file.config.adapter.start_from), model.path)
        if note is not None:
            yield Notice(note)


def _probe(
    file: ConfigFile, model: models.ModelFolder, tokenizer: Tokenizer, heldout: Sequence[PreferenceRow]
) -> Probe:
    """Return the probe for the adapter's fingerprint."""
    if file.config.fingerprint.probe == "synthetic":
        return synthetic_probe(tokenizer, models.model_config(model.path))
    if not heldout:
        raise DataError(f"{file.source}: fingerprint.probe is heldout and there are no such pairs: add heldout.jsonl")
    return heldout_probe(render_preferences(heldout, tokenizer, file.config.data).examples)


def _publishes(probe: Probe) -> Iterator[Notice]:
    if probe.source == "heldout":
        words = (
            f"fingerprint.json will hold {len(probe.rows)} of your held-out rows: do not publish it with the adapter"
        )
        yield Notice(words, warning=True)


def _as_notices(texts: Iterable[str], *, warning: bool = False) -> Iterator[Notice]:
    # Stages share a tokenizer and say the same of it. It is told once.
    return (Notice(text, warning=warning) for text in dict.fromkeys(texts))


def _notes_of(rendered: Iterable[Rendered[Any]]) -> Iterator[str]:
    return chain.from_iterable(part.notes for part in rendered)


def _row_counts(config: Config, split: Split, rendered: Mapping[StageName, Rendered[Any]]) -> str:
    """Return one line that says what becomes of the rows: trained, cut, held out, left out."""
    parts = []
    for stage, objective in OBJECTIVES.items():
        kind = objective.rows
        shares = [getattr(topic, kind) for topic in split.facts.topics.values()]
        part = rendered[stage]
        explicit = sum(topic.explicit for topic in split.facts.topics.values()) if kind == "preferences" else 0
        held_out = sum(share.held_out for share in shares) + explicit
        trained = sum(share.train for share in shares) - part.left_out - part.same
        removed = sum(share.removed for share in shares)
        if not objective.settings(config).enabled and not held_out:
            continue
        counted = [
            f"{trained} trained",
            f"{part.cut} of them cut at data.max_length = {config.data.max_length} tokens" if part.cut else "",
            f"{held_out} held out",
            f"{part.left_out} left out (the prompt alone fills data.max_length)" if part.left_out else "",
            f"{part.same} left out (both answers are the same)" if part.same else "",
            f"{removed} left out (near held-out text)" if removed else "",
        ]
        parts.append(f"{ROW_NAMES[kind]}: {', '.join(filter(None, counted))}")
    return "; ".join(parts)


def _of_topics(rows: Rows) -> Iterator[str]:
    """Warn of topics that are about as many as rows: a column was taken for one that has a value for each row."""
    topics = {*count_topics(rows.sft), *count_topics(rows.preferences)}
    most = max(len(rows.sft), len(rows.preferences))
    if len(topics) >= MANY_TOPICS and len(topics) > most * TOPICS_PER_ROW:
        yield (
            f"there are {len(topics)} topics for {most} rows, and each is trained by itself with a new optimizer: "
            "if `topic` (data.topic) has another value in nearly each row, rename the column to train all together"
        )


def _of_positions(
    model: models.ModelFolder, examples: Mapping[StageName, Mapping[str, Sequence[Any]]], config: Config
) -> Iterator[str]:
    """Warn of rows that are longer than the base has positions for. Raise `DataError` if it cannot compute them."""
    positions = longest_sequence(model.path)
    if positions is None or positions >= config.data.max_length:
        return
    longer, first = 0, None
    for stage, topics in examples.items():
        for row in chain.from_iterable(topics.values()):
            if OBJECTIVES[stage].longest_sequence(row) > positions:
                longer, first = longer + 1, first or row.origin
    if first is None:
        return
    words = f"{longer} rows have more tokens than the base has positions for ({positions}), the first is {first}"
    if has_learned_positions(model.path):
        raise DataError(f"{words}: set data.max_length={positions}, or shorten them")
    yield f"{words}: the base never saw so long a text; set data.max_length={positions}, or shorten them"


def _row_lengths(examples: Mapping[StageName, Mapping[str, Sequence[Any]]]) -> RowLengths:
    return {
        stage: {
            topic: rows.sizes
            if isinstance(rows, Stored)
            else np.fromiter(map(OBJECTIVES[stage].token_count, rows), dtype=np.int32, count=len(rows))
            for topic, rows in topics.items()
        }
        for stage, topics in examples.items()
    }


SECTIONS_OF_IDENTITY: Mapping[str, Sequence[str]] = {
    "base model": ("model",),
    "tokenizer": ("model",),
    "chat template": ("model", "data"),
    "dataset": ("data",),
    "adapter configuration": ("adapter",),
    "training configuration": ("sft", "dpo", "curriculum", "evaluation", "seed", "data"),
}
"""The sections of the configuration that each part of a checkpoint's identity follows from."""


def _identity(
    config: Config,
    model: models.ModelFolder,
    tokenizer: Tokenizer,
    rendered: Mapping[StageName, Rendered[Any]],
    start: AdapterState | None,
) -> dict[str, str]:
    """Digest everything that a checkpoint depends on, part by part. A run continues only if all are the same."""
    dataset = hashlib.blake2b(digest_size=16)
    # In the order of the stages: the digest of old checkpoints depends on it.
    for stage, objective in OBJECTIVES.items():
        objective.update_digest(dataset, rendered[stage].examples)
    training: dict[str, Any] = {
        stage: objective.settings(config).model_dump(exclude=set(objective.may_change_on_resume))
        for stage, objective in OBJECTIVES.items()
    }
    # Checkpoints from before these settings existed do not have them.
    for name, default in (("pairs", "data"), ("iterations", 1)):
        if training["dpo"].get(name) == default:
            del training["dpo"][name]
    sections = {name: getattr(config, name).model_dump() for name in ("curriculum", "evaluation")}
    # The default as older versions wrote it: their checkpoints can still be continued.
    sections["evaluation"]["levels"] = ["final"] if config.evaluation.levels is None else config.evaluation.levels
    # The folder of an adapter to continue from may change. The adapter itself may not.
    adapter = config.adapter.model_dump(exclude={"start_from"})
    # Checkpoints from before the setting existed do not have it.
    if not config.adapter.target_parameters:
        del adapter["target_parameters"]
    if start is not None:
        adapter["start"] = adapter_digest(start)
    return {
        # A base that is packed at loading is another one.
        "base model": models.base_digest(model.path) + (f" {model.quantize}" if model.quantize else ""),
        "tokenizer": tokenizer.digest,
        "chat template": tokenizer.template_digest,
        "dataset": dataset.hexdigest(),
        "adapter configuration": _digest(adapter),
        "training configuration": _digest({**training, **sections, "seed": config.seed, **_grouping(config)}),
    }


def _grouping(config: Config) -> dict[str, int]:
    """Return the setting for batches by length, only if it is used: runs from before it existed keep their identity."""
    return {"length_window": config.data.length_window} if config.data.length_window > 1 else {}


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
