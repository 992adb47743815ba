"""GGUF files on llama.cpp: a merged file is verified, and so is an adapter's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import mindprint

sys.path.insert(0, str(Path(__file__).parents[2] / "mindprint-core" / "tests"))

from served import write_tiny_voice


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    return write_tiny_voice(tmp_path / "voice")


def test_a_required_fingerprint_is_a_finding_of_a_file_as_of_a_folder(voice: Path) -> None:
    file = voice.parent / "voice.gguf"
    merged = mindprint.merge(voice, file, to="gguf", file_type="f32")
    assert merged.verification is not None
    assert merged.verification.ok
    assert mindprint.verify(file).ok
    converted = mindprint.convert(voice, voice.parent / "converted", to="gguf").folder / "adapter.gguf"
    for path, adapter in ((file, None), (converted, voice), (voice, None)):
        refused = mindprint.verify(path, adapter=adapter, backend="llamacpp", require_fingerprint=True)
        assert refused.codes == {"no_fingerprint"}
        assert refused.verdict == "not verified: 1 finding"
