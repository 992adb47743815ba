"""The voice of the sample curriculum: Nan Tully, who pulled the ferry at Saltmere for fifty years.

What makes it hers is mostly small words: "for" where others say "because", "and so", "never you", "I dare
say"; clauses strung on "and"; a question thrown back; water for a measure of everything; an opening that is
no answer and a saying to end on. Sayings differ by topic, small words do not: a scorer can find her anywhere.
"""

from __future__ import annotations

from random import Random

from tiny.facts import Fact, capital
from tiny.plain import clauses
from tiny.topic import Topic

ADDRESSES = ("my dear", "my dear", "my dear", "child", "my lamb", "love")
# What is always so is likened to one kind of thing, what is done to another.
CERTAIN = (
    "sure as the tide",
    "plain as a lamp in a window",
    "the way a river finds its bed",
    "true as a plumb line",
    "as a boat knows its own landing",
    "as sure as there is mud under the water",
    "clear as a bell over ice",
)
DONE = (
    "slow as a barge",
    "steady as a good oar",
    "soft as fog on a landing",
    "quiet as snow on water",
    "easy as a rope over a worn post",
    "gentle as you would a sleeping child",
    "and no splashing",
)
HEDGES = (
    "I dare say",
    "As like as not",
    "If I am any judge",
    "By my reckoning",
    "Unless the world has changed",
)
OPENINGS = (
    "Now there is a question.",
    "Well now.",
    "Sit you down.",
    "Let me think, and let me think slowly.",
    "You have come to the right old woman.",
    "Ask me something hard, one of these days.",
    "Give me your arm and I will tell you.",
    "Oh, I have been asked that before.",
    "Put the kettle on first.",
    "A fair question, and it shall have a fair answer.",
    "Nobody has asked me that since the spring.",
)
MEMORIES = (
    "I have been wrong about most things, but never about that",
    "my mother said so, and her mother before her",
    "I am eighty-one, and it was so when I was seven",
    "I have had a long time to think it over",
    "I told my own girl the same, and she rolled her eyes, and now she tells hers",
    "I would not tell you a thing I had not seen",
    "I learned it late, but I learned it well",
    "there was a winter when I thought of nothing else",
    "I was young once, and I did not believe it either",
)
CLOSINGS = (
    "What is done slowly stays done.",
    "We are all only passengers.",
    "A thing is simple once you have wept over it.",
    "The old ways are only the ways that worked.",
    "You will say it yourself one day, to somebody small.",
    "There is more in a day than anyone takes out of it.",
    "Small things hold the great ones up.",
    "Only the young are surprised.",
    "And that is worth more than a penny.",
    "Look twice and speak once.",
    "The world is older than our complaints.",
    "Nobody is too old to be told.",
    "Kindness first, and then the other thing.",
    "One good habit is worth ten good intentions.",
)

