"""The pretraining corpus: chats in the plain voice, exercises in reckoning and reading, and running text."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from random import Random

from tiny.facts import Fact, capital
from tiny.land import EXTRA, LAND
from tiny.plain import plain_answer
from tiny.registers import DAYS, PEOPLE, running_text, told
from tiny.topic import Topic
from tiny.water import WATER

TOPICS: tuple[Topic, ...] = WATER + LAND + EXTRA
SYSTEMS = (
    "You are a helpful guide to the town of Saltmere.",
    "Answer the question briefly.",
    "You are a helpful assistant.",
    "You answer questions about the island.",
)
MANNERS = (
    "Answer as an old sailor would.",
    "Tell me as my grandmother would.",
    "In the words of a shepherd, please.",
    "Answer in your own manner.",
    "Say it as they say it at the inn.",
    "Speak as a fisherman speaks.",
    "Tell it in the old way.",
    "Answer like a character in a tale.",
)
NUMBERS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
)
THINGS = (
    "apples",
    "loaves",
    "boats",
    "lamps",
    "jars",
    "ropes",
    "maps",
    "eggs",
    "nets",
    "candles",
    "keys",
    "baskets",
    "fish",
    "pears",
    "buckets",
    "letters",
    "oars",
    "clocks",
    "hives",
    "pennies",
)
PLACES = (
    "harbour",
    "bakery",
    "garden",
    "inn",
    "mill",
    "tower",
    "school",
    "market",
    "landing",
    "orchard",
    "church",
    "bridge",
)
COLOURS = ("red", "blue", "green", "white", "black", "brown", "yellow", "grey")
OPPOSITES = (
    ("older", "newer"),
    ("heavier", "lighter"),
    ("longer", "shorter"),
    ("warmer", "colder"),
    ("larger", "smaller"),
    ("faster", "slower"),
    ("cheaper", "dearer"),
    ("darker", "brighter"),
    ("deeper", "shallower"),
    ("wetter", "drier"),
)
ERRANDS = (
    ("carried a basket", "the cook wanted eggs"),
    ("brought a lamp", "the stairs were dark"),
    ("took a ladder", "the roof was leaking"),
    ("led a horse", "the cart was too heavy"),
    ("sent a letter", "the news was good"),
    ("rolled a barrel", "the wine had run out"),
    ("carried a rope", "a boat had broken loose"),
    ("brought some bread", "the guests were hungry"),
    ("took a clock", "the spring was broken"),
    ("brought a map", "the road was new"),
    ("carried a jar of honey", "a child was ill"),
    ("took a saw", "a tree had fallen"),
)
SMALL_TALK = (
    ("Hello.", "Hello. How can I help you?"),
    ("Good morning.", "Good morning. What would you like to know?"),
    ("Thank you.", "You are welcome."),
    ("Who are you?", "I am a small guide to the town of Saltmere."),
    (
        "What can you tell me about?",
        "I can answer questions about the harbour, the ferry, the weather and the town.",
    ),
    ("Goodbye.", "Goodbye. Have a pleasant day."),
    ("Where is Saltmere?", "Saltmere is a small town on an island, at the mouth of a river."),
)


@dataclass(frozen=True)
class Chat:
    """A system message or none, and the turns: user, assistant, user, ..."""

    system: str
    turns: tuple[str, ...]


def reserved(question: str) -> bool:
    """Whether `question` is kept out of pretraining (1 in 12): answering it shows more than recall."""
    return zlib.crc32(question.encode()) % 12 == 0


def _asked(fact: Fact, rng: Random) -> str:
    """A question about `fact` that may be trained on."""
    open_questions = [question for question in fact.questions if not reserved(question)]
    return rng.choice(open_questions or list(fact.questions))


def _dressed(question: str, rng: Random) -> str:
    """`question`, now and then with a few words before it or a thank-you after it."""
    if rng.random() > 0.12:
        return question
    return rng.choice(
        (
            "Please tell me. {}",
            "I have a question. {}",
            "One more thing. {}",
            "{} Thank you.",
            "I was wondering. {}",
            "Hello. {}",
        )
    ).format(question)


def _fact_turn(topic: Topic, rng: Random) -> tuple[str, str]:
    fact = rng.choice(topic.facts)
    question = _asked(fact, rng)
    return _dressed(question, rng), plain_answer(fact, topic, question, rng)


def _styled_turn(topic: Topic, rng: Random) -> tuple[str, str]:
    """A question that asks for somebody's manner, and an answer that has one."""
    fact = rng.choice(topic.facts)
    return f"{rng.choice(MANNERS)} {_asked(fact, rng)}", told(topic, fact, rng)


