"""One step, one batch, one adapter: torch and mlx compute the same (DESIGN.md, "Numerics", has the tolerances)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mindprint.contract import PreferenceBatch, StepMetrics, Update
from mindprint.losses import NUMPY, PreferenceLoss
from mindprint.training.guards import pair_log_probs
from parity_cases import Opened, open_model, preference_batch, relative_difference, token_batch

LOSSES = [
    PreferenceLoss("sigmoid"),
    PreferenceLoss("sigmoid", label_smoothing=0.1),
    PreferenceLoss("sigmoid", sft_weight=0.3),
    PreferenceLoss("hinge"),
    PreferenceLoss("ipo"),
    PreferenceLoss("robust", label_smoothing=0.2),
    PreferenceLoss("apo_zero"),
    PreferenceLoss("apo_down"),
    PreferenceLoss("sigmoid_norm"),
    PreferenceLoss("orpo", sft_weight=1.0),
    PreferenceLoss("simpo", beta=2.0),
]


@pytest.fixture(scope="module")
def both(qwen2: Path) -> Iterator[tuple[Opened, Opened]]:
    opened = open_model("torch", qwen2), open_model("mlx", qwen2)
    yield opened
    for each in opened:
        each.backend.release(each.model)


@pytest.fixture(autouse=True)
def fresh(both: tuple[Opened, Opened]) -> Iterator[None]:
    """Each test starts from the same adapter and leaves it."""
    states = [each.save() for each in both]
    yield
    for each, state in zip(both, states, strict=True):
        each.restore(state)


def test_sites_have_the_same_names_and_sizes(both: tuple[Opened, Opened]) -> None:
    torch, mlx = ({site.name: site for site in each.backend.adapter_sites(each.model)} for each in both)
    linear = {name: site for name, site in torch.items() if site.kind == "linear"}
    assert linear == {name: site for name, site in mlx.items() if site.kind == "linear"}
    assert len(linear) == 3 * 7 + 1


@pytest.mark.parametrize("adapter", [True, False])
def test_log_probs(both: tuple[Opened, Opened], adapter: bool) -> None:
    batch = token_batch(1)
    torch, mlx = (each.backend.log_probs(each.model, batch, adapter=adapter) for each in both)
    difference = np.abs(torch - mlx)[batch.loss_mask]
    assert difference.mean() < 1e-5
    assert difference.max() < 1e-4
    assert not torch[~batch.loss_mask].any() and not mlx[~batch.loss_mask].any()


def test_the_adapter_changes_the_log_probs(both: tuple[Opened, Opened]) -> None:
    batch = token_batch(1)
    for each in both:
        change = each.backend.log_probs(each.model, batch) - each.backend.log_probs(each.model, batch, adapter=False)
        assert np.abs(change).max() > 0.05


def test_sft_gradients(both: tuple[Opened, Opened]) -> None:
    batches = [token_batch(1), token_batch(2, (5, 40))]
    update = Update(1e-3, tokens=sum(batch.loss_tokens for batch in batches), max_grad_norm=None)
    torch, mlx = (each.backend.sft_step(each.model, batches, update) for each in both)
    assert torch.loss == pytest.approx(mlx.loss, abs=1e-5 * (1 + torch.loss))
    assert torch.grad_norm == pytest.approx(mlx.grad_norm, rel=1e-4)
    check_gradients(both)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.name}-{loss.label_smoothing}-{loss.sft_weight}")
def test_preference_losses_and_gradients(both: tuple[Opened, Opened], loss: PreferenceLoss) -> None:
    batches = [preference_batch(seed, reference=not loss.reference_free) for seed in (1, 2)]
    update = preference_update(batches)
    torch, mlx = (each.backend.dpo_step(each.model, batches, loss, update) for each in both)
    assert torch.loss == pytest.approx(mlx.loss, abs=1e-5 * (1 + abs(torch.loss)))
    for metrics in (torch, mlx):
        assert metrics.loss == pytest.approx(expected_loss(loss, batches, metrics, update), rel=1e-6, abs=1e-6)
    check_gradients(both)


def test_a_step_moves_both_to_the_same_place(both: tuple[Opened, Opened]) -> None:
    """Ten steps with weight decay and clipping, then every factor and moment compared."""
    batch = token_batch(4)
    update = Update(1e-3, tokens=batch.loss_tokens, max_grad_norm=0.1)
    for each in both:
        for _ in range(10):
            each.backend.sft_step(each.model, [batch], update)
    torch, mlx = (each.save() for each in both)
    assert torch.optimizer_steps == mlx.optimizer_steps == 10
    for site, factors in torch.adapter.tensors.items():
        for expected, actual in zip(factors, mlx.adapter.tensors[site], strict=True):
            assert relative_difference(expected, actual) < 1e-4


def preference_update(batches: list[PreferenceBatch]) -> Update:
    return Update(
        1e-3,
        tokens=sum(int(batch.chosen_lengths.sum()) for batch in batches),
        pairs=sum(batch.pairs for batch in batches),
        max_grad_norm=None,
    )


def expected_loss(loss: PreferenceLoss, batches: list[PreferenceBatch], metrics: StepMetrics, update: Update) -> float:
    pairs = pair_log_probs(batches, metrics)
    return float(loss.total(NUMPY, pairs, pair_count=update.pairs, chosen_token_count=update.tokens))


def check_gradients(both: tuple[Opened, Opened]) -> None:
    """AdamW's first moment after one step is 0.1 times the gradient: compare it for every adapter tensor."""
    torch, mlx = (each.save().first_moments for each in both)
    assert set(torch) == set(mlx)
    for site, factors in torch.items():
        for expected, actual in zip(factors, mlx[site], strict=True):
            assert np.linalg.norm(expected) > 0
            assert relative_difference(expected, actual) < 1e-4, site
