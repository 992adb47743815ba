"""Rows → tokens and masks, worked out by hand: what is trained, what is context, what is cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_tokenizers import (
    BOS,
    CAT,
    CHATML,
    EOS,
    IM_END,
    IM_START,
    REWRITING,
    SILENT,
    THINKING,
    WITH_BOS,
    write_tokenizer,
)

from mindprint.config import DataConfig
from mindprint.data.render import (
    CHUNK,
    PreferenceExample,
    SftExample,
    common_prefix,
    render_preferences,
    render_prompt,
    render_sft,
)
from mindprint.data.rows import Message, Origin, PreferenceRow, SftRow, Text
from mindprint.data.tokenizer import Tokenizer, load_tokenizer
from mindprint.errors import DataError

LINE = Origin("sft.jsonl", 3)
ANSWER_OPEN = [IM_START, *b"assistant\n"]


def tokenizer(folder: Path, template: str | None = CHATML, *, bos: bool = False) -> Tokenizer:
    return load_tokenizer(write_tokenizer(folder, template, bos=bos))


def user(text: str) -> list[int]:
    return [IM_START, *b"user\n", *text.encode(), IM_END, *b"\n"]


def ended(text: str) -> list[int]:
    return [*text.encode(), IM_END, *b"\n"]


def talk(*contents: str) -> tuple[Message, ...]:
    """User and assistant in turn."""
    return tuple(Message("assistant" if index % 2 else "user", content) for index, content in enumerate(contents))


def sft(prompt: Text | None, completion: Text, topic: str = "tea") -> SftRow:
    return SftRow(topic, prompt, completion, LINE)


def pair(prompt: Text, chosen: Text, rejected: Text, topic: str = "tea") -> PreferenceRow:
    return PreferenceRow(topic, prompt, chosen, rejected, LINE)


def one(row: SftRow, loaded: Tokenizer, **data: Any) -> SftExample:
    (example,) = render_sft([row], loaded, DataConfig(**data)).examples
    return example


def one_pair(row: PreferenceRow, loaded: Tokenizer, **data: Any) -> PreferenceExample:
    (example,) = render_preferences([row], loaded, DataConfig(**data)).examples
    return example


def assert_spans(example: SftExample, *parts: tuple[Sequence[int], bool]) -> None:
    """The example's tokens are these parts, trained or not."""
    assert example.tokens.tolist() == [token for tokens, _ in parts for token in tokens]
    assert example.loss_mask.tolist() == [trained for tokens, trained in parts for _ in tokens]
    assert (example.tokens.dtype.name, example.loss_mask.dtype.name) == ("int32", "bool")


def test_the_completion_is_trained_with_its_end_of_turn(tmp_path: Path) -> None:
    example = one(sft("Hi", "Yo"), tokenizer(tmp_path))
    assert (example.topic, example.origin) == ("tea", LINE)
    assert_spans(example, (user("Hi") + ANSWER_OPEN, False), (ended("Yo"), True))


def test_every_assistant_turn_of_messages_is_trained(tmp_path: Path) -> None:
    row = sft(None, talk("Hi", "Yo", "Why", "So"))
    first, second = user("Hi") + ANSWER_OPEN, user("Why") + ANSWER_OPEN
    assert_spans(
        one(row, tokenizer(tmp_path)), (first, False), (ended("Yo"), True), (second, False), (ended("So"), True)
    )


def test_train_on_last_trains_the_last_turn_alone(tmp_path: Path) -> None:
    context = user("Hi") + ANSWER_OPEN + ended("Yo") + user("Why") + ANSWER_OPEN
    example = one(sft(None, talk("Hi", "Yo", "Why", "So")), tokenizer(tmp_path), train_on="last")
    assert_spans(example, (context, False), (ended("So"), True))


def test_answers_in_the_prompt_are_context(tmp_path: Path) -> None:
    context = user("Hi") + ANSWER_OPEN + ended("Yo") + user("Why") + ANSWER_OPEN
    example = one(sft(talk("Hi", "Yo", "Why"), (Message("assistant", "So"),)), tokenizer(tmp_path))
    assert_spans(example, (context, False), (ended("So"), True))


