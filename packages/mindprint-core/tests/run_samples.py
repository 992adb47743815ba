"""A run's folder as training leaves it, written by hand: what a report is made of, with everything that can go wrong.

Of three topics the first passed at its second attempt (in the first its DPO stage was rolled back), the second failed,
and the third had too little held-out text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindprint.config import dump_config, make_config
from mindprint.runs.records import (
    AnswerRecord,
    Decision,
    EvaluationRecord,
    Figures,
    Forgetting,
    Interval,
    as_line,
)

HARBOUR, FERRY, BEES = "unit-01/chapter-01/harbour", "unit-01/chapter-01/ferry", "unit-02/chapter-01/bees"
TOPICS = (HARBOUR, FERRY, BEES)
TITLES = {HARBOUR: "The harbour", FERRY: "Ferry & <script>alert(1)</script>", "unit-01": "The water"}
HOSTILE = '<script>document.title="owned"</script><img src=x onerror=alert(1)> | # *what*?'
SFT_STEPS, DPO_STEPS = 40, 20

MEASURED = Figures(
    prompts=16,
    words=612,
    voice=Interval(0.83, 0.71, 0.95),
    base_voice=Interval(0.01, -0.12, 0.14),
    person_voice=Interval(1.0, 0.9, 1.1),
    people_voice=Interval(0.08, -0.02, 0.19),
    copy_rate=0.12,
    person_copy_rate=0.08,
    longest_copy=11,
    longest_copy_text="what the tide takes it takes without asking mind you now",
    recited=0.06,
    self_bleu=0.31,
    person_self_bleu=0.22,
    length=0.93,
    stopped=1.0,
    empty=0.0,
    pairs=16,
    reward_accuracy=0.94,
    reward_margin=4.2,
    perplexity=5.8,
    base_perplexity=18.4,
)
FAILED = Figures(
    prompts=12, words=420, voice=Interval(0.21, 0.05, 0.38), base_voice=Interval(0.0, -0.15, 0.15),
    people_voice=Interval(0.08, -0.02, 0.19), copy_rate=0.41,
    person_copy_rate=0.05, longest_copy=23, recited=0.4, flagged=("recites training text: 40% of the answers",),
)  # fmt: skip
TOO_LITTLE = Figures(prompts=1, words=38, unmeasured={"voice": "38 words of answers, and a score needs 100"})


def write_sample_run(folder: Path, *, evaluated: bool = True, topics: Sequence[str] = TOPICS) -> Path:
    """A complete run in `folder`, which is made; with `evaluated` False without the three files of evaluation."""
    (folder / "adapter").mkdir(parents=True)
    config = make_config({"sft": {"learning_rate": 3e-4, "steps_per_topic": SFT_STEPS}, "seed": 7}).config
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps(manifest(topics)), encoding="utf-8")
    write_lines(folder / "metrics.jsonl", steps())
    if evaluated:
        write_records(folder)
    return folder


def write_records(folder: Path) -> None:
    for name, records in (("evaluations", evaluations()), ("decisions", decisions()), ("answers", answers())):
        write_lines(folder / f"{name}.jsonl", [as_line(record) for record in records])


def write_lines(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def manifest(topics: Sequence[str] = TOPICS) -> dict[str, Any]:
    where = {"backend": "toy", "device": "cpu", "dtype": "float32"}
    lengths = {"sft": SFT_STEPS, "dpo": DPO_STEPS}
    return {
        "mindprint": "0.1.0",
        "hook_api": 1,
        "model": {"name": "builtin:tiny", "revision": None},
        "identity": {"base model": "b" * 64, "dataset": "d" * 32},
        "rows": {"sft": dict.fromkeys(topics, 36), "preferences": dict.fromkeys(topics, 24)},
        "stages": [
            {"topic": topic, "stage": stage, "steps": count, **where}
            for topic in topics
            for stage, count in lengths.items()
        ],
        "environment": {"toy": {"machine": "Linux x86_64, 2 cores", "python": "3.11.7"}},
        "splits": {"rule": "hash of the prompt", "fraction": 0.1},
        "curriculum": {"title": "A year", "topics": {topic: TITLES.get(topic, topic) for topic in topics},
                       "titles": TITLES},
    }  # fmt: skip


def steps() -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: the harbour twice (its first attempt undone), then the others; one has no loss."""
    lines = [*_topic(HARBOUR, 0, attempt=1, undone=True), *_topic(HARBOUR, 60, attempt=2)]
    lines += [*_topic(FERRY, 120), *_topic(BEES, 180)]
    lines[89]["loss"] = math.nan
    return lines


