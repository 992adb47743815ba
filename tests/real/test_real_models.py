"""Pretrained models train alike on torch, on MLX and in TRL's trainers, in float32, and their adapters are used.

`nox -s real` makes the models' folders (`pretrained.py`), names them in `MINDPRINT_REAL`, and trains each for 30 SFT
and 30 DPO steps. `nox -s pretrained` does the same with two steps of a model that is cut to a few layers. Tolerances
are the table of docs/numerics.md. `pytest -s` prints the deviations.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mindprint
from mindprint.adapter.peft_format import read_adapter, write_adapter
from mindprint.config import make_config
from mindprint.contract import TokenBatch
from mindprint.runs.folder import RunFolder
from mindprint.training.prepare import prepare
from parity_cases import open_model
from trl_curves import Curve, core_initial_adapter, our_curve, train_ours, trl_curve, trl_dpo, trl_sft, write

FOLDER = Path(os.environ["MINDPRINT_REAL"])
STEPS = int(os.environ.get("MINDPRINT_REAL_STEPS", "30"))
MODELS = os.environ["MINDPRINT_REAL_MODELS"].split()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # TRL itself
]

SFT_TOLERANCE = 1e-5
DPO_TOLERANCE = 1e-3
LOG_PROB_TOLERANCE = {"mean": 1e-5, "greatest": 1e-4}

ROWS = (
    ("Where do you keep the spare key?", "Under the blue pot, love, as I tell you every spring.", "In the drawer."),
    ("Is the ferry running today?", "It runs when the wind lets it, and the wind is in a temper.", "Yes, it is."),
    ("How do you make your bread?", "Slowly, with cold hands, and never while I am cross.", "With flour and water."),
    ("What did the doctor say?", "That I shall outlive my shoes. I bought better shoes.", "Nothing serious."),
    ("Who planted the pear tree?", "My aunt did, out of spite, and look how sweetly it bears.", "My aunt planted it."),
    ("Do you like the new road?", "I like where it goes. I do not care for how it gets there.", "Yes, I like it."),
    ("Why is the clock always wrong?", "It is not wrong, dear; it is early for tomorrow.", "It is broken."),
    ("When will you visit us?", "When the lambs are sold and the rain forgets us for a day.", "Next month."),
)  # fmt: skip
"""Prompts, with an answer in a person's voice and a plain one."""


@pytest.fixture(scope="module", params=MODELS)
def base(request: pytest.FixtureRequest) -> Path:
    return FOLDER / request.param


