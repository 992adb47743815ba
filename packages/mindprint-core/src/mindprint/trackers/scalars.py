"""The numbers of a step that a tracker plots."""

from __future__ import annotations

from dataclasses import asdict

from mindprint.events import StepDone

_NOT_PLOTTED = ("topic", "stage", "backend", "step", "stage_step")


def step_scalars(event: StepDone) -> dict[str, float]:
    """Return the numbers of a step by name, under its stage (`sft/loss`), without those that do not apply."""
    values = {name: value for name, value in asdict(event).items() if name not in _NOT_PLOTTED and value is not None}
    return {f"{event.stage}/{name}": float(value) for name, value in values.items()}
