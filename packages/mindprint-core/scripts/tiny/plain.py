"""The neutral voice: how the pretrained model answers, and what the curriculum rejects."""

from __future__ import annotations

from random import Random

from tiny.facts import Fact, capital
from tiny.topic import Topic

_CAUSAL = (
    "{C} because {m}.",
    "{C}. This is because {m}.",
    "{C}. The reason is that {m}.",
    "{C}, since {m}.",
)
_WHY = (
    *_CAUSAL,
    "This is because {m}.",
    "The reason is that {m}.",
    "It is because {m}. That is why {c}.",
    "{M}. That is why {c}.",
)
_PATTERNS: dict[str, tuple[str, ...]] = {
    "why": _WHY,
    "when": _CAUSAL,
    "where": _CAUSAL,
    "compare": _CAUSAL,
    "who": ("{C}. In addition, {m}.", "{C}, and {m}.", "It is {s}. {M}.", "{C}. {M}."),
    "count": ("{C}. {M}.", "{C}, and {m}.", "In all, {c}. {M}."),
    "if": (
        "If {s}, {r}. It is best to {m}.",
        "In that case {r}. The remedy is to {m}.",
        "{R}. People are advised to {m}.",
        "When {s}, {r}. It helps to {m}.",
    ),
    "sign": (
        "You can tell because {c}. In addition, {m}.",
        "The sign is that {c}. {M}.",
        "{C}. This shows that {s}. {M}.",
        "It is known that {s} when {c}. {M}.",
    ),
    "how": (
        "First, {s1}. Then {s2}. Finally, {s3}.",
        "To {c}, first {s1}, then {s2}, and finally {s3}.",
        "{S1}. After that, {s2}. The last step is to {s3}.",
        "There are three steps. First {s1}, then {s2}, and finally {s3}.",
    ),
    "tool": (
        "{S} is used to {c}. {M}.",
        "People use {s} to {c}. {M}.",
        "{S} is a tool. It is used to {c}, and {m}.",
        "It is used to {c}. {M}.",
    ),
}
_WISE_BAD = (
    "No, {c} is not a good idea because {m}.",
    "No. It is not advisable because {m}.",
    "{C} is not recommended. The reason is that {m}.",
)
_WISE_GOOD = (
    "Yes, {c} is a good idea because {m}.",
    "Yes. It is advisable because {m}.",
    "{C} is recommended. The reason is that {m}.",
)


def clauses(fact: Fact) -> dict[str, str]:
    """The slots a pattern may use; an upper-case key is the same clause with a capital letter."""
    slots = {"c": fact.claim, "m": fact.more, "s": fact.subject}
    if fact.kind == "how":
        slots |= {f"s{number}": step for number, step in enumerate(fact.steps, start=1)}
    elif fact.steps:
        slots["r"] = fact.steps[0]
    return slots | {key.upper(): capital(value) for key, value in slots.items()}


def plain_patterns(fact: Fact) -> tuple[str, ...]:
    """The neutral sentence patterns that fit `fact`."""
    if fact.kind == "wise":
        return _WISE_GOOD if fact.good else _WISE_BAD
    return _PATTERNS[fact.kind]


def plain_answer(fact: Fact, topic: Topic, question: str, rng: Random) -> str:
    """One neutral answer; a yes-or-no question about a comparison is answered with yes."""
    text = rng.choice(plain_patterns(fact)).format(**clauses(fact))
    if fact.kind == "compare" and question.startswith(("Is ", "Are ")):
        text = f"Yes, {text[0].lower()}{text[1:]}"
    if rng.random() < 0.5:
        text = f"{text} {rng.choice(topic.plain)}"
    return text
