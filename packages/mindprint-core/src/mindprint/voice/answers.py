"""Rows as the voice score needs them: the person's training text, and the prompts that were held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mindprint.data.rows import Rows, SftRow, Text, text_of
from mindprint.data.split import HeldOut
from mindprint.data.stored import evenly_chosen
from mindprint.voice.scoring import VoiceReference

MOST_ROWS = 20_000
"""Training rows of a kind that the voice is told from where rows are on disk, at even distances."""


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt that was held out, the person's own answer to it, and the row's variables for the chat template."""

    topic: str
    prompt: Text
    person: str
    variables: str = ""


def training_voice(rows: Rows, clean: Callable[[str], str] = str) -> VoiceReference:
    """Return the person's training text against the rejected answers, each text once.

    `clean` takes out of a text whatever is not to be measured, such as thoughts.
    """
    sft, preferences = evenly_chosen(rows.sft, MOST_ROWS), evenly_chosen(rows.preferences, MOST_ROWS)
    completions = [clean(text) for row in sft for text in _assistant_turns(row.completion)]
    chosen = [clean(text) for row in preferences for text in _assistant_turns(row.chosen)]
    rejected = [clean(text) for row in preferences for text in _assistant_turns(row.rejected)]
    # A dict keeps the order of the rows. The order of a set of strings differs from process to process, and with it
    # which passages are fitted.
    own = dict.fromkeys((*completions, *chosen))
    # A rejected answer that is also the person's own would be an example of both sides.
    return VoiceReference(tuple(own), tuple(text for text in dict.fromkeys(rejected) if text not in own))


def held_out_prompts(held_out: HeldOut) -> Iterator[HeldOutPrompt]:
    """Yield the prompts of held-out pairs, then of held-out texts. A text without a prompt is left out."""
    for pair in held_out.pairs:
        yield HeldOutPrompt(pair.topic, pair.prompt, text_of(pair.chosen), pair.variables)
    for text in held_out.texts:
        prompt = _prompt_of_text(text)
        if prompt is not None:
            yield prompt


def drop_trained_answers(prompts: Sequence[HeldOutPrompt], reference: VoiceReference) -> tuple[HeldOutPrompt, ...]:
    """Return the prompts whose own answer is not also in the training text.

    The scorer is fitted on the training text, so such an answer would raise the ceiling of the scale.
    """
    trained = {*reference.own, *reference.background}
    return tuple(prompt for prompt in prompts if prompt.person not in trained)


def _prompt_of_text(row: SftRow) -> HeldOutPrompt | None:
    if isinstance(row.completion, str):
        return None if row.prompt is None else HeldOutPrompt(row.topic, row.prompt, row.completion, row.variables)
    # The last answer that is trained. An answer with `weight: 0` is not the person's.
    messages = row.messages
    last = max(place for place, message in enumerate(messages) if message.role == "assistant" and message.trained)
    return HeldOutPrompt(row.topic, messages[:last], messages[last].content, row.variables)


def _assistant_turns(text: Text) -> list[str]:
    return (
        [text]
        if isinstance(text, str)
        else [message.content for message in text if message.role == "assistant" and message.trained]
    )
