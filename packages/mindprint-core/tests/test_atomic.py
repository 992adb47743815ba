"""Files and folders that appear whole or not at all."""

import os
from pathlib import Path

import pytest

from mindprint import atomic
from mindprint.errors import RunError


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic.new_folder(target) as aside:
        (aside / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "a"
    assert names(tmp_path) == ["out"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic.new_folder(target) as aside:
        (aside / "new.txt").write_text("new")
        1 / 0  # noqa: B018
    assert names(target) == ["old.txt"]
    assert names(tmp_path) == ["out"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with atomic.new_folder(tmp_path / "out") as aside:
            (aside / name).touch()
    assert names(tmp_path / "out") == ["two"]
    assert names(tmp_path) == ["out"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("one", "zwölf"):
        atomic.write_text(tmp_path / "file", text)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "zwölf"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="cannot be written: No space left on device"):
        atomic.write_text(tmp_path / "file", "x")
    with pytest.raises(RunError, match="No space left on device"), atomic.new_folder(tmp_path / "out") as aside:
        (aside / "a").touch()
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_replaced_is_still_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").touch()
    rename = Path.rename

    def failing(path: Path, to: Path) -> Path:
        if (path / "new.txt").exists() and not to.exists():
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(RunError, match="Input/output error"), atomic.new_folder(target) as aside:
        (aside / "new.txt").touch()
    assert names(target) == ["old.txt"]
    assert names(tmp_path) == ["out"]


def test_a_folder_removed_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open
    removed: list[Path] = []

    def late(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECTORY and not removed:
            removed.append(path)
            path.rmdir()
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", late)
    with atomic.new_folder(tmp_path / "out") as aside:
        (aside / "a.txt").touch()
    assert removed
    assert names(tmp_path) == ["out"]
