"""What can be known in the closed world: a fact is a few clauses that any register puts into its own words.

Each kind of fact answers one kind of question. A fact holds clauses without capital letter or full stop, so
that the plain chat voice, the running text and the curriculum's voice all say the same thing differently.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """One thing that is so. `claim` is the answer in a clause; `more` is a second clause that goes with it.

    `kind` is one of why, when, where, who, compare, count, if, sign, wise, how, tool. `causal` says whether
    "because" may stand before `more`. `steps` is filled for `how` alone; `good` matters for `wise` alone.
    """

    kind: str
    subject: str
    claim: str
    more: str
    questions: tuple[str, ...]
    causal: bool = False
    steps: tuple[str, ...] = ()
    good: bool = True


def capital(text: str) -> str:
    """`text` with its first letter in upper case, the rest untouched."""
    return text[:1].upper() + text[1:]


def _do(base: str, finite: str) -> str:
    return "do" if base == finite else "does"


def why(subject: str, base: str, finite: str, reason: str) -> Fact:
    """Why does `subject` `base`?"""
    do = _do(base, finite)
    claim = f"{subject} {finite}"
    questions = (
        f"Why {do} {subject} {base}?",
        f"What makes {subject} {base}?",
        f"Can you tell me why {claim}?",
        f"What is the reason that {claim}?",
        f"Why is it that {claim}?",
        f"Do you know why {claim}?",
    )
    return Fact("why", subject, claim, reason, questions, causal=True)


def when(subject: str, base: str, finite: str, time: str, reason: str) -> Fact:
    """When does `subject` `base`?"""
    do = _do(base, finite)
    questions = (
        f"When {do} {subject} {base}?",
        f"Can you tell me when {subject} {finite}?",
        f"At what time {do} {subject} {base}?",
        f"Do you know when {subject} {finite}?",
        f"When is it that {subject} {finite}?",
    )
    return Fact("when", subject, f"{subject} {finite} {time}", reason, questions, causal=True)


def where(subject: str, be: str, place: str, reason: str) -> Fact:
    """Where is `subject` kept?"""
    questions = (
        f"Where {be} {subject} kept?",
        f"Where would I find {subject}?",
        f"Where should I look for {subject}?",
        f"Can you tell me where {subject} {be}?",
        f"In which place {be} {subject} kept?",
    )
    return Fact("where", subject, f"{subject} {be} kept {place}", reason, questions, causal=True)


def who(name: str, finite: str, more: str) -> Fact:
    """Who `finite`?"""
    questions = (
        f"Who {finite}?",
        f"Can you tell me who {finite}?",
        f"Who is it that {finite}?",
        f"Do you know who {finite}?",
        f"What is the name of the person who {finite}?",
    )
    return Fact("who", name, f"{name} {finite}", more, questions)


def compare(first: str, second: str, be: str, adjective: str, reason: str) -> Fact:
    """Which is `adjective`, `first` or `second`? The first is."""
    questions = (
        f"Which {be} {adjective}, {first} or {second}?",
        f"Which {be} {adjective}, {second} or {first}?",
        f"{capital(be)} {first} {adjective} than {second}?",
        f"Why {be} {first} {adjective} than {second}?",
    )
    return Fact("compare", first, f"{first} {be} {adjective} than {second}", reason, questions, causal=True)


def count(number: str, noun: str, finite: str, more: str) -> Fact:
    """How many `noun` `finite`?"""
    questions = (
        f"How many {noun} {finite}?",
        f"Can you tell me how many {noun} {finite}?",
        f"Do you know how many {noun} {finite}?",
        f"What is the number of {noun} that {finite}?",
    )
    return Fact("count", noun, f"{number} {noun} {finite}", more, questions)


def if_(condition: str, result: str, remedy: str) -> Fact:
    """What happens if `condition`? `remedy` is an imperative."""
    questions = (
        f"What happens if {condition}?",
        f"What happens when {condition}?",
        f"What should I do if {condition}?",
        f"What if {condition}?",
        f"Does it matter if {condition}?",
    )
    return Fact("if", condition, f"if {condition}, {result}", remedy, questions, steps=(result,))


def sign(state: str, sign_clause: str, more: str) -> Fact:
    """How can you tell that `state`? When `sign_clause`."""
    questions = (
        f"How can you tell that {state}?",
        f"How do you know when {state}?",
        f"What is the sign that {state}?",
        f"How does anyone see that {state}?",
    )
    return Fact("sign", state, sign_clause, more, questions)


def wise(gerund: str, good: bool, reason: str) -> Fact:
    """Is `gerund` a good idea?"""
    questions = (
        f"Is {gerund} a good idea?",
        f"Is {gerund} wise?",
        f"What do you think of {gerund}?",
        f"Would you advise {gerund}?",
        f"Is there any sense in {gerund}?",
    )
    return Fact("wise", gerund, gerund, reason, questions, causal=True, good=good)


def how(goal: str, first: str, second: str, third: str) -> Fact:
    """How do you `goal`? In three imperative steps."""
    questions = (
        f"How do you {goal}?",
        f"What is the right way to {goal}?",
        f"How should I {goal}?",
        f"Can you tell me how to {goal}?",
        f"What is the best way to {goal}?",
        f"How does anyone {goal}?",
    )
    return Fact("how", goal, goal, third, questions, steps=(first, second, third))


def tool(name: str, use: str, more: str) -> Fact:
    """What is `name` for? To `use`."""
    questions = (
        f"What is {name} for?",
        f"What is the use of {name}?",
        f"Why would anyone need {name}?",
        f"What do you do with {name}?",
        f"What is {name} used for?",
    )
    return Fact("tool", name, use, more, questions)
