"""Running text about the closed world: description, letters, diaries, tales, talk and sayings.

The pretrained model answers plainly, but it has read more than plain answers, as a large model has: people in
these texts say "for", "mind you" and "I dare say", each with habits drawn anew, and none with all of Nan's.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tiny.facts import Fact, capital
from tiny.plain import clauses, plain_answer
from tiny.topic import Topic
from tiny.voice import CLOSINGS, HEDGES, MEMORIES, OPENINGS, aside, common, core, patterns_for

PEOPLE = (
    "Anna",
    "Tam",
    "Lena",
    "Josef",
    "Hanna",
    "Piet",
    "Marta",
    "Ivo",
    "Ada",
    "Silas",
    "Greta",
    "Edda",
    "Tobias",
    "Ruth",
    "Nora",
    "Abel",
    "Henrik",
    "Clara",
    "Jonas",
    "Elsa",
)
KIN = (
    "mother",
    "father",
    "grandmother",
    "grandfather",
    "aunt",
    "uncle",
    "sister",
    "brother",
    "wife",
    "husband",
)
TRADES = (
    "baker",
    "sailor",
    "miller",
    "shepherd",
    "smith",
    "gardener",
    "carter",
    "schoolmaster",
    "fisherman",
    "priest",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SKIES = (
    "Rain before noon.",
    "A clear cold day.",
    "Fog until ten.",
    "Wind from the west.",
    "Snow on the hills.",
    "Still and warm.",
    "A grey sky and a slow tide.",
    "Sun at last.",
)
GENERAL_SAYINGS = (
    "Slow water wears the stone.",
    "A closed door keeps no secret.",
    "He who asks the way is half home.",
    "A full basket makes no noise.",
    "The kettle never boils for the impatient.",
    "Old shoes know the road.",
    "One hand washes the other.",
    "The early bird has cold feet.",
    "A kind word costs less than a penny.",
    "No bread without flour, and no flour without rain.",
    "The tongue is a small oar that turns a great boat.",
    "Who keeps the fire will never want for friends.",
    "Trust the tide, but tie the boat.",
    "A poor man's candle is as bright as a king's.",
    "Never thank the sky before evening.",
    "There is no road so long as the one you know.",
    "The heart is a lamp and wants oil.",
)

GREETINGS = (
    "Good day to you.",
    "What a thing to ask.",
    "Come in and sit down.",
    "Let me see.",
    "I know that one.",
    "You are not the first to ask.",
    "Ask me another.",
    "Bless you for asking.",
    "Wait until I have my breath.",
    "Listen well.",
    "That is soon told.",
    "Who wants to know?",
    "Oh, that.",
    "Now then.",
)


@dataclass(frozen=True)
class Person:
    """A writer's habits: the word for because, how they address people, begin, hedge and tag a sentence."""

    cause: str
    address: str
    lead: str
    tag: str
    join: str


_CAUSES = ("for", "for", "since", "because", "as", "seeing that")
_ADDRESSES = ("my dear", "my boy", "child", "sir", "old friend", "love", "my lamb", "dear heart", "")
_LEADS = (
    "I dare say",
    "You see,",
    "Well,",
    "Mind you,",
    "To tell the truth,",
    "They say",
    "I have always found that",
    "It is well known that",
    "As like as not",
    "I suppose",
    "Believe me,",
    "Would you think it,",
    "",
    "You will remember that",
    "If I am any judge,",
    "There is no doubt that",
    "As you know,",
)
_HEDGES = (*HEDGES, "To my mind", "So I have heard", "Truth to tell", "As they say", "If you ask me")
_TAGS = (
    "and that is all",
    "and who can blame them",
    "and so it goes",
    "as sure as the tide",
    "mind you",
    "as everyone knows",
    "and no wonder",
    "I am told",
    "and what of it",
    "as plain as day",
    "",
    "",
    "",
    "the way of the world",
    "slow as a barge",
    "and there is an end of it",
    "like a ship coming home",
)
_JOINS = ("and", "and so", "but", "and then", "though", "yet")


def person(rng: Random) -> Person:
    """A writer with habits drawn at random."""
    return Person(*(rng.choice(pool) for pool in (_CAUSES, _ADDRESSES, _LEADS, _TAGS, _JOINS)))


