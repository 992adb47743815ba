"""Steps: losses, gradients, accumulation, state, resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_samples import linear_sites, lora, preference_batch, rows_of, token_batch

from mindprint.contract import (
    LoadedModel,
    PreferenceBatch,
    TokenBatch,
    Update,
)
from mindprint.errors import AdapterError
from mindprint.losses import NUMPY, PairLogProbs, PreferenceLoss, sft_loss
from mindprint_mlx import adapter, logprobs, state, steps

LOSSES = [
    PreferenceLoss("sigmoid"),
    PreferenceLoss("sigmoid", label_smoothing=0.1, sft_weight=0.3),
    PreferenceLoss("hinge"),
    PreferenceLoss("ipo"),
    PreferenceLoss("robust", label_smoothing=0.2),
    PreferenceLoss("apo_zero"),
    PreferenceLoss("apo_down"),
    PreferenceLoss("sigmoid_norm", beta=2.0),
    PreferenceLoss("orpo", beta=0.2, sft_weight=1.0),
    PreferenceLoss("simpo", beta=2.0),
]


Make = Callable[..., LoadedModel]
Take = Callable[[LoadedModel, Update], object]


def ready(make: Make, family: str = "qwen2", dtype: str = "float32", **config: object) -> LoadedModel:
    """A loaded model with an adapter."""
    loaded = make(family, dtype)
    adapter.inject(loaded.handle, lora(linear_sites(loaded), **config))
    return loaded


def sft_update(*batches: TokenBatch, **changes: object) -> Update:
    return Update(learning_rate=1e-2, tokens=sum(batch.loss_tokens for batch in batches), **changes)


def dpo_update(*batches: PreferenceBatch, **changes: object) -> Update:
    tokens = sum(int(batch.chosen_lengths.sum()) for batch in batches)
    return Update(learning_rate=1e-2, tokens=tokens, pairs=sum(batch.pairs for batch in batches), **changes)


def factors(loaded: LoadedModel) -> dict[str, np.ndarray]:
    tensors = state.save(loaded.handle).adapter.tensors
    return {f"{name}.{letter}": getattr(pair, letter) for name, pair in tensors.items() for letter in "ab"}


def gradients(loaded: LoadedModel, take: Take, update: Update) -> dict[str, np.ndarray]:
    """The gradient that a step takes: AdamW's first moment after one step is (1 - beta1) times it."""
    take(loaded, replace(update, max_grad_norm=None))
    moments = state.save(loaded.handle).first_moments
    return {f"{name}.{letter}": getattr(pair, letter) / 0.1 for name, pair in moments.items() for letter in "ab"}


def sft(*batches: TokenBatch) -> Take:
    return lambda loaded, update: steps.sft_step(loaded.handle, batches, update)


def split(batch: PreferenceBatch) -> list[PreferenceBatch]:
    """Each pair as a micro-batch of its own."""
    fields = vars(batch)
    return [
        PreferenceBatch(**{name: None if values is None else values[row : row + 1] for name, values in fields.items()})
        for row in range(batch.pairs)
    ]


