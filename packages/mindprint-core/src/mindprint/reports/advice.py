"""Advice on a run: each symptom with the figure that shows it, and a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mindprint.contract import STAGES, StageName
from mindprint.reports.phrases import interval, listed, number, percent, plural
from mindprint.runs.reading import RunRecord, finite
from mindprint.runs.records import Figures, Forgetting
from mindprint.sampling import ENOUGH_PENALTY
from mindprint.voice.copying import ALLOWED, LONG, SHORT
from mindprint.voice.scoring import MIN_SCORED_WORDS

LOW_VOICE = 0.5
"""A voice whose interval ends below this is nearer to the base model than to the person."""

FEW_STOP = 0.5
"""Share of answers that end by themselves below which most are cut off."""

MANY_LOOPS = 0.1
"""Share of answers that are loops from which on most people would notice."""

SUNK_REWARD = -1.0
"""Mean reward of the chosen answers in a stage's last steps. Below it DPO lowers the answers that it should raise."""

# One step's reward is noisy, so the mean over the last ten is judged instead.
LAST = 10


@dataclass(frozen=True)
class Advice:
    """A symptom, and a remedy for it."""

    symptom: str
    remedy: str


def advice(record: RunRecord) -> tuple[Advice, ...]:
    """Return all advice on a run, the worst problem first."""
    figures = record.final.figures if record.final else Figures()
    # The order is that of severity: what makes the other figures meaningless comes first.
    return (
        *_broken_steps(record),
        *_collapse(record),
        *_not_evaluated(record),
        *_copying(record, figures),
        *_voice(figures),
        *_failed(record),
        *_forgotten(record),
        *_answers(figures),
        *_loops(record, figures),
        *_preferences(record, figures),
        *_knowledge(figures),
    )


def forgotten(record: RunRecord) -> tuple[Forgetting, ...]:
    """Return earlier topics whose voice, when last measured, was below its interval right after training."""
    # A later evaluation of the same topic replaces the earlier one, because a dict keeps the last value of a key.
    latest = {earlier.topic: earlier for evaluation in record.evaluations or () for earlier in evaluation.earlier}
    return tuple(
        topic
        for topic in latest.values()
        # Intervals that overlap could differ by chance, so only a gap between them counts as forgetting.
        if topic.voice_then and topic.voice_now and topic.voice_now.high < topic.voice_then.low
    )