# {b} is the writer's word for because, {j} another joining word, {a} an address between commas or nothing.
_CAUSAL = (
    "{c}{a} {b} {m}",
    "{c}, {b} {m}",
    "{m}, and so {c}",
    "{m}{a} and so {c}",
    "it is only that {m}{a} and so {c}",
    "{b} {m}{a} {c}",
    "{c}, and all {b} {m}",
    "look for yourself{a} {m}, and therefore {c}",
)
_SAID: dict[str, tuple[str, ...]] = {
    "why": (*_CAUSAL, "all {b} {m}", "{m}, and nothing more than that", "you ask why {c}? {M}"),
    "when": (*_CAUSAL, "{c}, not sooner, {b} {m}"),
    "where": (*_CAUSAL, "{c}, where else, {b} {m}"),
    "compare": (*_CAUSAL, "{s}{a} any day, {b} {m}"),
    "who": ("{c}{a} {j} {m}", "{c}, and {m}", "it is {s}, and {m}", "ask for {s}{a} and {m}"),
    "count": ("{c}{a} {j} {m}", "{c}, and {m}", "{c}, neither more nor less, and {m}"),
    "if": (
        "if {s}{a} {r}, so you {m}",
        "when {s}, {r}, {j} you must {m}",
        "{r} if {s}{a} and you had better {m}",
        "{r}{a} and what then? You {m}",
        "you {m}{a} {b} if {s}, {r}",
        "then {r}{a} and you {m}",
    ),
    "sign": (
        "you know that {s} when {c}, {j} {m}",
        "{c} when {s}, {j} {m}",
        "when {c}{a} it means that {s}, and {m}",
        "{c}{a} so {s}, and {m}",
        "keep your eyes open{a} {c}, and {m}",
    ),
    "good": (
        "{c} is a wise thing{a} {b} {m}",
        "nothing but good comes of it, {b} {m}",
        "yes{a} surely, {b} {m}",
        "by all means, {b} {m}",
    ),
    "bad": (
        "{c} is a foolish thing{a} {b} {m}",
        "nobody should think of {c}{a} {b} {m}",
        "no{a} not for gold, {b} {m}",
        "not while I live, {b} {m}",
        "many have been sorry for {c}, and {m}",
    ),
    "how": (
        "you {s1}, then you {s2}, and you {s3}",
        "to {c}{a} you {s1}, and you {s2}, and last of all you {s3}",
        "you must {s1} first{a} and {s2}, and then {s3}",
        "{s1}, and no hurry. Then you {s2} and {s3}",
        "it is easily done{a} you {s1}, you {s2}, and you {s3}",
        "{s1}{a} {s2}, and then you {s3}",
    ),
    "tool": (
        "{s} is there to {c}, {j} {m}",
        "you {c} with {s}{a} and {m}",
        "you {c} with it, and {m}",
        "it is to {c} that we have {s}{a} and {m}",
        "what else would {c}? {M}",
    ),
}


def said(fact: Fact, who: Person, rng: Random) -> str:
    """`fact` in a sentence or two with `who`'s habits."""
    kind = ("good" if fact.good else "bad") if fact.kind == "wise" else fact.kind
    address = f", {who.address}," if who.address and rng.random() < 0.6 else ","
    tag = f", {who.tag}" if who.tag and rng.random() < 0.5 else ""
    text = rng.choice(_SAID[kind]).format(**clauses(fact), a=address, b=who.cause, j=who.join) + tag
    if who.lead and rng.random() < 0.4:
        return f"{who.lead} {text}."
    return f"{capital(text)}."


def told(topic: Topic, fact: Fact, rng: Random) -> str:
    """`fact` as somebody in the town tells it: a word before, the thing itself, something after.

    More than half of the sentences follow patterns that Nan Tully uses as well, with other small words. Half of her
    patterns and sayings are the town's: a large model has read much of an author's language, and never all of it.
    """
    who = person(rng)
    if rng.random() < 0.6:
        pattern = rng.choice(common(patterns_for(fact)))
        parts = [core(fact, pattern, who.address or "my friend", who.cause, rng.choice(_HEDGES), rng)]
    else:
        parts = [said(fact, who, rng)]
    if rng.random() < 0.55:
        parts.insert(0, rng.choice(rng.choice((common(topic.openings) or GREETINGS, GREETINGS, common(OPENINGS)))))
    if rng.random() < 0.35:
        parts.append(memory(topic, rng))
    if rng.random() < 0.6:
        parts.append(saying(topic, rng))
    return " ".join(parts)


