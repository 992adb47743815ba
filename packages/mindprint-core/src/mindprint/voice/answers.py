"""What a voice score is made of: training text of the person from the rows, answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindprint.data.rows import Rows, SftRow, Text, text_of
from mindprint.data.split import HeldOut
from mindprint.runs.opened import OpenedAdapter
from mindprint.voice.assessment import HeldOutAnswers
from mindprint.voice.scoring import VoiceReference


def reference_of(rows: Rows) -> VoiceReference:
    """The person's training text against the rejected answers, each text once."""
    spoken = [text for row in rows.sft for text in _answers(row.completion)]
    preferred = [text for row in rows.preferences for text in _answers(row.chosen)]
    rejected = [text for row in rows.preferences for text in _answers(row.rejected)]
    own = dict.fromkeys((*spoken, *preferred))
    return VoiceReference(tuple(own), tuple(text for text in dict.fromkeys(rejected) if text not in own))


@dataclass(frozen=True)
class Asked:
    """A held-out prompt, and what the person answered."""

    topic: str
    prompt: Text
    person: str


def asked_of(held_out: HeldOut) -> tuple[Asked, ...]:
    """The prompts of held-out pairs and texts, with the person's last answers. Text without a prompt asks nothing."""
    pairs = (Asked(row.topic, row.prompt, text_of(row.chosen)) for row in held_out.pairs)
    return (*pairs, *(one for row in held_out.texts if (one := _asked_of_text(row))))


def _asked_of_text(row: SftRow) -> Asked | None:
    if isinstance(row.completion, str):
        return None if row.prompt is None else Asked(row.topic, row.prompt, row.completion)
    return Asked(row.topic, row.messages[:-1], text_of(row.completion))


def unread(asked: Sequence[Asked], reference: VoiceReference) -> tuple[Asked, ...]:
    """Those that the person answered with no text of the training rows: what was read measures no voice."""
    read = {*reference.own, *reference.background}
    return tuple(one for one in asked if one.person not in read)


def answer_held_out(opened: OpenedAdapter, asked: Sequence[Asked]) -> HeldOutAnswers:
    """Let the untuned and the tuned model answer held-out prompts, as the run's configuration samples."""
    prompts = [one.prompt for one in asked]
    return HeldOutAnswers(
        topics=tuple(one.topic for one in asked),
        prompts=tuple(text_of(prompt) for prompt in prompts),
        person=tuple(one.person for one in asked),
        untuned=tuple(answer.text for answer in opened.answer(prompts, adapter=False)),
        tuned=tuple(answer.text for answer in opened.answer(prompts)),
    )


def _answers(text: Text) -> list[str]:
    """The assistant's turns."""
    return [text] if isinstance(text, str) else [message.content for message in text if message.role == "assistant"]
