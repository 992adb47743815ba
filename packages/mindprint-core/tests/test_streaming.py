"""Tokens are told while they are generated, or afterwards by core, and a backend that tells others is named."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_backend import IDS, MODEL, make

from mindprint.contract import BackendInfo, DeviceInfo, Generation, Int32, OnToken, Sampling
from mindprint.errors import ContractError, DataError
from mindprint.hookspecs import REQUIRED_HOOKS, hookimpl
from mindprint.plugins.backend import Backend
from mindprint.plugins.entries import Plugin
from mindprint.plugins.hooks import backend_hooks

SAMPLING = Sampling(5, (1,))
PROMPTS = [IDS[0], IDS[1]]


def answers(*rows: Sequence[int]) -> list[Generation]:
    return [Generation(np.array(row, np.int32), "length") for row in rows]


def streaming(generate: Any) -> Backend:
    """Return a backend that claims `streaming` and generates so."""
    backend = make()
    backend._hook.mindprint_generate = generate
    object.__setattr__(backend.info, "capabilities", frozenset({"streaming"}))
    return backend


def test_a_backend_of_version_1_is_called_without_the_new_argument() -> None:
    """Its tokens are told when its answers are done, and an answer is cut where the listener ends it."""

    class Old:
        @hookimpl
        def mindprint_backend_info(self) -> BackendInfo:
            return BackendInfo("old", (DeviceInfo("cpu", None),))

        @hookimpl
        def mindprint_generate(self, model: Any, prompts: Sequence[Int32], sampling: Sampling, adapter: bool) -> Any:
            return answers([4, 5, 6], [7, 8])

    for name in set(REQUIRED_HOOKS) - set(vars(Old)):
        setattr(Old, name, hookimpl(SimpleNamespace(named=lambda self: None).named))
    plugin = Plugin("mindprint.backends", "old", "module", "old-backend", "1")
    backend = Backend(plugin, backend_hooks(plugin, Old()))
    assert not backend.streams
    told: list[tuple[int, int]] = []

    def listen(row: int, token: int) -> bool | None:
        told.append((row, token))
        return False if token == 5 else None

    made = backend.generate(MODEL, PROMPTS, SAMPLING, on_token=listen)
    assert told == [(0, 4), (0, 5), (1, 7), (1, 8)]
    assert [(answer.tokens.tolist(), answer.stop_reason) for answer in made] == [([4, 5], "stop"), ([7, 8], "length")]


def test_nobody_listens_unless_the_capability_is_claimed() -> None:
    heard: list[OnToken | None] = []

    def generate(on_token: OnToken | None, **_: Any) -> list[Generation]:
        heard.append(on_token)
        return answers([4], [5])

    backend = make()
    backend._hook.mindprint_generate = generate
    backend.generate(MODEL, PROMPTS, SAMPLING, on_token=lambda *_: None)
    assert heard == [None]


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ([(0, 4), (1, 5), (1, 6)], "told 2 tokens of row 1 to on_token and returned 1 or others"),
        ([(0, 4)], "told 0 tokens of row 1"),
        ([(0, 4), (1, 9)], "told 1 tokens of row 1 to on_token and returned 1 or others"),
        ([(2, 4)], "told a token of row 2, there are 2 rows"),
    ],
)
def test_tokens_told_are_the_answers(told: list[tuple[int, int]], words: str) -> None:
    def generate(on_token: OnToken, **_: Any) -> list[Generation]:
        for row, token in told:
            on_token(row, token)
        return answers([4], [5])

    with pytest.raises(ContractError, match=words):
        streaming(generate).generate(MODEL, PROMPTS, SAMPLING, on_token=lambda *_: None)


def test_a_backend_that_does_not_listen_is_named() -> None:
    def generate(on_token: OnToken, **_: Any) -> list[Generation]:
        on_token(0, 4)
        on_token(0, 5)
        return answers([4, 5], [])

    with pytest.raises(ContractError, match="told another token of row 0, which on_token had ended"):
        streaming(generate).generate(MODEL, PROMPTS, SAMPLING, on_token=lambda *_: False)

    def for_another_reason(on_token: OnToken, **_: Any) -> list[Generation]:
        on_token(0, 4)
        return answers([4], [])

    with pytest.raises(ContractError, match=r"returned stop_reason = 'length', .* on_token ended row 0"):
        streaming(for_another_reason).generate(MODEL, PROMPTS, SAMPLING, on_token=lambda *_: False)


@pytest.mark.parametrize("error", [DataError("the listener's own"), KeyboardInterrupt()])
def test_an_exception_of_the_listener_ends_all_rows_and_is_raised_as_it_is(error: BaseException) -> None:
    answered: list[object] = []

    def generate(on_token: OnToken, **_: Any) -> list[Generation]:
        answered.extend(on_token(row, 4) for row in (0, 1))
        return answers([4], [4])

    def listen(row: int, token: int) -> None:
        raise error

    with pytest.raises(type(error)):
        streaming(generate).generate(MODEL, PROMPTS, SAMPLING, on_token=listen)
    assert answered == [False, False]


@pytest.mark.parametrize("mixed", [True, False])
def test_settings_of_each_prompt(mixed: bool) -> None:
    """A backend with the capability `mixed` gets all of them at once. Any other is called once for each."""
    calls: list[tuple[int, int, bool]] = []

    def generate(prompts: Any, sampling: Any, on_token: Any, **_: Any) -> Any:
        each = sampling.of_each(len(prompts))
        calls.append((len(prompts), each[0].max_new_tokens, bool(sampling.rows)))
        for row, own in enumerate(each):
            for _ in range(own.max_new_tokens):
                on_token(row, 3)
        return answers(*([3] * own.max_new_tokens for own in each))

    backend = streaming(generate)
    if mixed:
        object.__setattr__(backend.info, "capabilities", frozenset({"streaming", "mixed"}))
    told: list[int] = []
    two, one = Sampling(2, (1,)), Sampling(1, (1,))
    prompts = [PROMPTS[0]] * 3
    made = backend.generate(MODEL, prompts, [two, one, two], on_token=lambda row, _: told.append(row))
    assert [len(answer.tokens) for answer in made] == [2, 1, 2]
    assert sorted(told) == [0, 0, 1, 2, 2]
    assert calls == ([(3, 2, True)] if mixed else [(2, 2, False), (1, 1, False)])
    backend.generate(MODEL, prompts, [two] * 3, on_token=lambda *_: None)
    assert calls[-1] == (3, 2, False)
    with pytest.raises(ValueError, match="2 settings for 3 prompts"):
        backend.generate(MODEL, prompts, [two, one])
