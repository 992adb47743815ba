"""Records of evaluations and decisions, as the lines of evaluations.jsonl, decisions.jsonl and answers.jsonl.

Neither kind of line has a `loss`: that belongs to metrics.jsonl alone. A figure that is not available is None, and
`unmeasured` says why by the figure's name; it is never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mindprint.config import Level
from mindprint.contract import StageName
from mindprint.input_files import typed

Outcome = Literal["measured", "passed", "failed", "not evaluated"]
"""`measured`: no threshold was set. `not evaluated`: one could not be applied. It neither passed nor failed."""

DecisionKind = Literal["skip", "train", "roll back", "retry", "pass", "fail", "not evaluated", "stop"]
"""`skip` and `train` are the gate's, about a topic's DPO stage. The others are about a stage, a topic or the run."""

VERDICTS: Mapping[Outcome, DecisionKind] = {"passed": "pass", "failed": "fail", "not evaluated": "not evaluated"}
"""The decision that follows from a topic's outcome."""

OUTCOMES: Mapping[DecisionKind, Outcome] = {decision: outcome for outcome, decision in VERDICTS.items()}
"""The outcome that a verdict means."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """The figures of an evaluation: of answers to held-out prompts, and of held-out texts and pairs.

    Voices lie on the run's scale: 0 the base model, 1 the person. Shares are 0 to 1, margins in nats, lengths in
    words over the person's. `base_` and `person_` figures are those of the base model and of the person's own
    held-out texts. All others are the tuned model's. `stopped` is the share of answers that ended by themselves,
    `empty` the share without a word. `reward_accuracy` and `reward_margin` say in what share of pairs, and by how much,
    training raised the chosen answer more than the rejected one (`voice.preferences.PairFigures`).
    `people_voice` is other people's text on the scale. Without it `voice` is only the distance from the base model.
    `no_text` counts the answers that failed a gate by reason, `base_no_text` the base model's. Each prompt has
    `answers_per_prompt` answers. `loops` is the share of loops among answers with the settings of `generation`, and
    `base_loops` the base model's. They are measured at the end of a run and by `mindprint eval`.
    docs/glossary.md defines every figure.
    """

    prompts: int = 0
    words: int = 0
    voice: Interval | None = None
    base_voice: Interval | None = None
    person_voice: Interval | None = None
    copy_rate: float | None = None
    person_copy_rate: float | None = None
    longest_copy: int | None = None
    longest_copy_text: str | None = None
    recited: float | None = None
    self_bleu: float | None = None
    person_self_bleu: float | None = None
    length: float | None = None
    stopped: float | None = None
    empty: float | None = None
    pairs: int = 0
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    perplexity: float | None = None
    base_perplexity: float | None = None
    questions: int = 0
    concept_coverage: float | None = None
    base_concept_coverage: float | None = None
    flagged: tuple[str, ...] = ()
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    # Added after version 1 of the hook API was written down, so at the end.
    people_voice: Interval | None = None
    no_text: Mapping[str, int] = field(default_factory=dict)
    base_no_text: Mapping[str, int] = field(default_factory=dict)
    answers_per_prompt: int = 1
    loops: float | None = None
    base_loops: float | None = None

    @property
    def voice_name(self) -> str:
        """Return the name of `voice`: it is a voice only if it was told from people."""
        return "voice" if self.people_voice else BASE_DISTANCE

    @property
    def people_missing(self) -> str:
        """Return why no verdict rests on `voice`, empty where one may."""
        return "" if self.people_voice else NO_PEOPLE

    # Trackers that were written before the names changed read these figures of the events that they receive.

    @property
    def untuned_voice(self) -> Interval | None:
        """Return `base_voice`, which had this name."""
        return self.base_voice

    @property
    def preference_accuracy(self) -> float | None:
        """Return `reward_accuracy`, which had this name."""
        return self.reward_accuracy

    @property
    def preference_margin(self) -> float | None:
        """Return `reward_margin`, which had this name."""
        return self.reward_margin

    @property
    def untuned_perplexity(self) -> float | None:
        """Return `base_perplexity`, which had this name."""
        return self.base_perplexity

    @property
    def untuned_concept_coverage(self) -> float | None:
        """Return `base_concept_coverage`, which had this name."""
        return self.base_concept_coverage


BASE_DISTANCE = "distance from the base model"

NO_PEOPLE = "without voice.background it is only the distance from the base model"

OLD_FIGURES: Mapping[str, str] = {
    "preference_accuracy": "reward_accuracy",
    "preference_margin": "reward_margin",
    "untuned_voice": "base_voice",
    "untuned_perplexity": "base_perplexity",
    "untuned_concept_coverage": "base_concept_coverage",
}
"""Figures by the names that older runs wrote them under, and by their present names."""


@dataclass(frozen=True)
class Forgetting:
    """An earlier topic: right after it was trained, and now."""

    topic: str
    voice_then: Interval | None
    voice_now: Interval | None
    perplexity_then: float | None
    perplexity_now: float | None


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation: a line of evaluations.jsonl.

    `name`: the topic's, chapter's or unit's id, `""` for `final`. `stage`: the stage of the topic that it followed;
    None for the other levels. `step`: optimizer steps of the run before it. `reasons`: thresholds missed, or why it
    could not be evaluated. `collapse`: the signs in the answers that the model is broken, mostly none.
    `earlier`: for units, each topic trained before the unit's last one.
    """

    level: Level
    name: str
    step: int
    stage: StageName | None = None
    attempt: int = 1
    outcome: Outcome = "measured"
    reasons: tuple[str, ...] = ()
    collapse: tuple[str, ...] = ()
    figures: Figures = Figures()
    earlier: tuple[Forgetting, ...] = ()


