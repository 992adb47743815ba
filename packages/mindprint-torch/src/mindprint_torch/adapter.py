"""LoRA on a base through PEFT, and the factors that it trains."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mindprint.adapter.initial import factor_shapes
from mindprint.adapter.targets import is_stack
from mindprint.contract import AdapterFacts, AdapterSite, AdapterState, Float32, LoraConfig, LoraFactors
from mindprint.errors import AdapterError
from mindprint.loss_scale import initial_loss_scale
from mindprint_torch import experts
from mindprint_torch.gated import fuse_gated
from mindprint_torch.lora import NAME, fuse_lora
from mindprint_torch.model import Adapter, AdapterLayer, TorchModel, layer_factors

HOLDER = "network"
"""The name of the network in the plain module that PEFT is given."""


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
    # PEFT draws initial values, which are overwritten: the caller's random numbers must not move for them.
    with torch.random.fork_rng(devices=[]):
        _inject_empty(model, adapter.config)
    modules = _attached(model, adapter.config)
    for layer in modules.values():
        _to_float32(layer)
    attached: dict[str, AdapterLayer] = {**modules, **experts.attach(model.network, sites, adapter.config)}
    layers = {name: attached[name] for name in adapter.config.target_modules}
    write_factors(layers, adapter.tensors)
    model.network.eval()
    fuse_lora(modules.values())
    fuse_gated(model.network)
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
    return {name: LoraFactors(*map(to_numpy, layer_factors(layer))) for name, layer in adapter.layers.items()}


@torch.no_grad()
def write_factors(layers: Mapping[str, AdapterLayer], tensors: Mapping[str, LoraFactors]) -> None:
    """Copy values into the layers' factors, which stay the same parameters: the optimizer holds them."""
    for name, layer in layers.items():
        for parameter, values in zip(layer_factors(layer), tensors[name], strict=True):
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
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)


@contextmanager
def dropout(model: TorchModel, *, seed: int, micro_batch: int) -> Iterator[None]:
    """Turn the adapter's dropout on within this context, its masks drawn from (seed, micro-batch) alone."""
    adapter = require_adapter(model)
    if not adapter.config.dropout:
        yield
        return
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(_mixed_seed(seed, micro_batch))
        for module in adapter.dropouts:
            module.train()
        try:
            yield
        finally:
            for module in adapter.dropouts:
                module.eval()


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


def _inject_empty(model: TorchModel, config: LoraConfig) -> None:
    """Let PEFT put its layers around the targets that are modules."""
    if all(is_stack(name) for name in config.target_modules):
        # PEFT refuses a configuration without modules.
        return
    # PEFT sees the network as part of a plain module. If it saw a transformers model it would, for mixtures of experts,
    # take the names of dense and shared-expert layers for old names of stacked experts and adapt those instead.
    holder = nn.ModuleDict({HOLDER: model.network})
    try:
        # What PEFT warns of (names, patterns, transposed layers) is checked afterwards, as an error.
        with warnings.catch_warnings(action="ignore"):
            peft.inject_adapter_in_model(_peft_config(config), holder, adapter_name=NAME)
    except (ValueError, TypeError) as error:
        raise AdapterError(f"PEFT {peft.__version__} cannot adapt this model: {error}") from error


def _to_float32(layer: LoraLayer) -> None:
    # PEFT makes factors in the base's dtype when it injects, and casts its input to whatever they are.
    for factor in layer_factors(layer):
        factor.data = factor.data.float()


def _peft_config(config: LoraConfig) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=[f"{HOLDER}.{name}" for name in config.target_modules if not is_stack(name)],
        lora_dropout=config.dropout,
        use_rslora=config.use_rslora,
        rank_pattern={_pattern(name): rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={_pattern(name): alpha for name, alpha in config.alpha_pattern.items()},
        bias="none",
    )


def _pattern(name: str) -> str:
    # PEFT reads keys as regular expressions that may match the end of a name. This one matches it whole.
    return "^" + re.escape(f"{HOLDER}.{name}")


def _attached(model: TorchModel, config: LoraConfig) -> dict[str, LoraLayer]:
    """Return PEFT's layers by site, after checking that they are exactly the targets that are modules."""
    # PEFT matches names by their ends, so that it may hit modules that nobody named.
    layers = {name: module for name, module in model.network.named_modules() if isinstance(module, LoraLayer)}
    targets = {name for name in config.target_modules if not is_stack(name)}
    if set(layers) != targets:
        different = sorted(set(layers) ^ targets)
        raise AdapterError(f"PEFT adapted other modules than were named: {', '.join(different[:3])}")
    for name, layer in layers.items():
        if layer.r[NAME] != config.rank(name) or layer.scaling[NAME] != config.scale(name):
            raise AdapterError(f"PEFT gave {name!r} rank {layer.r[NAME]} and scale {layer.scaling[NAME]}")
    return layers
