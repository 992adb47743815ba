"""The loss scale of float16, with values worked out by hand."""

from __future__ import annotations

import pytest

from mindprint.loss_scale import initial_loss_scale, next_loss_scale


def test_only_float16_is_scaled() -> None:
    assert initial_loss_scale("float16") == 65536.0
    assert initial_loss_scale("bfloat16") is None
    assert initial_loss_scale("float32") is None


@pytest.mark.parametrize(
    ("scale", "applied_updates", "skipped", "expected"),
    [
        (65536.0, 0, True, 32768.0),  # an overflow halves it
        (65536.0, 2000, True, 32768.0),  # also where the count would double it
        (1.5, 10, True, 1.0),  # but not below 1
        (1.0, 10, True, 1.0),
        (65536.0, 1, False, 65536.0),
        (65536.0, 1999, False, 65536.0),
        (65536.0, 2000, False, 131072.0),  # the 2,000th update doubles it
        (131072.0, 2001, False, 131072.0),
        (131072.0, 4000, False, 262144.0),  # and the 4,000th
    ],
)
def test_it_halves_on_overflow_and_doubles_at_every_2000th_update(
    scale: float, applied_updates: int, skipped: bool, expected: float
) -> None:
    assert next_loss_scale(scale, applied_updates, skipped=skipped) == expected


def test_a_run_of_5000_updates_with_one_overflow() -> None:
    """Updates 1 to 2500, an overflow, updates 2501 to 5000: 2^16, doubled at 2000, halved, doubled at 4000."""
    scale = 2.0**16
    for update in range(1, 2501):
        scale = next_loss_scale(scale, update, skipped=False)
    assert scale == 2.0**17
    scale = next_loss_scale(scale, 2500, skipped=True)
    assert scale == 2.0**16
    for update in range(2501, 5001):
        scale = next_loss_scale(scale, update, skipped=False)
    assert scale == 2.0**17
