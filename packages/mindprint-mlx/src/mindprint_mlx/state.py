"""Everything training continues from, as NumPy in PEFT's layout, exact in both directions."""

from __future__ import annotations

import mlx.core as mx

from mindprint.contract import AdapterState, TrainingState
from mindprint.errors import AdapterError
from mindprint.loss_scale import initial_loss_scale
from mindprint_mlx import adapter as adapters
from mindprint_mlx.model import Adapter, MlxModel
from mindprint_mlx.optimizer import Moments


def save(model: MlxModel) -> TrainingState:
    """Return copies of the adapter, its moments and AdamW's step count."""
    adapter = adapters.require_adapter(model)
    with model.in_use():
        return TrainingState(
            adapter=AdapterState(adapter.config, adapters.to_tensors(adapter, adapter.factors)),
            first_moments=adapters.to_tensors(adapter, adapter.moments.first),
            second_moments=adapters.to_tensors(adapter, adapter.moments.second),
            optimizer_steps=adapter.moments.steps,
            loss_scale=model.loss_scale,
        )


def restore(model: MlxModel, state: TrainingState) -> None:
    """Continue from `state`, whichever backend saved it. Without moments the optimizer starts from scratch.

    Raises:
        AdapterError: If the state is of another adapter configuration than the injected one.
    """
    adapter = adapters.require_adapter(model)
    if state.adapter.config != adapter.config:
        raise AdapterError("the saved state is of an adapter with another configuration than the injected one")
    with model.in_use():
        factors = adapters.to_factors(adapter.config, state.adapter.tensors, adapter.places)
        moments = _moments(adapter, state)
        mx.eval(factors, moments.first, moments.second)
    model.kept.forget()
    adapter.factors, adapter.moments = factors, moments
    adapters.assign(adapter, factors)
    # The state may come from a run in another dtype, on another backend: only float16 here needs a scale.
    if model.loss_scale is not None:
        model.loss_scale = initial_loss_scale("float16") if state.loss_scale is None else state.loss_scale


def _moments(adapter: Adapter, state: TrainingState) -> Moments:
    if not state.first_moments and not state.second_moments:
        return Moments()
    first, second = (
        adapters.to_factors(adapter.config, tensors, adapter.places)
        for tensors in (state.first_moments, state.second_moments)
    )
    return Moments(first, second, state.optimizer_steps)
