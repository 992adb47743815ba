"""Code that came with somebody else's files is stopped in bounded time and memory."""

from __future__ import annotations

import resource
import shutil
import signal
import time
from importlib.resources import files
from pathlib import Path

import pytest

from edits import TEMPLATES
from mindprint.data.rows import Message
from mindprint.data.tokenizer import Tokenizer, load_tokenizer
from mindprint.errors import DataError, ModelError
from mindprint.limits import LimitError, limited

CHAT = (Message("user", "Tea?"), Message("assistant", "At four."))


def with_template(folder: Path, template: str) -> Tokenizer:
    tiny = Path(str(files("mindprint").joinpath("resources", "tiny")))
    for file in tiny.glob("*.json"):
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return load_tokenizer(folder)


def test_a_loop_without_end_is_stopped() -> None:
    started = time.monotonic()
    with pytest.raises(LimitError, match="more than 1 s"), limited(1.0):
        while True:
            pass
    assert time.monotonic() - started < 3


def test_memory_is_bounded_and_the_bound_is_taken_back() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    with pytest.raises(LimitError, match="MB of memory"), limited(5.0):
        bytearray(2**33)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template[:40])
def test_a_template_renders_or_is_refused_in_time(tmp_path: Path, template: str) -> None:
    started = time.monotonic()
    try:
        tokenizer = with_template(tmp_path, template)
        for _ in range(3):
            tokenizer.render_all([CHAT] * 20, generation_prompt=True)
    except (DataError, ModelError) as error:
        assert len(str(error).splitlines()) == 1
    assert time.monotonic() - started < 10


def test_a_template_that_hangs_is_named_with_its_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the chat template takes more than") as caught:
        with_template(tmp_path, TEMPLATES[0]).render(CHAT, generation_prompt=False)
    assert str(tmp_path) in str(caught.value)
