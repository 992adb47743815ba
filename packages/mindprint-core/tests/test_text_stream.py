"""Text comes in pieces that no later token changes, and the pieces are the finished answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mindprint.config import ModelConfig
from mindprint.data.text_stream import TextStream, answer_stream, finished_answer
from mindprint.data.tokenizer import load_tokenizer
from mindprint.models.folder import resolve_model

WORDS = ["It", " is", " <", "think", ">", "no", "</think>", " late", " .", "\n\n", "<", "b", "> ", "end"]


def spoken(tokens: Sequence[int]) -> str:
    text = "".join(WORDS[token] for token in tokens)
    while "<think>" in text:
        before, _, rest = text.partition("<think>")
        text = before + rest.partition("</think>")[2]
    return text.strip()


def pieces(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    given = []
    for token in tokens:
        given.append(stream.add(token))
        if stream.stopped:
            break
    return [*given, stream.finish()]


def test_the_beginning_of_a_thought_waits_until_it_is_one_or_not() -> None:
    stream = TextStream(spoken, markers=["<think>", "</think>"])
    given = pieces(stream, range(len(WORDS)))
    assert given == ["It", " is", "", "", "", "", "", "  late", " .", "", "", "\n\n<b", ">", " end", ""]
    assert "".join(given) == stream.text == spoken(range(len(WORDS)))


@pytest.mark.parametrize(
    ("stop", "text"),
    [("late", "It is  "), (" .", "It is  late"), ("nowhere", None), ("\n<", "It is  late .\n"), ("e", "It is  lat")],
)
def test_a_stop_string_ends_the_text_before_it(stop: str, text: str | None) -> None:
    stream = TextStream(spoken, stop=["never", stop], markers=["<think>"])
    given = pieces(stream, range(len(WORDS)))
    assert "".join(given) == (spoken(range(len(WORDS))) if text is None else text)
    assert stream.stopped is (text is not None)


def test_a_character_in_two_tokens_waits_for_the_second() -> None:
    raw = "naïve ☕".encode()
    stream = TextStream(lambda tokens: bytes(tokens).decode(errors="replace").strip())
    given = pieces(stream, raw)
    assert "".join(given) == "naïve ☕"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in given)
    # What never becomes a character is shown in the end, as the finished answer shows it.
    assert "".join(pieces(TextStream(lambda t: bytes(t).decode(errors="replace")), raw[:-1])) == "naïve \ufffd"


def test_the_pieces_are_the_answer_of_a_real_tokenizer() -> None:
    tokenizer = load_tokenizer(resolve_model(ModelConfig(name="builtin:tiny"), Path.cwd()).path)
    random = np.random.default_rng(3)
    prompt = np.array(tokenizer.encode("Tea?"), np.int32)
    for size in (1, 5, 40):
        tokens = random.integers(0, tokenizer.vocab_size, size).tolist()
        stream = answer_stream(tokenizer, prompt)
        given = [stream.add(token) for token in tokens]
        whole = finished_answer(tokenizer, prompt, tokens)
        assert "".join([*given, stream.finish(whole)]) == whole
