"""Steps against straightforward autograd, core's NumPy losses, and themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from mindprint.contract import (
    AdapterState,
    Float32,
    LoadedModel,
    LoraFactors,
    PreferenceBatch,
    StepMetrics,
    TokenBatch,
    TrainingState,
    Update,
)
from mindprint.losses import NUMPY, PairLogProbs, PreferenceLoss, PreferenceLossName, sft_loss
from mindprint.plugins.backend import Backend

Load = Callable[..., LoadedModel]
MakeBatch = Callable[..., TokenBatch]
MakePairs = Callable[..., PreferenceBatch]
LOSSES: tuple[PreferenceLossName, ...] = (
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "apo_zero",
    "apo_down",
    "sigmoid_norm",
    "orpo",
    "simpo",
)


def gradients(backend: Backend, model: LoadedModel, step: Callable[[Update], StepMetrics]) -> dict[str, LoraFactors]:
    """The gradients of one step: the first moment after it is (1 - beta1) times them."""
    step(Update(0.0, 1, 1, max_grad_norm=None))
    moments = backend.save(model).first_moments
    return {name: LoraFactors(factors.a * 10, factors.b * 10) for name, factors in moments.items()}


def as_rows(batch: PreferenceBatch) -> TokenBatch:
    """Every prompt with its chosen, then every prompt with its rejected answer, written out token by token."""
    rows = []
    for completions, lengths in ((batch.chosen, batch.chosen_lengths), (batch.rejected, batch.rejected_lengths)):
        for pair in range(batch.pairs):
            prompt = list(batch.prompt[pair, : batch.prompt_lengths[pair]])
            rows.append((prompt, list(completions[pair, : lengths[pair]])))
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for row, (prompt, completion) in enumerate(rows):
        tokens[row, : len(prompt) + len(completion)] = prompt + completion
        mask[row, len(prompt) : len(prompt) + len(completion)] = True
    lengths = np.array([len(prompt) + len(completion) for prompt, completion in rows], np.int32)
    return TokenBatch(tokens, lengths, mask)


def pairs_of(batch: PreferenceBatch, chosen: Any, rejected: Any) -> PairLogProbs:
    values = (chosen, rejected, batch.reference_chosen, batch.reference_rejected)
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = (np.asarray(v, np.float64) for v in values)
    return PairLogProbs(
        policy_chosen,
        policy_rejected,
        reference_chosen,
        reference_rejected,
        batch.chosen_lengths,
        batch.rejected_lengths,
    )


def sums_of(metrics: StepMetrics) -> tuple[Float32, Float32]:
    assert metrics.chosen_log_probs is not None
    assert metrics.rejected_log_probs is not None
    return metrics.chosen_log_probs, metrics.rejected_log_probs


def moved(state: TrainingState, direction: dict[str, LoraFactors], by: float) -> TrainingState:
    tensors = {
        name: LoraFactors(
            *(values + np.float32(by) * step for values, step in zip(factors, direction[name], strict=True))
        )
        for name, factors in state.adapter.tensors.items()
    }
    return TrainingState(replace(state.adapter, tensors=tensors))


def dot(one: dict[str, LoraFactors], other: dict[str, LoraFactors]) -> float:
    return sum(
        float((a.astype(np.float64) * b).sum()) for name in one for a, b in zip(one[name], other[name], strict=True)
    )


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "cohere"])
def test_sft_loss_and_gradients_equal_full_logits(
    backend: Backend, train: Load, token_batch: MakeBatch, architecture: str
) -> None:
    """The same adapted network, through all its logits, an explicit attention mask and torch's own cross-entropy."""
    model, batch = train(architecture), token_batch()
    network = model.handle.network
    tokens = torch.from_numpy(batch.tokens).long()
    attended = torch.arange(tokens.shape[1]) < torch.from_numpy(batch.lengths)[:, None]
    logits = network(input_ids=tokens, attention_mask=attended.long()).logits[:, :-1].float()
    labels = tokens.masked_fill(~torch.from_numpy(batch.loss_mask), -100)[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)
    parameters = model.handle.adapter.parameters
    expected = torch.autograd.grad(loss, parameters)
    metrics = backend.sft_step(model, [batch], Update(0.0, batch.loss_tokens, max_grad_norm=None))
    assert metrics.loss == pytest.approx(loss.item(), abs=1e-6)
    norm = torch.cat([gradient.flatten() for gradient in expected]).norm().item()
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-5)
    found = backend.save(model).first_moments
    for name, layer in model.handle.adapter.layers.items():
        for parameter, moment in zip(layer.factors, found[name], strict=True):
            reference = next(g for p, g in zip(parameters, expected, strict=True) if p is parameter)
            np.testing.assert_allclose(moment * 10, reference.numpy(), rtol=1e-4, atol=1e-6 * norm)


