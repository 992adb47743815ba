"""Each loss against numbers worked out by hand, and its gradient against finite differences.

One pair serves all: policy sums -10 (chosen) and -14 (rejected), reference sums -12 and -11, 4 and 6 completion tokens.
So the log-ratios are +2 and -3, their difference 5, their means a token +1/2 and -1/2. With beta = 0.1 the DPO logit
is 0.5. Each expectation below is the formula with these numbers; `e` values to ten digits from a calculator:
e^-0.5 = 0.6065306597, e^-0.1 = 0.9048374180, e^-0.2 = 0.8187307531, e^-0.3 = 0.7408182207.
"""

import math

import numpy as np
import pytest

from mindprint.losses import NUMPY, PairLogProbs, PreferenceLoss, sft_loss

PAIR = PairLogProbs(
    policy_chosen=np.array([-10.0]),
    policy_rejected=np.array([-14.0]),
    reference_chosen=np.array([-12.0]),
    reference_rejected=np.array([-11.0]),
    chosen_tokens=np.array([4]),
    rejected_tokens=np.array([6]),
)

NEG_LOG_SIGMOID_HALF = 0.4740769842  # ln(1 + e^-0.5) = ln 1.6065306597
NEG_LOG_SIGMOID_MINUS_HALF = 0.9740769842  # the same + 0.5, since log sigmoid(-x) = log sigmoid(x) - x

