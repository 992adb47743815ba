"""Thinking templates: trained and asked in one state, and thoughts left out of what is shown and scored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import write_tokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from mindprint.config import DataConfig
from mindprint.data.render import render_preferences, render_prompt, render_sft
from mindprint.data.row_files import Origin
from mindprint.data.rows import Message, PreferenceRow, Rows, SftRow
from mindprint.data.tokenizer import Tokenizer, load_tokenizer
from mindprint.text.thoughts import opens_thought, thought_markers, without_thoughts
from mindprint.voice.answers import training_voice

LINE = Origin("sft.jsonl", 3)
OPEN = "<|im_start|>{{ message.role }}\n"
EACH = "{% for message in messages %}" + OPEN
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n"
CONTENT = "{{ message.content }}<|im_end|>\n"

THINKS_ALWAYS = EACH + (
    "{% if message.role == 'assistant' and '</think>' not in message.content %}<think>\n\n</think>\n\n{% endif %}"
    + CONTENT + "{% endfor %}" + ASK + "<think>\n{% endif %}"
)  # fmt: skip
"""The prompt opens a thought, and an answer without one gets an empty one."""

HAS_A_SWITCH = EACH + (
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}" + CONTENT
    + "{% endfor %}" + ASK
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)  # fmt: skip
"""`enable_thinking: false` puts an empty thought into the prompt. The last answer has one in any case."""

ADDS_ONLY_IF_ASKED = EACH + CONTENT + "{% endfor %}" + ASK + (
    "{% if not enable_thinking | default(true) %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)  # fmt: skip
"""The switch puts an empty thought into the prompt, and no answer has one."""

STRIPS_THOUGHTS = EACH + (
    "{% if message.role == 'assistant' %}{{ message.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% else %}" + CONTENT + "{% endif %}{% endfor %}" + ASK + "{% endif %}"
)  # fmt: skip
"""Every answer loses its thought."""

OPENS_IN_THE_PROMPT = EACH + CONTENT + "{% endfor %}" + ASK + "<think>\n{% endif %}"
"""The prompt opens a thought that no answer has."""


def thinking_tokenizer(
    folder: Path, template: str, variables: dict[str, Any] | None = None, *, special: bool = False
) -> Tokenizer:
    """A tokenizer to which the markers are tokens, as in thinking models."""
    write_tokenizer(folder, template)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken(name, special=special, normalized=False) for name in ("<think>", "</think>")])
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder, variables)


def row(completion: str = "Yo") -> SftRow:
    return SftRow("tea", "Hi", completion, LINE)


def state(tokenizer: Tokenizer, completion: str = "Yo") -> tuple[str, str, list[str]]:
    """What the model is asked with, what it is trained on, and the warnings."""
    rendered = render_sft([row(completion)], tokenizer, DataConfig())
    (example,) = rendered.examples
    asked = tokenizer.decode(render_prompt("Hi", tokenizer).tolist(), keep_special=True)
    trained = tokenizer.decode(example.tokens[example.loss_mask].tolist(), keep_special=True)
    return asked.partition("assistant\n")[2], trained, list(rendered.warnings)


def test_a_template_that_thinks_always(tmp_path: Path) -> None:
    """The empty thought closes the one that the prompt opens: the prompt is a prefix of what is trained."""
    tokenizer = thinking_tokenizer(tmp_path, THINKS_ALWAYS)
    assert state(tokenizer) == ("<think>\n", "\n</think>\n\nYo<|im_end|>\n", [])
    prompt = render_prompt("Hi", tokenizer).tolist()
    assert tokenizer.answer_text(tokenizer.encode("so be it</think>\n\nYo"), prompt) == "Yo"
    assert tokenizer.answer_text(tokenizer.encode("and so I thi"), prompt) == ""


@pytest.mark.parametrize(("variables", "asked"), [({}, ""), ({"enable_thinking": False}, "<think>\n\n</think>\n\n")])
def test_a_switch_is_set_in_training_and_in_generation_alike(
    tmp_path: Path, variables: dict[str, Any], asked: str
) -> None:
    tokenizer = thinking_tokenizer(tmp_path, HAS_A_SWITCH, variables)
    whole = "<think>\n\n</think>\n\nYo<|im_end|>\n"
    assert state(tokenizer) == (asked, whole.removeprefix(asked), [])


def test_a_generation_prompt_that_is_not_a_prefix_gets_a_warning_and_the_switch_ends_it(tmp_path: Path) -> None:
    """Also in pairs, and by the row's own variables."""
    off = thinking_tokenizer(tmp_path, ADDS_ONLY_IF_ASKED, {"enable_thinking": False})
    pair = PreferenceRow("tea", "Hi", "Yo", "Sir", LINE)
    for rendered in (render_sft([row()], off, DataConfig()), render_preferences([pair], off, DataConfig())):
        (warning,) = rendered.warnings
        assert warning.startswith("in 1 rows the template's generation prompt is not a prefix of what is trained: ")
        assert "data.chat_template_kwargs" in warning
    own = replace(row(), variables=json.dumps({"enable_thinking": True}))
    (warning,) = render_sft([own], off, DataConfig()).warnings
    assert warning.startswith("in 1 rows the row's own chat_template_kwargs change how the answer is opened: ")
    same = thinking_tokenizer(tmp_path, ADDS_ONLY_IF_ASKED, {"enable_thinking": True})
    assert render_sft([own], same, DataConfig()).warnings == ()
    assert state(thinking_tokenizer(tmp_path, ADDS_ONLY_IF_ASKED)) == ("", "Yo<|im_end|>\n", [])


