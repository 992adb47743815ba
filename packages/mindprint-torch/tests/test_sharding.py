"""Sharded bases: whose turn it is, shares of rows, and refusals. `tests/parity/test_ranks.py` trains on one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mindprint
from mindprint.config import ModelConfig
from mindprint.contract import ModelSpec
from mindprint.errors import ConfigError, ModelError
from mindprint.models.folder import resolve_model
from mindprint.models.sizes import read_base_sizes
from mindprint.plugins.backend import Backend
from mindprint_torch.sharding import Turn, Turns, decoder_layers, row_range

Folders = Callable[[str], Path]


def exchanged_turns(wanted: Sequence[Sequence[Turn]]) -> list[list[str]]:
    """Return what each rank does that wants these turns, and then rests. Ranks are threads here."""
    barrier, told = threading.Barrier(len(wanted)), [0] * len(wanted)
    done: list[list[str]] = [[] for _ in wanted]

    def work(rank: int) -> None:
        def announce(number: int) -> Sequence[int]:
            told[rank] = number
            barrier.wait()
            numbers = list(told)
            barrier.wait()
            return numbers

        lend = {turn: lambda turn=turn: done[rank].append(f"lend {turn.name}") for turn in (Turn.READ, Turn.TRAIN)}
        turns = Turns(lend, announce)
        for turn in wanted[rank]:
            turns.take(turn)
            done[rank].append(turn.name)
        turns.take(Turn.REST)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return done


def test_a_rank_that_rests_lends_to_those_that_work() -> None:
    assert exchanged_turns([[Turn.TRAIN, Turn.TRAIN, Turn.TRAIN], [Turn.TRAIN], []]) == [
        ["TRAIN", "TRAIN", "TRAIN"],
        ["TRAIN", "lend TRAIN", "lend TRAIN"],
        ["lend TRAIN", "lend TRAIN", "lend TRAIN"],
    ]


def test_passes_of_two_kinds_do_not_meet() -> None:
    """Training goes first: a rank that wants to read lends until the others no longer train."""
    assert exchanged_turns([[Turn.READ, Turn.TRAIN], [Turn.TRAIN, Turn.READ]]) == [
        ["lend TRAIN", "READ", "TRAIN"],
        ["TRAIN", "READ", "lend TRAIN"],
    ]


@pytest.mark.parametrize(("rows", "size"), [(10, 2), (10, 3), (3, 4), (1, 2), (4, 4)])
def test_shares_of_rows_are_those_of_torch_chunk(rows: int, size: int) -> None:
    parts = [part.tolist() for part in torch.arange(rows).chunk(size)]
    parts += [[]] * (size - len(parts))
    assert [list(range(*row_range(rows, rank, size))) for rank in range(size)] == parts


def test_a_single_process_does_not_shard(backend: Backend, folders: Folders) -> None:
    with pytest.raises(ModelError, match="a single process does not shard a base: start several"):
        backend.load_model(ModelSpec(str(folders("llama")), "cpu", "float32", shard=True))


def test_quantized_bases_are_not_sharded(backend: Backend, folders: Folders) -> None:
    spec = ModelSpec(str(folders("llama")), "cpu", "float32", quantize="nf4", shard=True)
    with pytest.raises(ModelError, match="a quantized base is not sharded: set backend.shard=false"):
        backend.load_model(spec)


def test_the_plan_counts_the_part_that_a_rank_holds() -> None:
    config: dict[str, Any] = {
        "model": {"name": "builtin:tiny"},
        "backend": {"type": "torch", "device": "cpu", "dtype": "float32", "shard": True},
        "data": {"path": None, "heldout_fraction": 0.0},
        "dpo": {"enabled": False},
    }
    rows = [{"prompt": "a", "completion": "b"}]
    sizes = read_base_sizes(resolve_model(ModelConfig(name="builtin:tiny"), Path()).path)
    weights = {n: mindprint.plan(config, rows=rows, ranks=n).stages[0].need.weights for n in (2, 4)}
    assert weights[2] - weights[4] == 4 * sizes.layer_elements // 4
    gathered = 2 * sizes.layer_elements // sizes.layers
    assert weights[2] == 4 * (sizes.elements - sizes.layer_elements // 2 + gathered)
    with pytest.raises(ConfigError, match=r"several processes: name their number \(`mindprint plan --ranks 2`\)"):
        mindprint.plan(config, rows=rows)


def test_a_model_without_known_layers_is_not_sharded() -> None:
    with pytest.raises(ModelError, match="Linear has no decoder layers that can be sharded"):
        decoder_layers(nn.Linear(2, 2))
