"""The memory that a run is said to need: sizes of the base, the largest batch, and settings that need less."""

from __future__ import annotations

import json
import platform
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized_base import DOWN, write_quantized

import mindprint
from mindprint.api.training import with_rows
from mindprint.config import ModelConfig
from mindprint.contract import MemoryNeed, MemoryRequest
from mindprint.errors import AdapterError, BackendError, DataError, ModelError
from mindprint.events import Notice
from mindprint.models import free_memory
from mindprint.models.engine import Placements
from mindprint.models.folder import resolve_model, tensors
from mindprint.models.quantized import quantized_weights
from mindprint.models.sizes import language_weights, read_base_sizes, read_sites
from mindprint.training import memory
from mindprint.training.prepare import prepare

ROWS = [{"prompt": f"{n}?", "completion": "aye " * (n + 1)} for n in range(6)]
GIB = 2**30


@pytest.fixture
def config(toy: str) -> dict[str, Any]:
    """Settings for a plan: the toy backend estimates nothing, and could not load this model."""
    return {
        "model": {"name": "builtin:tiny"},
        "backend": toy,
        "data": {"path": None, "heldout_fraction": 0.0},
        "sft": {"steps_per_topic": 4, "batch_size": 2},
        "dpo": {"enabled": False},
    }


@pytest.fixture
def tiny() -> Path:
    return resolve_model(ModelConfig(name="builtin:tiny"), Path()).path


def test_sizes_are_those_of_config_and_headers(tiny: Path) -> None:
    sizes, stated = read_base_sizes(tiny), json.loads((tiny / "config.json").read_text())
    assert sizes.elements == sum(int(np.prod(info.shape)) for info in language_weights(tiny).values())
    assert (sizes.layers, sizes.hidden, sizes.inner) == (
        stated["num_hidden_layers"],
        stated["hidden_size"],
        stated["intermediate_size"],
    )
    assert sizes.norms == 2
    assert sizes.vocabulary == stated["vocab_size"]
    # The embedding, which is also the output layer, and the last norm are in no layer.
    assert sizes.elements - sizes.layer_elements == (sizes.vocabulary + 1) * sizes.hidden


def test_sites_are_linear_layers_and_the_embedding(tiny: Path) -> None:
    sites = {site.name: site for site in read_sites(tiny)}
    assert sites["model.embed_tokens"].kind == "embedding"
    query = sites["model.layers.0.self_attn.q_proj"]
    rows, columns = tensors(tiny)["model.layers.0.self_attn.q_proj.weight"].shape
    assert (query.in_features, query.out_features) == (columns, rows)
    assert not any("norm" in name for name in sites)


def test_a_config_without_sizes_is_named(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stated = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: stated[key] for key in stated if key != "hidden_size"}))
    with pytest.raises(ModelError, match="states none of hidden_size, n_embd, d_model"):
        read_base_sizes(tmp_path)


def test_a_quantized_base_counts_the_bytes_of_its_files(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path / "base").path
    stated = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 12}
    (folder / "config.json").write_text(json.dumps({**stated, **sizes}))
    base = read_base_sizes(folder)
    assert base.packed_bytes == sum(weight.stored_bytes for weight in quantized_weights(folder).values())
    assert base.elements == 64 + 12 * 64  # the norm and the head
    assert {site.name: site.in_features for site in read_sites(folder)}[DOWN] == 128


