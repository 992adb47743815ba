"""The public API of mindprint_testing, as values that a test compares with those written down.

    python packages/mindprint-testing/tests/testing_api.py

writes down additions. It never changes an entry that is written down: the rules are those of docs/hook-api.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mindprint_testing
from mindprint_testing import bench, claims, override, suite, tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "mindprint-core" / "tests"))

from hook_api import Written, breaking_changes, public_names, write_down

__all__ = ["PINNED", "breaking_changes", "public_signatures"]

PINNED = Path(__file__).with_name("testing_api_1.json")

NAMES = [
    (bench, "Bench"),
    (bench, "sft_update"),
    (bench, "dpo_update"),
    (claims, "Claims"),
    (override, "departs"),
    (tiny, "write_tiny_model"),
]


def public_signatures() -> Written:
    """Return the exported names, their signatures, and the attributes and fixtures that a test class may set."""
    api = public_names(NAMES)
    attributes = [f"{name}: {kind}" for name, kind in claims.Claims.__annotations__.items()]
    fixtures = [name for name in vars(suite.BackendConformance) if name in ("model_folder", "bench")]
    return api | {"required": [], "hooks": {}, "constants": {
        "exported": sorted(mindprint_testing.__all__),
        "attributes of a test class": attributes,
        "fixtures of a test class": fixtures,
    }}  # fmt: skip


if __name__ == "__main__":
    write_down(PINNED, public_signatures())
