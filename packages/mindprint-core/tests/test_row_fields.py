"""Fields that decide what is trained: honoured or refused, never ignored. And the forms in which people have rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import write_tokenizer

from mindprint.config import DataConfig, make_config
from mindprint.data.render import render_prompt, render_sft
from mindprint.data.row_files import Origin
from mindprint.data.rows import Findings, Message, PreferenceRow, SftRow, preference_row, read_rows, sft_row
from mindprint.data.tokenizer import Tokenizer, load_tokenizer
from mindprint.errors import ConfigError, DataError

LINE = Origin("sft.jsonl", 3)
HI, YO = Message("user", "Hi"), Message("assistant", "Yo")
BAD = Message("assistant", "Bah", trained=False)
CALM = Message("system", "Be calm.")
READS_VARIABLES = (
    "{% if mood is defined %}M{{ mood }};{% endif %}{% if tools %}T{{ tools | tojson }};{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def said(role: str, content: object, **fields: object) -> dict[str, object]:
    return {"role": role, "content": content, **fields}


def sft(record: dict[str, Any]) -> SftRow:
    return sft_row(record, LINE, "chat")


def pair(record: dict[str, Any]) -> PreferenceRow:
    return preference_row(record, LINE, "chat")


def trained_text(tokenizer: Tokenizer, row: SftRow, **data: Any) -> list[str]:
    """The trained tokens of each example of a row, as text."""
    examples = render_sft([row], tokenizer, DataConfig(**data)).examples
    return [tokenizer.decode(example.tokens[example.loss_mask].tolist()).strip() for example in examples]


@pytest.mark.parametrize(
    "out",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"loss": 0}, {"masked": True}],
)
def test_a_message_that_its_own_fields_take_out_is_context(tmp_path: Path, out: dict[str, object]) -> None:
    messages = [said("user", "Hi"), said("assistant", "Bah", **out), said("user", "Hi"), said("assistant", "Yo")]
    row = sft({"messages": messages})
    assert row.messages == (HI, BAD, HI, YO)
    assert trained_text(load_tokenizer(write_tokenizer(tmp_path)), row) == ["Yo"]


@pytest.mark.parametrize("kept", [{"weight": 1}, {"train": True}, {"loss": True}, {"masked": False}, {"weight": None}])
def test_a_message_that_its_own_fields_keep_is_trained(kept: dict[str, object]) -> None:
    assert sft({"messages": [said("user", "Hi"), said("assistant", "Yo", **kept)]}).messages == (HI, YO)


def test_system_and_history_come_before_the_prompt() -> None:
    row = sft({"system": "Be calm.", "history": [["Hi", "Bah"]], "instruction": "Hi", "input": "", "output": "Yo"})
    assert row.messages == (CALM, HI, BAD, HI, YO)
    assert sft({"system_prompt": "Be calm.", "question": "Hi", "response": "Yo"}).messages == (CALM, HI, YO)
    assert sft({"system": "Be calm.", "messages": [said("user", "Hi"), said("assistant", "Yo")]}).messages[0] == CALM
    # The same message twice is one message.
    assert sft({"system": "Be calm.", "prompt": [said("system", "Be calm."), said("user", "Hi")],
                "completion": "Yo"}).messages == (CALM, HI, YO)  # fmt: skip
    assert pair({"system": "Be calm.", "question": "Hi", "chosen": "Yo", "rejected": "No"}).prompt == (CALM, HI)


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}, (HI, YO)),
        (
            {"conversations": [{"from": "system", "value": "Be calm."}, {"from": "user", "value": "Hi"},
                               {"from": "assistant", "value": "Yo"}]},
            (CALM, HI, YO),
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Bah", "weight": 0},
                               {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo", "weight": 1}]},
            (HI, BAD, HI, YO),
        ),
        ({"messages": [said("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]),
                       said("model", "Yo")]}, (HI, YO)),
        ({"prompt": "Hi", "response": "Yo"}, (HI, YO)),
        ({"instruction": "Hi", "response": "Yo"}, (HI, YO)),
        ({"input": "Hi", "output": "Yo"}, (HI, YO)),
        ({"query": "Hi", "answer": "Yo"}, (HI, YO)),
    ],
)  # fmt: skip
def test_the_forms_in_which_people_have_rows(record: dict[str, Any], messages: object) -> None:
    assert sft(record).messages == messages


def test_pairs_of_sharegpt_have_a_single_message_as_an_answer() -> None:
    row = pair({"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Yo"},
                "rejected": {"from": "gpt", "value": "Bah"}})  # fmt: skip
    assert (row.prompt, row.chosen, row.rejected) == ((HI,), (YO,), (Message("assistant", "Bah"),))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Hi", "completion": "Bah", "label": False}, "`label: false` marks a bad answer (a row for KTO)"),
        ({"prompt": "Hi", "completion": "Bah", "label": "False"}, "make a pair in preferences.jsonl: "),
        ({"prompt": "Hi", "completion": "Bah", "weight": 0}, "`weight` is 0: weights of rows are not supported"),
        ({"prompt": "Hi", "completion": "Bah", "weight": 0.3}, "`weight` is 0.3: weights of rows"),
        ({"prompt": "Hi", "completion": "Bah", "train": False}, "`train` is False"),
        ({"messages": [said("user", "Hi"), said("assistant", "Bah", weight=0)]}, "none of its answers is trained"),
        ({"messages": [said("user", "Hi"), said("assistant", "Yo", weight=0.5)]}, "weight` must be 0 or 1"),
        ({"messages": [said("user", "Hi", train=True), said("assistant", "Yo")]}, "asks to train a user message"),
        ({"messages": [said("user", [{"type": "image_url", "image_url": {"url": "a.png"}}]), said("assistant", "Yo")]},
         "`messages[0].content[0]` is a part of type 'image_url': only text parts are trained"),
        ({"prompt": "Hi", "completion": "Yo", "images": ["a.png"]}, "`images` is not supported: only text is trained"),
        ({"prompt": "Hi", "completion": "Yo", "history": "Before"}, "`history` must be a list of [prompt,"),
        ({"prompt": "Hi", "completion": "Yo", "history": [["Before"]]}, "`history[0]` must be a pair"),
        ({"system": "Be calm.", "prompt": [said("system", "Be loud."), said("user", "Hi")], "completion": "Yo"},
         "has a system message both as a column and in its messages"),
        ({"prompt": "Hi", "completion": "Yo", "tools": "[not json"}, "`tools` is text and not valid JSON"),
        ({"prompt": "Hi", "completion": "Yo", "tools": {"name": "w"}}, "`tools` must be a list of objects"),
        ({"prompt": "Hi", "completion": "Yo", "chat_template_kwargs": {"messages": []}}, "'messages' is set by"),
        ({"prompt": "Hi", "chosen": "Yo", "rejected": "Bah"}, "is a preference pair: move it to preferences.jsonl"),
        ({"messages": [{"from": "function_call", "value": "{}"}]}, "must be system, user or assistant"),
    ],
)  # fmt: skip
def test_fields_that_decide_what_is_trained_are_refused_where_they_cannot_be_honoured(
    record: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"^sft.jsonl: line 3: .*{re.escape(message)}"):
        sft(record)


def test_a_pair_with_an_answer_that_is_not_trained_is_refused() -> None:
    answers = {"chosen": [said("assistant", "Yo", weight=0)], "rejected": [said("assistant", "Bah")]}
    with pytest.raises(DataError, match="`chosen` has an answer with `weight: 0` or the like: a pair is trained whole"):
        pair({"prompt": "Hi", **answers})


def test_a_row_has_its_own_template_variables(tmp_path: Path) -> None:
    """`tools` and `chat_template_kwargs` are rendered as TRL renders them: tests/interop compares every id."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, READS_VARIABLES), {"mood": "dull"})
    tools = [{"type": "function", "function": {"name": "w", "about": "a"}}]
    rows = [
        sft({"prompt": "Hi", "completion": "Yo"}),
        sft({"prompt": "Hi", "completion": "Yo", "chat_template_kwargs": {"mood": "calm"}}),
        sft({"prompt": "Hi", "completion": "Yo", "tools": tools}),
        sft({"prompt": "Hi", "completion": "Yo", "tools": json.dumps(tools)}),
        sft({"prompt": "Hi", "completion": "Yo", "chat_template_kwargs": {"mood": "calm"}}),
    ]
    examples = render_sft(rows, tokenizer, DataConfig()).examples
    texts = [tokenizer.decode(example.tokens.tolist()) for example in examples]
    written = json.dumps(tools)
    assert texts == ["Mdull;HiYo", "Mcalm;HiYo", f"Mdull;T{written};HiYo", f"Mdull;T{written};HiYo", "Mcalm;HiYo"]
    asked = [tokenizer.decode(render_prompt("Hi", tokenizer, variables=row.variables).tolist()) for row in rows]
    assert asked == [text.removesuffix("Yo") for text in texts]


