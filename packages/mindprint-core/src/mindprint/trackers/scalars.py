"""The numbers of steps and evaluations that a tracker plots."""

from __future__ import annotations

from dataclasses import asdict

from mindprint.events import Evaluated, StepDone

_NOT_PLOTTED = ("topic", "stage", "backend", "step", "stage_step")


def step_scalars(event: StepDone) -> dict[str, float]:
    """Return the numbers of a step by name, under its stage (`sft/loss`), without those that do not apply."""
    values = {name: value for name, value in asdict(event).items() if name not in _NOT_PLOTTED and value is not None}
    return {f"{event.stage}/{name}": float(value) for name, value in values.items()}


def evaluation_scalars(event: Evaluated) -> dict[str, float]:
    """Return the voices of an evaluation by level and name, without those that were not scored.

    A voice that was not told from people has the name of what it is, as in every report:
    `evaluation/final/distance_from_the_base_model`.
    """
    figures, level = event.record.figures, event.record.level
    voices = {figures.voice_name: figures.voice, f"base {figures.voice_name}": figures.base_voice}
    voices["people voice"] = figures.people_voice
    scored = {name.replace(" ", "_"): voice.value for name, voice in voices.items() if voice is not None}
    return {f"evaluation/{level}/{name}": value for name, value in scored.items()}
