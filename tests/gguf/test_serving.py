"""SmolLM2 on three backends: `serve` gives the answers of `generate`, alone and eight at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import mindprint

sys.path.insert(0, str(Path(__file__).parents[2] / "packages" / "mindprint-core" / "tests"))

from served import (
    assert_requests_with_unlike_settings_are_answered_as_alone,
    assert_served_as_generated,
    write_random_voice,
)

SMOLLM2 = Path(os.environ["MINDPRINT_REAL"]) / "smollm2"


@pytest.mark.parametrize("backend", ["torch", "mlx", "llamacpp"])
def test_answers_are_those_of_generate_alone_and_eight_at_once(backend: str, tmp_path: Path) -> None:
    rows = {"q_proj": 576, "v_proj": 192}
    voice = write_random_voice(tmp_path / "voice", str(SMOLLM2), layers=30, width=576, rows=rows)
    with mindprint.open_adapter(voice, backend=backend, device="cpu", dtype="float32") as opened:
        assert_served_as_generated(opened, new_tokens=12)
        assert_requests_with_unlike_settings_are_answered_as_alone(opened)
    print(f"{backend}: 36 answers of serve are those of generate")
