"""Objectives: one place says all in which stages differ, so that a third one is short."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mindprint
from mindprint.config import Config, SftConfig, StageConfig
from mindprint.contract import STAGES, TokenBatch
from mindprint.data.render import PreferenceExample, Rendered, SftExample, render_preferences
from mindprint.data.rows import Rows
from mindprint.data.tokenizer import Tokenizer
from mindprint.hookspecs import hookimpl
from mindprint.runs.folder import RunFolder
from mindprint.training.objectives import OBJECTIVES, SftObjective


class ChosenOnly(SftObjective):
    """A third objective for the toy backend: imitate the chosen answers of the pairs once more."""

    name = "chosen"  # type: ignore[assignment]
    rows = "preferences"
    default_epochs = None
    default_steps = 2

    def settings(self, config: Config) -> StageConfig:
        return SftConfig(learning_rate=1e-2, batch_size=2)

    def render(self, rows: Rows, tokenizer: Tokenizer, data: Any) -> Rendered[SftExample]:
        return Rendered(tuple(map(_chosen, render_preferences(rows.preferences, tokenizer, data).examples)))


def _chosen(pair: PreferenceExample) -> SftExample:
    tokens = np.concatenate([pair.prompt, pair.chosen])
    return SftExample(pair.topic, tokens, np.arange(len(tokens)) >= len(pair.prompt), pair.origin)


def test_the_registry_lists_the_stages_of_the_contract_in_their_order() -> None:
    assert tuple(OBJECTIVES) == STAGES
    for stage, objective in OBJECTIVES.items():
        assert objective.name == stage
        assert (objective.default_epochs is None) != (objective.default_steps is None)
        assert isinstance(objective.settings(Config()), StageConfig)


def test_without_rows_an_objective_leaves_the_datas_digest_as_it_is() -> None:
    """So a new objective that a run does not use changes no identity of an old run's checkpoints."""
    import hashlib

    digest = hashlib.blake2b(digest_size=16)
    before = digest.hexdigest()
    ChosenOnly().update_digest(digest, ())
    assert digest.hexdigest() == before


def test_a_third_objective_is_a_class_and_a_line(
    toy: str, toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is planned, trained, checkpointed and listed like the others, with its own steps and rows."""
    import toy_backend

    # Its name in contract.StageName, which readers check and no patch can extend.
    monkeypatch.setattr("mindprint.runs.folder._checked", lambda _file, _number, line: line)

    third = ChosenOnly()
    objectives = {**OBJECTIVES, third.name: third}
    for module in ("plan", "prepare", "stages", "course", "run", "final_adapter"):
        monkeypatch.setattr(f"mindprint.training.{module}.OBJECTIVES", objectives)
    seen: list[int] = []
    honest = toy_backend.mindprint_sft_step

    def counted(model: Any, batches: Sequence[TokenBatch], update: Any) -> Any:
        seen.append(sum(batch.loss_tokens for batch in batches))
        return honest(model=model, batches=batches, update=update)

    monkeypatch.setattr(toy_backend, "mindprint_sft_step", hookimpl(counted))
    _write_rows(tmp_path / "data")
    project = {
        "model": {"name": str(toy_model)},
        "backend": toy,
        "data": {"path": str(tmp_path / "data")},
        "adapter": {"r": 2},
        "sft": {"steps_per_topic": 2, "batch_size": 2},
        "dpo": {"steps_per_topic": 1, "batch_size": 2},
    }
    result = mindprint.train(project, run=tmp_path / "run")
    steps = [(line["topic"], line["stage"]) for line in RunFolder(result.run).read_steps()]
    assert steps == [(topic, stage) for topic in "ab" for stage in ("sft", "sft", "dpo", "chosen", "chosen")]
    assert len(seen) == 8 and all(seen)
    assert [(stage.stage, stage.steps) for stage in result.stages] == [("sft", 2), ("dpo", 1), ("chosen", 2)] * 2
    assert "SFT then DPO then CHOSEN" in (result.adapter / "README.md").read_text()


def _write_rows(folder: Path) -> None:
    folder.mkdir()
    rows: dict[str, list[dict[str, str]]] = {"sft": [], "preferences": []}
    for topic in "ab":
        for n in range(4):
            asked = {"topic": topic, "prompt": f"{topic} {n}?"}
            rows["sft"].append({**asked, "completion": "aye " * (n + 1)})
            rows["preferences"].append({**asked, "chosen": "aye aye", "rejected": "no"})
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