def _topic(topic: str, first: int, attempt: int = 1, *, undone: bool = False) -> Iterator[dict[str, Any]]:
    marks: dict[str, Any] = {"rolled_back": True} if undone else {}
    if attempt > 1:
        marks["attempt"] = attempt
    for place in range(SFT_STEPS + DPO_STEPS):
        stage = "sft" if place < SFT_STEPS else "dpo"
        own = place if stage == "sft" else place - SFT_STEPS
        loss = 1.3 + 1.5 * math.exp(-own / 12) if stage == "sft" else 0.69 * math.exp(-own / 15)
        ripple = 0.08 * math.sin(place * 1.7) * (1 if stage == "sft" else 0.3)
        line = {
            "topic": topic, "stage": stage, "backend": "toy", "step": first + place + 1, "stage_step": own + 1,
            "loss": loss + ripple, "learning_rate": 3e-4, "grad_norm": 1.0, "tokens": 200, "seconds": 0.1,
            "skipped": False,
        }  # fmt: skip
        if stage == "dpo":
            line |= {"reward_chosen": 0.02 * own, "reward_rejected": -0.06 * own, "reward_margin": 0.08 * own}
        yield line | marks


def evaluations() -> list[EvaluationRecord]:
    low = Figures(prompts=16, words=600, voice=Interval(-0.4, -0.6, -0.2), base_voice=MEASURED.base_voice)
    earlier = (Forgetting(HARBOUR, Interval(0.9, 0.85, 0.95), Interval(0.5, 0.4, 0.6), 5.8, 7.9),)
    return [
        EvaluationRecord("topic", HARBOUR, 40, "sft", figures=MEASURED),
        EvaluationRecord("topic", HARBOUR, 60, "dpo", collapse=("62% of the answers are one repeated token",),
                         outcome="failed", reasons=("voice -0.40 is below 0.50",), figures=low),
        EvaluationRecord("topic", HARBOUR, 120, "dpo", 2, "passed", figures=MEASURED),
        EvaluationRecord("topic", FERRY, 180, "dpo", outcome="failed", reasons=("voice 0.21 is below 0.50",),
                         figures=FAILED),
        EvaluationRecord("unit", "unit-01", 180, outcome="measured", figures=MEASURED, earlier=earlier),
        EvaluationRecord("topic", BEES, 240, "dpo", outcome="not evaluated",
                         reasons=("38 words of answers, and a score needs 100",), figures=TOO_LITTLE),
        EvaluationRecord("topic", HARBOUR, 240, figures=MEASURED),
        EvaluationRecord("final", "", 240, figures=MEASURED),
    ]  # fmt: skip


def decisions() -> list[Decision]:
    return [
        Decision("train", 40, HARBOUR, "curriculum.dpo is always", "dpo"),
        Decision("roll back", 60, HARBOUR, "62% of the answers are one repeated token", "dpo", 1, 41, 60),
        Decision("retry", 60, HARBOUR, "voice -0.40 is below 0.50", None, 1, 1, 60, {"learning_rate": 0.5}),
        Decision("pass", 120, HARBOUR, "", attempt=2),
        Decision("fail", 180, FERRY, "voice 0.21 is below 0.50"),
        Decision("not evaluated", 240, BEES, "38 words of answers, and a score needs 100"),
    ]


def answers() -> list[AnswerRecord]:
    long = "You keep the boat from the stone with it, as a boat knows its own landing, and it is made of old rope. " * 3
    return [
        AnswerRecord(HARBOUR, HOSTILE, "The person's <b>own</b>.", "Plain & short.", "Well now, " + long),
        AnswerRecord(HARBOUR, "What is a fender for?", long, "A fender protects the boat.", long),
        AnswerRecord(FERRY, "When does the ferry go?", "When the tide lets it, my dear.", "At nine.", ""),
        AnswerRecord(BEES, "What do bees eat?", "Honey and pollen.", "Sugar.", "Honey, mind you.", quiz=True,
                     missing=("pollen",)),
    ]  # fmt: skip
