"""A base that transformers loads, and the handle that core holds."""

from __future__ import annotations

import gc
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from mindprint.contract import AdapterSite, Dtype, LoadedModel, LoraConfig, ModelSpec
from mindprint.errors import ModelError, first_line
from mindprint.kept_prompts import KeptPrompts
from mindprint.models.folder import weight_files
from mindprint.models.free_memory import trim_heap
from mindprint.models.quantized import Quantization, quantized_weights, read_quantization
from mindprint_torch.device_map import DeviceMap, device_of, make_device_map, move_at_borders, named_devices
from mindprint_torch.elementwise import triton_kernels
from mindprint_torch.head import Head, embedding_layer, read_head
from mindprint_torch.lora import LoraLayer
from mindprint_torch.norms import fuse_norms
from mindprint_torch.optimizer import Optimizer
from mindprint_torch.prompts import attends_without_mask, longest_shared
from mindprint_torch.quantized import packed_elements, packed_tensors, read_quantized_base
from mindprint_torch.quantizing import base_to_quantize
from mindprint_torch.ranks import rest_before_exchanges
from mindprint_torch.rope import read_rotary_limit
from mindprint_torch.rotation import fuse_rotation
from mindprint_torch.sharded_weights import read_sharded
from mindprint_torch.sharding import gathered_layers, take_turns
from mindprint_torch.sites import list_sites
from mindprint_torch.towers import concrete_class, model_class

TORCH_DTYPES: Mapping[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LOAD_FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    SafetensorError,
    SystemExit,
)
"""The errors that transformers and its model classes raise for folders that they cannot load."""


REPORTED = ("unexpected_keys", "missing_keys", "mismatched_keys", "error_msgs")
"""The parts of transformers' report on loading that are read here."""


@dataclass
class Adapter:
    """The injected adapter: the layer of each site, in the order of `config.target_modules`, and its optimizer."""

    config: LoraConfig
    layers: Mapping[str, LoraLayer]
    optimizer: Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = Optimizer(self.parameters)

    @property
    def parameters(self) -> list[Tensor]:
        """A and B of each site in turn, in the order of `layers`."""
        return [factor for layer in self.layers.values() for factor in layer.factors]


