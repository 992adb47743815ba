"""Requests and answers in OpenAI's form: https://platform.openai.com/docs/api-reference. No HTTP and no model here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mindprint.config import GenerationConfig
from mindprint.data.rows import Message, Role, Text
from mindprint.input_files import parse_json, shortened

Kind = Literal["chat", "completion"]

LONGEST_STOP = 200
"""Characters of a stop string."""

MOST_STOPS = 4
"""Stop strings of a request, as many as OpenAI takes."""

ROLES: Mapping[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
}
"""Fields that would change an answer and that this server does not know, with the values that change nothing."""


class RequestError(Exception):
    """A request that is refused, or that failed, with HTTP's status and the fields of OpenAI's error object."""

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI writes it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """Bounds of a request.

    Args:
        body_bytes: The size of its body.
        new_tokens: The tokens of its answer.
        context: The tokens of prompt and answer together, None for a model that states no limit.
    """

    body_bytes: int = 2**20
    new_tokens: int = 4096
    context: int | None = None


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Asked:
    """A request that has been read.

    Args:
        kind: `chat`, or `completion` for plain text that is continued.
        model: The model that answers, `voice` or `base`.
        prompt: Messages, or text for a completion.
        settings: How the answer is generated.
        seed: The seed of draws, None to let the server choose one.
        stop: Texts that end the answer.
        stream: Whether the answer is sent piece by piece.
        usage: Whether a streamed answer ends with the number of tokens.
    """

    kind: Kind
    model: str
    prompt: Text
    settings: GenerationConfig
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False


def read_request(body: bytes, kind: Kind, models: Sequence[str], defaults: GenerationConfig, limits: Limits) -> Asked:
    """Read the body of a request.

    Args:
        body: JSON.
        kind: The endpoint.
        models: The names of the models that can be asked for.
        defaults: The settings for fields that the request leaves out.
        limits: The bounds.

    Raises:
        RequestError: The body is not such a request, or asks for something that this server does not do.
    """
    try:
        fields = parse_json(body, constants=())
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {shortened(str(error))}") from None
    if not isinstance(fields, dict):
        raise RequestError("the body must be a JSON object")
    # Clients write null for fields that they leave out.
    fields = {name: value for name, value in fields.items() if value is not None}
    model = fields.get("model")
    if not isinstance(model, str):
        raise RequestError(f"name the model: {_either(models)}", param="model")
    if model not in models:
        raise RequestError(
            f"the model {shortened(model)!r} does not exist here: ask for {_either(models)}",
            404,
            param="model",
            code="model_not_found",
        )
    _refuse_unsupported(fields)
    prompt = _messages(fields) if kind == "chat" else _text(fields)
    stream = _flag(fields, "stream")
    options = fields.get("stream_options", {})
    if not isinstance(options, dict):
        raise RequestError("stream_options must be an object", param="stream_options")
    return Asked(
        kind,
        model,
        prompt,
        GenerationConfig(
            max_new_tokens=_new_tokens(fields, defaults.longest, limits),
            temperature=_number(fields, "temperature", defaults.temperature, 0.0, 2.0),
            top_p=_number(fields, "top_p", defaults.top_p, 1e-6, 1.0),
            top_k=_top_k(fields, defaults.top_k),
            min_p=_number(fields, "min_p", defaults.min_p, 0.0, 0.999),
            repetition_penalty=_number(fields, "repetition_penalty", defaults.repetition_penalty, 1.0, 10.0),
        ),
        _seed(fields),
        _stop(fields),
        stream,
        _flag(options, "include_usage"),
    )


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    for name, neutral in NEUTRAL.items():
        # Compared with their types: in Python 1 equals True and 0 equals False.
        if name in fields and not any(type(fields[name]) is type(value) and fields[name] == value for value in neutral):
            raise RequestError(f"{name} is not supported by this server: leave it out", param=name, code="unsupported")


def _messages(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list with at least one message", param="messages")
    return tuple(_message(value, f"messages[{number}]") for number, value in enumerate(messages))


def _message(value: object, place: str) -> Message:
    if not isinstance(value, dict):
        raise RequestError(f"{place} must be an object with role and content", param=place)
    role = value.get("role")
    if role in ("tool", "function") or value.get("tool_calls") or value.get("function_call"):
        raise RequestError(f"{place}: tools are not supported by this server", param=place, code="unsupported")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"{place}.role must be one of {', '.join(ROLES)}", param=f"{place}.role")
    content = value.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{place}.content[{number}]") for number, part in enumerate(content))
    if not isinstance(content, str):
        raise RequestError(f"{place}.content must be text", param=f"{place}.content")
    return Message(ROLES[role], content)


def _part(value: object, place: str) -> str:
    if isinstance(value, dict) and value.get("type") == "text" and isinstance(value.get("text"), str):
        return str(value["text"])
    kind = value.get("type") if isinstance(value, dict) else None
    what = f"{shortened(str(kind))} is not supported by this server: send text" if kind else "must be an object"
    raise RequestError(f"{place}: {what}", param=place, code="unsupported" if kind else None)


def _text(fields: Mapping[str, Any]) -> str:
    prompt = fields.get("prompt")
    # A list of one text is the same as the text.
    if isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
    if not isinstance(prompt, str) or not prompt:
        raise RequestError("prompt must be one text that is not empty (no tokens, no list of prompts)", param="prompt")
    return prompt


def _new_tokens(fields: Mapping[str, Any], default: int, limits: Limits) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        if name in fields:
            value = fields[name]
            if not _is_whole(value) or not 1 <= value <= limits.new_tokens:
                raise RequestError(f"{name} must be a whole number from 1 to {limits.new_tokens}", param=name)
            return int(value)
    return min(default, limits.new_tokens)


def _number(fields: Mapping[str, Any], name: str, default: float, least: float, greatest: float) -> float:
    value = fields.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise RequestError(f"{name} must be a number", param=name)
    if not (least <= value <= greatest or value == default):
        raise RequestError(f"{name} must be a number from {least:g} to {greatest:g}", param=name)
    return float(value)


def _top_k(fields: Mapping[str, Any], default: int) -> int:
    value = fields.get("top_k", default)
    if not _is_whole(value) or not -1 <= value < 2**31:
        raise RequestError("top_k must be a whole number, 0 or -1 for all tokens", param="top_k")
    return max(int(value), 0)


def _seed(fields: Mapping[str, Any]) -> int | None:
    value = fields.get("seed")
    if value is not None and (not _is_whole(value) or not 0 <= value < 2**63):
        raise RequestError("seed must be a whole number of at least 0", param="seed")
    return None if value is None else int(value)


def _stop(fields: Mapping[str, Any]) -> tuple[str, ...]:
    value = fields.get("stop", [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MOST_STOPS:
        raise RequestError(f"stop must be a text or a list of at most {MOST_STOPS}", param="stop")
    if not all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in texts):
        raise RequestError(f"a stop string must be a text of 1 to {LONGEST_STOP} characters", param="stop")
    return tuple(texts)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false", param=name)
    return bool(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _either(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)


@dataclass(frozen=True)
class Usage:
    """The numbers of tokens of a prompt and its answer."""

    prompt: int
    completion: int

    def body(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass(frozen=True)
class Writer:
    """The answers to one request, as OpenAI writes them. `created` is in seconds since 1970."""

    asked: Asked
    number: str
    created: int

    def whole(self, text: str, reason: str, usage: Usage) -> dict[str, Any]:
        """Return a finished answer."""
        if self.asked.kind == "chat":
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            said = {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return {**self._head(streamed=False), "choices": [choice], "usage": usage.body()}

    def opening(self) -> dict[str, Any] | None:
        """Return the first event of a stream, which a chat begins with."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}) if self.asked.kind == "chat" else None

    def piece(self, text: str) -> dict[str, Any]:
        """Return the event of a piece of text."""
        return self._chunk({"delta": {"content": text}} if self.asked.kind == "chat" else {"text": text})

    def ending(self, reason: str) -> dict[str, Any]:
        """Return the event that says why the answer ended."""
        return self._chunk({"delta": {}} if self.asked.kind == "chat" else {"text": ""}, reason)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """Return the event with the numbers of tokens, which follows the others if the request asks for it."""
        return {**self._head(streamed=True), "choices": [], "usage": usage.body()}

    def _chunk(self, said: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return {**self._head(streamed=True), "choices": [choice]}

    def _head(self, *, streamed: bool) -> dict[str, Any]:
        if self.asked.kind == "chat":
            prefix, kind = "chatcmpl", "chat.completion.chunk" if streamed else "chat.completion"
        else:
            prefix, kind = "cmpl", "text_completion"
        return {
            "id": f"{prefix}-{self.number}",
            "object": kind,
            "created": self.created,
            "model": self.asked.model,
        }
