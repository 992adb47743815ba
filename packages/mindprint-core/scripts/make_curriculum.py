"""Write the sample curriculum: questions about the closed world, answered by Nan Tully.

    python packages/mindprint-core/scripts/make_curriculum.py [--out FOLDER]

Facts are split before questions are made: the fact behind a held-out question appears in no training row, so a
good answer there shows the voice and not the memory of a sentence.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from random import Random

# The package `tiny` is not installed: it is for these scripts alone.
sys.path.insert(0, str(Path(__file__).parent))

from tiny.facts import Fact
from tiny.land import LAND
from tiny.plain import plain_answer
from tiny.topic import Topic
from tiny.voice import Voice
from tiny.water import WATER

RESOURCES = Path(__file__).parents[1] / "src" / "mindprint" / "resources"
SFT_ROWS = 36
PREFERENCE_ROWS = 24
HELD_OUT_ROWS = 8
SEED = 1851

Row = dict[str, str]


def topic_ids() -> dict[str, Topic]:
    """Return the topics under their ids: water is the first unit, land the second, with two topics to a chapter."""
    topics_by_id: dict[str, Topic] = {}
    for unit, topics in enumerate((WATER, LAND), start=1):
        for index, topic in enumerate(topics):
            topics_by_id[f"unit-{unit:02}/chapter-{index // 2 + 1:02}/topic-{index % 2 + 1:02}-{topic.name}"] = topic
    return topics_by_id


def split_facts(topic: Topic, rng: Random) -> tuple[list[Fact], list[Fact]]:
    """Training facts and held-out facts; each held-out fact is of another kind."""
    kinds = rng.sample(sorted({fact.kind for fact in topic.facts}), HELD_OUT_ROWS)
    held_out = [rng.choice([fact for fact in topic.facts if fact.kind == kind]) for kind in kinds]
    return [fact for fact in topic.facts if fact not in held_out], held_out


def draw_questions(facts: list[Fact], rows: int, used: set[str], rng: Random) -> list[tuple[Fact, str]]:
    """`rows` questions nobody has asked yet, spread evenly over `facts`."""
    drawn: list[tuple[Fact, str]] = []
    while len(drawn) < rows:
        # Round by round, each fact once a round: then no fact has many more questions than another.
        for fact in rng.sample(facts, len(facts)):
            fresh = [question for question in fact.questions if question not in used]
            if fresh and len(drawn) < rows:
                drawn.append((fact, rng.choice(fresh)))
                used.add(drawn[-1][1])
    return drawn


def preference(name: str, topic: Topic, fact: Fact, question: str, voice: Voice, rng: Random) -> Row:
    """One pair: her answer, and the plain one."""
    return {
        "topic": name,
        "prompt": question,
        "chosen": voice.answer(fact),
        "rejected": plain_answer(fact, topic, question, rng),
    }


def topic_rows(name: str, topic: Topic) -> tuple[list[Row], list[Row], list[Row]]:
    """SFT rows, preference pairs and held-out pairs of one topic, from its name and `SEED` alone."""
    # Seeded by the topic's name too, so that a new topic does not change the rows of the others.
    rng = Random(f"{SEED} {name}")
    facts, held_out = split_facts(topic, rng)
    # One set for all three parts, so that no question is in two of them.
    voice, used = Voice(topic, rng), set[str]()
    sft = [
        {"topic": name, "prompt": question, "completion": voice.answer(fact)}
        for fact, question in draw_questions(facts, SFT_ROWS, used, rng)
    ]
    pairs = [
        preference(name, topic, fact, question, voice, rng)
        for fact, question in draw_questions(facts, PREFERENCE_ROWS, used, rng)
    ]
    tests = [
        preference(name, topic, fact, question, voice, rng)
        for fact, question in draw_questions(held_out, HELD_OUT_ROWS, used, rng)
    ]
    return sft, pairs, tests


def write_rows(path: Path, rows: list[Row]) -> None:
    """JSON lines, whole or not at all."""
    aside = path.with_suffix(".new")
    aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    aside.replace(path)


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESOURCES / "curriculum")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    parts = [topic_rows(name, topic) for name, topic in topic_ids().items()]
    for index, name in enumerate(("sft", "preferences", "heldout")):
        rows = [row for part in parts for row in part[index]]
        write_rows(out / f"{name}.jsonl", rows)
        print(f"{name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
