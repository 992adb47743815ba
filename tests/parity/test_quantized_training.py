"""Training on packed bases: torch and MLX take the same steps, and both take those of the dequantized base.

Plain `nox` takes ten steps in MLX's affine format. `nox -s quantized` takes a hundred in every format, and the same on
SmolLM2 in 4 bits if its folder is given.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mindprint.config import DpoConfig, SftConfig
from mindprint.contract import QUANTIZED_FORMATS, StepMetrics, Update
from mindprint.data.collate import preference_batch, whole_sequences
from mindprint.data.render import PreferenceExample
from mindprint.data.row_files import Origin
from mindprint.data.tokenizer import load_tokenizer
from mindprint.losses import PreferenceLoss
from mindprint.models.likelihoods import sum_pairs
from mindprint_testing.quantizing import write_dequantized, write_quantized
from parity_cases import Opened, open_model, relative_difference, take_step

STEPS = int(os.environ.get("MINDPRINT_QUANTIZED_STEPS", "10"))
FORMATS = QUANTIZED_FORMATS if "MINDPRINT_QUANTIZED_STEPS" in os.environ else ("affine",)
REAL = os.environ.get("MINDPRINT_SMOLLM2") if "MINDPRINT_QUANTIZED_STEPS" in os.environ else None
TOLERANCE = 1e-5

LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
          "mlp.up_proj", "mlp.down_proj")  # fmt: skip


@pytest.fixture(scope="module", params=[*FORMATS, *(["SmolLM2"] if REAL else [])])
def models(request: pytest.FixtureRequest, qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Opened]:
    """The packed base and the dequantized one, each on both backends, all with the same adapter."""
    folder = tmp_path_factory.mktemp("quantized")
    if request.param == "SmolLM2":
        packed = quantized_by_mlx_lm(Path(str(REAL)), folder / "packed")
    else:
        linear = {f"model.layers.{layer}.{name}" for layer in range(3) for name in LAYERS}
        packed = write_quantized(qwen2, folder / "packed", request.param, linear)
    folders = {"packed": packed, "dense": write_dequantized(packed, folder / "dense")}
    return {f"{name} {kind}": open_model(name, path) for name in ("torch", "mlx") for kind, path in folders.items()}


def quantized_by_mlx_lm(source: Path, out: Path) -> Path:
    """Write a base in 4 bits as `mlx_lm.convert -q` does."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    module, config = quantize_model(*load_model(source), 64, 4)
    save_model(out, module)
    save_config(config, out / "config.json")
    return out


def within(values: list[float], expected: list[float]) -> bool:
    return bool(np.all(np.abs(np.subtract(values, expected)) <= TOLERANCE * (1 + np.abs(expected))))


def report(stage: str, losses: dict[str, list[float]]) -> None:
    """Print the greatest difference of each model from torch's packed one, over 1 + loss."""
    first = np.array(losses["torch packed"])
    for name, values in losses.items():
        greatest = float(np.max(np.abs(np.array(values) - first) / (1 + np.abs(first))))
        print(f"{stage}, {STEPS} steps, {name}: first {values[0]:.6f}, last {values[-1]:.6f}, greatest {greatest:.1e}")


PROMPT = 4
"""Tokens of a text that are a pair's prompt."""

TEXTS = (
    "The ferry leaves at noon and comes back with the tide, and nobody sets a clock by it any more.",
    "My grandmother counted her eggs in the old language and her money in the new one.",
    "Under the blue pot, love, as I tell you every spring.",
    "It runs when the wind lets it, and the wind is in a temper.",
    "Slowly, with cold hands, and never while I am cross.",
    "I like where the new road goes. I do not care for how it gets there.",
    "When the lambs are sold and the rain forgets us for a day.",
)
"""Text for a real model. On random ids and at a random model's learning rate its steps are a fall of six nats, in which
rounding grows: packed and dense weights on one backend are 4.6e-5 apart after a hundred of them."""


def take_text_step(opened: Opened, stage: str, step: int) -> StepMetrics:
    """Take one optimizer step on text, two micro-batches of ragged rows, at the default learning rate of its stage."""
    tokenizer = load_tokenizer(Path(str(REAL)))
    texts = [TEXTS[(4 * step + row) % len(TEXTS)] for row in range(4)]
    rows = [np.array(tokenizer.encode(text), np.int32) for text in texts]
    if stage == "sft":
        batches = [whole_sequences(rows[:2]), whole_sequences(rows[2:])]
        update = Update(SftConfig().learning_rate, tokens=sum(batch.loss_tokens for batch in batches))
        return opened.backend.sft_step(opened.model, batches, update)
    # Two pairs: the end of a text is chosen over the end of the next one.
    examples = [
        PreferenceExample("", chosen[:PROMPT], chosen[PROMPT:], rejected[PROMPT:], Origin("text", 0))
        for chosen, rejected in (rows[:2], rows[2:])
    ]
    sums = sum_pairs(opened.backend, opened.model, examples, tokenizer.pad_id, adapter=False)
    pairs = [
        preference_batch([example], tokenizer.pad_id, (sums.chosen[[place]], sums.rejected[[place]]))
        for place, example in enumerate(examples)
    ]
    tokens = sum(int(batch.chosen_lengths.sum()) for batch in pairs)
    update = Update(DpoConfig().learning_rate, tokens=tokens, pairs=len(pairs))
    return opened.backend.dpo_step(opened.model, pairs, PreferenceLoss("sigmoid"), update)


def step_taker(models: dict[str, Opened]) -> Callable[[Opened, str, int], StepMetrics]:
    """Return how a step is taken: on text by a real model, and else on random ids."""
    return take_text_step if models["torch packed"].model.parameters > 1e8 else take_step


def test_sft_steps_on_packed_weights(models: dict[str, Opened]) -> None:
    start = models["torch packed"].save()
    losses: dict[str, list[float]] = {}
    take = step_taker(models)
    for name, opened in models.items():
        opened.restore(start)
        losses[name] = [take(opened, "sft", step).loss for step in range(STEPS)]
    report("SFT", losses)
    for name, values in losses.items():
        assert within(values, losses["torch packed"]), name
    assert losses["torch packed"][-1] != losses["torch packed"][0]


def test_dpo_steps_on_packed_weights(models: dict[str, Opened]) -> None:
    """Rounding grows along a trajectory of preferences: each step starts from the same state."""
    take = step_taker(models)
    losses: dict[str, list[float]] = {name: [] for name in models}
    for step in range(STEPS):
        state = models["torch packed"].save()
        for name, opened in models.items():
            if name != "torch packed":
                opened.restore(state)
            losses[name].append(take(opened, "dpo", step).loss)
    report("DPO", losses)
    for name, values in losses.items():
        assert within(values, losses["torch packed"]), name
    ends = {name: opened.save() for name, opened in models.items()}
    for name, state in ends.items():
        for site, factors in state.adapter.tensors.items():
            assert relative_difference(ends["torch packed"].adapter.tensors[site].a, factors.a) < 1e-4, (name, site)
