"""Decisions from evaluations: pure functions of figures and settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mindprint.config import Config, CurriculumConfig, Level, Thresholds
from mindprint.contract import Generation
from mindprint.runs.records import Figures, Outcome

MOSTLY = 0.5
"""Share of broken answers above which a model counts as broken."""

REPEATED = 0.5
"""Share of an answer that must be the same token for it to be one repeated token, from `LONG_ENOUGH` tokens on."""

LONG_ENOUGH = 8


def judged(thresholds: Thresholds, figures: Figures) -> tuple[Outcome, tuple[str, ...]]:
    """Compare figures with thresholds.

    Returns:
        The outcome and its reasons: thresholds that were missed, then figures that were not measured. A figure that was
        not measured passes no threshold, and misses none.
    """
    missed, unknown = [], []
    for name, value, limit, at_least in _comparisons(thresholds, figures):
        if value is None:
            figure = name.removesuffix("_ratio")
            unknown.append(f"{name}: {figures.unmeasured.get(figure) or _why_unused(name, figures)}")
        elif value < limit if at_least else value > limit:
            missed.append(f"{name} {value:.2f}, {'at least' if at_least else 'at most'} {limit:g} wanted")
    # A missed threshold decides the outcome, whatever was not measured.
    if missed:
        return "failed", (*missed, *unknown)
    if unknown:
        return "not evaluated", tuple(unknown)
    # Without a threshold there is nothing to pass, so the outcome claims no more than a measurement.
    return ("passed" if thresholds.any_set else "measured"), ()


def _comparisons(thresholds: Thresholds, figures: Figures) -> Iterator[tuple[str, float | None, float, bool]]:
    rows = (
        ("voice", figures.voice.value if figures.voice and figures.people_voice else None, thresholds.voice, True),
        ("reward_accuracy", figures.reward_accuracy, thresholds.reward_accuracy, True),
        ("concept_coverage", figures.concept_coverage, thresholds.concept_coverage, True),
        ("copy_rate", figures.copy_rate, thresholds.copy_rate, False),
        ("perplexity_ratio", _perplexity_ratio(figures), thresholds.perplexity_ratio, False),
    )
    for name, value, limit, at_least in rows:
        if limit is not None:
            yield name, value, limit, at_least


def _why_unused(name: str, figures: Figures) -> str:
    # A distance from the base model is not a voice: text of anyone else is far from it as well.
    return figures.people_missing if name == "voice" and figures.voice else "was not measured"


def _perplexity_ratio(figures: Figures) -> float | None:
    """Return the perplexity divided by the base model's, or None if either is missing or both are infinite."""
    if figures.perplexity is None or not figures.base_perplexity:
        return None
    # Both perplexities are infinite if they are beyond a float. Their ratio is NaN, which would miss no threshold,
    # because every comparison with NaN is false.
    ratio = figures.perplexity / figures.base_perplexity
    return None if math.isnan(ratio) else ratio


def idle_settings(config: Config) -> str | None:
    """Return a sentence that names the settings that `evaluation.levels` leaves without an effect, None without such.

    Whoever names the levels means them: evaluation off is off, whatever else would need it.
    """
    evaluation, curriculum = config.evaluation, config.curriculum
    if evaluation.levels is None:
        return None
    levels: tuple[Level, ...] = ("topic", "chapter", "unit", "final")
    idle = [f"evaluation.{level}" for level in levels
            if evaluation.thresholds(level).any_set and not evaluation.happens(level)]  # fmt: skip
    if not evaluation.after_stages:
        idle += ["curriculum.retries"] if curriculum.retries else []
        idle += ["curriculum.roll_back"] if curriculum.roll_back else []
        idle += [] if isinstance(curriculum.dpo, str) else [f"curriculum.dpo={curriculum.dpo:g} (DPO always runs)"]
    if curriculum.stop_after is not None and not evaluation.happens(curriculum.stop_after):
        idle.append("curriculum.stop_after")
    if not idle:
        return None
    when = f"only at {', '.join(evaluation.levels)}" if evaluation.levels else "never"
    return f"the run is evaluated {when} (evaluation.levels), so these have no effect: {', '.join(idle)}"


def collapsed(figures: Figures, tuned: Sequence[Generation], base: Sequence[Generation]) -> tuple[str, ...]:
    """Return a sentence for each sign that training broke the model, and nothing for a sound model.

    The signs are empty answers, one repeated token, answers that are not text, and less voice than the base model has.
    An answer that was cut is none: how it would have ended is not known.
    """
    if not tuned:
        return ()
    signs = []
    # A base model that never learned to answer, or to stop, behaves in the same way. Then it was not training.
    empty, base_empty = (_share(len(answer.tokens) == 0 for answer in answers) for answers in (tuned, base))
    # An answer of whitespace or special tokens has tokens and no text. Only `figures.empty` counts it as empty.
    empty = max(empty, figures.empty or 0)
    if empty > MOSTLY >= base_empty:
        signs.append(f"{empty:.0%} of the answers are empty")
    repeated, base_repeated = (_share(_is_one_token(answer) for answer in answers) for answers in (tuned, base))
    if repeated > MOSTLY >= base_repeated:
        signs.append(f"{repeated:.0%} of the answers are one repeated token")
    broken, base_broken = (
        sum(counts.values()) / max(len(answers), 1)
        for counts, answers in ((figures.no_text, tuned), (figures.base_no_text, base))
    )
    # Empty answers and loops of one token fail these gates too. They are named once, by the plainest sign.
    if not signs and broken > MOSTLY >= base_broken:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in figures.no_text.items())
        signs.append(f"{broken:.0%} of the answers are not text ({reasons})")
    # 0 is the base model's voice. The whole interval must be below it, or chance would look like damage.
    if figures.voice is not None and figures.people_voice and figures.voice.high < 0:
        signs.append(f"the voice is below the base model's: {figures.voice.value:.2f}")
    return tuple(signs)


def dpo_runs(settings: CurriculumConfig, figures: Figures | None) -> tuple[bool, str]:
    """Return whether a topic's DPO runs after its SFT, and why. `figures` are None if the gate needs none."""
    gate = settings.dpo
    if isinstance(gate, str):
        return gate == "always", f"curriculum.dpo is {gate}"
    voice = figures.voice if figures and figures.people_voice else None
    if voice is None:
        why = figures.unmeasured.get("voice") or _why_unused("voice", figures) if figures else "was not measured"
        return True, f"the voice could not be evaluated ({why}), so nothing shows that DPO is not needed"
    if voice.value < gate:
        return True, f"voice {voice.value:.2f} after SFT is below {gate:g}"
    return False, f"voice {voice.value:.2f} after SFT has reached {gate:g}"


def _is_one_token(answer: Generation) -> bool:
    tokens = answer.tokens.tolist()
    # A short answer can repeat a token and be right.
    return len(tokens) >= LONG_ENOUGH and max(tokens.count(token) for token in set(tokens)) >= REPEATED * len(tokens)


def _share(facts: Iterator[bool]) -> float:
    values = list(facts)
    return sum(values) / len(values) if values else 0.0
