"""Checkpoints: whole or not at all, portable, and refused by the part that is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mindprint.adapter.peft_format import adapter_digest
from mindprint.contract import AdapterState, LoraConfig, LoraFactors, TrainingState
from mindprint.errors import CheckpointError
from mindprint.training.checkpoints import (
    Cursor,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)

IDENTITY = {"base model": "1", "dataset": "2", "adapter configuration": "3"}
SITES = ("m.k", "m.q")


def state(seed: int = 0, *, moments: bool = True) -> TrainingState:
    rng = np.random.default_rng(seed)

    def factors() -> dict[str, LoraFactors]:
        return {
            site: LoraFactors(rng.normal(size=(2, 3)).astype(np.float32), rng.normal(size=(4, 2)).astype(np.float32))
            for site in SITES
        }

    adapter = AdapterState(LoraConfig(2, 4.0, SITES), factors())
    return TrainingState(adapter, factors(), factors(), 7, 2.0**-3) if moments else TrainingState(adapter)


def write(parent: Path, step: int = 12, **changes: object) -> Path:
    cursor = Cursor(step=step, stage_index=1, stage_step=step, backend="toy", environment={"numpy": "2"})
    return write_checkpoint(parent, state(), cursor, IDENTITY, "org/base")


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    read = read_checkpoint(write(tmp_path), IDENTITY)
    want = state()
    assert adapter_digest(read.state.adapter) == adapter_digest(want.adapter)
    assert read.state.adapter.config == want.adapter.config
    for moments, expected in (
        (read.state.first_moments, want.first_moments),
        (read.state.second_moments, want.second_moments),
    ):
        for site in SITES:
            assert all(np.array_equal(a, b) for a, b in zip(moments[site], expected[site], strict=True))
    assert (read.state.optimizer_steps, read.state.loss_scale) == (7, 0.125)
    assert (read.cursor.step, read.cursor.stage_index, read.cursor.stage_step) == (12, 1, 12)


def test_a_stage_start_has_no_moments(tmp_path: Path) -> None:
    cursor = Cursor(0, 0, 0, "toy", {})
    read = read_checkpoint(write_checkpoint(tmp_path, state(moments=False), cursor, IDENTITY, "b"), IDENTITY)
    assert (read.state.first_moments, read.state.optimizer_steps, read.state.loss_scale) == ({}, 0, None)


def truncate(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-5])


def edit_cursor(folder: Path) -> None:
    file = folder / "cursor.json"
    content = json.loads(file.read_text())
    del content["cursor"]["stage_step"]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate("adapter_model.safetensors"), "adapter_model.safetensors: is truncated or edited"),
        (truncate("optimizer.safetensors"), "optimizer.safetensors: is truncated or edited"),
        (truncate("adapter_config.json"), "adapter_config.json: is truncated or edited"),
        (truncate("cursor.json"), "cursor.json: is truncated or edited"),
        (edit_cursor, "cursor.json: is truncated or edited"),
        (lambda f: (f / "optimizer.safetensors").unlink(), "optimizer.safetensors: is missing"),
        (lambda f: (f / "cursor.json").unlink(), "cursor.json: is missing"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    folder = write(tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(folder, IDENTITY)


@pytest.mark.parametrize("part", IDENTITY)
def test_a_checkpoint_of_something_else_is_refused_by_that_name(tmp_path: Path, part: str) -> None:
    with pytest.raises(CheckpointError, match=f"was made with another {part} than this configuration has"):
        read_checkpoint(write(tmp_path), {**IDENTITY, part: "other"})


def test_the_newest_sound_one_only_when_asked_for(tmp_path: Path) -> None:
    write(tmp_path, 10)
    truncate("optimizer.safetensors")(write(tmp_path, 20))
    with pytest.raises(CheckpointError, match="`--resume latest` takes the newest sound checkpoint"):
        newest_checkpoint(tmp_path, IDENTITY, sound=False)
    found, passed_over = newest_checkpoint(tmp_path, IDENTITY, sound=True)
    assert found.cursor.step == 10
    assert len(passed_over) == 1 and "000020" in passed_over[0]


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        newest_checkpoint(tmp_path / "checkpoints", IDENTITY, sound=True)


def test_half_written_folders_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, 10)
    (tmp_path / ".000020.mindprint-0123456789abcdef.partial").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["000010"]


def write_at(parent: Path, step: int, stage_index: int, stage_step: int, topic_step: int) -> None:
    cursor = Cursor(step, stage_index, stage_step, "toy", {}, topic_step=topic_step)
    write_checkpoint(parent, state(), cursor, IDENTITY, "toy")


def test_pruning_keeps_the_newest_and_what_they_can_need(tmp_path: Path) -> None:
    """From step 65 of a topic that began at 40, a retry needs 40 and a roll-back of its second stage 50."""
    for step, index, stage_step, topic_step in (
        (0, 0, 0, 0),
        (20, 1, 0, 0),
        (30, 1, 10, 0),
        (40, 2, 0, 40),
        (45, 2, 5, 40),
        (50, 3, 0, 40),
        (55, 3, 5, 40),
        (60, 3, 10, 40),
        (65, 3, 15, 40),
    ):
        write_at(tmp_path, step, index, stage_step, topic_step)
    prune_checkpoints(tmp_path, keep=2)
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [40, 50, 60, 65]


def test_pruning_keeps_no_more_however_many_topics_there_are(tmp_path: Path) -> None:
    for topic in range(150):
        write_at(tmp_path, 10 * topic, 2 * topic, 0, 10 * topic)
        write_at(tmp_path, 10 * topic + 5, 2 * topic + 1, 0, 10 * topic)
        prune_checkpoints(tmp_path, keep=2)
        kept = [int(path.name) for path in list_checkpoints(tmp_path)]
        assert kept == [10 * topic, 10 * topic + 5]


def test_a_damaged_checkpoint_among_the_newest_keeps_nothing_else(tmp_path: Path) -> None:
    write_at(tmp_path, 10, 0, 0, 10)
    write_at(tmp_path, 20, 0, 10, 10)
    write_at(tmp_path, 30, 0, 20, 10)
    (tmp_path / "000030" / "cursor.json").write_text("{")
    prune_checkpoints(tmp_path, keep=2)
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [10, 20, 30]


@pytest.mark.parametrize(
    ("part", "value"), [("stage_index", 2), ("stage_step", 0), ("step", 99), ("attempt", 7), ("topic_step", 3)]
)
def test_a_cursor_that_was_edited_is_refused(tmp_path: Path, part: str, value: int) -> None:
    """Its numbers steer the run: with another stage_index it would skip DPO and end well."""
    folder = write(tmp_path)
    content = json.loads((folder / "cursor.json").read_text())
    content["cursor"][part] = value
    (folder / "cursor.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="cursor.json: is truncated or edited"):
        read_checkpoint(folder, IDENTITY)


def test_identity_and_digests_in_a_cursor_are_covered_too(tmp_path: Path) -> None:
    folder = write(tmp_path)
    for part in ("identity", "files"):
        content = json.loads((folder / "cursor.json").read_text())
        (folder / "cursor.json").write_text(json.dumps(content | {part: {}}))
        with pytest.raises(CheckpointError, match="cursor.json: is truncated or edited"):
            read_checkpoint(folder, IDENTITY)


def test_a_cursor_is_known_by_its_content_not_by_its_layout(tmp_path: Path) -> None:
    folder = write(tmp_path)
    content = json.loads((folder / "cursor.json").read_text())
    (folder / "cursor.json").write_text(json.dumps(content, sort_keys=True))
    assert read_checkpoint(folder, IDENTITY).cursor.step == 12


def test_a_checkpoint_of_the_first_format_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path)
    content = json.loads((folder / "cursor.json").read_text())
    del content["digest"]
    (folder / "cursor.json").write_text(json.dumps(content | {"format": 1}))
    assert read_checkpoint(folder, IDENTITY).cursor.step == 12
    (folder / "cursor.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="cursor.json: is truncated or edited"):
        read_checkpoint(folder, IDENTITY)


def test_a_checkpoint_format_that_is_too_new_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path)
    content = json.loads((folder / "cursor.json").read_text())
    (folder / "cursor.json").write_text(json.dumps(content | {"format": 3}))
    with pytest.raises(CheckpointError, match="checkpoint format 3, which a newer Mindprint wrote; this one reads"):
        newest_checkpoint(tmp_path, IDENTITY, sound=True)
