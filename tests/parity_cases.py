"""The work that parity tests give to both backends: ragged batches, one adapter, one loss after the other."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mindprint.adapter.initial import initial_adapter
from mindprint.adapter.targets import resolve_targets
from mindprint.contract import (
    AdapterState,
    LoadedModel,
    LoraConfig,
    LoraFactors,
    ModelSpec,
    PreferenceBatch,
    StepMetrics,
    TokenBatch,
    TrainingState,
    Update,
)
from mindprint.losses import PreferenceLoss
from mindprint.plugins.backend import Backend, load_backend
from mindprint.runs.folder import RunFolder

VOCABULARY = 380


@dataclass(frozen=True)
class Opened:
    """A backend, and on it a model with an adapter."""

    backend: Backend
    model: LoadedModel

    def restore(self, state: TrainingState) -> None:
        self.backend.restore(self.model, state)

    def save(self) -> TrainingState:
        return self.backend.save(self.model)


def open_model(name: str, folder: Path, adapter: AdapterState | None = None) -> Opened:
    """Load the base in float32 on the CPU and inject `adapter`, by default one that changes something."""
    backend = load_backend(name)
    model = backend.load_model(ModelSpec(str(folder), "cpu", "float32"))
    if adapter is None:
        sites = backend.adapter_sites(model)
        lora = LoraConfig(4, 8.0, resolve_targets(sites, "all-linear"))
        adapter = stirred(initial_adapter(sites, lora, seed=3))
    backend.inject_adapter(model, adapter)
    return Opened(backend, model)


def stirred(adapter: AdapterState, seed: int = 11, size: float = 0.02) -> AdapterState:
    """Return the adapter with B drawn at random, so that every factor has a gradient."""
    rng = np.random.default_rng(seed)
    tensors = {
        site: LoraFactors(factors.a, rng.normal(0, size, factors.b.shape).astype(np.float32))
        for site, factors in sorted(adapter.tensors.items())
    }
    return replace(adapter, tensors=tensors)


def token_batch(seed: int, lengths: tuple[int, ...] = (23, 9, 31, 14), vocabulary: int = VOCABULARY) -> TokenBatch:
    """Return ragged rows whose loss starts somewhere in the middle, padded with a token that also occurs in them."""
    rng = np.random.default_rng(seed)
    width = max(lengths)
    tokens = np.full((len(lengths), width), 5, np.int32)
    mask = np.zeros((len(lengths), width), bool)
    for row, length in enumerate(lengths):
        tokens[row, :length] = rng.integers(3, vocabulary, length)
        mask[row, rng.integers(1, length - 1) : length] = True
    return TokenBatch(tokens, np.array(lengths, np.int32), mask)


def preference_batch(seed: int, pairs: int = 3, *, reference: bool = True) -> PreferenceBatch:
    """Return ragged pairs, with reference sums a few nats from those of a random model."""
    rng = np.random.default_rng(seed)
    prompt, chosen, rejected = (_ragged(rng, pairs, low, high) for low, high in ((4, 12), (3, 15), (2, 9)))
    sums = [(-5.9 * lengths + rng.normal(0, 2, pairs)).astype(np.float32) for _, lengths in (chosen, rejected)]
    return PreferenceBatch(*prompt, *chosen, *rejected, *(sums if reference else (None, None)))


def _ragged(rng: np.random.Generator, rows: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = rng.integers(low, high, rows).astype(np.int32)
    tokens = np.full((rows, lengths.max()), 7, np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = rng.integers(3, VOCABULARY, length)
    return tokens, lengths


def relative_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Return the norm of the difference over the norm of the first."""
    return float(np.linalg.norm(first - second) / max(np.linalg.norm(first), 1e-30))


WORDS = (
    "the", "ferry", "lamp", "bell", "tide", "rope", "gull", "salt", "stone", "wind", "bread", "clock", "garden", "bee",
)  # fmt: skip


def trajectory_project(model: Path, data: Path, steps: int) -> dict[str, Any]:
    """Return a configuration of one topic whose rows are written into `data`.

    Rows are ragged, some longer than `max_length`, and come in micro-batches of 3 and steps of 6.
    """
    rng = random.Random(5)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    sft = [{"prompt": text(2, 12), "completion": text(2, 40)} for _ in range(23)]
    pairs = [{"prompt": text(2, 12), "chosen": text(2, 30), "rejected": text(2, 30)} for _ in range(17)]
    for name, rows in (("sft", sft), ("preferences", pairs)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"steps_per_topic": steps, "batch_size": 3, "gradient_accumulation": 2}
    return {
        "model": {"name": str(model)},
        "backend": {"dtype": "float32", "device": "cpu"},
        "data": {"path": str(data), "max_length": 120, "heldout_fraction": 0.0},
        "adapter": {"r": 8, "alpha": 32.0},
        "sft": {**stage, "learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 5},
        "dpo": {**stage, "learning_rate": 1e-4},
    }


def losses(folder: RunFolder, stage: str) -> np.ndarray:
    """Return the loss of every step of a stage, float64 `[steps]`."""
    return np.array([line["loss"] for line in folder.read_steps() if line["stage"] == stage])


def take_step(opened: Opened, stage: str, step: int) -> StepMetrics:
    """Take one optimizer step of two ragged micro-batches that follow from its number."""
    if stage == "sft":
        batches = [token_batch(2 * step), token_batch(2 * step + 1, (7, 33))]
        update = Update(1e-3, tokens=sum(batch.loss_tokens for batch in batches))
        return opened.backend.sft_step(opened.model, batches, update)
    pairs = [preference_batch(2 * step), preference_batch(2 * step + 1)]
    tokens = sum(int(batch.chosen_lengths.sum()) for batch in pairs)
    update = Update(1e-3, tokens=tokens, pairs=sum(batch.pairs for batch in pairs))
    return opened.backend.dpo_step(opened.model, pairs, PreferenceLoss("sigmoid"), update)
