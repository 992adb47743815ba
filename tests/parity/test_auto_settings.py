"""Batch sizes and gradient checkpointing that are `auto`, on both backends and on ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest

import mindprint
from mindprint.api.training import with_rows
from mindprint.config import ConfigFile, load_config, make_config
from mindprint.contract import PreferenceBatch, TokenBatch, UInt8
from mindprint.errors import ConfigError
from mindprint.events import Event, StepDone
from mindprint.hookspecs import hookimpl
from mindprint.models.engine import Placements
from mindprint.plugins.ranks import Ranks
from mindprint.training.auto import Choice
from mindprint.training.choosing import choose_settings
from mindprint.training.memory import GIB, MARGIN
from mindprint.training.prepare import prepare

ROWS = [{"prompt": f"{n}?", "completion": "aye " * (n + 40)} for n in range(12)]
"""Short rows of like length, of which both backends read four at once, so that more rows need more memory."""

AUTO = {"sft": {"batch_size": "auto"}, "backend": {"gradient_checkpointing": "auto"}}


def settings(backend: str, *changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A short run whose step has four rows."""
    sections: dict[str, Any] = {
        "model": {"name": "builtin:tiny"},
        "data": {"path": None, "heldout_fraction": 0.0},
        "backend": {"type": backend, "device": "cpu", "dtype": "float32"},
        "sft": {"steps_per_topic": 3},
        "dpo": {"enabled": False},
        "evaluation": {"levels": []},
    }
    for change in changes:
        for name, values in change.items():
            sections[name] = {**sections[name], **values}
    return sections


