"""Everything that can be wrong with a run's input, read and checked before any model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mindprint.adapter.formats import read_any_adapter
from mindprint.adapter.peft_format import adapter_digest
from mindprint.config import Config, ConfigFile
from mindprint.contract import AdapterState, StageName
from mindprint.curriculum.outline import Outline, read_outline
from mindprint.data.quizzes import Quizzes, read_quizzes
from mindprint.data.render import PreferenceExample, Rendered, SftExample, render_preferences, render_sft
from mindprint.data.rows import PreferenceRow, check_topics, read_rows
from mindprint.data.split import Split, split_rows
from mindprint.data.tokenizer import Tokenizer, load_tokenizer
from mindprint.errors import AdapterError, DataError
from mindprint.events import Notice
from mindprint.models import folder as models
from mindprint.training.plan import StagePlan, plan_run
from mindprint.training.reference import rows_digest
from mindprint.trust.adapters import copy_findings
from mindprint.trust.probe import Probe, heldout_probe, synthetic_probe


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs, read and checked before any model is loaded."""

    config_file: ConfigFile
    model: models.ModelFolder
    tokenizer: Tokenizer
    sft: Mapping[str, tuple[SftExample, ...]]
    preferences: Mapping[str, tuple[PreferenceExample, ...]]
    plans: tuple[StagePlan, ...]
    identity: Mapping[str, str]
    probe: Probe
    split: Split
    outline: Outline
    notes: tuple[Notice, ...]
    start: AdapterState | None = None
    """The adapter that training goes on from, if the configuration names one."""

    @property
    def config(self) -> Config:
        return self.config_file.config


def prepare(file: ConfigFile) -> Prepared:
    """Read model folder, tokenizer and data, and plan the stages. Raises a `MindprintError` for what is wrong."""
    config = file.config
    model = models.resolve_model(config.model, file.folder)
    rows = read_rows(file)
    check_topics(rows, config)
    quizzes = _readable(read_quizzes(file))
    split = split_rows(rows, quizzes, config.data)
    tokenizer = load_tokenizer(model.path)
    sft = render_sft(split.train.sft, tokenizer, config.data)
    preferences = render_preferences(split.train.preferences, tokenizer, config.data)
    by_topic = _by_topic(sft.examples), _by_topic(preferences.examples)
    named = read_outline(file, list(dict.fromkeys([*by_topic[0], *by_topic[1]])))
    outline = named.chosen(config.curriculum.topics, config.curriculum.max_topics)
    sft_rows, pairs = ({topic: len(rows) for topic, rows in stage.items()} for stage in by_topic)
    plans = plan_run(config, outline.topics, sft_rows, pairs, _lengths(*by_topic))
    start = _start(file, model)
    identity = _identity(config, model, tokenizer, sft.examples, preferences.examples, start)
    probe = _probe(file, model, tokenizer, split.held_out.pairs)
    notes = dict.fromkeys([*tokenizer.notes, *sft.notes, *preferences.notes, *_cuts(config, sft, preferences)])
    told = (*(Notice(note) for note in notes), *_of_split(split, quizzes, named), *_publishes(probe))
    return Prepared(file, model, tokenizer, *by_topic, plans, identity, probe, split, outline, told, start)


def _readable(quizzes: Quizzes) -> Quizzes:
    """Raises `DataError` for a quiz whose questions are unknown, so that nothing says what to hold out."""
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
        raise AdapterError(f"{folder}: {finding.message}; LoRA cannot go on from it")
    return start


def _probe(
    file: ConfigFile, model: models.ModelFolder, tokenizer: Tokenizer, heldout: Sequence[PreferenceRow]
) -> Probe:
    """What the adapter's fingerprint will be measured on."""
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


def _cuts(config: Config, *rendered: Rendered[Any]) -> Iterator[str]:
    """What `data.max_length` did to the rows, in words."""
    limit = f"data.max_length = {config.data.max_length}"
    if cut := sum(part.cut for part in rendered):
        yield f"rows longer than {limit} tokens, cut at their end: {cut}"
    if left_out := sum(part.left_out for part in rendered):
        yield f"rows left out because their prompt alone fills {limit} tokens: {left_out}"


def _by_topic(examples: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
    topics: dict[str, list[Any]] = {}
    for example in examples:
        topics.setdefault(example.topic, []).append(example)
    return {topic: tuple(rows) for topic, rows in topics.items()}


def _lengths(
    sft: Mapping[str, Sequence[SftExample]], preferences: Mapping[str, Sequence[PreferenceExample]]
) -> dict[tuple[str, StageName], list[int]]:
    """Tokens of each row, or of each pair's prompt and two completions, by topic and stage."""
    singles: dict[tuple[str, StageName], list[int]] = {
        (topic, "sft"): [len(row.tokens) for row in rows] for topic, rows in sft.items()
    }
    pairs: dict[tuple[str, StageName], list[int]] = {
        (topic, "dpo"): [len(row.prompt) + len(row.chosen) + len(row.rejected) for row in rows]
        for topic, rows in preferences.items()
    }
    return singles | pairs


def _identity(
    config: Config,
    model: models.ModelFolder,
    tokenizer: Tokenizer,
    sft: Sequence[SftExample],
    preferences: Sequence[PreferenceExample],
    start: AdapterState | None,
) -> dict[str, str]:
    """What a checkpoint belongs to, each part by digest; a run goes on only with the same."""
    rows = hashlib.blake2b(digest_size=16)
    for example in sft:
        rows.update(example.topic.encode() + example.tokens.tobytes() + example.loss_mask.tobytes())
    rows.update(rows_digest(preferences).encode())
    # How a step is computed may change when a run goes on; what it computes may not.
    stages = {name: getattr(config, name).model_dump(exclude={"backend", "share_prompts"}) for name in ("sft", "dpo")}
    stages |= {name: getattr(config, name).model_dump() for name in ("curriculum", "evaluation")}
    # Where an adapter to go on from lies may change; what it is may not.
    adapter = config.adapter.model_dump(exclude={"start_from"})
    if start is not None:
        adapter["start"] = adapter_digest(start)
    return {
        "base model": models.base_digest(model.path),
        "tokenizer": tokenizer.digest,
        "chat template": tokenizer.template_digest,
        "dataset": rows.hexdigest(),
        "adapter configuration": _digest(adapter),
        "training configuration": _digest({**stages, "seed": config.seed, **_grouping(config)}),
    }


def _grouping(config: Config) -> dict[str, int]:
    """Batches by length are another order; without them, a run is the one it was before there was such a setting."""
    return {"length_window": config.data.length_window} if config.data.length_window > 1 else {}


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
