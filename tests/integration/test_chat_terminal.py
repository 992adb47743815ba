"""`mindprint chat` in a terminal: lines are edited and found again, and Ctrl-C stops an answer and not the chat."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "packages" / "mindprint-core" / "tests"))

from toy_base import install_toy, write_toy_model
from toy_voice import opened_voice

CHILD = """
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from mindprint.plugins.backend import Backend
generate = Backend.generate
def slowly(self, *given, on_token=None, **more):
    def tell(row, token):
        time.sleep(0.05)
        return on_token(row, token) if on_token else None
    return generate(self, *given, on_token=tell, **more)
Backend.generate = slowly
from mindprint.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""Takes the terminal as its own, as a shell's command does, and lets the model take a while for each token."""

CONTROLS = re.compile(r"\x1b(?:\[[0-9;?=><]*[A-Za-z]|[=>78]|\][^\x07]*\x07)")
CTRL_C, CTRL_D, UP, ALT_ENTER, ENTER = "\x03", "\x04", "\x1b[A", "\x1b\r", "\r"
LONGEST = 60.0

PASTES = "\x1b[?2004h"
"""Written whenever a line begins to be read: the terminal is to mark text that is pasted."""

PROMPT = "[prompt]"
"""What the tests see in its place."""


class Terminal:
    """A terminal with a program in it: keys go in, and what it shows comes out without its control sequences."""

    def __init__(self, handle: int, process: subprocess.Popen[bytes]) -> None:
        self._handle = handle
        self.process = process
        self.shown = ""

    def press(self, keys: str) -> None:
        os.write(self._handle, keys.encode())

    def resize(self, rows: int, columns: int) -> None:
        """Change the size. The kernel tells the program so, as a window does."""
        fcntl.ioctl(self._handle, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self, seconds: float) -> bool:
        """Read what is there within a time. Return False once the program has closed the terminal."""
        ready, _, _ = select.select([self._handle], [], [], seconds)
        if not ready:
            return True
        try:
            part = os.read(self._handle, 2**16)
        except OSError:  # Linux reports the end so
            return False
        self.shown += CONTROLS.sub("", part.decode("utf-8", "replace").replace(PASTES, PROMPT))
        return bool(part)

    def wait_for(self, text: str) -> str:
        """Wait until a text is shown after the one that was waited for last. Return what came before it."""
        start = time.monotonic()
        while text not in self.shown:
            assert time.monotonic() - start < LONGEST, f"never shown: {text!r}, but {self.shown!r}"
            assert self.read(1.0), f"ended without {text!r}: {self.shown!r}"
        before, _, self.shown = self.shown.partition(text)
        return before

    def enter(self, line: str, *texts: str) -> str:
        """Enter a line, and wait for these texts and the next prompt. Return what came last before the prompt."""
        self.press(line + ENTER)
        for text in texts:
            self.wait_for(text)
        return self.wait_for(PROMPT)


@contextmanager
def terminal_of(*words: str, environment: dict[str, str]) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *words], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env=environment,
    )  # fmt: skip
    os.close(slave)
    terminal = Terminal(master, process)
    terminal.resize(30, 100)
    try:
        yield terminal
    finally:
        process.kill()
        process.wait()
        os.close(master)


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained adapter, and the folder of its backend."""
    folder = tmp_path_factory.mktemp("terminal")
    site = install_toy(folder / "site")
    with opened_voice(site, write_toy_model(folder / "model"), folder) as adapter:
        return adapter.located.adapter, site


def test_a_chat_in_a_terminal(voice: tuple[Path, Path]) -> None:
    adapter, site = voice
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    # Without answers to requests for the cursor's position, which a real terminal gives.
    environment = {**os.environ, "PYTHONPATH": path, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    with terminal_of("chat", str(adapter), "--max-new-tokens", "40", environment=environment) as terminal:
        terminal.wait_for("voice will answer; /help lists the commands, Ctrl-D ends the chat")
        terminal.wait_for(PROMPT)
        answer = terminal.enter("sea 1?", "sea 1?")
        assert "ye" in answer
        # Several lines, the first ended by Alt+Enter.
        terminal.enter("one" + ALT_ENTER + "two", "two")
        # The arrow brings back the line before, and a window may change its size while a line is written.
        terminal.enter("/reset", "all turns are forgotten")
        terminal.resize(40, 120)
        terminal.press(UP)
        terminal.wait_for("/reset")
        terminal.enter("", "all turns are forgotten")
        # Both, side by side in a window that is resized while they write.
        terminal.enter("/both", "voice and base will answer")
        terminal.press("sea 2?" + ENTER)
        terminal.wait_for("base")
        terminal.resize(24, 90)
        terminal.wait_for(PROMPT)
        # Ctrl-C stops the answer and not the chat. What came is kept.
        terminal.enter("/voice", "voice will answer")
        terminal.press("sea 3?" + ENTER)
        terminal.wait_for("ye")
        terminal.press(CTRL_C)
        start = time.monotonic()
        cut = terminal.wait_for(PROMPT)
        assert time.monotonic() - start < 1.5
        assert len(cut) < len(answer)
        # In a line it drops the line.
        terminal.press("never sent" + CTRL_C)
        terminal.wait_for(PROMPT)
        terminal.enter("/sing", "/sing: no such command")
        terminal.press(CTRL_D)
        while terminal.read(1.0):
            assert terminal.process.poll() in (None, 0)
        assert terminal.process.wait(timeout=30) == 0
        assert "Traceback" not in terminal.shown