@dataclass
class TorchModel:
    """A loaded base and, once injected, its adapter.

    `base` are the base's weights, by their names at loading. `continues_rows` says whether prompts of unlike lengths
    can be continued together, and is None until that is measured (`generation.py`). `kept` holds the keys and values of
    conversations, by layer, each `[1, heads, tokens, dims]`.
    """

    network: PreTrainedModel
    head: Head
    device: torch.device
    dtype: Dtype
    sites: tuple[AdapterSite, ...]
    base: Mapping[str, Tensor]
    adapter: Adapter | None = None
    continues_rows: bool | None = None
    kept: KeptPrompts[tuple[tuple[Tensor, Tensor], ...]] = field(default_factory=KeptPrompts)

    @cached_property
    def longest_shared(self) -> int:
        """The longest sequence whose prompt can be read once for both of its completions (`prompts.py`).

        Measured when it is first asked for: only pairs of answers to one prompt need it.
        """
        return longest_shared(self.network, self.head)

    @cached_property
    def masks_forks(self) -> bool:
        """Whether rows with a shared prompt get a mask, or are read as plain rows (`forked_attention.py`)."""
        # A GPU's fast attention takes no mask. On a CPU a mask costs less than the copies.
        return not (self.longest_shared and self.device.type == "cuda" and attends_without_mask(self.head))


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load the folder `spec.path` frozen, in evaluation mode.

    Raises:
        ModelError: With one line that names the folder, if it cannot be loaded or does not run.
    """
    config = _read_config(spec)
    devices = _devices(spec)
    network, device_map, notes = _read_weights(spec, config, devices)
    network.eval().requires_grad_(False)
    # The folder's own sampling defaults must not leak into ours.
    network.generation_config = GenerationConfig()
    if spec.shard:
        take_turns(network)
    if spec.devices:
        move_at_borders(network, device_map)
    fused = triton_kernels(devices[0]) is not None
    # On a CPU the few passes of `elementwise.normalise` are faster than transformers' in float32 alone.
    if fused or (devices[0].type, spec.dtype) == ("cpu", "float32"):
        fuse_norms(network)
        for layer in gathered_layers(network):
            fuse_norms(layer)
    if fused:
        fuse_rotation(network)
    with _naming(spec.path):
        head = read_head(network, read_rotary_limit(network))
        if spec.shard and head.rotary_limit is not None:
            raise ModelError(
                "a base whose rotary embedding depends on the length of a row is not sharded: set backend.shard=false"
            )
    model = TorchModel(
        network=network,
        head=head,
        device=devices[0],
        dtype=spec.dtype,
        sites=list_sites(network),
        base=_weights(network),
    )
    if spec.shard:
        # The ranks measure it together: later, one of them may have no rows.
        _ = model.masks_forks
    # Conversions of weights and the trial runs above leave tens of megabytes.
    trim_heap()
    vocabulary = embedding_layer(network).num_embeddings
    parameters = network.num_parameters() + packed_elements(network)
    return LoadedModel(model, spec.device, spec.dtype, parameters, vocabulary, notes)


def _devices(spec: ModelSpec) -> tuple[torch.device, ...]:
    if spec.devices and spec.shard:
        raise ModelError("a base is not divided among ranks and among devices of one: set backend.shard=false")
    with _loading(spec.path):
        return named_devices(spec.devices) if spec.devices else (torch.device(spec.device),)


def release(model: TorchModel) -> None:
    """Drop everything the handle holds, and give cached device memory back."""
    rest_before_exchanges(None)
    vars(model).clear()
    gc.collect()
    trim_heap()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _read_config(spec: ModelSpec) -> PreTrainedConfig:
    folder = Path(spec.path)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json there; a model folder in Hugging Face layout is needed")
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder}: this folder holds an adapter; name the folder of its base model")
    with _loading(spec.path):
        _refuse_own_code(folder)
        # Without an answer, transformers would ask on the terminal whether to run the folder's own code.
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.is_encoder_decoder:
        raise ModelError(f"{folder}: {config.model_type} is an encoder-decoder; only causal models can be trained")
    return config


def _refuse_own_code(folder: Path) -> None:
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Many checkpoints of known classes name such code too, for older versions of transformers.
    if isinstance(stated, dict) and stated.get("auto_map") and stated.get("model_type") not in CONFIG_MAPPING:
        raise ModelError(
            f"model_type {stated.get('model_type')!r} is computed by code in the folder (auto_map), which is never run;"
            " take a model whose class is part of transformers"
        )


def _read_weights(
    spec: ModelSpec, config: PreTrainedConfig, devices: Sequence[torch.device]
) -> tuple[PreTrainedModel, DeviceMap, tuple[str, ...]]:
    """Return the network, the device of each of its parts, and sentences for the user."""
    attention, notes = _attention(config)
    # transformers chooses the files by the same rule, but follows an index out of the folder and would take a pickle.
    weight_files(Path(spec.path))
    settings = {
        "config": config,
        "dtype": TORCH_DTYPES[spec.dtype],
        "attn_implementation": attention,
        "local_files_only": True,
        # Mismatches come back in the report, which names the weights; by itself transformers only says "above".
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
    }
    device_map: DeviceMap = {"": devices[0]}
    stated = read_quantization(Path(spec.path))
    # This refuses packed tensors without a word in config.json, which would be read as numbers.
    quantized_weights(Path(spec.path))
    if spec.quantization and stated is None:
        raise ModelError(
            f"{spec.path}: the base is quantized ({spec.quantization}), and its config.json does not say how"
        )
    with _loading(spec.path):
        if spec.shard:
            if stated is not None or spec.quantize is not None:
                raise ModelError("a quantized base is not sharded: set backend.shard=false")
            network, names = read_sharded(
                Path(spec.path), config, TORCH_DTYPES[spec.dtype], torch.device(spec.device), attention
            )
            report: Mapping[str, Any] = {**dict.fromkeys(REPORTED, ()), "unexpected_keys": names}
        elif stated is not None or spec.quantize is not None:
            network, device_map, report = _read_packed(spec, config, stated, devices, settings)
            scheme = stated or spec.quantize
            notes += (f"the base is quantized ({scheme}), stays packed, and is computed with in {spec.dtype}",)
        else:
            if spec.devices:
                kind = concrete_class(config)
                device_map = make_device_map(kind, config, TORCH_DTYPES[spec.dtype], devices, {})
            kind = model_class(config)
            network, report = _from_pretrained(kind, spec.path, device_map, use_safetensors=True, **settings)
    # Parts for images and sound are taken out of the class, and their weights stay in the files.
    left_out = getattr(network, "left_out", ())
    unused = sorted(name for name in report["unexpected_keys"] if not name.startswith(left_out))
    _check_complete(spec.path, report, unused)
    if unused:
        notes += (f"{len(unused)} weights in the files are not part of the model: {_listed(unused)}",)
    return network, device_map, notes


def _read_packed(
    spec: ModelSpec,
    config: PreTrainedConfig,
    stated: Quantization | None,
    devices: Sequence[torch.device],
    settings: Mapping[str, Any],
) -> tuple[PreTrainedModel, DeviceMap, Mapping[str, Any]]:
    """Return a network over packed weights, the devices of its parts, and transformers' report on other weights."""
    # Seen by transformers, the section would make it load the weights in its own way.
    for part in (config, config.get_text_config()):
        for key in ("quantization", "quantization_config"):
            vars(part).pop(key, None)
    kind = concrete_class(config)
    if spec.quantize is None:
        assert stated is not None, "one of the two is why weights are packed"
        base = read_quantized_base(Path(spec.path), stated)
    else:
        base = base_to_quantize(Path(spec.path), kind, config, spec.quantize)
    kind, dtype = base.class_with_places(kind), TORCH_DTYPES[spec.dtype]
    device_map: DeviceMap = {"": devices[0]}
    if spec.devices:
        device_map = make_device_map(kind, config, dtype, devices, base.packed_bytes())
    network, report = _from_pretrained(kind, None, device_map, state_dict=dict(base.dense), **settings)
    base.fill(network, dtype, partial(device_of, device_map))
    return network, device_map, {**report, "unexpected_keys": {*report["unexpected_keys"], *base.unused(network)}}


