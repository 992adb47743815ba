"""The equivalence of two runs of one configuration on different backends, and their differences.

`equivalent` means that every loss agrees within its tolerance (docs/numerics.md) and, where the voice could be scored,
that the scores are within `VOICE_TOLERANCE` of the scale. Adapters, answers and costs are shown
and do not decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median

import numpy as np

from mindprint.adapter.peft_format import read_adapter
from mindprint.contract import AdapterState, StageName
from mindprint.errors import RunError
from mindprint.reports.phrases import why_missing
from mindprint.runs.costs import Costs, read_costs
from mindprint.runs.folder import RunFolder
from mindprint.runs.reading import RunRecord, Step, Stretch
from mindprint.runs.records import Interval
from mindprint.tolerances import FREE_TOLERANCE, SFT_TOLERANCE, VOICE_TOLERANCE


@dataclass(frozen=True)
class Side:
    """One run. Seconds per step are medians, by stage. `voice` is None if it was not scored, for `voice_missing`."""

    name: str
    run: str
    backend: str
    dtype: str
    costs: Costs | None
    step_seconds: Mapping[StageName, float]
    voice: Interval | None
    voice_missing: str
    voice_name: str = "voice"


@dataclass(frozen=True)
class StageCurves:
    """A stage's losses on both sides, step by step, and their greatest deviation |a - b| / (1 + a)."""

    topic: str
    stage: StageName
    attempt: int
    undone: bool
    first_step: int
    losses: tuple[tuple[float, ...], tuple[float, ...]]
    greatest: float
    tolerance: float

    @property
    def within(self) -> bool:
        return self.greatest <= self.tolerance


@dataclass(frozen=True)
class AdapterDifference:
    """The difference of two adapters.

    `change` is the Frobenius norm of the difference of scale * B @ A over all sites, divided by that of the first.
    `greatest` is the greatest absolute difference of an element of any A or B.
    """

    change: float
    greatest: float


@dataclass(frozen=True)
class Answers:
    """A held-out prompt with the tuned answer of both sides."""

    prompt: str
    texts: tuple[str, str]

    @property
    def identical(self) -> bool:
        return self.texts[0] == self.texts[1]


@dataclass(frozen=True)
class Comparison:
    """Two runs compared. `beyond` names every reason why they are not equivalent, and is empty if they are.

    `answers` is None if a run has no answers.jsonl.
    """

    sides: tuple[Side, Side]
    stages: tuple[StageCurves, ...]
    adapter: AdapterDifference
    answers: tuple[Answers, ...] | None
    voice_difference: float | None
    beyond: tuple[str, ...]

    @property
    def equivalent(self) -> bool:
        return not self.beyond


def compare(first: RunRecord, other: RunRecord) -> Comparison:
    """Compare two complete runs. Raises `RunError` if one is not complete, or if their inputs differ."""
    for record in (first, other):
        if not record.complete:
            raise RunError(f"{record.path}: is not complete; continue it with: mindprint train {record.path} --resume")
    # Losses of different inputs differ for good reason, so they are refused before anything is compared.
    require_same(first, other)
    names = _names(first, other)
    sides = _side(first, names[0]), _side(other, names[1])
    stages, uneven = _stages(first, other)
    first_voice, other_voice = (side.voice for side in sides)
    # A missing score is neither equal nor different. It is left out of the verdict, and the result names the reason.
    voice = None if first_voice is None or other_voice is None else other_voice.value - first_voice.value
    return Comparison(
        sides, stages, _adapters(first, other), _answers(first, other), voice,
        (*_precision(sides), *uneven, *_losses(stages), *_voices(sides[0].voice_name, voice)),
    )  # fmt: skip


def require_same(first: RunRecord, other: RunRecord) -> None:
    """Raise `RunError` naming the inputs that differ: base, tokenizer, template, data, adapter or configuration."""
    # The digests in the manifest are compared and not the paths: copies of the same data are the same input.
    ours, others = (dict(record.manifest.get("identity", {})) for record in (first, other))
    differing = [part for part in {**ours, **others} if ours.get(part) != others.get(part)]
    if differing:
        raise RunError(
            f"{first.path} and {other.path} differ in {' and '.join(differing)}: only runs of the same base, data and "
            "configuration can be compared (`mindprint eval --compare` shows any runs side by side)"
        )


def _names(first: RunRecord, other: RunRecord) -> tuple[str, str]:
    """Return the backends' names, or the runs' paths where both used the same backend."""
    backends = _backend(first), _backend(other)
    # Two columns with the same name could not be told apart.
    return backends if backends[0] != backends[1] else (str(first.path), str(other.path))


def _backend(record: RunRecord) -> str:
    return " and ".join(dict.fromkeys(stage.backend for stage in record.stages))


