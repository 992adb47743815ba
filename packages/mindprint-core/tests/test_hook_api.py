"""The hook API changes with its version, or not at all; docs/hook-api.md says which changes that allows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hook_api import Written, breaking_changes, pinned, signatures, write_down

from mindprint import hookspecs
from mindprint.hookspecs import HOOK_API, REQUIRED_HOOKS, SUPPORTED_HOOK_APIS


@pytest.fixture
def written() -> Written:
    return json.loads(pinned(HOOK_API).read_text(encoding="utf-8"))


def test_nothing_that_plugins_rely_on_changed_without_a_version(written: Written) -> None:
    """If it fails, a plugin built for this version could break: raise HOOK_API, or make the change an addition."""
    assert breaking_changes(written, signatures()) == []


def test_additions_are_written_down(written: Written) -> None:
    """If it fails, run `python packages/mindprint-core/tests/hook_api.py`: from then on the addition is pinned too."""
    assert written == signatures()


def test_everything_that_outsiders_import_is_pinned(written: Written) -> None:
    """Each kind of thing once: what plugins implement, receive, return, raise, and call."""
    assert "mindprint_scorers" in written["hooks"]
    for name in (
        "mindprint.contract.LoraFactors",
        "mindprint.events.Decided",
        "mindprint.events.Evaluated",
        "mindprint.layouts.Forked",
        "mindprint.runs.records.Decision",
        "mindprint.runs.records.EvaluationRecord",
        "mindprint.runs.records.Figures",
    ):
        assert written["types"][name]
    assert {"mindprint.contract.Fitted.__call__", "mindprint.contract.Measure.fit"} <= set(written["methods"])
    assert "mindprint.losses.PreferenceLoss.total" in written["methods"]
    assert {"mindprint.layouts.preference_rows", "mindprint.cli.output.emit"} <= set(written["functions"])
    assert {"mindprint.errors.ModelError", "mindprint.errors.AdapterError"} <= set(written["errors"])
    assert {"mindprint.contract.Dtype", "mindprint.losses.PreferenceLossName"} <= set(written["choices"])


def test_this_version_and_the_one_before_are_driven() -> None:
    assert {HOOK_API, max(1, HOOK_API - 1)} == set(SUPPORTED_HOOK_APIS)


def test_the_list_of_required_hooks_is_the_specifications() -> None:
    """In the order of the file, each with one answer; the others are asked of whoever implements them."""
    options = {
        name: getattr(function, f"{hookspecs.PROJECT}_spec")
        for name, function in vars(hookspecs).items()
        if hasattr(function, f"{hookspecs.PROJECT}_spec")
    }
    assert tuple(name for name in options if name in REQUIRED_HOOKS) == REQUIRED_HOOKS
    assert all(options[name]["firstresult"] for name in REQUIRED_HOOKS)
    assert set(options) - set(REQUIRED_HOOKS) == {
        "mindprint_event",
        "mindprint_gather",
        "mindprint_largest_weight",
        "mindprint_memory",
        "mindprint_read_documents",
        "mindprint_scorers",
    }


def rename_argument(api: Written) -> None:
    api["hooks"]["mindprint_save"] = "(handle: 'Any') -> 'TrainingState'"


def add_an_argument_to_a_hook(api: Written) -> None:
    api["hooks"]["mindprint_save"] = "(model: 'Any', whole: 'bool' = True) -> 'TrainingState'"


def remove_hook(api: Written) -> None:
    del api["hooks"]["mindprint_release"]


def require_hook(api: Written) -> None:
    api["required"].append("mindprint_new")


def remove_field(api: Written) -> None:
    api["types"]["mindprint.contract.Update"].pop(1)


def require_field(api: Written) -> None:
    api["types"]["mindprint.contract.ModelSpec"].append("shards: int")


def remove_a_field_of_a_payload(api: Written) -> None:
    api["types"]["mindprint.runs.records.Decision"].pop()


def require_a_function_of_namespaces(api: Written) -> None:
    api["methods"]["mindprint.losses.ArrayNamespace.where"] = "(self, x: 'Any') -> 'Any'"


def require_an_argument(api: Written) -> None:
    api["functions"]["mindprint.layouts.sequences"] = "(batch: 'TokenBatch', width: 'int') -> 'Layout'"


def remove_a_property(api: Written) -> None:
    del api["methods"]["mindprint.contract.TokenBatch.loss_tokens"]


def raise_another_kind(api: Written) -> None:
    api["errors"]["mindprint.errors.ModelError"].remove("ValueError")


def remove_a_choice(api: Written) -> None:
    api["choices"]["mindprint.losses.PreferenceLossName"].remove("ipo")


def change_a_dtype(api: Written) -> None:
    api["aliases"]["mindprint.contract.Int32"] = "array of int64"


def remove_a_value(api: Written) -> None:
    api["values"].remove("mindprint.losses.NUMPY")


@pytest.mark.parametrize(
    "change",
    [
        rename_argument,
        add_an_argument_to_a_hook,
        remove_hook,
        require_hook,
        remove_field,
        require_field,
        remove_a_field_of_a_payload,
        require_a_function_of_namespaces,
        require_an_argument,
        remove_a_property,
        raise_another_kind,
        remove_a_choice,
        change_a_dtype,
        remove_a_value,
    ],
)
def test_a_breaking_change_is_seen(written: Written, change: Callable[[Written], Any]) -> None:
    now = copy.deepcopy(written)
    change(now)
    assert len(breaking_changes(written, now)) == 1


def add_to(api: Written) -> None:
    """Everything that may be added within a version."""
    api["hooks"]["mindprint_new"] = "(model: 'Any') -> 'bool'"
    api["types"]["mindprint.contract.ModelSpec"].append("shards: int (optional)")
    api["types"]["mindprint.events.New"] = ["step: int"]
    api["choices"]["mindprint.losses.PreferenceLossName"].append("new")
    api["constants"]["capabilities"].append("new")
    api["functions"]["mindprint.layouts.sequences"] = "(batch: 'TokenBatch', *, width: 'int' = 0) -> 'Layout'"
    api["methods"]["mindprint.contract.TokenBatch.rows"] = "property -> int"
    api["values"].append("mindprint.layouts.NEW")


def test_additions_are_no_breaking_change(written: Written) -> None:
    now = copy.deepcopy(written)
    add_to(now)
    assert breaking_changes(written, now) == []


def test_a_version_takes_additions_and_no_other_change(written: Written, tmp_path: Path) -> None:
    target, now = tmp_path / "hook_api_1.json", copy.deepcopy(written)
    write_down(target, written)
    add_to(now)
    write_down(target, now)
    assert json.loads(target.read_text(encoding="utf-8")) == now
    with pytest.raises(SystemExit, match="raise hookspecs.HOOK_API for these changes:\n  mindprint_new"):
        write_down(target, written)
    assert json.loads(target.read_text(encoding="utf-8")) == now


def test_version_2_has_one_further_argument() -> None:
    """pluggy passes it only to backends that name it, so those of version 1 are called as before."""
    first, second = (json.loads(pinned(version).read_text(encoding="utf-8")) for version in (1, 2))
    (change,) = breaking_changes(first, second)
    assert change.startswith("mindprint_generate(")
    assert "on_token: 'OnToken | None'" in change
