"""The last layer computes only the places that are asked for, and gives the numbers of computing everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_samples import linear_sites, lora, preference_batch, token_batch

from mindprint import layouts
from mindprint.asked_places import Asked, asking
from mindprint.contract import LoadedModel, StepMetrics, TokenBatch, TrainingState, Update
from mindprint.losses import PreferenceLoss
from mindprint_mlx import adapter, asked, logprobs, prompts, state, steps
from mindprint_mlx.asked import skip_unasked, worth_asking

Make = Callable[..., LoadedModel]


def ready(make: Make, family: str = "qwen2", **config: object) -> LoadedModel:
    loaded = make(family)
    adapter.inject(loaded.handle, lora(linear_sites(loaded), **config))
    return loaded


def last_tokens(rows: int = 6) -> TokenBatch:
    """Rows of which only the last two tokens count."""
    batch = token_batch(rows=rows)
    columns = np.arange(batch.tokens.shape[1])
    mask = (columns >= batch.lengths[:, None] - 2) & (columns < batch.lengths[:, None]) & (columns > 0)
    return replace(batch, loss_mask=mask)


@pytest.fixture
def rows_of_down(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each feed-forward block's last product reads."""
    seen: list[int] = []
    own = nn.Linear.__call__

    def watched(self: nn.Linear, x: mx.array) -> mx.array:
        if "down" in self:
            seen.append(x.size // x.shape[-1])
        return own(self, x)

    monkeypatch.setattr(nn.Linear, "__call__", watched)
    return seen


def marked(loaded: LoadedModel) -> LoadedModel:
    for layer in loaded.handle.module.layers:
        layer.mlp.down_proj.linear.down = mx.array(True)
    return loaded


def test_the_last_layer_reads_what_is_asked(make: Make, family: str, rows_of_down: list[int]) -> None:
    loaded, batch = marked(ready(make, family)), last_tokens()
    logprobs.log_probs(loaded.handle, batch, adapter=True)
    tokens = len(batch.lengths) * int(batch.lengths.max())
    assert rows_of_down == [tokens, int(batch.loss_mask.sum())]


def test_without_its_adapter_a_model_is_the_base_to_the_last_bit(make: Make, family: str) -> None:
    loaded, batch = make(family), last_tokens()
    before = logprobs.log_probs(loaded.handle, batch, adapter=False)
    adapter.inject(loaded.handle, lora(linear_sites(loaded)))
    np.testing.assert_array_equal(logprobs.log_probs(loaded.handle, batch, adapter=False), before)


def test_of_a_prompt_that_is_shared_the_last_layer_reads_its_last_token(make: Make, rows_of_down: list[int]) -> None:
    loaded, pairs = marked(ready(make)), preference_batch(pairs=3)
    layout = layouts.continued(layouts.preference_sequences(pairs))
    with loaded.handle.in_use():
        mx.eval(prompts.asked_states(loaded.handle.head, 2, layout, skip_unasked=True))
    prompt, completions = layout.prompts.size, layout.completions.size
    within = int(layout.completion_lengths.sum())
    assert rows_of_down == [prompt, 3, completions, within if within <= asked.WORTH * completions else completions]


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Ask for everything from now on."""
    return lambda: monkeypatch.setattr(prompts, "worth_asking", lambda *_: None)


def taken(make: Make, family: str, stage: str, checkpointing: bool) -> tuple[StepMetrics, TrainingState]:
    loaded = ready(make, family)
    update = Update(1e-3, tokens=12, pairs=5, max_grad_norm=None, gradient_checkpointing=checkpointing)
    if stage == "sft":
        metrics = steps.sft_step(loaded.handle, [last_tokens()], update)
    else:
        metrics = steps.dpo_step(loaded.handle, [preference_batch(pairs=5)], PreferenceLoss(), update)
    return metrics, state.save(loaded.handle)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_step_is_the_same(
    make: Make, family: str, stage: str, checkpointing: bool, everywhere: Callable[[], None]
) -> None:
    found = taken(make, family, stage, checkpointing)
    everywhere()
    wanted = taken(make, family, stage, checkpointing)
    assert found[0].loss == pytest.approx(wanted[0].loss, rel=2e-6)
    assert found[0].grad_norm == pytest.approx(wanted[0].grad_norm, rel=2e-5)
    for site, factors in found[1].first_moments.items():
        for mine, theirs in zip(factors, wanted[1].first_moments[site], strict=True):
            assert np.linalg.norm(mine - theirs) <= 2e-5 * np.linalg.norm(theirs), site


def test_masks_of_dropout_are_those_of_everything(make: Make, everywhere: Callable[[], None]) -> None:
    def loss() -> float:
        update = Update(1e-3, 12, seed=5)
        return steps.sft_step(ready(make, dropout=0.3).handle, [last_tokens()], update).loss

    found = loss()
    everywhere()
    assert found == loss()


def skipping(loaded: LoadedModel) -> int:
    return skip_unasked(loaded.handle.module, loaded.handle.head)


def test_block_and_attention_skip_in_every_family_here(make: Make, family: str) -> None:
    """The block itself, attention (which takes a mask, and so is computed everywhere), its queries and its output."""
    assert skipping(make(family)) == 4


def with_last_block(loaded: LoadedModel, call: Callable[[Any, Any, mx.array], mx.array]) -> LoadedModel:
    block = loaded.handle.module.layers[-1].mlp
    kind = type(block)
    block.__class__ = type("Changed", (kind,), {"__call__": lambda self, x: call(kind, self, x)})
    return loaded


def test_a_block_that_sees_other_tokens_is_computed_everywhere(make: Make) -> None:
    def shifted(kind: Any, block: Any, x: mx.array) -> mx.array:
        return kind.__call__(block, x + mx.pad(x, [(0, 0), (1, 0), (0, 0)])[:, :-1])

    loaded = with_last_block(make(), shifted)
    kind = type(loaded.handle.module.layers[-1].mlp)
    assert skipping(loaded) == 0
    assert type(loaded.handle.module.layers[-1].mlp) is kind


def test_few_or_no_places(make: Make) -> None:
    places = np.array([7, 3, 3], np.int32)
    assert worth_asking(places, 2) is None
    assert worth_asking(places[:0], 9) is None
    found = worth_asking(places, 9)
    assert found is not None
    assert found.places.tolist() == [3, 7]


def test_nothing_is_asked_for_outside_its_context(make: Make) -> None:
    with asking(Asked(np.array([0], np.int32))), pytest.raises(ValueError, match="stop"):
        raise ValueError("stop")
    assert asked.asked_now() is None