def _side(record: RunRecord, name: str) -> Side:
    figures = record.final.figures if record.final else None
    seconds: dict[StageName, list[float]] = {}
    for step in record.steps:
        seconds.setdefault(step.stage, []).append(step.seconds)
    return Side(
        name=name,
        run=str(record.path),
        backend=_backend(record),
        dtype=" and ".join(dict.fromkeys(stage.dtype for stage in record.stages)),
        costs=read_costs(record.path),
        # The first steps include warm-up and compilation. The median ignores such outliers, and the mean does not.
        step_seconds={stage: median(found) for stage, found in seconds.items()},
        voice=figures.voice if figures else None,
        voice_missing="" if figures and figures.voice else why_missing(figures, "voice"),
        voice_name=record.voice_name,
    )


def _stages(first: RunRecord, other: RunRecord) -> tuple[tuple[StageCurves, ...], list[str]]:
    """Return the stages that both runs trained, in order, and a sentence for each that has other steps."""
    ours, other_steps = _by_stage(first.steps), _by_stage(other.steps)
    curves, uneven, free = [], [], False
    for key, steps in ours.items():
        topic, stage, attempt, undone = key
        # From the first DPO step on the trajectories run free and amplify rounding (see `tolerances`).
        # All stages after it get the wider tolerance, SFT of later topics included.
        free = free or stage == "dpo"
        others = other_steps.get(key, [])
        if len(steps) != len(others):
            uneven.append(f"{topic}, {stage}, attempt {attempt}: {len(steps)} steps against {len(others)}")
            continue
        losses = tuple(step.loss for step in steps), tuple(step.loss for step in others)
        tolerance = FREE_TOLERANCE if free else SFT_TOLERANCE
        curves.append(StageCurves(topic, stage, attempt, undone, steps[0].step, losses, deviation(*losses), tolerance))
    uneven += [
        f"{key[0]}, {key[1]}, attempt {key[2]}: 0 steps against {len(other_steps[key])}"
        for key in other_steps.keys() - ours
    ]
    return tuple(curves), uneven


def _by_stage(steps: Sequence[Step]) -> dict[Stretch, list[Step]]:
    return {key: list(group) for key, group in groupby(steps, key=lambda step: step.stretch)}


def deviation(first: Sequence[float], other: Sequence[float]) -> float:
    """Return the greatest |a - b| / (1 + |a|) of two curves of one length, infinite if either is not finite."""
    # The 1 in the denominator makes the measure absolute near zero, where a relative one would explode.
    worst = 0.0
    for a, b in zip(first, other, strict=True):
        # NaN compares as False with everything, and would pass as agreement if it were not mapped to infinity.
        apart = abs(a - b) / (1 + abs(a)) if math.isfinite(a) and math.isfinite(b) else math.inf
        worst = max(worst, apart)
    return worst


def _losses(stages: Sequence[StageCurves]) -> list[str]:
    return [
        f"{stage.topic}, {stage.stage}: losses deviate by {stage.greatest:.1e}, and {stage.tolerance:.0e} is allowed"
        for stage in stages
        if not stage.within
    ]


def _precision(sides: Sequence[Side]) -> list[str]:
    # Reduced precision rounds by more than the tolerances allow, so agreement there would be luck.
    reduced = dict.fromkeys(side.dtype for side in sides if side.dtype != "float32")
    return [f"computed in {' and '.join(reduced)}: the tolerances hold for backend.dtype=float32"] if reduced else []


def _voices(name: str, difference: float | None) -> list[str]:
    if difference is None or abs(difference) <= VOICE_TOLERANCE:
        return []
    return [f"the scores of {name} differ by {abs(difference):.3f}, and {VOICE_TOLERANCE} is allowed"]


def _adapters(first: RunRecord, other: RunRecord) -> AdapterDifference:
    states = [read_adapter(RunFolder(record.path).adapter)[0] for record in (first, other)]
    return adapter_difference(*states)


def adapter_difference(first: AdapterState, other: AdapterState) -> AdapterDifference:
    """Return how much the changes of two adapters to a base differ. Both have the same sites and rank."""
    squares = norms = greatest = 0.0
    for site, factors in first.tensors.items():
        others = other.tensors[site]
        # The products are compared and not A and B alone: different factors can have the same product.
        # float64 keeps the rounding of this sum below the differences that it measures.
        change, changed = (
            state.config.scale(site) * (pair.b.astype(np.float64) @ pair.a.astype(np.float64))
            for state, pair in ((first, factors), (other, others))
        )
        squares += float(np.square(change - changed).sum())
        norms += float(np.square(change).sum())
        greatest = max(greatest, *(float(np.abs(a - b).max()) for a, b in zip(factors, others, strict=True)))
    # An untrained first adapter has a norm of zero. Any difference from it is infinitely large, none is zero.
    relative = math.sqrt(squares / norms) if norms else (math.inf if squares else 0.0)
    return AdapterDifference(relative, greatest)


def _answers(first: RunRecord, other: RunRecord) -> tuple[Answers, ...] | None:
    if not first.answers or not other.answers:
        return None
    # The same prompt may be in two topics, and has several answers, so the topic and the draw are part of the key.
    other_answers = {(answer.topic, answer.prompt, answer.draw): answer.tuned for answer in other.answers}
    return tuple(
        Answers(answer.prompt, (answer.tuned, other_answers[answer.topic, answer.prompt, answer.draw]))
        for answer in first.answers
        if (answer.topic, answer.prompt, answer.draw) in other_answers
    )
