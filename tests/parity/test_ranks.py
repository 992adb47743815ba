"""Two processes train what one trains, on each backend, with the built-in model. `nox -s ranks` does much more."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import mindprint
from mindprint.events import CheckpointWritten, Event

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "ranks.py"
CASES = ["sft with dropout", "dpo"]
STEPS = 2
SHORT = (
    "backend.type=torch",
    "sft.steps_per_topic=4",
    "sft.learning_rate=3e-4",
    "dpo.steps_per_topic=4",
    "checkpoints.every=1",
)
"""Settings of a run of eight steps, with a checkpoint at each of them.

The first steps of AdamW are about as long as the learning rate, however small an element's gradient is. So an element
whose gradient is little more than rounding differs in proportion to the rate. The bounds are those of the benchmark.
"""


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_ranks", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("backend", "shard"), [("torch", False), ("torch", True), ("mlx", False)])
def test_two_ranks_are_one(
    backend: str, shard: bool, benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process is the single one, and then the first of two: the second one alone imports everything again.

    With `shard`, each of the two holds a part of the base.
    """
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
    words = ["worker", "--backends", backend, "--steps", str(STEPS), "--cases", *CASES, "--into"]
    benchmark.work(benchmark.arguments([*words, str(tmp_path / "1")]))
    mine, its = benchmark.launcher_variables(backend, 2)
    words += [str(tmp_path / "2"), *(["--shard"] if shard else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **its}
    with subprocess.Popen([sys.executable, str(BENCHMARK), *words], env=environment) as second:
        for name, value in mine.items():
            monkeypatch.setenv(name, value)
        try:
            benchmark.work(benchmark.arguments(words))
            assert second.wait() == 0
        finally:
            second.kill()
            if backend == "torch":
                import torch.distributed

                from mindprint_torch import ranks

                torch.distributed.destroy_process_group()
                ranks.join.cache_clear()
    alone = benchmark.read_results(tmp_path / "1", 1)[0]
    ranks = benchmark.read_results(tmp_path / "2", 2)
    for case in CASES:
        assert "bit-equal" in benchmark.compare_case(alone[case], [rank[case] for rank in ranks])


class StoppedError(Exception):
    """A run ends here."""


def test_a_run_continues_with_a_whole_base_and_with_a_sharded_one(benchmark: ModuleType, tmp_path: Path) -> None:
    """Runs of one process are in this one, which has torch already."""
    project = benchmark.make_project(tmp_path)
    config = mindprint.load_config(project, SHORT)
    whole, in_shards, at_first_whole = (tmp_path / name for name in ("whole", "in-shards", "at-first-whole"))
    mindprint.train(config, run=whole, progress=False)
    sharded = benchmark.World(2, shard=True)

    processes = benchmark.start_ranks("torch", 2, [*benchmark.train(project, in_shards), *SHORT, *sharded.settings])
    benchmark.wait_for_checkpoint(in_shards, 3)
    for process in processes:
        process.kill()
    benchmark.end(processes, expect_success=False)
    mindprint.train(config, run=in_shards, resume=True, progress=False)
    assert benchmark.compare_runs(whole, in_shards)

    def stop(event: Event) -> None:
        if isinstance(event, CheckpointWritten) and event.step >= 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        mindprint.train(config, run=at_first_whole, progress=False, on_event=stop)
    words = [*benchmark.train(project, at_first_whole), "--resume", *SHORT, *sharded.settings]
    benchmark.end(benchmark.start_ranks("torch", 2, words))
    assert benchmark.compare_runs(whole, at_first_whole)
