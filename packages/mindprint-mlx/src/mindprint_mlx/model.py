"""A base that is built from a folder in Hugging Face layout, and the handle that core holds.

mlx-lm's own loader is not used. It drops fields of a configuration that its class does not read, uses defaults for
those that it does not find, and imports torch on the way (see `architectures.py`). Loading here is strict: every tensor
of the checkpoint is used, and every parameter of the model comes from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn

from mindprint.adapter.targets import is_router
from mindprint.contract import AdapterSite, LoadedModel, LoraConfig, ModelSpec
from mindprint.errors import ModelError
from mindprint.kept_prompts import KeptPrompts
from mindprint.loss_scale import initial_loss_scale
from mindprint.models.folder import weight_files
from mindprint.models.layer_names import is_fused_output
from mindprint_mlx import architectures, devices, memory
from mindprint_mlx.arrays import DTYPES, parameters_of
from mindprint_mlx.experts import StackPlace, stack_places
from mindprint_mlx.families import family
from mindprint_mlx.head import Head, read_head
from mindprint_mlx.imports import mlx_lm_module
from mindprint_mlx.optimizer import Moments
from mindprint_mlx.packed_layers import PACKED, PackedEmbedding, PackedLinear
from mindprint_mlx.prompts import longest_shared
from mindprint_mlx.quantized import (
    PackedWeights,
    check_scales,
    dense_elements,
    full_precision_config,
    is_packed,
    split_packed,
)
from mindprint_mlx.rows import can_continue_rows
from mindprint_mlx.towers import Tower, language_model

IGNORED_TENSORS = ("rotary_emb.inv_freq", ".masked_bias", ".attention.bias", ".attn.bias")
"""Name endings of buffers that old checkpoints have and no model needs."""

TOKEN_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "embeddings.weight")
"""Name endings of the table of token embeddings."""

IGNORED_PARTS = ("mtp.",)
"""Beginnings of names of tensors that transformers ignores: layers that guess several tokens at once."""


@dataclass(frozen=True)
class Place:
    """A site in the MLX module tree: an attribute of a parent module, and the base layer that is there."""

    site: str
    parent: Any
    attribute: str
    layer: nn.Module

    def put(self, layer: nn.Module) -> None:
        """Put a layer in place of the one that is there."""
        # A module is a dict of its parts, some of which are lists.
        self.parent[int(self.attribute) if isinstance(self.parent, list) else self.attribute] = layer

    def put_base(self) -> None:
        """Put the base layer back."""
        self.put(self.layer)

    @property
    def adapter_site(self) -> AdapterSite:
        rows, columns = self.layer.weight.shape
        if isinstance(self.layer, nn.Embedding):
            return AdapterSite(self.site, "embedding", rows, columns)
        return AdapterSite(self.site, "linear", columns, rows)


@dataclass
class Adapter:
    """An injected adapter: its configuration, the layers that apply it, and its values.

    `factors` holds `<site>.a` `[in, r]` and `<site>.b` `[r, out]`, float32, in the layout of mlx-lm's linear layers. A
    stack of experts has one pair for each, `[experts, in, r]` and `[experts, r, out]`.
    """

    config: LoraConfig
    places: tuple[Place | StackPlace, ...]
    layers: Mapping[str, nn.Module]
    factors: dict[str, mx.array]
    moments: Moments = field(default_factory=Moments)


@dataclass
class MlxModel:
    """A loaded base and, once injected, its adapter: everything about one model, so that two share nothing.

    `continues_rows` says that rows of unlike lengths can be continued together (`rows.py`). `head_tokens` is how many
    tokens the body reads for as many products as the head takes for one log-prob. `longest_shared` is how long prompt
    and completion may be together, each the longest of a batch, for a prompt to be read once for both of its
    completions (`prompts.py`). `kept` holds the keys and values of conversations, by layer, each
    `[1, heads, tokens, dims]`.
    """

    module: nn.Module
    head: Head
    places: tuple[Place | StackPlace, ...]
    device: mx.Device
    loss_scale: float | None
    continues_rows: bool = False
    longest_shared: int = 0
    parameters: int = 0
    head_tokens: float = 0.0
    adapter: Adapter | None = None
    kept: KeptPrompts[tuple[tuple[mx.array, mx.array], ...]] = field(default_factory=KeptPrompts)

    @property
    def sites(self) -> tuple[AdapterSite, ...]:
        """Every place that can take LoRA, under transformers' names, in the model's order."""
        return tuple(place.adapter_site for place in self.places)

    def new_cache(self) -> list[Any]:
        """Return an empty cache for each layer, to generate with."""
        # Windows are masks here, and the class must not forget keys by a window of its choice.
        caches = mlx_lm_module("models.cache")
        made = caches.make_prompt_cache(self.module)
        return [caches.KVCache() if isinstance(cache, caches.RotatingKVCache) else cache for cache in made]

    @contextmanager
    def in_use(self, *, adapter: bool = True) -> Iterator[None]:
        """Compute on this model's device within this context, and without its adapter if `adapter` is False."""
        hidden = self.adapter.layers if self.adapter and not adapter else {}
        places = [place for place in self.places if place.site in hidden]
        with mx.stream(self.device):
            try:
                for place in places:
                    place.put_base()
                yield
            finally:
                for place in places:
                    place.put(hidden[place.site])


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load the folder `spec.path` frozen, in evaluation mode, with weights in `spec.dtype`.

    Raises:
        ModelError: For a folder that is incomplete, weights that do not fit, quantization, and every configuration that
            mlx-lm's class would compute otherwise than transformers does.
    """
    folder = Path(spec.path)
    config = full_precision_config(read_config(folder))
    tower, architecture = _read_architecture(folder, config)
    with memory.loading(devices.device(spec.device)):
        return _load(spec, tower, architecture)


def _load(spec: ModelSpec, tower: Tower, architecture: architectures.Architecture) -> LoadedModel:
    """Build the model, read its weights, and try out how it can be called."""
    folder = Path(spec.path)
    with mx.stream(devices.device(spec.device)):
        module = _build(architecture, folder)
        stored = _read_weights(folder)
        packed = split_packed(folder, stored, DTYPES[spec.dtype], devices.device(spec.device))
        if spec.quantization and packed.stated is None:
            raise ModelError(
                f"{folder}: is said to be quantized ({spec.quantization}), and its config.json states no such thing"
            )
        weights = tower.own_tensors(stored)
        del stored
        names = _load_weights(architecture, module, weights, packed, DTYPES[spec.dtype], folder)
        names = {parameter: tower.site(name) for parameter, name in names.items()}
        window = architectures.complete(architecture, module)
        module.eval()
        head = read_head(module)
    model = MlxModel(
        module=module,
        head=head,
        places=(
            *_places(architecture.configuration.model_type, module, names),
            *stack_places(architecture.configuration.model_type, module),
        ),
        device=devices.device(spec.device),
        loss_scale=initial_loss_scale(spec.dtype),
    )
    with model.in_use():
        model.continues_rows = can_continue_rows(module, model.new_cache())
        model.longest_shared = longest_shared(head, model.new_cache(), window)
    model.parameters = dense_elements(module)
    model.head_tokens = _head_tokens(head, model.parameters)
    notes = (*architecture.notes, *packed.note(spec.dtype))
    return LoadedModel(model, spec.device, spec.dtype, model.parameters, head.vocabulary, notes)


def _head_tokens(head: Head, parameters: int) -> float:
    """Return the elements of the LM head for each element of the body's layers."""
    if head.body is None:
        return 0.0  # it sees every token
    # MLX computes nothing for a shape.
    elements = head.vocabulary * head.states(mx.zeros((1, 1), mx.int32)).shape[-1]
    # A tied head is the table of token embeddings, by which nothing else is multiplied.
    tables = 2 * elements if "lm_head" in head.module else elements
    return elements / max(parameters - tables, 1)