def test_a_variable_that_the_template_does_not_read_is_said(tmp_path: Path) -> None:
    row = sft({"prompt": "Hi", "completion": "Yo", "tools": [{"name": "w"}]})
    (warning,) = render_sft([row], load_tokenizer(write_tokenizer(tmp_path), {"mood": 1}), DataConfig()).warnings
    assert warning == "the chat template does not read mood, tools: it changes nothing"
    with pytest.raises(ConfigError, match=r"data.chat_template_kwargs: 'tokenize' is set by Mindprint itself"):
        load_tokenizer(tmp_path, {"tokenize": True})


def test_ignored_columns_are_named_once() -> None:
    findings = Findings()
    for number in range(3):
        messages = [said("user", "Hi", name="Ann"), said("assistant", "Yo")]
        sft_row({"messages": messages, "id": number + 1, "source": "mail", "empty": None}, LINE, "chat", findings)
    assert list(findings.notes()) == [
        "ignored columns: messages.name, id, source (data.topic=source would make topics of source)"
    ]


def rows_of(folder: Path, *records: dict[str, Any], **data: Any) -> Any:
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return read_rows(make_config({"data": {"sft": "rows.jsonl", **data}, "dpo": {"enabled": False}}, folder))


def test_only_topic_or_what_data_topic_names_makes_topics(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "completion": "Yo", "source": f"https://example.org/{n}", "chapter": n} for n in (1, 2)]
    assert {row.topic for row in rows_of(tmp_path, *rows).sft} == {"main"}
    assert [row.topic for row in rows_of(tmp_path, *rows, topic="chapter").sft] == ["1", "2"]
    assert "chapter" in rows_of(tmp_path, *rows, topic="source").notes[0]
    with pytest.raises(DataError, match="data.topic names the column 'chapters', and no row has it"):
        rows_of(tmp_path, *rows, topic="chapters")
