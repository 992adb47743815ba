"""Ranks: shares, exchanges, agreement, and what launchers say. Ranks are threads here, with a gather among them."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, cast

import numpy as np
import pytest

from mindprint.cli import main
from mindprint.cli.launch import mlx_command, torchrun_command
from mindprint.config import BackendConfig
from mindprint.contract import StepMetrics, UInt8
from mindprint.errors import BackendError, DataError, RankError
from mindprint.models.engine import Placement, Placements
from mindprint.plugins.backend import load_backend
from mindprint.plugins.launched import ALONE, launched, mlx_world, torchrun_world
from mindprint.plugins.ranks import BLOCK, Ranks
from mindprint.training.agreement import check_ranks, refuse_differences, shared_metrics
from mindprint.training.prepare import Prepared


def run_ranks(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Run `work` on each rank in a thread, and return what each returned or raised."""
    barrier, rows = Barrier(size, timeout=10), [np.zeros(0, np.uint8)] * size

    def make(rank: int) -> Ranks:
        def gather(values: UInt8) -> UInt8:
            rows[rank] = values
            barrier.wait()
            gathered = np.stack(rows)
            barrier.wait()
            return gathered

        return Ranks(rank, size, gather)

    def one(rank: int) -> Any:
        try:
            return work(make(rank))
        except Exception as error:  # noqa: BLE001 (returned)
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def test_values_of_any_size_arrive_at_all_ranks() -> None:
    contents = [b"", b"x" * (BLOCK - 9), b"y" * 5000]
    assert run_ranks(3, lambda ranks: ranks.gather_bytes(contents[ranks.rank])) == [contents] * 3
    values = [[0.1, None, float("inf")], {"a": [1]}, "é"]
    assert run_ranks(3, lambda ranks: ranks.gather(values[ranks.rank])) == [values] * 3


def test_every_rank_works_on_its_share_and_gets_all_results() -> None:
    worked: list[list[int]] = [[], [], []]

    def work(ranks: Ranks) -> list[tuple[int, int]]:
        before: list[int] = []

        def square(item: int) -> int:
            worked[ranks.rank].append(item)
            return item * item

        results = list(ranks.divide(range(7), square, before.append))
        assert before == list(range(0, 7, ranks.size))
        return results

    expected = [(item, item * item) for item in range(7)]
    assert run_ranks(3, work) == [expected] * 3
    assert worked == [[0, 3, 6], [1, 4], [2, 5]]
    assert work(Ranks()) == expected


def test_more_ranks_than_items() -> None:
    assert run_ranks(3, lambda ranks: list(ranks.divide([5], lambda item: -item))) == [[(5, -5)]] * 3
    assert [list(Ranks(rank, 3).share("ab")) for rank in range(3)] == [["a"], ["b"], []]


def test_an_error_of_one_rank_is_told_once() -> None:
    def prepare(ranks: Ranks) -> str:
        def read() -> str:
            if ranks.rank == 1:
                raise DataError("data: no such folder")
            return "rows"

        return ranks.together(read)

    first, *others = run_ranks(3, prepare)
    assert str(first) == "rank 1 of 3: data: no such folder"
    assert [(type(error), str(error)) for error in others] == [(RankError, "")] * 2


def test_an_error_of_all_ranks_is_told_as_by_a_single_process() -> None:
    def fail(ranks: Ranks) -> None:
        def read() -> None:
            raise DataError("data: no such folder")

        ranks.together(read)

    first, second = run_ranks(2, fail)
    assert (type(first), str(first), str(second)) == (DataError, "data: no such folder", "")


def test_the_first_rank_decides_for_all() -> None:
    assert run_ranks(2, lambda ranks: ranks.from_first(lambda: ["from", ranks.rank])) == [["from", 0]] * 2

    def fail() -> None:
        raise DataError("no")

    first, second = run_ranks(2, lambda ranks: ranks.from_first(fail))
    assert (str(first), type(second), str(second)) == ("no", RankError, "")