def test_a_conversation_that_the_assistant_opens_has_nothing_to_predict_it_from(tmp_path: Path) -> None:
    row = sft(None, (Message("assistant", "Yo"), *talk("Hi", "So")))
    context = ANSWER_OPEN + ended("Yo") + user("Hi") + ANSWER_OPEN
    assert_spans(one(row, tokenizer(tmp_path)), (context, False), (ended("So"), True))


def test_a_template_that_rewrites_history_gives_one_example_a_turn(tmp_path: Path) -> None:
    """Qwen3 drops the thoughts of earlier answers, so the first answer in context is not what was generated."""
    rendered = render_sft([sft(None, talk("Hi", "Yo", "Why", "So"))], tokenizer(tmp_path, REWRITING), DataConfig())
    first, last = rendered.examples
    assert_spans(first, (user("Hi") + ANSWER_OPEN, False), ([*b"<t></t>", *ended("Yo")], True))
    context = user("Hi") + ANSWER_OPEN + ended("Yo") + user("Why") + ANSWER_OPEN
    assert_spans(last, (context, False), ([*b"<t></t>", *ended("So")], True))
    assert rendered.notes == ("the chat template rewrites earlier turns: 1 conversations became one example per turn",)


def test_a_prompt_that_is_not_a_prefix_ends_where_the_whole_departs(tmp_path: Path) -> None:
    """The generation prompt ends with `<t></t>`, the answer does not: `<` is where they part."""
    rendered = render_sft([sft("Hi", "Yo")], tokenizer(tmp_path, THINKING), DataConfig())
    assert_spans(rendered.examples[0], (user("Hi") + ANSWER_OPEN, False), (ended("Yo"), True))
    (warning,) = rendered.warnings
    assert warning.startswith("in 1 rows the template's generation prompt is not a prefix of what is trained: ")


def test_what_prompt_and_answer_share_by_chance_is_context(tmp_path: Path) -> None:
    """As in TRL: the answer begins with `<t>`, which the generation prompt has too."""
    example = one(sft("Hi", "<t>ea"), tokenizer(tmp_path, THINKING))
    assert_spans(example, ([*user("Hi"), *ANSWER_OPEN, *b"<t>"], False), (ended("ea"), True))


def test_one_bos(tmp_path: Path) -> None:
    loaded = tokenizer(tmp_path, WITH_BOS, bos=True)
    assert_spans(one(sft("Hi", "Yo"), loaded), ([BOS, *b"[Hi]"], False), ([*b"Yo", EOS], True))


def test_a_completion_that_renders_to_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sft.jsonl: line 3: the completion renders to nothing"):
        one(sft("Hi", "Yo"), tokenizer(tmp_path, SILENT))


def test_a_refused_row_is_named_among_many(tmp_path: Path) -> None:
    rows = [sft("Hi", "Yo") for _ in range(5)]
    rows[3] = SftRow("tea", (Message("system", "Be brief."), *talk("Hi")), "Yo", Origin("sft.jsonl", 44))
    with pytest.raises(DataError, match=r"sft.jsonl: line 44: the chat template refuses .*System role not supported"):
        render_sft(rows, tokenizer(tmp_path, WITH_BOS, bos=True), DataConfig())


def test_a_tokenizer_without_template_is_said_aloud(tmp_path: Path) -> None:
    rendered = render_sft([sft("Hi", "Yo")], tokenizer(tmp_path, None), DataConfig())
    assert_spans(rendered.examples[0], (b"User: Hi\n\nAssistant:", False), ([*b" Yo", EOS], True))
    assert "no chat template" in rendered.notes[0]


def test_raw_text_is_trained_whole_and_ended_once(tmp_path: Path) -> None:
    loaded = tokenizer(tmp_path)
    for text in ("Yo", "Yo<eos>"):
        example = one(sft(None, text), loaded, format="raw")
        assert_spans(example, (b"Y", False), ([*b"o", EOS], True))


def test_raw_prompt_and_completion(tmp_path: Path) -> None:
    example = one(sft("Hi ", "Yo"), tokenizer(tmp_path, bos=True), format="raw")
    assert_spans(example, ([BOS, *b"Hi "], False), ([*b"Yo", EOS], True))


def test_raw_tokens_that_merge_across_the_boundary_belong_to_the_completion(tmp_path: Path) -> None:
    """`a ca` + `t` is `a `, `cat`: the prompt's last token is another one in the whole."""
    rendered = render_sft([sft("a ca", "t")], tokenizer(tmp_path), DataConfig(format="raw"))
    assert_spans(rendered.examples[0], (b"a ", False), ([CAT, EOS], True))
    assert "an answer changes the prompt's own tokens" in rendered.notes[0]


