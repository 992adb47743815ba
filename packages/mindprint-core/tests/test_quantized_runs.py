"""A quantized base from training to a merged model, on a backend that has core dequantize it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized_base import affine_tensors, edit_tensors

import mindprint
from mindprint.adapter.merging import RECORD_FILE
from mindprint.adapter.peft_format import read_adapter, write_adapter
from mindprint.api import NotVerifiedError
from mindprint.contract import AdapterState, LoraFactors
from mindprint.errors import BackendError, ModelError
from mindprint.models.folder import base_digest, model_config
from mindprint.models.quantized import load_dense, quantized_weights, read_quantization

PAIRS = [{"prompt": f"{n}?", "chosen": f"aye, {n}", "rejected": "yes"} for n in range(4)]
ROWS = [{"prompt": f"sea {n}?", "completion": "aye " * (n + 1)} for n in range(4)] + PAIRS
LAYERS = ("layers.0.up_proj", "layers.0.down_proj")


def quantize(base: Path, out: Path, bits: int) -> Path:
    """Quantize the two layers of the toy base, as MLX would."""
    shutil.copytree(base, out)
    values = load_dense(base)

    def packed(stored: dict[str, Any]) -> dict[str, Any]:
        for layer in LAYERS:
            del stored[f"{layer}.weight"]
            stored |= affine_tensors(layer, values[f"{layer}.weight"], bits, 32, "F32")
        return stored

    edit_tensors(out, packed)
    section = {"group_size": 32, "bits": bits}
    (out / "config.json").write_text(json.dumps({**model_config(base), "quantization": section}))
    return out


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from toy_base import write_toy_model

    folder = tmp_path_factory.mktemp("bases")
    write_toy_model(folder / "full")
    for bits in (2, 4, 8):
        quantize(folder / "full", folder / f"{bits}bit", bits)
    return folder


@pytest.fixture
def trained(toy: str, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short run on the 4-bit base."""
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {"name": str(bases / "4bit")},
        "backend": toy,
        "adapter": {"r": 2},
        "sft": {"steps_per_topic": 3, "batch_size": 2, "learning_rate": 1e-2},
        "dpo": {"steps_per_topic": 2, "batch_size": 2, "learning_rate": 1e-2},
        "evaluation": {"levels": []},
    }
    return mindprint.train(config, rows=ROWS).run


def scaled(run: Path, factor: float) -> Path:
    """Write a copy of the run's adapter with another strength."""
    adapter, base = read_adapter(run / "adapter")
    tensors = {site: LoraFactors(a, b * np.float32(factor)) for site, (a, b) in adapter.tensors.items()}
    out = Path("scaled")
    out.mkdir()
    write_adapter(out, AdapterState(adapter.config, tensors), base)
    return out


def test_a_run_on_a_quantized_base_is_verified_and_merged_into_full_precision(trained: Path, bases: Path) -> None:
    fingerprint = json.loads((trained / "adapter" / "fingerprint.json").read_text())
    assert fingerprint["base"]["settings"]["quantization"] == "affine, 4 bits, groups of 32"
    card = (trained / "adapter" / "README.md").read_text()
    assert "The base was quantized in training (affine, 4 bits, groups of 32)." in card
    assert "mindprint convert path/to/this/folder converted --to mlx-lm" in card
    assert mindprint.verify(trained).findings == ()
    merged = mindprint.merge(trained, "merged")
    assert merged.verification is not None and merged.verification.findings == ()
    assert read_quantization(Path("merged")) is None and not quantized_weights(Path("merged"))
    assert mindprint.verify("merged").ok


def test_a_merge_on_the_old_grid_is_caught_by_its_effect(trained: Path, bases: Path, toy: str) -> None:
    """As `mlx_lm.fuse` does it, and PEFT's `merge_and_unload`: every file is plausible by itself."""
    weak, base = scaled(trained, 0.05), str(bases / "4bit")
    mindprint.merge(weak, "merged", model=base, backend=toy)
    quantize(Path("merged"), Path("fused"), 4)
    shutil.copy(Path("merged") / RECORD_FILE, Path("fused") / RECORD_FILE)
    fused = mindprint.verify("fused", model=base, backend=toy)
    assert not fused.ok and fused.codes == {"requantized"}
    (finding,) = (finding for finding in fused.findings if finding.fails)
    assert finding.factor is not None
    assert "the merged model is in affine, 4 bits, groups of 32, and the rounding leaves" in finding.message
    assert "at least 0.95 of both is needed. Merge into full precision with `mindprint merge`" in finding.message
    with pytest.raises(NotVerifiedError, match=r"the rounding leaves .* of the adapter's effect"):
        mindprint.merge(weak, "coarse", model=base, backend=toy, quantize=True)
    assert not Path("coarse").exists()


def test_a_merge_is_quantized_only_if_the_effect_survives(trained: Path, bases: Path, toy: str) -> None:
    # An adapter twice as strong is large compared with a step of a grid of 8 bits.
    strong = scaled(trained, 2.0)
    merged = mindprint.merge(strong, "strong", model=str(bases / "8bit"), backend=toy, quantize=True)
    assert merged.verification is not None and merged.verification.ok
    (kept,) = (finding for finding in merged.verification.findings if finding.code == "requantized")
    assert not kept.fails
    assert quantized_weights(Path("strong")).keys() == quantized_weights(bases / "8bit").keys()
    with pytest.raises(ModelError, match="is not quantized, so that there is no format to quantize the merge in"):
        mindprint.merge(strong, "none", model=str(bases / "full"), quantize=True)


def test_another_quantization_is_named_measured_and_accepted_if_asked(trained: Path, bases: Path) -> None:
    for name, words in (("full", "full precision"), ("8bit", "affine, 8 bits, groups of 32")):
        elsewhere = mindprint.verify(trained, model=str(bases / name))
        assert elsewhere.codes == {"other_quantization"} and not elsewhere.ok
        (finding,) = elsewhere.findings
        assert f"trained on a base in affine, 4 bits, groups of 32, and {bases / name} is in {words}" in finding.message
        assert finding.factor == pytest.approx(1.0, abs=0.05)
        assert "ask for it with --any-quantization" in finding.message
        asked = mindprint.verify(trained, model=str(bases / name), any_quantization=True)
        assert asked.ok and [finding.code for finding in asked.findings] == ["other_quantization"]


def test_a_merge_into_the_full_precision_model_says_how_much_of_the_effect_is_there(trained: Path, bases: Path) -> None:
    merged = mindprint.merge(trained, "into", into=str(bases / "full"))
    assert merged.verification is not None and merged.verification.ok
    assert [finding.code for finding in merged.verification.findings] == ["other_quantization"]
    again = mindprint.verify("into")
    assert again.ok and again.findings == merged.verification.findings
    full, out = load_dense(bases / "full"), load_dense(Path("into"))
    adapter, _ = read_adapter(trained / "adapter")
    for site, (a, b) in adapter.tensors.items():
        expected = full[f"{site}.weight"] + np.float32(adapter.config.scale(site)) * (b @ a)
        np.testing.assert_allclose(out[f"{site}.weight"], expected, atol=1e-6)


def test_a_quantized_merge_is_not_kept_without_a_measurement(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="has to be measured: install a backend, and let it verify"):
        mindprint.merge(trained, "unmeasured", quantize=True, verify=False)


def test_a_preference_cache_of_another_quantization_is_refused(trained: Path, bases: Path) -> None:
    """The key of a reference has the base's digest, which reads packed bytes and the section of config.json."""
    identities = {base_digest(bases / name) for name in ("full", "2bit", "4bit", "8bit")}
    assert len(identities) == 4
