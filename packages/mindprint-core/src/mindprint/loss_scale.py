"""The loss scale of float16 training (Micikevicius et al. 2018, arXiv 1710.03740), for every backend alike.

float16 holds no magnitude below 6e-8, so that small gradients would become 0 on the way back. A backend multiplies the
loss by the scale before its backward pass and divides the gradients by it afterwards, in float32.
"""

from __future__ import annotations

from mindprint.contract import Dtype

INITIAL_LOSS_SCALE = 2.0**16
"""The scale of the first step, as in `torch.amp.GradScaler`."""

GROWTH_UPDATES = 2000
"""The scale doubles each time this many updates were applied."""


def initial_loss_scale(dtype: Dtype) -> float | None:
    """Return the scale to start with, or None where losses need none: only float16 does."""
    return INITIAL_LOSS_SCALE if dtype == "float16" else None


def next_loss_scale(scale: float, applied_updates: int, *, skipped: bool) -> float:
    """Return the scale for the next step.

    The scale halves, down to 1 at least, when scaled gradients overflowed and the step was skipped. It doubles at every
    2,000th applied update.

    Args:
        scale: The scale of the step that was just taken.
        applied_updates: The number of updates applied so far, this step's included unless it was skipped.
        skipped: Whether the step was skipped because its gradients were not finite.
    """
    if skipped:
        return max(scale / 2, 1.0)
    # `torch.amp.GradScaler` counts the steps since the last overflow instead. Counting updates needs no counter in
    # addition to AdamW's step count, which every checkpoint has, so that a resumed run scales as an uninterrupted one.
    return scale * 2 if applied_updates % GROWTH_UPDATES == 0 else scale
