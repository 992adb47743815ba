"""Temporary files and folders: unique, exclusive, never through a link, removed once their process is dead."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mindprint import atomic
from mindprint.errors import RunError
from mindprint.events import StepDone
from mindprint.runs.folder import RunFolder

HOLD = """
import sys, time
from pathlib import Path
from mindprint import atomic
with atomic.new_folder(Path(sys.argv[1])) as aside:
    (aside / "half").write_text("half")
    print(aside.name, flush=True)
    time.sleep(60)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def hold(target: Path) -> tuple[subprocess.Popen[str], str]:
    """Start a process that fills a folder for `target` and does not finish. Return it and the temporary name."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as output:
        return process, output.readline().strip()


@pytest.mark.parametrize("name", [".report.html.partial", ".report.html.old"])
def test_a_planted_link_is_not_followed(tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(precious)
    (run / "report.html").symlink_to(precious)
    atomic.write_text(run / "report.html", "a report")
    assert precious.read_text() == "precious"
    assert (run / "report.html").read_text() == "a report" and not (run / "report.html").is_symlink()


def test_lines_of_a_run_do_not_follow_links(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").symlink_to(precious)
    step = StepDone("main", "sft", "mlx", 1, 1, 1.0, 1e-3, 1.0, 10, 0.1)
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written"):
        RunFolder(run).append_step(step)
    (run / ".lock").symlink_to(tmp_path / "made")
    with pytest.raises(RunError, match="cannot be written"), RunFolder(run).locked():
        pass
    assert precious.read_text() == "precious" and not (tmp_path / "made").exists()


def test_of_two_that_make_one_folder_the_first_stays_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RunError, match="exists already"), atomic.new_folder(target, replace=False) as late:
        (late / "late").touch()
        with atomic.new_folder(target, replace=False) as first:
            (first / "first").touch()
    assert names(target) == ["first"]
    assert names(tmp_path) == ["out"]


def test_many_writers_of_one_file_leave_one_of_their_contents(tmp_path: Path) -> None:
    target = tmp_path / "file"
    contents = [str(number) * 10_000 for number in range(8)]
    threads = [
        threading.Thread(target=lambda text=text: [atomic.write_text(target, text) for _ in range(20)])
        for text in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_text() in contents
    assert names(tmp_path) == ["file"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    process, left = hold(tmp_path / "killed")
    process.kill()
    process.wait()
    assert names(tmp_path) == [left]
    with atomic.new_folder(tmp_path / "other"):
        pass
    assert names(tmp_path) == ["other"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    process, held = hold(tmp_path / "out")
    try:
        atomic.write_text(tmp_path / "file", "x")
        with atomic.new_folder(tmp_path / "out"):
            pass
        assert names(tmp_path) == sorted([held, "file", "out"])
        assert names(tmp_path / held) == ["half"]
    finally:
        process.kill()
        process.wait()


def test_foreign_names_are_left_alone(tmp_path: Path) -> None:
    kept = [".notes.partial", ".x.mindprint-0123.partial", "download.partial", ".out.partial"]
    for name in kept:
        (tmp_path / name).touch()
    planted = tmp_path / ".out.mindprint-0123456789abcdef.partial"
    planted.symlink_to(tmp_path / "elsewhere")
    with atomic.new_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == sorted([*kept, planted.name, "out"])
