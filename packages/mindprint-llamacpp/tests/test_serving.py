"""`serve` on llama.cpp: the answers of `generate`, clients that leave, and requests that are none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mindprint
from mindprint.contract import Sampling
from mindprint.runs.opened import OpenedAdapter

sys.path.insert(0, str(Path(__file__).parents[2] / "mindprint-core" / "tests"))

from served import (
    assert_leaving_frees_a_place,
    assert_malformed_requests_are_refused,
    assert_requests_with_unlike_settings_are_answered_as_alone,
    assert_served_as_generated,
    real_server,
    write_tiny_voice,
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenedAdapter]:
    voice = write_tiny_voice(tmp_path_factory.mktemp("serving") / "voice")
    with mindprint.open_adapter(voice, backend="llamacpp") as adapter:
        yield adapter


def test_answers_are_those_of_generate_alone_and_eight_at_once(opened: OpenedAdapter) -> None:
    assert_served_as_generated(opened)
    assert_requests_with_unlike_settings_are_answered_as_alone(opened)


def test_a_thousand_malformed_requests(opened: OpenedAdapter, capfd: pytest.CaptureFixture[str]) -> None:
    assert_malformed_requests_are_refused(opened, 1000)
    assert "Traceback" not in capfd.readouterr().err


def test_clients_that_leave(opened: OpenedAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the tokens that end an answer it lasts for seconds.
    monkeypatch.setattr(OpenedAdapter, "sampling", lambda _, asked, __=0: Sampling(asked.longest, ()))
    with real_server(opened) as (batcher, address):
        assert_leaving_frees_a_place(batcher, address, max_tokens=4000)