def saying(topic: Topic, rng: Random) -> str:
    """A saying of the town."""
    return rng.choice(rng.choice((common(topic.closings) or GENERAL_SAYINGS, GENERAL_SAYINGS, common(CLOSINGS))))


def memory(topic: Topic, rng: Random) -> str:
    """Something somebody in the town remembers, or whom they would ask."""
    if rng.random() < 0.7:
        return aside(rng.choice(common(topic.memories) + common(MEMORIES)), topic.witness, rng)
    kin, year = rng.choice(KIN), rng.choice(("the flood", "the ice", "the great storm", "the long summer"))
    return rng.choice(
        (
            f"My {kin} told me so in the year of {year}.",
            f"I learned it from my {kin}.",
            f"I have known it since the year of {year}.",
            f"My {kin} always said so.",
        )
    )


def _letter(topic: Topic, rng: Random) -> str:
    who, name = person(rng), rng.choice(PEOPLE)
    body = [said(fact, who, rng) for fact in rng.sample(topic.facts, rng.randint(1, 3))]
    if rng.random() < 0.5:
        body.append(memory(topic, rng))
    if rng.random() < 0.5:
        body.append(saying(topic, rng))
    start = rng.choice(
        (
            "You ask about the {t}.",
            "I write to you about the {t}.",
            "All is well here.",
            "Thank you for your letter.",
            "There is little news.",
            "I was glad to hear from you.",
        )
    )
    end = rng.choice(("Your loving", "Your", "With love, your", "Ever your"))
    signed = rng.choice((rng.choice(PEOPLE), rng.choice((*KIN, "friend"))))
    return f"Dear {name},\n{start.format(t=topic.name)} {' '.join(body)}\n{end} {signed}"


def _diary(topic: Topic, rng: Random) -> str:
    who = person(rng)
    who = Person(who.cause, "", rng.choice(("", who.lead)), who.tag, who.join)
    lines = []
    for day in DAYS[rng.randrange(6) :][: rng.randint(1, 2)]:
        fact = rng.choice(topic.facts)
        extra = f" {memory(topic, rng)}" if rng.random() < 0.4 else ""
        lines.append(f"{day}. {rng.choice(SKIES)} {said(fact, who, rng)}{extra}")
    return "\n".join(lines)


def _tale(topic: Topic, rng: Random) -> str:
    fact, who, trade, name = rng.choice(topic.facts), person(rng), rng.choice(TRADES), rng.choice(PEOPLE)
    kin, words, end = rng.choice(KIN), said(fact, who, rng), saying(topic, rng)
    question = rng.choice(fact.questions)
    tales = (
        f"There was once a {trade} called {name} who asked everyone the same. {question} Nobody knew, ",
        f"Long ago, a {trade} met a stranger on the road. {question} asked the stranger. ",
        f"{name} the {trade} never listened. {words} So said every {kin} in town. But {name} only laughed, ",
    )
    ends = (
        f"until an old {kin} said: {words} And the {trade} went home content.",
        f"{words} said the {trade}, and they walked on together.",
        "and was sorry for it before the year was out.",
    )
    start, finish = rng.choice(tuple(zip(tales, ends, strict=True)))
    return f"{start}{finish} {end}"


def _talk(topic: Topic, rng: Random) -> str:
    first, second = rng.sample(PEOPLE, 2)
    lines = []
    for fact in rng.sample(topic.facts, rng.randint(1, 2)):
        lines += [f"{first}: {rng.choice(fact.questions)}", f"{second}: {told(topic, fact, rng)}"]
    return "\n".join(lines)


def _description(topic: Topic, rng: Random) -> str:
    facts = [fact for fact in rng.sample(topic.facts, 4) if fact.kind not in ("how", "if")]
    return " ".join(plain_answer(fact, topic, "", rng) for fact in facts[:3]) or saying(topic, rng)


def _sayings(topic: Topic, rng: Random) -> str:
    head = rng.choice(("Sayings of Saltmere", f"What they say about the {topic.name}", "Old sayings"))
    return "\n".join([head, *(saying(topic, rng) for _ in range(rng.randint(2, 5)))])


def running_text(topic: Topic, rng: Random) -> str:
    """One short document of a register drawn at random."""
    registers = (_letter, _diary, _tale, _talk, _description, _sayings)
    return rng.choices(registers, (5, 3, 4, 5, 3, 1))[0](topic, rng)