def test_the_end_is_cut_and_counted(tmp_path: Path) -> None:
    prompt = user("Hi") + ANSWER_OPEN
    rows = [sft("Hi", "Yo"), sft("Hi", "You there")]
    rendered = render_sft(rows, tokenizer(tmp_path), DataConfig(max_length=len(prompt) + 4))
    assert (len(rendered.examples), rendered.cut, rendered.left_out) == (2, 1, 0)
    assert_spans(rendered.examples[0], (prompt, False), (ended("Yo"), True))
    assert_spans(rendered.examples[1], (prompt, False), (b"You ", True))


def test_a_prompt_that_leaves_no_room_leaves_the_row_out(tmp_path: Path) -> None:
    longest = len(user("Hello") + ANSWER_OPEN)
    rows = [sft("Hello", "Yo"), sft("Hi", "Yo")]
    for max_length, cut, left_out in ((longest, 1, 1), (longest + 1, 1, 0), (longest + 3, 1, 0), (longest + 4, 0, 0)):
        rendered = render_sft(rows, tokenizer(tmp_path), DataConfig(max_length=max_length))
        assert (rendered.cut, rendered.left_out) == (cut, left_out)
        assert all(example.loss_mask.any() for example in rendered.examples)


def test_a_topic_that_loses_every_row_is_an_error(tmp_path: Path) -> None:
    rows = [sft("Hi", "Yo"), sft("Hello there", "Yo", topic="rain")]
    with pytest.raises(DataError, match=r"topic 'rain' has no row left \(1 of 1\).*raise data.max_length"):
        render_sft(rows, tokenizer(tmp_path), DataConfig(max_length=24))


def test_later_turns_that_do_not_fit_are_cut(tmp_path: Path) -> None:
    first = user("Hi") + ANSWER_OPEN
    rows = [sft(None, talk("Hi", "Yo", "Why", "So"))]
    rendered = render_sft(rows, tokenizer(tmp_path), DataConfig(max_length=len(first) + 6))
    assert_spans(rendered.examples[0], (first, False), (ended("Yo"), True), (user("Why")[:2], False))
    assert (rendered.cut, rendered.left_out) == (1, 0)


def test_a_pair_is_prompt_chosen_and_rejected(tmp_path: Path) -> None:
    example = one_pair(pair("Hi", "Yo", "Sir"), tokenizer(tmp_path))
    assert example.prompt.tolist() == user("Hi") + ANSWER_OPEN
    assert (example.chosen.tolist(), example.rejected.tolist()) == (ended("Yo"), ended("Sir"))
    assert {part.dtype for part in (example.prompt, example.chosen, example.rejected)} == {np.dtype(np.int32)}


def test_the_common_prefix_of_all_three_decides(tmp_path: Path) -> None:
    """`chosen` keeps `<t>` of the generation prompt, `rejected` none of it: the prompt ends before, for both."""
    example = one_pair(pair("Hi", "<t>ea", "Sir"), tokenizer(tmp_path, THINKING))
    assert example.prompt.tolist() == user("Hi") + ANSWER_OPEN
    assert (example.chosen.tolist(), example.rejected.tolist()) == (ended("<t>ea"), ended("Sir"))


def test_answers_that_begin_alike_are_trained_from_their_start(tmp_path: Path) -> None:
    example = one_pair(pair("Hi", "Yo", "You"), tokenizer(tmp_path))
    assert (example.chosen.tolist(), example.rejected.tolist()) == (ended("Yo"), ended("You"))


def test_raw_pairs(tmp_path: Path) -> None:
    example = one_pair(pair("a ca", "t<eos>", "r"), tokenizer(tmp_path), format="raw")
    assert example.prompt.tolist() == [*b"a "]
    assert (example.chosen.tolist(), example.rejected.tolist()) == ([CAT, EOS], [256, *b"r", EOS])


def test_raw_pairs_without_a_token_in_common_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sft.jsonl: line 3: prompt and answers share no token"):
        one_pair(pair("ca", "t", "t!"), tokenizer(tmp_path), format="raw")


