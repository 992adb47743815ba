"""The base digest: any element, any dtype, not the adapter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mindprint.contract import AdapterState, LoadedModel, TokenBatch, Update
from mindprint.plugins.backend import Backend
from mindprint_torch import digest

Load = Callable[..., LoadedModel]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_element_changes_it(backend: Backend, load: Load, dtype: str) -> None:
    model = load("qwen2", dtype)
    before = backend.base_digest(model)
    weight = model.handle.network.model.layers[1].mlp.down_proj.weight
    value = weight[3, 5].clone()
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(value, value + 1)
    assert backend.base_digest(model) != before
    with torch.no_grad():
        weight[3, 5] = value
    assert backend.base_digest(model) == before


def test_neither_injection_nor_training_changes_it(
    backend: Backend,
    load: Load,
    make_adapter: Callable[..., AdapterState],
    token_batch: Callable[..., TokenBatch],
) -> None:
    model, batch = load("qwen2"), token_batch()
    before = backend.base_digest(model)
    backend.inject_adapter(model, make_adapter(model))
    backend.sft_step(model, [batch], Update(1e-1, batch.loss_tokens))
    assert backend.base_digest(model) == before


def test_it_is_the_same_for_the_same_folder(backend: Backend, load: Load) -> None:
    assert backend.base_digest(load("llama")) == backend.base_digest(load("llama"))
    assert backend.base_digest(load("llama")) != backend.base_digest(load("qwen2"))


def test_every_position_counts_across_chunks_and_in_the_last_incomplete_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "WORDS_AT_ONCE", 4)
    weight = torch.arange(45, dtype=torch.bfloat16)
    seen = {digest.weights_digest({"w": weight})}
    for position in range(45):
        changed = weight.clone()
        changed[position] += 1
        seen.add(digest.weights_digest({"w": changed}))
    swapped = weight.clone()
    swapped[[0, 40]] = swapped[[40, 0]]
    seen.add(digest.weights_digest({"w": swapped}))
    assert len(seen) == 47


def test_chunking_does_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"w": torch.arange(1000, dtype=torch.float32).view(10, 100).T, "v": torch.arange(7)}
    whole = digest.weights_digest(weights)
    monkeypatch.setattr(digest, "WORDS_AT_ONCE", 3)
    assert digest.weights_digest(weights) == whole


def test_parts_add_up_to_the_whole_wherever_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks hold parts that start within a 64-bit word: 45 values of 2 bytes, divided at every place."""
    monkeypatch.setattr(digest, "WORDS_AT_ONCE", 4)
    weight = torch.arange(1, 46, dtype=torch.bfloat16)
    factors = torch.arange(1, 2 * 12, 2)
    whole = digest.part_checksum(weight, 0, factors)
    for place in range(46):
        parts = (weight[:place], 0), (weight[place:], 2 * place)
        assert sum(digest.part_checksum(part, first, factors) for part, first in parts) == whole
