"""Files and folders that appear whole or not at all."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
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


@pytest.fixture
def in_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot exchange two folders."""
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)


KILLED = """
import os, signal, sys
from pathlib import Path
from mindprint import atomic

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

target, way = Path(sys.argv[1]), sys.argv[2]
if way == "two steps":
    atomic._exchange = lambda *_: False
    rename = Path.rename
    # The first rename moves the older folder away. The process dies before the second.
    Path.rename = lambda path, to: (rename(path, to), path == target and die())[0]
else:
    atomic._remove = die
with atomic.new_folder(target) as aside:
    (aside / "new.txt").touch()
"""


@pytest.mark.parametrize(("way", "kept"), [("one step", "new.txt"), ("two steps", "old.txt")])
def test_killed_while_it_replaces_a_folder_it_leaves_one_of_them(tmp_path: Path, way: str, kept: str) -> None:
    """Exactly between the two, on systems with two renames. In one step, the new folder is in place already."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").touch()
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), way], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert target.exists() == (way == "one step")
    atomic.tidy(tmp_path)
    assert names(target) == [kept]
    assert names(tmp_path) == ["out"]


def test_a_replaced_folder_is_not_put_back_over_a_new_one(tmp_path: Path) -> None:
    """Killed after the second rename, before the older folder was removed; and a lock of a living process holds."""
    left = tmp_path / ".out.mindprint-0123456789abcdef.replaced"
    (tmp_path / "out").mkdir()
    left.mkdir()
    handle = os.open(left, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    atomic.tidy(tmp_path)
    assert left.exists()
    os.close(handle)
    atomic.tidy(tmp_path)
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take two steps")
def test_while_a_folder_is_replaced_there_always_is_one(tmp_path: Path) -> None:
    target, missed, done = tmp_path / "out", [], threading.Event()
    target.mkdir()
    (target / "file").touch()

    def watch() -> None:
        while not done.is_set():
            if not (target / "file").exists():
                missed.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(50):
        with atomic.new_folder(target) as aside:
            (aside / "file").touch()
    done.set()
    watcher.join()
    assert not missed


@pytest.mark.usefixtures("in_two_steps")
def test_a_folder_is_replaced_in_two_steps(tmp_path: Path) -> None:
    test_a_folder_is_replaced_whole(tmp_path)


@pytest.mark.usefixtures("in_two_steps")
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


def test_a_system_without_locks_is_told_so_at_import() -> None:
    code = "import sys; sys.modules['fcntl'] = None; import mindprint"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "ImportError: Mindprint runs on Linux and macOS. Windows lacks the file locks" in done.stderr
