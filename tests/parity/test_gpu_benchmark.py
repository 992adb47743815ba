"""`benchmarks/gpu.py` on any machine: the operations that it counts, and workers that fail without harm.

`python benchmarks/gpu.py --tiny` runs all of it in a few minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from on_gpu import calls, work, workers
from on_gpu.sections import FULL, SECTIONS, TINY, OutOfTime, Run, cell, measure_cell
from on_gpu.workers import CallError, Worker, Workers

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_parameters_are_those_of_the_llamas() -> None:
    """Of the published models: 1,235,814,400 and 8,030,261,248 parameters."""
    assert work.parameter_count(work.SHAPES["1b"]) == 1_235_814_400
    assert work.parameter_count(work.SHAPES["8b"]) == 8_030_261_248


def test_operations_of_one_row() -> None:
    """By hand, for two layers of width 2 without key heads less than heads, inner size 3, vocabulary 5."""
    shape = work.Shape(hidden=2, inner=3, layers=2, heads=1, key_heads=1, vocabulary=5, tied=True)
    assert (shape.layer_weights, shape.key_weights) == (4 * 4 + 3 * 6, 2 * 4)
    row = work.Row([2, 3], [4, 0], [3, 4, 0])
    # Two prompt tokens and two of the completion: products, attention (2^2 / 2 + 2 * 2 + 2^2 / 2 pairs), output layer.
    # In the last layer, keys and values of all four. Queries, output, block and attention of the completion's two.
    expected = 4 * (34 * 4 + 8 * 4 + 26 * 2) + 12 * 2 * (8 + 6) + 4 * 2 * 5 * 2
    assert work.useful_flops([row], shape, preference=False) == expected
    # The prompt once, both completions: 2 + 2 + 3 tokens; 2 + (4 + 2) + (6 + 4.5) pairs.
    expected = 4 * (34 * 7 + 8 * 7 + 26 * 5) + 12 * 2 * (18.5 + 16.5) + 4 * 2 * 5 * 5
    assert work.useful_flops([row], shape, preference=True) == expected


@pytest.mark.parametrize(("stage", "prompt"), [("sft", 16), ("dpo", 32)])
def test_rows_have_the_length_that_was_asked_for(stage: str, prompt: int) -> None:
    rows = work.rows_of_length(64, 3, stage, vocabulary=50)
    assert [(len(row.prompt), len(row.prompt + row.chosen), len(row.prompt + row.rejected)) for row in rows] == [
        (prompt, 64, 64)
    ] * 3
    assert rows[0] != rows[1]
    assert rows == work.rows_of_length(64, 3, stage, vocabulary=50)


@pytest.mark.parametrize("sizes", [FULL, TINY])
def test_a_cell_has_as_many_tokens_as_fit(sizes: Any, tmp_path: Path) -> None:
    run = Run(tmp_path, Workers(tmp_path), sizes, 60.0)
    for length in sizes.lengths:
        for stage in ("sft", "dpo"):
            chosen = cell(run, sizes.models[0], stage, length, checkpointing=False)
            sequences = chosen["rows"] * (2 if stage == "dpo" else 1)
            assert chosen["rows"] == 1 or sequences * length <= sizes.step_tokens


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Worker]:
    """Start workers that import nothing, and answer calls that fail."""
    code = (
        "import os, sys, time\nfrom on_gpu import calls, workers\n"
        "def fails(): raise MemoryError('out of it\\nand more')\n"
        "calls.CALLS = {'echo': lambda text: text, 'fails': fails,\n"
        "               'hangs': lambda: time.sleep(60), 'dies': lambda: os._exit(7)}\n"
        "calls.import_everything = calls.free_memory = lambda: None\n"
        "workers.serve(sys.stdin, sys.stdout)\n"
    )
    real = workers.subprocess.Popen

    def started(command: list[str], **options: Any) -> Any:
        return real([command[0], "-c", code], **options)

    # Without torch, which no call here needs.
    monkeypatch.setattr(workers, "subprocess", SimpleNamespace(Popen=started, PIPE=workers.subprocess.PIPE))
    return lambda folder: Worker(folder / "log")


def test_a_worker_answers_and_survives_a_failed_call(quick: Callable[[Path], Worker], tmp_path: Path) -> None:
    worker = quick(tmp_path)
    assert worker.ask("echo", 20, text="tea") == "tea"
    assert worker.reusable
    with pytest.raises(CallError, match="^MemoryError: out of it$") as failure:
        worker.ask("fails", 20)
    assert any("in fails" in frame for frame in failure.value.frames)
    assert not worker.reusable
    assert worker.ask("echo", 20, text="again") == "again"
    worker.stop()


def test_a_worker_that_hangs_is_stopped(quick: Callable[[Path], Worker], tmp_path: Path) -> None:
    worker = quick(tmp_path)
    worker.ask("echo", 20, text="ready")
    started = time.perf_counter()
    with pytest.raises(CallError, match="no answer in 0 s: stopped"):
        worker.ask("hangs", 0.2)
    assert time.perf_counter() - started < 10
    with pytest.raises(CallError, match="the worker is dead"):
        worker.ask("echo", 1, text="tea")


def test_a_worker_that_dies_is_reported(quick: Callable[[Path], Worker], tmp_path: Path) -> None:
    with pytest.raises(CallError, match=r"the worker died \(status 7\)"):
        quick(tmp_path).ask("dies", 20)


def test_a_failed_cell_is_kept_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Failing:
        def ask(self, *_: Any, **__: Any) -> Any:
            raise CallError("OutOfMemoryError: 80 GiB", ["line 1", "line 2"])

    run = Run(tmp_path, Workers(tmp_path), TINY, 60.0)
    worker: Any = Failing()
    measure_cell(run, "speed", worker, "trl", cell(run, "tiny", "sft", 64, checkpointing=False))
    assert run.failures == ["speed: trl sft 64: OutOfMemoryError: 80 GiB"]
    assert "FAILED: OutOfMemoryError: 80 GiB\n      line 1\n      line 2" in capsys.readouterr().out
    assert "OutOfMemoryError" in (tmp_path / "gpu.json").read_text()


def test_nothing_begins_without_time(tmp_path: Path) -> None:
    run = Run(tmp_path, Workers(tmp_path), TINY, 1.0)
    worker: Any = None
    with pytest.raises(OutOfTime):
        run.ask(worker, "about", 10)
    with pytest.raises(OutOfTime):
        SECTIONS["conformance"](run)


def test_every_call_of_a_section_exists() -> None:
    """A section that asks for an unknown call would only fail on the GPU."""
    source = (BENCHMARKS / "on_gpu" / "sections.py").read_text()
    for name in calls.CALLS:
        assert name == "forget" or f'"{name}"' in source, name
    assert next(iter(SECTIONS)) == "heads"
