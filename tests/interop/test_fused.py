"""Merges of our adapters into a quantized base by other tools: `mlx_lm.fuse`, and PEFT's `merge_and_unload` on NF4.

Both round the merged weights back onto the grid that the base was quantized to, where an adapter's small changes are
lost. `mindprint verify` must say so, and must accept the same merge in full precision.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from subprocess import run as execute
from typing import Any

import pytest

import mindprint
from mindprint.config import ModelConfig
from mindprint.models.folder import SINGLE_FILE, resolve_model
from mindprint_testing.quantizing import write_quantized

ROWS = [{"prompt": f"Where is rope {n}?", "completion": f"In the barrel, my dear, hook {n}."} for n in range(6)]


@dataclass(frozen=True)
class Trained:
    """A quantized base, and the folder of an adapter that was trained on it."""

    base: Path
    adapter: Path


def trained(root: Path, backend: str, **model: Any) -> Trained:
    """Train a few small steps, as many as move log-probs by some hundredths of a nat."""
    result = mindprint.train(
        {
            "model": model,
            "backend": {"type": backend, "device": "cpu", "dtype": "float32"},
            "adapter": {"r": 4},
            "sft": {"steps_per_topic": 3, "batch_size": 2, "learning_rate": 5e-4},
            "dpo": {"enabled": False},
            "evaluation": {"levels": []},
        },
        rows=ROWS,
        run=root / "run",
    )
    return Trained(Path(model["name"]), result.adapter)


@pytest.fixture(scope="module")
def on_mlx(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    from mlx_lm.utils import load, quantize_model, save

    root = tmp_path_factory.mktemp("affine")
    dense = resolve_model(ModelConfig(name="builtin:tiny"), Path.cwd()).path
    module, tokenizer, config = load(str(dense), return_config=True)
    module, config = quantize_model(module, config, 64, 4)
    save(root / "base", str(dense), module, tokenizer, config)
    return trained(root, "mlx", name=str(root / "base"))


def fused(it: Trained, out: Path, *options: str) -> Path:
    """Fuse as a user of mlx-lm does."""
    mindprint.convert(it.adapter, out / "converted", to="mlx-lm")
    command = [sys.executable, "-m", "mlx_lm", "fuse", "--model", str(it.base)]
    command += ["--adapter-path", str(out / "converted"), "--save-path", str(out / "fused"), *options]
    execute(command, check=True, capture_output=True, timeout=120)
    return out / "fused"


def test_fuse_by_mlx_lm_is_found_to_lose_the_effect(on_mlx: Trained, tmp_path: Path) -> None:
    result = mindprint.verify(fused(on_mlx, tmp_path), adapter=on_mlx.adapter, model=str(on_mlx.base))
    (finding,) = (finding for finding in result.report.findings if finding.fails)
    print(f"\nmlx_lm.fuse: {finding.message}")
    assert finding.code == "requantized"
    assert finding.factor is not None
    assert finding.factor < 0.95


def test_fuse_by_mlx_lm_into_dequantized_weights_rounds_twice(on_mlx: Trained, tmp_path: Path) -> None:
    """With scales in 16 bits `mx.dequantize` rounds the product and the sum, in tensors without an adapter too."""
    whole = fused(on_mlx, tmp_path, "--dequantize")
    result = mindprint.verify(whole, adapter=on_mlx.adapter, model=str(on_mlx.base))
    assert {finding.code for finding in result.findings} == {"merge_differs", "base_changed"}
    assert any("does not touch" in finding.message for finding in result.findings)
    effect = result.report.effect
    assert effect is not None
    assert effect.recorded is not None
    assert effect.found == pytest.approx(effect.recorded, rel=0.01)  # a small loss, which the message does not hide


def test_merge_and_unload_by_peft_is_found_to_lose_the_effect(tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    dense = resolve_model(ModelConfig(name="builtin:tiny"), Path.cwd()).path
    linear = {name for name, _ in AutoModelForCausalLM.from_pretrained(dense).named_modules() if "_proj" in name}
    write_quantized(dense, tmp_path / "base", "nf4", linear)
    it = trained(tmp_path, "torch", name=str(tmp_path / "base"))
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(it.base), it.adapter)
    with pytest.warns(UserWarning, match="4-bit"):
        whole = wrapped.merge_and_unload()
    # transformers cannot write what it read in this format. The state has all tensors of the format.
    shutil.copytree(it.base, tmp_path / "merged")
    state = {name: value.contiguous() for name, value in whole.state_dict().items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "merged" / SINGLE_FILE, metadata={"format": "pt"})
    result = mindprint.verify(tmp_path / "merged", adapter=it.adapter, model=str(it.base))
    (finding,) = (finding for finding in result.report.findings if finding.fails)
    print(f"\nPEFT's merge_and_unload: {finding.message}")
    assert finding.code == "requantized"
    assert finding.factor is not None
    assert finding.factor < 0.95
