"""Two processes train what one trains, on each backend, with the built-in model. `nox -s ranks` does much more."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "ranks.py"
CASES = ["sft with dropout", "dpo"]
STEPS = 2


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
    benchmark.work(backend, CASES, STEPS, tmp_path / "1")
    mine, its = benchmark.launcher_variables(backend, 2)
    words = ["worker", "--backends", backend, "--steps", str(STEPS), "--into", str(tmp_path / "2"), "--cases", *CASES]
    words += ["--shard"] if shard else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **its}
    with subprocess.Popen([sys.executable, str(BENCHMARK), *words], env=environment) as second:
        for name, value in mine.items():
            monkeypatch.setenv(name, value)
        try:
            benchmark.work(backend, CASES, STEPS, tmp_path / "2", shard=shard)
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