def _from_pretrained(
    kind: Any, path: str | None, device_map: DeviceMap, **settings: Any
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Return a network whose weights are read onto their devices, and transformers' report."""
    devices = {str(device) for device in device_map.values()}
    # Weights stay mapped files where all of them are on the CPU.
    chosen = None if devices == {"cpu"} else dict(device_map)
    network, report = kind.from_pretrained(path, device_map=chosen, **settings)
    if len(devices) > 1:
        # accelerate's hooks, which `device_map.move_at_borders` does without.
        importlib.import_module("accelerate.hooks").remove_hook_from_submodules(network)
    return network, report


def _attention(config: PreTrainedConfig) -> tuple[str | None, tuple[str, ...]]:
    """Return the attention implementation to ask for; None lets transformers take SDPA where a class has it."""
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is None:
        return None, ()
    return "eager", ("attention is computed eagerly: SDPA cannot cap its scores as this model's config asks",)


def _check_complete(path: str, report: Mapping[str, Any], unused: list[str]) -> None:
    # transformers fills missing weights with random numbers, warns, and continues: here that is an error.
    missing = sorted(report["missing_keys"])
    if missing:
        named = f"; the files have {_listed(unused)} instead" if unused else ""
        raise ModelError(f"{path}: {len(missing)} weights are missing from the files: {_listed(missing)}{named}")
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if mismatched:
        raise ModelError(
            f"{path}: {len(mismatched)} weights have another shape than config.json: {_listed(mismatched)}"
        )
    if report["error_msgs"]:
        raise ModelError(f"{path}: {first_line(report['error_msgs'][0])}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _weights(network: PreTrainedModel) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, tied ones once."""
    weights: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        weights.setdefault(id(tensor), (name, tensor.detach()))
    return dict(weights.values()) | packed_tensors(network)


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """Turn every failure into one line, and keep transformers quiet: no progress bars, no load report."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: a file is not valid JSON: {error}") from error
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except LOAD_FAILURES as error:
        raise ModelError(
            f"{path}: transformers {transformers.__version__} cannot load it: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Name the folder in every error of the loaded model's first run."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except LOAD_FAILURES as error:
        raise ModelError(f"{path}: the model does not run: {type(error).__name__}: {first_line(error)}") from error
