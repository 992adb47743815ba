"""Training settings that suit an amount of writing and a size of the base model.

They are a rule that docs/prepare.md describes. `benchmarks/prepare.py settings` is the experiment that checks it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

BATCH = 4
"""Rows, and pairs, in a step: those of a new mindprint.yaml."""

SFT_STEPS = 60, 600
"""Fewer steps move a voice little. With more, the model has seen enough of the person's text."""

SFT_EPOCHS = 2, 6
"""A row that is read more often is learned by heart."""

DPO_EPOCHS = 2
DPO_STEPS = 10, 100

# Larger models are moved by smaller steps. Parameters up to which a rate is proposed.
SFT_RATES = ((1e9, "5e-4"), (5e9, "3e-4"), (2e10, "2e-4"), (math.inf, "1e-4"))
DPO_RATES = ((1e9, "2e-5"), (5e9, "1e-5"), (math.inf, "5e-6"))


def proposed_settings(rows: int, pairs: int, parameters: int) -> Mapping[str, str]:
    """Return settings by their places in a new mindprint.yaml.

    Args:
        rows: SFT rows of the topic that has the fewest.
        pairs: Preference pairs of the topic that has the fewest.
        parameters: Weights of the base model.
    """
    per_epoch = max(1, math.ceil(rows / BATCH))
    # As many passes as reach the fewest steps, and no more than read each row a few times.
    epochs = _within(SFT_EPOCHS, math.ceil(SFT_STEPS[0] / per_epoch))
    if epochs * per_epoch > SFT_STEPS[1]:
        epochs = max(1, SFT_STEPS[1] // per_epoch)
    return {
        "sft_epochs": str(epochs),
        "sft_rate": next(rate for most, rate in SFT_RATES if parameters <= most),
        "dpo_steps": str(_within(DPO_STEPS, math.ceil(DPO_EPOCHS * pairs / BATCH))),
        "dpo_rate": next(rate for most, rate in DPO_RATES if parameters <= most),
    }


def _within(bounds: tuple[int, int], value: int) -> int:
    return min(max(value, bounds[0]), bounds[1])