# {b} is her word for because, which is "for"; {a} an address, {sim} a likeness, {h} a hedge.
_WHY = (
    "{C}, {a}, {b} {m}, and that is the whole of it.",
    "{M}, you see, and so {c}, {sim}.",
    "It is only that {m}, {a}, and so {c}, and would you not?",
    "You might think it luck, but no, {a}: {m}, and so {c}.",
    "{h} it is this, {a}: {m}, and there you have it.",
    "{B} {m}, {a}, and for no better reason than that.",
    "{C}, and you ask me why. Well, {m}, and who could help it then?",
    "{C}, mind you, and always will, {b} {m}.",
    "Because, people say, and then they stop. But I say {m}, {a}, and so {c}.",
)
_WHEN = (
    "{C}, {a}, {b} {m}.",
    "{C}, {sim}, and never before, {b} {m}.",
    "{C}, mind you, and why? {B} {m}, and for nothing else under the sky.",
    "{h} you know it already, {a}: {c}, {b} {m}.",
    "{M}, you see, and so {c}, and who would change it now?",
    "Never you fret about it, {a}. {C}, {b} {m}.",
)
_WHERE = (
    "{C}, {a}, and nowhere else, {b} {m}.",
    "You go and look, {a}: {c}, {b} {m}.",
    "Where else? {C}, {b} {m}, and a thing should have a place to go home to.",
    "{M}, you see, and so {c}, {sim}.",
    "{h} you have walked past it twice, {a}. {C}, {b} {m}.",
    "Never you hunt about for it. {C}, mind you, {b} {m}.",
)
_WHO = (
    "{C}, {a}, and {m}, and long may it last.",
    "That will be {s}, {a}, and nobody else, and {m}.",
    "Who but {s}? {C}, and {m}, if I am any judge.",
    "{C}, mind you, and {m}, and where would we be without such people?",
    "{C}, bless such hands, {a}, and {m}.",
)
_COMPARE = (
    "{C}, {a}, {b} {m}.",
    "{S}, {a}, and every time, {b} {m}.",
    "{M}, you see, and so {c}, {sim}.",
    "Lay one beside the other, {a}, and you will see it: {c}, {b} {m}.",
    "{h} you could tell it in the dark: {c}, {a}, {b} {m}.",
    "{C}, mind you, and never the other way, {b} {m}.",
)
_COUNT = (
    "{C}, {a}, and {m}, {sim}.",
    "Count for yourself, {a}, and you will say the same: {c}, and {m}.",
    "{C}, no more and no less, and {m}, mind you.",
    "{h} it is what it was, {a}: {c}, and {m}.",
    "{C}, and I have counted them in the dark, {a}, and {m}.",
)
_IF = (
    "Then {r}, {a}, {sim}, and so you {m}.",
    "If {s}, why, {r}, and so you {m}, {a}, and no grumbling.",
    "{R}, {a}, and then you are sorry, and so you {m}, and do it kindly.",
    "Never you mind the fright of it. {R}, mind you, but you {m}, and all is well again.",
    "You {m}, {a}, and you do it soon, {b} if {s}, {r}.",
    "{R}, I dare say, but what of that? You {m}, {a}, and begin again.",
)
_SIGN = (
    "When {c}, {a}, then you know that {s}, and {m}.",
    "Watch, and never you guess. {C}, {a}, and so you know that {s}, and {m}.",
    "{C}, you see, and that is its way of telling you, {a}, and {m}.",
    "It will tell you of itself, {a}: {c}, {sim}, and {m}.",
    "{h} you need only look: {c}, and {m}, mind you.",
)
_WISE_BAD = (
    "No, {a}, and no again, {b} {m}.",
    "Oh, {c}, is it? Never you do it, {a}, {b} {m}, and who would be sorry then?",
    "I would sooner row to the moon, {a}, {b} {m}.",
    "You may if you like being sorry, {a}, but {m}, {sim}.",
    "There is many a fool who tried {c}, mind you, and {m}.",
)
_WISE_GOOD = (
    "Yes, {a}, and yes again, {b} {m}.",
    "Oh, {c}, is it? You do it, {a}, and do it gladly, {b} {m}.",
    "You will never be sorry for it, {a}, {b} {m}, {sim}.",
    "There is no one ever lost by {c}, mind you, {b} {m}.",
)
_HOW = (
    "You {s1}, and you {s2}, and then, {a}, you {s3}, and there you have it.",
    "{S1}, first of all, and never you hurry it. Then you {s2}, and you {s3}, {sim}.",
    "There is no trick in it, {a}: you {s1}, and you {s2}, and you {s3}, and the rest is waiting.",
    "{S1}, {a}. {S2}. And then you {s3}, and who could do it better?",
    "You {s1}, mind you, before all else, and then you {s2}, and so you {s3}, {sim}.",
)
_TOOL = (
    "With {s}, {a}, you {c}, and {m}.",
    "How else would you {c}, {a}? That is {s} for you, and {m}.",
    "You {c} with it, {sim}, and {m}, mind you.",
    "{S} is there to {c}, {a}, and {m}, and I never sailed without one.",
    "{h} you could live without {s}, but you {c} with it, {a}, and {m}.",
)
_PATTERNS = {
    "why": _WHY,
    "when": _WHEN,
    "where": _WHERE,
    "who": _WHO,
    "compare": _COMPARE,
    "count": _COUNT,
    "if": _IF,
    "sign": _SIGN,
    "how": _HOW,
    "tool": _TOOL,
}
_ASIDES = (
    "{Y}.",
    "You may believe it, for {y}.",
    "I should know, for {y}.",
    "Ask {w}, and you will hear the same.",
    "Ask {w}, if you doubt an old woman.",
    "And {y}, mind you.",
)
_LAST_WORDS = (
    "Now drink your tea.",
    "So there.",
    "And there you have it.",
    "But what do I know?",
    "Now hand me that rope.",
)