def _read_architecture(folder: Path, config: Mapping[str, Any]) -> tuple[Tower, architectures.Architecture]:
    """Return the language model of a configuration, and its class."""
    try:
        _refuse_own_code(config)
        tower = language_model(config)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    try:
        return tower, architectures.architecture(tower.config)
    except ModelError as error:
        remedy = "train it with backend.type=torch, which has transformers' own class"
        raise ModelError(f"{folder}: {error}; {remedy}") from error


def release(model: MlxModel) -> None:
    """Drop every array that the model holds, and give its memory back."""
    model.adapter = None
    model.places = ()
    model.module = nn.Module()
    model.head = Head(model.module, 0)
    memory.give_back()


def read_config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json.

    Raises:
        ModelError: If there is none, or none that names a model type.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: no config.json; a model folder in Hugging Face layout is needed") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path}: does not name a model_type")
    return config


def _refuse_own_code(config: Mapping[str, Any]) -> None:
    # Many checkpoints of known classes name such code too, for older versions of transformers.
    if config.get("auto_map") and not architectures.is_known(config["model_type"]):
        raise ModelError(
            f"model_type {config['model_type']!r} is computed by code in the folder (auto_map), which is never run; "
            "take a model whose class is part of mlx-lm"
        )


def _build(architecture: architectures.Architecture, folder: Path) -> nn.Module:
    try:
        return architectures.build(architecture)
    except (Exception, SystemExit) as error:  # a class may raise anything when its arguments do not fit
        raise ModelError(f"{folder}: mlx-lm cannot build this model from its config.json ({error})") from error


def _read_weights(folder: Path) -> dict[str, mx.array]:
    """Return all tensors of the folder's safetensors files, not read from disk yet."""
    weights: dict[str, mx.array] = {}
    for shard in weight_files(folder):
        weights |= _read_shard(shard)
    return {
        name: values
        for name, values in weights.items()
        if not name.endswith(IGNORED_TENSORS) and not name.startswith(IGNORED_PARTS)
    }


def _read_shard(shard: Path) -> dict[str, mx.array]:
    try:
        return dict(mx.load(str(shard)))  # type: ignore[arg-type]  # of safetensors it is a mapping
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(f"{shard}: cannot be read as safetensors ({error})") from error