def test_all_ranks_stop_at_the_same_exchange() -> None:
    def work(ranks: Ranks) -> list[bool]:
        ranks.asked_to_stop = lambda: ranks.rank == 1
        before = ranks.stop_requested()
        ranks.gather(None)
        return [before, ranks.stop_requested()]

    assert run_ranks(2, work) == [[False, True]] * 2


def test_a_difference_is_named_with_its_rank() -> None:
    facts = [{"torch": "2.1", "sft.learning_rate": "0.1"}, {"torch": "2.2", "sft.learning_rate": "0.1"}]
    first, second = run_ranks(2, lambda ranks: refuse_differences(ranks, facts[ranks.rank]))
    assert str(first) == "rank 1 of 2 differs from rank 0: torch is 2.2 there and 2.1 on rank 0"
    assert (type(second), str(second)) == (RankError, "")
    assert run_ranks(2, lambda ranks: refuse_differences(ranks, facts[0])) == [None, None]


def test_log_probs_of_pairs_come_back_in_the_order_of_the_step() -> None:
    pairs = [2, 1, 3]
    chosen = np.arange(6, dtype=np.float32)
    shares = [chosen[[0, 1, 3, 4, 5]], chosen[[2]]]

    def work(ranks: Ranks) -> StepMetrics:
        mine = shares[ranks.rank]
        return shared_metrics(ranks, StepMetrics(0.5, 1.0, False, None, mine, -mine), pairs)

    for metrics in run_ranks(2, work):
        np.testing.assert_array_equal(metrics.chosen_log_probs, chosen)
        np.testing.assert_array_equal(metrics.rejected_log_probs, -chosen)


def test_ranks_whose_gradients_differ_are_refused() -> None:
    first, second = run_ranks(2, lambda ranks: shared_metrics(ranks, StepMetrics(0.5, 1.0 + ranks.rank), []))
    assert "gradient norm 2.0 on rank 1" in str(first)
    assert str(second) == ""


def test_a_single_process_does_not_hold_a_part_of_a_base(toy: str) -> None:
    placement = Placement(load_backend(toy), "cpu", "float32", shard=True)
    with pytest.raises(
        BackendError, match="this is one: start them with `mindprint launch -n 2`, or set backend.shard"
    ):
        check_ranks(cast("Prepared", None), [placement])


def test_a_backend_that_does_not_shard_is_refused(toy: str) -> None:
    with pytest.raises(BackendError, match=r"'toy' does not divide a base among ranks .*: set backend.shard=false"):
        Placements().resolve_training(BackendConfig(type=toy, shard=True))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "1"}, "RANK is set and WORLD_SIZE is not: the environment of torchrun is half set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "ranks are counted from 0"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "'one', which is not a whole number"),
        ({"MLX_RANK": "0"}, "MLX_RANK is set and MLX_WORLD_SIZE is not"),
        ({"MLX_HOSTFILE": "missing.json"}, "MLX_HOSTFILE is set and MLX_RANK is not"),
        ({"MLX_HOSTFILE": "missing.json", "MLX_RANK": "0"}, "which is not a list of hosts"),
    ],
)
def test_a_half_set_environment_is_refused_in_one_line(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BackendError, match=expected):
        launched()
    assert main(["train", "nowhere"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_launch_becomes_the_launcher_of_the_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchrun_command(2)[1:] == [
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mindprint", "--",
    ]  # fmt: skip
    assert mlx_command(3)[1:5] == ["-n", "3", "--backend", "ring"]
    monkeypatch.setattr("os.execvp", lambda *_: pytest.fail("it was started"))
    assert main(["launch", "-n", "2", "nowhere", "--bakend", "mlx"]) == 2


def test_what_launchers_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert launched() == (ALONE, "")
    hosts = tmp_path / "hosts.json"
    hosts.write_text("")
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    monkeypatch.setenv("MLX_RANK", "0")
    assert mlx_world() == ALONE
    hosts.write_text(json.dumps([["127.0.0.1:1"], ["127.0.0.1:2"]]))
    assert launched() == ((0, 2), "mlx.launch")
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert torchrun_world() == (1, 4)