def test_eight_micro_batches_are_one_batch_of_eight(backend: Backend, train: Load, token_batch: MakeBatch) -> None:
    batch = token_batch(rows=8)
    singles = [
        TokenBatch(
            batch.tokens[row : row + 1, :length], batch.lengths[row : row + 1], batch.loss_mask[row : row + 1, :length]
        )
        for row, length in enumerate(batch.lengths)
    ]
    whole, parts = train("qwen2"), train("qwen2")
    for _ in range(5):
        one = backend.sft_step(whole, [batch], Update(1e-3, batch.loss_tokens))
        eight = backend.sft_step(parts, singles, Update(1e-3, batch.loss_tokens))
        assert eight.loss == pytest.approx(one.loss, abs=1e-5)
        assert eight.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    np.testing.assert_allclose(backend.log_probs(parts, batch), backend.log_probs(whole, batch), atol=1e-4)


def test_padding_changes_no_gradient(backend: Backend, train: Load, token_batch: MakeBatch) -> None:
    batch = token_batch()
    tokens = np.pad(batch.tokens, ((0, 0), (0, 5)), constant_values=9)
    tokens[np.arange(tokens.shape[1]) >= batch.lengths[:, None]] = 9
    padded = TokenBatch(tokens, batch.lengths, np.pad(batch.loss_mask, ((0, 0), (0, 5))))
    one, other = train("qwen2"), train("qwen2")
    first = backend.sft_step(one, [batch], Update(1e-2, batch.loss_tokens))
    assert backend.sft_step(other, [padded], Update(1e-2, batch.loss_tokens)) == first
    np.testing.assert_array_equal(backend.log_probs(one, batch), backend.log_probs(other, batch))


def test_prompt_tokens_get_no_loss(backend: Backend, train: Load, token_batch: MakeBatch) -> None:
    """Tokens outside the mask are context: as targets they have no effect, so with nothing asked nothing moves."""
    model, batch = train("qwen2"), token_batch()
    nothing = TokenBatch(batch.tokens, batch.lengths, np.zeros_like(batch.loss_mask))
    before = backend.log_probs(model, batch)
    metrics = backend.sft_step(model, [nothing], Update(1e-2, 0))
    assert (metrics.loss, metrics.grad_norm, metrics.skipped) == (0.0, 0.0, False)
    np.testing.assert_array_equal(backend.log_probs(model, batch), before)