def test_a_template_that_drops_a_trained_thought_gets_a_warning(tmp_path: Path) -> None:
    tokenizer = thinking_tokenizer(tmp_path, STRIPS_THOUGHTS)
    asked, trained, warnings = state(tokenizer, "<think>hm</think>Yo")
    assert (asked, trained) == ("", "Yo<|im_end|>\n")
    (warning,) = warnings
    assert warning.startswith("in 1 rows the template leaves out a part of the trained answer (a thought, say): ")
    assert state(tokenizer, "Yo")[2] == []


def test_a_thought_opened_by_the_prompt_that_no_answer_has_gets_a_warning(tmp_path: Path) -> None:
    asked, trained, warnings = state(thinking_tokenizer(tmp_path, OPENS_IN_THE_PROMPT))
    assert (asked, trained) == ("<think>\n", "Yo<|im_end|>\n")
    (warning,) = warnings
    # The template has no switch, so the remedy is not to set one.
    assert "chat_template_kwargs" not in warning
    assert "write what it opens (such as a thought) at the beginning of the answers" in warning
    written = "<think>\n\n</think>\n\nYo"
    assert state(thinking_tokenizer(tmp_path, OPENS_IN_THE_PROMPT), written)[2] == []


def joining_tokenizer(folder: Path, template: str, variables: dict[str, Any] | None = None) -> Tokenizer:
    """A tokenizer to which a blank line is one token, as to those of GPT-2, Llama 3 and Qwen."""
    thinking_tokenizer(folder, template)
    content = json.loads((folder / "tokenizer.json").read_text())
    model = content["model"]
    model["vocab"]["ĊĊ"] = model["vocab"].pop("<unused258>")
    model["merges"].append(["Ċ", "Ċ"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(folder, variables)


CLOSES_IN_THE_PROMPT = EACH + (
    "{% if message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}" + CONTENT + "{% endfor %}" + ASK
    + "<think>\n\n</think>\n{% endif %}"
)  # fmt: skip
"""The prompt closes its thought, and the answer begins with a line break."""


@pytest.mark.parametrize(
    ("template", "asked", "trained"),
    [
        (THINKS_ALWAYS, "<think>\n", "\n</think>\n\nYo<|im_end|>\n"),
        (CLOSES_IN_THE_PROMPT, "<think>\n\n</think>\n", "\nYo<|im_end|>\n"),
    ],
)
def test_an_answer_continues_the_tokens_of_a_prompt_with_a_thought(
    tmp_path: Path, template: str, asked: str, trained: str
) -> None:
    """Where the tokenizer joins line breaks: what the model is asked with is what comes before the trained tokens."""
    tokenizer = joining_tokenizer(tmp_path, template)
    assert tokenizer.encode("\n\n") == [258]
    assert state(tokenizer) == (asked, trained, [])
    prompt = render_prompt("Hi", tokenizer).tolist()
    (example,) = render_sft([row()], tokenizer, DataConfig()).examples
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert example.loss_mask.tolist() == [False] * len(prompt) + [True] * (len(example.tokens) - len(prompt))
    (pair,) = render_preferences([PreferenceRow("tea", "Hi", "Yo", "Sir", LINE)], tokenizer, DataConfig()).examples
    assert pair.prompt.tolist() == prompt
    assert pair.chosen.tolist() == example.tokens[len(prompt) :].tolist()


def test_a_prompt_without_a_word_is_rendered(tmp_path: Path) -> None:
    """Its own variables are compared with the project's all the same."""
    tokenizer = thinking_tokenizer(tmp_path, ADDS_ONLY_IF_ASKED)
    empty = SftRow("tea", (Message("user", ""),), "Yo", LINE, json.dumps({"enable_thinking": False}))
    _, warning = render_sft([empty], tokenizer, DataConfig()).warnings
    assert warning.startswith("in 1 rows the row's own chat_template_kwargs change how the answer is opened")


def test_each_answer_of_a_conversation_continues_what_it_is_asked_with(tmp_path: Path) -> None:
    """The joined tokens of the history are no prefix of the later turn: an example for each turn."""
    tokenizer = joining_tokenizer(tmp_path, THINKS_ALWAYS)
    messages = (Message("user", "Hi"), Message("assistant", "Yo"), Message("user", "So?"), Message("assistant", "Ay"))
    rendered = render_sft([SftRow("tea", None, messages, LINE)], tokenizer, DataConfig())
    for example, length in zip(rendered.examples, (1, 3), strict=True):
        prompt = render_prompt(messages[:length], tokenizer).tolist()
        assert example.tokens[: len(prompt)].tolist() == prompt
        assert example.loss_mask.sum() == len(example.tokens) - len(prompt)


@pytest.mark.parametrize("special", [False, True])
def test_thoughts_are_left_out_of_answers(tmp_path: Path, special: bool) -> None:
    tokenizer = thinking_tokenizer(tmp_path, HAS_A_SWITCH, special=special)
    for written, text in (
        ("<think>\n\n</think>\n\nYo<|im_end|>", "Yo"),
        ("<think>hm</think>Yo <think>hm again</think>there", "Yo there"),
        ("Yo", "Yo"),
        ("<think>I never end", ""),
    ):
        assert tokenizer.answer_text(tokenizer.encode(written)) == text


def test_the_voice_is_fitted_on_text_without_thoughts(tmp_path: Path) -> None:
    tokenizer = thinking_tokenizer(tmp_path, HAS_A_SWITCH)
    pair = PreferenceRow("tea", "Hi", "<think>hm</think>Ho", "<think>\n</think>Sir", LINE)
    reference = training_voice(Rows((row("<think>hm</think>Yo"),), (pair,), ()), tokenizer.without_thoughts)
    assert (reference.own, reference.background) == (("Yo", "Ho"), ("Sir",))


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("{{ content }}", "<think>hm</think>Yo"),
        ("<seed:think>{{ x }}</seed:think>", "<seed:think>hm</seed:think>Yo"),
        ("[THINK]{{ x }}[/THINK]", "[THINK]hm[/THINK]Yo"),
        ("<|START_THINKING|>{{ x }}<|END_THINKING|>", "<|START_THINKING|>hm<|END_THINKING|>Yo"),
        ("<thought>{{ x }}</thought>", "<thought>hm</thought>\nYo"),
        ("◁think▷{{ x }}◁/think▷", "◁think▷hm◁/think▷Yo"),
        ("<|channel|>analysis<|message|>", "<|channel|>analysis<|message|>hm<|channel|>final<|message|>Yo"),
    ],
)
def test_the_templates_own_markers(template: str, written: str) -> None:
    assert without_thoughts(written, thought_markers(template)) == "Yo"


def test_an_opened_thought_reaches_to_its_end() -> None:
    markers = thought_markers("")
    assert opens_thought("assistant\n<think>\n", markers)
    assert not opens_thought("assistant\n<think>\n\n</think>\n\n", markers)
    assert without_thoughts("hm</think>Yo", markers) == "Yo"
    assert without_thoughts("hm", markers, opened=True) == ""
