"""`serve` gives the answers of `generate` on both backends, alone and eight at once, with like and unlike settings."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import mindprint

sys.path.insert(0, str(Path(__file__).parents[2] / "packages" / "mindprint-core" / "tests"))

from served import (
    assert_requests_with_unlike_settings_are_answered_as_alone,
    assert_served_as_generated,
    write_tiny_voice,
)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_answers_are_those_of_generate_alone_and_eight_at_once(backend: str, tmp_path: Path) -> None:
    voice = write_tiny_voice(tmp_path / "voice")
    with mindprint.open_adapter(voice, backend=backend, device="cpu", dtype="float32") as opened:
        assert_served_as_generated(opened)
        assert_requests_with_unlike_settings_are_answered_as_alone(opened)
