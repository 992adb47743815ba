"""Rows from passages, by the base model itself.

A prompt is found by instruction backtranslation (Li et al. 2023, arXiv 2308.06259): the model proposes several, and the
one under which the passage gains most log-prob is kept. The rejected answer is the model's own to the same prompt.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal, get_args

from mindprint.data.rows import Message, Messages
from mindprint.draws import uniform
from mindprint.sampling import ENOUGH_PENALTY
from mindprint.text.words import words
from mindprint.writing.asking import BaseModel, Question
from mindprint.writing.checks import (
    clean_prompt,
    clean_topic,
    is_prompt,
    unfit,
    unfit_rewriting,
    up_to_sentence,
    without_label,
)
from mindprint.writing.conversations import Exchange
from mindprint.writing.keywords import keywords
from mindprint.writing.passages import Passage, pieces_within
from mindprint.writing.templates import Templates

RowKind = Literal["answer", "continue", "topic", "rewrite"]
KINDS: tuple[RowKind, ...] = get_args(RowKind)

MIX: Mapping[RowKind, float] = {"answer": 0.4, "continue": 0.2, "topic": 0.2, "rewrite": 0.2}
"""Shares of the kinds of row."""

LEAST_GAIN = 0.01
"""Nats a token that a prompt must add to a passage: two nats for one of 150 words. Vague prompts add less."""

PROMPT_TOKENS = 60
REWRITTEN_WORDS = 60
"""Words that the model rewrites at once: small models lose the thread of longer texts, and repeat themselves."""
CONTEXT_WORDS = 80
"""Words before a passage that a row asks to continue."""

_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)]*\s+")

LONGER = 1.3
"""Tokens that an answer may have, relative to the passage's. One that reaches it is cut after a sentence."""


@dataclass(frozen=True)
class MadeRow:
    """A row from a passage. `gain` is in nats a token; `rejected` None if the model gave no usable answer."""

    kind: RowKind
    passage: Passage
    prompt: str
    gain: float
    rejected: str | None

    @property
    def sft(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "completion": self.passage.text}

    @property
    def pair(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "chosen": self.passage.text, "rejected": self.rejected}


@dataclass
class Made:
    """All rows, in the order of their passages, with counts of passages and answers that were dropped, by reason.

    `proposed` counts the model's proposals and `served` those that can be prompts. `named` counts the passages whose
    topic is their names and long words, and `continued` those that continue the text before them, because no proposal
    served.
    """

    rows: list[MadeRow] = field(default_factory=list)
    proposed: int = 0
    served: int = 0
    named: int = 0
    continued: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    unpaired: Counter[str] = field(default_factory=Counter)


def make_rows(
    passages: Sequence[Passage], model: BaseModel, templates: Templates, mix: Mapping[RowKind, float], seed: int
) -> Made:
    """Find a prompt and a rejected answer for each passage."""
    made = Made()
    kinds = [kind_of(passage, mix, seed) for passage in passages]
    candidates = _candidates(passages, kinds, model, templates)
    gains = _gains(passages, candidates, model, templates)
    best = [_best(*proposed) for proposed in zip(kinds, candidates, gains, strict=True)]
    made.proposed = sum(len(_proposing(kind, templates)) for kind in kinds)
    made.served = sum(
        len(prompts) for kind, prompts in zip(kinds, candidates, strict=True) if kind in ("answer", "topic")
    )
    # A small model finds no prompt for some passages. The person's words are too few to lose them for it.
    if mix.get("topic"):
        named = [_named_topic(passage, templates) for passage in passages]
        made.named = _fill_lost("topic", passages, kinds, best, named, model, templates)
    if mix.get("continue"):
        following = [
            [templates.fill("ask-continue", last_words(passage.before))] if passage.before else []
            for passage in passages
        ]
        made.continued = _fill_lost("continue", passages, kinds, best, following, model, templates)
    chosen: list[tuple[RowKind, Passage, str, float]] = []
    for passage, prompts, entry in zip(passages, candidates, best, strict=True):
        if entry is not None:
            kind, prompt, gain = entry
            chosen.append((kind, passage, prompt, gain))
        elif prompts:
            made.dropped["no prompt made the passage more probable"] += 1
        else:
            made.dropped["the model proposed nothing that serves as a prompt"] += 1
    rejected = _rejected(chosen, model)
    for (kind, passage, prompt, gain), reply in zip(chosen, rejected, strict=True):
        # For a rewriting, the answer that is not the person's is the plain text itself.
        answer = _plain_of(prompt, templates) if kind == "rewrite" else up_to_sentence(reply)
        why = unfit(answer, passage.text)
        if why is not None:
            made.unpaired[f"the model's answer was {why}"] += 1
        made.rows.append(MadeRow(kind, passage, prompt, gain, None if why else answer))
    return made


