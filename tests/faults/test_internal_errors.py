"""An error of ours has an exit code of its own, one line, and a log; what comes from files cannot steer a terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mindprint.cli import main
from mindprint.cli.output import say
from mindprint.printing import tell, visible


def test_an_internal_error_ends_with_70_and_names_its_log(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("one\nby \x1b[31mnought")

    monkeypatch.setattr("mindprint.cli.init.config_text", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["init", str(tmp_path / "voice")]) == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "mindprint: error: ZeroDivisionError: one by \\x1b[31mnought: this is a mistake in Mindprint"
    )
    log = re.search(r"please report it with (\S+)$", line)
    assert log is not None
    assert "in broken" in Path(log[1]).read_text()
    assert not (tmp_path / "voice").exists()


def test_too_little_memory_is_no_internal_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("mindprint.cli.init.config_text", hungry)
    assert main(["init", str(tmp_path / "voice")]) == 2
    assert capsys.readouterr().err == "mindprint: error: needs more memory than there is\n"


def test_what_steers_a_terminal_is_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b]0;title\x07b\tc\nd é 漢 👩\u200d👩")
    tell("\x9b2J\u202eevil\udc80\r")
    captured = capsys.readouterr()
    assert captured.out == "a\\x1b]0;title\\x07b\tc\nd é 漢 👩\u200d👩\n"
    assert captured.err == "\\x9b2J\\u202eevil\\udc80\\r\n"


def test_a_name_with_escapes_is_shown_as_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["report", str(tmp_path / "\x1b[2J")]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error and "\\x1b[2J" in error


def test_every_control_character_is_visible() -> None:
    steering = [chr(code) for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"]
    assert all(visible(sign).isprintable() for sign in steering)