@dataclass(frozen=True)
class Decision:
    """A decision, written before it is acted on: a line of decisions.jsonl.

    `first_step` and `last_step`: the optimizer steps of the run (from 1, inclusive) that a roll-back or a retry undid;
    they stay in metrics.jsonl. `change`: factors of the next attempt (`{"learning_rate": 0.5}`).
    """

    decision: DecisionKind
    step: int
    topic: str
    why: str
    stage: StageName | None = None
    attempt: int = 1
    first_step: int | None = None
    last_step: int | None = None
    change: Mapping[str, float] | None = None


@dataclass(frozen=True)
class AnswerRecord:
    """A held-out prompt with all three answers: a line of answers.jsonl, written by the final evaluation.

    `person` is the person's own text; for a quiz the first reference answer, and `missing` lists the key concepts that
    the tuned model's answer lacks. `cut` names the models (`base`, `tuned`) whose answer was cut at the longest length.
    A prompt with several answers has a line for each, `draw` 0 for the first.
    """

    topic: str
    prompt: str
    person: str
    base: str
    tuned: str
    quiz: bool = False
    missing: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    draw: int = 0


def evaluation_from(line: Mapping[str, Any]) -> EvaluationRecord:
    """Return an `EvaluationRecord` from its line as parsed. Raises `ValueError` if it is not one."""
    figures = _with_present_names(line.get("figures"), OLD_FIGURES)
    # The reasons are keyed by the figures' names, so they need the same renaming.
    if isinstance(figures, dict) and "unmeasured" in figures:
        figures["unmeasured"] = _with_present_names(figures["unmeasured"], OLD_FIGURES)
    return typed(EvaluationRecord, {**line, "figures": figures})


def decision_from(line: Mapping[str, Any]) -> Decision:
    """Return a `Decision` from its line as parsed. Raises `ValueError` if it is not one."""
    return typed(Decision, line)


def answer_from(line: Mapping[str, Any]) -> AnswerRecord:
    """Return an `AnswerRecord` from its line as parsed. Raises `ValueError` if it is not one."""
    return typed(AnswerRecord, _with_present_names(line, {"untuned": "base"}))


def as_line(record: EvaluationRecord | Decision | AnswerRecord) -> dict[str, Any]:
    """Return a record as the JSON object of its line. The `*_from` of its kind reads it back."""
    return asdict(record)


def _with_present_names(values: object, names: Mapping[str, str]) -> object:
    """Return a mapping with the keys of older versions renamed. Anything else is left for `typed` to refuse."""
    if not isinstance(values, Mapping):
        return values
    return {names.get(name, name): value for name, value in values.items()}
