"""Training state out of a model and into it: NumPy arrays in PEFT's layout, exact in both directions."""

from __future__ import annotations

import mlx.core as mx

from mindprint.contract import AdapterState, TrainingState
from mindprint.errors import AdapterError
from mindprint.loss_scale import INITIAL_LOSS_SCALE
from mindprint_mlx import adapter as adapters
from mindprint_mlx.model import Adapter, Handle
from mindprint_mlx.optimizer import Moments


def save(handle: Handle) -> TrainingState:
    """Copy out adapter, moments, step count and loss scale. Raises `AdapterError` if there is no adapter."""
    adapter = _adapter(handle)
    with handle.in_use():
        return TrainingState(
            adapter=AdapterState(adapter.config, adapters.to_tensors(adapter, adapter.factors)),
            first_moments=adapters.to_tensors(adapter, adapter.moments.first),
            second_moments=adapters.to_tensors(adapter, adapter.moments.second),
            optimizer_steps=adapter.moments.steps,
            loss_scale=handle.loss_scale,
        )


def restore(handle: Handle, state: TrainingState) -> bool:
    """Take over a state that any backend saved. Raises `AdapterError` if it is of another configuration."""
    adapter = _adapter(handle)
    if state.adapter.config != adapter.config:
        raise AdapterError("the saved state is of an adapter with another configuration than the injected one")
    with handle.in_use():
        factors = adapters.to_factors(adapter.config, state.adapter.tensors, adapter.places)
        moments = _moments(adapter, state)
        mx.eval(factors, moments.first, moments.second)
    adapter.factors, adapter.moments = factors, moments
    adapters.assign(adapter, factors)
    if handle.loss_scale is not None:
        handle.loss_scale = INITIAL_LOSS_SCALE if state.loss_scale is None else state.loss_scale
    return True


def _moments(adapter: Adapter, state: TrainingState) -> Moments:
    if not state.first_moments and not state.second_moments:
        return Moments()
    first, second = (
        adapters.to_factors(adapter.config, tensors, adapter.places)
        for tensors in (state.first_moments, state.second_moments)
    )
    return Moments(first, second, state.optimizer_steps)


def _adapter(handle: Handle) -> Adapter:
    if handle.adapter is None:
        raise AdapterError("the model has no adapter; inject one first")
    return handle.adapter
