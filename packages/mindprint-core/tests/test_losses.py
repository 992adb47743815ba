"""Each loss against numbers worked out by hand, and its gradient against finite differences.

One pair serves all: policy sums -10 (chosen) and -14 (rejected), reference sums -12 and -11, 4 and 6 completion tokens.
So the log-ratios are +2 and -3, their difference 5, their means a token +1/2 and -1/2. With beta = 0.1 the DPO logit
is 0.5. Each expectation below is the formula with these numbers; `e` values to ten digits from a calculator:
e^-0.5 = 0.6065306597, e^-0.1 = 0.9048374180, e^-0.2 = 0.8187307531, e^-0.3 = 0.7408182207.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from mindprint import losses
from mindprint.config import DpoConfig
from mindprint.losses import (
    NUMPY,
    PAIRWISE_LOSSES,
    PairLogProbs,
    PreferenceLoss,
    PreferenceLossName,
    default_sft_weight,
    sft_loss,
    takes_label_smoothing,
)

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


def test_the_names_are_those_defined() -> None:
    assert get_args(PreferenceLossName) == tuple(PAIRWISE_LOSSES)


def test_constants_of_the_configuration_come_from_the_definition() -> None:
    """ORPO has its SFT term by definition, and label smoothing means something to two losses."""
    assert {name for name in PAIRWISE_LOSSES if default_sft_weight(name)} == {"orpo"}
    assert {name for name in PAIRWISE_LOSSES if takes_label_smoothing(name)} == {"sigmoid", "robust"}
    assert DpoConfig(loss="orpo").preference_loss().sft_weight == 1.0
    assert DpoConfig(loss="orpo", sft_weight=0.0).preference_loss().sft_weight == 0.0
    with pytest.raises(ValueError, match="no meaning for the loss 'hinge', only for sigmoid and robust"):
        DpoConfig(loss="hinge", label_smoothing=0.1)


TWO = PairLogProbs(*(np.repeat(field, 2) + np.array([0, 1]) for field in _fields(PAIR)))
"""Two unlike pairs."""

PADDING = {
    "as the first pair": None,
    "nothing": (0.0, 0.0),  # no tokens: a division by 0, and ORPO's log(1 - e^0)
    "a certainty": (0.0, 3.0),
    "far away": (-1e30, 1.0),
    "positive": (40.0, 5.0),  # no log-prob, but padding may hold anything: e^40
}
"""The log-probs and the numbers of tokens of a row that pads the batch."""


def _padded(padding: str) -> PairLogProbs:
    """Return the two pairs, followed by two rows of padding."""
    fields = []
    for name, values in zip(TWO.__dataclass_fields__, _fields(TWO), strict=True):
        log_prob, tokens = PADDING[padding] or (values[0], values[0])
        fields.append(np.append(values, [tokens if name.endswith("tokens") else log_prob] * 2))
    return PairLogProbs(*fields)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("case", EXPECTED)
def test_padded_pairs_change_no_number(case: str, padding: str) -> None:
    """Loss and gradient of two pairs in a batch of four are bit for bit those of the two alone; padding has none."""
    loss = replace(EXPECTED[case][0], sft_weight=0.25)
    counts = {"pair_count": 2, "chosen_token_count": int(TWO.chosen_tokens.sum())}
    weights, padded = np.array([1.0, 1.0, 0.0, 0.0]), _padded(padding)

    def total(pairs: PairLogProbs, field: str, row: int, change: float, weights: np.ndarray | None) -> float:
        values = getattr(pairs, field).copy()
        values[row] += change
        return float(loss.total(NUMPY, replace(pairs, **{field: values}), **counts, weights=weights))

    with np.errstate(all="raise"):  # no division by 0, no overflow, no NaN on the way either
        expected = total(TWO, "policy_chosen", 0, 0.0, None)
        assert total(TWO, "policy_chosen", 0, 0.0, np.ones(2)) == expected
        assert total(padded, "policy_chosen", 0, 0.0, weights) == pytest.approx(expected, rel=1e-15)
        for field in ("policy_chosen", "policy_rejected"):
            for row in range(4):
                up, down = (total(padded, field, row, change, weights) for change in (1e-4, -1e-4))
                if row < 2:
                    plain = (total(TWO, field, row, change, None) for change in (1e-4, -1e-4))
                    assert (up, down) == pytest.approx(tuple(plain), rel=1e-14)
                else:
                    assert up == down == total(padded, field, 0, 0.0, weights)


@pytest.mark.parametrize("name", [name for name, loss in PAIRWISE_LOSSES.items() if loss.reference_free])
def test_padding_without_a_reference(name: PreferenceLossName) -> None:
    free = replace(_padded("nothing"), reference_chosen=None, reference_rejected=None)
    counts = {"pair_count": 2, "chosen_token_count": 9}
    alone = PreferenceLoss(name).total(NUMPY, TWO, **counts)
    padded = PreferenceLoss(name).total(NUMPY, free, **counts, weights=np.array([1.0, 1.0, 0.0, 0.0]))
    assert padded == pytest.approx(alone, rel=1e-15)


ADDED = """

def _square(_xp, loss, chosen, rejected):
    return (1 - loss.beta * (chosen - rejected)) ** 2


PAIRWISE_LOSSES["square"] = PairwiseLoss(_square)
"""

TRAIN = """
import json, sys, mindprint
from mindprint.config import Config
model, data, run = sys.argv[1:]
mindprint.train({"model": {"name": model}, "backend": "toy", "data": {"path": data}, "adapter": {"r": 2},
    "sft": {"steps_per_topic": 1}, "dpo": {"loss": "square", "steps_per_topic": 2, "batch_size": 2}}, run=run)
print(json.dumps(Config.model_json_schema()["$defs"]["DpoConfig"]["properties"]["loss"]["enum"]))
"""


def test_a_pairwise_loss_is_added_in_one_place(toy_site: Path, toy_model: Path, tmp_path: Path) -> None:
    """In losses.py alone: the configuration knows it, a backend trains on it, and the guards recompute it.

    All of core but losses.py is linked into a folder, and losses.py gets a name, a formula and a line. At the first
    step policy and reference are equal, so that the loss is (1 - 0)^2.
    """
    source, copy = Path(losses.__file__), tmp_path / "site" / "mindprint"
    copy.mkdir(parents=True)
    for path in source.parent.iterdir():
        if path.name not in ("losses.py", "__pycache__"):
            (copy / path.name).symlink_to(path)
    text = source.read_text(encoding="utf-8")
    assert text.count('"sigmoid", "hinge",') == 1
    (copy / "losses.py").write_text(text.replace('"sigmoid", "hinge",', '"sigmoid", "square", "hinge",') + ADDED)
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"{n}?", "chosen": "aye", "rejected": "no"} for n in range(4)]
    (tmp_path / "data" / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    (tmp_path / "data" / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sft))
    path = os.pathsep.join([str(copy.parent), str(toy_site), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", TRAIN, str(toy_model), str(tmp_path / "data"), str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "square" in json.loads(done.stdout.splitlines()[-1])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    preference = [line["loss"] for line in lines if line["stage"] == "dpo"]
    assert preference[0] == pytest.approx(1.0, abs=1e-6)
    assert preference[1] < preference[0]
