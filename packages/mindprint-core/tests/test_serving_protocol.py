"""Requests in OpenAI's form are read, or refused in one sentence that names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mindprint.config import GenerationConfig
from mindprint.data.rows import Message
from mindprint.serving.protocol import Asked, Kind, Limits, RequestError, Usage, Writer, read_request

MODELS = ("voice", "base")
DEFAULTS = GenerationConfig(max_new_tokens=32)
HELLO = [{"role": "user", "content": "Tea?"}]


def read(kind: Kind = "chat", body: bytes | None = None, **fields: Any) -> Asked:
    given = {"model": "voice", **({"messages": HELLO} if kind == "chat" else {"prompt": "Tea"}), **fields}
    encoded = json.dumps(given).encode() if body is None else body
    return read_request(encoded, kind, MODELS, DEFAULTS, Limits(new_tokens=100))


def test_what_is_left_out_is_the_runs_setting() -> None:
    assert read() == Asked("chat", "voice", (Message("user", "Tea?"),), DEFAULTS)
    assert read("completion") == Asked("completion", "voice", "Tea", DEFAULTS)
    assert read("completion", prompt=["Tea"]).prompt == "Tea"


def test_every_field() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Te"}, {"type": "text", "text": "a?"}], "name": "A"},
        {"role": "assistant", "content": "Yes."},
        *HELLO,
    ]
    asked = read(
        model="base", messages=messages, max_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop="x", stream=True,
        stream_options={"include_usage": True}, n=1, user="me", logprobs=None, response_format={"type": "text"},
        presence_penalty=0.0,
    )  # fmt: skip
    settings = GenerationConfig(max_new_tokens=7, temperature=0.5, top_p=0.9)
    assert asked == Asked("chat", "base", asked.prompt, settings, 3, ("x",), stream=True, usage=True)
    assert [(message.role, message.content) for message in asked.prompt] == [
        ("system", "Be brief."),
        ("user", "Tea?"),
        ("assistant", "Yes."),
        ("user", "Tea?"),
    ]
    assert read(max_completion_tokens=9, max_tokens=7).settings.max_new_tokens == 9


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}

REFUSED: list[tuple[dict[str, Any], str | None, str]] = [
    ({"model": "gpt-4o"}, "model", "the model 'gpt-4o' does not exist here: ask for 'voice' or 'base'"),
    ({"model": None}, "model", "name the model: 'voice' or 'base'"),
    ({"model": ["voice"]}, "model", "name the model"),
    ({"messages": []}, "messages", "at least one message"),
    ({"messages": "Tea?"}, "messages", "must be a list"),
    ({"messages": ["Tea?"]}, "messages[0]", "must be an object"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "must be one of system, developer, user"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "must be one of"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "tools are not supported"),
    ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1]", "tools are not supported"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]", "image_url is not supported"),
    ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]", "must be an object"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "must be text"),
    ({"messages": [{"role": "user", "content": {"text": "x"}}]}, "messages[0].content", "must be text"),
    ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"n": 2}, "n", "n is not supported"),
    ({"n": True}, "n", "n is not supported"),
    ({"logprobs": True}, "logprobs", "not supported"),
    ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
    ({"max_tokens": -1}, "max_tokens", "must be a whole number from 1 to 100"),
    ({"max_tokens": 0}, "max_tokens", "must be a whole number from 1 to 100"),
    ({"max_tokens": 101}, "max_tokens", "must be a whole number from 1 to 100"),
    ({"max_tokens": 2.5}, "max_tokens", "must be a whole number"),
    ({"max_tokens": True}, "max_tokens", "must be a whole number"),
    ({"max_completion_tokens": "9"}, "max_completion_tokens", "must be a whole number"),
    ({"max_tokens": 10**30}, "max_tokens", "must be a whole number"),
    ({"temperature": -0.1}, "temperature", "from 0 to 2"),
    ({"temperature": 2.1}, "temperature", "from 0 to 2"),
    ({"temperature": "hot"}, "temperature", "must be a number"),
    ({"temperature": 10**400}, "temperature", "must be a number"),
    ({"top_p": 0}, "top_p", "from 1e-06 to 1"),
    ({"top_p": []}, "top_p", "must be a number"),
    ({"top_k": -2}, "top_k", "0 or -1 for all"),
    ({"top_k": 1.5}, "top_k", "must be a whole number"),
    ({"min_p": 1}, "min_p", "from 0 to 0.999"),
    ({"repetition_penalty": 0.5}, "repetition_penalty", "from 1 to 10"),
    ({"seed": -1}, "seed", "at least 0"),
    ({"seed": 1.5}, "seed", "at least 0"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
    ({"stop": ""}, "stop", "1 to 200 characters"),
    ({"stop": [7]}, "stop", "1 to 200 characters"),
    ({"stop": {"a": 1}}, "stop", "a text or a list"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": [1]}, "stream_options", "must be an object"),
    ({"stream_options": {"include_usage": 1}}, "include_usage", "true or false"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED)
def test_a_request_that_is_refused(fields: dict[str, Any], param: str | None, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        read(**fields)
    body = refused.value.body()["error"]
    assert words in body["message"]
    assert "\n" not in body["message"]
    assert (body["param"], body["type"]) == (param, "invalid_request_error")
    assert refused.value.status == (404 if fields.get("model") == "gpt-4o" else 400)


@pytest.mark.parametrize(("top_k", "kept"), [(40, 40), (0, 0), (-1, 0)])
def test_filters_are_settings(top_k: int, kept: int) -> None:
    settings = read(top_k=top_k, min_p=0.1, repetition_penalty=1.2).settings
    assert (settings.top_k, settings.min_p, settings.repetition_penalty) == (kept, 0.1, 1.2)


@pytest.mark.parametrize("prompt", ["", [], ["a", "b"], [1, 2], {"a": 1}, 5, [[1]]])
def test_a_completion_has_one_text(prompt: object) -> None:
    with pytest.raises(RequestError, match="prompt must be one text"):
        read("completion", prompt=prompt)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"\xff\xfe", "the body is not JSON"),
        (b"[]", "must be a JSON object"),
        (b'"voice"', "must be a JSON object"),
        (b"[" * 5000, "the body is not JSON"),
        (b'{"model": "voice", "model": "base"}', "is there twice"),
        (b'{"model": NaN}', "not a number of JSON"),
        (b'{"model": "voice", "prompt": "\\ud800"}', "half a character"),
    ],
)
def test_a_body_that_is_not_a_request(body: bytes, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read("completion", body=body)


def test_answers_as_openai_writes_them() -> None:
    chat, completion = (Writer(read(kind), "7", 100) for kind in ("chat", "completion"))
    head = {"id": "chatcmpl-7", "created": 100, "model": "voice"}
    message = {"role": "assistant", "content": "Aye.", "refusal": None}
    assert chat.whole("Aye.", "stop", Usage(3, 2)) == {
        **head,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
    chunks = [chat.opening(), chat.piece("Aye."), chat.ending("length")]
    assert [chunk["choices"][0]["delta"] for chunk in chunks if chunk] == [
        {"role": "assistant", "content": ""},
        {"content": "Aye."},
        {},
    ]
    assert {chunk["object"] for chunk in chunks if chunk} == {"chat.completion.chunk"}
    assert completion.opening() is None
    assert completion.piece("Aye.")["choices"] == [
        {"index": 0, "text": "Aye.", "logprobs": None, "finish_reason": None}
    ]
    assert (
        completion.whole("Aye.", "stop", Usage(3, 2))["object"] == completion.piece("")["object"] == "text_completion"
    )
