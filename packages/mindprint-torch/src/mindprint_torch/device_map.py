"""A base whose decoder layers are on several devices of one process, in their order.

transformers reads each weight at once onto the device that its `device_map` names. Everything but the layers is on the
first device: the token embedding, the last norm and the output layer. Rows and masks are made there, and hidden states
come back to it. Hooks of ours move the inputs of a layer to its device. Those of accelerate replace the function
`forward` of every module, which is where the adapter and the recomputation of activations work, and move a mask again
for each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from mindprint.errors import ModelError
from mindprint_torch.forked_attention import mask_on

DeviceMap = Mapping[str, torch.device]
"""The device of each part of a network, by its path."""


def named_devices(names: Sequence[str]) -> tuple[torch.device, ...]:
    """Return the devices with these names.

    Raises:
        ModelError: One of them is not here, or its number is missing.
    """
    devices = tuple(torch.device(name) for name in names)
    for name, device in zip(names, devices, strict=True):
        if device.type == "cuda":
            count = torch.cuda.device_count()
            if device.index is None:
                raise ModelError(f"backend.devices names {name!r} without a number: write cuda:0 for the first one")
            if device.index >= count:
                raise ModelError(f"backend.devices names {name!r}, and {count} CUDA devices are visible here")
        elif torch.empty(0, device=device).device != device:
            # The CPU is one device, whichever number it is given.
            raise ModelError(f"backend.devices names {name!r}, of which there is one here: write {device.type!r}")
    return devices


def make_device_map(
    kind: Any, config: PreTrainedConfig, dtype: torch.dtype, devices: Sequence[torch.device], packed: Mapping[str, int]
) -> dict[str, torch.device]:
    """Return the device of each part of a network, so that the fullest device holds as few bytes as possible.

    Args:
        kind: The network's class.
        config: The base's configuration.
        dtype: The dtype of the weights.
        devices: The devices, in the order of the layers.
        packed: The bytes of packed weights, by the path of their module.

    Raises:
        ModelError: The network has no layers that are known, or they share weights.
    """
    with torch.device("meta"):
        network: nn.Module = kind(deepcopy(config))
    layers = dict(_decoder_layers(network))
    sizes = {path: _size(layer, path, dtype, packed) for path, layer in layers.items()}
    rest = _size(network, "", dtype, packed) - sum(sizes.values())
    counts = share_layers(list(sizes.values()), rest, len(devices))
    placed = dict.fromkeys(_other_parts(network, layers), devices[0])
    homes = [device for device, count in zip(devices, counts, strict=True) for _ in range(count)]
    return placed | dict(zip(layers, homes, strict=True))


def share_layers(sizes: Sequence[int], rest: int, devices: int) -> list[int]:
    """Return how many layers each device gets, in their order. The first device also holds the rest of the network.

    The sum of the devices' squared sizes is the smallest that there is.
    """
    ends = [0, *accumulate(sizes)]
    # For each number of layers: the smallest sum of squares with the devices so far, and the counts that make it.
    best = {count: ((rest + ends[count]) ** 2, [count]) for count in range(len(ends))}
    for _ in range(1, devices):
        best = {
            count: min(
                (best[before][0] + (ends[count] - ends[before]) ** 2, [*best[before][1], count - before])
                for before in range(count + 1)
            )
            for count in range(len(ends))
        }
    return best[len(sizes)][1]


def move_at_borders(network: nn.Module, device_map: DeviceMap) -> None:
    """Let the inputs of each layer move to its device, and the hidden states of the last one to the first device."""
    layers = dict(_decoder_layers(network))
    moves = _Moves()
    for path, layer in layers.items():
        layer.register_forward_pre_hook(partial(moves.enter, device_map[path]), with_kwargs=True)
    first = next(device for path, device in device_map.items() if path not in layers)
    list(layers.values())[-1].register_forward_hook(partial(moves.leave, first))


def device_of(device_map: DeviceMap, path: str) -> torch.device:
    """Return the device of a module, which is that of the part that it belongs to."""
    while path not in device_map:
        path = path.rpartition(".")[0]
    return device_map[path]


class _Moves:
    """The inputs that were moved in one pass: masks and angles go to a device once, not once for each layer."""

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._moved: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def enter(self, device: torch.device, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return a layer's inputs on its device."""
        self._start_on(device)
        return self._on(device, args), {name: self._on(device, value) for name, value in kwargs.items()}

    def leave(self, device: torch.device, _: nn.Module, __: Any, output: Any) -> Any:
        """Return the last layer's output on the first device, and forget what was moved."""
        self._start_on(device)
        moved = self._on(device, output)
        self._moved.clear()
        return moved

    def _start_on(self, device: torch.device) -> None:
        if device.type == "cuda":
            # Triton starts kernels on the current device, whichever their tensors are on.
            torch.cuda.set_device(device)
            if self._device is not None and self._device != device and torch.is_grad_enabled():
                # Each GPU has its own generator. Continued here, dropout draws the masks of a single device.
                torch.cuda.set_rng_state(torch.cuda.get_rng_state(self._device), device)
        self._device = device

    def _on(self, device: torch.device, value: Any) -> Any:
        if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
            return type(value)(self._on(device, part) for part in value)
        if not isinstance(value, Tensor) or value.device == device:
            return value
        key = id(value), device
        if key not in self._moved:
            # The tensor is kept next to its copy, so that no other one can get its id.
            self._moved[key] = value, mask_on(device, value)
        return self._moved[key][1]


def _decoder_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that are not within another one, with their paths, in their order.

    Raises:
        ModelError: There are none, or they share weights.
    """
    layers: dict[str, nn.Module] = {}
    for path, module in network.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(path.startswith(f"{outer}.") for outer in layers):
            layers[path] = module
    name = type(network).__name__
    if not layers:
        raise ModelError(f"{name} has no decoder layers that are known here: set backend.device, not backend.devices")
    weights = [weight for layer in layers.values() for weight in layer.parameters()]
    if len({id(weight) for weight in weights}) < len(weights):
        raise ModelError(f"{name} has layers that share weights: set backend.device, not backend.devices")
    yield from layers.items()


def _other_parts(network: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the paths of the largest modules that hold no layer, and of weights next to those that do."""
    outside: list[str] = []
    for path, module in network.named_modules():
        if any(path == known or path.startswith(f"{known}.") for known in (*layers, *outside)):
            continue
        if any(layer.startswith(f"{path}.") for layer in layers) or not path:
            yield from (f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False))
            yield from (f"{path}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False))
        else:
            outside.append(path)
            yield path


def _size(module: nn.Module, path: str, dtype: torch.dtype, packed: Mapping[str, int]) -> int:
    """Return the bytes of a module's weights, those that are shared once."""
    within = f"{path}." if path else ""
    dense = sum(weight.numel() for weight in module.parameters()) * dtype.itemsize
    return dense + sum(size for name, size in packed.items() if name.startswith(within))
