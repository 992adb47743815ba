"""What a voice score is made of: training text of the person from the rows, answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

from mindprint.data.rows import PreferenceRow, Rows, Text, text_of
from mindprint.inference import OpenedAdapter
from mindprint.voice.assessment import HeldOutAnswers
from mindprint.voice.scoring import VoiceReference


def reference_of(rows: Rows) -> VoiceReference:
    """The person's training text against the rejected answers, each text once."""
    spoken = [text for row in rows.sft for text in _answers(row.completion)]
    preferred = [text for row in rows.preferences for text in _answers(row.chosen)]
    rejected = [text for row in rows.preferences for text in _answers(row.rejected)]
    own = dict.fromkeys((*spoken, *preferred))
    return VoiceReference(tuple(own), tuple(text for text in dict.fromkeys(rejected) if text not in own))


def unseen(rows: Rows) -> tuple[PreferenceRow, ...]:
    """The held-out rows of which neither the prompt nor an answer stands in a training row."""
    reference = reference_of(rows)
    prompts = [row.prompt for row in rows.sft if row.prompt is not None] + [row.prompt for row in rows.preferences]
    seen = {*reference.own, *reference.background, *(text_of(prompt) for prompt in prompts)}
    return tuple(
        row for row in rows.heldout if seen.isdisjoint(text_of(part) for part in (row.prompt, row.chosen, row.rejected))
    )


def answer_held_out(opened: OpenedAdapter, rows: Sequence[PreferenceRow]) -> HeldOutAnswers:
    """Let the untuned and the tuned model answer the prompts of held-out rows, as the run's configuration samples."""
    prompts = [row.prompt for row in rows]
    return HeldOutAnswers(
        topics=tuple(row.topic for row in rows),
        prompts=tuple(text_of(prompt) for prompt in prompts),
        person=tuple(text_of(row.chosen) for row in rows),
        untuned=tuple(answer.text for answer in opened.answer(prompts, adapter=False)),
        tuned=tuple(answer.text for answer in opened.answer(prompts)),
    )


def _answers(text: Text) -> list[str]:
    """The assistant's turns."""
    return [text] if isinstance(text, str) else [message.content for message in text if message.role == "assistant"]