def _broken_steps(record: RunRecord) -> Iterator[Advice]:
    odd = len(record.steps) - len(finite(step.loss for step in record.steps))
    if odd:
        yield Advice(
            f"{plural(odd, 'step')} had no finite loss",
            "compute in float32 (backend.dtype=float32), or lower the stage's learning_rate and max_grad_norm",
        )
    skipped = sum(step.skipped for step in record.steps)
    # Loss scaling skips a few steps by design while it looks for its scale. Only more than 5 % is a problem.
    if skipped > max(2, len(record.steps) // 20):
        yield Advice(
            f"{plural(skipped, 'step')} of {len(record.steps)} were skipped because float16 overflowed",
            "use backend.dtype=bfloat16 or float32",
        )


def _collapse(record: RunRecord) -> Iterator[Advice]:
    for stage in STAGES:
        collapses = [
            evaluation for evaluation in record.evaluations or () if evaluation.stage == stage and evaluation.collapse
        ]
        if collapses:
            # Retries make one topic collapse several times. Its name is needed once.
            names = listed(list(dict.fromkeys(record.title(collapse.name) for collapse in collapses)))
            yield Advice(
                f"the answers collapsed in {stage.upper()} of {names}: {'; '.join(collapses[0].collapse)}",
                f"lower {stage}.learning_rate{_halved(record, stage)}, or train fewer {_length(record, stage)}",
            )


def _halved(record: RunRecord, stage: StageName) -> str:
    if record.config is None:
        return ""
    rate = getattr(record.config, stage).learning_rate
    return f" (it was {rate:g}; try {rate / 2:g})"


def _length(record: RunRecord, stage: StageName) -> str:
    by_steps = record.config is not None and getattr(record.config, stage).steps_per_topic is not None
    return f"steps ({stage}.steps_per_topic)" if by_steps else f"epochs ({stage}.epochs_per_topic)"


def _not_evaluated(record: RunRecord) -> Iterator[Advice]:
    if record.evaluations is None:
        yield Advice(
            "nothing was evaluated: the run has no evaluations",
            "give it held-out text: heldout.jsonl, or more rows for the split to hold some out; "
            "`mindprint eval` measures a finished run",
        )
        return
    for topic in record.topics:
        # The final evaluation is preferred, because it measures the adapter that is used.
        found = record.at_the_end(topic) or record.trained(topic)
        if found is None or found.figures.voice is not None:
            continue
        reason = found.figures.unmeasured.get("voice") or "; ".join(found.reasons) or "no reason was recorded"
        yield Advice(f"{record.title(topic)} could not be evaluated: {reason}", _more_text(found.figures))


def _more_text(figures: Figures) -> str:
    lacking = MIN_SCORED_WORDS - figures.words
    if lacking > 0:
        return (
            f"a score needs {MIN_SCORED_WORDS} words of answers to held-out prompts and there were {figures.words}: "
            f"hold out prompts for at least {lacking} more words"
        )
    return "fix the cause that the reason names, then evaluate again with `mindprint eval`"


def topic_flags(record: RunRecord) -> tuple[tuple[str, str], ...]:
    """Return the flags on each topic's answers, from its latest evaluation."""
    latest = [(topic, record.at_the_end(topic) or record.trained(topic)) for topic in record.topics]
    return tuple((topic, flag) for topic, evaluation in latest if evaluation for flag in evaluation.figures.flagged)


def _copying(record: RunRecord, figures: Figures) -> Iterator[Advice]:
    flagged = [("all topics together", flag) for flag in figures.flagged]
    flagged += [(record.title(topic), flag) for topic, flag in topic_flags(record)]
    for where, flag in flagged:
        # The flags are sentences. The phrases below are the ones that `voice.copying` writes.
        if "recites" in flag:
            yield Advice(
                f"{where}: {flag}; a high voice proves nothing in this case",
                "train fewer epochs (sft.epochs_per_topic), or give more and more varied text",
            )
        elif "repeat each other" in flag:
            yield Advice(f"{where}: {flag}", "train fewer epochs, and vary the prompts and their answers in the data")


def _voice(figures: Figures) -> Iterator[Advice]:
    voice, base = figures.voice, figures.base_voice
    if voice is None or figures.people_missing:
        return
    # The person repeats phrases too, so copying counts only above the person's own rate.
    copied = figures.copy_rate is not None and figures.copy_rate > (figures.person_copy_rate or 0.0) + ALLOWED
    if voice.high < LOW_VOICE and copied:
        yield Advice(
            f"the voice is low, {interval(voice)}, though {percent(figures.copy_rate)} of the words are copied",
            "it learned texts rather than a voice: fewer epochs, or more text",
        )
    # On the run's scale the base model is 0 by definition, hence the default.
    elif voice.low <= (base.high if base else 0.0):
        yield Advice(
            f"the voice, {interval(voice)}, is not above the base model's by more than chance",
            "train longer or at a higher sft.learning_rate while the SFT loss still falls; otherwise raise adapter.r, "
            "or give more text",
        )


def _failed(record: RunRecord) -> Iterator[Advice]:
    for topic in record.topics:
        if record.outcome(topic) != "failed":
            continue
        found = record.trained(topic) or record.at_the_end(topic)
        reasons = "; ".join(found.reasons) if found else ""
        yield Advice(
            f"{record.title(topic)} failed" + (f": {reasons}" if reasons else ""),
            "give this topic more rows; where its SFT loss still falls at the end, more epochs; where the answers read "
            "well, its threshold is set too high",
        )


def _forgotten(record: RunRecord) -> Iterator[Advice]:
    found = forgotten(record)
    if found:
        names = listed([record.title(topic.topic) for topic in found])
        yield Advice(
            f"forgotten since it was trained: {names}",
            "lower the learning rates of later topics, train them fewer epochs, or mix rows of earlier topics in",
        )


def _answers(figures: Figures) -> Iterator[Advice]:
    if figures.stopped is not None and figures.stopped < FEW_STOP:
        yield Advice(
            # An answer that does not end is often the fault of cut rows: their end token was removed with their tail.
            f"only {percent(figures.stopped)} of the answers end by themselves",
            "raise generation.max_new_tokens; if they still do not end, check that no row was cut at "
            "data.max_length, which takes away the end that it should learn",
        )
    if figures.empty:
        yield Advice(f"{percent(figures.empty)} of the answers are empty", "look for rows with very short completions")
    if figures.length is not None and not SHORT <= figures.length <= LONG:
        yield Advice(
            f"answers are {number(figures.length)} times as long as the person's",
            "check that the training rows are as long as the answers that you want",
        )


def _loops(record: RunRecord, figures: Figures) -> Iterator[Advice]:
    if figures.loops is not None and figures.loops >= MANY_LOOPS:
        penalty = record.config.generation.repetition_penalty if record.config else 1.0
        yield Advice(
            loops_found(figures.loops, figures.base_loops),
            f"set generation.repetition_penalty={ENOUGH_PENALTY:g}: no training is needed"
            if penalty < ENOUGH_PENALTY
            else "draw the answers (generation.temperature=0.7), or train fewer epochs",
        )


def loops_found(loops: float, base: float | None) -> str:
    """Return a sentence on the share of answers that are loops, of the tuned model and of the base model."""
    return f"{percent(loops)} of the answers of mindprint generate are loops (of the base model's {percent(base)})"


def _preferences(record: RunRecord, figures: Figures) -> Iterator[Advice]:
    # Chance is one half: a pair is either ranked right or wrong.
    if figures.reward_accuracy is not None and figures.reward_accuracy < 0.5:
        yield Advice(
            f"reward accuracy on held-out pairs is only {percent(figures.reward_accuracy)}",
            "check that chosen and rejected are not swapped in the data; if not, raise dpo.learning_rate or its steps",
        )
    # Steps that were rolled back left no trace in the adapter, so they say nothing about its state.
    last = [step for step in record.steps if step.stage == "dpo" and not step.undone][-LAST:]
    chosen = finite(step.reward_chosen for step in last)
    if chosen and sum(chosen) / len(chosen) < SUNK_REWARD:
        yield Advice(
            f"at the end of DPO the chosen answers had become less likely (reward {number(sum(chosen) / len(chosen))})",
            "lower dpo.learning_rate or its steps, or keep them likely with dpo.sft_weight",
        )


def _knowledge(figures: Figures) -> Iterator[Advice]:
    before, after = figures.base_perplexity, figures.perplexity
    if before is not None and after is not None and after > before:
        yield Advice(
            f"the person's held-out text became more surprising: perplexity {number(before, 1)} → {number(after, 1)}",
            "it memorised the rows: fewer epochs or a lower sft.learning_rate",
        )
    had, has = figures.base_concept_coverage, figures.concept_coverage
    if had is not None and has is not None and has < had:
        yield Advice(
            f"quizzes: fewer key concepts than before training, {percent(had)} → {percent(has)}",
            "give rows that state these facts in the person's words",
        )
