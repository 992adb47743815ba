"""Everything training continues from, as NumPy."""

from __future__ import annotations

from torch import Tensor

from mindprint.contract import AdapterState, LoraFactors, TrainingState
from mindprint.errors import AdapterError
from mindprint.loss_scale import initial_loss_scale
from mindprint_torch.adapter import read_factors, require_adapter, to_numpy, to_torch, write_factors
from mindprint_torch.model import Adapter, TorchModel


def save(model: TorchModel) -> TrainingState:
    """Return copies of the adapter, its moments and AdamW's step count."""
    adapter = require_adapter(model)
    return TrainingState(
        adapter=AdapterState(adapter.config, read_factors(adapter)),
        first_moments=_read_moments(adapter, 0),
        second_moments=_read_moments(adapter, 1),
        optimizer_steps=adapter.optimizer.steps,
        loss_scale=adapter.optimizer.loss_scale,
    )


def restore(model: TorchModel, state: TrainingState) -> None:
    """Continue from `state`, whichever backend saved it. Without moments the optimizer starts from scratch.

    Raises:
        AdapterError: If the state is of another adapter configuration than the injected one.
    """
    adapter = require_adapter(model)
    if state.adapter.config != adapter.config:
        raise AdapterError("the state is of another adapter configuration than the injected adapter")
    write_factors(adapter.layers, state.adapter.tensors)
    model.kept.forget()
    adapter.optimizer.restore(_moment_pairs(adapter, state), state.optimizer_steps)
    adapter.optimizer.loss_scale = _loss_scale(model, state)


def _read_moments(adapter: Adapter, which: int) -> dict[str, LoraFactors]:
    if not adapter.optimizer.steps:
        return {}
    return {
        name: LoraFactors(*(to_numpy(adapter.optimizer.moments(factor)[which]) for factor in layer.factors))
        for name, layer in adapter.layers.items()
    }


def _moment_pairs(adapter: Adapter, state: TrainingState) -> list[tuple[Tensor, Tensor]]:
    """Return first and second moment of A, then of B, of each site in turn: the order of the adapter's parameters."""
    if not state.first_moments:
        return []
    return [
        (to_torch(first), to_torch(second))
        for name in adapter.layers
        for first, second in zip(state.first_moments[name], state.second_moments[name], strict=True)
    ]


def _loss_scale(model: TorchModel, state: TrainingState) -> float | None:
    # The state may come from a run in another dtype, on another backend: only float16 here needs a scale.
    initial = initial_loss_scale(model.dtype)
    return initial if initial is None or state.loss_scale is None else state.loss_scale
