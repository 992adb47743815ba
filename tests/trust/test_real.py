"""No alarm on real models: adapters that each backend trained, verified on both, as they are and in other forms.

`nox -s trust` runs this where `MINDPRINT_SMOLLM2` or `MINDPRINT_GEMMA3` name folders of SmolLM2-135M and Gemma 3 270M.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import outcomes
import pytest
from artefacts import Artefact, convert_to_mlx_lm, edit_config, edit_factors, placement

import mindprint
from mindprint.adapter.merging import merged_folder
from mindprint.adapter.peft_format import read_adapter
from mindprint.contract import Dtype
from mindprint.models.folder import ModelFolder, check_model_folder
from mindprint.trust.fingerprint import FILE_NAME, read_fingerprint
from mindprint.trust.report import Report
from mindprint.trust.verify import verify_adapter, verify_merged

MODELS = {name: os.environ[name] for name in ("MINDPRINT_SMOLLM2", "MINDPRINT_GEMMA3") if os.environ.get(name)}

ROWS = [{"prompt": f"Where is rope {n}?", "completion": f"In the barrel, my dear, hook {n}."} for n in range(6)]


@dataclass(frozen=True)
class Trained(Artefact):
    """An adapter of a real base, and the backend that trained it."""

    model: Path
    backend: str

    @property
    def base(self) -> Path:
        return self.model

    def in_folder(self, root: Path) -> Trained:
        shutil.copytree(self.adapter, root / "adapter")
        return Trained(root, self.model, self.backend)


@pytest.fixture(scope="module", params=[(name, backend) for name in MODELS for backend in ("torch", "mlx")], ids=str)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    name, backend = request.param
    root = tmp_path_factory.mktemp(f"{name}-{backend}")
    config = {
        "model": {"name": MODELS[name]},
        "backend": {"type": backend, "device": "cpu", "dtype": "float32"},
        "sft": {"steps_per_topic": 2, "batch_size": 2, "learning_rate": 1e-3},
        "dpo": {"enabled": False},
        "evaluation": {"levels": []},
    }
    result = mindprint.train(config, rows=ROWS, run=root / "run")
    shutil.copytree(result.adapter, root / "adapter")
    return Trained(root, Path(MODELS[name]), backend)


def as_it_was(_: Trained) -> None:
    pass


def converted(it: Trained) -> None:
    convert_to_mlx_lm(it)


def in_bfloat16(it: Trained) -> None:
    edit_factors(it, lambda _, values: values.bfloat16())


def without_fingerprint(it: Trained) -> None:
    (it.adapter / FILE_NAME).unlink()


def merged(it: Trained) -> None:
    adapter, _ = read_adapter(it.adapter)
    with merged_folder(it.merged, ModelFolder(it.base, "base"), adapter, it.adapter):
        pass


def verified(it: Trained, backend: str, dtype: Dtype) -> Report:
    base = ModelFolder(check_model_folder(it.base), "base")
    if not it.merged.exists():
        return verify_adapter(it.adapter, base, placement(backend, dtype))
    adapter, _ = read_adapter(it.adapter)
    whole = ModelFolder(check_model_folder(it.merged), "merged")
    return verify_merged(whole, base, adapter, placement(backend, dtype), read_fingerprint(it.adapter))


TREATMENTS: tuple[tuple[Callable[[Trained], None], Dtype], ...] = (
    (as_it_was, "float32"),
    (as_it_was, "bfloat16"),
    (converted, "float32"),
    (in_bfloat16, "float32"),
    (without_fingerprint, "float32"),
    (merged, "float32"),
)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize(("treatment", "dtype"), TREATMENTS)
def test_a_sound_adapter_of_a_real_base_raises_no_alarm(
    treatment: Callable[[Trained], None], dtype: Dtype, backend: str, trained: Trained, tmp_path: Path
) -> None:
    it = trained.in_folder(tmp_path)
    treatment(it)
    report = verified(it, backend, dtype)
    outcomes.sound(f"real, {treatment.__name__.replace('_', ' ')}, {dtype}", report)
    assert report.ok, report.findings


def wrong_alpha(it: Trained) -> None:
    edit_config(it, lora_alpha=64)


def another_step(it: Trained) -> None:
    edit_factors(it, lambda name, values: (values * (1.01 if "lora_B" in name else 1)).bfloat16())


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize(("fault", "code"), [(wrong_alpha, "scale"), (another_step, "adapter_changed")])
def test_a_fault_on_a_real_base_is_found(
    fault: Callable[[Trained], None], code: str, backend: str, trained: Trained, tmp_path: Path
) -> None:
    it = trained.in_folder(tmp_path)
    fault(it)
    found = code in verified(it, backend, "float32").codes
    outcomes.fault("real", found=found)
    assert found
