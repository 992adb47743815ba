"""Reading a base of which each rank holds a part: no rank ever has all of it in memory.

The network is made without memory for its weights. Then each rank reads its rows of every weight from the safetensors
files. So the files must have the class's own names and shapes: what transformers converts while it reads is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedConfig, PreTrainedModel

from mindprint.errors import ModelError
from mindprint.models.folder import tensors
from mindprint.models.free_memory import return_freed_arrays, trim_heap
from mindprint.plugins.launched import torchrun_world
from mindprint_torch import ranks
from mindprint_torch.sharding import decoder_layers, row_range
from mindprint_torch.towers import concrete_class

MOST_NAMED = 3


def read_sharded(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, attention: str | None
) -> tuple[PreTrainedModel, list[str]]:
    """Return a network whose decoder layers are divided among the ranks, and the weights in the files that it lacks.

    Raises:
        ModelError: The base cannot be sharded. All ranks raise it before any of them waits for another one.
    """
    _, size = torchrun_world()
    if size == 1:
        raise ModelError("a single process does not shard a base: start several, or set backend.shard=false")
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"a base is not sharded on {device.type}: set backend.shard=false")
    # Layers come and go in each pass, and a rank was to hold only its part. Before the network is made: its weights are
    # allocated and freed, and would leave gaps of their size in the heap, whose pages stay resident once they are used.
    return_freed_arrays()
    network = _empty_network(config, dtype, attention)
    trim_heap()
    layers = decoder_layers(network)
    names = _file_names(network, folder)
    ranks.join()
    mesh = init_device_mesh(device.type, (size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    _fill(network, folder, names, mesh, dtype, device)
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return network, sorted(set(tensors(folder)) - set(names.values()))


def _empty_network(config: PreTrainedConfig, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """Return a network whose weights take no memory, but whose buffers are computed."""
    kind = concrete_class(config)
    settings: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    with init_empty_weights(include_buffers=False):
        network: PreTrainedModel = kind._from_config(config, dtype=dtype, **settings)
    kept = {*(network._keep_in_fp32_modules or ()), *(network._keep_in_fp32_modules_strict or ())}
    if kept and dtype != torch.float32:
        raise ModelError(
            f"{kind.__name__} keeps {', '.join(sorted(kept))} in float32, which is not sharded: set "
            "backend.dtype=float32, or backend.shard=false"
        )
    # Made apart by the context, which replaces each weight by one without memory.
    network.tie_weights()
    return network


def _weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers, tied ones under all of their names."""
    yield from network.state_dict(keep_vars=True).items()


def _file_names(network: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Return the tensor in the files of each weight, tied ones once."""
    files, prefix = tensors(folder), f"{network.base_model_prefix}."
    aliases: dict[int, list[str]] = {}
    for name, weight in _weights(network):
        aliases.setdefault(id(weight), []).append(name)
    expected = dict(_weights(network))
    found, missing = {}, []
    for same in aliases.values():
        # A folder that was saved from the class without its head has names without the prefix.
        stored = next((name for each in same for name in (each, each.removeprefix(prefix)) if name in files), None)
        if stored is None or files[stored].shape != tuple(expected[same[0]].shape):
            missing.append(same[0])
        else:
            found[same[0]] = stored
    if missing:
        raise ModelError(
            f"{len(missing)} weights are not in the files under the names and with the shapes of "
            f"{type(network).__name__} ({', '.join(missing[:MOST_NAMED])}), so that ranks cannot read parts of them: "
            "set backend.shard=false"
        )
    return found


def _fill(
    network: PreTrainedModel,
    folder: Path,
    names: dict[str, str],
    mesh: DeviceMesh,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Read this rank's rows of the sharded weights, and all of the others."""
    files = tensors(folder)
    placed: dict[int, Tensor] = {}
    for name, weight in _weights(network):
        if name in names:
            # Opened for each weight: as long as a file is open, all pages of it that were read count as memory.
            with safe_open(files[names[name]].file, framework="pt") as opened:
                placed[id(weight)] = _placed(opened.get_slice(names[name]), weight, mesh, dtype, device)
    # Tied weights are one parameter under several names.
    state = {name: placed[id(weight)] for name, weight in _weights(network)}
    network.load_state_dict(state, assign=True)


def _placed(part: Any, weight: Tensor, mesh: DeviceMesh, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a weight as this rank holds it, read from a slice of its file."""
    chosen = dtype if weight.is_floating_point() else weight.dtype
    if isinstance(weight, DTensor):
        start, end = row_range(weight.shape[0], mesh.get_local_rank(), mesh.size())
        # Copied, so that the file need not stay mapped.
        rows = part[start:end].to(device, chosen, copy=True)
        values: Tensor = DTensor.from_local(
            rows, mesh, [Shard(0)], run_check=False, shape=weight.shape, stride=weight.stride()
        )
    else:
        values = (part[:] if weight.ndim else part[...]).to(device, chosen, copy=True)
    return nn.Parameter(values, requires_grad=False) if isinstance(weight, nn.Parameter) else values