def sums(loaded: LoadedModel, batch: PreferenceBatch) -> tuple[np.ndarray, np.ndarray]:
    """Summed log-probs of chosen and rejected, by `log_probs` on rows that this test lays out itself."""
    prompts = [row[:length] for row, length in zip(batch.prompt, batch.prompt_lengths, strict=True)]

    def of(answers: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        rows = zip(prompts, answers, lengths, strict=True)
        return np.array([_sum(loaded, prompt, answer[:length]) for prompt, answer, length in rows])

    return of(batch.chosen, batch.chosen_lengths), of(batch.rejected, batch.rejected_lengths)


def _sum(loaded: LoadedModel, prompt: np.ndarray, answer: np.ndarray) -> float:
    tokens = np.concatenate([prompt, answer])[None].astype(np.int32)
    mask = np.arange(tokens.shape[1])[None] >= len(prompt)
    batch = TokenBatch(tokens, np.array([tokens.shape[1]], np.int32), mask)
    return float(logprobs.log_probs(loaded.handle, batch, adapter=True).astype(np.float64).sum())


def relative(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    difference = np.sqrt(sum(((found[name] - wanted[name]) ** 2).sum() for name in wanted))
    return float(difference / np.sqrt(sum((values**2).sum() for values in wanted.values())))


class TestSft:
    def test_the_loss_is_the_mean_over_completion_tokens(self, make: Make, family: str) -> None:
        loaded, batch = ready(make, family), token_batch()
        expected = sft_loss(logprobs.log_probs(loaded.handle, batch, adapter=True), batch.loss_mask)
        assert steps.sft_step(loaded.handle, [batch], sft_update(batch)).loss == pytest.approx(expected, rel=1e-6)

    def test_the_gradient_is_that_of_the_plain_loss_over_full_logits(self, make: Make, family: str) -> None:
        loaded, batch = ready(make, family), token_batch()
        module, adapted = loaded.handle.module, loaded.handle.adapter

        def plain(values: dict[str, mx.array]) -> mx.array:
            adapter.assign(adapted, values)
            logits = module(mx.array(batch.tokens[:, :-1])).astype(mx.float32)
            scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            targets = mx.array(batch.tokens[:, 1:])
            taken = mx.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
            return -mx.sum(taken * mx.array(batch.loss_mask[:, 1:])) / batch.loss_tokens

        expected = {name: np.array(values).T for name, values in mx.grad(plain)(adapted.factors).items()}
        adapter.assign(adapted, adapted.factors)
        found = gradients(loaded, sft(batch), sft_update(batch))
        assert relative(found, expected) < 1e-5

    def test_eight_rows_at_once_and_eight_times_one(self, make: Make, family: str) -> None:
        batch = token_batch(rows=8)
        update = sft_update(batch)
        one, many = ready(make, family), ready(make, family)
        together = steps.sft_step(one.handle, [batch], update)
        apart = steps.sft_step(many.handle, rows_of(batch), update)
        assert apart.loss == pytest.approx(together.loss, rel=1e-6)
        assert apart.grad_norm == pytest.approx(together.grad_norm, rel=1e-5)
        first = [state.save(loaded.handle).first_moments for loaded in (one, many)]
        for name in first[0]:
            for left, right in zip(first[0][name], first[1][name], strict=True):
                np.testing.assert_allclose(left, right, rtol=0, atol=1e-7)

    def test_order_of_rows_and_padding_change_nothing(self, make: Make) -> None:
        batch = token_batch()
        order = np.array([2, 0, 3, 1])
        wide = np.pad(batch.tokens, ((0, 0), (0, 5)), constant_values=3), np.pad(batch.loss_mask, ((0, 0), (0, 5)))
        other = TokenBatch(wide[0][order], batch.lengths[order], wide[1][order])
        found = [gradients(ready(make), sft(either), sft_update(either)) for either in (batch, other)]
        assert relative(found[1], found[0]) < 1e-6

    def test_an_all_masked_row_and_batch_add_nothing(self, make: Make) -> None:
        batch = token_batch()
        empty = replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
        with_empty, without = ready(make), ready(make)
        metrics = [
            steps.sft_step(with_empty.handle, [batch, empty], sft_update(batch)),
            steps.sft_step(without.handle, [batch], sft_update(batch)),
        ]
        assert metrics[0] == metrics[1]
        for name, values in factors(without).items():
            np.testing.assert_array_equal(factors(with_empty)[name], values)

    def test_a_step_without_any_loss_token_is_no_nan(self, make: Make) -> None:
        loaded, batch = ready(make), token_batch()
        empty = replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
        before = factors(loaded)
        metrics = steps.sft_step(loaded.handle, [empty], sft_update(empty))
        assert (metrics.loss, metrics.grad_norm) == (0.0, 0.0)
        for name, values in factors(loaded).items():
            np.testing.assert_array_equal(values, before[name])

    def test_chunks_of_the_head_have_the_same_gradient(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also of an adapter in the head itself, whose gradient goes through every chunk."""
        batch = token_batch()
        found = []
        for limit in (logprobs.LOGITS_BYTES, 4 * 61 * 7):
            monkeypatch.setattr(logprobs, "LOGITS_BYTES", limit)
            loaded = make("llama")
            adapter.inject(loaded.handle, lora(loaded.handle.sites))
            found.append(gradients(loaded, sft(batch), sft_update(batch)))
        assert np.abs(found[0]["lm_head.a"]).max() > 1e-4
        assert relative(found[1], found[0]) < 1e-6


class TestDropout:
    def test_it_is_a_function_of_seed_and_micro_batch(self, make: Make) -> None:
        batch = token_batch()

        def loss(seed: int, batches: Sequence[TokenBatch] = (batch,)) -> float:
            loaded = ready(make, dropout=0.3)
            return steps.sft_step(loaded.handle, batches, sft_update(*batches, seed=seed)).loss

        assert loss(1) == loss(1)
        assert loss(1) != loss(2)
        halves = [loss(1, [batch]), loss(1, [batch, batch])]
        assert halves[0] != halves[1], "the second micro-batch has masks of its own"

    def test_mlx_own_generator_plays_no_part(self, make: Make) -> None:
        batch, found = token_batch(), []
        for seed in (0, 1):
            mx.random.seed(seed)
            expected = mx.random.uniform().item()
            loaded = ready(make, dropout=0.3)
            mx.random.seed(seed)
            found.append(steps.sft_step(loaded.handle, [batch], sft_update(batch)).loss)
            assert mx.random.uniform().item() == expected
        assert found[0] == found[1]

    def test_its_masks_keep_the_stated_share_and_the_mean(self) -> None:
        layer = adapter.KeyedDropout(0.25)
        layer.use(mx.random.key(3))
        out = np.array(layer(mx.ones((200, 200))))
        assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
        assert (out > 0).mean() == pytest.approx(0.75, abs=0.01)


class TestPreference:
    @pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.name}-{loss.sft_weight}")
    def test_loss_and_sums_are_those_of_the_reference(self, make: Make, loss: PreferenceLoss) -> None:
        loaded, batch = ready(make), preference_batch(reference=not loss.reference_free)
        chosen, rejected = sums(loaded, batch)
        pairs = PairLogProbs(
            chosen,
            rejected,
            batch.reference_chosen,
            batch.reference_rejected,
            batch.chosen_lengths,
            batch.rejected_lengths,
        )
        update = dpo_update(batch)
        expected = loss.total(NUMPY, pairs, pair_count=update.pairs, chosen_token_count=update.tokens)
        metrics = steps.dpo_step(loaded.handle, [batch], loss, update)
        assert metrics.loss == pytest.approx(float(expected), rel=1e-5)
        np.testing.assert_allclose(metrics.chosen_log_probs, chosen, rtol=0, atol=2e-5)
        np.testing.assert_allclose(metrics.rejected_log_probs, rejected, rtol=0, atol=2e-5)
        assert metrics.chosen_log_probs.dtype == np.float32

    @pytest.mark.parametrize("loss", LOSSES[:2], ids=lambda loss: f"{loss.name}-{loss.sft_weight}")
    def test_micro_batches_of_one_pair(self, make: Make, family: str, loss: PreferenceLoss) -> None:
        batch = preference_batch(pairs=4)
        update = dpo_update(batch)
        one, many = ready(make, family), ready(make, family)
        together = steps.dpo_step(one.handle, [batch], loss, update)
        apart = steps.dpo_step(many.handle, split(batch), loss, update)
        assert apart.loss == pytest.approx(together.loss, rel=1e-6)
        assert apart.grad_norm == pytest.approx(together.grad_norm, rel=1e-5)
        np.testing.assert_allclose(apart.chosen_log_probs, together.chosen_log_probs, rtol=0, atol=2e-5)


class TestState:
    def test_saving_and_restoring_is_exact(self, make: Make) -> None:
        loaded, batch = ready(make), token_batch()
        for _ in range(3):
            steps.sft_step(loaded.handle, [batch], sft_update(batch))
        saved = state.save(loaded.handle)
        other = ready(make, seed=8)
        state.restore(other.handle, saved)
        again = state.save(other.handle)
        assert (again.optimizer_steps, again.loss_scale, again.adapter.config) == (3, None, saved.adapter.config)
        for name in saved.adapter.tensors:
            for kind in (lambda s: s.adapter.tensors, lambda s: s.first_moments, lambda s: s.second_moments):
                for left, right in zip(kind(saved)[name], kind(again)[name], strict=True):
                    np.testing.assert_array_equal(left, right)
                    assert left.dtype == np.float32
                    assert left.flags.c_contiguous

    def test_shapes_are_those_of_peft(self, make: Make) -> None:
        loaded, batch = ready(make), token_batch()
        steps.sft_step(loaded.handle, [batch], sft_update(batch))
        saved = state.save(loaded.handle)
        for tensors in (saved.adapter.tensors, saved.first_moments, saved.second_moments):
            a, b = tensors["model.layers.0.mlp.down_proj"]
            assert (a.shape, b.shape) == ((4, 48), (32, 4))

    @pytest.mark.parametrize("stop", range(1, 6))
    def test_resume_after_any_step_goes_on_bit_for_bit(self, make: Make, stop: int) -> None:
        batch, pairs = token_batch(), preference_batch()

        def run(loaded: LoadedModel, first: int, last: int) -> list[float]:
            return [
                steps.sft_step(loaded.handle, [batch], sft_update(batch, seed=step)).loss
                if step % 2
                else steps.dpo_step(loaded.handle, [pairs], PreferenceLoss(), dpo_update(pairs)).loss
                for step in range(first, last)
            ]

        whole, before, after = ready(make, dropout=0.1), ready(make, dropout=0.1), ready(make, dropout=0.1)
        expected = run(whole, 0, 6)
        found = run(before, 0, stop)
        state.restore(after.handle, state.save(before.handle))
        assert found + run(after, stop, 6) == expected
        for name, values in factors(whole).items():
            np.testing.assert_array_equal(factors(after)[name], values)

    def test_what_was_saved_does_not_change_afterwards(self, make: Make) -> None:
        loaded, batch = ready(make), token_batch()
        saved = state.save(loaded.handle)
        copy = {name: factors_.a.copy() for name, factors_ in saved.adapter.tensors.items()}
        steps.sft_step(loaded.handle, [batch], sft_update(batch))
        for name, values in copy.items():
            np.testing.assert_array_equal(saved.adapter.tensors[name].a, values)

    def test_a_state_without_moments_starts_the_optimizer_anew(self, make: Make) -> None:
        loaded, batch = ready(make), token_batch()
        steps.sft_step(loaded.handle, [batch], sft_update(batch))
        saved = state.save(loaded.handle)
        state.restore(loaded.handle, saved.without_optimizer())
        again = state.save(loaded.handle)
        assert (again.optimizer_steps, again.first_moments) == (0, {})
        np.testing.assert_array_equal(
            factors(loaded)["model.layers.0.mlp.up_proj.a"], saved.adapter.tensors["model.layers.0.mlp.up_proj"].a
        )

    def test_another_configuration_is_refused(self, make: Make) -> None:
        loaded = ready(make)
        other = ready(make, r=2)
        with pytest.raises(AdapterError, match="another configuration"):
            state.restore(loaded.handle, state.save(other.handle))

    def test_the_same_run_twice(self, make: Make) -> None:
        batch = token_batch()
        runs = [
            [steps.sft_step(loaded.handle, [batch], sft_update(batch)).loss for _ in range(4)]
            for loaded in (ready(make), ready(make))
        ]
        assert runs[0] == runs[1]


class TestFloat16:
    def test_an_overflow_is_skipped_visibly_and_halves_the_scale(self, make: Make) -> None:
        loaded, batch = ready(make, dtype="float16"), token_batch()
        start = factors(loaded)
        loaded.handle.loss_scale = 2.0**40
        metrics = steps.sft_step(loaded.handle, [batch], sft_update(batch))
        assert (metrics.skipped, metrics.loss_scale, np.isfinite(metrics.loss)) == (True, 2.0**40, True)
        saved = state.save(loaded.handle)
        assert (saved.loss_scale, saved.optimizer_steps) == (2.0**39, 0)
        for name, values in factors(loaded).items():
            np.testing.assert_array_equal(values, start[name])

    def test_a_step_is_near_that_in_float32(self, make: Make) -> None:
        batch = token_batch()
        exact = steps.sft_step(ready(make).handle, [batch], sft_update(batch))
        scaled = steps.sft_step(ready(make, dtype="float16").handle, [batch], sft_update(batch))
        assert (scaled.skipped, scaled.loss_scale) == (False, 2.0**16)
        assert scaled.loss == pytest.approx(exact.loss, rel=1e-3)
        assert scaled.grad_norm == pytest.approx(exact.grad_norm, rel=1e-2)

    def test_the_scale_is_restored(self, make: Make) -> None:
        loaded = ready(make, dtype="float16")
        saved = replace(state.save(loaded.handle), loss_scale=2.0**11)
        state.restore(loaded.handle, saved)
        assert loaded.handle.loss_scale == 2.0**11

    def test_bfloat16_trains_without_a_scale(self, make: Make) -> None:
        batch = token_batch()
        exact = steps.sft_step(ready(make).handle, [batch], sft_update(batch))
        found = steps.sft_step(ready(make, dtype="bfloat16").handle, [batch], sft_update(batch))
        assert found.loss_scale is None
        assert found.loss == pytest.approx(exact.loss, rel=1e-2)
