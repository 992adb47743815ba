"""The suite's own public API: what a backend's test module sets, overrides and calls."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from testing_api import PINNED, breaking_changes, public_signatures


def test_nothing_that_test_modules_rely_on_changed() -> None:
    """If the second line fails, run testing_api.py: from then on the addition is pinned too."""
    written = json.loads(PINNED.read_text(encoding="utf-8"))
    assert breaking_changes(written, public_signatures()) == []
    assert written == public_signatures()


def test_a_change_is_seen() -> None:
    written = json.loads(PINNED.read_text(encoding="utf-8"))
    now = copy.deepcopy(written)
    now["constants"]["attributes of a test class"].pop()
    now["constants"]["fixtures of a test class"].remove("model_folder")
    now["constants"]["exported"].remove("departs")
    del now["methods"]["mindprint_testing.bench.Bench.load"]
    assert len(breaking_changes(written, now)) == 4