def written(size: int, *, recompute: bool) -> dict[str, dict[str, Any]]:
    return {
        "sft": {"batch_size": size, "gradient_accumulation": 4 // size},
        "backend": {"gradient_checkpointing": recompute},
    }


def limit_for(backend: str, size: int, *, recompute: bool) -> dict[str, dict[str, float]]:
    """The least memory with which these settings fit."""
    need = mindprint.plan(settings(backend, written(size, recompute=recompute)), rows=ROWS).stages[0].need
    return {"backend": {"memory_limit": 1.001 * MARGIN * need.total / GIB}}


def merge(*changes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    names = dict.fromkeys(name for change in changes for name in change)
    return {name: {key: v for change in changes for key, v in change.get(name, {}).items()} for name in names}


def train(values: Mapping[str, Any], folder: Path, **options: Any) -> tuple[bytes, list[float], list[str]]:
    """Return the adapter's file, the losses, and what the run said."""
    said: list[str] = []

    def on_event(event: Event) -> None:
        said.append(str(getattr(event, "message", "")))

    result = mindprint.train(values, rows=ROWS, run=folder, on_event=on_event, **options)
    adapter = (result.adapter / "adapter_model.safetensors").read_bytes()
    return adapter, [step.loss for step in result.steps], said


def chosen(folder: Path) -> tuple[Any, Any, Any]:
    config = load_config(folder / "config.yaml").config
    return config.sft.batch_size, config.sft.gradient_accumulation, config.backend.gradient_checkpointing


@pytest.mark.parametrize(
    ("backend", "size", "recompute"),
    [
        ("torch", 4, False),
        ("torch", 2, False),
        ("torch", 1, True),
        ("mlx", 4, False),
        ("mlx", 2, False),
        ("mlx", 1, True),
    ],
)
def test_a_run_takes_what_fits_and_is_the_run_with_these_numbers(
    backend: str, size: int, recompute: bool, tmp_path: Path
) -> None:
    limit = limit_for(backend, size, recompute=recompute)
    adapter, losses, said = train(settings(backend, merge(AUTO, limit)), tmp_path / "auto")
    assert chosen(tmp_path / "auto") == (size, 4 // size, recompute)
    lines = [line for line in said if line.startswith("auto: ")]
    assert len(lines) == 1
    assert f"sft.batch_size={size} " in lines[0]
    assert f"backend.gradient_checkpointing={str(recompute).lower()}" in lines[0]
    by_hand = train(settings(backend, merge(written(size, recompute=recompute), limit)), tmp_path / "by-hand")
    assert (adapter, losses) == by_hand[:2]
    assert len(losses) == 3


class SmallDevice:
    """A device on which micro-batches of more than some rows end without memory."""

    def __init__(self, most_rows: int, *, recomputed: bool) -> None:
        self.most_rows, self.recomputed = most_rows, recomputed
        self.refused: list[int] = []

    @hookimpl(wrapper=True)
    def mindprint_sft_step(self, batches: Sequence[TokenBatch], update: Any) -> Iterator[Any]:
        rows = max(len(batch.lengths) for batch in batches)
        if rows > self.most_rows or (self.recomputed and not update.gradient_checkpointing):
            self.refused.append(rows)
            raise RuntimeError("out of memory: tried to allocate 2.00 GiB")
        return (yield)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_that_ends_without_memory_makes_the_choice_smaller(
    backend: str, recompute: bool, tmp_path: Path
) -> None:
    device = SmallDevice(2, recomputed=recompute)
    adapter, losses, _ = train(settings(backend, AUTO), tmp_path / "auto", observers=[device])
    assert chosen(tmp_path / "auto") == (2, 2, recompute)
    assert device.refused == ([4, 2, 1, 4] if recompute else [4])
    by_hand = train(settings(backend, written(2, recompute=recompute)), tmp_path / "by-hand")
    assert (adapter, losses) == by_hand[:2]


def test_a_device_on_which_no_step_fits_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a step of sft ran out of memory with 1 of its rows at once and activations"):
        train(settings("mlx", AUTO), tmp_path / "run", observers=[SmallDevice(0, recomputed=False)])
    assert not (tmp_path / "run").exists()


def test_an_error_that_is_not_of_memory_ends_the_search(tmp_path: Path) -> None:
    class Broken:
        @hookimpl(wrapper=True)
        def mindprint_sft_step(self) -> Iterator[Any]:
            raise RuntimeError("a kernel is missing")
            yield

    with pytest.raises(mindprint.errors.BackendError, match="a kernel is missing"):
        train(settings("torch", AUTO), tmp_path / "run", observers=[Broken()])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_limit_below_everything_is_one_line(backend: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train(settings(backend, merge(AUTO, {"backend": {"memory_limit": 0.01}})), tmp_path / "run")
    assert "auto finds no settings that fit: sft needs about" in str(caught.value)
    assert "and 10 MiB is free, with 1 of its rows at once and activations computed again: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_that_continues_does_not_choose_again(tmp_path: Path) -> None:
    limit = limit_for("mlx", 2, recompute=False)
    whole = train(settings("mlx", merge(AUTO, limit)), tmp_path / "whole")

    class Stopped(Exception):  # noqa: N818
        pass

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            raise Stopped

    every_step = {"checkpoints": {"every": 1}}
    values = settings("mlx", merge(AUTO, limit)) | every_step
    with pytest.raises(Stopped):
        mindprint.train(values, rows=ROWS, run=tmp_path / "run", on_event=stop)
    # Now nothing would fit.
    less = settings("mlx", merge(AUTO, {"backend": {"memory_limit": 0.01}})) | every_step
    adapter, _, said = train(less, tmp_path / "run", resume=True)
    assert adapter == whole[0]
    assert chosen(tmp_path / "run") == (2, 2, False)
    assert not [line for line in said if line.startswith("auto: ")]


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_pairs_are_tried_without_a_reference(backend: str, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{n}?", "chosen": "aye " * (n + 1), "rejected": "no"} for n in range(6)]

    class TwoPairs(SmallDevice):
        @hookimpl(wrapper=True)
        def mindprint_dpo_step(self, batches: Sequence[PreferenceBatch]) -> Iterator[Any]:
            self.refused += [batch.pairs for batch in batches if batch.pairs > 2]
            if any(batch.pairs > 2 for batch in batches):
                raise RuntimeError("out of memory")
            return (yield)

    dpo = {"enabled": True, "steps_per_topic": 2, "batch_size": "auto", "gradient_accumulation": 2}
    device = TwoPairs(4, recomputed=False)
    results = []
    for name, values in (("auto", dpo), ("by-hand", {**dpo, "batch_size": 2})):
        result = mindprint.train(
            settings(backend, {"dpo": values}), rows=[*ROWS, *pairs], run=tmp_path / name, observers=[device]
        )
        config = load_config(result.run / "config.yaml").config
        assert (config.sft.batch_size, config.dpo.batch_size, config.dpo.gradient_accumulation) == (4, 2, 2)
        results.append((result.adapter / "adapter_model.safetensors").read_bytes())
    assert device.refused == [4]
    assert results[0] == results[1]


def test_the_plan_states_what_auto_would_take() -> None:
    limit = limit_for("mlx", 2, recompute=False)
    stage = mindprint.plan(settings("mlx", merge(AUTO, limit)), rows=ROWS).stages[0]
    assert (stage.rows, stage.verdict) == (2, "fits")
    too_little = merge(AUTO, {"backend": {"memory_limit": 0.01}})
    assert not mindprint.plan(settings("mlx", too_little), rows=ROWS).fits


def test_ranks_take_the_smallest_of_their_choices() -> None:
    """Here ranks are threads, and one of them has less memory."""
    limits = [limit_for("mlx", 4, recompute=False), limit_for("mlx", 1, recompute=True)]
    barrier, gathered = Barrier(2, timeout=60), [np.zeros(0, np.uint8)] * 2

    def file_of(rank: int) -> ConfigFile:
        return with_rows(make_config(settings("mlx", merge(AUTO, limits[rank]))), ROWS)

    def choose(rank: int) -> tuple[Choice, str]:
        def gather(values: UInt8) -> UInt8:
            gathered[rank] = values
            barrier.wait()
            all_values = np.stack(gathered)
            barrier.wait()
            return all_values

        prepared = prepare(file_of(rank))
        placements = [Placements().resolve_training(plan.backend) for plan in prepared.plans]
        return choose_settings(file_of(rank), prepared, placements, Ranks(rank, 2, gather))

    with ThreadPoolExecutor(2) as pool:
        choices = list(pool.map(choose, range(2)))
    assert [choice for choice, _ in choices] == [Choice({"sft": 1}, recompute=True)] * 2
    assert choices[0][1] == choices[1][1]


@pytest.mark.parametrize(
    ("section", "setting", "words"),
    [
        ("sft", {"batch_size": "many"}, "is auto or a whole number from 1, found 'many'"),
        ("sft", {"batch_size": 0}, "is auto or a whole number from 1, found 0"),
        ("backend", {"gradient_checkpointing": "maybe"}, "is auto, true or false, found 'maybe'"),
    ],
)
def test_another_value_is_refused_in_one_line(section: str, setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        make_config({section: setting})
    assert "\n" not in str(caught.value)