@pytest.fixture(scope="module")
def project(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings for both stages. A base model without a chat template is trained on plain text."""
    data = tmp_path_factory.mktemp("data")
    write(data / "sft.jsonl", [{"prompt": prompt, "completion": voiced} for prompt, voiced, _ in ROWS])
    pairs = [{"prompt": prompt, "chosen": voiced, "rejected": plain} for prompt, voiced, plain in ROWS]
    write(data / "preferences.jsonl", pairs)
    chat = (base / "chat_template.jinja").exists()
    return {
        "model": {"name": str(base)},
        "backend": {"dtype": "float32", "device": "cpu"},
        "data": {
            "path": str(data),
            "max_length": 96,
            "heldout_fraction": 0.0,
            "format": "chat" if chat else "raw",
        },
        "adapter": {"r": 8, "alpha": 16.0},
        "sft": {"steps_per_topic": STEPS, "batch_size": 2, "learning_rate": 3e-4},
        "dpo": {"steps_per_topic": STEPS, "batch_size": 2, "learning_rate": 5e-6},
    }


@dataclass(frozen=True)
class Sides:
    """The runs of both backends on one base model, and the curves of all three sides by stage."""

    runs: dict[str, RunFolder]
    curves: dict[str, dict[str, Curve]]


@pytest.fixture(scope="module")
def sides(base: Path, project: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    """Train on torch, on MLX and with TRL, one after the other, and keep the curves alone."""
    folder = tmp_path_factory.mktemp(base.name)
    runs = {name: train_ours(project, folder / name, name) for name in ("torch", "mlx")}
    curves = {name: {stage: our_curve(run, stage) for stage in ("sft", "dpo")} for name, run in runs.items()}
    curves["trl"] = trl_curves(project, base, folder)
    yield Sides(runs, curves)
    print(f"\n\n{base.name}: greatest deviation of the loss in {STEPS} steps, over 1 + loss")
    for stage in ("sft", "dpo"):
        for name, other in (("torch", "trl"), ("mlx", "trl"), ("mlx", "torch")):
            print(f"{stage}: {name} from {other:<8}{greatest_deviation(curves, stage, name, other):.1e}")


def trl_curves(project: dict[str, Any], base: Path, folder: Path) -> dict[str, Curve]:
    """Return the curves of TRL's trainers, the second of which continues from the file that the first one saved."""
    file = make_config(project)
    (folder / "initial").mkdir()
    write_adapter(folder / "initial", core_initial_adapter(file, base), str(base))
    prepared, data = prepare(file), Path(project["data"]["path"])
    sft = trl_sft(prepared, base, folder / "initial", folder / "sft", data / "sft.jsonl")
    sft.save_model(str(folder / "saved"))
    curve = trl_curve(sft)
    del sft  # the base model is large, and the next trainer loads it again
    dpo = trl_dpo(prepared, base, folder / "saved", folder / "dpo", data / "preferences.jsonl")
    return {"sft": curve, "dpo": trl_curve(dpo)}


def greatest_deviation(curves: dict[str, dict[str, Curve]], stage: str, name: str, other: str) -> float:
    loss, expected = curves[name][stage].loss, curves[other][stage].loss
    assert len(loss) == len(expected) == STEPS
    return float((np.abs(loss - expected) / (1 + np.abs(expected))).max())


@pytest.mark.parametrize(("name", "other"), [("torch", "trl"), ("mlx", "trl"), ("mlx", "torch")])
@pytest.mark.parametrize(("stage", "tolerance"), [("sft", SFT_TOLERANCE), ("dpo", DPO_TOLERANCE)])
def test_curves_agree(sides: Sides, stage: str, tolerance: float, name: str, other: str) -> None:
    assert greatest_deviation(sides.curves, stage, name, other) <= tolerance


def test_the_voice_is_learned(sides: Sides) -> None:
    for curves in sides.curves.values():
        assert curves["sft"].loss[-1] < curves["sft"].loss[0]
        # Before the first DPO step policy and reference are the same.
        assert curves["dpo"].loss[0] == pytest.approx(np.log(2), abs=1e-4)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_peft_loads_the_adapter_and_computes_the_same(sides: Sides, base: Path, backend: str) -> None:
    adapter = sides.runs[backend].adapter
    tokens = text_tokens(base)
    seen = np.broadcast_to(np.arange(tokens.shape[1]) > 0, tokens.shape)
    batch = TokenBatch(tokens, np.full(len(tokens), tokens.shape[1], np.int32), seen)
    opened = open_model(backend, base, read_adapter(adapter)[0])
    ours = opened.backend.log_probs(opened.model, batch)
    bare = opened.backend.log_probs(opened.model, batch, adapter=False)
    opened.backend.release(opened.model)
    difference = np.abs(ours - peft_log_probs(base, adapter, tokens))[batch.loss_mask]
    print(f"\n{backend}'s adapter, and PEFT's float64: mean {difference.mean():.1e}, greatest {difference.max():.1e}")
    assert difference.mean() < LOG_PROB_TOLERANCE["mean"]
    assert difference.max() < LOG_PROB_TOLERANCE["greatest"]
    assert np.abs(ours - bare)[batch.loss_mask].mean() > 10 * difference.mean()


def text_tokens(base: Path) -> np.ndarray:
    """Return two rows of text that the models were not trained on, int32 `[2, 24]`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = (
        "The ferry leaves at noon and comes back with the tide, and nobody on the island sets a clock by it any more.",
        "My grandmother counted her eggs in the old language and her money in the new one, and made no mistake in it.",
    )
    return np.array([tokenizer(text)["input_ids"][:24] for text in texts], np.int32)


def peft_log_probs(base: Path, adapter: Path, tokens: np.ndarray) -> np.ndarray:
    """Return PEFT's log-probs of every token but the first of each row, in float64, `[rows, T]`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    # In float64: with Gemma 3, PEFT's own float32 is 7e-6 from it, and would be a second error in the difference.
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(network, adapter).double()
    ids = torch.tensor(tokens, dtype=torch.int64)
    with torch.no_grad():
        log_probs = model(ids).logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return np.concatenate([np.zeros((len(tokens), 1)), log_probs.numpy()], axis=1)


@pytest.mark.parametrize(("trained_on", "checked_on"), [("torch", "mlx"), ("mlx", "torch")])
def test_merging_is_verified(sides: Sides, tmp_path: Path, trained_on: str, checked_on: str) -> None:
    merged = mindprint.merge(sides.runs[trained_on].path, tmp_path / "merged", backend=checked_on)
    assert merged.verification is not None
    assert merged.verification.ok, merged.verification.findings
    print(f"\nmerge of {trained_on}'s adapter, on {checked_on}: {shares(merged.verification)}")


@pytest.mark.parametrize(("trained_on", "checked_on"), [("torch", "mlx"), ("mlx", "torch")])
def test_the_other_backend_verifies_the_adapter(sides: Sides, trained_on: str, checked_on: str) -> None:
    result = mindprint.verify(sides.runs[trained_on].path, backend=checked_on)
    assert result.ok, result.findings
    print(f"\ntrained on {trained_on}, on {checked_on}: {shares(result)}")


def shares(result: mindprint.VerifyResult) -> str:
    """Describe the last comparison of a verification: its figures, and how much of their bounds they are."""
    seen = result.report.comparisons[-1]
    mean, greatest = seen.mean / seen.tolerance.mean, seen.greatest / seen.tolerance.greatest
    return f"mean {seen.mean:.1e} nats ({mean:.2f} of its bound), greatest {seen.greatest:.1e} ({greatest:.2f})"