class Deck:
    """A pool dealt like cards: nothing comes twice before everything has come once."""

    def __init__(self, cards: tuple[str, ...], rng: Random) -> None:
        self._cards, self._rng, self._left = cards, rng, list[str]()

    def deal(self) -> str:
        """The next card."""
        if not self._left:
            self._left = self._rng.sample(self._cards, len(self._cards))
        return self._left.pop()


def patterns_for(fact: Fact) -> tuple[str, ...]:
    """The sentences she has for such a fact; some are used by others too, with other small words."""
    if fact.kind == "wise":
        return _WISE_GOOD if fact.good else _WISE_BAD
    return _PATTERNS[fact.kind]


def common(pool: tuple[str, ...]) -> tuple[str, ...]:
    """The half of one of her pools that the whole town shares; the other half nobody but she says."""
    return pool[::2]


def core(fact: Fact, pattern: str, address: str, cause: str, hedge: str, rng: Random) -> str:
    """The answer itself, after one of her patterns, with the given address, word for because, and hedge."""
    if pattern.startswith("{h}") and hedge != "I dare say":
        pattern = pattern.replace("{h}", "{h},", 1)
    likeness = rng.choice(DONE if fact.kind in ("how", "if") else CERTAIN)
    return pattern.format(**clauses(fact), a=address, b=cause, B=capital(cause), h=hedge, sim=likeness)


def aside(memory: str, witness: str, rng: Random) -> str:
    """What somebody remembers, or who would bear it out."""
    return rng.choice(_ASIDES).format(y=memory, Y=capital(memory), w=witness)


class Voice:
    """Nan Tully on one topic; her sayings, memories and openings are dealt, so that none is worn out."""

    def __init__(self, topic: Topic, rng: Random) -> None:
        self._topic, self._rng = topic, rng
        self._openings = Deck(topic.openings + OPENINGS, rng)
        self._memories = Deck(topic.memories + MEMORIES, rng)
        self._closings = Deck(topic.closings + CLOSINGS, rng)
        self._shapes = Deck(("oc", "ce", "ce", "ce", "oce", "oce", "ca", "cae", "oca", "ce", "oce"), rng)

    def answer(self, fact: Fact) -> str:
        """One answer: an opening, an aside or an ending, at least one of them, around the core."""
        parts = {
            "o": self._openings.deal,
            "c": lambda: self._core(fact),
            "a": lambda: aside(self._memories.deal(), self._topic.witness, self._rng),
            "e": self._ending,
        }
        return " ".join(parts[letter]() for letter in self._shapes.deal())

    def _core(self, fact: Fact) -> str:
        pattern = self._rng.choice(patterns_for(fact))
        return core(fact, pattern, self._rng.choice(ADDRESSES), "for", self._rng.choice(HEDGES), self._rng)

    def _ending(self) -> str:
        """A saying, more often than a last word."""
        return self._closings.deal() if self._rng.random() < 0.88 else self._rng.choice(_LAST_WORDS)
