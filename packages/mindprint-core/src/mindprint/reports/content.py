"""The sections of a report, in order, from the record of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from mindprint.config import Config
from mindprint.contract import STAGES, StageName
from mindprint.reports import heldout
from mindprint.reports.advice import advice, topic_flags
from mindprint.reports.curves import boundaries, curves
from mindprint.reports.document import (
    Block,
    Bullets,
    Document,
    Dot,
    DotChart,
    LineChart,
    Paragraph,
    Section,
    Table,
)
from mindprint.reports.phrases import (
    MISSING,
    NONE,
    change,
    interval,
    listed,
    number,
    percent,
    plural,
    why_missing,
)
from mindprint.runs.reading import RunRecord, Step, finite
from mindprint.runs.records import Decision, EvaluationRecord, Figures, Interval
from mindprint.voice.preferences import FEW_PAIRS

LOOPS = "answers of mindprint generate that are loops"

STEP = "optimizer step of the run"

CANNOT_TELL = (
    "The score compares style and not content. It cannot tell whether an answer is true, and text by another writer of "
    "the same kind and time may score well too."
)


def contents(record: RunRecord) -> Document:
    """Return the whole report of a run."""
    sections = (
        Section("Result", tuple(_outcome(record))),
        Section("Learning curves", tuple(_learning(record))),
        Section("Rewards and margins", tuple(_rewards(record))),
        Section(f"{record.voice_name.capitalize()} by topic", tuple(_voice(record))),
        Section("Answers of both models", tuple(heldout.answers(record))),
        Section("Forgetting", tuple(heldout.forgetting(record))),
        Section("Copying", tuple(heldout.copying(record))),
        Section("Preferences and perplexity", tuple(heldout.preferences(record))),
        Section("Quizzes", tuple(heldout.quizzes(record))),
        Section("Decisions", tuple(_decisions(record))),
        Section("Problems, and what to try", tuple(_advice(record))),
        Section("Settings and versions", tuple(_settings(record))),
    )
    model = record.manifest.get("model", {}).get("name", "an unknown model")
    state = "" if record.complete else ", not complete"
    return Document(
        f"A voice for {model}",
        f"{record.name}{state}: {plural(len(record.topics), 'topic')}, {plural(len(record.steps), 'step')}",
        sections,
    )


def _outcome(record: RunRecord) -> Iterator[Block]:
    if not record.complete:
        yield Paragraph("This run is not complete. The report shows its state when the report was written.")
    if record.final:
        yield _figures(record.final.figures)
    yield Paragraph(" ".join([_voice_sentence(record), _topics_sentence(record), _copying_sentence(record)]))
    yield Paragraph("Not proven:")
    yield Bullets(tuple(_not_proven(record)))
    if record.broken:
        yield Paragraph("Could not be read:")
        yield Bullets(record.broken)


def _figures(figures: Figures) -> Table:
    rows: tuple[tuple[str, ...], ...] = (
        (f"{figures.voice_name} (0: base model, 1: the person)", interval(figures.base_voice), interval(figures.voice)),
        ("perplexity of held-out text", number(figures.base_perplexity, 1), number(figures.perplexity, 1)),
        ("words copied from the training text", NONE, percent(figures.copy_rate)),
        (f"reward accuracy on {plural(figures.pairs, 'held-out pair')}", NONE, percent(figures.reward_accuracy)),
    )
    if figures.loops is not None:
        rows = (*rows, (LOOPS, percent(figures.base_loops), percent(figures.loops)))
    if figures.questions:
        concepts = percent(figures.base_concept_coverage), percent(figures.concept_coverage)
        rows = (*rows, ("key concepts named in quizzes", *concepts))
    return Table("Figures at the end of the run", ("figure", "base model", "tuned model"), rows, frozenset({1, 2}))


def _voice_sentence(record: RunRecord) -> str:
    figures = record.final.figures if record.final else None
    if figures is None or figures.voice is None:
        return f"The voice {MISSING}: {why_missing(figures, 'voice')}."
    base = figures.base_voice
    before = f"from {interval(base)} before training " if base else ""
    verdict = _compared(figures.voice, base)
    people = f" Other people's text is at {interval(figures.people_voice)} on it." if figures.people_voice else ""
    failed = "".join(f" {plural(count, 'answer')}: {reason}." for reason, count in figures.no_text.items())
    if figures.people_missing:
        people = f" No verdict rests on it: {figures.people_missing}, and text of other people is far from that too."
    return (
        f"On a scale from 0 (the base model) to 1 (the person) the {figures.voice_name} went {before}to "
        f"{interval(figures.voice)} "
        f"after it: {verdict}. It was measured on {plural(figures.words, 'word')} of answers to "
        f"{plural(figures.prompts, 'held-out prompt')}. The 95 % interval is in brackets.{people}{failed}"
    )


def _compared(voice: Interval, base: Interval | None) -> str:
    # Without the base model's interval its voice is 0 by definition, and only the tuned interval counts.
    floor = base or Interval(0.0, 0.0, 0.0)
    if voice.low > floor.high:
        return "it rose, and more than by chance"
    if voice.high < floor.low:
        return "it fell below the base model's"
    return "the intervals overlap, so no change is shown"


def _topics_sentence(record: RunRecord) -> str:
    outcomes = {topic: record.outcome(topic) for topic in record.topics}
    counts = Counter(outcomes.values())
    named = {"failed": "failed", "not evaluated": MISSING, "not trained": "not trained"}
    parts = [f"{counts['passed']} passed"] if counts["passed"] else []
    if counts["measured"]:
        parts.append(f"{counts['measured']} measured, with no threshold set")
    for outcome, words in named.items():
        names = [record.title(topic) for topic, found in outcomes.items() if found == outcome]
        if names:
            parts.append(f"{len(names)} {words} ({listed(names)})")
    return f"Of {plural(len(outcomes), 'topic')}: {'; '.join(parts) or 'none was trained'}."


def _copying_sentence(record: RunRecord) -> str:
    figures = record.final.figures if record.final else None
    if figures is None or figures.copy_rate is None:
        return f"Copying {MISSING}: {why_missing(figures, 'copy_rate')}."
    flagged = [f"all topics together: {flag}" for flag in figures.flagged]
    flagged += [f"{record.title(topic)}: {flag}" for topic, flag in topic_flags(record)]
    if flagged:
        return f"Flagged: {listed(flagged, 3)}."
    return f"Nothing in the answers was flagged as copied or repeated ({percent(figures.copy_rate)} of the words)."


def _not_proven(record: RunRecord) -> Iterator[str]:
    final = record.final
    if final is None:
        yield "Anything about the finished adapter: the run has no final evaluation."
    else:
        figures = final.figures
        if figures.voice and figures.voice.low <= (figures.base_voice.high if figures.base_voice else 0.0):
            yield "That the voice changed at all: its interval reaches that of the base model."
        # Every figure that is missing is named, so that silence is never mistaken for a good result.
        for name, reason in figures.unmeasured.items():
            yield f"{name.replace('_', ' ').capitalize()}: {reason}."
        # Zero pairs give no accuracy, so there is nothing to read as a hint.
        if 0 < figures.pairs < FEW_PAIRS:
            yield f"Reward accuracy: only {plural(figures.pairs, 'held-out pair')}, so read them as hints."
    unclear = [record.title(topic) for topic in record.topics if record.outcome(topic) == "not evaluated"]
    if unclear and final is not None:
        yield f"The voice of {listed(unclear)}: {MISSING}, which is neither pass nor fail."
    yield CANNOT_TELL


def _learning(record: RunRecord) -> Iterator[Block]:
    if not record.steps:
        yield Paragraph("No step was taken.")
        return
    for stage in STAGES:
        label = f"{stage.upper()} loss"
        steps = [step for step in record.steps if step.stage == stage]
        lines = curves(record, stage, lambda step: step.loss, label, "first")
        if lines:
            # The description is also all that the Markdown report shows of the chart.
            yield LineChart(
                label,
                _loss_described(steps, label),
                _axis(stage),
                lines,
                _span(record, stage),
                boundaries(record, stage),
            )
        elif steps:
            yield Paragraph(f"{label}: none of {len(steps)} steps had a finite loss.")
    # A loss that is not finite has no place on a curve, so the reader is told how many there were.
    odd = len(record.steps) - len(finite(step.loss for step in record.steps))
    if odd:
        yield Paragraph(f"{plural(odd, 'step')} had a loss that is not finite, and the curves leave it out.")
    yield _stage_table(record)


def _loss_described(steps: Sequence[Step], label: str) -> str:
    kept = finite(step.loss for step in steps if not step.undone)
    undone = sum(step.undone for step in steps)
    marked = f"; {plural(undone, 'step')} rolled back, drawn dashed" if undone else ""
    ends = f" from {kept[0]:.3f} at the first to {kept[-1]:.3f} at the last" if kept else ""
    return f"{label} over {plural(len(steps), 'step')}{ends}{marked}. Each vertical line starts a topic or an attempt."


def _span(record: RunRecord, stage: StageName) -> tuple[float, float]:
    return 1.0, float(sum(step.stage == stage for step in record.steps))


def _axis(stage: StageName) -> str:
    return f"{stage.upper()} step"


def _stage_table(record: RunRecord) -> Table:
    # A stage that the manifest does not plan has no backend on record, and gets a dash.
    backends = {(stage.topic, stage.stage): stage.backend for stage in record.stages}
    rows = []
    # Neighbouring steps are grouped, not all equal ones: a retry or a roll-back starts a new row.
    for (topic, stage, attempt, undone), group in groupby(record.steps, key=lambda step: step.stretch):
        steps = list(group)
        rows.append(
            (
                record.title(topic),
                stage.upper() + (f", attempt {attempt}" if attempt > 1 else ""),
                backends.get((topic, stage), NONE),
                str(len(steps)),
                change(steps[0].loss, steps[-1].loss, 3),
                f"{sum(finite(step.seconds for step in steps)):.1f}",
                "rolled back" if undone else "kept",
            )
        )
    header = ("topic", "stage", "backend", "steps", "loss, first → last", "seconds", "state")
    return Table("Stages, in the order in which they ran", header, tuple(rows), frozenset({3, 4, 5}))


def _rewards(record: RunRecord) -> Iterator[Block]:
    lines = (
        *curves(record, "dpo", lambda step: step.reward_margin, "margin", "first", each_step=False),
        *curves(record, "dpo", lambda step: step.reward_chosen, "chosen", "second", each_step=False),
        *curves(record, "dpo", lambda step: step.reward_rejected, "rejected", "third", each_step=False),
    )
    if not lines:
        yield Paragraph("No preference step was taken." if not _has_dpo(record) else "No step has rewards.")
        return
    margins = finite(step.reward_margin for step in record.steps if step.stage == "dpo" and not step.undone)
    ends = f" The margin changes from {margins[0]:.3f} to {margins[-1]:.3f}." if margins else ""
    description = (
        "Mean rewards of a step's chosen and rejected answers, and the margin between them. A reward is beta times the "
        f"log-ratio of policy and reference.{ends}"
    )
    span, borders = _span(record, "dpo"), boundaries(record, "dpo")
    yield LineChart("Rewards and margins in DPO", description, _axis("dpo"), lines, span, borders)


def _has_dpo(record: RunRecord) -> bool:
    return any(step.stage == "dpo" for step in record.steps)


def _voice(record: RunRecord) -> Iterator[Block]:
    latest = [(topic, record.at_the_end(topic) or record.trained(topic)) for topic in record.topics]
    # A missing file and a file without topic evaluations have different causes, so the reason is looked up.
    if record.evaluations is None or not any(one for _, one in latest):
        yield Paragraph(f"The voice of no topic was evaluated: {_no_evaluations(record)}")
        return
    rows = [(record.title(topic), _dots(one)) for topic, one in latest]
    name, people = record.voice_name, None
    if record.final:
        rows.append(("all topics", _dots(record.final)))
        people = record.final.figures.people_voice
    if people:
        rows.append(("other people's text", (Dot("people", "second", people),)))
    yield DotChart(
        f"{name.capitalize()} by topic",
        f"For each topic the {name} of the base and of the tuned model's answers with 95 % intervals, between the "
        "floor, 0, and the ceiling, 1. The table below has the figures.",
        tuple(rows),
        (0.0, "base model"),
        (1.0, "the person"),
    )
    yield _voice_table(record)


def _dots(found: EvaluationRecord | None) -> tuple[Dot, ...]:
    figures = found.figures if found else None
    if figures is None or figures.voice is None:
        return (Dot("tuned", "first", None, f"{MISSING}: {why_missing(figures, 'voice')}"),)
    return (Dot("base", "third", figures.base_voice), Dot("tuned", "first", figures.voice))


def _voice_table(record: RunRecord) -> Table:
    rows = [_voice_row(record, topic) for topic in record.topics]
    if record.final:
        one = record.final
        rows.append(("all topics", interval(one.figures.base_voice), NONE, _scored(one), str(one.figures.words),
                     one.outcome, "; ".join(one.reasons)))  # fmt: skip
    header = ("topic", "base model", "after its training", "at the end", "words", "outcome", "why")
    title = f"{record.voice_name.capitalize()}, with 95 % intervals: 0 is the base model, 1 the person"
    return Table(title, header, tuple(rows),
                 frozenset({1, 2, 3, 4}))  # fmt: skip


def _voice_row(record: RunRecord, topic: str) -> tuple[str, ...]:
    # The outcome is that of the topic's own training. The final evaluation shows what later topics did to it.
    trained, ended = record.trained(topic), record.at_the_end(topic)
    latest = ended or trained
    figures = latest.figures if latest else Figures()
    outcome = record.outcome(topic)
    why = "; ".join((trained or latest).reasons) if (trained or latest) else "there was no evaluation"  # type: ignore[union-attr]
    if not why and outcome == "not evaluated":
        why = why_missing(figures, "voice")
    return (
        record.title(topic),
        interval(figures.base_voice) if latest else NONE,
        _scored(trained),
        _scored(ended),
        str(figures.words) if latest else NONE,
        outcome,
        why,
    )


def _scored(found: EvaluationRecord | None) -> str:
    return interval(found.figures.voice) if found else NONE


def _no_evaluations(record: RunRecord) -> str:
    if record.evaluations is None:
        return "the run has no evaluations.jsonl (it had no held-out text, or is older than evaluation in training)."
    return "its evaluations.jsonl has none of a topic."


def _decisions(record: RunRecord) -> Iterator[Block]:
    if not record.decisions:
        yield Paragraph("There were no decisions: no gate, threshold or roll-back applied.")
        return
    rows = tuple(
        (
            str(decision.step),
            record.title(decision.topic),
            (decision.stage or "").upper() or NONE,
            str(decision.attempt),
            decision.decision,
            _because(decision),
        )
        for decision in record.decisions
    )
    header = ("step", "topic", "stage", "attempt", "decision", "why")
    yield Table("Gates, retries, roll-backs and verdicts, in order", header, rows, frozenset({0, 3}))


def _because(decision: Decision) -> str:
    words = [decision.why] if decision.why else []
    if decision.first_step is not None and decision.last_step is not None:
        words.append(f"steps {decision.first_step} to {decision.last_step} undone")
    if decision.change:
        words.append("next: " + ", ".join(f"{name} × {factor:g}" for name, factor in decision.change.items()))
    return "; ".join(words)


def _advice(record: RunRecord) -> Iterator[Block]:
    advices = advice(record)
    if not advices:
        yield Paragraph("No problems were found.")
        return
    rows = tuple((item.symptom, item.remedy) for item in advices)
    yield Table("By symptom", ("symptom", "what to try"), rows)


def _settings(record: RunRecord) -> Iterator[Block]:
    facts = [("mindprint", str(record.manifest.get("mindprint", NONE)))]
    facts += [(f"model {key}", str(value)) for key, value in record.manifest.get("model", {}).items() if value]
    for backend, environment in record.manifest.get("environment", {}).items():
        facts += [(f"{backend}: {key}", str(value)) for key, value in environment.items()]
    facts += [(f"digest of {key}", str(value)) for key, value in record.manifest.get("identity", {}).items()]
    yield Table("Model, versions and machine", ("fact", "value"), tuple(facts))
    if record.config is not None:
        yield Table("Settings that are not the defaults", ("setting", "value"), tuple(_changed(record.config)))
    splits = record.manifest.get("splits")
    if isinstance(splits, Mapping):
        yield Table("How text was held out", ("fact", "value"), tuple(flattened(splits)))


def _changed(config: Config) -> Iterator[tuple[str, str]]:
    # Both sides are flattened to text in the same way, so comparing strings compares the settings.
    defaults = dict(flattened(Config().model_dump(mode="json")))
    for name, value in flattened(config.model_dump(mode="json")):
        if defaults.get(name) != value:
            yield name, value


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested settings as `section.name` and the value as text."""
    for name, value in values.items():
        # An empty section has no settings inside. It is kept as a value, so that it does not vanish from the table.
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "null" if value is None else str(value)
