"""GGUF files on llama.cpp: a merged file is verified, and so is an adapter's."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mindprint
from gguf import GGMLQuantizationType, GGUFWriter, quants
from mindprint.adapter.gguf_files import copy_keys, read_gguf

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


@pytest.mark.parametrize(("kind", "strength", "survives"), [("Q5_1", 1.0, True), ("Q5_1", 0.02, False)])
def test_a_file_of_few_bits_says_how_much_of_the_adapter_is_left(
    voice: Path, kind: str, strength: float, survives: bool
) -> None:
    """A merged model in five bits, as llama.cpp writes it: a strong adapter survives, and a weak one does not."""
    weights = voice / "adapter_model.safetensors"
    factors = load_file(weights)
    save_file({name: values * (strength if "lora_B" in name else 1) for name, values in factors.items()}, weights)
    whole, small = voice.parent / "whole.gguf", voice.parent / "small.gguf"
    mindprint.merge(voice, whole, to="gguf", file_type="f32", verify=False)
    requantize(whole, small, GGMLQuantizationType[kind])
    result = mindprint.verify(small, adapter=voice)
    (found,) = (finding for finding in result.findings if finding.code == "requantized")
    assert found.message.startswith(f"the merged model is in {kind}, and the rounding leaves ")
    # Rounding noise has a size too, so the size of the effect alone tells nothing: it must also be alike.
    likeness = float(found.message.partition("(likeness ")[2].partition(")")[0])
    print(f"\n{strength:g} of the adapter in {kind}: {found.message}")
    assert (result.ok, found.fails) == (survives, not survives)
    assert (likeness >= 0.95) == survives


def requantize(file: Path, out: Path, coarse: GGMLQuantizationType) -> None:
    """Write a file again, with its matrices in another type."""
    opened = read_gguf(file)
    writer = GGUFWriter(out, opened.architecture)
    copy_keys(writer, opened, ())
    for name, tensor in opened.tensors.items():
        values = np.ascontiguousarray(tensor.values())
        kind = coarse if values.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