def test_free_memory_is_the_least_of_machine_and_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    monkeypatch.setattr(free_memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(free_memory, "_CGROUP", tmp_path)
    assert free_memory.free_bytes() == 5000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 400000\n")
    assert free_memory.free_bytes() == 900000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory.free_bytes() == 5000 * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what was freed")
def test_the_heap_is_given_back() -> None:
    blocks = [b"x" * (64 << 10) for _ in range(1000)]
    full = resident()
    kept = blocks[-1]  # behind all others, so that the end of the heap stays in use
    blocks.clear()
    free_memory.trim_heap()
    assert len(kept)
    assert full - resident() > 50e6


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_plan_counts_the_largest_batch_and_fits(config: dict[str, Any]) -> None:
    plan = mindprint.plan(config, rows=ROWS)
    (stage,) = plan.stages
    assert stage.rough
    assert plan.fits
    assert not plan.proposals
    assert stage.rows == 2
    assert stage.need.total == sum(plan.to_dict()["stages"][0]["parts"].values())
    assert "a rough estimate, since backend 'toy' makes none" in str(plan)


def test_a_plan_that_does_not_fit_proposes_settings(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    needed = mindprint.plan(config, rows=ROWS).stages[0].need.total
    monkeypatch.setattr(memory, "free_bytes", lambda: needed - 1)
    plan = mindprint.plan(config, rows=ROWS)
    assert not plan.fits
    smaller = next(each for each in plan.proposals if "sft.batch_size=1" in each.settings)
    assert "sft.gradient_accumulation=2" in smaller.settings
    assert smaller.total < needed
    monkeypatch.setattr(memory, "free_bytes", lambda: needed + 1)
    assert mindprint.plan(config, rows=ROWS).stages[0].verdict == "may not fit"


def test_a_base_that_is_packed_while_it_is_loaded_needs_less(config: dict[str, Any]) -> None:
    plain = mindprint.plan(config, rows=ROWS)
    packed = mindprint.plan({**config, "model": {"name": "builtin:tiny", "quantize": "4bit"}}, rows=ROWS)
    assert packed.parameters == plain.parameters
    assert packed.stages[0].need.weights < plain.stages[0].need.weights


def test_a_backends_own_estimate_counts(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[MemoryRequest] = []

    def answer(_: object, request: MemoryRequest) -> MemoryNeed:
        asked.append(request)
        return MemoryNeed(weights=3 * GIB, adapter=1, activations=request.batch.tokens.size, logits=0, free=GIB)

    monkeypatch.setattr(mindprint.Backend, "memory", answer)
    plan = mindprint.plan(config, rows=ROWS)
    assert (plan.stages[0].rough, plan.stages[0].free, plan.fits) == (False, GIB, False)
    widest = max(request.batch.tokens.size for request in asked)
    assert plan.stages[0].need.activations == widest


def test_each_of_several_ranks_has_a_part_of_the_base_and_of_the_machine(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 12 * GIB)
    prepared = prepare(with_rows(mindprint.load_config(config), ROWS))
    placements = [replace(Placements().resolve(plan.backend), shard=True) for plan in prepared.plans]
    whole, half, third = (memory.estimate_memory(prepared, placements, ranks) for ranks in (1, 2, 3))
    saved = 4 * whole.base.layer_elements
    assert half.stages[0].need.weights == whole.stages[0].need.weights - saved // 2
    assert third.stages[0].need.activations == whole.stages[0].need.activations
    assert [each.stages[0].free for each in (whole, half, third)] == [12 * GIB, 6 * GIB, 4 * GIB]
    plan = mindprint.plan(config, rows=ROWS, ranks=3)
    assert plan.to_dict()["ranks"] == 3 and "each of 3 ranks, which share the memory" in str(plan)


def test_ranks_that_torchrun_started_share_the_machine(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 12 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    prepared = prepare(with_rows(mindprint.load_config(config), ROWS))
    placements = [Placements().resolve(plan.backend) for plan in prepared.plans]
    assert memory.estimate_memory(prepared, placements).stages[0].free == 3 * GIB


@pytest.mark.parametrize(("tokens", "at_end"), [(0, True), (GIB, False)])
def test_the_fingerprint_of_a_base_in_16_bits_is_counted(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tokens: int, at_end: bool
) -> None:
    """It is measured in float32 too, so weights may need most there, or a step's activations in training."""

    def answer(_: object, request: MemoryRequest) -> MemoryNeed:
        weights = request.base.elements * (4 if request.spec.dtype == "float32" else 2)
        return MemoryNeed(weights, 0, activations=tokens * (request.batch.tokens.size > 2), logits=0)

    monkeypatch.setattr(mindprint.Backend, "memory", answer)
    prepared = prepare(with_rows(mindprint.load_config(config), ROWS))
    placements = [replace(Placements().resolve(plan.backend), dtype="bfloat16") for plan in prepared.plans]
    estimated = memory.estimate_memory(prepared, placements)
    (stage,) = estimated.stages
    assert stage.fingerprint is at_end
    assert stage.need.weights == estimated.base.elements * (4 if at_end else 2)
    line = next(iter(memory.memory_notices(prepared, placements)))
    assert f"in {'the fingerprint' if at_end else 'sft'} (weights" in line.message


def test_train_states_its_need_and_warns(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(with_rows(mindprint.load_config(config), ROWS))
    placements = [Placements().resolve(plan.backend) for plan in prepared.plans]
    monkeypatch.setattr(memory, "free_bytes", lambda: GIB // 100)
    line, warning = memory.memory_notices(prepared, placements)
    assert line.message.startswith("memory: about ")
    assert " MiB of 10 MiB that are free, in sft (weights " in line.message
    assert warning.warning
    assert "mindprint plan lists settings that need less: backend.gradient_checkpointing=true " in warning.message
    monkeypatch.setattr(memory, "free_bytes", lambda: 100 * GIB)
    assert [notice.warning for notice in memory.memory_notices(prepared, placements)] == [False]


def test_an_estimate_that_fails_does_not_stop_a_run(config: dict[str, Any], toy_model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    mindprint.train(
        {**config, "model": {"name": str(toy_model)}},
        rows=ROWS,
        run=tmp_path / "run",
        on_event=lambda event: said.append(event.message) if isinstance(event, Notice) else None,
    )
    assert any(line.startswith("the memory of this run is not estimated: ") for line in said)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": {"name": "./nowhere"}}, ModelError, "nowhere"),
        ({"backend": {"type": "toy", "device": "abacus"}}, BackendError, "abacus"),
        ({"data": {"path": "nowhere"}}, DataError, "nowhere"),
    ],
)
def test_wrong_input_is_one_line(
    config: dict[str, Any], changes: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    rows = None if "data" in changes else ROWS
    with pytest.raises(error, match=words):
        mindprint.plan({**config, **changes}, rows=rows)


def test_a_setting_that_the_run_refuses_is_said_once(config: dict[str, Any], toy_model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(AdapterError, match="no stacked experts"):
        mindprint.train(
            {**config, "model": {"name": str(toy_model)}, "adapter": {"target_parameters": ["experts"]}},
            rows=ROWS,
            run=tmp_path / "run",
            on_event=lambda event: said.append(event.message) if isinstance(event, Notice) else None,
        )
    assert not any("stacked experts" in line for line in said)
