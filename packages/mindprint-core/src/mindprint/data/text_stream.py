"""The text of an answer while its tokens come in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mindprint.contract import Int32
from mindprint.data.tokenizer import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""The sign that decoding puts for the first bytes of a character whose last ones are missing."""

ReadText = Callable[[Sequence[int]], str]
"""Reads the text of an answer from its tokens so far."""


class TextStream:
    """Text from tokens, piece by piece. The pieces together are the text of the finished answer.

    A piece is given out when no later token can change it. So a character whose bytes are spread over tokens waits for
    the last of them, spaces wait for the word behind them, and the beginning of a stop string or of a thought waits
    until it is known to be one or not.

    Args:
        read: Returns the text of the tokens so far.
        stop: Texts of which any ends the answer. It is not part of the answer.
        markers: Texts that `read` takes out together with the text behind them, once they are complete.
    """

    def __init__(self, read: ReadText, *, stop: Sequence[str] = (), markers: Sequence[str] = ()) -> None:
        self._read = read
        self._stop = tuple(stop)
        self._markers = tuple(markers)
        self.tokens: list[int] = []
        self.text = ""
        """The text that has been given out."""
        self.stopped = False
        """Whether a stop string has come."""

    def add(self, token: int) -> str:
        """Take the next token. Return the piece of text that is certain with it, possibly empty."""
        self.tokens.append(token)
        whole, self.stopped = self.cut(self._read(self.tokens))
        return self._give(whole if self.stopped else self._certain(whole))

    def finish(self, whole: str | None = None) -> str:
        """Return the rest of the text, when no further token comes.

        `whole` is the finished answer's text, if it is another than that of the tokens.
        """
        text, self.stopped = self.cut(self._read(self.tokens) if whole is None else whole)
        return self._give(text)

    def cut(self, text: str) -> tuple[str, bool]:
        """Return the text before the first stop string, and whether there is one."""
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def _certain(self, text: str) -> str:
        """Return the text without an end that a later token could change."""
        text = text.rstrip(INCOMPLETE)
        waiting = max((_begun(text, marker) for marker in (*self._stop, *self._markers)), default=0)
        # Finished answers are stripped of the space at their end.
        return text[: len(text) - waiting].rstrip()

    def _give(self, text: str) -> str:
        # A decoder may change text that was given out already, which is too late. Only text that continues it follows.
        if not text.startswith(self.text):
            return ""
        piece, self.text = text[len(self.text) :], text
        return piece


def answer_stream(tokenizer: Tokenizer, prompt: Int32, stop: Sequence[str] = ()) -> TextStream:
    """Return the stream of an answer's text without its thoughts, as `OpenedModel.answer` shows it."""
    opened = prompt.tolist()
    markers = [marker for pair in tokenizer.thought_markers for marker in pair]
    return TextStream(lambda tokens: tokenizer.answer_text(tokens, opened), stop=stop, markers=markers)


def finished_answer(tokenizer: Tokenizer, prompt: Int32, tokens: Sequence[int]) -> str:
    """Return the text of a finished answer.

    An answer that ends within its thought is shown with it: nothing would be left.
    """
    return tokenizer.answer_text(tokens, prompt.tolist()) or tokenizer.decode(tokens).strip()


def _begun(text: str, marker: str) -> int:
    """Return how many of the marker's first characters, but not all of them, the text ends with."""
    return next((size for size in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:size])), 0)
