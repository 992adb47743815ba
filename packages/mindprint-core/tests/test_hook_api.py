"""The hook API changes with its version, or not at all; docs/hook-api.md says what that means."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hook_api import Written, breaking_changes, pinned, signatures

from mindprint.hookspecs import HOOK_API, REQUIRED_HOOKS, SUPPORTED_HOOK_APIS


@pytest.fixture
def written() -> Written:
    return json.loads(pinned(HOOK_API).read_text(encoding="utf-8"))


def test_nothing_that_plugins_rely_on_changed_without_a_version(written: Written) -> None:
    """If it fails, a plugin built for this version could break: raise HOOK_API, or make the change an addition."""
    assert breaking_changes(written, signatures(), set(REQUIRED_HOOKS)) == []


def test_this_version_and_the_one_before_are_driven() -> None:
    assert {HOOK_API, max(1, HOOK_API - 1)} == set(SUPPORTED_HOOK_APIS)


def rename_argument(api: Written) -> None:
    api["hooks"]["mindprint_save"] = "(handle: 'Any') -> 'TrainingState'"


def remove_hook(api: Written) -> None:
    del api["hooks"]["mindprint_release"]


def remove_field(api: Written) -> None:
    api["types"]["mindprint.contract.Update"].pop(1)


def require_field(api: Written) -> None:
    api["types"]["mindprint.contract.ModelSpec"].append("shards: int")


@pytest.mark.parametrize("change", [rename_argument, remove_hook, remove_field, require_field])
def test_a_breaking_change_is_seen(written: Written, change: Callable[[Written], Any]) -> None:
    now = copy.deepcopy(written)
    change(now)
    assert len(breaking_changes(written, now, set(REQUIRED_HOOKS))) == 1


def test_a_new_required_hook_is_seen_and_additions_are_not(written: Written) -> None:
    now = copy.deepcopy(written)
    now["hooks"]["mindprint_new"] = "(model: 'Any') -> 'bool'"
    now["types"]["mindprint.contract.ModelSpec"].append("shards: int (optional)")
    assert breaking_changes(written, now, set(REQUIRED_HOOKS)) == []
    assert len(breaking_changes(written, now, {*REQUIRED_HOOKS, "mindprint_new"})) == 1