def _load_weights(
    architecture: architectures.Architecture,
    module: nn.Module,
    weights: dict[str, mx.array],
    packed: PackedWeights,
    dtype: mx.Dtype,
    folder: Path,
) -> dict[str, str]:
    """Put the checkpoint into the module, and return the transformers name of every parameter that has one.

    `weights` is empty afterwards.
    """
    # A class may rename, join or drop tensors (`sanitize`). A tensor that it only renames is the same object
    # afterwards, which maps names for any family. Joined tensors have no single name in transformers.
    sanitized = module.sanitize(dict(weights)) if hasattr(module, "sanitize") else dict(weights)
    _check_complete(module, weights, sanitized, folder)
    original = {id(values): name for name, values in weights.items()}
    names = {name: original[id(values)] for name, values in sanitized.items() if id(values) in original}
    if stored_name := family(architecture.configuration.model_type).stored_name:
        names = {name: stored_name(name) for name in sanitized}
    packed.place(module, sanitized)
    # Nothing is read yet, because mx.load is lazy. Read and cast one parameter after the other, and keep no tensor of
    # the files, so that the files' dtype and the one asked for are never both in memory for more than one parameter.
    weights.clear()
    module.load_weights([(name, _read_cast(sanitized, name, dtype)) for name in list(sanitized)], strict=True)
    check_scales(folder, module)
    return names


def _read_cast(lazy: dict[str, mx.array], name: str, dtype: mx.Dtype) -> mx.array:
    """Take a tensor out of those that are not read yet, read it, and return it in a dtype."""
    stored = lazy.pop(name)
    values = stored if is_packed(name) else stored.astype(dtype)
    mx.eval(values)
    return values


def _check_complete(
    module: nn.Module, weights: Mapping[str, mx.array], sanitized: Mapping[str, mx.array], folder: Path
) -> None:
    expected = dict(parameters_of(module))
    if missing := sorted(expected.keys() - sanitized.keys()):
        named = f"; the files have {_listed(others)} instead" if (others := sorted(sanitized.keys() - expected)) else ""
        raise ModelError(f"{folder}: the weights lack {_listed(missing)}, which mlx-lm's class needs{named}")
    if unexpected := sorted(sanitized.keys() - expected.keys()):
        raise ModelError(f"{folder}: mlx-lm's class has no place for {_listed(unexpected)}")
    wrong = [name for name, values in expected.items() if values.shape != sanitized[name].shape]
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"{folder}: {name} is {list(sanitized[name].shape)}, its config.json implies {list(expected[name].shape)}"
        )
    # A quantized checkpoint without a word in its config.json would otherwise be read as numbers.
    if integers := sorted(name for name, values in sanitized.items() if not mx.issubdtype(values.dtype, mx.floating)):
        raise ModelError(f"{folder}: {_listed(integers)} holds no floating-point numbers; quantized weights?")
    _check_dropped(weights, sanitized, folder)


def _check_dropped(weights: Mapping[str, mx.array], sanitized: Mapping[str, mx.array], folder: Path) -> None:
    """Refuse a checkpoint if the class drops part of it, except a head that is a copy of the tied embedding."""
    lost = sum(values.size for values in weights.values()) - sum(values.size for values in sanitized.values())
    kept = {id(values) for values in sanitized.values()}
    head = weights.get("lm_head.weight")
    if head is not None and id(head) not in kept:
        tables = [values for name, values in weights.items() if name.endswith(TOKEN_EMBEDDINGS)]
        if not any(table.shape == head.shape and mx.array_equal(table, head).item() for table in tables):
            raise ModelError(f"{folder}: the config ties the LM head to the embedding, but lm_head.weight differs")
        lost -= head.size
    if lost:
        names = sorted(name for name, values in weights.items() if id(values) not in kept)
        raise ModelError(f"{folder}: mlx-lm's class drops {lost} elements of the checkpoint (among {_listed(names)})")


def _places(model_type: str, module: nn.Module, names: Mapping[str, str]) -> Iterator[Place]:
    """Yield every linear layer and embedding whose weight has one name in transformers, in the model's order."""
    modules: dict[str, nn.Module] = dict(module.named_modules())
    for parameter, _ in parameters_of(module):
        path = parameter.removesuffix(".weight").removesuffix(f".{PACKED}")
        name = names.get(f"{path}.weight", "").removesuffix(".weight")
        layer = modules.get(path, module)
        # Other tables than the tokens', of positions for example, take no LoRA on PyTorch either.
        if isinstance(layer, nn.Embedding) and not f"{path}.weight".endswith(TOKEN_EMBEDDINGS):
            continue
        if (
            type(layer) not in (nn.Linear, nn.Embedding, PackedLinear, PackedEmbedding)
            or is_router(name)
            or is_fused_output(model_type, name)
        ):
            continue
        if name:
            parent, _, attribute = path.rpartition(".")
            yield Place(name, _part(module, parent), attribute, layer)


def _part(module: nn.Module, path: str) -> Any:
    """Return the module or the list of modules at a path."""
    part: Any = module
    for name in filter(None, path.split(".")):
        part = part[int(name) if isinstance(part, list) else name]
    return part


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
