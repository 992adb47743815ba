"""LoRA on a base, and the factors that it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from mindprint.adapter.initial import factor_shapes
from mindprint.adapter.targets import is_stack
from mindprint.contract import AdapterFacts, AdapterSite, AdapterState, Float32, LoraFactors
from mindprint.errors import AdapterError
from mindprint.loss_scale import initial_loss_scale
from mindprint_torch import experts
from mindprint_torch.asked import skip_unasked
from mindprint_torch.gated import fuse_gated
from mindprint_torch.lora import LoraLayer, attach
from mindprint_torch.model import Adapter, TorchModel
from mindprint_torch.sharding import gathered_layers


def inject(model: TorchModel, adapter: AdapterState) -> AdapterFacts:
    """Attach `adapter` to exactly its target modules, with its values, float32 and trainable.

    Raises:
        AdapterError: If the model has an adapter already, or the adapter does not fit the model.
    """
    if model.adapter is not None:
        raise AdapterError("the model has an adapter already; load the base again to inject another one")
    sites = {site.name: site for site in model.sites}
    for name in adapter.config.target_modules:
        _check_fits(name, sites.get(name), adapter)
    stacks = experts.attach(model.network, sites, adapter.config)
    layers = {
        name: stacks[name] if is_stack(name) else attach(model.network.get_submodule(name), sites[name], adapter.config)
        for name in adapter.config.target_modules
    }
    write_factors(layers, adapter.tensors)
    fuse_gated(model.network)
    for gathered in gathered_layers(model.network):
        fuse_gated(gathered)
    skip_unasked(model.head)
    model.adapter = Adapter(adapter.config, layers)
    model.kept.forget()
    model.adapter.optimizer.loss_scale = initial_loss_scale(model.dtype)
    trainable = sum(parameter.numel() for parameter in model.network.parameters() if parameter.requires_grad)
    return AdapterFacts(tuple(layers), trainable)


def require_adapter(model: TorchModel) -> Adapter:
    """The model's adapter. Raises `AdapterError` if it has none."""
    if model.adapter is None:
        raise AdapterError("the model has no adapter; inject one first")
    return model.adapter


def read_factors(adapter: Adapter) -> dict[str, LoraFactors]:
    """Return copies of all factors, float32."""
    return {name: LoraFactors(*map(to_numpy, layer.factors)) for name, layer in adapter.layers.items()}


@torch.no_grad()
def write_factors(layers: Mapping[str, LoraLayer], tensors: Mapping[str, LoraFactors]) -> None:
    """Copy values into the layers' factors, which stay the same parameters: the optimizer holds them."""
    for name, layer in layers.items():
        for parameter, values in zip(layer.factors, tensors[name], strict=True):
            parameter.copy_(to_torch(values))


def to_numpy(tensor: Tensor) -> Float32:
    """Return a copy in NumPy's memory, float32."""
    return np.array(tensor.detach().cpu().numpy(), dtype=np.float32, copy=True)


def to_torch(values: Float32) -> Tensor:
    """Return a copy in torch's memory, float32, on the CPU."""
    return torch.from_numpy(np.array(values, dtype=np.float32, copy=True))


@contextmanager
def adapter_enabled(model: TorchModel, *, enabled: bool) -> Iterator[None]:
    """Compute with the adapter within this context, or with the base alone."""
    if enabled or model.adapter is None:
        yield
        return
    layers = model.adapter.layers.values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


@contextmanager
def dropout(model: TorchModel, *, seed: int, micro_batch: int) -> Iterator[None]:
    """Turn the adapter's dropout on within this context, its masks drawn from (seed, micro-batch) alone."""
    adapter = require_adapter(model)
    if not adapter.config.dropout:
        yield
        return
    devices = {factor.device for factor in adapter.parameters if factor.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        torch.manual_seed(_mixed_seed(seed, micro_batch))
        for layer in adapter.layers.values():
            layer.dropout.train()
        try:
            yield
        finally:
            for layer in adapter.layers.values():
                layer.dropout.eval()


def _mixed_seed(seed: int, micro_batch: int) -> int:
    # Adding the two would give neighbouring steps the same masks. torch takes seeds of 63 bits.
    return int(np.random.SeedSequence([seed, micro_batch]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _check_fits(name: str, site: AdapterSite | None, adapter: AdapterState) -> None:
    if site is None:
        raise AdapterError(f"the model has no module {name!r} that can take LoRA")
    if name not in adapter.tensors:
        raise AdapterError(f"the adapter has no tensors for {name!r}")
    if site.kind == "experts" and adapter.config.dropout:
        raise AdapterError(f"{name!r} is a stack of experts, on which PEFT has no dropout: set it to 0")
    expected = factor_shapes(site, adapter.config.rank(name))
    shapes = tuple(np.shape(values) for values in adapter.tensors[name])
    if shapes != expected:
        raise AdapterError(f"the adapter's factors of {name!r} are {shapes}, the model needs {expected}")
