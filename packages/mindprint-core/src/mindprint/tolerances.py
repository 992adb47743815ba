"""Every tolerance by which Mindprint compares two computations of the same thing, in one table.

Guards of a run, the self-check of an installation, `verify` and `compare` import from here. docs/numerics.md says how
each was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from mindprint.contract import Dtype

LOG_PROB_NOISE: Mapping[Dtype, float] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Nats a token by which two evaluations of the same model may differ (batch shape, kernels), by the base's dtype."""

LOG_PROB_EXCESS = 1e-2
"""Nats a token by which a log-prob may be above 0. float32's log-softmax rounds by 1e-3 for logits near 10,000."""

SFT_EVALUATION_TOLERANCE: Mapping[Dtype, float] = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
"""Relative to 1 + loss: how far a step's SFT loss may be from that of the log-probs of its rows, by the base's dtype.

Both are of the same weights and rows, on one backend, but training and evaluation are different code there.
"""

LOSS_TOLERANCE = 1e-4
"""Relative to 1 + loss: how far a backend's float32 loss may be from core's, computed from its log-probs."""

PROBE_TOLERANCES: Mapping[Dtype, tuple[float, float]] = {
    "float32": (1e-5, 1e-4),
    "float16": (1e-2, 1e-1),
    "bfloat16": (8e-2, 8e-1),
}
"""Mean and greatest difference of log-probs, in nats a token, of one model on two machines or backends.

float32: the bound between torch and MLX in docs/numerics.md. The others are bounds of rounding. A logit near 16 is
known to 2^-7 in float16 and to 2^-4 in bfloat16, and the mean error over many tokens is about a third of that. Where
log-probs are greater, the mean follows them: see `MEAN_ERRORS`.
"""

FLOAT32_ROUNDING = 2.0**-24
"""Half a unit in the last place of float32, relative to the value."""

ROUNDINGS: Mapping[Dtype, float] = {"float32": FLOAT32_ROUNDING, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half a unit in the last place of each dtype, relative to the value."""

MEAN_ERRORS, GREATEST_ERRORS, LOG_PROB_ROUNDINGS = 2.5, 100.0, 8.0
"""How many times `log_prob_error` two evaluations may differ, on average and at one token, and how many roundings of a
log-prob's own size are allowed on top in float32. In 16 bits the mean may be `MEAN_ERRORS` roundings of the mean
log-prob. docs/fingerprint.md has the measurements."""


def log_prob_error(dtype: Dtype, layers: int, width: int) -> float:
    """Return the expected error of a log-prob that a dtype computes through `layers` layers of `width` units.

    In float32 a product over `width` terms collects `width` roundings of 2^-24 with random signs, which grow as their
    square root (Higham 2002, section 2.8). In 16 bits products are summed in float32, and what is rounded is the
    residual stream, twice in each layer. The layers add errors that are independent: a square root again.
    """
    roundings = layers * width if dtype == "float32" else 2 * layers
    return ROUNDINGS[dtype] * math.sqrt(roundings)


SFT_TOLERANCE = 1e-5
"""|a - b| / (1 + a) of SFT losses of two backends, at every step."""

FREE_TOLERANCE = 1e-3
"""The same from the first preference step on, where trajectories run free and amplify rounding."""

VOICE_TOLERANCE = 0.05
"""Difference of the voice scores of two runs that are called equivalent, of the scale from 0 to 1."""
