"""Each guard, tripped by what it is there for and silent otherwise."""

import math

import numpy as np
import pytest

from mindprint.contract import AdapterFacts, AdapterState, LoraConfig, LoraFactors, PreferenceBatch, StepMetrics, Update
from mindprint.errors import GuardError
from mindprint.losses import PreferenceLoss
from mindprint.models.engine import check_base, check_injection
from mindprint.training import guards

ZERO = LoraFactors(np.ones((2, 3), np.float32), np.zeros((4, 2), np.float32))
ADAPTER = AdapterState(LoraConfig(2, 4.0, ("m.q",)), {"m.q": ZERO})


def pairs(reference: float = -20.0) -> PreferenceBatch:
    ids, lengths = np.ones((2, 5), np.int32), np.array([5, 5], np.int32)
    sums = np.full(2, reference, np.float32)
    return PreferenceBatch(ids, lengths, ids, lengths, ids, lengths, sums, sums)


def metrics(log_probs: float = -20.0, loss: float = 0.6931472) -> StepMetrics:
    sums = np.full(2, log_probs, np.float32)
    return StepMetrics(loss, 1.0, chosen_log_probs=sums, rejected_log_probs=sums)


def test_injection_is_what_the_configuration_says() -> None:
    check_injection(ADAPTER, AdapterFacts(("m.q",), 14))
    with pytest.raises(GuardError, match="would train 15 elements, the configuration implies 14"):
        check_injection(ADAPTER, AdapterFacts(("m.q",), 15))
    with pytest.raises(GuardError, match="other modules than the configuration names: m.k"):
        check_injection(ADAPTER, AdapterFacts(("m.q", "m.k"), 14))


@pytest.mark.parametrize("bad", [StepMetrics(float("nan"), 1.0), StepMetrics(1.0, float("inf"))])
def test_a_step_that_is_not_finite_names_its_rows(bad: StepMetrics) -> None:
    with pytest.raises(GuardError, match="are not finite; the batch was sft.jsonl: line 3, sft.jsonl: line 9"):
        guards.check_step(bad, ["sft.jsonl: line 3", "sft.jsonl: line 9"])


def test_a_step_skipped_under_the_loss_scale_is_not_an_error() -> None:
    guards.check_step(StepMetrics(1.0, float("inf"), skipped=True), [])


def test_the_first_update_must_have_a_gradient_and_an_effect() -> None:
    moved = AdapterState(ADAPTER.config, {"m.q": LoraFactors(ZERO.a, ZERO.b + 1)})
    guards.check_first_update(ADAPTER, moved, StepMetrics(1.0, 0.5))
    with pytest.raises(GuardError, match="gradient is exactly zero"):
        guards.check_first_update(ADAPTER, moved, StepMetrics(1.0, 0.0))
    with pytest.raises(GuardError, match="left the adapter as it was"):
        guards.check_first_update(ADAPTER, ADAPTER, StepMetrics(1.0, 0.5))


def test_the_base_must_not_change() -> None:
    check_base("same", "same")
    with pytest.raises(GuardError, match="base model's weights changed"):
        check_base("before", "after")


def test_the_first_preference_step_sees_its_own_reference() -> None:
    """5 tokens a completion: 5e-4 nats are noise in float32, 0.01 are not; in bfloat16 they are."""
    loss = PreferenceLoss("sigmoid")
    guards.check_first_preference_step([pairs()], metrics(-20.0004), loss, "float32")
    guards.check_first_preference_step([pairs()], metrics(-20.01), loss, "bfloat16")
    with pytest.raises(GuardError, match="the reference is not the adapter this stage starts from"):
        guards.check_first_preference_step([pairs()], metrics(-20.01), loss, "float32")


def test_a_turned_loss_is_noticed() -> None:
    """Log-ratios +1 and -1, beta 0.1: -log sigmoid(0.2) = 0.5981388694; the turned formula gives its negative."""
    batch = pairs()
    update = Update(1e-3, tokens=10, pairs=2)
    chosen, rejected = np.full(2, -19, np.float32), np.full(2, -21, np.float32)
    right = StepMetrics(0.59813887, 1.0, chosen_log_probs=chosen, rejected_log_probs=rejected)
    turned = StepMetrics(-0.59813887, 1.0, chosen_log_probs=chosen, rejected_log_probs=rejected)
    guards.check_preference_loss([batch], right, PreferenceLoss("sigmoid"), update)
    with pytest.raises(GuardError, match="it trains another objective than the configuration names"):
        guards.check_preference_loss([batch], turned, PreferenceLoss("sigmoid"), update)


def test_a_preference_stage_whose_gradient_is_zero_is_stopped() -> None:
    """Its loss would stay at ln 2 to the end: `0.6931 -> 0.6931`."""
    guards.check_preference_gradient(StepMetrics(math.log(2), 0.02))
    with pytest.raises(GuardError, match=r"gradient of the preference stage is zero \(norm 0\), .* stay at 0.6931"):
        guards.check_preference_gradient(StepMetrics(math.log(2), 0.0))
