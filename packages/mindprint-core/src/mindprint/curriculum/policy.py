"""What follows from an evaluation: pure functions from figures and settings to outcomes and decisions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mindprint.config import CurriculumConfig, Thresholds
from mindprint.contract import Generation
from mindprint.runs.records import Figures, Outcome

MOSTLY = 0.5
"""The share of answers that must be broken for the model to be."""

REPEATED = 0.5
"""An answer is one repeated token if this share of it is, and it has at least `LONG_ENOUGH` tokens."""

LONG_ENOUGH = 8

STOPS, NEVER_STOPS = 0.5, 0.1
"""A model that stopped by itself at least this often, and a tuned one that does so at most that often."""


def judged(thresholds: Thresholds, figures: Figures) -> tuple[Outcome, tuple[str, ...]]:
    """Hold figures against thresholds. What is missed is named first; a figure that could not be had passes nothing."""
    missed, unknown = [], []
    for name, value, limit, at_least in _held_against(thresholds, figures):
        if value is None:
            figure = name.removesuffix("_ratio")
            unknown.append(f"{name}: {figures.unmeasured.get(figure, 'was not measured')}")
        elif value < limit if at_least else value > limit:
            missed.append(f"{name} {value:.2f}, {'at least' if at_least else 'at most'} {limit:g} wanted")
    if missed:
        return "failed", (*missed, *unknown)
    if unknown:
        return "not evaluated", tuple(unknown)
    return ("passed" if thresholds.any_set else "measured"), ()


def _held_against(thresholds: Thresholds, figures: Figures) -> Iterator[tuple[str, float | None, float, bool]]:
    rows = (
        ("voice", figures.voice.value if figures.voice else None, thresholds.voice, True),
        ("reward_accuracy", figures.reward_accuracy, thresholds.reward_accuracy, True),
        ("concept_coverage", figures.concept_coverage, thresholds.concept_coverage, True),
        ("copy_rate", figures.copy_rate, thresholds.copy_rate, False),
        ("perplexity_ratio", _ratio(figures), thresholds.perplexity_ratio, False),
    )
    for name, value, limit, at_least in rows:
        if limit is not None:
            yield name, value, limit, at_least


def _ratio(figures: Figures) -> float | None:
    """Perplexity over the base model's; None where either is missing, or both are beyond a float."""
    if figures.perplexity is None or not figures.base_perplexity:
        return None
    ratio = figures.perplexity / figures.base_perplexity
    return None if math.isnan(ratio) else ratio


def collapsed(figures: Figures, tuned: Sequence[Generation], base: Sequence[Generation]) -> tuple[str, ...]:
    """Name each sign that training broke the model: empty answers, one repeated token, no end, less voice than before.

    An base model that answers so itself (a base that never learned to answer, or to stop) is not broken by training.
    """
    found = []
    if not tuned:
        return ()
    empty, empty_before = (_share(len(one.tokens) == 0 for one in side) for side in (tuned, base))
    empty = max(empty, figures.empty or 0)
    if empty > MOSTLY >= empty_before:
        found.append(f"{empty:.0%} of the answers are empty")
    repeated, repeated_before = (_share(_one_token(one) for one in side) for side in (tuned, base))
    if repeated > MOSTLY >= repeated_before:
        found.append(f"{repeated:.0%} of the answers are one repeated token")
    stopped, before = (_share(one.stop_reason == "stop" for one in side) for side in (tuned, base))
    if before >= STOPS and stopped <= NEVER_STOPS:
        found.append(f"the answers no longer stop by themselves ({stopped:.0%}; base model {before:.0%})")
    if figures.voice is not None and figures.voice.high < 0:
        found.append(f"the voice is below the base model's: {figures.voice.value:.2f}")
    return tuple(found)


def _one_token(answer: Generation) -> bool:
    tokens = answer.tokens.tolist()
    return len(tokens) >= LONG_ENOUGH and max(tokens.count(token) for token in set(tokens)) >= REPEATED * len(tokens)


def _share(found: Iterator[bool]) -> float:
    values = list(found)
    return sum(values) / len(values) if values else 0.0


def dpo_runs(settings: CurriculumConfig, figures: Figures | None) -> tuple[bool, str]:
    """Whether a topic's DPO runs after its SFT, and why. `figures` are None where the gate needs none."""
    gate = settings.dpo
    if isinstance(gate, str):
        return gate == "always", f"curriculum.dpo is {gate}"
    voice = figures.voice if figures else None
    if voice is None:
        why = figures.unmeasured.get("voice", "was not measured") if figures else "was not measured"
        return True, f"the voice could not be evaluated ({why}), so nothing says that DPO is not needed"
    if voice.value < gate:
        return True, f"voice {voice.value:.2f} after SFT is below {gate:g}"
    return False, f"voice {voice.value:.2f} after SFT has reached {gate:g}"
