"""Run folders: nothing of another run is ever lost, whatever fails, moves or starts at the same time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from run_samples import write_sample_run

from mindprint.config import make_config
from mindprint.errors import RunError
from mindprint.runs.costs import Costs, read_costs, write_costs
from mindprint.runs.folder import RUN_FORMAT, RunFolder, open_run, runs_folder
from mindprint.runs.opened import locate_adapter
from mindprint.runs.reading import read_run


class FailedError(Exception):
    """What ends a run in these tests."""


def fail_in(runs: Path, run: Path | None = None) -> RunFolder:
    with pytest.raises(FailedError), open_run(runs, run, None) as folder:
        (folder.path / "metrics.jsonl").touch()
        raise FailedError
    return folder


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    fail_in(tmp_path / "project" / "runs")
    assert not (tmp_path / "project").exists()
    fail_in(tmp_path, tmp_path / "a" / "b" / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_first_run_that_fails_leaves_the_run_that_started_meanwhile(tmp_path: Path) -> None:
    """It made `runs/` itself, and must not take it away with the second run in it."""
    runs = tmp_path / "runs"
    with pytest.raises(FailedError), open_run(runs, None, None) as first:
        with open_run(runs, None, None) as second:
            (second.checkpoints / "000000").mkdir(parents=True)
        raise FailedError
    assert [first.path.name, second.path.name] == ["run-001", "run-002"]
    assert not first.path.exists() and second.has_checkpoint


def test_a_run_with_a_checkpoint_stays(tmp_path: Path) -> None:
    with pytest.raises(FailedError), open_run(tmp_path / "runs", None, None) as folder:
        (folder.checkpoints / "000000").mkdir(parents=True)
        raise FailedError
    assert folder.has_checkpoint


def test_a_folder_that_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    fail_in(tmp_path, tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


def test_a_run_that_was_moved_away_stays_where_it_is(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(FailedError), open_run(runs, None, None) as folder:
        folder.path.rename(runs / "kept")
        raise FailedError
    assert (runs / "kept" / ".lock").exists()


def test_what_was_put_in_the_place_of_a_run_stays(tmp_path: Path) -> None:
    """Its name is that of the run that failed, and the folder is another."""
    runs = tmp_path / "runs"
    with pytest.raises(FailedError), open_run(runs, None, None) as folder:
        folder.path.rename(tmp_path / "elsewhere")
        folder.path.mkdir()
        (folder.path / "precious").touch()
        raise FailedError
    assert (folder.path / "precious").exists() and (tmp_path / "elsewhere").exists()


def test_a_link_in_the_place_of_a_run_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").touch()
    with pytest.raises(FailedError), open_run(tmp_path / "runs", None, None) as folder:
        shutil.rmtree(folder.path)
        folder.path.symlink_to(tmp_path / "other")
        raise FailedError
    assert (tmp_path / "other" / "precious").exists()


@pytest.mark.parametrize("failing", [False, True], ids=["all run", "every second fails"])
def test_runs_that_start_at_once_have_a_folder_each(tmp_path: Path, failing: bool) -> None:
    """24 at a time, ten times over: no two share a number, and none loses its folder to one that fails."""
    for attempt in range(10):
        runs, together = tmp_path / str(attempt) / "runs", Barrier(24)

        def start(number: int, runs: Path = runs, together: Barrier = together) -> Path | None:
            together.wait()
            try:
                with open_run(runs, None, None) as folder:
                    (folder.path / f"of-{number}").touch()
                    if failing and number % 2:
                        raise FailedError  # noqa: TRY301
                    (folder.checkpoints / "000000").mkdir(parents=True)
                    return folder.path
            except FailedError:
                return None

        with ThreadPoolExecutor(24) as pool:
            started = [path for path in pool.map(start, range(24)) if path is not None]
        assert len(started) == len(set(started)) == (12 if failing else 24)
        for path in started:
            assert sorted(entry.name[:3] for entry in path.iterdir()) == [".lo", "che", "of-"]
        assert {entry for entry in runs.iterdir() if entry.name.startswith("run-")} == set(started)


def test_a_second_process_with_the_same_folder_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_run(tmp_path, run, None):
        with pytest.raises(RunError, match="already holds a run"), open_run(tmp_path, run, None):
            pass
        with pytest.raises(RunError, match="another process is training"), open_run(tmp_path, run, "last"):
            pass
    assert run.is_dir()


def test_a_runs_own_configuration_starts_a_run_next_to_it(tmp_path: Path) -> None:
    run = write_sample_run(tmp_path / "runs" / "run-001")
    assert runs_folder(make_config({}, run)) == tmp_path / "runs"
    assert runs_folder(make_config({}, tmp_path)) == tmp_path / "runs"


def complete_run(project: Path, name: str, started: str | None) -> Path:
    run = write_sample_run(project / "runs" / name, evaluated=False)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | ({"started": started} if started else {})))
    (project / "mindprint.yaml").touch()
    return run


@pytest.mark.parametrize("seed", range(4))
def test_the_newest_complete_run_is_the_same_in_every_copy(tmp_path: Path, seed: int) -> None:
    """By what the runs record, not by the times of files, which a clone or a copy gives as it pleases."""
    complete_run(tmp_path, "run-001", "2026-03-01T10:00:00.000000+00:00")
    newest = complete_run(tmp_path, "harbour", "2026-03-03T10:00:00.000000+00:00")
    complete_run(tmp_path, "run-010", "2026-03-02T10:00:00.000000+00:00")
    files = sorted(tmp_path.rglob("*"))
    for file in files:
        os.utime(file, (random.Random(f"{seed} {file.name} {file.parent.name}").randrange(10**9),) * 2)
    assert locate_adapter(tmp_path).adapter == newest / "adapter"


def test_runs_without_a_record_go_by_their_number(tmp_path: Path) -> None:
    complete_run(tmp_path, "run-009", None)
    newest = complete_run(tmp_path, "run-010", None)
    os.utime(newest / "manifest.json", (0, 0))
    assert locate_adapter(tmp_path).adapter == newest / "adapter"


def test_fields_of_a_newer_version_are_read_past(tmp_path: Path) -> None:
    run = write_sample_run(tmp_path / "run")
    expected = read_run(run)
    for name in ("metrics", "evaluations", "decisions", "answers"):
        file = run / f"{name}.jsonl"
        lines = [json.loads(line) | {"novelty": {"deep": [1]}} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"] = [stage | {"novelty": 1} for stage in manifest["stages"]]
    (run / "manifest.json").write_text(json.dumps(manifest | {"novelty": 1}))
    record = read_run(run)
    assert record.broken == expected.broken == ()
    assert (record.decisions, record.evaluations, record.answers) == (
        expected.decisions,
        expected.evaluations,
        expected.answers,
    )
    assert RunFolder(run).decisions() == list(expected.decisions or ())


def test_a_format_that_is_too_new_is_named(tmp_path: Path) -> None:
    run = write_sample_run(tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"format": RUN_FORMAT + 1}))
    too_new = f"is in format {RUN_FORMAT + 1}, which a newer Mindprint wrote; this one reads formats up to {RUN_FORMAT}"
    with pytest.raises(RunError, match=rf"manifest.json: {too_new}"):
        read_run(run)
    shutil.rmtree(run / "adapter")
    with pytest.raises(RunError, match=rf"manifest.json: {too_new}"), open_run(tmp_path, run, "last"):
        pass
    (run / "split.json").write_text(json.dumps({"format": 2, "prompts": {}}))
    with pytest.raises(RunError, match=rf"split.json: {too_new}"):
        RunFolder(run).trained_prompts()
    write_costs(run, Costs(1.0, 2))
    assert read_costs(run) == Costs(1.0, 2)
    (run / "costs.json").write_text(json.dumps({"format": 2, "load": 1.0}))
    with pytest.raises(RunError, match=rf"costs.json: {too_new}"):
        read_costs(run)


def test_an_output_that_would_block_is_not_taken_for_another_process(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), RunFolder(tmp_path / "run").locked():
        raise BlockingIOError(11, "write could not complete without blocking")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    words = f"lock: cannot be locked: {os.strerror(number)}; choose a place on a file system with locks with --run"
    with pytest.raises(RunError, match=words), RunFolder(tmp_path / "run").locked():
        pass


LINE = '{"topic": "a", "stage": "sft", "step": %d, "loss": 1.0, "seconds": 0.1, "backend": "toy"}'


def test_a_damaged_line_before_others_is_named(tmp_path: Path) -> None:
    """A line that a crash cut off is the last one. To stop at any other would drop those behind it without a word."""
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("\n".join([LINE % 1, "", LINE % 2, LINE[:30]]))
    assert [line["step"] for line in folder.read_steps()] == [1, 2]
    folder.metrics.write_text("\n".join([LINE % 1, LINE[:30], LINE % 2, ""]))
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 2: cannot be read as JSON: .*; restore the file"):
        folder.read_steps()


def test_a_folder_that_a_killed_process_was_replacing_is_put_back(tmp_path: Path) -> None:
    """On systems that cannot exchange folders: a checkpoint that is written again after a resume."""
    moved = tmp_path / "checkpoints" / ".000002.mindprint-0123456789abcdef.replaced"
    moved.mkdir(parents=True)
    with RunFolder(tmp_path).locked():
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000002"]


@pytest.mark.parametrize(
    ("section", "value"),
    [("environment", 1), ("environment", {"toy": []}), ("model", "name"), ("identity", [1]), ("model", None)],
)
def test_a_section_of_the_manifest_of_another_type_is_named(tmp_path: Path, section: str, value: object) -> None:
    run = write_sample_run(tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, section: value}))
    with pytest.raises(RunError, match=rf"manifest\.json: {section}.*: input should be .*; restore the file"):
        read_run(run)
