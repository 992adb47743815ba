"""The plan of a run: stages in order, their steps, their backends."""

import json
from pathlib import Path
from typing import Any, cast

import pytest

from mindprint.config import make_config
from mindprint.data.order import ORDER_VERSION
from mindprint.errors import RunError
from mindprint.runs.folder import RunFolder
from mindprint.training.plan import RowLengths, plan_run, total_steps
from mindprint.training.prepare import Prepared


def lengths(sft: dict[str, int], pairs: dict[str, int]) -> RowLengths:
    """Rows of ten tokens each, as many as given for each topic."""
    return {
        "sft": {topic: [10] * count for topic, count in sft.items()},
        "dpo": {topic: [10] * count for topic, count in pairs.items()},
    }


def test_topic_by_topic_sft_then_dpo() -> None:
    config = make_config({"sft": {"epochs_per_topic": 2, "batch_size": 4}, "dpo": {"steps_per_topic": 5}}).config
    plans = plan_run(config, ["a", "b"], lengths({"a": 10, "b": 4}, {"a": 3, "b": 3}))
    assert [(plan.topic, plan.stage, plan.steps, plan.first_step) for plan in plans] == [
        ("a", "sft", 6, 0),  # 2 epochs of 3 steps
        ("a", "dpo", 5, 6),
        ("b", "sft", 2, 11),
        ("b", "dpo", 5, 13),
    ]
    assert total_steps(plans) == 18


def test_default_lengths_are_three_epochs_and_a_hundred_steps() -> None:
    plans = plan_run(make_config({}).config, ["a"], lengths({"a": 8}, {"a": 8}))
    assert [plan.steps for plan in plans] == [6, 100]


def test_a_disabled_stage_is_not_planned() -> None:
    plans = plan_run(make_config({"dpo": {"enabled": False}}).config, ["a"], lengths({"a": 4}, {"a": 4}))
    assert [plan.stage for plan in plans] == ["sft"]


def test_accumulation_makes_fewer_steps() -> None:
    config = make_config({"sft": {"epochs_per_topic": 1, "batch_size": 2, "gradient_accumulation": 3}}).config
    assert plan_run(config, ["a"], lengths({"a": 13}, {}))[0].steps == 3  # 7 micro-batches


def test_a_stages_backend_comes_before_the_runs() -> None:
    config = make_config({"backend": "torch", "dpo": {"backend": "mlx"}}).config
    assert [plan.backend.type for plan in plan_run(config, ["a"], lengths({"a": 4}, {"a": 4}))] == ["torch", "mlx"]


def test_the_schedule_starts_anew_in_each_stage() -> None:
    config = make_config({"sft": {"learning_rate": 1.0, "schedule": "linear", "steps_per_topic": 4}}).config
    first, second = plan_run(config, ["a", "b"], lengths({"a": 4, "b": 4}, {}))
    assert [first.learning_rate(step) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert second.learning_rate(0) == 1.0


def test_a_resumed_run_keeps_the_order_that_it_was_started_with(tmp_path: Path) -> None:
    plans = plan_run(make_config({}).config, ["a"], lengths({"a": 8}, {"a": 8}))
    prepared = cast(Any, Prepared)(*[None] * 4, plans, *[None] * 5)
    folder = RunFolder(tmp_path)

    def orders(manifest: str) -> set[int]:
        folder.manifest.write_text(manifest, encoding="utf-8")
        resumed = prepared.in_order_of(folder)
        return {resumed.order, *(plan.order.version for plan in resumed.plans)}

    # Manifests that do not record it were written when there was one order.
    assert orders("{}") == {1}
    assert orders(json.dumps({"order": 2})) == {2}
    assert orders("not JSON: it is written again from the configuration") == {ORDER_VERSION}
    with pytest.raises(RunError, match=r"manifest\.json: reads rows in order 3 of a newer Mindprint.*up to 2: pip"):
        orders(json.dumps({"order": 3}))