EXPECTED = {
    # Rafailov eq. 7: -log sigmoid(0.1 * 5)
    "sigmoid": (PreferenceLoss("sigmoid"), NEG_LOG_SIGMOID_HALF),
    # cDPO: 0.9 * 0.4740769842 + 0.1 * 0.9740769842
    "sigmoid smoothed": (PreferenceLoss("sigmoid", label_smoothing=0.1), 0.5240769842),
    # max(0, 1 - 0.5)
    "hinge": (PreferenceLoss("hinge"), 0.5),
    # means differ by 1: (1 - 1 / (2 * 0.1))^2 = (-4)^2
    "ipo": (PreferenceLoss("ipo"), 16.0),
    # (0.9 * 0.4740769842 - 0.1 * 0.9740769842) / 0.8
    "robust": (PreferenceLoss("robust", label_smoothing=0.1), 0.4115769842),
    # 1 - sigmoid(0.2) + sigmoid(-0.3) = 0.4501660027 + 0.4255574832
    "apo_zero": (PreferenceLoss("apo_zero"), 0.8757234859),
    # sigmoid(0.2) + 1 - sigmoid(0.5) = 0.5498339973 + 0.3775406688
    "apo_down": (PreferenceLoss("apo_down"), 0.9273746661),
    # -log sigmoid(0.1 * 1) = ln 1.9048374180
    "sigmoid_norm": (PreferenceLoss("sigmoid_norm"), 0.6443966600),
    # means -5/2 and -7/3: log odds = -1/6 - [ln(1 - e^-2.5) - ln(1 - e^-2.3333333333)]
    #   = -0.1666666667 - [ln 0.9179150014 - ln 0.9030280321] = -0.1666666667 - 0.0163511990 = -0.1830178656
    #   0.1 * ln(1 + e^0.1830178656) = 0.1 * 0.7888372253
    "orpo": (PreferenceLoss("orpo", sft_weight=1.0), 0.0788837225),
    # 2 * (-1/6) - 0.5 = -0.8333333333; ln(1 + e^0.8333333333) = ln 3.3009758909
    "simpo": (PreferenceLoss("simpo", beta=2.0, gamma=0.5), 1.1942181493),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_value_by_hand(case: str) -> None:
    loss, expected = EXPECTED[case]
    assert loss.per_pair(NUMPY, PAIR)[0] == pytest.approx(expected, abs=5e-8)


@pytest.mark.parametrize("case", EXPECTED)
def test_gradient_points_from_rejected_to_chosen(case: str) -> None:
    """A step down the loss raises the chosen log-prob relative to the rejected one; apo_down may lower both."""
    loss, _ = EXPECTED[case]
    chosen, rejected = (_slope(loss, field) for field in ("policy_chosen", "policy_rejected"))
    assert chosen < rejected


def test_sign_of_the_dpo_loss() -> None:
    """The published `-mean(logaddexp(0, -logits))` falls as the rejected answer gains; ours must rise.

    At logits 0 the loss is +ln 2 with slope -beta/2 in the chosen log-prob; the turned formula has -ln 2 and +beta/2.
    """
    zero = PairLogProbs(*(np.zeros(1) for _ in range(4)), np.ones(1), np.ones(1))
    loss = PreferenceLoss("sigmoid", beta=0.1)
    assert loss.per_pair(NUMPY, zero)[0] == pytest.approx(math.log(2), rel=1e-12)
    assert _slope(loss, "policy_chosen", zero) == pytest.approx(-0.05, rel=1e-6)
    assert _slope(loss, "policy_rejected", zero) == pytest.approx(+0.05, rel=1e-6)


def test_values_at_zero_are_those_of_the_papers() -> None:
    expected = {
        "sigmoid": math.log(2),
        "hinge": 1.0,
        "ipo": 25.0,  # (1 / (2 * 0.1))^2
        "robust": math.log(2),
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "sigmoid_norm": math.log(2),
    }
    assert {name: PreferenceLoss(name).at_zero() for name in expected} == pytest.approx(expected, rel=1e-12)


def test_total_is_a_sum_over_micro_batches() -> None:
    """Two pairs in one batch equal the same two as micro-batches: normalizers are the step's, not the batch's."""
    two = PairLogProbs(*(np.repeat(field, 2) + np.array([0, 1]) for field in _fields(PAIR)))
    parts = [PairLogProbs(*(field[i : i + 1] for field in _fields(two))) for i in range(2)]
    loss = PreferenceLoss("sigmoid", sft_weight=0.25)
    tokens = int(two.chosen_tokens.sum())
    whole = loss.total(NUMPY, two, pair_count=2, chosen_token_count=tokens)
    split = sum(loss.total(NUMPY, part, pair_count=2, chosen_token_count=tokens) for part in parts)
    assert whole == pytest.approx(split, rel=1e-15)


def test_sft_term_is_the_mean_over_chosen_tokens() -> None:
    """0.4740769842 + 0.5 * 10 / 4."""
    loss = PreferenceLoss("sigmoid", sft_weight=0.5)
    total = loss.total(NUMPY, PAIR, pair_count=1, chosen_token_count=4)
    assert total == pytest.approx(NEG_LOG_SIGMOID_HALF + 1.25, abs=5e-8)


def test_rewards_are_per_pair() -> None:
    chosen, rejected = PreferenceLoss("sigmoid", beta=0.1).rewards(PAIR)
    assert (chosen[0], rejected[0]) == pytest.approx((0.2, -0.3))
    chosen, rejected = PreferenceLoss("simpo", beta=2.0).rewards(PAIR)
    assert (chosen[0], rejected[0]) == pytest.approx((-5.0, -14 / 3))


def test_log_sigmoid_does_not_overflow() -> None:
    values = NUMPY.log_sigmoid(np.array([-1e4, 0.0, 1e4]))
    assert values == pytest.approx([-1e4, -math.log(2), 0.0])


def test_sft_loss_is_a_mean_over_tokens_not_rows() -> None:
    """Rows of 1 and 3 tokens with log-probs -4 and -1: (4 + 3) / 4, not the mean of row means 2.5."""
    log_probs = np.array([[-4.0, -9.0, -9.0], [-1.0, -1.0, -1.0]])
    mask = np.array([[True, False, False], [True, True, True]])
    assert sft_loss(log_probs, mask) == pytest.approx(1.75)


def _fields(pairs: PairLogProbs) -> list[np.ndarray]:
    return [getattr(pairs, name) for name in pairs.__dataclass_fields__]


def _slope(loss: PreferenceLoss, field: str, pairs: PairLogProbs = PAIR, step: float = 1e-6) -> float:
    def value(change: float) -> float:
        moved = PairLogProbs(**{**vars(pairs), field: getattr(pairs, field) + change})
        return float(loss.per_pair(NUMPY, moved)[0])

    return (value(step) - value(-step)) / (2 * step)