def _best(kind: RowKind, prompts: Sequence[str], gains: Sequence[float]) -> tuple[RowKind, str, float] | None:
    """Return the prompt with the greatest gain, the first of equals, None if none gains enough."""
    place = max(range(len(prompts)), key=lambda place: gains[place], default=None)
    return (kind, prompts[place], gains[place]) if place is not None and gains[place] >= LEAST_GAIN else None


def _fill_lost(
    kind: RowKind,
    passages: Sequence[Passage],
    kinds: Sequence[RowKind],
    best: list[tuple[RowKind, str, float] | None],
    prompts: Sequence[Sequence[str]],
    model: BaseModel,
    templates: Templates,
) -> int:
    """Give the passages that have no prompt one of another kind, where it gains enough. Return how many got one."""
    # A passage of this kind has been asked with the same prompt, unless the model proposes the prompts of the kind.
    lost = [
        place
        for place, entry in enumerate(best)
        if entry is None and prompts[place] and (kinds[place] != kind or kind == "topic")
    ]
    asked = [prompts[place] for place in lost]
    gains = _gains([passages[place] for place in lost], asked, model, templates)
    for place, proposed, gained in zip(lost, asked, gains, strict=True):
        best[place] = _best(kind, proposed, gained)
    return sum(best[place] is not None for place in lost)


def _named_topic(passage: Passage, templates: Templates) -> list[str]:
    """Return a prompt that names the passage's names and long words, none if they are too few."""
    topic = ", ".join(keywords(passage.text))
    return [templates.fill("ask-topic", topic)] if is_prompt(topic, passage.text) else []


def kind_of(passage: Passage, mix: Mapping[RowKind, float], seed: int) -> RowKind:
    """Return the kind of row that a passage becomes: by its text alone, so that added writing changes no other row."""
    possible = [kind for kind in KINDS if mix.get(kind) and (kind != "continue" or passage.before)]
    if not possible:
        possible = [kind for kind in KINDS if kind != "continue"]
    total = sum(mix.get(kind, 0) or 1e-9 for kind in possible)
    digest = blake2b(passage.text.encode(), digest_size=8).hexdigest()
    draw = float(uniform((1,), seed, "kind of row", digest)[0]) * total
    for kind in possible:
        draw -= mix.get(kind, 0) or 1e-9
        if draw < 0:
            return kind
    return possible[-1]


def _candidates(
    passages: Sequence[Passage], kinds: Sequence[RowKind], model: BaseModel, templates: Templates
) -> list[list[str]]:
    """Return the prompts that are proposed for each passage and fit it, in the order of the templates."""
    names = [_proposing(kind, templates) for kind in kinds]
    questions = [
        Question(templates.ask(name, passage.text), PROMPT_TOKENS)
        for passage, proposing in zip(passages, names, strict=True)
        for name in proposing
    ]
    replies = iter(model.replies(questions, "prompts"))
    rewritten = [passage.text for passage, kind in zip(passages, kinds, strict=True) if kind == "rewrite"]
    plain_texts = iter(rewritten_texts(rewritten, model, templates))
    candidates = []
    for passage, kind, proposing in zip(passages, kinds, names, strict=True):
        if kind == "continue":
            candidates.append([templates.fill("ask-continue", last_words(passage.before))])
            continue
        if kind == "rewrite":
            plain = next(plain_texts)
            why = unfit_rewriting(plain, passage.text, templates.texts["rewrite"])
            candidates.append([] if why else [templates.fill("ask-rewrite", plain)])
            continue
        clean = clean_topic if kind == "topic" else clean_prompt
        prompts = [(clean(next(replies).text), templates.texts[name]) for name in proposing]
        fit = dict.fromkeys(prompt for prompt, asked in prompts if is_prompt(prompt, passage.text, asked))
        candidates.append([templates.fill("ask-topic", prompt) if kind == "topic" else prompt for prompt in fit])
    return candidates