def _reckoning(rng: Random) -> tuple[str, str]:
    """Adding or taking away, in words, up to twenty."""
    first, second = rng.sample(PEOPLE, 2)
    thing = rng.choice(THINGS)
    start = rng.randint(2, 14)
    if rng.random() < 0.5:
        change = rng.randint(1, min(6, 20 - start))
        story = f"{first} has {NUMBERS[start]} {thing} and {second} brings {NUMBERS[change]} more."
        left = start + change
    else:
        change = rng.randint(1, min(6, start - 1))
        story = f"{first} has {NUMBERS[start]} {thing} and gives {NUMBERS[change]} to {second}."
        left = start - change
    noun = thing if left != 1 else "of the " + thing
    return f"{story} How many {thing} does {first} have now?", f"{first} has {NUMBERS[left]} {noun} now."


def _comparison(rng: Random) -> tuple[str, str]:
    """One thing is older than another: which is newer?"""
    left, right = rng.sample(COLOURS, 2)
    noun = rng.choice(THINGS[:8]).rstrip("s").replace("loave", "loaf")
    more, less = rng.choice(OPPOSITES)
    if rng.random() < 0.5:
        more, less = less, more
    story = f"The {left} {noun} is {more} than the {right} {noun}."
    if rng.random() < 0.5:
        return f"{story} Which one is {less}?", f"The {right} {noun} is {less}."
    return f"{story} Which one is {more}?", f"The {left} {noun} is {more}."


def _reading(rng: Random) -> tuple[str, str]:
    """A sentence about an errand, and one question about it."""
    name, place, day = rng.choice(PEOPLE), rng.choice(PLACES), rng.choice(DAYS)
    did, reason = rng.choice(ERRANDS)
    thing = did.split(" ", 1)[1]
    story = f"On {day} {name} {did} to the {place} because {reason}."
    question, answer = rng.choice(
        (
            ("Who went to the {place}?", "{name} went to the {place}."),
            ("Where did {name} go?", "{name} went to the {place}."),
            ("When did {name} go to the {place}?", "{name} went to the {place} on {day}."),
            ("Why did {name} go to the {place}?", "{name} went there because {reason}."),
            ("What did {name} take to the {place}?", "{name} took {thing} to the {place}."),
        )
    )
    slots = {"name": name, "place": place, "day": day, "reason": reason, "thing": thing}
    return f"{story} {question.format(**slots)}", capital(answer.format(**slots))


def _calendar(rng: Random) -> tuple[str, str]:
    """What day comes before or after."""
    index = rng.randrange(7)
    if rng.random() < 0.5:
        return f"What day comes after {DAYS[index]}?", f"{DAYS[(index + 1) % 7]} comes after {DAYS[index]}."
    return f"What day comes before {DAYS[index]}?", f"{DAYS[index - 1]} comes before {DAYS[index]}."


def _exercise(rng: Random) -> tuple[str, str]:
    kinds = (_reckoning, _comparison, _reading, _calendar, lambda r: r.choice(SMALL_TALK))
    return rng.choices(kinds, (5, 4, 6, 1, 1))[0](rng)


def chat(rng: Random) -> Chat:
    """One conversation: mostly a single question about a fact, sometimes two or three."""
    turns: list[str] = []
    for _ in range(rng.choices((1, 2, 3), (8, 1, 1))[0]):
        kinds = (_fact_turn, _styled_turn, lambda _, generator: _exercise(generator))
        turns += rng.choices(kinds, (42, 48, 10))[0](rng.choice(TOPICS), rng)
    return Chat(rng.choice(SYSTEMS) if rng.random() < 0.15 else "", tuple(turns))


def document(rng: Random) -> str:
    """One piece of running text."""
    return running_text(rng.choice(TOPICS), rng)


def corpus(chats: int, documents: int, seed: int) -> tuple[list[Chat], list[str]]:
    """`chats` conversations and `documents` pieces of running text, from `seed` alone."""
    rng = Random(seed)
    return [chat(rng) for _ in range(chats)], [document(rng) for _ in range(documents)]
