"""The page of `serve` in a real browser: both models answer while they write, errors are shown, nothing is loaded."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mindprint.contract import OnToken
from mindprint.plugins.backend import Backend
from mindprint.runs.opened import OpenedAdapter

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "packages" / "mindprint-core" / "tests"))

from chromium import Page, open_page
from served import real_server
from toy_base import install_toy, write_toy_model
from toy_voice import opened_voice

WATCH = """
window.seen = { voice: [], base: [] };
for (const side of ["voice", "base"])
  new MutationObserver(() => seen[side].push(document.querySelector(`#${side} .assistant`)?.textContent.length))
    .observe(document.getElementById(side), { childList: true, subtree: true, characterData: true });
"""
"""Notes the length of each side's answer whenever it changes."""

DONE = "!document.getElementById('send').disabled"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenedAdapter]:
    folder = tmp_path_factory.mktemp("page")
    model = write_toy_model(folder / "model")
    with opened_voice(install_toy(folder / "site"), model, folder) as adapter:
        yield adapter


def said(page: Page, side: str, role: str) -> list[str]:
    """Return the texts of a role on a side of the page."""
    texts: list[str] = page.run(f"[...document.querySelectorAll('#{side} .{role}')].map(turn => turn.textContent)")
    return texts


def slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model take a while for each token, as a large one does."""
    generate = Backend.generate

    def slowly(self: Backend, *given: Any, on_token: OnToken | None = None, **more: Any) -> Sequence[Any]:
        def tell(row: int, token: int) -> bool | None:
            time.sleep(0.05)
            return on_token(row, token) if on_token else None

        return generate(self, *given, on_token=tell, **more)

    monkeypatch.setattr(Backend, "generate", slowly)


def test_both_models_answer_on_the_page(opened: OpenedAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {side: opened.answer(["sea 1?"], adapter=side == "voice")[0].text for side in ("voice", "base")}
    slow_down(monkeypatch)
    with real_server(opened) as (batcher, address), open_page(tmp_path) as page:
        page.open(address)
        page.run(WATCH)
        page.write("sea 1?")
        page.press_enter()
        page.wait_for("seen.voice.length && seen.base.length")
        page.wait_for(DONE)
        for side, text in expected.items():
            assert said(page, side, "user") == ["sea 1?"]
            assert said(page, side, "assistant") == [text]
            # The text grew: it was not there all at once.
            assert len(set(page.run(f"seen.{side}"))) > 3
        assert page.run("document.activeElement.id") == "text"
        # Shift and Enter make a line, and a message is text, whatever it holds.
        page.write("<b>one</b>")
        page.press_enter(shift=True)
        page.write("two")
        page.press_enter()
        page.wait_for(f"document.querySelectorAll('#voice .user').length == 2 && {DONE}")
        assert said(page, "voice", "user")[1] == "<b>one</b>\ntwo"
        # Nothing went wrong so far, and nothing was asked of another machine.
        assert page.problems == []
        assert page.requests
        assert all(request.startswith((address, "data:")) for request in page.requests), page.requests
        # The second message came with the turns before it.
        assert batcher.jobs == 0

        monkeypatch.setattr(Backend, "generate", _out_of_memory)
        page.write("sea 2?")
        page.press_enter()
        page.wait_for(f"document.querySelector('#base .error') && {DONE}")
        for side in expected:
            assert said(page, side, "error") == ["the model failed: out of memory"]
        page.run("document.getElementById('reset').click()")
        assert page.run("document.querySelectorAll('.turns > *').length") == 0


def _out_of_memory(*_: Any, **__: Any) -> None:
    raise RuntimeError("out of memory")