def _proposing(kind: RowKind, templates: Templates) -> Sequence[str]:
    return () if kind in ("continue", "rewrite") else templates.proposals(kind)


def rewritten_texts(texts: Sequence[str], model: BaseModel, templates: Templates) -> list[str]:
    """Return each text in the base model's words, rewritten piece by piece and put together again."""
    pieces = [pieces_within(text, REWRITTEN_WORDS) for text in texts]
    questions = [
        Question(templates.ask("rewrite", piece), math.ceil(LONGER * model.tokens(piece)) + 8)
        for paragraphs in pieces
        for paragraph in paragraphs
        for piece in paragraph
    ]
    replies, asked = iter(model.replies(questions, "plain texts")), templates.texts["rewrite"]
    plain = [
        [
            " ".join(up_to_sentence(without_label(" ".join(next(replies).text.split()), asked)) for _ in paragraph)
            for paragraph in paragraphs
        ]
        for paragraphs in pieces
    ]
    return ["\n\n".join(paragraphs) for paragraphs in plain]


def _gains(
    passages: Sequence[Passage], candidates: Sequence[Sequence[str]], model: BaseModel, templates: Templates
) -> list[list[float]]:
    """Return what each candidate adds to the passage's mean log-prob, compared with a prompt that says nothing."""
    nothing = templates.fill("ask-nothing")
    pairs = [
        (prompt, passage.text)
        for passage, prompts in zip(passages, candidates, strict=True)
        for prompt in (nothing, *prompts)
        if prompts
    ]
    scores = iter(model.log_probs(pairs, "scores of prompts"))
    gains = []
    for prompts in candidates:
        without = next(scores) if prompts else 0.0
        gains.append([next(scores) - without for _ in prompts])
    return gains


def _rejected(chosen: Sequence[tuple[RowKind, Passage, str, float]], model: BaseModel) -> list[str]:
    asked = [entry for entry in chosen if entry[0] != "rewrite"]
    questions = [Question(prompt, math.ceil(LONGER * model.tokens(passage.text))) for _, passage, prompt, _ in asked]
    replies = iter(model.replies(questions, "rejected answers", repetition_penalty=ENOUGH_PENALTY))
    return ["" if kind == "rewrite" else next(replies).text for kind, *_ in chosen]


def _plain_of(prompt: str, templates: Templates) -> str:
    before, _, after = templates.texts["ask-rewrite"].partition("{plain}")
    return prompt.removeprefix(before).removesuffix(after)


def last_words(text: str, count: int = CONTEXT_WORDS) -> str:
    """Return the end of a text, from the beginning of a sentence or of a paragraph if one is near."""
    if len(words(text)) <= count:
        return text
    for start in _SENTENCE_END.finditer(text):
        if count // 3 <= len(words(text[start.end() :])) <= count:
            return text[start.end() :]
    return " ".join(text.split()[-count:])


def pair_exchanges(
    exchanges: Sequence[Exchange], model: BaseModel, taught: Collection[str] = ()
) -> list[dict[str, Any] | None]:
    """Return a preference pair for each exchange, None where the base model gave no usable answer.

    Documents in `taught` are topics of a textbook: each needs a pair, so that any answer will do that is not the same.
    """
    questions = [Question(_prompt(e), math.ceil(LONGER * model.tokens(e.messages[-1][1]))) for e in exchanges]
    replies = (
        up_to_sentence(reply.text)
        for reply in model.replies(questions, "rejected answers", repetition_penalty=ENOUGH_PENALTY)
    )
    pairs = []
    for exchange, answer in zip(exchanges, replies, strict=True):
        own = exchange.messages[-1][1]
        serves = bool(answer.strip()) and answer != own if exchange.document in taught else not unfit(answer, own)
        pairs.append(exchange.pair(answer) if serves else None)
    return pairs


def _prompt(exchange: Exchange) -> Messages:
    return tuple(Message(message["role"], message["content"]) for message in exchange.prompt)  # type: ignore[arg-type]