def test_pairs_are_cut_and_left_out_as_in_trl(tmp_path: Path) -> None:
    prompt = user("Hi") + ANSWER_OPEN
    rows = [pair("Hi", "Yo", "Sir John"), pair("Hello", "Yo", "Sir")]
    rendered = render_preferences(rows, tokenizer(tmp_path), DataConfig(max_length=len(prompt) + 3))
    (example,) = rendered.examples
    assert (rendered.cut, rendered.left_out) == (1, 1)
    assert (example.chosen.tolist(), example.rejected.tolist()) == ([*b"Yo", IM_END], [*b"Sir"])


def test_pairs_that_are_equal_once_cut_are_left_out_and_said(tmp_path: Path) -> None:
    """`a long answer` and `a long tale` differ behind the 30th token, and a pair of equals anywhere."""
    pairs = [pair("Hi", "Yo", "Yo"), pair("Hi", "a long answer", "a long tale"), pair("Hi", "Yo", "Sir")]
    prompt = len(user("Hi") + ANSWER_OPEN)
    rendered = render_preferences(pairs, tokenizer(tmp_path), DataConfig(max_length=prompt + len("a long ")))
    assert (len(rendered.examples), rendered.same, rendered.cut) == (1, 2, 0)
    assert rendered.notes == (
        "in 2 pairs chosen and rejected are the same (1 of them once cut at max_length): left out, they teach nothing",
    )


def test_a_topic_whose_pairs_are_all_equal_is_refused(tmp_path: Path) -> None:
    """Its loss would stay at ln 2 to the end of the stage."""
    equal = [pair("Hi", "a long answer", "a long tale")]
    data = DataConfig(max_length=len(user("Hi") + ANSWER_OPEN) + len("a long "))
    with pytest.raises(
        DataError, match=r"topic 'tea' has no row left \(1 of 1\): in 1 pairs chosen and rejected .* cut"
    ):
        render_preferences(equal, tokenizer(tmp_path), data)
    # Held-out pairs are only read: a topic may lose all of them.
    assert render_preferences(equal, tokenizer(tmp_path), data, held_out=True).same == 1


NEVER_ENDING = (
    "{% for message in messages %}### {{ message.role }}\n{{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)


@pytest.mark.parametrize(("template", "warned"), [(NEVER_ENDING, True), (CHATML, False), (None, False)])
def test_a_template_that_never_ends_an_answer_is_said(tmp_path: Path, template: str | None, warned: bool) -> None:
    loaded = tokenizer(tmp_path, template)
    parts = (render_sft([sft("Hi", "Yo")], loaded, DataConfig()),
             render_preferences([pair("Hi", "Yo", "Sir")], loaded, DataConfig()))  # fmt: skip
    for rendered in parts:
        assert any("writes no end-of-turn token after an answer" in words for words in rendered.warnings) is warned


def test_an_answer_that_renders_to_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sft.jsonl: line 3: `chosen` renders to nothing"):
        one_pair(pair("Hi", "Yo", "Sir"), tokenizer(tmp_path, SILENT))


def test_a_prompt_for_generation(tmp_path: Path) -> None:
    loaded = tokenizer(tmp_path, bos=True)
    assert render_prompt("Hi", loaded).tolist() == user("Hi") + ANSWER_OPEN
    assert render_prompt(talk("Hi"), loaded).tolist() == user("Hi") + ANSWER_OPEN
    assert render_prompt("Hi", loaded, "raw").tolist() == [BOS, *b"Hi"]
    assert render_prompt("Hi", loaded).dtype == np.int32


def test_order_is_kept_across_chunks(tmp_path: Path) -> None:
    rows = [sft("Hi", str(number)) for number in range(CHUNK + 3)]
    examples = render_sft(rows, tokenizer(tmp_path), DataConfig()).examples
    start = len(user("Hi") + ANSWER_OPEN)
    assert [bytes(e.tokens[start:-2].tolist()).decode() for e in examples] == [str(n) for n in range(CHUNK + 3)]


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [("", "ab", 0), ("ab", "ab", 2), ("ab", "abc", 2), ("xb", "ab", 0), ("abd", "abc", 2)],
)
def test_common_prefix(first: str, second: str, length: int) -> None:
    left, right = (np.array([*text.encode()], dtype=np.int32) for text in (first, second))
    assert common_prefix(left, right) == length