def test_training_lowers_the_loss_and_leaves_the_base(backend: Backend, train: Load, token_batch: MakeBatch) -> None:
    model, batch = train("qwen2"), token_batch()
    digest = backend.base_digest(model)
    losses = [backend.sft_step(model, [batch], Update(1e-2, batch.loss_tokens)).loss for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert backend.base_digest(model) == digest


@pytest.mark.parametrize("name", LOSSES)
def test_preference_loss_is_cores_definition(
    backend: Backend, train: Load, preference_batch: MakePairs, name: PreferenceLossName
) -> None:
    """Policy sums from the log-probs hook over rows written out here, the loss from core in NumPy float64."""
    model, batch = train("qwen2"), preference_batch()
    loss = PreferenceLoss(name, beta=0.1 if name != "simpo" else 2.0, label_smoothing=0.1, sft_weight=0.5)
    sums = backend.log_probs(model, as_rows(batch)).astype(np.float64).sum(axis=1)
    tokens = int(batch.chosen_lengths.sum())
    expected = loss.total(NUMPY, pairs_of(batch, sums[:3], sums[3:]), pair_count=batch.pairs, chosen_token_count=tokens)
    metrics = backend.dpo_step(model, [batch], loss, Update(1e-3, tokens, batch.pairs))
    assert metrics.loss == pytest.approx(expected, abs=2e-6, rel=2e-6)
    np.testing.assert_allclose(sums_of(metrics), (sums[:3], sums[3:]), atol=1e-5)


def test_preference_gradient_by_finite_differences(backend: Backend, train: Load, preference_batch: MakePairs) -> None:
    model, batch, loss = train("llama"), preference_batch(), PreferenceLoss("sigmoid", beta=0.5, sft_weight=0.3)
    state, tokens = backend.save(model), int(batch.chosen_lengths.sum())
    gradient = gradients(
        backend,
        model,
        lambda update: backend.dpo_step(model, [batch], loss, replace(update, tokens=tokens, pairs=batch.pairs)),
    )

    def loss_at(by: float) -> float:
        backend.restore(model, moved(state, gradient, by))
        sums = backend.log_probs(model, as_rows(batch)).astype(np.float64).sum(axis=1)
        pairs = pairs_of(batch, sums[:3], sums[3:])
        return float(loss.total(NUMPY, pairs, pair_count=batch.pairs, chosen_token_count=tokens))

    squared = dot(gradient, gradient)
    step = 1e-2 / np.sqrt(squared)
    assert (loss_at(step) - loss_at(-step)) / (2 * step) == pytest.approx(squared, rel=5e-3)


def test_preference_step_turns_towards_the_chosen(backend: Backend, train: Load, preference_batch: MakePairs) -> None:
    """From the reference itself: the first loss is ln 2, and the margin grows. A turned sign would fail here."""
    model, batch = train("qwen2"), preference_batch()
    sums = backend.log_probs(model, as_rows(batch)).sum(axis=1)
    batch = replace(batch, reference_chosen=sums[:3], reference_rejected=sums[3:])
    loss, update = PreferenceLoss(), Update(5e-3, 1, batch.pairs)
    margins = []
    for step in range(10):
        metrics = backend.dpo_step(model, [batch], loss, update)
        chosen, rejected = sums_of(metrics)
        margins.append(chosen - rejected - (sums[:3] - sums[3:]))
        if step == 0:
            assert metrics.loss == pytest.approx(np.log(2), abs=1e-6)
    assert np.abs(margins[0]).max() < 1e-4
    assert margins[-1].min() > 1.0


def test_preference_micro_batches_are_one_batch(backend: Backend, train: Load, preference_batch: MakePairs) -> None:
    batch, loss = preference_batch(pairs=4), PreferenceLoss(sft_weight=0.2)
    parts = [
        PreferenceBatch(*(getattr(batch, name)[pair : pair + 1] for name in PreferenceBatch.__dataclass_fields__))
        for pair in range(4)
    ]
    update = Update(1e-3, int(batch.chosen_lengths.sum()), 4)
    whole, split = train("qwen2"), train("qwen2")
    one, four = backend.dpo_step(whole, [batch], loss, update), backend.dpo_step(split, parts, loss, update)
    assert four.loss == pytest.approx(one.loss, abs=1e-6)
    assert four.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    np.testing.assert_allclose(sums_of(four), sums_of(one), atol=1e-5)


def test_dropout_is_keyed_by_seed_and_micro_batch(backend: Backend, train: Load, token_batch: MakeBatch) -> None:
    batch = token_batch()
    double = Update(0.0, 2 * batch.loss_tokens, seed=11)

    def losses(*batches: TokenBatch, seed: int = 11) -> float:
        return backend.sft_step(train("qwen2", dropout=0.5), batches, replace(double, seed=seed)).loss

    first = losses(batch, batch)
    torch.manual_seed(99)
    assert losses(batch, batch) == first
    assert losses(batch, batch, seed=12) != first
    assert losses(batch, batch) != pytest.approx(2 * losses(batch), abs=1e-6)


def test_dropout_leaves_the_random_numbers_alone(backend: Backend, train: Load, token_batch: MakeBatch) -> None:
    model, batch = train("qwen2", dropout=0.5), token_batch()
    before = torch.get_rng_state()
    backend.sft_step(model, [batch], Update(1e-3, batch.loss_tokens))
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_off_outside_sft(
    backend: Backend, train: Load, token_batch: MakeBatch, preference_batch: MakePairs
) -> None:
    with_dropout, without = train("qwen2", dropout=0.5), train("qwen2")
    batch, pairs = token_batch(), preference_batch()
    np.testing.assert_array_equal(backend.log_probs(with_dropout, batch), backend.log_probs(without, batch))
    update = Update(1e-3, 1, pairs.pairs)
    one = backend.dpo_step(with_dropout, [pairs], PreferenceLoss(), update)
    assert one.loss == backend.dpo_step(without, [pairs], PreferenceLoss(), update).loss


def test_dropout_scales_what_it_keeps(backend: Backend, train: Load, token_batch: MakeBatch) -> None:
    """The mean over many masks comes near the loss without dropout; one mask does not."""
    model, batch = train("qwen2", dropout=0.2), token_batch()
    plain = sft_loss(backend.log_probs(model, batch).astype(np.float64), batch.loss_mask)
    losses = [backend.sft_step(model, [batch], Update(0.0, batch.loss_tokens, seed=seed)).loss for seed in range(60)]
    assert np.std(losses) > 0.01
    assert np.mean(losses) == pytest.approx(plain, abs=5 * np.std(losses) / np.sqrt(60) + 0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_trains_near_float32(
    backend: Backend, train: Load, token_batch: MakeBatch, dtype: str
) -> None:
    batch = token_batch()
    exact, reduced = train("llama"), train("llama", dtype)
    for _ in range(10):
        expected = backend.sft_step(exact, [batch], Update(5e-3, batch.loss_tokens))
        metrics = backend.sft_step(reduced, [batch], Update(5e-3, batch.loss_tokens))
        assert not metrics.skipped
        assert metrics.loss == pytest.approx(expected.loss, abs=0.1)
    assert metrics.loss_scale == (2.0**16 if dtype == "float16" else None)
    assert metrics.grad_norm == pytest.approx(expected.grad_norm, rel=0.2)


def test_float16_overflow_is_skipped_and_seen(backend: Backend, train: Load, token_batch: MakeBatch) -> None:
    model, batch = train("llama", "float16"), token_batch()
    state = replace(backend.save(model), loss_scale=2.0**30)
    backend.restore(model, state)
    metrics = backend.sft_step(model, [batch], Update(1e-2, batch.loss_tokens))
    assert metrics.skipped
    assert metrics.loss_scale == 2.0**30
    after = backend.save(model)
    assert (after.optimizer_steps, after.loss_scale, after.first_moments) == (0, 2.0**29, {})
    for name, factors in state.adapter.tensors.items():
        np.testing.assert_array_equal(after.adapter.tensors[name].b, factors.b)
    while (metrics := backend.sft_step(model, [batch], Update(1e-2, batch.loss_tokens))).skipped:
        pass
    assert np.isfinite(metrics.grad_norm)
    assert backend.save(model).optimizer_steps == 1


def test_a_step_in_trl_terms(
    backend: Backend, train: Load, token_batch: MakeBatch, folders: Callable[[str], Path]
) -> None:
    """Ten steps of a plain training loop: transformers' own loss, torch's AdamW and clipping, PEFT's own layers."""
    model, batch = train("qwen2"), token_batch()
    adapter: AdapterState = backend.save(model).adapter
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(adapter.config.target_modules))
    network = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folders("qwen2")), config)
    peft.set_peft_model_state_dict(
        network,
        {
            f"base_model.model.{name}.lora_{letter}.weight": torch.from_numpy(values)
            for name, factors in adapter.tensors.items()
            for letter, values in zip("AB", factors, strict=True)
        },
    )
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    tokens = torch.from_numpy(batch.tokens).long()
    labels = tokens.masked_fill(~torch.from_numpy(batch.loss_mask), -100)
    attended = (torch.arange(tokens.shape[1]) < torch.from_numpy(batch.lengths)[:, None]).long()
    for _ in range(10):
        metrics = backend.sft_step(model, [batch], Update(1e-2, batch.loss_tokens))
        loss = network(input_ids=tokens, attention_mask=attended, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert metrics.loss == pytest.approx(loss.item(), abs=1e-5 * (1 + loss.item()))
        assert metrics.grad_norm == pytest.approx(norm.item(), rel=1e-3)


class _Order(TorchDispatchMode):
    """Records the update, and the operations that read a number from the device, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.overloadpacket.__name__) in ("_local_scalar_dense", "_fused_adamw_", "nonzero"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("stage", "reads_in_passes"), [("sft", 2), ("dpo", 0)])
def test_numbers_are_read_after_the_update(
    backend: Backend,
    train: Load,
    token_batch: MakeBatch,
    preference_batch: MakePairs,
    stage: str,
    reads_in_passes: int,
) -> None:
    """To read a number waits for the device: norm and loss, when everything else is queued.

    transformers reads one more in each forward pass without a mask, where it looks for packed rows.
    """
    model, order = train(), _Order()
    # Measured once for a model, when the first pairs are read: those of the reference, before the first step.
    assert model.handle.longest_shared
    with order:
        if stage == "sft":
            backend.sft_step(model, [token_batch(), token_batch()], Update(1e-3, 30))
        else:
            backend.dpo_step(model, [preference_batch()], PreferenceLoss(), Update(1e-3, 30, 3))
    reads = ["_local_scalar_dense"]
    assert order.names == [*reads * reads_in_passes, "_fused_adamw_", *reads * 2]
